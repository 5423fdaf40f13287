"""Owns a rank's checkpoints: DeepSpeed's files, random states, what they must agree on, and their digests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.durable_files import FileDigest, write_json_atomic
from trainers.ranks.adapters import adapter_topology
from trainers.ranks.checkpoint_files import (
    MANIFEST,
    CorruptCheckpoint,
    digest_problem,
    files_of,
    fresh_beside,
    listing_problems,
    publish_directory,
    read_manifest,
    synced_digest,
)
from trainers.ranks.collectives import on_all
from trainers.ranks.deepspeed_engine import convert_to_universal, repair_universal
from trainers.ranks.random_states import random_states, restore_random_states
from trainers.ranks.rank_model import RankModel

CHECKPOINT_TAG = "state"
TOPOLOGY = "training.json"
REFERENCE_CACHE = "reference.pt"


class Checkpoints:
    """Checkpoints of one rank's model; every method is a collective."""

    def __init__(self, model: RankModel) -> None:
        self._model = model

    def save(self, path: str, *, counters: Mapping[str, float | None]) -> tuple[FileDigest, ...]:
        """Write everything that training needs to go on bit by bit, and return the digests of all files.

        The directory, which the ranks must share, appears whole or not at all. DeepSpeed's own `latest` file is not
        written: which checkpoint counts is the run's commit to say.
        """
        target = Path(path)
        beside = target.with_name(f".{target.name}.tmp")
        if self._model.rank == 0:
            fresh_beside(target)
        dist.barrier()
        self._model.engine.save_checkpoint(
            str(beside),
            tag=CHECKPOINT_TAG,
            client_state={},
            save_latest=False,
            exclude_frozen_parameters=self._model.adapter is not None,
        )
        torch.save(random_states(), beside / f"random-{self._model.rank:05d}.pt")
        if self._model.rank == 0:
            if len(self._model.first.cache):
                torch.save(self._model.first.cache.state(), beside / REFERENCE_CACHE)
            (beside / TOPOLOGY).write_text(json.dumps({**self._topology(), **counters}, indent=2) + "\n")
        dist.barrier()
        digests = tuple(sorted(on_all(self._share(beside, synced_digest)), key=lambda digest: digest.path))
        if self._model.rank == 0:
            write_json_atomic(beside / MANIFEST, {"files": [asdict(digest) for digest in digests]})
            publish_directory(beside, target)
        dist.barrier()
        return digests

    def load(self, path: str, *, files: tuple[FileDigest, ...] | None) -> dict[str, Any]:
        """Go on from a checkpoint, as `DeepSpeedRank.load` says it, and return its counters."""
        source = Path(path)
        wanted = {digest.path: digest for digest in files or read_manifest(source)}
        problems = listing_problems(source, wanted) if self._model.rank == 0 else []
        problems = on_all([*problems, *self._share(source, lambda p, root: digest_problem(p, root, wanted))])
        found = [problem for problem in problems if problem]
        if found:
            raise CorruptCheckpoint(f"{source}: {'; '.join(sorted(set(found)))}")
        saved = json.loads((source / TOPOLOGY).read_text())
        here = self._topology()
        there = {key: saved.get(key) for key in here}
        # An adapter's checkpoint leaves out its base, which is that of the topology.
        whole = self._model.adapter is None
        resized = there != here and {**there, "num_ranks": self._model.num_ranks} == here
        if there != here and not resized:
            raise CorruptCheckpoint(
                f"{source}: saved with {there}, wanted {here}; "
                "set the config back, or start anew from the exported weights"
            )
        with self._readable(source, resized=resized) as folder:
            loaded, _ = self._model.engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG, load_module_strict=whole)
        if loaded is None:
            raise RuntimeError(f"{source}: DeepSpeed found nothing to load under tag {CHECKPOINT_TAG!r}")
        if (source / REFERENCE_CACHE).is_file():
            self._model.first.cache.restore(torch.load(source / REFERENCE_CACHE, weights_only=True))
        states = source / f"random-{self._model.rank:05d}.pt"
        if states.is_file():  # else a rank that there was not when it was saved: it keeps its own
            restore_random_states(torch.load(states, weights_only=True))
        dist.barrier()
        return {name: value for name, value in saved.items() if name not in here}

    @contextmanager
    def _readable(self, source: Path, *, resized: bool) -> Iterator[Path]:
        """Give the checkpoint in a form that the engine reads: of another number of ranks, DeepSpeed's universal one.

        Without ZeRO every rank holds everything, and there is nothing to convert.
        """
        universal = resized and self._model.config.zero_stage > 0
        if universal != self._model.universal:
            self._model.build(universal=universal)
        if not universal:
            yield source
            return
        folder = source.with_name(f".{source.name}.universal")
        if self._model.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            convert_to_universal(source / CHECKPOINT_TAG, folder / CHECKPOINT_TAG)
        dist.barrier()
        decays = [group["weight_decay"] for group in self._model.engine.optimizer.param_groups]
        try:
            yield folder
            repair_universal(self._model.engine.optimizer, decays)
            dist.barrier()
        finally:
            if self._model.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def _topology(self) -> dict[str, Any]:
        config = self._model.config
        topology = {"num_ranks": self._model.num_ranks, "zero_stage": config.zero_stage, "dtype": config.dtype}
        return {**topology, **adapter_topology(config, base=self._model.base)}

    def _share(self, directory: Path, call: Callable[[Path, Path], Any]) -> list[Any]:
        """Return what a call gives for this rank's share of a directory's files, so that hashing is split."""
        files = [path for path in files_of(directory) if path.name != MANIFEST]
        return [call(path, directory) for path in files[self._model.rank :: self._model.num_ranks]]
