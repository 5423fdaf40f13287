"""Owns the question whether a cluster has room for what a run's roles reserve, asked before anything is placed.

Where a cluster grows on demand it is asked to: as Ray sees it, by a placement group that nothing is put into.
Knows roles by their names and numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.node_labels import label_selector, selects

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
    node_labels: tuple[str, ...] = ()
    """"label=value" of the nodes that it may be on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a living node has."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a cluster has, and what of it nobody holds; by Ray's names of resources."""

    total: Mapping[str, float]
    free: Mapping[str, float]
    nodes: Sequence[Node]
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
        nodes=[Node(resources=node["Resources"], labels=node["Labels"]) for node in nodes],
        grows=any(NODE_GROUP in node["Labels"] for node in nodes),
    )


class RayDemand:
    """A placement group of all that the roles reserve; while it waits, Ray's autoscaler brings nodes for it."""

    def __init__(self, needs: Sequence[Need]) -> None:
        """Ask; returns at once."""
        from ray.util.placement_group import placement_group

        wanted = [(_bundle(need), label_selector(need.node_labels)) for need in needs for _ in range(need.count)]
        wanted = [(bundle, labels) for bundle, labels in wanted if bundle]
        self._group = placement_group(
            [bundle for bundle, _ in wanted],
            strategy="PACK",
            bundle_label_selector=[labels for _, labels in wanted] if any(labels for _, labels in wanted) else None,
        )

    def is_met(self) -> bool:
        """Return whether all of it is there."""
        return bool(self._group.wait(timeout_seconds=0))

    def release(self) -> None:
        """Give it back, or ask no more."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)


def _bundle(need: Need) -> dict[str, float]:
    return {resource: amount for resource in NAMES if (amount := _each(need, resource))}


def shortages(needs: Sequence[Need], *, room: Room) -> Iterator[str]:
    """Yield a line for each resource that the roles reserve more of than there is, or than others leave.

    >>> need = Need(role="critic", count=6, cpus=0.5, gpus=0.0)
    >>> for line in shortages([need], room=Room(total={"CPU": 4.0}, free={"CPU": 1.0}, nodes=[])):
    ...     print(line)
    cluster: got 1 CPUs free of 4 (3 are held by others), wanted 3 = 6 × 0.5 critic: wait for them, or lower the counts
    """
    for resource in NAMES:
        wanted = sum(need.count * _each(need, resource) for need in needs)
        total, free = room.total.get(resource, 0.0), room.free.get(resource, 0.0)
        if _fits(wanted, free):
            yield from _misplaced(resource, needs, room=room)
            continue
        if not _fits(wanted, total):
            have, remedy = f"{total:g} {resource}s in all", "add nodes, or lower the counts"
        else:
            have = f"{free:g} {resource}s free of {total:g} ({total - free:g} are held by others)"
            remedy = "wait for them, or lower the counts"
        yield f"cluster: got {have}, wanted {wanted:g} = {_terms(resource, needs)}: {remedy}"


def _misplaced(resource: str, needs: Sequence[Need], *, room: Room) -> Iterator[str]:
    """Yield a line for what can't be had where it is wanted, though the cluster as a whole has enough of it."""
    for node_labels in sorted({need.node_labels for need in needs if need.node_labels and _each(need, resource)}):
        asked = [need for need in needs if need.node_labels == node_labels]
        wanted = sum(need.count * _each(need, resource) for need in asked)
        nodes = _able(node_labels, room)
        there = sum(node.resources.get(resource, 0.0) for node in nodes)
        if not _fits(wanted, there):
            yield (
                f"cluster: got {there:g} {resource}s on the {len(nodes)} nodes with {', '.join(node_labels)}, wanted "
                f"{wanted:g} = {_terms(resource, asked)}: label more nodes (`ray start --labels`), or change "
                "node_labels"
            )
    for need in needs:
        nodes = _able(need.node_labels, room)
        most = max((node.resources.get(resource, 0.0) for node in nodes), default=0.0)
        if nodes and not _fits(_each(need, resource), most):
            yield (
                f"cluster: got at most {most:g} {resource}s on one node, wanted {_each(need, resource):g} for one of "
                f"{need.role}: add nodes that have so many, or lower what one takes"
            )


def _able(node_labels: tuple[str, ...], room: Room) -> list[Node]:
    """Return the nodes with the labels."""
    wanted = label_selector(node_labels).items()
    return [node for node in room.nodes if all(selects(value, node.labels.get(label)) for label, value in wanted)]


def _each(need: Need, resource: str) -> float:
    """Return what one process of a role reserves."""
    return float(getattr(need, NAMES[resource]))


def _terms(resource: str, needs: Sequence[Need]) -> str:
    return " + ".join(f"{n.count} × {_each(n, resource):g} {n.role}" for n in needs if _each(n, resource))


def _fits(wanted: float, there: float) -> bool:
    """Return whether there is so much, as Ray counts: in ten-thousandths."""
    return round(wanted * 10_000) <= round(there * 10_000)
