"""Owns the append log: a file of checksummed records with one writer, synced in groups, and its recovery.

Knows bytes alone: what a record says is cluster/log_records.py's, when the log is opened and retired the store's.

    submit(payloads) ─► group of 64 at most ─► write, fdatasync ─► acknowledged

    header  magic 8 | salt 8 | crc32 4        record  marker 4 | length 4 | crc32 4 | payload
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import secrets
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cluster.durable_files import sync_or_exit, sync_path

logger = logging.getLogger(__name__)

_MAGIC = b"\xffELENLOG"
_SALT_BYTES = 8
_FILE_HEADER_BYTES = len(_MAGIC) + _SALT_BYTES + 4
# Bytes that no UTF-8 text contains, so that model output in a torn record is never taken for the start of another.
_MARKER = b"\xff\xfe\xf5\xc0"
_LENGTHS = struct.Struct("<II")
_RECORD_HEADER_BYTES = len(_MARKER) + _LENGTHS.size
_GROUP_RECORDS = 64


class CorruptLog(ValueError):
    """The append log is damaged before its tail; names the file and the offset."""


class LogContents(NamedTuple):
    """The valid records of a log file and where they end."""

    payloads: list[bytes]
    salt: bytes | None
    """None when the file has no valid header yet."""
    num_valid_bytes: int


class _Group:
    """Records that are written and synced together."""

    written: Future[None]

    def __init__(self) -> None:
        self.frames: list[bytes] = []


class AppendLog:
    """A file of checksummed records with one writer; a record is acknowledged when it is on the disk.

    A record is marker, length, crc32, payload. A background thread writes what has gathered since its last fdatasync,
    64 records or one call's at most, so that a record waits for no timer: under load the groups grow by themselves.

    Opening a log recovers it. A torn tail (no valid record after it) is cut: nothing in it was acknowledged, unless
    the very last record was damaged later, which no reader can tell from a torn one.
    """

    def __init__(
        self,
        path: Path,
        *,
        check: Callable[[], None] | None = None,
        sync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        """Open or create the log at `path` and recover it.

        Args:
            check: called before each group is written; what it raises, the group's callers get.
            sync: makes a file descriptor's bytes durable; tests pass one that fails.

        Raises:
            CorruptLog: a damaged record is followed by a valid one, or the file's header is damaged.
        """
        self.path = path
        self._check = check
        self._sync = sync
        self._lock = threading.Lock()
        self._gathering: _Group | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._salt, self._durable_bytes = self._recover()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"append-log-{path.name}")

    def append(self, payloads: Sequence[bytes]) -> None:
        """Append records and return when they are durable.

        Raises:
            OSError: the write failed, e.g. the disk is full; nothing of its group is in the log.
            ValueError: a payload is 4 GiB or more.
        """
        self.submit(payloads).result()

    def submit(self, payloads: Sequence[bytes]) -> Future[None]:
        """Queue records for the writer, in the order of calls; the future, shared by its group, resolves when durable.

        Cancelling the future would cancel the group: await it by `durable`.
        """
        frames = [_frame(payload, salt=self._salt) for payload in payloads]
        with self._lock:
            group = self._gathering
            if group is None or len(group.frames) + len(frames) > _GROUP_RECORDS:
                group = _Group()
                group.written = self._writer.submit(self._write, group)
                self._gathering = group
            group.frames.extend(frames)
            return group.written

    def payloads(self) -> list[bytes]:
        """Return all durable records in order, read from the file; earlier appends are waited for."""
        self.submit([]).result()
        contents = read_log(self.path, limit_bytes=self._durable_bytes)
        # Between the fdatasync and now the file can only have been damaged from outside.
        if contents.num_valid_bytes != self._durable_bytes:
            raise CorruptLog(
                f"{self.path}: got an invalid record at offset {contents.num_valid_bytes}, wanted "
                f"{self._durable_bytes} valid bytes as acknowledged; check the disk"
            )
        return contents.payloads

    def close(self) -> None:
        """Write what is queued, stop the writer and close the file; a second call does nothing."""
        self._writer.shutdown(wait=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _recover(self) -> tuple[bytes, int]:
        size_bytes = os.fstat(self._descriptor).st_size
        contents = read_log(self.path)
        salt, num_valid_bytes = contents.salt, contents.num_valid_bytes
        if num_valid_bytes < size_bytes:
            logger.warning("%s: cut an unfinished tail of %d bytes", self.path, size_bytes - num_valid_bytes)
            os.ftruncate(self._descriptor, num_valid_bytes)
        if salt is None:
            salt = secrets.token_bytes(_SALT_BYTES)
            header = _MAGIC + salt
            _write_all(self._descriptor, header + zlib.crc32(header).to_bytes(4, "little"))
            num_valid_bytes = _FILE_HEADER_BYTES
        # A killed writer leaves valid records in the page cache that were never synced: what recovery returns, it owns.
        sync_or_exit(self._descriptor, path=self.path, sync=self._sync)
        sync_path(self.path.parent)
        return salt, num_valid_bytes

    def _write(self, group: _Group) -> None:
        with self._lock:
            if self._gathering is group:
                self._gathering = None  # what comes from now on waits for the next group
        data = b"".join(group.frames)
        if not data:
            return
        if self._check is not None:
            self._check()
        try:
            _write_all(self._descriptor, data)
        except OSError:
            # A short write followed by a later good record would read as damage in the middle.
            sync_or_exit(self._descriptor, path=self.path, sync=self._cut_to_durable)
            raise
        sync_or_exit(self._descriptor, path=self.path, sync=self._sync)
        self._durable_bytes += len(data)

    def _cut_to_durable(self, descriptor: int) -> None:
        os.ftruncate(descriptor, self._durable_bytes)


async def durable(written: Future[None]) -> None:
    """Wait for a group; a cancelled caller leaves it, the group is written all the same."""
    await asyncio.shield(asyncio.wrap_future(written))


def _frame(payload: bytes, *, salt: bytes) -> bytes:
    if len(payload) >= 1 << 32:
        raise ValueError(f"record: got {len(payload)} bytes, wanted fewer than 4 GiB; append smaller tables")
    length = len(payload).to_bytes(4, "little")
    checksum = zlib.crc32(payload, zlib.crc32(length, zlib.crc32(salt)))
    return b"".join((_MARKER, length, checksum.to_bytes(4, "little"), payload))


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def read_log(path: Path, *, limit_bytes: int | None = None) -> LogContents:
    """Return the valid records of a log file without changing it, of its first `limit_bytes` where given.

    Raises:
        CorruptLog: a damaged record is followed by a valid one, or the file's header is damaged.
    """
    size_bytes = path.stat().st_size if limit_bytes is None else limit_bytes
    if size_bytes == 0:
        return LogContents([], None, 0)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size_bytes, access=mmap.ACCESS_READ) as data:
        header = data[:_FILE_HEADER_BYTES]
        if len(header) < _FILE_HEADER_BYTES or zlib.crc32(header[:-4]) != int.from_bytes(header[-4:], "little"):
            if size_bytes > _FILE_HEADER_BYTES:
                # The header is durable before the first record is written, so this is no torn tail.
                raise CorruptLog(_damage(path, offset=0, what="header"))
            return LogContents([], None, 0)
        if not header.startswith(_MAGIC):
            raise CorruptLog(f"{path}: got {header[: len(_MAGIC)]!r} at offset 0, wanted an append log ({_MAGIC!r})")
        salt = header[len(_MAGIC) : -4]
        payloads: list[bytes] = []
        offset = _FILE_HEADER_BYTES
        while offset < size_bytes:
            payload = _record_at(data, offset, salt=salt)
            if payload is None:
                _refuse_valid_record_after(data, offset, salt=salt, path=path)
                break
            payloads.append(payload)
            offset += _RECORD_HEADER_BYTES + len(payload)
        return LogContents(payloads, salt, offset)


def _record_at(data: mmap.mmap, offset: int, *, salt: bytes) -> bytes | None:
    start = offset + _RECORD_HEADER_BYTES
    if start > len(data) or data[offset : offset + len(_MARKER)] != _MARKER:
        return None
    length, checksum = _LENGTHS.unpack_from(data, offset + len(_MARKER))
    if start + length > len(data):
        return None
    payload = data[start : start + length]
    expected = zlib.crc32(payload, zlib.crc32(length.to_bytes(4, "little"), zlib.crc32(salt)))
    return payload if checksum == expected else None


def _refuse_valid_record_after(data: mmap.mmap, offset: int, *, salt: bytes, path: Path) -> None:
    position = data.find(_MARKER, offset + 1)
    while position >= 0:
        if _record_at(data, position, salt=salt) is not None:
            raise CorruptLog(_damage(path, offset=offset, what=f"record (the next valid one is at {position})"))
        position = data.find(_MARKER, position + 1)


def _damage(path: Path, *, offset: int, what: str) -> str:
    return (
        f"{path}: got a damaged {what} at offset {offset}, wanted valid records up to the tail; acknowledged records "
        "were lost on the disk: restore the file from a copy, or move it away to redo the open iteration"
    )
