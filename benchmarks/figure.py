"""Owns what a benchmark gives: a ratio of two sides measured in turns, its spread, and the target it is held to."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number and its target."""

    name: str
    what: str
    """One line: what is divided by what."""
    value: float
    """The median over the rounds."""
    low: float
    """Lower quartile over the rounds."""
    high: float
    """Upper quartile."""
    num_rounds: int
    target: float
    at_least: bool
    """The target is a floor; otherwise a ceiling."""
    unit: str = ""
    """Empty for a ratio."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Medians of the two sides and whatever else explains the number; units in the names."""

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        return self.value >= self.target if self.at_least else self.value <= self.target

    @classmethod
    def of(
        cls,
        name: str,
        what: str,
        values: Sequence[float],
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        unit: str = "",
        details: Mapping[str, float] | None = None,
    ) -> Figure:
        """Return the figure of one value per round; exactly one of the two targets is given."""
        assert (at_least is None) != (at_most is None), "a target is a floor or a ceiling"
        target = at_most if at_least is None else at_least
        assert target is not None, "one of them is given"
        low, high = _quartiles(values)
        return cls(
            name=name,
            what=what,
            value=statistics.median(values),
            low=low,
            high=high,
            num_rounds=len(values),
            target=target,
            at_least=at_least is not None,
            unit=unit,
            details=details or {},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """What two sides took, round by round."""

    ours: tuple[float, ...]
    plain: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Return ours / plain of each round: neighbours in time, so that the machine's drift cancels."""
        return [a / b for a, b in zip(self.ours, self.plain, strict=True)]

    def medians(self, unit: str) -> dict[str, float]:
        """Return both sides' medians under names that say their unit."""
        return {f"ours_{unit}": statistics.median(self.ours), f"plain_{unit}": statistics.median(self.plain)}


Side = Callable[[], Awaitable[float]]
"""Runs one side once and returns what it took."""


async def in_turns(ours: Side, plain: Side, *, num_rounds: int, num_warm: int = 2) -> Rounds:
    """Run two sides in turns, the order reversed from round to round; warm-up rounds are run and forgotten."""
    taken: list[tuple[float, float]] = []
    for number in range(num_warm + num_rounds):
        if number % 2:
            b, a = await plain(), await ours()
        else:
            a, b = await ours(), await plain()
        taken.append((a, b))
    kept = taken[num_warm:]
    return Rounds(ours=tuple(a for a, _ in kept), plain=tuple(b for _, b in kept))


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| figure | what | target | median | quartiles | rounds | |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        sign, unit = ("≥" if figure.at_least else "≤"), (f" {figure.unit}" if figure.unit else "")
        lines.append(
            f"| `{figure.name}` | {figure.what} | {sign} {figure.target:g}{unit} | **{figure.value:.3f}**{unit} | "
            f"{figure.low:.3f} – {figure.high:.3f} | {figure.num_rounds} | {'✓' if figure.met else '✗'} |"
        )
    return "\n".join(lines)
