"""Owns how far an update has moved the weights: the sequences on which that is measured, and the distributions on them.

H-KLB's divergences, KL(M_t || M_(t-1)) from the update's start and KL(M_t || M_0) from the run's, are measured on some
of the update's own responses: of each token the *whole* distributions are compared,

    sum over a response's tokens of  sum_v M_t(v | s) * (log M_t(v | s) - log M_ref(v | s)),   mean over responses

That is exact for each state s and 0 for equal weights. An estimator from the sampled tokens alone is wrong here: they
were sampled by M_(t-1), and of tokens that M_t has come to prefer and M_ref never gave, k1 to k3 see nothing. What is
approximate is where the states come from: responses by the weights at the update's start, where M_t's own would be
wanted. The two agree in first order, and a budget needs no more. The responses stay the same during an update.

Knows neither DeepSpeed nor where the log-probs come from. Shapes: S sequences, T positions, M tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainers.batches import TrainingPlan
from trainers.kl import KlBudget
from trainers.rows import Rows
from trainers.rows.documents import TokenRows


class KlReached(NamedTuple):
    """Nats per response."""

    update: float
    """From the weights at the update's start."""
    run: float
    """From the run's first weights."""


def probe_rows(rows: Rows, plan: TrainingPlan, *, num_sequences: int) -> TokenRows:
    """Return the first responses of the plan's first epoch, which the plan has shuffled; of a row all of them."""
    token_ids: list[npt.NDArray[np.int64]] = []
    masks: list[npt.NDArray[np.bool_]] = []
    for row in (row for step in plan.steps if step.epoch == plan.steps[0].epoch for row in step.rows):
        if len(token_ids) >= num_sequences:
            break
        padded = rows.pad((row,))
        for ids, mask in zip(padded.token_ids.numpy(), padded.mask.numpy(), strict=True):
            if mask.any():
                end = int(np.flatnonzero(mask)[-1]) + 1
                token_ids.append(ids[:end].astype(np.int64))
                masks.append(mask[:end])
    return TokenRows(
        token_ids=tuple(token_ids),
        masks=tuple(masks),
        weights=np.ones(len(token_ids)),
        lengths=np.array([len(ids) for ids in token_ids], dtype=np.int64),
        num_targets=np.array([int(mask.sum()) for mask in masks], dtype=np.int64),
    )


def distributions(logits: Tensor, mask: Tensor, *, temperature: float) -> Tensor:
    """Return [M, V] fp32 log-probs of all tokens at the M targets of [S, T] `mask`, from [S, T, V] logits."""
    predictors = logits[:, :-1][mask[:, 1:]]
    return torch.log_softmax(predictors.float() / temperature, dim=-1)


def divergence(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Return [M] KL(p || q) in nats of categorical distributions, [M, V] log-probs each; 0 where they are equal.

    p = (.5, .3, .2), q = (.4, .4, .2): 0.0252672.
    """
    differences = torch.where(logprobs == reference, 0.0, logprobs - reference)  # both may be -inf
    return torch.where(logprobs > -torch.inf, logprobs.exp() * differences, 0.0).sum(dim=-1)


class KlProbe:
    """One rank's share of an update's measurements."""

    def __init__(
        self, budget: KlBudget, rows: TokenRows, *, start: Sequence[Tensor], first: Sequence[Tensor] | None
    ) -> None:
        """Keep what was said at the update's start.

        Args:
            budget: when to stop.
            rows: of `probe_rows`.
            start: `distributions` of each of this rank's micro-batches, by the weights at the update's start.
            first: the same by the run's first weights; None: they are those at the update's start.
        """
        self.budget = budget
        self.rows = rows
        self.reached: KlReached | None = None
        """What was last measured, over all ranks."""
        self._start = [logprobs.cpu() for logprobs in start]
        self._first = None if first is None else [logprobs.cpu() for logprobs in first]

    def sums(self, now: Sequence[Tensor]) -> Tensor:
        """Return [2] fp64 sums over this rank's responses of the KL from the update's start and from the run's."""
        given = [logprobs.cpu() for logprobs in now]
        start = _total(given, self._start)
        return torch.stack([start, start if self._first is None else _total(given, self._first)])

    def note(self, sums: Tensor) -> KlReached:
        """Take [2] sums over all ranks for what is reached."""
        update, run = (sums / max(1, len(self.rows.lengths))).tolist()
        self.reached = KlReached(update=update, run=run)
        return self.reached

    @property
    def spent(self) -> bool:
        """Whether the update must end here."""
        return self.reached is not None and exceeded(self.reached, self.budget) is not None

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Return whether to measure after a step of the update."""
        return is_last or (step + 1) % self.budget.every == 0


def exceeded(reached: KlReached, budget: KlBudget) -> Literal["update", "run"] | None:
    """Return which budget is spent; a KL that is no number has spent it."""
    if not reached.update <= budget.update:
        return "update"
    return None if reached.run <= budget.run else "run"


def _total(now: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
    parts = [divergence(*both).double().sum() for both in zip(now, then, strict=True)]
    return torch.stack([torch.zeros((), dtype=torch.float64), *parts]).sum()
