"""Owns several objectives at once: what each scores a response, and the one score that a policy learns from.

    judged responses ──► scores, one per objective ──► standardised ──► linear, or Tchebycheff ──► the samples' score
                                                                    └─► differences ──► modpo's margins

No objective asks for truth: they read the critic's marks, the verdicts, and the response itself. Knows no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import pyarrow as pa
from pydantic import Field, model_validator

from actors.oversight import Judged
from actors.records import PreferencePair, Verdict
from cluster.config import Config
from trainers.feedback.training_data import TrainingData

Objective: TypeAlias = Callable[[Judged, Verdict], float | None]
"""What a response is worth, more being better; None where it can't be said (never a low score)."""
Scores: TypeAlias = Mapping[str, tuple[float | None, ...]]
"""By response id: one number for each objective, in the config's order."""


def _verdict(item: Judged, verdict: Verdict) -> float | None:
    return verdict.score


def _steps(item: Judged, verdict: Verdict) -> float | None:
    marks = item.step_logprobs
    return math.fsum(map(math.exp, marks)) / len(marks) if marks else None


def _brevity(item: Judged, verdict: Verdict) -> float | None:
    return -float(len(item.response.token_ids))


OBJECTIVES: Mapping[str, Objective] = MappingProxyType({"verdict": _verdict, "steps": _steps, "brevity": _brevity})
"""verdict: P(good), or an expert's label. steps: mean P(correct) over the critic's step marks, without its
final label. brevity: minus the response's tokens."""

LEAST_DEVIATION = 1e-6
"""An objective that has varied less than this is taken to be constant: it says nothing about which is better."""


class ObjectivesConfig(Config):
    """What a response is scored by, and how the scores become one."""

    names: tuple[Literal["verdict", "steps", "brevity"], ...] = ("verdict", "brevity")
    """The objectives, each once; for modpo the first is "verdict", which its pairs are preferences by."""
    weights: tuple[float, ...] = (0.9, 0.1)
    """One for each objective, none below 0; they add up to 1."""
    scalarisation: Literal["linear", "tchebycheff"] = "linear"
    """linear: the weighted sum of standardised scores; tchebycheff: the score of the objective that is furthest from
    its ideal, weighted, which reaches trade-offs that no weighted sum is best at."""
    ideal: tuple[float, ...] | None = Field(default=None)
    """z*, in each objective's own unit, for tchebycheff; None: the best score seen so far."""

    @model_validator(mode="after")
    def _one_of_each(self) -> ObjectivesConfig:
        weights = self.weights
        if len(set(self.names)) != len(self.names) or len(self.names) < 2:
            raise ValueError(f"names: got {list(self.names)}, wanted two or more objectives, each once")
        if len(weights) != len(self.names) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
            raise ValueError(
                f"weights: got {list(weights)}, wanted one for each of {len(self.names)} objectives, none below 0, "
                "that add up to 1"
            )
        if self.ideal is not None and len(self.ideal) != len(self.names):
            raise ValueError(f"ideal: got {list(self.ideal)}, wanted one for each of {len(self.names)} objectives")
        return self


# ------------------------------------------------------------------------------------------------------- scalarisation


def linear(scores: Sequence[float], weights: Sequence[float]) -> float:
    """Return sum_i lambda_i r_i (more is better).

    >>> round(linear([0.8, 0.4], [0.5, 0.5]), 6)
    0.6
    """
    return math.fsum(weight * score for weight, score in zip(weights, scores, strict=True))


def tchebycheff(values: Sequence[float], weights: Sequence[float], *, ideal: Sequence[float]) -> float:
    """Return max_i lambda_i (z_i - J_i), to be **minimised** (Miettinen 1999; Zhong et al. 2024, arXiv 2402.02030).

    >>> round(tchebycheff([0.8, 0.4], [0.5, 0.5], ideal=[1.0, 1.0]), 6)
    0.3
    """
    return max(_distances(values, weights, ideal))


def furthest(values: Sequence[float], weights: Sequence[float], *, ideal: Sequence[float]) -> int:
    """Return the objective that Tchebycheff's maximum is taken at, the first of equals.

    The maximum's (sub)gradient is -lambda_i times the gradient of J_i alone: a policy that learns from this objective's
    score descends it.
    """
    distances = _distances(values, weights, ideal)
    return distances.index(max(distances))


def _distances(values: Sequence[float], weights: Sequence[float], ideal: Sequence[float]) -> list[float]:
    return [weight * (z - value) for weight, z, value in zip(weights, ideal, values, strict=True)]


# ----------------------------------------------------------------------------------------------------- standardisation


@dataclass(slots=True)
class Moments:
    """Count, mean, squared deviations and best of an objective's scores so far (Chan et al. 1983)."""

    num: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""
    best: float = -math.inf

    def add(self, values: Sequence[float]) -> None:
        """Take in an iteration's scores."""
        if not values:
            return
        num, mean = len(values), math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        total = self.num + num
        self.squares += squares + (mean - self.mean) ** 2 * self.num * num / total
        self.mean += (mean - self.mean) * num / total
        self.num, self.best = total, max(self.best, *values)

    @property
    def deviation(self) -> float:
        """The standard deviation over all scores; 0 of none."""
        return math.sqrt(self.squares / self.num) if self.num else 0.0

    def standardised(self, value: float) -> float:
        """Return (value - mean) / deviation; 0 for an objective that is constant."""
        return (value - self.mean) / self.deviation if self.deviation > LEAST_DEVIATION else 0.0


@dataclass(slots=True)
class RunningScores:
    """What the scores of all iterations so far were like, by objective; it is committed with the loop's state."""

    moments: dict[str, Moments] = field(default_factory=dict)

    def add(self, scores: Scores, names: Sequence[str]) -> None:
        """Take in an iteration's scores; what is missing has no part."""
        for i, name in enumerate(names):
            known = [value for row in scores.values() if (value := row[i]) is not None]
            self.moments.setdefault(name, Moments()).add(known)

    def snapshot(self) -> dict[str, list[float]]:
        """Return it as plain JSON values."""
        return {name: [m.num, m.mean, m.squares, m.best] for name, m in self.moments.items() if m.num}

    @classmethod
    def restore(cls, snapshot: Mapping[str, Sequence[Any]]) -> RunningScores:
        """Return what a snapshot holds."""
        return cls({n: Moments(int(num), mean, squares, best) for n, (num, mean, squares, best) in snapshot.items()})


# ------------------------------------------------------------------------------------------------------------ the loop


def score_all(judged: Sequence[Judged], verdicts: Sequence[Verdict], config: ObjectivesConfig) -> Scores:
    """Return every objective's score of each response that has a verdict."""
    by_response = {verdict.response_id: verdict for verdict in verdicts if verdict.label is not None}
    return {
        item.response.response_id: tuple(OBJECTIVES[name](item, verdict) for name in config.names)
        for item in judged
        if (verdict := by_response.get(item.response.response_id)) is not None
    }


def scalar_scores(scores: Scores, running: RunningScores, config: ObjectivesConfig) -> dict[str, float | None]:
    """Return the one score of each response, by its id; None where an objective that counts has none.

    Linear: sum_i lambda_i r~_i of standardised scores. Tchebycheff: lambda_i r~_i of the objective that, in the mean
    over these responses (J), is furthest from its ideal z*, all standardised alike.
    """
    moments = [running.moments[name] for name in config.names]
    weights = list(config.weights)
    if config.scalarisation == "tchebycheff":
        means, ideal = [], []
        for i, own in enumerate(moments):
            known = [value for row in scores.values() if (value := row[i]) is not None]
            means.append(own.standardised(math.fsum(known) / len(known)) if known else 0.0)
            z = own.best if config.ideal is None else config.ideal[i]
            ideal.append(own.standardised(z) if own.num else 0.0)
        # One that weighs nothing is never the furthest, were all others past their ideals.
        counted = [i for i, weight in enumerate(weights) if weight > 0.0]
        chosen = counted[
            furthest([means[i] for i in counted], [weights[i] for i in counted], ideal=[ideal[i] for i in counted])
        ]
        weights = [weight if i == chosen else 0.0 for i, weight in enumerate(weights)]
    return {name: _scalar(row, moments, weights) for name, row in scores.items()}


def _scalar(row: Sequence[float | None], moments: Sequence[Moments], weights: Sequence[float]) -> float | None:
    total = 0.0
    for value, own, weight in zip(row, moments, weights, strict=True):
        if weight == 0.0:
            continue
        if value is None:
            return None
        total += weight * own.standardised(value)
    return total


def rescored(data: TrainingData, scores: Mapping[str, float | None]) -> TrainingData:
    """Return scored samples with other scores; a missing one stays missing (the sample then weighs nothing)."""
    column = pa.array([scores.get(response_id) for response_id in data.response_ids], pa.float64())
    place = data.table.schema.get_field_index("score")
    return replace(data, table=data.table.set_column(place, "score", column))


def with_margins(
    pairs: Sequence[PreferencePair], scores: Scores, running: RunningScores, config: ObjectivesConfig
) -> tuple[tuple[PreferencePair, ...], int]:
    """Return pairs with the margins of the objectives after the first, and how many had to go, for one has no score.

    A margin is r_chosen - r_rejected in standard deviations of all scores so far (0 for a constant objective).
    """
    moments = [running.moments[name] for name in config.names[1:]]
    done: list[PreferencePair] = []
    for pair in pairs:
        margins = []
        for own, good, bad in zip(moments, scores[pair.chosen_id][1:], scores[pair.rejected_id][1:], strict=True):
            if good is not None and bad is not None:
                margins.append(own.standardised(good) - own.standardised(bad))
        if len(margins) == len(moments):
            done.append(replace(pair, other_margins=tuple(margins)))
    return tuple(done), len(pairs) - len(done)
