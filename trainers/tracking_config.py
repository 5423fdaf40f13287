"""Owns the settings of experiment trackers, and whether their libraries are there; imports none of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from pydantic import Field, field_validator

from cluster.config import Config, load_plugin, plugin_names, shown
from trainers.trackers.mlflow import Config as MlflowConfig
from trainers.trackers.trackio import Config as TrackioConfig
from trainers.trackers.wandb import Config as WandbConfig

TRACKERS = "trainers.trackers"
AUTO = "auto"
ALWAYS = "tensorboard"


class TrackingConfig(Config):
    """Which experiment trackers a run's rows go to; TensorBoard is always one."""

    kinds: tuple[str, ...] = (AUTO,)
    """Files of trainers/trackers (mlflow, trackio, wandb); "auto" stands for those whose library is installed."""
    project: str = Field(default="elenchus", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What they group runs under."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    mlflow: MlflowConfig = MlflowConfig()
    """MLflow."""
    trackio: TrackioConfig = TrackioConfig()
    """trackio."""

    @field_validator("kinds")
    @classmethod
    def _check(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        names = [AUTO, *plugin_names(TRACKERS)]
        for kind in kinds:
            if kind not in names:
                raise ValueError(f"got {shown(kind)}, wanted some of {', '.join(names)}")
        return kinds

    def chosen(self) -> list[str]:
        """Return the kinds that a run writes to, those named and those that "auto" finds."""
        names = plugin_names(TRACKERS)
        return [n for n in names if n == ALWAYS or n in self.kinds or (AUTO in self.kinds and is_installed(n))]


def missing_trackers(config: TrackingConfig) -> Iterator[str]:
    """Yield a line for each tracker that is named and whose library is not installed."""
    for kind in config.kinds:
        if kind != AUTO and not is_installed(kind):
            package = load_plugin(TRACKERS, kind, where="tracking.kinds").PACKAGE
            yield (
                f"tracking.kinds: got {shown(kind)}, whose library is not installed, wanted it beside elenchus: "
                f"pip install {package}"
            )


def is_installed(kind: str) -> bool:
    """Return whether a tracker's library can be imported."""
    package = load_plugin(TRACKERS, kind, where="tracking.kinds").PACKAGE
    found = importlib.util.find_spec(package)
    # A mere folder is a package too, to Python: W&B and MLflow leave folders of their names where they were used.
    return found is not None and found.origin is not None
