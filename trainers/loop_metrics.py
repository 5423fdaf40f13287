"""Owns the loop's own series in Prometheus: what a committed iteration measured, from its row of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cluster.metrics import Recorder, Series, counter, current, gauge
from trainers.summary import IterationMetrics

ITERATION = gauge("iteration", "iterations", "The last committed iteration, which published the weights of its number")
ITERATION_SECONDS = gauge("iteration_seconds", "s", "Wall-clock seconds of the last iteration")
STAGE_SECONDS = gauge(
    "stage_seconds", "s", "Seconds of its stages; those that stream into one another overlap", "stage"
)
ATTACK_SUCCESS = gauge(
    "attack_success_ratio", "share", "Share of the attacker's queries of which the critic failed half of the answers"
)
PROBE_ACCURACY = gauge("probe_accuracy_ratio", "share", "Share of the probe problems answered rightly, greedily")
CRITIC_ACCURACY = gauge(
    "critic_balanced_accuracy_ratio", "share", "The critic's agreement with truth: balanced accuracy on live answers"
)
CRITIC_FALSE_PASS = gauge("critic_false_pass_ratio", "share", "Share of the bad answers that the critic passed")
CRITIC_FALSE_FAIL = gauge("critic_false_fail_ratio", "share", "Share of the good answers that the critic failed")
CRITIC_AUROC = gauge("critic_auroc_ratio", "share", "Chance that a good answer's P(good) is above a bad one's")
PARITY = gauge(
    "iteration_parity_nats",
    "nats",
    "Largest difference in log-probs, learner against replicas, at the last publication",
)
SAMPLE_AGE = gauge(
    "sample_age_versions", "versions", "Policy versions between the weights that made a sample and those trained on it;"
    " mean and max over the last iteration's pairs", "of",
)  # fmt: skip
TRAINING = gauge(
    "training_mean", "its own", "Means over the last iteration's optimizer steps: loss and others", "figure"
)
ATTACKS = counter("attacks", "queries", "Valid, novel queries of the attacker that were judged")
PROPOSALS = counter("proposals", "proposals", "The attacker's proposals, by what became of them", "outcome")
VERDICTS = counter("verdicts", "answers", "Answers judged by the critic")
EXPERTS_ASKED = counter("experts_asked", "labels", "Labels asked of the experts")
PAIRS_TRAINED = counter("pairs_trained", "pairs", "Preference pairs trained on")
PAIRS_DROPPED = counter(
    "pairs_dropped", "candidates", "Queries, answers and pairs that were not trained on, by reason", "reason"
)
REFINEMENT = counter(
    "refinement", "answers", "Distinct failed answers, those mended into a pair, and the others by cause", "fate"
)
REQUESTS_LOST = counter("requests_lost", "requests", "Requests without an answer after all attempts, by stage", "stage")

LOOP_SERIES = (
    ITERATION,
    ITERATION_SECONDS,
    STAGE_SECONDS,
    ATTACK_SUCCESS,
    PROBE_ACCURACY,
    CRITIC_ACCURACY,
    CRITIC_FALSE_PASS,
    CRITIC_FALSE_FAIL,
    CRITIC_AUROC,
    PARITY,
    SAMPLE_AGE,
    TRAINING,
    ATTACKS,
    PROPOSALS,
    VERDICTS,
    EXPERTS_ASKED,
    PAIRS_TRAINED,
    PAIRS_DROPPED,
    REFINEMENT,
    REQUESTS_LOST,
)


def committed(row: IterationMetrics) -> None:
    """Record an iteration that has just been committed."""
    recorder = current()
    if recorder is not None:
        _stand(recorder, row)
        _add(recorder, row)


def resumed(row: IterationMetrics) -> None:
    """Record where a run goes on: its last iteration's gauges; its counts are an earlier sitting's."""
    recorder = current()
    if recorder is not None:
        _stand(recorder, row)


def mean_age(sample_ages: Mapping[int, int]) -> float | None:
    """Return the mean of ages by number of samples; None without samples.

    >>> mean_age({0: 3, 1: 1})
    0.25
    """
    num = sum(sample_ages.values())
    return sum(age * count for age, count in sample_ages.items()) / num if num else None


def _stand(recorder: Recorder, row: IterationMetrics) -> None:
    agreement = row.critic_agreement
    gauges: Iterable[tuple[Series, float | None]] = (
        (ITERATION, row.iteration),
        (ITERATION_SECONDS, row.wall_s),
        (ATTACK_SUCCESS, row.live_attack_success),
        (PROBE_ACCURACY, row.probe_accuracy),
        (CRITIC_ACCURACY, agreement.balanced_accuracy),
        (CRITIC_FALSE_PASS, agreement.false_pass),
        (CRITIC_FALSE_FAIL, agreement.false_fail),
        (CRITIC_AUROC, agreement.auroc),
        (PARITY, row.parity_max_abs_diff),
    )
    for series, value in gauges:
        recorder.set(series, value)
    mean, oldest = mean_age(row.sample_ages), max(row.sample_ages, default=None)
    recorder.set_only(SAMPLE_AGE, {} if mean is None or oldest is None else {"mean": mean, "max": float(oldest)})
    recorder.set_only(STAGE_SECONDS, row.seconds)
    recorder.set_only(TRAINING, row.training)


def _add(recorder: Recorder, row: IterationMetrics) -> None:
    counters: Iterable[tuple[Series, int]] = (
        (ATTACKS, row.num_attacks),
        (VERDICTS, row.num_verdicts),
        (EXPERTS_ASKED, row.experts_asked),
        (PAIRS_TRAINED, row.pairs_trained),
    )
    for series, num in counters:
        recorder.count(series, num)
    by_tag: Iterable[tuple[Series, Mapping[str, int]]] = (
        (PROPOSALS, row.proposals),
        (PAIRS_DROPPED, row.pairs_dropped),
        (REFINEMENT, row.refinement),
        (REQUESTS_LOST, row.lost),
    )
    for series, nums in by_tag:
        for tag, num in nums.items():
            recorder.count(series, num, tag)
