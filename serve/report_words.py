"""Owns how the report writes figures: shares, intervals, differences, durations, counts."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.feedback.training_data import Material
from trainers.statistics import Share, wilson
from trainers.summary import IterationMetrics

DASH = "–"
"""Stands for what was not measured."""
TRAINED_ROWS: dict[Material, str] = {
    "pairs": "pairs",
    "judged": "judged answers",
    "samples": "scored answers",
    "groups": "groups of answers",
    "accepted": "passing answers",
}
"""What the rows of an update are called."""


def material_of_rows(rows: Sequence[IterationMetrics]) -> Material:
    """Return what a run's updates were made of; a run has one loss."""
    return rows[0].material if rows else "pairs"


def percent(value: float | None) -> str:
    """Return a share as text; a dash when it was not measured.

    >>> percent(0.7361)
    '73.6 %'
    """
    return DASH if value is None else f"{100 * value:.1f} %"


def interval(low: float | None, high: float | None) -> str:
    """Return the ends of a share's interval, without the sign of percent.

    >>> interval(0.7, 0.784)
    '70.0 to 78.4'
    """
    return DASH if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def points(value: float) -> str:
    """Return a difference of shares in percentage points, always with its sign.

    >>> points(-0.021)
    '−2.1'
    """
    return f"{100 * value:+.1f}".replace("-", "−")


def number(value: float | None) -> str:
    """Return a measure between 0 and 1 as text; a dash when it was not measured."""
    return DASH if value is None else f"{value:.3f}"


def count(num: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun.

    >>> count(1, "query", "queries"), count(1200, "answer")
    ('1 query', '1,200 answers')
    """
    return f"{num:,} {one if num == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """Return seconds as a person would say them.

    >>> duration(3.14), duration(415.4), duration(7500)
    ('3.1 s', '6 min 55 s', '2 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def share_of(value: float, n: int) -> Share:
    """Return a share that was stored as a fraction, with its Wilson interval."""
    return wilson(round(value * n), n)
