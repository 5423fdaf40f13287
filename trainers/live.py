"""Owns what can be seen of a run from outside while it goes on: `live.json` in its directory, and lines in a job's log.

Whoever watches reads one of the two (serve/watch.py); the driver knows of neither.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from pydantic import Field, ValidationError

from cluster import metrics
from cluster.config import Config
from trainers.progress import Progress
from trainers.summary import IterationMetrics

LIVE_FILE = "live.json"
MARK = "@elenchus-live "
"""Begins the lines of a job's log that are for `elenchus watch`; `elenchus logs` leaves them out."""
LOOK_EVERY_S = 2.0
ECHO_EVERY_S = 5.0
"""A job's log is kept for as long as its cluster: fewer lines there than states in the file."""
NUM_ROWS = 8
RATE_OVER_S = 30.0
"""Rates are means over so long."""


class PoolState(Config):
    """One role's pool."""

    wanted: int
    ready: int
    queued: int
    """Requests that wait for a replica."""
    open: int
    """Samples asked for and not answered yet."""
    answers_per_s: float
    """Samples answered per second while there was work, when last known; 0 before the first."""
    tokens_per_s: float
    """Generated tokens per second, just now."""
    version: str | None
    """Weights that it holds; None before the first publication."""
    why: str | None
    """What replicas that are wanted and not ready wait for."""

    @property
    def queue_s(self) -> float | None:
        """Seconds in which all that is open would be answered at the known speed; None where none is known."""
        return self.open / self.answers_per_s if self.answers_per_s > 0 else 0.0 if not self.open else None


class IterationRow(Config):
    """A committed iteration, in the few figures that a table has room for."""

    iteration: int
    attack_success: float | None
    probe_accuracy: float
    policy_version: str
    seconds: dict[str, float]
    """Per stage; stages that stream into one another overlap."""


class LiveState(Config):
    """How a run stands."""

    run: str
    time: float
    """Seconds since the epoch."""
    iterations: int
    """How many there will be."""
    ended: bool = False
    """Whether this sitting is over; the run may be resumed."""
    stage: str | None = None
    done: int = 0
    total: int | None = None
    rows: tuple[IterationRow, ...] = ()
    """The last committed iterations, oldest first."""
    pools: dict[str, PoolState] = Field(default_factory=dict)


def read_live(run_dir: Path) -> LiveState | None:
    """Return how a run last stood; None when it has not said so."""
    try:
        return parse_live((run_dir / LIVE_FILE).read_text())
    except FileNotFoundError:
        return None


def parse_live(text: str) -> LiveState | None:
    """Return the state that a text holds; None when another version wrote it."""
    try:
        return LiveState.model_validate_json(text)
    except ValidationError:
        return None


class Live:
    """A watcher that keeps `live.json`; passes everything on."""

    def __init__(
        self,
        inner: Progress,
        *,
        run: str,
        run_dir: Path,
        iterations: int,
        before: Sequence[IterationMetrics] = (),
        echo: TextIO | None = None,
    ) -> None:
        """Take the next watcher and where to write.

        Args:
            before: what earlier sittings have committed.
            echo: where a job's log goes; None outside a job.
        """
        self._inner = inner
        self._path = run_dir / LIVE_FILE
        self._echo = echo
        self._echoed_at = float("-inf")
        self._lock = threading.Lock()
        rows = tuple(_row(metrics) for metrics in before)[-NUM_ROWS:]
        self._state = LiveState(run=run, time=time.time(), iterations=iterations, rows=rows)
        self._speeds: dict[str, _Speed] = {}

    def stage(self, name: str, *, done: int, total: int | None = None) -> None:
        """Take in how far a stage is, and pass it on."""
        self._update(stage=name, done=done, total=total)
        self._inner.stage(name, done=done, total=total)

    def row(self, metrics: IterationMetrics) -> None:
        """Take in an iteration, and pass it on."""
        self._update(rows=(*self._state.rows, _row(metrics))[-NUM_ROWS:], stage=None, done=0, total=None)
        self._inner.row(metrics)

    def note(self, text: str) -> None:
        """Pass on a line."""
        self._inner.note(text)

    @asynccontextmanager
    async def looking(self, pools: Mapping[str, Any]) -> AsyncIterator[None]:
        """Look at the pools again and again while the body runs; what breaks here is raised when the body ends."""
        task = asyncio.create_task(self._look(pools), name="live state")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            self._update(ended=True)
            self._write(urgent=True)

    async def _look(self, pools: Mapping[str, Any]) -> None:
        while True:
            await self.look(pools, now=time.monotonic())
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self, pools: Mapping[str, Any], *, now: float) -> None:
        """Take the pools' figures once, and write."""
        found = {}
        for name, pool in pools.items():
            stats = await pool.stats()
            speed = self._speeds.setdefault(name, _Speed())
            speed.take(now, answers=stats.num_answered, tokens=stats.num_generated_tokens, busy=stats.num_open > 0)
            metrics.pool_stands(stats, tokens_per_s=speed.tokens_per_s)
            found[name] = PoolState(
                wanted=stats.wanted,
                ready=stats.ready,
                queued=stats.num_queued,
                open=stats.num_open,
                answers_per_s=speed.answers_per_s,
                tokens_per_s=speed.tokens_per_s,
                version=stats.version,
                why=stats.why,
            )
        self._update(pools=found)
        self._write()

    def _update(self, **changes: Any) -> None:
        with self._lock:
            self._state = self._state.model_copy(update=changes)

    def _write(self, *, urgent: bool = False) -> None:
        with self._lock:
            state = self._state.model_copy(update={"time": time.time()})
        content = state.model_dump(mode="json")
        # Whole for whoever reads it; not synced: after a crash nobody needs it.
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps(content))
        os.replace(beside, self._path)
        if self._echo is not None and (urgent or time.monotonic() - self._echoed_at >= ECHO_EVERY_S):
            self._echoed_at = time.monotonic()
            self._echo.write(f"{MARK}{json.dumps(content)}\n")
            self._echo.flush()


def _row(metrics: IterationMetrics) -> IterationRow:
    return IterationRow(
        iteration=metrics.iteration,
        attack_success=metrics.live_attack_success,
        probe_accuracy=metrics.probe_accuracy,
        policy_version=metrics.policy_version,
        seconds=metrics.seconds,
    )


class _Speed:
    """A pool's speed, from totals taken now and then."""

    def __init__(self) -> None:
        self._taken: deque[tuple[float, int, int]] = deque()
        self.answers_per_s = 0.0
        self.tokens_per_s = 0.0

    def take(self, now: float, *, answers: int, tokens: int, busy: bool) -> None:
        """Take totals in; a pause forgets what was before, but for the speed of answers."""
        self._taken.append((now, answers, tokens))
        while now - self._taken[0][0] > RATE_OVER_S:
            self._taken.popleft()
        begun, answers_before, tokens_before = self._taken[0]
        seconds = now - begun
        self.tokens_per_s = (tokens - tokens_before) / seconds if seconds > 0 else 0.0
        if seconds > 0 and answers > answers_before:
            self.answers_per_s = (answers - answers_before) / seconds
        if not busy:
            self._taken = deque([self._taken[-1]])
