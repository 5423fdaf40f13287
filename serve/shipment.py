"""Owns what a job is sent: the packages of this project, and the config of the run in a file beside them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ConfigError
from cluster.environment import git_commit
from serve.manifest import config_toml
from trainers.run_config import BOOTSTRAP, RunConfig

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("elenchus.py", "cluster", "actors", "trainers", "serve")
EXCLUDED = ("__pycache__", "*.pyc", ".*", "*.safetensors", "*.parquet")
CONFIG_NAME = "job.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """A folder to be sent, and what is to be known of it."""

    folder: Path
    config_name: str
    metadata: Mapping[str, str]
    """No secrets: everybody on the cluster can read it."""


def shipped_config(config: RunConfig) -> RunConfig:
    """Return a config as it is read on the cluster, whose Ray the job joins by itself.

    Raises:
        ConfigError: a path would mean another place there.
    """
    paths = {
        "runs_dir": str(config.runs_dir),
        "learner.model": config.learner.model,
        "attacker.engine.model": config.attacker.engine.model,
        "critic.engine.model": config.critic.engine.model,
    }
    problems = [
        f"{key}: got {path}, wanted an absolute path that all nodes of the cluster can reach, such as "
        f"/shared/{Path(path).name}"
        for key, path in paths.items()
        if path != BOOTSTRAP and not Path(path).is_absolute()
    ]
    if problems:
        raise ConfigError(problems)
    there = {
        "address": None,
        "num_cpus": None,
        "dashboard": False,
        "temp_dir": None,
        "token_path": None,
        "ship_code": False,
    }
    return config.model_copy(update={"ray": config.ray.model_copy(update=there)})


@contextmanager
def shipment(config: RunConfig | None, *, python: str) -> Iterator[Shipment]:
    """Lay out what is sent, for as long as the body runs; without a config, the packages alone.

    `python` is what the job runs by, and all that are started for the same run later.
    """
    with tempfile.TemporaryDirectory(prefix="elenchus-job-") as name:
        folder = Path(name)
        for item in SHIPPED:
            if (ROOT / item).is_dir():
                shutil.copytree(ROOT / item, folder / item, ignore=shutil.ignore_patterns(*EXCLUDED))
            else:
                shutil.copy2(ROOT / item, folder / item)
        commit, _ = git_commit(ROOT)
        metadata = {"commit": commit or "unknown", "version": _version(), "python": python}
        if config is not None:
            text = config_toml(config)
            (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
            metadata["config_hash"] = hashlib.sha256(text.encode()).hexdigest()[:16]
            metadata["runs_dir"] = str(config.runs_dir)
        yield Shipment(folder=folder, config_name=CONFIG_NAME, metadata=metadata)


def _version() -> str:
    try:
        return importlib.metadata.version("elenchus")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
