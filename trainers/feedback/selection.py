"""Owns which of an iteration's labels an update may learn from, where some are wrong (METHODS N-RESP).

    verdicts ──► those that several critiques agree on ──► rows ──► those whose loss is small ──► the update

What is left out is counted: `disagreement`, `large_loss`. Knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from pydantic import Field

from actors.oversight import EXPERT, Judged
from actors.records import PreferencePair, Response, Verdict
from actors.rubrics import FAIL, PASS
from cluster.config import Config
from trainers.feedback.training_data import TrainingData


class SelectionConfig(Config):
    """Which labels are left out as probably wrong."""

    min_agreement: float = Field(default=0.0, ge=0.0, le=1.0)
    """Least share of a response's readable critiques that say what they add up to; an expert's verdict stands without
    them. 0 keeps all; it takes several critiques of each response (critic.judging.num_critiques)."""
    drop: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the rows that is left out, those of the largest loss, once the ramp is over: about as many as are wrong.
    Of pairs and of accepted responses; pairs without log-probs stay, and don't count."""
    ramp_iterations: int = Field(default=10, ge=1)
    """Iterations over which that share rises from 0, linearly: a learner that knows nothing yet can't tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trusted:
    """Judged responses, some of which may be left out, and the verdicts of the others."""

    judged: Sequence[Judged]
    verdicts: Sequence[Verdict]
    dropped: Mapping[str, int]


def agreement_of_critiques(item: Judged) -> float:
    """Return the share of the readable critiques that say what they add up to; 1 without any.

    Whatever the verdict says that a response has in the end: the control that permutes verdicts must not be told which
    ones were permuted.
    """
    said = [critique.score for critique in item.critiques if critique.score is not None]
    same = sum((PASS if score >= 0.5 else FAIL) == item.critic_verdict.label for score in said)
    return same / len(said) if said else 1.0


def agreeing(judged: Sequence[Judged], verdicts: Sequence[Verdict], *, min_agreement: float) -> Trusted:
    """Return the responses but for those whose critiques agree too little on what they add up to.

    The agreement filter: what independent annotators disagree on is more often wrong. A response without a verdict, and
    one that an expert has judged, stays.
    """
    by_response = {verdict.response_id: verdict for verdict in verdicts}
    left_out = {
        item.response.response_id
        for item in judged
        if (verdict := by_response.get(item.response.response_id)) is not None
        and verdict.label is not None
        and verdict.source != EXPERT
        and agreement_of_critiques(item) < min_agreement
    }
    return Trusted(
        judged=[item for item in judged if item.response.response_id not in left_out],
        verdicts=[verdict for verdict in verdicts if verdict.response_id not in left_out],
        dropped={"disagreement": len(left_out)} if left_out else {},
    )


def drop_share(config: SelectionConfig, *, iteration: int) -> float:
    """Return tau of an iteration, counted from 1: drop * min(1, (iteration - 1) / ramp_iterations).

    Han et al. 2018 (co-teaching, arXiv 1804.06872) raise it over 10 epochs of one data set; ours makes new data in each
    iteration, which therefore is the unit.
    """
    return config.drop * min(1.0, (iteration - 1) / config.ramp_iterations)


def smallest(losses: Sequence[float], *, drop: float) -> list[int]:
    """Return the positions of the rows that are kept, in order: the ceil((1 - drop) n) of smallest loss.

    The first of equals is kept.

    >>> smallest([0.3, 2.0, 0.1, 0.9], drop=0.5)
    [0, 2]
    """
    num_kept = math.ceil((1.0 - drop) * len(losses) - 1e-9)
    return sorted(sorted(range(len(losses)), key=lambda row: (losses[row], row))[:num_kept])


def cross_selected(
    losses: Sequence[float], losses_of_peer: Sequence[float], *, drop: float
) -> tuple[list[int], list[int]]:
    """Return what each of two models is to learn from: what its peer finds easy (co-teaching, arXiv 1804.06872).

    A model that picks its own small losses confirms its own mistakes; those of a peer differ. The loop trains one
    model, so nothing in it calls for this yet.
    """
    return smallest(losses_of_peer, drop=drop), smallest(losses, drop=drop)


def pair_loss(pair: PreferencePair) -> float | None:
    """Return softplus(mean log p of the rejected's tokens - the chosen's), in nats, by the weights that sampled them.

    A loss against a reference is log 2 for every pair at an update's start, where policy and reference are the same,
    and tells none from another. This one needs no reference (the margin of Meng et al. 2024, arXiv 2405.14734) and no
    pass over the data. None without log-probs.
    """
    if not pair.chosen_logprobs or not pair.rejected_logprobs:
        return None
    gap = _mean(pair.rejected_logprobs) - _mean(pair.chosen_logprobs)
    return max(gap, 0.0) + math.log1p(math.exp(-abs(gap)))


def response_loss(response: Response) -> float:
    """Return the mean negative log-prob of a response's tokens (nats) by the weights that sampled it; 0 without any."""
    return -_mean(response.logprobs) if response.logprobs else 0.0


def select_pairs(
    pairs: Sequence[PreferencePair], config: SelectionConfig, *, iteration: int
) -> tuple[tuple[PreferencePair, ...], int]:
    """Return the pairs of small loss and how many are left out; experts' pairs stay, for their labels are trusted.

    The share is of the pairs that have log-probs: the others can't be told from one another, and stay as well.
    """
    drop = drop_share(config, iteration=iteration)
    found = [(row, pair.source, loss) for row, pair in enumerate(pairs) if (loss := pair_loss(pair)) is not None]
    kept = smallest([-math.inf if source == EXPERT else loss for _, source, loss in found], drop=drop)
    left_out = {row for row, _, _ in found} - {found[place][0] for place in kept}
    return tuple(pair for row, pair in enumerate(pairs) if row not in left_out), len(left_out)


def select_responses(
    data: TrainingData, responses: Mapping[str, Response], config: SelectionConfig, *, iteration: int
) -> TrainingData:
    """Return data of single responses, one row each, without those of large loss, counted as `large_loss`."""
    drop = drop_share(config, iteration=iteration)
    kept = smallest([response_loss(responses[response_id]) for response_id in data.response_ids], drop=drop)
    if len(kept) == len(data.row_ids):
        return data
    return replace(
        data,
        table=data.table.take(pa.array(kept, pa.int64())),
        row_ids=tuple(data.row_ids[row] for row in kept),
        places=tuple(data.places[row] for row in kept),
        response_ids=tuple(data.response_ids[row] for row in kept),
        dropped={**data.dropped, "large_loss": len(data.row_ids) - len(kept)},
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
