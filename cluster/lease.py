"""Owns one driver at a time: a locked file with an epoch, and the refusal of a driver that was taken over.

Knows nothing of what the driver writes: whoever writes calls `check` before.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cluster.durable_files import sync_or_exit, sync_path

logger = logging.getLogger(__name__)

_LEASE_BYTES = 512


class StaleLease(RuntimeError):
    """Another driver has taken the run over; this one may not write any more."""


class Lease:
    """The right to write a run: a locked file that holds an epoch counter and the holder.

    The lock dies with its process. The epoch is for what the lock cannot see (a removed lock file, a file system
    without locks): it is compared before every group of appends and before every commit.
    """

    def __init__(self, path: Path) -> None:
        """Lock the lease file.

        Raises:
            ValueError: a live driver holds it.
        """
        self.path = path
        self.epoch = 0
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._read()
                os.close(self._descriptor)
                raise ValueError(_active(path.parent, holder)) from None
            if self._is_current_file():
                break
            os.close(self._descriptor)  # removed between open and lock: lock the file that is there now
        self._stored_epoch = int(self._read().get("epoch", 0))

    def claim(self, *, at_least: int) -> None:
        """Write a new epoch, above the stored one and above `at_least`, and this process as the holder."""
        self.epoch = max(self._stored_epoch, at_least) + 1
        holder = {"epoch": self.epoch, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        # Fixed width and in place: a rename would leave the lock on a file that nobody opens any more.
        os.pwrite(self._descriptor, json.dumps(holder).ljust(_LEASE_BYTES).encode(), 0)
        sync_or_exit(self._descriptor, path=self.path, sync=os.fsync)
        sync_path(self.path.parent)

    def check(self) -> None:
        """Raise StaleLease when another driver has claimed the run since."""
        if not self._is_current_file() or self._read().get("epoch") != self.epoch:
            raise StaleLease(
                f"{self.path}: got an append from epoch {self.epoch} (pid {os.getpid()}), wanted the current holder's; "
                "another driver has taken the run over, end this one"
            )

    def release(self) -> None:
        """Give the run free for the next driver."""
        os.close(self._descriptor)

    def _is_current_file(self) -> bool:
        try:
            current = os.stat(self.path)
        except FileNotFoundError:
            return False
        own = os.fstat(self._descriptor)
        return (own.st_dev, own.st_ino) == (current.st_dev, current.st_ino)

    def _read(self) -> dict[str, Any]:
        text = os.pread(self._descriptor, _LEASE_BYTES, 0)
        try:
            holder = json.loads(text) if text.strip() else {}
        except ValueError:
            # Torn by a crash: the epoch then comes from the journal, by way of `claim`.
            logger.warning("%s: unreadable lease ignored", self.path)
            return {}
        return holder if isinstance(holder, dict) else {}


class Holder(NamedTuple):
    """Who is at a run."""

    pid: int
    host: str


def holder(run: Path) -> Holder | None:
    """Return who is at a run now; None when nobody is, or somebody who has not said yet who they are."""
    try:
        descriptor = os.open(run / "LEASE", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        said = json.loads(os.pread(descriptor, _LEASE_BYTES, 0).strip() or b"{}")
        return Holder(said["pid"], said["host"]) if "pid" in said else None
    finally:
        os.close(descriptor)
    return None


def _active(run: Path, holder: Mapping[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("time", 0)))
    who = f"pid {holder['pid']} on {holder['host']} since {since}" if "pid" in holder else "a driver that is starting"
    return f"{run}: run already active, held by {who}; stop that driver, or choose another name"
