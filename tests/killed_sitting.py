"""Runs the real command line in a process that ends itself (SIGKILL) at a named point of its first iteration.

    python -m tests.killed_sitting among-critiques run tiny.toml --name a

Polling the journal from outside misses a point on a fast machine; here the process is the one to know where it is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import elenchus
from cluster.store import RunStore
from trainers.training_group import TrainingGroup

IN_TRAINING_S = 0.05
"""Seconds of the update before the kill: its first steps of tens."""


def end_here() -> None:
    """End this process as a power failure would."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_among_critiques() -> None:
    """End the process when some of the first chunk of critiques, half if it has two or more, is in the log."""
    append_all = RunStore.append_all

    async def append_and_end(self: RunStore, tables: Mapping[str, Any], *, iteration: int | None = None) -> None:
        if "critiques" not in tables:
            return await append_all(self, tables, iteration=iteration)
        # A chunk holds what finished together, at times a single one: the other critiques are lost all the same.
        part = tables["critiques"].slice(0, max(1, tables["critiques"].num_rows // 2))
        await append_all(self, {**tables, "critiques": part}, iteration=iteration)
        return end_here()

    RunStore.append_all = append_and_end  # type: ignore[method-assign]


def kill_in_training() -> None:
    """End the process while the ranks of the learner's group train on the first iteration's pairs."""
    update = TrainingGroup.update

    async def update_and_end(self: TrainingGroup, *args: Any, **kwargs: Any) -> Any:
        if kwargs["loss"] == "pretraining":
            return await update(self, *args, **kwargs)
        task = asyncio.create_task(update(self, *args, **kwargs))
        await asyncio.sleep(IN_TRAINING_S)
        assert not task.done(), "the update was over before the kill"
        return end_here()

    TrainingGroup.update = update_and_end  # type: ignore[method-assign]


POINTS = {"among-critiques": kill_among_critiques, "in-training": kill_in_training}

if __name__ == "__main__":
    POINTS[sys.argv[1]]()
    sys.exit(elenchus.main(sys.argv[2:]))
