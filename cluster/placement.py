"""Owns placement: a group per replica, so that a pool can grow and shrink, and a gang for ranks that start together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

logger = logging.getLogger(__name__)

Resources: TypeAlias = dict[str, float]
Spread: TypeAlias = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class PlacementTimeout(TimeoutError):
    """The cluster did not have the resources in time."""


def place_replica(resources: Resources, *, name: str = "", timeout_s: float = 60.0) -> PlacementGroup:
    """Reserve one bundle for one replica and return its ready group. Blocks.

    Raises:
        PlacementTimeout: says what was asked for and what the cluster has and has free.
    """
    return place_gang([resources], strategy="PACK", name=name, timeout_s=timeout_s)


def place_gang(
    bundles: Sequence[Resources], *, strategy: Spread = "PACK", name: str = "", timeout_s: float = 60.0
) -> PlacementGroup:
    """Reserve all bundles at once or none, and return the ready group. Blocks.

    Raises:
        ValueError: no bundle, or one that asks for nothing.
        PlacementTimeout: says what was asked for and what the cluster has and has free.
    """
    if not bundles or not all(any(amount > 0 for amount in bundle.values()) for bundle in bundles):
        raise ValueError(f"placement {name!r}: every bundle must ask for something, got {list(bundles)}")
    group = placement_group([dict(bundle) for bundle in bundles], strategy=strategy, name=name)
    if not group.wait(timeout_seconds=timeout_s):
        shortage = _shortage(bundles, strategy=strategy)
        remove_placement_group(group)
        raise PlacementTimeout(f"placement {name!r} got no room within {timeout_s:g} s: {shortage}")
    return group


def inside(group: PlacementGroup, *, bundle: int = 0) -> PlacementGroupSchedulingStrategy:
    """Return the scheduling strategy that puts an actor, and what it starts, into a bundle of the group."""
    return PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=True
    )


def release(group: PlacementGroup) -> None:
    """Give a group back; actors in it are killed."""
    remove_placement_group(group)


def _shortage(bundles: Sequence[Resources], *, strategy: Spread) -> str:
    wanted: Resources = {}
    for bundle in bundles:
        for resource, amount in bundle.items():
            wanted[resource] = wanted.get(resource, 0.0) + amount
    have, free = ray.cluster_resources(), ray.available_resources()
    lines = [
        f"{resource} wanted {amount:g}, free {free.get(resource, 0.0):g} of {have.get(resource, 0.0):g}"
        for resource, amount in sorted(wanted.items())
    ]
    num_nodes = sum(1 for node in ray.nodes() if node["Alive"])
    return "; ".join([*lines, f"{len(bundles)} bundle(s), {strategy}, on {num_nodes} node(s)"])
