"""Owns the TensorBoard events of a run, in `tensorboard/` of its directory; always written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster import config
from trainers.trackers import TrackedRun

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PACKAGE = "tensorboard"
TENSORBOARD_DIR = "tensorboard"


class Config(config.Config):
    """TensorBoard has no settings."""


class TensorBoardTracker:
    """Writes figures as scalars; what `log` returned from survives the death of the process."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Write one iteration's figures and flush them to the file."""
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, global_step=iteration)
        self._writer.flush()

    def close(self) -> None:
        """Flush and end the writer's thread."""
        self._writer.close()


def open_tracker(config: Config, run: TrackedRun) -> TensorBoardTracker:
    """Open the run's event directory; TensorBoard hides what an earlier sitting wrote after the last commit."""
    # 2 s on one core (torch and protobuf), so nobody pays for it who only reads a summary.
    from torch.utils.tensorboard import SummaryWriter

    purge_step = run.last_iteration + 1 if run.last_iteration else None
    return TensorBoardTracker(SummaryWriter(log_dir=str(run.run_dir / TENSORBOARD_DIR), purge_step=purge_step))
