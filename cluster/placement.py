"""Owns placement: a group per replica, so that a pool can grow and shrink, and a gang for ranks that start together.

Both can be kept to nodes with certain labels; a pool's replicas can be kept apart from one another.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.node_labels import selects

logger = logging.getLogger(__name__)

Resources: TypeAlias = dict[str, float]
Spread: TypeAlias = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

NODE_ID = "ray.io/node-id"
"""The label that Ray gives to every node."""
SHARED_GPU = 0.5
"""What each of two that share a GPU in turn has of it in Ray's books; its memory is whose turn it is."""
APART_WAIT_S = 5.0
"""How long a replica that is to be apart from its like waits for room on the emptiest nodes before it takes any."""

_one_by_one = threading.Lock()
"""Held while a replica looks where its like are and takes its place: two at once would choose the same node."""


class PlacementTimeout(TimeoutError):
    """The cluster did not have the resources in time."""


def place_replica(
    bundles: Sequence[Resources],
    *,
    pool: str,
    apart: bool = False,
    labels: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> PlacementGroup:
    """Reserve the bundles of one replica on one node and return their ready group. Blocks.

    Args:
        pool: replicas of one pool have one name; the group's is that and a suffix of its own.
        apart: take a node with as few of the pool's replicas as there is, where it has room.
        labels: see `place_gang`.

    Raises:
        ValueError: no bundle, or one that asks for nothing.
        PlacementTimeout: says what was asked for and what the cluster has and has free.
    """
    # The suffix: a cluster admits a name once, also over several runs.
    name = f"{pool}-{uuid.uuid4().hex[:8]}"
    labels = labels or {}
    if apart:
        with _one_by_one:
            nodes = _emptiest_nodes(bundles, pool=pool, labels=labels)
            if nodes:
                chosen = {**labels, NODE_ID: f"in({','.join(nodes)})"}
                group = _reserved(bundles, strategy="STRICT_PACK", name=name, labels=chosen, timeout_s=APART_WAIT_S)
                if group is not None:
                    return group
    return place_gang(bundles, strategy="STRICT_PACK", name=name, labels=labels, timeout_s=timeout_s)


def place_gang(
    bundles: Sequence[Resources],
    *,
    strategy: Spread = "PACK",
    name: str = "",
    labels: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> PlacementGroup:
    """Reserve all bundles at once or none, and return the ready group. Blocks.

    Args:
        labels: label to value, or to Ray's "in(a,b)", "!x", "!in(a,b)": what every node that takes a bundle must have.

    Raises:
        ValueError: no bundle, or one that asks for nothing.
        PlacementTimeout: says what was asked for and what the cluster has and has free.
    """
    group = _reserved(bundles, strategy=strategy, name=name, labels=labels or {}, timeout_s=timeout_s)
    if group is None:
        shortage = _shortage(bundles, strategy=strategy, labels=labels or {})
        raise PlacementTimeout(f"placement {name!r} got no room within {timeout_s:g} s: {shortage}")
    return group


def _reserved(
    bundles: Sequence[Resources], *, strategy: Spread, name: str, labels: Mapping[str, str], timeout_s: float
) -> PlacementGroup | None:
    """Return the ready group; None, with nothing reserved, when there was no room in time."""
    if not bundles or not all(any(amount > 0 for amount in bundle.values()) for bundle in bundles):
        raise ValueError(f"placement {name!r}: every bundle must ask for something, got {list(bundles)}")
    group = placement_group(
        [dict(bundle) for bundle in bundles],
        strategy=strategy,
        name=name,
        bundle_label_selector=[dict(labels)] * len(bundles) if labels else None,
    )
    if group.wait(timeout_seconds=timeout_s):
        return group
    remove_placement_group(group)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A replica's place on GPUs that others share with it."""

    name: str
    """The actor's that takes it; while an actor is called so, the slot is taken."""
    bundles: tuple[int, ...]


class SharedPlaces:
    """The places of one pool's replicas in a gang whose GPUs they share with the gang's own actors."""

    def __init__(self, group: PlacementGroup, *, pool: str, slots: Sequence[tuple[int, ...]]) -> None:
        """Describe the places; each slot names the bundles that one replica stands on, its actor in the first."""
        self.group = group
        self._pool = pool
        self._slots = [
            Slot(name=f"{pool}-{group.id.hex()}-{number}", bundles=bundles) for number, bundles in enumerate(slots)
        ]
        self._lock = threading.Lock()

    @contextmanager
    def next(self, *, timeout_s: float) -> Iterator[Slot]:
        """Give a free slot; an actor of its name must stand there when the block ends. Blocks.

        Raises:
            PlacementTimeout: all of them stayed taken.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while True:
                for slot in self._slots:
                    if _is_free(slot):
                        yield slot
                        return
                if time.monotonic() >= deadline:
                    raise PlacementTimeout(
                        f"placement {self._pool!r} got no room within {timeout_s:g} s: all {len(self._slots)} places "
                        "on shared GPUs are taken; lower its replicas"
                    )
                time.sleep(0.1)


def _is_free(slot: Slot) -> bool:
    try:
        ray.get_actor(slot.name)
    except ValueError:
        return True
    return False


def inside(group: PlacementGroup, *, bundle: int = 0) -> PlacementGroupSchedulingStrategy:
    """Return the scheduling strategy that puts an actor, and what it starts, into a bundle of the group."""
    return PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=True
    )


def release(group: PlacementGroup) -> None:
    """Give a group back; actors in it are killed."""
    remove_placement_group(group)


def nodes_of(group: PlacementGroup) -> tuple[str, ...]:
    """Return the node ids of a ready group's bundles, in their order."""
    places: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return tuple(places[bundle] for bundle in sorted(places))


def _emptiest_nodes(bundles: Sequence[Resources], *, pool: str, labels: Mapping[str, str]) -> list[str]:
    """Return the ids of the nodes that could hold the bundles and have the fewest replicas of the pool."""
    wanted = _sum(bundles)
    able = [node["NodeID"] for node in _nodes(labels) if _holds(node["Resources"], wanted)]
    held: Counter[str] = Counter()
    for group in placement_group_table().values():
        if group["name"].rpartition("-")[0] == pool and group["state"] == "CREATED":
            held.update(set(group["bundles_to_node_id"].values()))
    fewest = min((held[node] for node in able), default=0)
    return sorted(node for node in able if held[node] == fewest)


def _nodes(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the living nodes with the labels."""
    return [
        node
        for node in ray.nodes()
        if node["Alive"] and all(selects(wanted, node["Labels"].get(label)) for label, wanted in labels.items())
    ]


def _holds(resources: Mapping[str, float], wanted: Resources) -> bool:
    return all(round(resources.get(name, 0.0) * 10_000) >= round(wanted[name] * 10_000) for name in wanted)


def _sum(bundles: Sequence[Resources]) -> Resources:
    wanted: Resources = {}
    for bundle in bundles:
        for resource, amount in bundle.items():
            wanted[resource] = wanted.get(resource, 0.0) + amount
    return wanted


def _shortage(bundles: Sequence[Resources], *, strategy: Spread, labels: Mapping[str, str]) -> str:
    wanted = _sum(bundles)
    have, free = ray.cluster_resources(), ray.available_resources()
    lines = [
        f"{resource} wanted {amount:g}, free {free.get(resource, 0.0):g} of {have.get(resource, 0.0):g}"
        for resource, amount in sorted(wanted.items())
    ]
    nodes = _nodes(labels)
    where = " with " + ", ".join(f"{label}={value}" for label, value in labels.items()) if labels else ""
    lines.append(f"{len(bundles)} bundle(s), {strategy}, on {len(nodes)} node(s){where}")
    if labels and not nodes:
        lines.append("label a node by `ray start --labels`, or change node_labels")
    if strategy == "STRICT_PACK" and nodes and not any(_holds(node["Resources"], wanted) for node in nodes):
        most = {name: max(node["Resources"].get(name, 0.0) for node in nodes) for name in sorted(wanted)}
        largest = ", ".join(f"{amount:g} {name}" for name, amount in most.items())
        lines.append(f"no node can hold it: the most that one has is {largest}; lower what one replica takes")
    return "; ".join(lines)
