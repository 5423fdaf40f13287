"""Owns writing a run's learner at one trade-off between its objectives: for runs of `learner.training.panacea`.

    elenchus export NAME --preference 0.7 0.3 --out DIR             a model directory, which vLLM serves as any other
    elenchus export NAME --preference 0.7 0.3 --out DIR --adapter   LoRA's A and B on the run's base

Imports what it needs only when it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

BASE_VERSION = "v0"
"""The policy that is the base to the bit: Panacea's layers begin by adding nothing."""


@dataclass(frozen=True)
class Export:
    """Write a run's learner at one trade-off between its objectives. For runs of learner.training.panacea."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    preference: tuple[float, ...]
    """Weights of the run's objectives, in their order; none below 0, they add up to 1."""
    out: Path
    """Directory to write, which there is not yet."""
    version: str | None = None
    """A committed version of the policy, such as v3, instead of the newest."""
    adapter: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write a LoRA adapter of the run's policies/v000000 in the place of a whole model."""
    runs_dir: Path = Path("runs")
    """Where runs are."""


def export(command: Export, run_dir: Path, *, tell: Callable[[str], None]) -> int:
    """Write what is asked for, whole or not at all; return the exit code.

    Raises:
        ValueError: the run's learner is of one trade-off alone, there is no such version, the vector is none, or the
            directory is there already.
    """
    from cluster.commits import committed_policy, last_commit
    from trainers.run_config import read_resolved

    config = read_resolved(run_dir / "resolved.json")
    if config.learner.training.panacea is None or config.objectives is None:
        raise ValueError(
            f"{command.name}: got a run without learner.training.panacea, wanted one whose learner is trained for all "
            f"trade-offs; this one's policies are in {run_dir / 'policies'}"
        )
    names, vector = config.objectives.names, command.preference
    if len(vector) != len(names) or not min(vector) >= 0 or not abs(sum(vector) - 1.0) <= 1e-6:
        raise ValueError(
            f"--preference: got {' '.join(f'{part:g}' for part in vector)}, wanted {len(names)} numbers, none below 0, "
            f"that add up to 1: the weights of {', '.join(names)}"
        )
    if command.out.exists():
        raise ValueError(f"--out: got {command.out}, which exists, wanted a directory that does not")
    commit = last_commit(run_dir) if command.version is None else committed_policy(run_dir, command.version)
    if commit is None:
        raise ValueError(f"{run_dir}: got no commit yet; go on by `elenchus resume {run_dir.name}`")
    committed_policy(run_dir, f"v{commit.iteration}")  # its files, and the base's, are as they were committed
    committed_policy(run_dir, BASE_VERSION)
    policies = run_dir / "policies"
    _write(command, policy=policies / f"v{commit.iteration:06d}", base=policies / f"v{0:06d}")
    what = "adapter" if command.adapter else "model"
    shown = ", ".join(f"{name} {part:g}" for name, part in zip(names, vector, strict=True))
    tell(f"{command.out}: {what} of {command.name} v{commit.iteration} at {shown}")
    return 0


def _write(command: Export, *, policy: Path, base: Path) -> None:
    # transformers imports DeepSpeed where it is installed, which would say on stdout what it found out about GPUs.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging

    from trainers.ranks.adapters import with_layers
    from trainers.ranks.checkpoint_files import copy_tokenizer, fresh_beside, publish_directory
    from trainers.ranks.panacea import export_adapter, export_merged

    logging.disable_progress_bar()
    model, config = with_layers(policy, base=base)
    beside = fresh_beside(command.out)
    if command.adapter:
        export_adapter(model, beside, command.preference, config=config, base_model=str(base.resolve()))
    else:
        export_merged(model, beside, command.preference)
    copy_tokenizer(policy, beside)
    publish_directory(beside, command.out)
