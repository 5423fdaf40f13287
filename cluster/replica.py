"""Owns what a pool asks of a replica: the methods of its actor, where it lives, what it has done, how it is ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.placement_group import PlacementGroup

from cluster.placement import release


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """Where a replica lives."""

    replica_id: int
    node_id: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What a replica has done since it started."""

    num_generated_tokens: int
    num_prompt_tokens: int
    busy_s: float
    num_running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """What `start_replica` gives: an actor whose constructor may still be running, and the group that it lives in.

    The actor has these async methods:
    `ready() -> ReplicaInfo`, once it can serve;
    `generate(requests)`, an async generator of lists of results, in the order in which they finish;
    `apply_weights(manifest, probe_token_ids) -> WeightAnswer`;
    `sleep()` and `wake()`, where replicas share GPUs in turn;
    `stats() -> EngineStats`; `check()`, a canary that touches what `generate` needs.
    """

    actor: Any
    placement_group: PlacementGroup | None = None


def added(a: EngineStats, b: EngineStats) -> EngineStats:
    """Return what two replicas have done together, of which none is running any more."""
    return EngineStats(
        num_generated_tokens=a.num_generated_tokens + b.num_generated_tokens,
        num_prompt_tokens=a.num_prompt_tokens + b.num_prompt_tokens,
        busy_s=a.busy_s + b.busy_s,
        num_running=0,
    )


def local_process(info: ReplicaInfo) -> psutil.Process | None:
    """Return a replica's process when it is on this node; psutil notices when its pid is another process's by now."""
    if info.node_id != ray.get_runtime_context().get_node_id():
        return None
    try:
        return psutil.Process(info.pid)
    except psutil.NoSuchProcess:
        return None


def end(replica: Replica) -> None:
    """End a replica and give back the room that it held."""
    if not ray.is_initialized():
        return
    ray.kill(replica.actor)
    if replica.placement_group is not None:
        release(replica.placement_group)


def end_late(starting: asyncio.Future[Replica]) -> None:
    """End a replica that was still starting when nobody wanted it any more."""
    if not starting.cancelled() and starting.exception() is None:
        end(starting.result())


def processes_of(process: psutil.Process | None) -> list[psutil.Process]:
    """Return a replica's process and the workers that it started itself."""
    if process is None:
        return []
    try:
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def kill(process: psutil.Process) -> None:
    """Kill a process that may be gone by itself."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
