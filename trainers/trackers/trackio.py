"""Owns a run's figures in trackio: a database beside the runs, or a Hugging Face Space where one is named.

    TRACKIO_DIR=runs/.trackers/trackio trackio show --project elenchus

HF_TOKEN is read by the library itself, and written nowhere by us.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from pydantic import Field

from cluster import config
from trainers.trackers import TrackedRun

logger = logging.getLogger(__name__)

PACKAGE = "trackio"


class Config(config.Config):
    """Where the figures go."""

    space: str | None = Field(default=None, min_length=1)
    """Hugging Face Space, "user/name"; without it TRACKIO_SPACE_ID counts, and without that they stay in runs_dir."""


class TrackioTracker:
    """Hands figures to the library, whose thread writes them."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Take in one iteration; its number is the step."""
        self._run.log(dict(figures), step=iteration)

    def close(self) -> None:
        """Wait until everything is written, and sent where it is sent; it says so in one line on stdout."""
        self._run.finish()


def open_tracker(config: Config, run: TrackedRun) -> TrackioTracker:
    """Begin the run, or go on with it: trackio knows runs by their names alone, so the name is made unique."""
    # Before the import, which reads it.
    os.environ.setdefault("TRACKIO_DIR", str(run.shared_dir / "trackio"))
    import trackio

    # What it prints would go through the live table; this takes it some hundredths of a second.
    with redirect_stdout(io.StringIO()) as said:
        begun = trackio.init(
            project=run.project,
            name=f"{run.name}-{run.identity}",
            space_id=config.space,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
    logger.info("trackio: %s", said.getvalue().strip())
    return TrackioTracker(begun)
