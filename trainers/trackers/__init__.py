"""Owns what an experiment tracker provides: a place outside metrics.jsonl that a run's figures go to, row by row.

`tracking.kinds = ["wandb"]` means `trainers/trackers/wandb.py`: the file's name is the kind. Every file has `PACKAGE`,
the distribution to install, a `Config`, and `open_tracker`. A tracker imports its library in that function alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

SHARED_DIR = ".trackers"
"""In `runs_dir`: what trackers keep of all runs, so that runs can be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run before its first row."""

    name: str
    identity: str
    """Tells runs of one name apart; the same in every sitting of a run."""
    run_dir: Path
    project: str
    """What the tracker groups runs under."""
    last_iteration: int = 0
    """The last committed iteration of a resumed run; 0 for a new one."""
    settings: Mapping[str, str | float | bool] = field(default_factory=dict)
    """The run's config, flat; nothing of the machine that it runs on."""

    @property
    def shared_dir(self) -> Path:
        """Where a tracker keeps on this machine what it shares between runs."""
        return (self.run_dir.parent / SHARED_DIR).absolute()


class Tracker(Protocol):
    """Takes in a run's figures; both methods may block, and may raise whatever their library raises."""

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Take in one committed iteration."""
        ...

    def close(self) -> None:
        """Write what is not written yet, and end; rows may follow in another sitting."""
        ...
