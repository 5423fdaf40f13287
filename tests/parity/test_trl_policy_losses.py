"""Our GRPO in all its forms and our RLOO against TRL's own methods, on random inputs; see test_trl_losses.py."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sampled_tokens import sampled
from trainers.losses import TokenBatch, grpo, rloo

trl = pytest.importorskip("trl", reason="not installed: make test-parity")
pytestmark = pytest.mark.parity

ROWS, WIDTH = 6, 7
SEEDS = range(3)


def batch_of(seed: int) -> TokenBatch:
    """Responses of 1 to 7 tokens without a prompt, with one advantage for all tokens of each."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(WIDTH)[None, :] < torch.randint(1, WIDTH + 1, (ROWS, 1), generator=generator)
    logprobs = -3 * torch.rand(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    batch = sampled(TokenBatch(logprobs=logprobs, mask=mask), seed=seed)
    assert batch.advantages is not None
    return replace(batch, rollout_logprobs=None, advantages=batch.advantages[:, :1].expand(ROWS, WIDTH))


def trainer(logprobs: Tensor, **attributes: Any) -> Any:
    """Return what TRL's methods read of their trainer: its settings, one process, a model that says these log-probs."""
    alone = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda values: values,
        gather_for_metrics=lambda values: values,
        reduce=lambda values, reduction: values,
    )
    return SimpleNamespace(
        accelerator=alone,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        _metrics={"train": defaultdict(list)},
        **attributes,
    )


def inputs_of(batch: TokenBatch) -> dict[str, Tensor]:
    assert batch.advantages is not None
    mask = batch.mask.long()
    return {
        "prompt_ids": mask[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": batch.advantages[:, 0],
    }


def assert_same(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    (mine,), (its,) = torch.autograd.grad(ours, leaf), torch.autograd.grad(theirs, leaf)
    torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    assert mine.any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize(
    ("config", "loss_type"),
    [
        (grpo.Config(), "grpo"),
        (grpo.Config(kl_coefficient=0.0, clip_high=0.3), "grpo"),
        (grpo.Config(form="dapo"), "dapo"),
        (grpo.Config(form="dapo", kl_coefficient=0.1), "dapo"),
        (grpo.Config(form="dr_grpo", max_tokens=9), "dr_grpo"),
        (grpo.Config(form="gspo"), "grpo"),
        (grpo.Config(form="gspo", clip_low=0.1, clip_high=0.15, kl_coefficient=0.02), "grpo"),
    ],
    ids=["grpo", "grpo-clip", "dapo", "dapo-kl", "dr_grpo", "gspo", "gspo-wide"],
)
def test_every_form_of_grpo_is_trls(config: grpo.Config, loss_type: str, factors: bool, seed: int) -> None:
    batch = batch_of(seed)
    assert batch.old_logprobs is not None
    assert batch.reference_logprobs is not None
    inputs = inputs_of(batch) | {
        "old_per_token_logps": batch.old_logprobs,
        "ref_per_token_logps": batch.reference_logprobs,
        "num_items_in_batch": batch.mask.sum(),
    }
    if factors:  # TRL's default: of the sequence, masked above 3
        shift = torch.linspace(-0.5, 0.5, ROWS, dtype=torch.float64)[:, None]
        batch = replace(batch, rollout_logprobs=batch.old_logprobs - shift)
        ratio = (shift * batch.mask).sum(dim=1, keepdim=True).exp()
        inputs["importance_sampling_ratio"] = torch.where(ratio > 3.0, 0.0, ratio)
    leaf = batch.logprobs.requires_grad_()
    told = trainer(
        leaf,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        beta=config.kl_coefficient,
        current_gradient_accumulation_steps=1,
        epsilon_high=config.clip_high,
        epsilon_low=config.clip_low,
        importance_sampling_level="token" if config.ratio == "token" else "sequence",
        loss_type=loss_type,
        max_completion_length=config.max_tokens,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=factors,
        vllm_importance_sampling_correction=factors,
        _entropy_bonus_enabled=False,
    )
    theirs = trl.GRPOTrainer._compute_loss(told, told.model, inputs)
    assert_same(grpo.loss(batch, config).loss, theirs, leaf)


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_is_trls(seed: int) -> None:
    batch = batch_of(seed)
    assert batch.old_logprobs is not None
    leaf = batch.logprobs.requires_grad_()
    inputs = inputs_of(batch) | {"old_logps": (batch.old_logprobs * batch.mask).sum(dim=1)}
    told = trainer(leaf, epsilon_low=0.2, epsilon_high=0.2)
    assert_same(rloo.loss(batch, rloo.Config()).loss, trl.RLOOTrainer._compute_loss(told, told.model, inputs), leaf)
