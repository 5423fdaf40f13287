"""Owns a run's figures in Weights & Biases: on this machine until somebody syncs them, or online where asked.

    wandb sync runs/NAME/wandb/offline-run-*

WANDB_API_KEY, WANDB_ENTITY and WANDB_BASE_URL are read by the library itself, and written nowhere by us.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cluster import config
from trainers.trackers import TrackedRun

PACKAGE = "wandb"


class Config(config.Config):
    """Where the figures go."""

    online: bool = False
    """Send them to the server while the run goes on; without it they stay in the run's directory."""


class WandbTracker:
    """Hands figures to the library, whose own process writes and sends them."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Take in one iteration; its number is the step."""
        self._run.log(dict(figures), step=iteration)

    def close(self) -> None:
        """Wait until everything is written, and sent where it is sent."""
        self._run.finish()


def open_tracker(config: Config, run: TrackedRun) -> WandbTracker:
    """Begin the run, or go on with it: its id is the same in every sitting."""
    # Before the import, which reads it: a crash of theirs is not to be reported from here.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return WandbTracker(
        wandb.init(
            project=run.project,
            name=run.name,
            id=run.identity,
            resume="allow",
            dir=str(run.run_dir),
            mode="online" if config.online else "offline",
            config=dict(run.settings),
            # Figures alone: no terminal, no command line, no code, no machine.
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_stats=True,
                host="",
                x_save_requirements=False,
            ),
        )
    )
