"""Owns a run's figures in MLflow: a database beside the runs, or a tracking server where one is named.

    mlflow ui --backend-store-uri sqlite:///runs/.trackers/mlflow.db

MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN are read by the library itself, and written nowhere by us.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from cluster import config
from trainers.trackers import TrackedRun

PACKAGE = "mlflow"
IDENTITY_TAG = "elenchus.identity"
MAX_PARAMS = 100
"""In one call, by MLflow's own limit; for metrics it is a thousand."""


class Config(config.Config):
    """Where the figures go."""

    uri: str | None = Field(default=None, min_length=1)
    """Tracking server or store; without it MLFLOW_TRACKING_URI counts, and without that a database in runs_dir."""

    @field_validator("uri")
    @classmethod
    def _check(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password:
            raise ValueError(
                "got an address with a password in it (not shown), wanted it without: export "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri


class MlflowTracker:
    """Writes figures by the client alone: MLflow's notion of a current run is left to whoever embeds us."""

    def __init__(self, client: Any, *, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    def log(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Write one iteration; its number is the step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, iteration) for name, value in figures.items()]
        for i in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[i : i + 1000])

    def close(self) -> None:
        """Mark the run as finished; a resumed one is marked as running again."""
        self._client.set_terminated(self._run_id)


def open_tracker(config: Config, run: TrackedRun) -> MlflowTracker:
    """Begin the run, or go on with the one that has its identity."""
    # Before the import, which reads it: MLflow (3.17) tells its makers of its use otherwise.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.entities import Param
    from mlflow.tracking import MlflowClient

    # It tells of its database's tables on stderr, where the live table is.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    named = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(tracking_uri=named or _database(run.shared_dir))
    experiment_id = _experiment(client, run, artifacts=None if named else run.shared_dir / "mlflow-artifacts")
    found = client.search_runs([experiment_id], f"tags.`{IDENTITY_TAG}` = '{run.identity}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return MlflowTracker(client, run_id=found[0].info.run_id)
    run_id = client.create_run(experiment_id, run_name=run.name, tags={IDENTITY_TAG: run.identity}).info.run_id
    params = [Param(key, str(value)) for key, value in run.settings.items()]
    for i in range(0, len(params), MAX_PARAMS):
        client.log_batch(run_id, params=params[i : i + MAX_PARAMS])
    return MlflowTracker(client, run_id=run_id)


def _database(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _experiment(client: Any, run: TrackedRun, *, artifacts: Path | None) -> str:
    """Return the id of the project's experiment, which is made where there is none."""
    found = client.get_experiment_by_name(run.project)
    if found is not None:
        return str(found.experiment_id)
    location = None if artifacts is None else artifacts.as_uri()
    return str(client.create_experiment(run.project, artifact_location=location))
