"""Owns how many replicas a run's pools are wanted to have: what people ask for, and what the queues call for.

    elenchus scale critic 4 ──► runs/NAME/wanted.json ──┐
                                                        ├──► Follower ──► Pool.scale
    queue and throughput of the pool ──► Autoscaler ────┘

The file is a desired state: whoever writes it returns at once, the run's driver follows it, and a resumed run finds it
again. A number that somebody asked for stands until they say "auto". Knows pools by their names and figures alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from cluster import metrics
from cluster.config import Config

if TYPE_CHECKING:
    from cluster.pool import Pool, PoolStats

logger = logging.getLogger(__name__)

WANTED_FILE = "wanted.json"
POOLS_FILE = "pools.json"
"""How the pools stood when it last changed, written by the driver's process."""
LOOK_EVERY_S = 0.5
WEIGH_EVERY_S = 2.0
"""How often an autoscaled pool is asked for its figures."""
SHRINK_AFTER_S = 60.0
"""A pool gets smaller only after its queue has called for fewer replicas for so long: starting one costs as much."""
AUTO = "auto"


class AutoscaleConfig(Config):
    """How a pool follows its queue; off while `max` is 0."""

    min: int = Field(default=1, ge=1)
    """Fewest replicas."""
    max: int = Field(default=0, ge=0)
    """Most replicas; 0 leaves the number alone."""
    target_queue_s: float = Field(default=30.0, gt=0.0)
    """Seconds in which all that the pool has been asked for should be answered at its present speed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if 0 < self.max < self.min:
            raise ValueError(f"max: got {self.max}, wanted at least min = {self.min}, or 0 to leave the number alone")
        return self


# ------------------------------------------------------------------------------------------------------ desired state


def read_wanted(run_dir: Path) -> dict[str, int]:
    """Return the numbers of replicas that somebody asked for, by pool; a pool that is left to itself is not in it.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_dir / WANTED_FILE
    try:
        content = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: got {content[:40]!r} ({error}), wanted JSON; remove it or scale again") from error
    if not isinstance(found, dict) or not all(type(num) is int and num >= 1 for num in found.values()):
        raise ValueError(f"{path}: got {content[:80]!r}, wanted numbers of replicas by pool; remove it or scale again")
    return found


def write_wanted(run_dir: Path, pool: str, num_replicas: int | None) -> None:
    """Ask for a number of replicas of a pool; None leaves it to its config again. Atomic, one writer at a time wins."""
    from cluster.durable_files import write_json_atomic

    wanted = read_wanted(run_dir)
    wanted.pop(pool, None)
    if num_replicas is not None:
        wanted[pool] = num_replicas
    write_json_atomic(run_dir / WANTED_FILE, wanted)


def read_pools(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return how a run's pools last stood (`Readiness`), by name; nothing before they were up."""
    try:
        found: dict[str, dict[str, Any]] = json.loads((run_dir / POOLS_FILE).read_text())
    except FileNotFoundError:
        return {}
    return found


# ------------------------------------------------------------------------------------------------------------ autoscale


@dataclass(slots=True)
class Autoscaler:
    """Says how many replicas a pool's queue calls for, from figures taken now and then."""

    config: AutoscaleConfig
    _rate: float | None = None
    """Samples per second of one replica, an average that forgets."""
    _last: tuple[float, int, int] | None = None
    """Time, samples answered and ready replicas when the figures were last taken with work open."""
    _fewer_since: float | None = None

    def wanted(self, stats: PoolStats, *, now: float) -> int:
        """Return the number of replicas for what the pool has open; at most one step of growth is unfounded: none."""
        self._learn(stats, now=now)
        lowest, highest = self.config.min, self.config.max
        present = min(max(stats.wanted, lowest), highest)
        if self._rate is None:
            return present
        need = math.ceil(stats.num_open / (self._rate * self.config.target_queue_s))
        need = min(max(need, lowest), highest)
        if need >= present:
            self._fewer_since = None
            return need
        if self._fewer_since is None:
            self._fewer_since = now
        return need if now - self._fewer_since >= SHRINK_AFTER_S else present

    def _learn(self, stats: PoolStats, *, now: float) -> None:
        last, self._last = self._last, (now, stats.num_answered, stats.ready) if stats.num_open else None
        if last is None or stats.num_answered == last[1]:
            return
        seconds, replicas = now - last[0], max(1, last[2])
        rate = (stats.num_answered - last[1]) / seconds / replicas
        self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate


class Follower:
    """Keeps a run's pools at what is wanted of them."""

    def __init__(
        self,
        run_dir: Path,
        pools: Mapping[str, Pool[Any, Any]],
        *,
        configured: Mapping[str, int],
        autoscale: Mapping[str, AutoscaleConfig],
    ) -> None:
        """Take the pools by name, the replicas that the config gives each, and those that follow their queue."""
        self._run_dir = run_dir
        self._pools = pools
        self._configured = configured
        self._autoscalers = {name: Autoscaler(config) for name, config in autoscale.items() if config.max}
        self._set: dict[str, int] = {}
        self._weighed_at = -math.inf
        self._shown: dict[str, dict[str, Any]] = {}

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Follow while the body runs; what breaks here is raised when the body ends."""
        task = asyncio.create_task(self._follow(), name="follower of wanted replicas")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _follow(self) -> None:
        while True:
            await self.step(now=time.monotonic())
            await asyncio.sleep(LOOK_EVERY_S)

    async def step(self, *, now: float) -> None:
        """Look once, and tell the pools."""
        try:
            asked = read_wanted(self._run_dir)
        except ValueError as error:
            # Somebody's hand was in the file; the pools stay as they are.
            logger.error("%s", error)
            return
        weigh = now - self._weighed_at >= WEIGH_EVERY_S
        if weigh:
            self._weighed_at = now
        for name, pool in self._pools.items():
            if name in asked:
                await self._scale(name, pool, asked[name], why="asked for")
            elif name in self._autoscalers:
                if weigh:
                    num = self._autoscalers[name].wanted(await pool.stats(), now=now)
                    await self._scale(name, pool, num, why="its queue")
            elif name in self._set:
                await self._scale(name, pool, self._configured[name], why="its config")
        self._show()

    def _show(self) -> None:
        from cluster.durable_files import write_json_atomic

        now = {name: asdict(pool.readiness()) for name, pool in self._pools.items()}
        if now != self._shown:
            write_json_atomic(self._run_dir / POOLS_FILE, now)
            self._shown = now

    async def _scale(self, name: str, pool: Pool[Any, Any], num_replicas: int, *, why: str) -> None:
        before = self._set.get(name, self._configured[name])
        if before != num_replicas:
            logger.info("pool %s: %d replicas wanted (%s)", name, num_replicas, why)
            metrics.scaled(name, before=before, after=num_replicas, why=why)
            await pool.scale(num_replicas)
            self._set[name] = num_replicas
