"""Our offline losses against TRL's on random inputs: TRL's own methods are called, on models that answer from a table.

Needs TRL, which the environment does not have: `make test-parity` builds one beside it. Within 1e-5, loss and gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.config import Config
from tests.loss_batches import random_batch
from trainers.losses import (
    PairBatch,
    ScoreBatch,
    UnpairedBatch,
    bradley_terry,
    dpo,
    exo,
    ipo,
    kto,
    load_loss,
    rdpo,
    rso,
)

trl = pytest.importorskip("trl", reason="not installed: make test-parity")
pytestmark = pytest.mark.parity

ROWS, WIDTH = 6, 9
SEEDS = range(3)


@dataclass(kw_only=True)
class Answering:
    """A model that says what it has been told, whatever it is asked."""

    output: Any
    training: bool = True

    def __call__(self, **inputs: Any) -> Any:
        return self.output


def trainer(**attributes: Any) -> Any:
    """Return what a method of TRL's reads of its trainer: its settings, one process, places for metrics."""
    alone = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    return SimpleNamespace(
        accelerator=alone,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def answer(logprobs: Tensor) -> Any:
    """Return a language model's output with these log-probs of tokens [S, T - 1], and figures that no loss reads."""
    nothing = torch.zeros_like(logprobs)
    return SimpleNamespace(log_probs=logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing > 0)


def spread(sums: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return [S, T - 1] log-probs of tokens that add up to these sums, and the completion mask [S, T]."""
    mask = torch.arange(WIDTH)[None, :] >= WIDTH - lengths[:, None]
    per_token = (sums / lengths)[:, None] * mask[:, 1:]
    return per_token, mask.long()


def pairs(seed: int) -> PairBatch:
    batch = random_batch(PairBatch, seed=seed, rows=ROWS)
    assert isinstance(batch, PairBatch)
    return replace(batch, weights=None, noise=None)


def trls_pair_loss(batch: PairBatch, *, loss_types: dict[str, float], beta: float, smoothing: float) -> Tensor:
    sums = torch.cat([batch.policy_chosen, batch.policy_rejected])
    logprobs, mask = spread(sums, torch.cat([batch.chosen_lengths, batch.rejected_lengths]))
    told = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=list(loss_types),
        loss_weights=list(loss_types.values()),
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
    )
    model = Answering(output=answer(logprobs))
    told.model = model
    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": batch.reference_chosen,
        "ref_rejected_logps": batch.reference_rejected,
    }
    return trl.DPOTrainer._compute_loss(told, model, inputs, False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kind", "config", "loss_types", "beta", "smoothing"),
    [
        ("dpo", dpo.Config(beta=0.1), {"sigmoid": 1.0}, 0.1, 0.0),
        ("dpo", dpo.Config(beta=0.7, nll_weight=0.4), {"sigmoid": 1.0, "sft": 0.4}, 0.7, 0.0),
        ("dpo", dpo.Config(beta=5.0, length_norm=True), {"sigmoid_norm": 1.0}, 5.0, 0.0),
        ("rdpo", rdpo.Config(beta=0.1, noise=0.15), {"robust": 1.0}, 0.1, 0.15),
        ("exo", exo.Config(beta=0.5, smoothing=1e-3), {"exo_pair": 1.0}, 0.5, 1e-3),
        ("exo", exo.Config(beta=0.1, smoothing=0.2), {"exo_pair": 1.0}, 0.1, 0.2),
        ("ipo", ipo.Config(tau=0.1, length_norm=True), {"ipo": 1.0}, 0.1, 0.0),
        ("rso", rso.Config(gamma=0.05), {"hinge": 1.0}, 0.05, 0.0),
        ("rso", rso.Config(gamma=0.4), {"hinge": 1.0}, 0.4, 0.0),
    ],
)
def test_a_pair_loss_is_trls(
    kind: str, config: Config, loss_types: dict[str, float], beta: float, smoothing: float, seed: int
) -> None:
    """TRL 1.16's IPO averages over tokens only: with summed log-ratios, our default, there is nothing to compare."""
    batch = pairs(seed)
    assert_same(
        lambda: load_loss(kind).loss(batch, config).loss,
        lambda: trls_pair_loss(batch, loss_types=loss_types, beta=beta, smoothing=smoothing),
        [batch.policy_chosen, batch.policy_rejected],
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "config",
    [
        kto.Config(desirable_weight=1.0, undesirable_weight=1.0),
        kto.Config(beta=0.4, desirable_weight=1.3, undesirable_weight=0.8),
    ],
)
def test_kto_is_trls(config: kto.Config, seed: int) -> None:
    batch = random_batch(UnpairedBatch, seed=seed, rows=ROWS)
    assert isinstance(batch, UnpairedBatch)
    batch = replace(batch, weights=None)

    def theirs() -> Tensor:
        logprobs, mask = spread(batch.policy, batch.lengths)
        told = trainer(
            _compute_kl_logps=lambda model, inputs: batch.mismatched_policy,
            calculate_KL=True,
            loss_type="kto",
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        told.model = Answering(output=answer(logprobs))
        inputs = {
            "input_ids": torch.ones_like(mask),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
            "label": batch.desirable,
            "ref_logps": batch.reference,
            "ref_KL_logps": batch.mismatched_reference,
        }
        return trl.KTOTrainer._compute_loss(told, told.model, inputs, False)

    assert_same(lambda: kto.loss(batch, config).loss, theirs, [batch.policy])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("centring", [None, 0.01])
@pytest.mark.parametrize("has_margin", [False, True])
def test_bradley_terry_is_trls(centring: float | None, has_margin: bool, seed: int) -> None:
    batch = random_batch(ScoreBatch, seed=seed, rows=ROWS)
    assert isinstance(batch, ScoreBatch)
    batch = replace(batch, weights=None, targets=None, margins=batch.margins if has_margin else None)

    def theirs() -> Tensor:
        scores = torch.cat([batch.chosen, batch.rejected])[:, None]
        told = trainer(args=SimpleNamespace(center_rewards_coefficient=centring))
        told.model = Answering(output=SimpleNamespace(logits=scores))
        inputs = {"attention_mask": torch.ones(2 * ROWS, WIDTH)} | ({"margin": batch.margins} if has_margin else {})
        return trl.RewardTrainer.compute_loss(told, told.model, inputs)

    config = bradley_terry.Config(centring=centring or 0.0)
    assert_same(lambda: bradley_terry.loss(batch, config).loss, theirs, [batch.chosen, batch.rejected])


def assert_same(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.requires_grad_()
    got, wanted = ours(), theirs()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert got.item() != 0.0
    for mine, its in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
        assert mine.any()
