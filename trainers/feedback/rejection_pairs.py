"""Owns which answers RSO compares (Liu et al. 2023, arXiv 2309.06657): the accepted ones, by twos or as a tournament.

    a query's judged answers ──► rejection sampling by P(good) ──► random order ──► meetings ──► same label? dropped

The paper's reward model is the verdict here, P(good) both the reward and what decides a meeting. Ours differs in that
answers with one label make no pair (SCIENCE §3), and in that the share accepted is larger: an iteration samples a few
answers to a query, not 64. What makes a pair of two answers is `preferences.build_pairs`'s. Counted here, by reason:
    not_accepted, unpaired   answers that the sampling leaves out; an accepted one that nobody is left to meet
    same_label               meetings of two answers that both pass or both fail
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from actors.records import Query, Response, Verdict, draw_seed
from actors.rubrics import PASS
from trainers.feedback.preferences import Candidates, Drawing
from trainers.feedback.rejection_sampling import rejection_sample

Pairing: TypeAlias = Literal["first_round", "tournament"]


@runtime_checkable
class RejectionSettings(Protocol):
    """What a loss whose pairs come from rejection sampling says of them."""

    num_accepted: int | None
    """None: half of the candidates, at least two."""
    beta: float
    """Of the acceptance, in units of P(good)."""
    pairing: Pairing


def rejection_drawing(settings: RejectionSettings, *, seed: int) -> Drawing:
    """Return how RSO draws a query's candidate pairs.

    Args:
        settings: the loss's.
        seed: the run's. A query's draws follow from that, its iteration and its place, whatever the run's name.
    """

    def drawn(query: Query, verdicts: Sequence[Verdict], responses: Mapping[str, Response]) -> Candidates:
        rng = np.random.default_rng(draw_seed(seed, "rejection pairs", query.iteration, query.sample_index))
        ordered = sorted(verdicts, key=lambda verdict: responses[verdict.response_id].sample_index)
        scores = [verdict.score or 0.0 for verdict in ordered]
        num_accepted = num_accepted_of(settings, len(ordered))
        accepted = rejection_sample(scores, num_samples=num_accepted, beta=settings.beta, generator=rng)
        # As they were accepted the best stand first: the paper's pairs are of a random order.
        met = meetings(rng.permutation(accepted).tolist(), scores, pairing=settings.pairing)
        pairs: list[tuple[Verdict, Verdict]] = []
        for one, other in ((ordered[i], ordered[j]) for i, j in met):
            if one.label != other.label:
                pairs.append((one, other) if one.label == PASS else (other, one))
        dropped = Counter(not_accepted=len(ordered) - num_accepted, same_label=len(met) - len(pairs))
        if settings.pairing == "first_round":
            dropped["unpaired"] = num_accepted % 2
        return Candidates(pairs, dropped)

    return drawn


def meetings(order: Sequence[int], scores: Sequence[float], *, pairing: Pairing) -> list[tuple[int, int]]:
    """Return who meets whom: neighbours two by two; in a tournament the winners again, until one is left.

    Of N answers N // 2 meetings, or N - 1. A winner has the higher score, of equal ones the first; who has no neighbour
    goes on to the next round.

    >>> meetings([2, 0, 1, 3], [0.9, 0.2, 0.1, 0.8], pairing="tournament")
    [(2, 0), (1, 3), (0, 3)]
    """
    met: list[tuple[int, int]] = []
    left = list(order)
    while len(left) > 1:
        met_now = list(zip(left[::2], left[1::2], strict=False))
        met += met_now
        if pairing == "first_round":
            break
        left = [one if scores[one] >= scores[other] else other for one, other in met_now] + left[2 * len(met_now) :]
    return met


def num_accepted_of(settings: RejectionSettings, num_candidates: int) -> int:
    """Return how many of a query's candidates are accepted, never more than there are."""
    wanted = max(2, num_candidates // 2) if settings.num_accepted is None else settings.num_accepted
    return min(wanted, num_candidates)


def most_rejection_pairs(settings: RejectionSettings, *, num_samples: int) -> int:
    """Return how many pairs a query's answers make at most, whatever a query may have.

    A failed answer that wins has beaten another failed one, so that after the first round no more failed ones are left
    than met their like, and the one without a neighbour: a tournament adds one pair at most, of an odd number.
    """
    num_accepted = num_accepted_of(settings, num_samples)
    return num_accepted // 2 if settings.pairing == "first_round" else (num_accepted + 1) // 2
