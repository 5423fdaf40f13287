"""Owns the figures that Ray exports to Prometheus: what a series is, those of pools and weight syncs, how they stand.

    pools' stats ┐                                   1 s
    weight syncs ├──► Recorder (a table of values) ──────► ray.util.metrics ──► each node's metrics port
    wanted sizes ┘                                         (ray_elenchus_…)

A process records while a `recording` is open, and otherwise not: whoever has a figure hands it over and asks nothing.
Other floors declare series of their own; this one knows nothing of what is generated.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.pool import PoolStats

REFRESH_EVERY_S = 1.0
"""How often gauges are said again: Ray (2.60) forgets one that was not set within two report intervals, and the
shortest interval is a second."""
RUN_TAG = "run"
"""On every series: two runs may share a cluster."""


class Kind(StrEnum):
    """What Prometheus makes of a series."""

    GAUGE = "gauge"
    """The last value stands."""
    COUNTER = "counter"
    """Adds up, from 0 in each sitting: `increase` and `rate` are for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One figure that is followed over time."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    tags: tuple[str, ...] = ()
    """Beside `run`."""

    @property
    def exported(self) -> str:
        """Its name in Prometheus: Ray puts `ray_` in front, and `_total` behind a counter."""
        return f"ray_{self.name}{'_total' if self.kind is Kind.COUNTER else ''}"


def gauge(name: str, unit: str, meaning: str, *tags: str) -> Series:
    """Return a series whose last value stands."""
    return Series(name=f"elenchus_{name}", kind=Kind.GAUGE, unit=unit, meaning=meaning, tags=tags)


def counter(name: str, unit: str, meaning: str, *tags: str) -> Series:
    """Return a series that adds up."""
    return Series(name=f"elenchus_{name}", kind=Kind.COUNTER, unit=unit, meaning=meaning, tags=tags)


POOL_REPLICAS = gauge("pool_replicas", "replicas", "Replicas, by state: wanted, ready or starting", "pool", "state")
POOL_QUEUED = gauge("pool_queued_requests", "requests", "Requests that wait for a replica", "pool")
POOL_OPEN = gauge("pool_open_samples", "samples", "Samples asked for and not answered yet", "pool")
POOL_RUNNING = gauge("pool_running_requests", "requests", "Requests in the engines just now", "pool")
POOL_TOKENS_PER_S = gauge(
    "pool_tokens_per_second", "tokens/s", "Generated tokens per second, a mean of the last half minute of work", "pool"
)
POOL_ANSWERED = counter("pool_answered_samples", "samples", "Samples answered", "pool")
POOL_GENERATED = counter("pool_generated_tokens", "tokens", "Tokens generated", "pool")
POOL_PROMPTS = counter("pool_prompt_tokens", "tokens", "Tokens of prompts read", "pool")
POOL_BUSY = counter("pool_busy_seconds", "s", "Seconds in which engines had work, added up over replicas", "pool")
POOL_RETRIED = counter("pool_retried_requests", "requests", "Requests issued again", "pool")
POOL_LOST = counter("pool_lost_replicas", "replicas", "Replicas that died, hung or were quarantined", "pool")
SCALE_EVENTS = counter(
    "scale_events", "events", "Changes of the wanted replicas, by direction (up, down) and by why", "pool", "to", "why"
)
SYNCS = counter("weight_syncs", "syncs", "Weight syncs, by outcome: taken or refused", "pool", "outcome")
SYNC_SECONDS = gauge("weight_sync_seconds", "s", "Seconds that the last weight sync took", "pool")
SYNC_PARITY = gauge(
    "weight_sync_parity_nats", "nats", "Largest difference in log-probs of a replica at the last weight sync", "pool"
)
SYNC_QUARANTINED = counter(
    "weight_sync_quarantined_replicas", "replicas", "Replicas that did not take weights which others took", "pool"
)

CLUSTER_SERIES = (
    POOL_REPLICAS,
    POOL_QUEUED,
    POOL_OPEN,
    POOL_RUNNING,
    POOL_TOKENS_PER_S,
    POOL_ANSWERED,
    POOL_GENERATED,
    POOL_PROMPTS,
    POOL_BUSY,
    POOL_RETRIED,
    POOL_LOST,
    SCALE_EVENTS,
    SYNCS,
    SYNC_SECONDS,
    SYNC_PARITY,
    SYNC_QUARANTINED,
)


# ------------------------------------------------------------------------------------------------------------ recorder


class Recorder:
    """Keeps the last value of every gauge, and passes counters on by what they have grown."""

    def __init__(self, *, run: str, make: Callable[[Series], Any] | None = None) -> None:
        """Begin with nothing known.

        Args:
            run: the run's name, on every series.
            make: makes what a series is written to (`set` or `inc`); None: Ray's own.
        """
        self._run = run
        self._make = make or _ray_metric
        self._lock = threading.Lock()
        self._metrics: dict[str, Any] = {}
        self._gauges: dict[tuple[Series, tuple[str, ...]], float] = {}
        self._totals: dict[tuple[Series, tuple[str, ...]], float] = {}

    def set(self, series: Series, value: float | None, *tags: str) -> None:
        """Let a gauge stand at a value; None, and what is no finite number, takes it away: not measured is never 0."""
        assert series.kind is Kind.GAUGE, f"{series.name} is a counter"
        with self._lock:
            if value is None or not math.isfinite(value):
                self._gauges.pop((series, tags), None)
                return
            self._gauges[series, tags] = value
            self._metric(series).set(value, tags=self._tags(series, tags))

    def set_only(self, series: Series, values: Mapping[str, float]) -> None:
        """Let a gauge of one tag stand at these values and at no others."""
        with self._lock:
            stale = [key for key in self._gauges if key[0] is series and key[1][0] not in values]
            for key in stale:
                del self._gauges[key]
        for tag, value in values.items():
            self.set(series, value, tag)

    def count(self, series: Series, num: float, *tags: str) -> None:
        """Add to a counter; 0 adds nothing."""
        assert series.kind is Kind.COUNTER, f"{series.name} is a gauge"
        if num > 0:
            with self._lock:
                self._metric(series).inc(num, tags=self._tags(series, tags))

    def count_to(self, series: Series, total: float, *tags: str) -> None:
        """Add to a counter what a total has grown by since it was last told; one that fell adds nothing."""
        before = self._totals.get((series, tags), 0.0)
        self._totals[series, tags] = max(before, total)
        self.count(series, total - before, *tags)

    def refresh(self) -> None:
        """Say every gauge again, so that Ray goes on exporting it."""
        with self._lock:
            for (series, tags), value in self._gauges.items():
                self._metric(series).set(value, tags=self._tags(series, tags))

    def _metric(self, series: Series) -> Any:
        if series.name not in self._metrics:
            self._metrics[series.name] = self._make(series)
        return self._metrics[series.name]

    def _tags(self, series: Series, values: tuple[str, ...]) -> dict[str, str]:
        return {RUN_TAG: self._run, **dict(zip(series.tags, values, strict=True))}


def _ray_metric(series: Series) -> Any:
    from ray.util import metrics

    kind = metrics.Gauge if series.kind is Kind.GAUGE else metrics.Counter
    return kind(series.name, f"{series.meaning} [{series.unit}]", (RUN_TAG, *series.tags))


_recorder: Recorder | None = None


@contextmanager
def recording(*, run: str, make: Callable[[Series], Any] | None = None) -> Iterator[Recorder]:
    """Record this process's figures under a run's name while the body runs; Ray must be connected before.

    At the end the gauges are said no more, and Ray forgets them within two of its report intervals.
    """
    global _recorder
    assert _recorder is None, "one process has one recording"
    recorder = _recorder = Recorder(run=run, make=make)
    ended = threading.Event()

    def refresh() -> None:
        while not ended.wait(REFRESH_EVERY_S):
            recorder.refresh()

    thread = threading.Thread(target=refresh, name="metrics", daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        _recorder = None
        ended.set()
        thread.join()


def current() -> Recorder | None:
    """Return the recorder of this process; None while nothing is recorded."""
    return _recorder


# ------------------------------------------------------------------------------------------------------- what happened


def pool_stands(stats: PoolStats, *, tokens_per_s: float) -> None:
    """Record how a pool stands."""
    if _recorder is None:
        return
    pool = stats.name
    for state, num in (("wanted", stats.wanted), ("ready", stats.ready), ("starting", stats.starting)):
        _recorder.set(POOL_REPLICAS, num, pool, state)
    gauges: Iterable[tuple[Series, float]] = (
        (POOL_QUEUED, stats.num_queued),
        (POOL_OPEN, stats.num_open),
        (POOL_RUNNING, stats.num_running),
        (POOL_TOKENS_PER_S, tokens_per_s),
    )
    for series, value in gauges:
        _recorder.set(series, value, pool)
    totals: Iterable[tuple[Series, float]] = (
        (POOL_ANSWERED, stats.num_answered),
        (POOL_GENERATED, stats.num_generated_tokens),
        (POOL_PROMPTS, stats.num_prompt_tokens),
        (POOL_BUSY, stats.busy_s),
        (POOL_RETRIED, stats.num_retried),
        (POOL_LOST, stats.num_lost),
    )
    for series, total in totals:
        _recorder.count_to(series, total, pool)


def scaled(pool: str, *, before: int, after: int, why: str) -> None:
    """Record that another number of replicas is wanted."""
    if _recorder is not None:
        _recorder.count(SCALE_EVENTS, 1, pool, "up" if after > before else "down", why)


def synced(pool: str, *, num_quarantined: int, seconds: float, max_abs_diff: float) -> None:
    """Record a weight sync that replicas took."""
    if _recorder is not None:
        _recorder.count(SYNCS, 1, pool, "taken")
        _recorder.count(SYNC_QUARANTINED, num_quarantined, pool)
        _recorder.set(SYNC_SECONDS, seconds, pool)
        _recorder.set(SYNC_PARITY, max_abs_diff, pool)


def sync_refused(pool: str, *, seconds: float) -> None:
    """Record a weight sync that no replica took; there is no parity to tell of."""
    if _recorder is not None:
        _recorder.count(SYNCS, 1, pool, "refused")
        _recorder.set(SYNC_SECONDS, seconds, pool)
        _recorder.set(SYNC_PARITY, None, pool)
