"""Owns the question whether a cluster has room for what a run's roles reserve, asked before anything is placed.

Where a cluster grows on demand it is asked to: as Ray sees it, by a placement group that nothing is put into.
Knows roles by their names and numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

NODE_GROUP = "ray.io/node-group"
"""The label that Ray gives a node of `ray up` or KubeRay: the kind of node that its autoscaler made it as."""
NAMES = {"CPU": "cpus", "GPU": "gpus"}
"""Ray's names of resources, and `Need`'s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What the processes of one role reserve; all of them are alike, and each is on one node."""

    role: str
    count: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a cluster has, and what of it nobody holds; by Ray's names of resources."""

    total: Mapping[str, float]
    free: Mapping[str, float]
    nodes: Sequence[Mapping[str, float]]
    """What each living node has."""
    grows: bool = False
    """Whether nodes may come when they are asked for."""


class Demand(Protocol):
    """Room that was asked for and is taken as a whole, when it is there; given back by `release`."""

    def is_met(self) -> bool: ...

    def release(self) -> None: ...


def cluster_room() -> Room:
    """Return the room of the cluster that this process is connected to."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return Room(
        total=ray.cluster_resources(),
        free=ray.available_resources(),
        nodes=[node["Resources"] for node in nodes],
        grows=any(NODE_GROUP in node["Labels"] for node in nodes),
    )


class RayDemand:
    """A placement group of all that the roles reserve; while it waits, Ray's autoscaler brings nodes for it."""

    def __init__(self, needs: Sequence[Need]) -> None:
        """Ask; returns at once."""
        from ray.util.placement_group import placement_group

        bundles = [_bundle(need) for need in needs for _ in range(need.count)]
        self._group = placement_group([bundle for bundle in bundles if bundle], strategy="PACK")

    def is_met(self) -> bool:
        """Return whether all of it is there."""
        return bool(self._group.wait(timeout_seconds=0))

    def release(self) -> None:
        """Give it back, or ask no more."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)


def _bundle(need: Need) -> dict[str, float]:
    return {resource: amount for resource, name in NAMES.items() if (amount := float(getattr(need, name)))}


def shortages(needs: Sequence[Need], *, room: Room) -> Iterator[str]:
    """Yield a line for each resource that the roles reserve more of than there is, or than others leave.

    >>> need = Need(role="critic", count=6, cpus=0.5, gpus=0.0)
    >>> for line in shortages([need], room=Room(total={"CPU": 4.0}, free={"CPU": 1.0}, nodes=[{"CPU": 4.0}])):
    ...     print(line)
    cluster: got 1 CPUs free of 4 (3 are held by others), wanted 3 = 6 × 0.5 critic: wait for them, or lower the counts
    """
    for resource, each in NAMES.items():
        asked = [(need, float(getattr(need, each))) for need in needs]
        wanted = sum(need.count * amount for need, amount in asked)
        total, free = room.total.get(resource, 0.0), room.free.get(resource, 0.0)
        if _fits(wanted, free):
            yield from _too_large(resource, asked, room=room)
            continue
        terms = " + ".join(f"{need.count} × {amount:g} {need.role}" for need, amount in asked if amount)
        if not _fits(wanted, total):
            have, remedy = f"{total:g} {resource}s in all", "add nodes, or lower the counts"
        else:
            have = f"{free:g} {resource}s free of {total:g} ({total - free:g} are held by others)"
            remedy = "wait for them, or lower the counts"
        yield f"cluster: got {have}, wanted {wanted:g} = {terms}: {remedy}"


def _too_large(resource: str, asked: Sequence[tuple[Need, float]], *, room: Room) -> Iterator[str]:
    """Yield a line for each role of which no node could hold one process, whatever they have together."""
    most = max((node.get(resource, 0.0) for node in room.nodes), default=0.0)
    for need, amount in asked:
        if not _fits(amount, most):
            yield (
                f"cluster: got at most {most:g} {resource}s on one node, wanted {amount:g} for one of {need.role}: "
                "add nodes that have so many, or lower what one takes"
            )


def _fits(wanted: float, there: float) -> bool:
    """Return whether there is so much, as Ray counts: in ten-thousandths."""
    return round(wanted * 10_000) <= round(there * 10_000)
