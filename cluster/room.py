"""Owns the question whether a cluster has room for what a run's roles reserve, asked before anything is placed.

Knows roles by their names and numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What the processes of one role reserve; all of them are alike."""

    role: str
    count: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a cluster has, and what of it nobody holds; by Ray's names of resources."""

    total: Mapping[str, float]
    free: Mapping[str, float]


def cluster_room() -> Room:
    """Return the room of the cluster that this process is connected to."""
    import ray

    return Room(total=ray.cluster_resources(), free=ray.available_resources())


def shortages(needs: Sequence[Need], *, room: Room) -> Iterator[str]:
    """Yield a line for each resource that the roles reserve more of than there is, or than others leave.

    >>> need = Need(role="critic", count=6, cpus=0.5, gpus=0.0)
    >>> for line in shortages([need], room=Room(total={"CPU": 4.0}, free={"CPU": 1.0})):
    ...     print(line)
    cluster: got 1 CPUs free of 4 (3 are held by others), wanted 3 = 6 × 0.5 critic: wait for them, or lower the counts
    """
    for resource, each in (("CPU", "cpus"), ("GPU", "gpus")):
        asked = [(need, float(getattr(need, each))) for need in needs]
        wanted = sum(need.count * amount for need, amount in asked)
        total, free = room.total.get(resource, 0.0), room.free.get(resource, 0.0)
        # As Ray counts: in ten-thousandths.
        if round(wanted * 10_000) <= round(free * 10_000):
            continue
        terms = " + ".join(f"{need.count} × {amount:g} {need.role}" for need, amount in asked if amount)
        if round(wanted * 10_000) > round(total * 10_000):
            have, remedy = f"{total:g} {resource}s in all", "add nodes, or lower the counts"
        else:
            have = f"{free:g} {resource}s free of {total:g} ({total - free:g} are held by others)"
            remedy = "wait for them, or lower the counts"
        yield f"cluster: got {have}, wanted {wanted:g} = {terms}: {remedy}"
