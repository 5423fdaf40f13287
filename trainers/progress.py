"""Owns what a run tells whoever watches it, and how a watcher asks it to stop; knows nothing of how it is shown."""

from __future__ import annotations

import threading
from typing import Protocol

from trainers.summary import IterationMetrics


class Progress(Protocol):
    """Someone who watches a run. Every method returns at once and may be called from any thread."""

    def stage(self, name: str, *, done: int, total: int | None = None) -> None:
        """Take in how far a stage is: `done` of `total` items, total None where nobody knows; done = total ends it."""
        ...

    def row(self, metrics: IterationMetrics) -> None:
        """Take in an iteration that has just been committed."""
        ...

    def note(self, text: str) -> None:
        """Take in one line worth reading, such as an address or an alarm."""
        ...


class Silent:
    """Watches and says nothing: for tests and for runs inside other programs."""

    def stage(self, name: str, *, done: int, total: int | None = None) -> None:
        """Do nothing."""

    def row(self, metrics: IterationMetrics) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


class StopSignal:
    """A request to stop after the running iteration's last commit; set once, from a signal handler or a thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def request(self) -> None:
        """Ask for the stop."""
        self._event.set()

    @property
    def requested(self) -> bool:
        """Whether the stop was asked for."""
        return self._event.is_set()
