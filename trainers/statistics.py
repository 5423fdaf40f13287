"""Owns the statistics behind every reported figure: paired gains, shares, agreement with truth, calibration.

Takes plain sequences, returns frozen dataclasses; knows nothing of runs, models or files. Intervals are two-sided.
SciPy takes seconds to import and is so where it is needed: every command reads this file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share of independent items with its Wilson score interval."""

    value: float
    ci_low: float
    ci_high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedGain:
    """Two shares of the same items and the interval of their difference."""

    before: float
    after: float
    gain: float
    """after - before."""
    ci_low: float
    ci_high: float
    n: int
    num_improved: int
    """Items that failed before and hold after."""
    num_worsened: int
    """Items that held before and fail after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """A judge's pass/fail calls against truth."""

    balanced_accuracy: float | None
    """Mean of the shares of good answers passed and of bad answers failed; None when either kind is absent."""
    ci_low: float | None
    ci_high: float | None
    """The two Wilson intervals combined by square-and-add; None with `balanced_accuracy`. Copies of one item count as
    one in their width."""
    false_pass: float | None
    """Share of the bad answers that were passed; None when no answer is bad."""
    false_fail: float | None
    """Share of the good answers that were failed; None when no answer is good."""
    num_good: int
    num_bad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """The items whose confidence falls into [low, high); the last bin also holds 1."""

    low: float
    high: float
    n: int
    mean_confidence: float | None
    """None when the bin is empty."""
    accuracy: float | None
    """None when the bin is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How far stated confidence is from what turned out right (METHODS C-CAL)."""

    expected_error: float
    """ECE: mean over items of |accuracy - mean confidence| of their bin."""
    brier: float
    """Mean squared difference of confidence and outcome."""
    bins: tuple[ReliabilityBin, ...]


def wilson(num_successes: int, n: int, *, confidence: float = CONFIDENCE) -> Share:
    """Return a share with its Wilson score interval.

    >>> wilson(0, 10).ci_low
    0.0

    Raises:
        ValueError: `n` is 0, or `num_successes` is not in [0, n].
    """
    if not 0 <= num_successes <= n or n == 0:
        raise ValueError(f"wilson: got {num_successes} of {n}, wanted 0 <= successes <= n and n > 0; count the items")
    from scipy.stats import binomtest

    interval = binomtest(num_successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return Share(value=num_successes / n, ci_low=float(interval.low), ci_high=float(interval.high), n=n)


def paired_gain(before: Sequence[bool], after: Sequence[bool], *, confidence: float = CONFIDENCE) -> PairedGain:
    """Return the gain after - before on the same items with Tango's score interval.

    Raises:
        ValueError: no items, or two different numbers of them.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"paired_gain: got {len(before)} items before and {len(after)} after, wanted the same items both times, "
            "at least one; evaluate both on one fixed set"
        )
    n = len(before)
    improved = sum(1 for b, a in zip(before, after, strict=True) if a and not b)
    worsened = sum(1 for b, a in zip(before, after, strict=True) if b and not a)
    low, high = tango_interval(improved, worsened, n, confidence=confidence)
    return PairedGain(
        before=sum(map(bool, before)) / n,
        after=sum(map(bool, after)) / n,
        gain=(improved - worsened) / n,
        ci_low=low,
        ci_high=high,
        n=n,
        num_improved=improved,
        num_worsened=worsened,
    )


def tango_interval(
    num_improved: int, num_worsened: int, n: int, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the score interval of (improved - worsened) / n, paired items (Tango 1998, Statistics in Medicine 17).

    The interval holds every difference d at which the score statistic
    (b - c - n d) / sqrt(n (2 q(d) + d (1 - d))) stays within the normal quantile, where b and c are the discordant
    counts and q(d) is the likelihood's best share of worsened items given the difference d.

    Raises:
        ValueError: the counts are negative or exceed n, or n is 0.
    """
    b, c = num_improved, num_worsened
    if b < 0 or c < 0 or b + c > n or n == 0:
        raise ValueError(f"tango_interval: got {b} + {c} discordant of {n}, wanted 0 <= discordant <= n and n > 0")
    return -_tango_upper(c, b, n, confidence=confidence), _tango_upper(b, c, n, confidence=confidence)


def _tango_upper(b: int, c: int, n: int, *, confidence: float) -> float:
    """Return the upper end; the lower one is the negated upper end of the swapped counts."""
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    # At both corners the variance is 0 at the observed difference, and a root search would stop there.
    if b == c == 0:
        return z * z / (n + z * z)
    if c == n:
        return (z * z - n) / (z * z + n)

    def distance(d: float) -> float:
        worsened = _constrained_share(b, c, n, difference=d)
        return b - c - n * d + z * math.sqrt(max(0.0, n * (2 * worsened + d * (1 - d))))

    return _root(distance, low=(b - c) / n, high=1.0)


def _constrained_share(b: int, c: int, n: int, *, difference: float) -> float:
    """Return the maximum-likelihood share of worsened items when improved - worsened is `difference`."""
    linear = (2 * n - b + c) * difference - b - c
    constant = -c * difference * (1 - difference)
    return (math.sqrt(max(0.0, linear * linear - 8 * n * constant)) - linear) / (4 * n)


def _root(function: Callable[[float], float], *, low: float, high: float) -> float:
    """Return where a function that falls from positive to at most 0 crosses 0."""
    if low >= high or function(high) >= 0.0:
        return high
    from scipy.optimize import brentq

    return float(brentq(function, low, high, xtol=1e-12))


def agreement(
    truth: Sequence[bool],
    passed: Sequence[bool],
    *,
    items: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
) -> Agreement:
    """Return a judge's balanced accuracy and its two error rates; `truth` says which answers are good.

    Args:
        truth: which answers are good.
        passed: which of them the judge passed.
        items: equal ones are copies of one answer, which the judge got right or wrong once: the intervals are those of
            n² / Σ copies² independent answers (Kish 1965's effective sample size). None: no two are alike.
        confidence: of the interval.

    Raises:
        ValueError: two different numbers of items.
    """
    _same_length("agreement", truth, passed)
    keys = list(range(len(truth))) if items is None else list(items)
    _same_length("agreement", truth, keys)
    num_good, num_bad = sum(map(bool, truth)), sum(1 for good in truth if not good)
    good_passed = sum(1 for good, verdict in zip(truth, passed, strict=True) if good and verdict)
    bad_failed = sum(1 for good, verdict in zip(truth, passed, strict=True) if not good and not verdict)
    good = _share_of_copies(good_passed, [key for key, is_good in zip(keys, truth, strict=True) if is_good], confidence)
    bad = _share_of_copies(
        bad_failed, [key for key, is_good in zip(keys, truth, strict=True) if not is_good], confidence
    )
    both = _mean_of(good, bad) if good and bad else None
    return Agreement(
        balanced_accuracy=both[0] if both else None,
        ci_low=both[1] if both else None,
        ci_high=both[2] if both else None,
        false_pass=(num_bad - bad_failed) / num_bad if num_bad else None,
        false_fail=(num_good - good_passed) / num_good if num_good else None,
        num_good=num_good,
        num_bad=num_bad,
    )


def _share_of_copies(num_successes: int, keys: Sequence[Hashable], confidence: float) -> Share | None:
    """Return a share of items some of which are copies, its interval as wide as that of as many independent ones."""
    if not keys:
        return None
    n = len(keys)
    effective = round(n * n / sum(copies * copies for copies in Counter(keys).values()))
    alike = wilson(round(num_successes * effective / n), effective, confidence=confidence)
    value = num_successes / n
    return Share(value=value, ci_low=min(value, alike.ci_low), ci_high=max(value, alike.ci_high), n=n)


def _mean_of(first: Share, second: Share) -> tuple[float, float, float]:
    """Return the mean of two independent shares, and its interval by square-and-add (Newcombe 1998)."""
    value = (first.value + second.value) / 2
    below = math.hypot(first.value - first.ci_low, second.value - second.ci_low) / 2
    above = math.hypot(first.ci_high - first.value, second.ci_high - second.value) / 2
    return value, value - below, value + above


def auroc(truth: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Return the chance that a good answer scores above a bad one, ties counting one half.

    None when either kind is absent.

    Raises:
        ValueError: two different numbers of items, or a score that is not a number.
    """
    _same_length("auroc", truth, scores)
    if any(math.isnan(score) for score in scores):
        raise ValueError("auroc: got a score that is not a number, wanted P(good) in [0, 1]; leave missing ones out")
    num_good, num_bad = sum(map(bool, truth)), sum(1 for good in truth if not good)
    if not num_good or not num_bad:
        return None
    from scipy.stats import rankdata

    ranks = rankdata(scores)  # tied scores share their mean rank
    rank_sum = sum(float(rank) for rank, good in zip(ranks, truth, strict=True) if good)
    return (rank_sum - num_good * (num_good + 1) / 2) / (num_good * num_bad)


def calibration(confidences: Sequence[float], correct: Sequence[bool], *, num_bins: int = 10) -> Calibration:
    """Return calibration error, Brier score and the reliability bins of equal width over [0, 1].

    Raises:
        ValueError: no items, two different numbers of them, or a confidence outside [0, 1].
    """
    _same_length("calibration", confidences, correct)
    if not confidences or not all(0.0 <= value <= 1.0 for value in confidences):
        raise ValueError(f"calibration: got {confidences!r:.80}, wanted at least one confidence, all in [0, 1]")
    members: list[list[int]] = [[] for _ in range(num_bins)]
    for position, value in enumerate(confidences):
        members[min(int(value * num_bins), num_bins - 1)].append(position)
    bins = tuple(_bin(i, rows, confidences, correct, num_bins=num_bins) for i, rows in enumerate(members))
    gaps = [
        abs(cell.accuracy - cell.mean_confidence) * cell.n
        for cell in bins
        if cell.accuracy is not None and cell.mean_confidence is not None
    ]
    n = len(confidences)
    brier = math.fsum((value - float(hit)) ** 2 for value, hit in zip(confidences, correct, strict=True)) / n
    return Calibration(expected_error=math.fsum(gaps) / n, brier=brier, bins=bins)


def _bin(
    index: int, rows: Sequence[int], confidences: Sequence[float], correct: Sequence[bool], *, num_bins: int
) -> ReliabilityBin:
    return ReliabilityBin(
        low=index / num_bins,
        high=(index + 1) / num_bins,
        n=len(rows),
        mean_confidence=math.fsum(confidences[i] for i in rows) / len(rows) if rows else None,
        accuracy=sum(1 for i in rows if correct[i]) / len(rows) if rows else None,
    )


def _same_length(name: str, first: Sequence[object], second: Sequence[object]) -> None:
    if len(first) != len(second):
        raise ValueError(f"{name}: got {len(first)} and {len(second)} items, wanted one of each per item")
