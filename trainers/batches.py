"""Owns which rows make a step, and which rank takes which of them together.

    table ──► rows (trainers.rows) ──► TrainingPlan: rows of each step ──► micro_batches: rank, micro-batch ──► tensors

Knows neither models nor DeepSpeed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from trainers.rows import Rows
from trainers.rows.columns import Ids
from trainers.rows.padding import MICRO_BATCH_COST_TOKENS

# ------------------------------------------------------------------------------------------------------------ plan


class Slot(NamedTuple):
    """One row's part in an update."""

    row_id: str
    epoch: int
    step: int
    """Counted from 0 within the update, over its epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """The rows of one optimizer step."""

    epoch: int
    rows: tuple[int, ...]
    """Positions in `TrainingPlan.row_ids`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Which row goes into which step of an update; every row goes into one step of every epoch."""

    row_ids: tuple[str, ...]
    """One for each row of the table, in the table's order."""
    steps: tuple[PlannedStep, ...]
    training: tuple[float, float] = (0.0, 1.0)
    """Shares of the run's training that are done before the first step and after the last."""

    @classmethod
    def of(
        cls, row_ids: Sequence[str], *, batch_size: int, epochs: int, seed: int, keys: Sequence[str] | None = None
    ) -> TrainingPlan:
        """Return a plan that depends on the set of keys, the batch size, the epochs and the seed alone.

        The keys, one for each row, are the row ids unless they are given: ids that hold a run's name would shuffle two
        runs of one seed differently.

        An epoch has ceil(rows / batch_size) steps whose sizes differ by one at most, so that no step of a few rows
        moves the weights as far as a full one.

        Raises:
            ValueError: no row, two rows with one id or one key, or a count below 1.
        """
        if not row_ids or batch_size < 1 or epochs < 1:
            raise ValueError(
                f"training plan: got {len(row_ids)} rows, batch_size {batch_size}, epochs {epochs}; wanted at least 1"
            )
        if len(set(row_ids)) != len(row_ids):
            twice = next(row_id for i, row_id in enumerate(sorted(row_ids)) if row_id == sorted(row_ids)[i - 1])
            raise ValueError(f"training plan: two rows have the id {twice!r}; ids must be unique")
        keys = row_ids if keys is None else keys
        if len(set(keys)) != len(row_ids):
            raise ValueError(f"training plan: got {len(set(keys))} keys for {len(row_ids)} rows, wanted one for each")
        num_steps = -(-len(row_ids) // batch_size)
        steps = []
        for epoch in range(epochs):
            order = sorted(range(len(row_ids)), key=lambda row: shuffle_key(keys[row], epoch=epoch, seed=seed))
            bounds = [len(order) * i // num_steps for i in range(num_steps + 1)]
            steps += [PlannedStep(epoch=epoch, rows=tuple(order[bounds[i] : bounds[i + 1]])) for i in range(num_steps)]
        return cls(row_ids=tuple(row_ids), steps=tuple(steps))

    def progress(self, step: int) -> float:
        """Return the share of the run's training that is done before a step."""
        begin, end = self.training
        return begin + (end - begin) * step / len(self.steps)

    def slots(self, step: int) -> Iterator[Slot]:
        """Yield the slots of a step."""
        planned = self.steps[step]
        return (Slot(row_id=self.row_ids[row], epoch=planned.epoch, step=step) for row in planned.rows)


def shuffle_key(key: str, *, epoch: int, seed: int) -> bytes:
    """Return what orders rows: their order is a shuffle that hangs on these three alone."""
    return hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()


# ---------------------------------------------------------------------------------------------------------- layout

MicroBatches: TypeAlias = tuple[tuple[int, ...], ...]
"""The rows of each micro-batch of one rank; an empty one is padding that weighs nothing."""


def lay_out(
    rows: Sequence[int],
    *,
    lengths: Ids,
    num_ranks: int,
    micro_batch_tokens: int,
    sequences_per_row: int | Ids = 1,
    num_tokens: Ids | None = None,
) -> tuple[MicroBatches, ...]:
    """Return each rank's micro-batches: like lengths together, about equal tokens per rank, equally many per rank.

    The ranks must make the same number of forward passes, for under ZeRO 2 and 3 each is a collective; what a rank
    lacks is made up by halving its largest micro-batches, or by empty ones. Rows of one length keep the order of `rows`
    (a plan's), so that the table's order has no part in it.

    Args:
        rows: row numbers, which `lengths` is indexed by.
        lengths: tokens of each row's longest sequence.
        num_ranks: ranks to deal to.
        micro_batch_tokens: greatest padded size; a longer row goes alone.
        sequences_per_row: 2 for pairs, whose chosen and rejected responses are padded alike; indexed by row numbers
            where rows differ in it.
        num_tokens: real tokens of each row, by which rows are dealt; None: those of its longest sequence for each.
    """
    if isinstance(sequences_per_row, int):
        limit, counts = micro_batch_tokens // sequences_per_row, np.ones_like(lengths)
    else:
        limit, counts = micro_batch_tokens, sequences_per_row
    sizes = lengths * counts if num_tokens is None else num_tokens
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for row in sorted(rows, key=lambda row: -int(sizes[row])):
        rank = loads.index(min(loads))
        dealt[rank].append(row)
        loads[rank] += int(sizes[row])
    by_length = (sorted(mine, key=lambda row: -int(lengths[row])) for mine in dealt)
    cut = [_cut(mine, lengths=lengths, counts=counts, limit=limit) for mine in by_length]
    most = max(1, *(len(micros) for micros in cut))
    return tuple(_filled_up(micros, most) for micros in cut)


class MicroBatch(NamedTuple):
    """What one rank computes before one backward pass."""

    rows: tuple[int, ...]
    """None: padding that weighs nothing."""
    num_passes: int
    """Forward passes that its sequences are computed in, the long ones first; the same on every rank."""


def micro_batches(
    rows: Rows, chosen: Sequence[int], *, num_ranks: int, micro_batch_tokens: int
) -> tuple[tuple[MicroBatch, ...], ...]:
    """Return each rank's micro-batches of some rows: `lay_out`, and in how many forward passes each is computed."""
    layout = lay_out(
        chosen,
        lengths=rows.lengths,
        num_ranks=num_ranks,
        micro_batch_tokens=micro_batch_tokens,
        sequences_per_row=rows.sequences_per_row,
        num_tokens=rows.num_tokens,
    )
    num_passes = [rows.num_passes(micros) for micros in zip(*layout, strict=True)]
    return tuple(tuple(map(MicroBatch, micros, num_passes)) for micros in layout)


def _cut(rows: list[int], *, lengths: Ids, counts: Ids, limit: int) -> list[tuple[int, ...]]:
    """Cut rows, longest first, into runs whose padded tokens and per-run cost are least (dynamic programming)."""
    sizes: list[int] = lengths[rows].tolist()
    before: list[int] = [0, *np.cumsum(counts[rows]).tolist()]
    best, start = [0], [0]
    first = 0
    for end in range(1, len(rows) + 1):
        while first < end - 1 and sizes[first] * (before[end] - before[first]) > limit:
            first += 1
        # Plain numbers: a micro-batch has tens of rows, and NumPy would take longer to be called than to compute.
        costs = [best[begin] + sizes[begin] * (before[end] - before[begin]) for begin in range(first, end)]
        least = min(costs)
        best.append(least + MICRO_BATCH_COST_TOKENS)
        start.append(first + costs.index(least))
    runs = []
    end = len(rows)
    while end:
        runs.append(tuple(rows[start[end] : end]))
        end = start[end]
    return runs[::-1]


def _filled_up(micros: list[tuple[int, ...]], count: int) -> MicroBatches:
    parts = list(micros)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]), default=None)
        if largest is None or len(parts[largest]) < 2:
            parts.append(())
            continue
        half = len(parts[largest]) // 2
        parts[largest : largest + 1] = [parts[largest][:half], parts[largest][half:]]
    return tuple(parts)
