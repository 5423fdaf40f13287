"""Owns how a run looks while it runs: bars and a growing table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from trainers.summary import IterationMetrics

PLAIN_INTERVAL_S = 15.0
"""Seconds between two plain lines of the same stage."""

COLUMNS = ("iter", "attack success", "probe accuracy", "critic agrees", "to experts", "version")


class RunConsole:
    """A `trainers.progress.Progress` that writes to a stream; a context manager, as a terminal must be given back."""

    def __init__(self, stream: TextIO) -> None:
        self._rich = RichConsole(file=stream, highlight=False, soft_wrap=True)
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._has_header = False
        self.last_iteration: int | None = None
        """The newest iteration that is known to be committed; None before the first."""
        self._bars = Progress(
            TextColumn("● {task.description:<20}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._rich,
            transient=True,
        )

    @property
    def live(self) -> bool:
        """Whether the stream is a terminal."""
        return self._rich.is_terminal

    def __enter__(self) -> RunConsole:
        if self.live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.live:
            self._bars.stop()

    def stage(self, name: str, *, done: int, total: int | None = None) -> None:
        """Show how far a stage is; `done` = `total` ends it."""
        with self._lock:
            now = time.monotonic()
            begun = self._begun.setdefault(name, now)
            rate = f"{done / (now - begun):.0f}/s" if done and now - begun > 1 else ""
            ended = total is not None and done >= total
            if self.live:
                self._show_bar(name, done=done, total=total, rate=rate)
            elif ended or now - self._said.setdefault(name, now) >= PLAIN_INTERVAL_S:
                self._said[name] = now
                self._line(_plain_stage(name, done=done, total=total, rate=rate, seconds=now - begun))
            if ended:
                self._begun.pop(name)
                self._said.pop(name, None)

    def row(self, metrics: IterationMetrics) -> None:
        """Add a row to the table, and clear the stages of the iteration that it closes."""
        with self._lock:
            for name in list(self._tasks):
                self._bars.remove_task(self._tasks.pop(name))
            # Lines are printed above the bars as they were last drawn.
            self._bars.refresh()
            self._begun.clear()
            self._said.clear()
            if not self._has_header:
                self._has_header = True
                self._line("  ".join(COLUMNS))
            self._line("  ".join(f"{cell:>{len(title)}}" for cell, title in zip(_cells(metrics), COLUMNS, strict=True)))
            self.last_iteration = metrics.iteration

    def note(self, text: str) -> None:
        """Write one line."""
        with self._lock:
            self._line(text if text[:1] in "✓✗!" else f"● {text}")

    def _line(self, text: str) -> None:
        self._rich.print(escape(text))

    def _show_bar(self, name: str, *, done: int, total: int | None, rate: str) -> None:
        if total is not None and done >= total:
            if name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(escape(name), total=total, rate="")
        self._bars.update(self._tasks[name], completed=done, total=total, rate=rate)


def _cells(metrics: IterationMetrics) -> tuple[str, ...]:
    """Return a row's cells in the order of COLUMNS."""
    return (
        str(metrics.iteration),
        _percent(metrics.live_attack_success),
        _percent(metrics.probe_accuracy),
        _percent(metrics.critic_agreement.balanced_accuracy),
        f"{metrics.experts_asked}/{metrics.num_verdicts}",
        metrics.policy_version,
    )


def _plain_stage(name: str, *, done: int, total: int | None, rate: str, seconds: float) -> str:
    of = "" if total is None else f" of {total}"
    return " · ".join(part for part in (f"  {name} {done}{of}", rate, f"{seconds:.0f} s") if part)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}".replace("%", " %")
