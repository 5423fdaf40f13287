"""Owns the archive of weakness cells: what was asked, where, and how often the critic failed the answers.

Scored by the critic's verdicts alone; truth never reaches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class CellRecord:
    """What the archive knows of one cell; `fail_share` forgets old evidence, the counts do not."""

    num_queries: int = 0
    num_successes: int = 0
    num_judged: int = 0
    num_failed: int = 0
    fail_share: float | None = None
    """Exponential moving average over iterations of the share of answers that the critic failed."""


@dataclass(slots=True)
class Archive:
    """Cells of the domain's taxonomy, and every canonical problem already asked."""

    cells: dict[tuple[str, ...], CellRecord]
    seen: set[str] = field(default_factory=set)

    @classmethod
    def empty(cls, cells: Iterable[tuple[str, ...]]) -> Archive:
        """Return an archive that knows nothing of the given cells."""
        return cls(cells={cell: CellRecord() for cell in cells})

    def is_novel(self, canonical: str) -> bool:
        """Return whether a canonical problem has not been asked yet."""
        return canonical not in self.seen

    def remember(self, canonical: str) -> None:
        """Note that a canonical problem has been asked."""
        self.seen.add(canonical)

    def record(
        self, cell: tuple[str, ...], *, num_judged: Sequence[int], num_failed: Sequence[int], smoothing: float
    ) -> None:
        """Add one iteration's outcomes of a cell; `smoothing` in (0, 1] is the weight of the new evidence."""
        row = self.cells[cell]
        judged, failed = sum(num_judged), sum(num_failed)
        row.num_queries += len(num_judged)
        row.num_judged += judged
        row.num_failed += failed
        row.num_successes += sum(1 for j, f in zip(num_judged, num_failed, strict=True) if j > 0 and 2 * f >= j)
        if judged:
            share = failed / judged
            row.fail_share = share if row.fail_share is None else row.fail_share + smoothing * (share - row.fail_share)

    def coverage(self) -> float:
        """Return the share of cells in which at least one query has been asked."""
        return sum(row.num_queries > 0 for row in self.cells.values()) / max(1, len(self.cells))

    def snapshot(self) -> dict[str, object]:
        """Return the archive as plain JSON values; `restore` is its inverse."""
        return {
            "cells": [
                [list(cell), row.num_queries, row.num_successes, row.num_judged, row.num_failed, row.fail_share]
                for cell, row in self.cells.items()
            ],
            "seen": sorted(self.seen),
        }

    @classmethod
    def restore(cls, snapshot: Mapping[str, object]) -> Archive:
        """Return the archive of a snapshot."""
        rows = snapshot["cells"]
        seen = snapshot["seen"]
        assert isinstance(rows, list), "an archive snapshot holds a list of cells"
        assert isinstance(seen, list), "and a list of canonical problems"
        return cls(
            cells={
                tuple(row[0]): CellRecord(
                    num_queries=row[1], num_successes=row[2], num_judged=row[3], num_failed=row[4], fail_share=row[5]
                )
                for row in rows
            },
            seen=set(seen),
        )
