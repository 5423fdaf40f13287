"""Our advantages of GRPO and RLOO, and the correction for the rollout engine, against TRL's, on random inputs.

TRL has them in its trainers' `_generate_and_score_completions`, which is called with what it reads of its trainer:
completions, scores and log-probs that are there already. See test_trl_losses.py.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainers.advantages import Samples
from trainers.importance import Correction, token_factors
from trainers.losses import grpo, rloo

trl = pytest.importorskip("trl", reason="not installed: make test-parity")
pytestmark = pytest.mark.parity

PROMPTS, GROUP, WIDTH = 4, 4, 6
ROWS = PROMPTS * GROUP
SEEDS = range(3)


def samples_of(seed: int) -> Samples:
    """Responses of 1 to 6 tokens, whole groups one after the other; two have no score, one group is all alike."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(WIDTH)[None, :] < torch.randint(1, WIDTH + 1, (ROWS, 1), generator=generator)
    mask[0] = True
    scores = torch.rand(ROWS, generator=generator)
    scores[[1, GROUP + 2]] = torch.nan
    scores[2 * GROUP : 3 * GROUP] = 0.5
    return Samples(
        mask=mask,
        scores=scores,
        groups=torch.arange(ROWS) // GROUP,
        ended=torch.ones(ROWS, dtype=torch.bool),
        old_logprobs=-3 * torch.rand(ROWS, WIDTH, generator=generator),
        reference_logprobs=-3 * torch.rand(ROWS, WIDTH, generator=generator),
    )


def rollout_logprobs_of(samples: Samples, *, seed: int) -> Tensor:
    """Return what another engine says of the same tokens: near ours, but for some that are far off either way."""
    generator = torch.Generator().manual_seed(100 + seed)
    return samples.old_logprobs - 0.8 * torch.randn(ROWS, WIDTH, generator=generator)


def scored(name: str, samples: Samples, *, rollout_logprobs: Tensor | None = None, **attributes: Any) -> dict[str, Any]:
    """Return what a trainer of TRL's makes of samples: its batch, `advantages` and ratios among it."""
    lengths = samples.mask.sum(dim=1).tolist()
    completions = [[7] * length for length in lengths]
    prompts = [[5, 6]] * ROWS
    sampled = None
    if rollout_logprobs is not None:
        sampled = [row[:length].tolist() for row, length in zip(rollout_logprobs, lengths, strict=True)]
    more = (None, completions, sampled, {}, None, None) if name == "GRPOTrainer" else (completions,)
    policy = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    reference = SimpleNamespace()

    def logprobs(model: Any, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        return (samples.old_logprobs if model is policy else samples.reference_logprobs), None, None

    told = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            process_index=0,
            gather=lambda values: values,
            reduce=lambda values, reduction: values,
        ),
        args=SimpleNamespace(
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=ROWS,
            steps_per_generation=1,
        ),
        environment_factories=None,
        environments=None,
        mask_truncated_completions=False,
        model=policy,
        multi_objective_aggregation="sum_then_normalize",
        num_generations=GROUP,
        num_iterations=1,
        pad_to_multiple_of=None,
        ref_model=reference,
        reward_clip_range=None,
        reward_func_names=["score"],
        reward_weights=torch.ones(1),
        tools=None,
        use_vllm=rollout_logprobs is not None,
        vllm_importance_sampling_correction=rollout_logprobs is not None,
        _calculate_rewards=lambda *_: samples.scores[:, None],
        _generate=lambda _: (prompts, completions, *more),
        _get_per_token_logps_and_entropies=logprobs,
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _metrics={"train": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        _tokenizer=SimpleNamespace(pad_token_id=0),
        **attributes,
    )
    if name == "RLOOTrainer":
        told._generate = lambda _: (prompts, completions, completions)
    found: dict[str, Any] = getattr(trl, name)._generate_and_score_completions(told, [{"prompt": "?"}] * ROWS)
    assert found["completion_mask"].bool().equal(samples.mask)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("scale", "theirs"), [("std", "group"), ("none", "none")])
def test_advantages_of_a_group_are_trls(scale: str, theirs: str, seed: int) -> None:
    samples = samples_of(seed)
    config = grpo.Config.model_validate({"scale": scale})
    ours = grpo.advantages(samples, config).advantages
    wanted = scored("GRPOTrainer", samples, scale_rewards=theirs, beta=0.0)["advantages"]
    torch.testing.assert_close(ours, torch.where(samples.mask, wanted[:, None], 0.0), atol=1e-5, rtol=1e-5)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("price", [0.0, 0.05])
def test_advantages_against_a_groups_others_are_trls(price: float, seed: int) -> None:
    samples = samples_of(seed)
    ours = rloo.advantages(samples, rloo.Config(kl_coefficient=price)).advantages
    wanted = scored("RLOOTrainer", samples, normalize_advantages=False, beta=price)["advantages"]
    torch.testing.assert_close(ours, torch.where(samples.mask, wanted[:, None], 0.0), atol=1e-5, rtol=1e-5)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kind", "cap", "floor"),
    [
        ("token-truncate", 1.5, 0.0),
        ("token-mask", 1.5, 0.0),
        ("token-mask", 2.0, 0.5),
        ("token-mask", math.inf, 0.5),
        ("sequence-truncate", 1.5, 0.0),
        ("sequence-mask", 1.5, 0.0),
        ("sequence-mask", 3.0, 0.5),
    ],
)
def test_a_correction_for_the_rollout_engine_is_trls(kind: Correction, cap: float, floor: float, seed: int) -> None:
    samples = samples_of(seed)
    rollout = rollout_logprobs_of(samples, seed=seed)
    ours = token_factors(samples.old_logprobs - rollout, samples.mask, kind=kind, cap=cap, floor=floor)
    found = scored(
        "GRPOTrainer",
        samples,
        rollout_logprobs=rollout,
        beta=0.0,
        scale_rewards="group",
        vllm_importance_sampling_mode=kind.replace("-", "_"),
        vllm_importance_sampling_clip_max=None if cap == math.inf else cap,
        vllm_importance_sampling_clip_min=floor or None,
    )
    wanted = found["importance_sampling_ratio"].expand(ROWS, WIDTH)
    torch.testing.assert_close(ours[samples.mask], wanted[samples.mask], atol=1e-5, rtol=1e-5)
    ratios = (samples.old_logprobs - rollout)[samples.mask].exp()
    assert cap == math.inf or bool((ratios > cap).any())
