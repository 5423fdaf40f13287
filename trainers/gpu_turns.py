"""Owns GPUs that pools and the learner's ranks share in turn: who is on which, and whose turn it is.

    engines' turn ──► learner(): pools asleep ─► ranks' states back ─► train … ─► ranks' states away ─► pools awake

A GPU is reserved once, as a bundle of one placement group; a rank and an engine's worker each hold half of it in Ray's
books. Between turns the ranks keep their weights there (ZeRO 1 and 2: a whole copy in bf16) and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from cluster.config import Config
from cluster.node_labels import label_selector

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from actors.engine_config import EngineConfig
    from cluster.placement import SharedPlaces
    from trainers.training_config import TrainingConfig


class PlacementConfig(Config):
    """Which roles share GPUs."""

    colocate: tuple[Literal["attacker", "rollouts", "critic"], ...] = ()
    """Pools that stand on the learner's own GPUs: their engines sleep while it trains. At most one on each GPU."""


class Sleeper(Protocol):
    """What a turn needs of a pool."""

    @property
    def name(self) -> str: ...

    async def sleep(self) -> None:
        """Have every replica give its GPU's memory back; one that does not is ended."""

    async def wake(self) -> None:
        """Have every replica take its GPU's memory again; one that does not is ended, and another comes."""


class Learner(Protocol):
    """What a turn needs of the learner's ranks."""

    async def offload(self) -> None:
        """Keep optimizer states, masters and gradients in the host's memory; nothing to do when no rank runs."""

    async def reload(self) -> None:
        """Take them onto the GPUs again."""


class GpuTurns:
    """Whose turn it is; the engines' at first. Without pools that share, every call does nothing."""

    def __init__(self, *, pools: Sequence[Sleeper] = (), learner: Learner | None = None) -> None:
        """Describe who takes turns.

        Args:
            pools: those whose replicas stand on the learner's GPUs.
            learner: its group; needed with pools.
        """
        assert learner is not None or not pools, "pools share with somebody"
        self._pools = tuple(pools)
        self._learner_group = learner
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def learner(self) -> AsyncIterator[None]:
        """Give the learner the GPUs while the block lasts; afterwards the engines are awake, come what may."""
        if self._learner_group is None or not self._pools:
            yield
            return
        async with self._lock:
            try:
                await _all(pool.sleep() for pool in self._pools)
                try:
                    await self._learner_group.reload()
                    yield
                finally:
                    # Also when the learner's work failed: the engines need the memory.
                    await self._learner_group.offload()
            finally:
                await _all(pool.wake() for pool in self._pools)

    async def begin(self, start_learner: Callable[[], Awaitable[None]]) -> None:
        """Start the learner while the engines sleep, which measured the GPUs' memory when nobody else was there."""
        if self._learner_group is None or not self._pools:
            await start_learner()
            return
        async with self._lock:
            try:
                await _all(pool.sleep() for pool in self._pools)
                await start_learner()
                await self._learner_group.offload()
            finally:
                await _all(pool.wake() for pool in self._pools)


async def _all(calls: Iterator[Awaitable[None]]) -> None:
    """Make calls side by side; all of them end before the first error of any is raised."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer


# ------------------------------------------------------------------------------------------------------------ places


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A pool that stands on the learner's GPUs."""

    engine: EngineConfig
    replicas: int
    most_replicas: int
    """As many as it may grow to by itself."""


def shared_slots(tenants: Mapping[str, Tenant]) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return which of the learner's GPUs each replica of each pool stands on, by pool.

    Two replicas over two GPUs each are on (0, 1) and (2, 3); the next pool begins at 4.
    """
    slots: dict[str, tuple[tuple[int, ...], ...]] = {}
    first = 0
    for name, tenant in tenants.items():
        width = tenant.engine.tensor_parallel_size
        starts = range(first, first + tenant.replicas * width, width)
        slots[name] = tuple(tuple(range(start, start + width)) for start in starts)
        first += tenant.replicas * width
    return slots


def shared_bundles(tenants: Mapping[str, Tenant], *, training: TrainingConfig) -> list[dict[str, float]]:
    """Return what is reserved for the learner and the pools on its GPUs: a bundle for each rank."""
    cpus = [training.cpus_per_rank] * training.num_ranks
    for name, slots in shared_slots(tenants).items():
        for slot in slots:
            cpus[slot[0]] += tenants[name].engine.num_cpus
    return [{"GPU": 1.0, **({"CPU": amount} if amount else {})} for amount in cpus]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The learner's GPUs, reserved once for all who take turns there."""

    group: PlacementGroup
    """A bundle for each rank."""
    places: Mapping[str, SharedPlaces]
    """By pool."""


def share_gpus(tenants: Mapping[str, Tenant], *, training: TrainingConfig) -> Shared | None:
    """Reserve the learner's GPUs and say who of the pools stands where; None when nobody shares them. Blocks.

    Raises:
        PlacementTimeout: the cluster has no room.
    """
    if not tenants:
        return None
    from cluster.placement import SharedPlaces, place_gang

    group = place_gang(
        shared_bundles(tenants, training=training),
        strategy="SPREAD" if training.arrangement == "spread" else "PACK",
        name="shared",
        labels=label_selector(training.node_labels),
        timeout_s=training.start_deadline_s,
    )
    slots = shared_slots(tenants)
    return Shared(
        group=group, places={name: SharedPlaces(group, pool=name, slots=found) for name, found in slots.items()}
    )


def colocation_problems(
    placement: PlacementConfig, *, tenants: Mapping[str, Tenant], training: TrainingConfig
) -> Iterator[str]:
    """Yield what stands against pools taking turns with the learner; each line begins with the key to change."""
    if not placement.colocate:
        return
    twice = [name for name in placement.colocate if placement.colocate.count(name) > 1]
    if twice:
        yield f'placement.colocate: got "{twice[0]}" twice, wanted each pool once'
        return
    for name, tenant in tenants.items():
        if tenant.engine.device != "cuda":
            yield f'{name}.engine.device: got "cpu" for a pool of placement.colocate, wanted "cuda"'
        if tenant.most_replicas > tenant.replicas:
            yield (
                f"{name}.autoscale.max: got {tenant.most_replicas} for a pool of placement.colocate, wanted at most "
                f"{name}.replicas = {tenant.replicas}: it can't grow on the learner's GPUs"
            )
    if training.gpus_per_rank != 1:
        yield (
            f"learner.training.gpus_per_rank: got {training.gpus_per_rank:g} with placement.colocate, wanted 1: ranks "
            "and engines take turns on whole GPUs"
        )
    if training.zero_stage not in (1, 2):
        yield (
            f"learner.training.zero_stage: got {training.zero_stage} with placement.colocate, wanted 1 or 2: DeepSpeed "
            "can put aside what a rank holds beside its weights there, not under the others"
        )
    if training.offload != "none":
        yield (
            f'learner.training.offload: got "{training.offload}" with placement.colocate, wanted "none": what a rank '
            "holds beside its weights is put aside there whenever the engines have the GPU"
        )
    asked = sum(tenant.replicas * tenant.engine.tensor_parallel_size for tenant in tenants.values())
    if asked > training.num_ranks:
        sums = " + ".join(f"{t.replicas} × {t.engine.tensor_parallel_size} {name}" for name, t in tenants.items())
        yield (
            f"placement.colocate: the pools want {asked} GPUs ({sums}), wanted at most the learner's "
            f"{training.num_ranks}, one on each: lower replicas or tensor_parallel_size, or raise num_ranks"
        )
