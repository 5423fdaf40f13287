"""Owns a training plan of which every step has its share of experts' rows (METHODS M-MIX), as long as there are any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from trainers.batches import PlannedStep, TrainingPlan, shuffle_key


def plan_with_share(
    row_ids: Sequence[str],
    *,
    kept: Sequence[bool],
    share: float,
    batch_size: int,
    epochs: int,
    seed: int,
    keys: Sequence[str] | None = None,
) -> TrainingPlan:
    """Return a plan whose every step has at least `share` of the kept rows; they come again where they are too few.

    A row is never twice in one step: with fewer kept rows than a step wants, all of them are in it. Every row is in at
    least one step of every epoch; the others are in exactly one. Without kept rows, or with nothing else, or with a
    share of 0, it is `TrainingPlan.of`.

    Args:
        row_ids: one for each row of the table.
        kept: (rows,) true for those to be kept in every step.
        share: least share of them in a step, at most 1/2.
        batch_size: greatest number of rows of a step, 2 or more.
        epochs: passes over the rows.
        seed: of the order.
        keys: see `TrainingPlan.of`.

    Raises:
        ValueError: as `TrainingPlan.of`.
    """
    plain = TrainingPlan.of(row_ids, batch_size=batch_size, epochs=epochs, seed=seed, keys=keys)
    num_kept = sum(kept)
    if share <= 0.0 or num_kept in (0, len(row_ids)):
        return plain
    assert batch_size >= 2, "the config's own check"
    assert share <= 0.5, "the config's own check"
    others, repeated = _sizes(len(row_ids) - num_kept, num_kept, share=share, batch_size=batch_size)
    names = row_ids if keys is None else keys
    steps = []
    for epoch in range(epochs):
        order = sorted(range(len(row_ids)), key=lambda row: shuffle_key(names[row], epoch=epoch, seed=seed))
        place = {row: i for i, row in enumerate(order)}
        rest = iter([row for row in order if not kept[row]])
        again = _cycle([row for row in order if kept[row]])
        for num_others, num_repeated in zip(others, repeated, strict=True):
            rows = [next(rest) for _ in range(num_others)] + [next(again) for _ in range(num_repeated)]
            steps.append(PlannedStep(epoch=epoch, rows=tuple(sorted(rows, key=place.__getitem__))))
    return TrainingPlan(row_ids=tuple(row_ids), steps=tuple(steps))


def _cycle(rows: Sequence[int]) -> Iterator[int]:
    while True:
        yield from rows


def _sizes(num_others: int, num_kept: int, *, share: float, batch_size: int) -> tuple[list[int], list[int]]:
    """Return how many other and how many kept rows each step has: as few steps as hold them all."""
    num_steps = -(-(num_others + num_kept) // batch_size)
    while True:
        others, dealt = _dealt(num_others, num_steps), _dealt(num_kept, num_steps)[::-1]
        # h >= share * (a + h) for a others and h kept ones.
        least = [min(num_kept, math.ceil(share * a / (1.0 - share) - 1e-9)) for a in others]
        kept = [max(both) for both in zip(dealt, least, strict=True)]
        if all(a + h <= batch_size for a, h in zip(others, kept, strict=True)):
            return others, kept
        num_steps += 1


def _dealt(num: int, num_steps: int) -> list[int]:
    """Return the sizes of as many parts, which differ by one at most."""
    return [num * (i + 1) // num_steps - num * i // num_steps for i in range(num_steps)]
