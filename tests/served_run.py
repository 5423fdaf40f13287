"""Owns run directories as the endpoint finds them: policies of tiny models, committed one after another."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cluster.commits import Commit, iteration_dir, write_commit
from cluster.durable_files import digest_directory
from tests.tiny_models import write_llama
from trainers.run_config import RunConfig

SCALE = 0.02


def make_run(path: Path, *, num_versions: int = 1, model: Path | None = None, **engine: Any) -> Path:
    """Write a run with versions v0, v1, … and return its directory; `engine` are settings of its rollouts."""
    path.mkdir(parents=True)
    settings = {"threads": 1, "kv_cache_gb": 0.05, "max_num_seqs": 64, **engine}
    config = RunConfig.model_validate({"name": path.name, "rollouts": {"engine": {"model": "bootstrap", **settings}}})
    (path / "resolved.json").write_text(json.dumps(config.model_dump(mode="json")))
    start = model or write_llama(path / "start", seed=3, max_positions=256)
    for number in range(num_versions):
        commit_version(path, number, start=start)
    return path


def commit_version(run: Path, number: int, *, start: Path | None = None, nan: bool = False) -> str:
    """Commit the next version, another model each time, and return its name."""
    import torch

    policy = run / "policies" / f"v{number:06d}"
    shutil.copytree(start or run / "start", policy)
    tensors = load_file(policy / "model.safetensors")
    generator = torch.Generator().manual_seed(number)
    for name, tensor in tensors.items():
        tensors[name] = tensor + SCALE * bool(number) * torch.randn(tensor.shape, generator=generator)
    if nan:
        tensors[next(iter(tensors))][0] = float("nan")
    save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    (run / "journal" / iteration_dir(number)).mkdir(parents=True)
    commit = Commit(
        iteration=number,
        epoch=1,
        time=1_700_000_000.0 + number,
        segments={},
        superseded={},
        num_stale_records=0,
        checkpoint=(),
        policy=digest_directory(policy, root=run),
        state={},
    )
    write_commit(run, commit, on_step=lambda _: None)
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"policy_version": f"v{number}", "probe_accuracy": number / 100}) + "\n")
    return f"v{number}"


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
