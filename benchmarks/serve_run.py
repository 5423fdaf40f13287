"""Owns a run directory for the endpoint's benchmarks: a model from random weights, committed version after version."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

from cluster.commits import Commit, iteration_dir, write_commit
from cluster.durable_files import digest_directory
from trainers.base_model import BaseModelConfig, write_base_model

LARGE = BaseModelConfig(hidden_size=768, intermediate_size=3072, num_layers=13, num_heads=12, max_positions=512)
"""About 123 million parameters."""


def make_run(run: Path, shape: BaseModelConfig) -> Path:
    """Write a run with v0 and return its directory."""
    run.mkdir(parents=True)
    write_base_model(run / "start", shape, seed=0)
    commit(run, 0)
    return run


def commit(run: Path, number: int) -> str:
    """Commit the next version, whose norms differ from all others, and return its name."""
    import torch
    from safetensors.torch import load_file, save_file

    policy = run / "policies" / f"v{number:06d}"
    shutil.copytree(run / "start", policy)
    if number:
        generator = torch.Generator().manual_seed(number)
        tensors = load_file(policy / "model.safetensors")
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    (run / "journal" / iteration_dir(number)).mkdir(parents=True)
    digests = digest_directory(policy, root=run)
    write_commit(
        run,
        Commit(
            iteration=number,
            epoch=1,
            time=float(number),
            segments={},
            superseded={},
            num_stale_records=0,
            checkpoint=(),
            policy=digests,
            state={},
        ),
        on_step=lambda _: None,
    )
    return f"v{number}"


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
