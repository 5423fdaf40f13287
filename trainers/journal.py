"""Owns the rows on their way to the journal: what comes while a write is under way goes with the next, as one table.

A row costs far less in a table of hundreds than in one of sixteen, and the disk is asked as seldom as it allows: a few
rows wait a moment for others, many do not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from actors.records import to_table
from cluster.store import RunStore
from trainers.loop_state import STAGES

MANY_ROWS = 64
GATHER_S = 0.01
"""How long fewer rows wait for others: half of what a small engine takes for a step."""

Pending = dict[int, dict[str, list[Any]]]
"""Rows by iteration and stage."""


class Journal:
    """Gathers rows for a store; one asyncio loop calls it."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._pending: Pending = {}
        self._next: asyncio.Future[None] | None = None
        """Done when what is pending is durable."""
        self._writer: asyncio.Task[None] | None = None

    async def add(self, stage: str, rows: Sequence[Any], *, iteration: int) -> None:
        """Add rows of an open iteration and return when they are durable; a cancelled caller's rows are written too.

        Raises:
            ValueError: a required value is None, or the iteration is committed; whoever's rows went with these gets it.
            StaleLease: another driver has taken the run over.
            OSError: the disk refused the write.
        """
        if not rows:
            return
        self._pending.setdefault(iteration, {}).setdefault(stage, []).extend(rows)
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        if self._writer is None:
            self._writer = asyncio.create_task(self._write(), name="journal")
        await asyncio.shield(self._next)

    async def settle(self) -> None:
        """Return when everything that was added is written, or has failed."""
        while self._writer is not None:
            await asyncio.wait([self._writer])

    async def _write(self) -> None:
        while self._next is not None:
            if sum(len(rows) for stages in self._pending.values() for rows in stages.values()) < MANY_ROWS:
                await asyncio.sleep(GATHER_S)
            pending, written = self._pending, self._next
            self._pending, self._next = {}, None
            try:
                for iteration, stages in pending.items():
                    # A proposal before its query, a response before its critique: the order of `STAGES`.
                    tables = {
                        stage: to_table(stages[stage], record)
                        for stage, (record, _) in STAGES.items()
                        if stage in stages
                    }
                    await self._store.append_all(tables, iteration=iteration)
            except Exception as error:  # noqa: BLE001 - it is those callers' whose rows were to be written
                written.set_exception(error)
                written.exception()  # seen, also when whoever waits was cancelled
            else:
                written.set_result(None)
        self._writer = None
