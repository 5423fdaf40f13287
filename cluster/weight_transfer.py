"""Owns which way new weights go from the ranks to the replicas, worked out from where both compute. Moves nothing.

    ranks and replicas: CPUs or GPUs, shared or not, one node or many ──► backend, and why

    object_store   rank 0 puts them into the Ray object store, every replica reads them there; works everywhere
    ipc            a replica on a rank's own GPU maps the rank's memory (CUDA IPC)
    nccl           rank 0 broadcasts to a replica on other GPUs
    sharded_rdt    every rank serves a replica's workers over RDMA (NIXL), where the ranks of ZeRO 3 fill several nodes

The last three are vLLM's own, by its names. Whichever is chosen, the object store holds every version besides: a
replica that (re)starts takes it there, when the ranks train the next one already.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from cluster.config import Config

Backend: TypeAlias = Literal["object_store", "ipc", "nccl", "sharded_rdt"]

GPUS_PER_NODE = 8
"""GPUs that a node is taken to have where nobody has looked."""


class WeightSyncConfig(Config):
    """How new weights get from the learner's ranks to the replicas that answer with them."""

    backend: Literal["auto", "object_store", "ipc", "nccl", "sharded_rdt"] = "auto"
    """"auto" goes by placement: `elenchus plan` says which it is and why; the others are vLLM's names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Where weights come from and where they go."""

    num_ranks: int
    gpus_per_rank: float
    """0 on CPUs."""
    zero_stage: int
    tensor_parallel: int
    gpus_per_replica: tuple[float, ...]
    """Shares of GPUs that one replica reserves; empty on CPUs."""
    in_turn: bool = False
    """Replicas stand on the ranks' own GPUs and take turns with them."""
    num_gpus: int | None = None
    """GPUs that there are; None where nobody has looked."""
    adapter: bool = False
    """An adapter is all that goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A way, and why it is taken."""

    backend: Backend
    reason: str


def choose_transfer(ends: Ends, *, backends: frozenset[str]) -> Transfer:
    """Return the way that weights take between two ends.

    Args:
        ends: where they come from and go to.
        backends: those of vLLM that are usable (`usable_backends`).

    >>> ends = Ends(num_ranks=4, gpus_per_rank=1, zero_stage=2, tensor_parallel=2, gpus_per_replica=(1.0, 1.0))
    >>> choose_transfer(ends, backends=frozenset({"nccl", "ipc"})).backend
    'nccl'
    """
    for backend in ("ipc", "sharded_rdt", "nccl"):
        if backend in backends and obstacle(backend, ends) is None and _fits_best(backend, ends):
            return Transfer(backend=backend, reason=_reason(backend, ends))
    found = {backend: obstacle(backend, ends) for backend in ("nccl", "ipc") if backend in backends}
    reasons = dict.fromkeys(reason for reason in found.values() if reason is not None)
    return Transfer(backend="object_store", reason="; ".join(reasons) or "the vLLM here has no other")


def checked_transfer(config: WeightSyncConfig, ends: Ends, *, backends: frozenset[str]) -> Transfer:
    """Return the way that a config asks for, or the one that placement gives.

    Raises:
        ValueError: what is asked for can't work between these ends, or is not installed.
    """
    if config.backend == "auto":
        return choose_transfer(ends, backends=backends)
    if config.backend == "object_store":
        return Transfer(backend="object_store", reason="weight_sync.backend asks for it")
    why = obstacle(config.backend, ends)
    if why is None and config.backend not in backends:
        why = "the vLLM here has none" if config.backend != "sharded_rdt" else "it needs the package nixl beside vLLM"
    if why is not None:
        other = choose_transfer(ends, backends=backends)
        raise ValueError(
            f'weight_sync.backend: got "{config.backend}", but {why}; wanted "auto", which is {other.backend} here'
        )
    return Transfer(backend=config.backend, reason="weight_sync.backend asks for it")


def obstacle(backend: str, ends: Ends) -> str | None:
    """Return why weights can't take one of vLLM's ways between two ends; None when they can."""
    if ends.adapter:
        return "the learner publishes an adapter, which a replica takes as files"
    if ends.gpus_per_rank == 0:
        return "the ranks compute on CPUs"
    if not ends.gpus_per_replica:
        return "the replicas compute on CPUs"
    same = _on_one_gpu(ends)
    if same is None:
        return "ranks and replicas take shares of GPUs, and Ray alone decides which of them are on one"
    if backend == "ipc" and not same:
        return "the replicas are on other GPUs than the ranks"
    if backend != "ipc" and same:
        return "the replicas are on the ranks' own GPUs, which can't be two ends of one connection"
    return None


def _on_one_gpu(ends: Ends) -> bool | None:
    """Whether every replica is on GPUs of ranks; None when that shows only once they are placed."""
    if ends.in_turn or ends.num_gpus == 1:
        return True
    # A whole GPU is nobody else's, whoever has it.
    whole = ends.gpus_per_rank >= 1 or all(share >= 1 for share in ends.gpus_per_replica)
    tight = all(share + ends.gpus_per_rank > 1 for share in ends.gpus_per_replica)
    return False if whole or tight else None


def _fits_best(backend: str, ends: Ends) -> bool:
    many_nodes = ends.num_ranks * ends.gpus_per_rank > GPUS_PER_NODE
    return backend != "sharded_rdt" or (ends.zero_stage == 3 and many_nodes)


def _reason(backend: str, ends: Ends) -> str:
    if backend == "ipc":
        return "the replicas are on the ranks' own GPUs"
    if backend == "sharded_rdt":
        return f"{ends.num_ranks} ranks of ZeRO 3 fill more than one node: each serves the workers beside it"
    return "ranks and replicas have GPUs of their own"


def usable_backends() -> frozenset[str]:
    """Return the ways that the installed vLLM has, by its files: importing it takes seconds and wants its device."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    folder = Path(next(iter(found.submodule_search_locations))) / "distributed" / "weight_transfer"
    names = {name for name in ("ipc", "nccl", "sharded_rdt") if (folder / f"{name}_engine.py").is_file()}
    if not any(importlib.util.find_spec(package) for package in ("nixl", "nixl_cu12", "nixl_cu13", "rixl")):
        names.discard("sharded_rdt")
    return frozenset(names)
