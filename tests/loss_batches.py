"""Random batches of every kind that a loss takes, cut into parts, and what a rank would tell of their whole step."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from cluster.config import Config
from tests.sampled_tokens import sampled
from trainers.losses import (
    Batch,
    GroupBatch,
    LabelBatch,
    Loss,
    PairBatch,
    ScoreBatch,
    TokenBatch,
    TwoPassLoss,
    UnpairedBatch,
)

B = TypeVar("B", bound=Batch)

VARIABLES: dict[type, tuple[str, ...]] = {
    PairBatch: ("policy_chosen", "policy_rejected"),
    TokenBatch: ("logprobs",),
    UnpairedBatch: ("policy",),
    GroupBatch: ("policy",),
    ScoreBatch: ("chosen", "rejected"),
    LabelBatch: ("logits",),
}
"""The fields that carry gradient."""


def random_batch(kind: type[B], *, seed: int, rows: int = 5) -> Batch:
    """Return a batch of fp64 with weights, without denominators."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    numbers = torch.arange(1, rows + 1).double()
    if kind is TokenBatch:
        lengths = torch.arange(rows) % 4 + 1
        mask = torch.arange(1, 7)[None, :] <= lengths[:, None]
        logprobs, weights, flagged = -3 * uniform(rows, 6), uniform(rows), uniform(rows, 6) < 0.4
        batch = TokenBatch(
            logprobs=logprobs, mask=mask, weights=weights, flagged=flagged, mean_logprobs=-3 - 2 * uniform(rows, 6)
        )
        return sampled(batch, seed=seed)
    if kind is UnpairedBatch:
        return UnpairedBatch(
            policy=-10 * uniform(rows),
            reference=-10 * uniform(rows),
            desirable=torch.arange(rows) % 3 != 1,
            lengths=numbers,
            # Nearer 0 than the reference's: log-ratios above 0, so that z0 is not cut off at 0.
            mismatched_policy=-4 * uniform(rows),
            mismatched_reference=-4 * uniform(rows) - 3,
            weights=uniform(rows),
        )
    if kind is GroupBatch:
        lengths = torch.ones(rows, 4, dtype=torch.float64) + torch.arange(4)
        lengths[1, 2:] = 0.0  # a group of two
        lengths[2, 0] = 0.0  # one whose first place is empty
        return GroupBatch(
            policy=-10 * uniform(rows, 4),
            reference=-10 * uniform(rows, 4),
            rewards=uniform(rows, 4),
            lengths=lengths,
            weights=uniform(rows),
        )
    if kind is ScoreBatch:
        return ScoreBatch(
            chosen=4 * uniform(rows) - 2,
            rejected=4 * uniform(rows) - 2,
            margins=uniform(rows),
            targets=uniform(rows),
            weights=uniform(rows),
        )
    if kind is LabelBatch:
        return LabelBatch(
            logits=4 * uniform(rows, 2) - 2,
            labels=uniform(rows, 2).softmax(dim=1),
            weights=uniform(rows),
            progress=0.07,
        )
    return PairBatch(
        policy_chosen=-10 * uniform(rows),
        policy_rejected=-10 * uniform(rows),
        reference_chosen=-10 * uniform(rows),
        reference_rejected=-10 * uniform(rows),
        chosen_lengths=numbers,
        rejected_lengths=numbers + 1,
        weights=uniform(rows),
        noise=0.4 * uniform(rows),
        margins=uniform(rows),
    )


def told_of_its_step(batch: B, loss: Loss, config: Config) -> B:
    """Return the batch, taken for a whole step, with what the rank tells of that: denominators, figures of all rows."""
    assert batch.weights is not None
    if isinstance(batch, TokenBatch):
        tokens = batch.weights[:, None] * batch.mask
        assert batch.flagged is not None
        batch = replace(
            batch,
            global_tokens=float(tokens.sum()),
            global_flagged_tokens=float((tokens * batch.flagged).sum()),
            global_rows=float((batch.weights * batch.mask.any(dim=1)).sum()),
        )
    else:
        batch = replace(batch, global_weight=float(batch.weights.sum()))
    if isinstance(batch, UnpairedBatch):
        good, bad = batch.sides()
        batch = replace(batch, num_desirable=good, num_undesirable=bad)
    if isinstance(batch, PairBatch):
        assert batch.weights is not None
        batch = replace(batch, global_chosen_tokens=float((batch.weights * batch.chosen_lengths).sum()))
    return replace(batch, step_figures=loss.first_pass(batch, config)) if isinstance(loss, TwoPassLoss) else batch


def rows_of(batch: B, start: int, end: int) -> B:
    """Return some rows of a batch, which knows of its step what the whole one did."""
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__ if name != "step_figures"}
    return replace(batch, **{name: v[start:end] for name, v in fields.items() if isinstance(v, Tensor)})


def variables(batch: Batch) -> list[Tensor]:
    """Return the tensors that a loss's gradient is taken by, which from now on ask for one."""
    return [getattr(batch, name).requires_grad_() for name in VARIABLES[type(batch)]]


def without_targets(batch: Batch) -> Batch:
    """Return the batch with nothing to learn from: no token of any response, or no weight."""
    if isinstance(batch, TokenBatch):
        return replace(batch, mask=torch.zeros_like(batch.mask))
    if isinstance(batch, PairBatch):
        nothing = torch.zeros_like(batch.chosen_lengths)
        return replace(batch, chosen_lengths=nothing, rejected_lengths=nothing)
    if isinstance(batch, UnpairedBatch | GroupBatch):
        return replace(batch, lengths=torch.zeros_like(batch.lengths))
    assert batch.weights is not None
    return replace(batch, weights=torch.zeros_like(batch.weights))
