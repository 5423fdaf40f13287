"""Owns a run's directory: the lease, the append log of the open iteration, COMMIT.json, Parquet segments and metrics.

Knows no alignment: a stage is a name, rows are Arrow tables, a row's identity is the column that the caller named.

    append(stage, table) ─► append log ─► fdatasync ─► acknowledged
    commit(iteration)    ─► log's rows, first per id ─► {stage}.parquet ─► COMMIT.json (atomic rename) ─► log retired

    runs/NAME/  store.json LEASE config.toml resolved.json models.json environment.json metrics.jsonl
                journal/iteration=000007/{stage}.parquet COMMIT.json   (append.log while the iteration is open)
                checkpoints/iteration=000007/  policies/v000007/  labels/  tensorboard/
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import mmap
import os
import platform
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

FORMAT = 1
NUM_CHECKPOINTS_KEPT = 2
EXIT_SYNC_FAILED = 74
"""The process's exit status after a failed fsync (EX_IOERR of sysexits.h)."""

_MAGIC = b"\xffELENLOG"
_SALT_BYTES = 8
_FILE_HEADER_BYTES = len(_MAGIC) + _SALT_BYTES + 4
# Bytes that no UTF-8 text contains, so that model output in a torn record is never taken for the start of another.
_MARKER = b"\xff\xfe\xf5\xc0"
_LENGTHS = struct.Struct("<II")
_RECORD_HEADER_BYTES = len(_MARKER) + _LENGTHS.size
_GROUP_RECORDS = 64
_ALIGNMENT = 64
_LEASE_BYTES = 512
_RUN_FILES = ("LEASE", "config.toml", "resolved.json", "models.json", "environment.json", "metrics.jsonl")
_RUN_DIRECTORIES = ("journal", "labels", "policies", "checkpoints", "tensorboard")


class CorruptLog(ValueError):
    """The append log is damaged before its tail; names the file and the offset."""


class CorruptRun(ValueError):
    """Committed files do not have the hashes that their COMMIT.json names."""


class StaleLease(RuntimeError):
    """Another driver has taken the run over; this one may not write any more."""


# ---------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """A file of the run as a commit names it."""

    path: str
    """POSIX path relative to the run directory."""
    size_bytes: int
    sha256: str


def digest_file(path: Path, *, root: Path) -> FileDigest:
    """Return the size and the SHA-256 of a file, named relative to `root`.

    Raises:
        ValueError: the file does not lie under `root`.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    relative = path.resolve().relative_to(root.resolve())
    return FileDigest(path=relative.as_posix(), size_bytes=path.stat().st_size, sha256=sha256)


def digest_directory(directory: Path, *, root: Path) -> tuple[FileDigest, ...]:
    """Return the digests of all files under a directory, sorted by path."""
    return tuple(digest_file(path, root=root) for path in sorted(directory.rglob("*")) if path.is_file())


def sync_path(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, durable; a failed fsync ends the process."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync_or_exit(descriptor, path=path, sync=os.fsync)
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that after any crash it holds either its old bytes or all of the new ones."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(data)
    _publish(beside, path)


def write_json_atomic(path: Path, value: object) -> None:
    """Replace a JSON file atomically and durably.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON lacks.
        TypeError: the value holds something that JSON cannot say.
    """
    write_bytes_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _publish(beside: Path, path: Path) -> None:
    sync_path(beside)
    os.replace(beside, path)
    sync_path(path.parent)


def _sync_or_exit(descriptor: int, *, path: Path, sync: Callable[[int], None]) -> None:
    try:
        sync(descriptor)
    except OSError as error:
        # After a failed fsync the kernel may have dropped the dirty pages and marked them clean: a second fsync would
        # succeed and acknowledge what is not on the disk. Only a new process, which reads the file again, is honest.
        logger.critical("%s: fsync failed (%s); the process ends, resume the run when the disk is sound", path, error)
        logging.shutdown()
        os._exit(EXIT_SYNC_FAILED)


# ----------------------------------------------------------------------------------------------------- append log


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

    async def append_async(self, payloads: Sequence[bytes]) -> None:
        """Append records and return when they are durable, without blocking the event loop.

        Cancelling the caller does not take the records back. Raises as `append`.
        """
        await durable(self.submit(payloads))

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
        _sync_or_exit(self._descriptor, path=self.path, sync=self._sync)
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
            _sync_or_exit(self._descriptor, path=self.path, sync=self._cut_to_durable)
            raise
        _sync_or_exit(self._descriptor, path=self.path, sync=self._sync)
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


# ---------------------------------------------------------------------------------------------------------- lease


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
        _sync_or_exit(self._descriptor, path=self.path, sync=os.fsync)
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


def _active(run: Path, holder: Mapping[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("time", 0)))
    who = f"pid {holder['pid']} on {holder['host']} since {since}" if "pid" in holder else "a driver that is starting"
    return f"{run}: run already active, held by {who}; stop that driver, or choose another name"


# -------------------------------------------------------------------------------------------------------- commits


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One stage of a committed iteration."""

    file: FileDigest
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What COMMIT.json says: the iteration is done, and these files are it."""

    iteration: int
    epoch: int
    """Of the lease under which it was written."""
    time: float
    """Unix seconds."""
    segments: dict[str, Segment]
    superseded: dict[str, tuple[str, ...]]
    """Per stage, the ids of later rows that lost to an earlier one; one entry per lost row."""
    num_stale_records: int
    """Log records of a driver that no longer held the lease; their rows are not in the segments."""
    checkpoint: tuple[FileDigest, ...]
    policy: tuple[FileDigest, ...]
    state: dict[str, Any]
    """The caller's own: random states, archive, watermarks, counters."""


class NewestCommit(NamedTuple):
    """The newest commit that passes, and a newer one that does not."""

    commit: Commit | None
    rejected_iteration: int | None


def last_commit(run: Path) -> Commit | None:
    """Return the newest commit whose hashes pass, without the lease; None when nothing was committed.

    Falls back by one commit, with an ERROR in the log that names what failed.

    Raises:
        CorruptRun: the two newest commits both fail.
    """
    return _newest_commit(run).commit


def committed_policy(run: Path, version: str) -> Commit:
    """Return the commit of a policy version, "v3" or the name of its directory, when its files are as committed.

    Raises:
        ValueError: there is no such version; names those that there are.
        CorruptRun: a file of the policy is missing or changed.
    """
    iterations = _committed_iterations(run)
    number = int(version[1:]) if version[:1] == "v" and version[1:].isdecimal() else -1
    if not iterations:
        raise ValueError(f'{run}: got version "{version}" and no commit yet; go on by `elenchus resume {run.name}`')
    if number not in iterations:
        there = f"one of {', '.join(f'v{i}' for i in iterations)}"
        if len(iterations) > 12:
            there = f"v{iterations[0]} to v{iterations[-1]}"
        raise ValueError(f'{run}: got version "{version}", wanted {there}')
    commit = _read_commit(run, number)
    failure = _files_failure(run, commit.policy)
    if failure is not None:
        raise CorruptRun(f"{run / failure}; restore the file from a copy, or take another version")
    return commit


def read_stage(run: Path, stage: str, *, iteration: int | None = None) -> pa.Table:
    """Return a stage's committed rows, of one iteration or (None) of all, without the lease.

    A stage that has no rows is a table without columns.

    Raises:
        ValueError: the run or the stage is unknown, or the iteration is not committed.
        CorruptRun: a segment does not have the hash that its COMMIT.json names.
    """
    id_columns = _read_manifest(run)["id_columns"]
    if stage not in id_columns:
        raise ValueError(f'{run}: got stage "{stage}", wanted one of {", ".join(sorted(id_columns))}')
    iterations = _committed_iterations(run)
    if iteration is not None:
        if iteration not in iterations:
            raise ValueError(f"{run}: got iteration {iteration}, wanted a committed one: {iterations}")
        iterations = [iteration]
    commits = [_read_commit(run, number) for number in iterations]
    tables = [_read_segment(run, commit.segments[stage]) for commit in commits if stage in commit.segments]
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})


def _newest_commit(run: Path) -> NewestCommit:
    iterations = _committed_iterations(run)
    failures: list[str] = []
    for iteration in reversed(iterations[-NUM_CHECKPOINTS_KEPT:]):
        failure = _commit_failure(run, iteration)
        if failure is None:
            return NewestCommit(_read_commit(run, iteration), iterations[-1] if failures else None)
        logger.error("%s: the commit of iteration %d is rejected: %s", run, iteration, failure)
        failures.append(f"iteration {iteration}: {failure}")
    if len(iterations) == 1 and failures:
        logger.error("%s: the only commit is rejected; the run starts at its iteration again", run)
        return NewestCommit(None, iterations[0])
    if failures:
        raise CorruptRun(f"{run}: no commit to resume from ({'; '.join(failures)}); restore the files from a copy")
    return NewestCommit(None, None)


def _commit_failure(run: Path, iteration: int) -> str | None:
    """Return what is wrong with a commit, or None."""
    try:
        commit = _read_commit(run, iteration)
    except CorruptRun as error:
        return str(error)
    return _files_failure(run, [*(one.file for one in commit.segments.values()), *commit.checkpoint, *commit.policy])


def _files_failure(run: Path, files: Iterable[FileDigest]) -> str | None:
    """Return the first file that is not as it was committed, and what is wrong with it."""
    for file in files:
        path = run / file.path
        if not path.is_file():
            return f"{file.path} is missing"
        got = digest_file(path, root=run)
        if got.sha256 != file.sha256:
            return f"{file.path}: got SHA-256 {got.sha256} ({got.size_bytes} bytes), wanted {file.sha256}"
    return None


def _committed_iterations(run: Path) -> list[int]:
    return sorted(_iteration_of(path.parent) for path in (run / "journal").glob("iteration=*/COMMIT.json"))


def _iteration_of(directory: Path) -> int:
    return int(directory.name.removeprefix("iteration="))


def _iteration_dir(iteration: int) -> str:
    return f"iteration={iteration:06d}"


def _read_commit(run: Path, iteration: int) -> Commit:
    path = run / "journal" / _iteration_dir(iteration) / "COMMIT.json"
    try:
        body = json.loads(path.read_bytes())
        sha256 = body.pop("sha256")
        if _json_digest(body) != sha256:
            raise ValueError("its own SHA-256 does not match")
        return Commit(
            iteration=body["iteration"],
            epoch=body["epoch"],
            time=body["time"],
            segments={
                stage: Segment(file=FileDigest(**segment["file"]), num_rows=segment["num_rows"])
                for stage, segment in body["segments"].items()
            },
            superseded={stage: tuple(ids) for stage, ids in body["superseded"].items()},
            num_stale_records=body["num_stale_records"],
            checkpoint=tuple(FileDigest(**file) for file in body["checkpoint"]),
            policy=tuple(FileDigest(**file) for file in body["policy"]),
            state=body["state"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptRun(f"{path}: got a damaged commit ({error}), wanted the file as it was written") from error


def _write_commit(run: Path, commit: Commit, *, on_step: Callable[[str], None]) -> None:
    body = dataclasses.asdict(commit)
    try:
        body = json.loads(json.dumps(body, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"commit.state: got a value that JSON cannot hold ({error}), wanted plain values") from error
    body["sha256"] = _json_digest(body)
    path = run / "journal" / _iteration_dir(commit.iteration) / "COMMIT.json"
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(body, indent=2) + "\n")
    on_step("manifest written")
    _publish(beside, path)


def _json_digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_segment(run: Path, segment: Segment) -> pa.Table:
    try:
        data = (run / segment.file.path).read_bytes()
    except FileNotFoundError as error:
        raise CorruptRun(f"{run / segment.file.path}: the segment is missing; restore it from a copy") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != segment.file.sha256:
        raise CorruptRun(
            f"{run / segment.file.path}: got SHA-256 {sha256} ({len(data)} bytes), wanted {segment.file.sha256}; "
            "restore it from a copy"
        )
    return pq.read_table(pa.BufferReader(data))


# ---------------------------------------------------------------------------------------------------- log records


class LoggedRecord(NamedTuple):
    """One table of one stage in the log."""

    stage: str
    iteration: int
    epoch: int
    table: pa.Table


class FirstRows(NamedTuple):
    """What a log adds up to."""

    tables: dict[str, pa.Table]
    superseded: dict[str, tuple[str, ...]]
    num_stale_records: int
    highest_epoch: int


def _encode_record(record: LoggedRecord) -> bytes:
    header = json.dumps({"stage": record.stage, "iteration": record.iteration, "epoch": record.epoch}).encode()
    # Padded, so that Arrow reads its buffers aligned and without a copy.
    header += b" " * (-(len(header) + 4) % _ALIGNMENT)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, record.table.schema) as writer:
        writer.write_table(record.table)
    return b"".join((len(header).to_bytes(4, "little"), header, sink.getvalue()))


def _decode_record(payload: bytes) -> LoggedRecord:
    end = 4 + int.from_bytes(payload[:4], "little")
    header = json.loads(payload[4:end])
    with pa.ipc.open_stream(pa.py_buffer(payload).slice(end)) as reader:
        table = reader.read_all()
    return LoggedRecord(header["stage"], header["iteration"], header["epoch"], table)


def _first_rows(payloads: Iterable[bytes], *, id_columns: Mapping[str, str]) -> FirstRows:
    """Return per stage the first journaled row of every id, in journal order, and the ids of the rows that lost."""
    by_stage: dict[str, list[pa.Table]] = {}
    num_stale_records = 0
    highest_epoch = 0
    for payload in payloads:
        record = _decode_record(payload)
        if record.epoch < highest_epoch:
            num_stale_records += 1
            continue
        highest_epoch = record.epoch
        by_stage.setdefault(record.stage, []).append(record.table)
    if num_stale_records:
        logger.error("%d log records of a driver that had lost its lease are ignored", num_stale_records)
    tables: dict[str, pa.Table] = {}
    superseded: dict[str, tuple[str, ...]] = {}
    for stage, parts in by_stage.items():
        table = pa.concat_tables(parts)
        is_first = _is_first(table.column(id_columns[stage]))
        if not is_first.all():
            lost = table.column(id_columns[stage]).filter(pa.array(~is_first))
            superseded[stage] = tuple(str(name) for name in lost.to_pylist())
            table = table.filter(pa.array(is_first))
        tables[stage] = table
    return FirstRows(tables, superseded, num_stale_records, highest_epoch)


def _is_first(ids: pa.ChunkedArray[Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return [N] bool: whether a row is the first of its id."""
    encoded: Any = pc.dictionary_encode(ids.combine_chunks())
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[np.unique(encoded.indices.to_numpy(), return_index=True)[1]] = True
    return mask


def _refuse_nulls(array: Any, field: pa.Field[Any], *, where: str) -> None:
    """Raise ValueError when a field that is not nullable holds a null: Arrow itself lets it pass."""
    if not field.nullable and array.null_count:
        row = array.is_null().to_pylist().index(True)
        raise ValueError(f"{where}: got None in row {row}, wanted {field.type}; fill the field, or make it nullable")
    if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
        _refuse_nulls(array.flatten(), field.type.value_field, where=f"{where}[]")
    elif pa.types.is_struct(field.type):
        present = array.drop_null()
        for child in field.type:
            _refuse_nulls(present.field(child.name), child, where=f"{where}.{child.name}")


# ------------------------------------------------------------------------------------------------------ run store


def _no_step(_: str) -> None:
    return None


class RunStore:
    """A run's directory under this process's lease: append to the open iteration, commit it, read what is committed.

    >>> store = RunStore.create(path, config={}, id_columns={"queries": "query_id"})     # doctest: +SKIP
    >>> await store.append("queries", table)                                             # doctest: +SKIP
    >>> store.commit(0, state={"rng": 7})                                                # doctest: +SKIP
    """

    def __init__(
        self, path: Path, *, lease: Lease, id_columns: Mapping[str, str], on_step: Callable[[str], None]
    ) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._lease = lease
        self._id_columns = dict(id_columns)
        self._on_step = on_step
        self._lock = threading.Lock()
        self._accepting = True
        self._last, rejected_iteration = _newest_commit(path)
        if rejected_iteration is not None:
            _reopen_rejected(path, rejected_iteration, id_columns=self._id_columns)
        self._retire_logs()
        self._iteration = 0 if self._last is None else self._last.iteration + 1
        if rejected_iteration is not None:
            self._iteration = rejected_iteration
        self._log = self._open_log()
        try:
            logged = _first_rows(self._log.payloads(), id_columns=self._id_columns)
        except BaseException:
            self._log.close()
            raise
        self._schemas = {stage: table.schema for stage, table in logged.tables.items()}
        lease.claim(at_least=max(logged.highest_epoch, 0 if self._last is None else self._last.epoch))
        self._metrics = _open_metrics(path / "metrics.jsonl")

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        config: Mapping[str, object],
        id_columns: Mapping[str, str],
        config_toml: str | None = None,
        models: Mapping[str, object] | None = None,
        on_step: Callable[[str], None] = _no_step,
    ) -> Self:
        """Make a run's directory and return its store, open at iteration 0.

        Args:
            config: the resolved config, written to resolved.json.
            id_columns: for every stage that will be appended, its column of unique string ids.
            config_toml: what the user wrote, kept as config.toml.
            models: what the models that the run begins with are recognised by, kept as models.json.
            on_step: called with the name of each step of a commit before the next begins; tests kill there.

        Raises:
            ValueError: the directory holds another run or other files, or a live driver holds it.
        """
        refuse_other_contents(path)
        path.mkdir(parents=True, exist_ok=True)
        sync_path(path.parent)
        lease = Lease(path / "LEASE")
        try:
            refuse_other_contents(path)
            for name in _RUN_DIRECTORIES:
                (path / name).mkdir(exist_ok=True)
            write_json_atomic(path / "resolved.json", dict(config))
            if config_toml is not None:
                write_bytes_atomic(path / "config.toml", config_toml.encode())
            if models is not None:
                write_json_atomic(path / "models.json", dict(models))
            write_json_atomic(path / "environment.json", environment())
            # Last: a directory with store.json is a run, one without is an unfinished creation that may be redone.
            manifest = {"format": FORMAT, "created": time.time(), "id_columns": dict(id_columns)}
            write_json_atomic(path / "store.json", manifest)
            return cls(path, lease=lease, id_columns=id_columns, on_step=on_step)
        except BaseException:
            lease.release()
            raise

    @classmethod
    def open(cls, path: Path, *, on_step: Callable[[str], None] = _no_step) -> Self:
        """Return the store of an existing run, recovered and open at the iteration after its last commit.

        When the newest commit's hashes fail, its iteration is reopened: its intact segments become logged rows again.

        Raises:
            ValueError: there is no run at `path`, or a live driver holds it.
            CorruptLog: the open iteration's log is damaged before its tail.
            CorruptRun: the two newest commits both fail.
        """
        manifest = _read_manifest(path)
        lease = Lease(path / "LEASE")
        try:
            return cls(path, lease=lease, id_columns=manifest["id_columns"], on_step=on_step)
        except BaseException:
            lease.release()
            raise

    @property
    def iteration(self) -> int:
        """The open iteration; 0 before the first commit."""
        return self._iteration

    @property
    def epoch(self) -> int:
        """This driver's lease; it grows by at least one with every open."""
        return self._lease.epoch

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config that the run was created with."""
        return dict(json.loads((self.path / "resolved.json").read_bytes()))

    def checkpoint_dir(self, iteration: int) -> Path:
        """Return where an iteration's checkpoint belongs; commits prune all but the two newest."""
        return self.path / "checkpoints" / _iteration_dir(iteration)

    def policy_dir(self, version: int) -> Path:
        """Return where a policy version is exported; these are kept."""
        return self.path / "policies" / f"v{version:06d}"

    async def append(self, stage: str, table: pa.Table) -> None:
        """Add rows to the open iteration and return when they are durable.

        Rows whose id is already logged are kept in the log but lose to the first.

        Raises:
            ValueError: unknown stage, no id column, None in a required field, or another schema than the stage's.
            StaleLease: another driver has taken the run over.
            OSError: the disk refused the write; nothing of the table is in the log.
        """
        self._refuse_invalid(stage, table)
        if table.num_rows == 0:
            return
        record = LoggedRecord(stage, self._iteration, self._lease.epoch, table)
        payload = _encode_record(record)
        with self._lock:
            assert self._accepting, "append during a commit: its rows would belong to neither iteration"
            self._schemas.setdefault(stage, table.schema)
            written = self._log.submit([payload])
        await durable(written)

    def logged(self, iteration: int) -> dict[str, pa.Table]:
        """Return the open iteration's rows by stage, the first per id, in journal order; only stages that have rows.

        Raises:
            ValueError: the iteration is not the open one.
        """
        self._refuse_other_iteration(iteration)
        return _first_rows(self._log.payloads(), id_columns=self._id_columns).tables

    def superseded(self, iteration: int) -> Counter[str]:
        """Return per stage how many rows of the open iteration lost to an earlier row of the same id."""
        self._refuse_other_iteration(iteration)
        lost = _first_rows(self._log.payloads(), id_columns=self._id_columns).superseded
        return Counter({stage: len(ids) for stage, ids in lost.items()})

    def commit(
        self,
        iteration: int,
        *,
        state: Mapping[str, object],
        checkpoint: Sequence[FileDigest] = (),
        policy: Sequence[FileDigest] = (),
    ) -> Commit:
        """Close the open iteration for good and open the next one.

        After a kill at any instant the iteration is either open with all its logged rows, or committed.

        Args:
            state: what a resume needs and JSON can hold.
            checkpoint: files of the trained roles, under the run directory.
            policy: files of the exported policy, under the run directory.

        Raises:
            ValueError: not the open iteration, a file that is not there with that size, or a state that is not JSON.
            StaleLease: another driver has taken the run over.
        """
        self._refuse_other_iteration(iteration)
        for file in (*checkpoint, *policy):
            _sync_named_file(self.path, file)
        with self._lock:
            self._accepting = False
        try:
            commit = self._write(iteration, state=state, checkpoint=tuple(checkpoint), policy=tuple(policy))
        except BaseException:
            self._accepting = True  # still open: the caller may mend its arguments and commit again
            raise
        self._log.close()
        self._last = commit
        self._on_step("committed")
        self._retire_logs()
        self._on_step("log retired")
        _prune_checkpoints(self.path)
        self._on_step("checkpoints pruned")
        self._iteration += 1
        self._schemas.clear()
        self._log = self._open_log()
        self._accepting = True
        return commit

    def last_commit(self) -> Commit | None:
        """Return the commit that this store resumed from or has made since; None before the first."""
        return self._last

    def read(self, stage: str, *, iteration: int | None = None) -> pa.Table:
        """Return a stage's rows: of one iteration (the open one too), or (None) of all committed ones."""
        if iteration == self._iteration and stage in self._id_columns:
            return self.logged(iteration).get(stage, pa.table({}))
        return read_stage(self.path, stage, iteration=iteration)

    def log_metrics(self, metrics: Mapping[str, object]) -> None:
        """Append one line to metrics.jsonl, with the lease's epoch and the time; NaN and infinities become strings.

        After a resume an iteration can have lines of two epochs; the later epoch's count.
        """
        line = {"epoch": self._lease.epoch, "time": time.time(), **metrics}
        text = json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False)
        _write_all(self._metrics, f"{text}\n".encode())

    def close(self) -> None:
        """Write what is queued and give the run free; an open iteration stays open."""
        self._log.close()
        os.close(self._metrics)
        self._lease.release()

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the store."""
        self.close()

    def _write(
        self,
        iteration: int,
        *,
        state: Mapping[str, object],
        checkpoint: tuple[FileDigest, ...],
        policy: tuple[FileDigest, ...],
    ) -> Commit:
        rows = _first_rows(self._log.payloads(), id_columns=self._id_columns)
        self._on_step("log drained")
        segments: dict[str, Segment] = {}
        for stage, table in rows.tables.items():
            path = self.path / "journal" / _iteration_dir(iteration) / f"{stage}.parquet"
            beside = path.with_name(f".{path.name}.tmp")
            pq.write_table(table, beside, compression="zstd")
            self._on_step(f"{stage} written")
            _publish(beside, path)
            self._on_step(f"{stage} renamed")
            segments[stage] = Segment(file=digest_file(path, root=self.path), num_rows=table.num_rows)
        commit = Commit(
            iteration=iteration,
            epoch=self._lease.epoch,
            time=time.time(),
            segments=segments,
            superseded=rows.superseded,
            num_stale_records=rows.num_stale_records,
            checkpoint=checkpoint,
            policy=policy,
            state=dict(state),
        )
        self._lease.check()
        _write_commit(self.path, commit, on_step=self._on_step)
        return commit

    def _open_log(self) -> AppendLog:
        directory = self.path / "journal" / _iteration_dir(self._iteration)
        directory.mkdir(exist_ok=True)
        sync_path(directory.parent)
        return AppendLog(directory / "append.log", check=self._lease.check)

    def _retire_logs(self) -> None:
        """Remove the logs of committed iterations: their rows are in Parquet."""
        for iteration in _committed_iterations(self.path):
            log = self.path / "journal" / _iteration_dir(iteration) / "append.log"
            if log.exists():
                log.unlink()
                sync_path(log.parent)

    def _refuse_other_iteration(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise ValueError(f"{self.path}: got iteration {iteration}, wanted the open one, {self._iteration}")

    def _refuse_invalid(self, stage: str, table: pa.Table) -> None:
        column = self._id_columns.get(stage)
        if column is None:
            raise ValueError(f'{self.path}: got stage "{stage}", wanted one of {", ".join(sorted(self._id_columns))}')
        if column not in table.column_names or not pa.types.is_string(table.schema.field(column).type):
            raise ValueError(f'stage {stage}: got columns {table.column_names}, wanted a string column "{column}"')
        known = self._schemas.get(stage)
        if known is not None and not table.schema.equals(known):
            raise ValueError(
                f"stage {stage}: got schema {_brief(table.schema)}, wanted {_brief(known)} as logged in iteration "
                f"{self._iteration}; finish the iteration with the code that began it"
            )
        for field in table.schema:
            required = field.with_nullable(field.nullable and field.name != column)
            for chunk in table.column(field.name).chunks:
                _refuse_nulls(chunk, required, where=f"stage {stage}, column {field.name}")


def _brief(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}{'' if field.nullable else ' required'}" for field in schema)


def check_resumable(run: Path) -> None:
    """Check that a directory is a run of this format that no live driver holds.

    Raises:
        ValueError: it is none, or is held; says by whom.
    """
    _read_manifest(run)
    Lease(run / "LEASE").release()


def _read_manifest(run: Path) -> dict[str, Any]:
    path = run / "store.json"
    if not path.is_file():
        others = sorted(found.parent.name for found in run.parent.glob("*/store.json"))
        there = f"the runs there are {', '.join(others)}" if others else "there are no runs beside it"
        raise ValueError(f"{run}: got no run (store.json is missing), wanted a run's directory; {there}")
    try:
        manifest = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise ValueError(
            f"{path}: got no JSON object, wanted the file as it was written; restore it from a copy"
        ) from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: got format {manifest.get('format')}, wanted {FORMAT}; use the version that wrote it")
    return manifest


def refuse_other_contents(path: Path) -> None:
    """Check that a new run may be made at a path.

    Raises:
        ValueError: it holds another run or other files, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: got a file, wanted a new directory for the run; choose another name")
    if (path / "store.json").exists():
        raise ValueError(
            f"{path}: got a directory that holds another run, wanted a new or an empty one; "
            f"go on with it by `elenchus resume {path.name}`, or choose another name"
        )
    if path.exists():
        names = {entry.name for entry in path.iterdir() if not entry.name.endswith((".log", ".tmp"))}
        if strangers := sorted(names.difference(_RUN_FILES, _RUN_DIRECTORIES)):
            raise ValueError(
                f"{path}: got a directory that holds other files ({', '.join(strangers[:5])}), wanted a new or an "
                "empty one; choose another name"
            )


def _sync_named_file(run: Path, file: FileDigest) -> None:
    path = run / file.path
    if Path(file.path).is_absolute() or ".." in Path(file.path).parts:
        raise ValueError(f"commit: got file {file.path}, wanted a path relative to {run}")
    size_bytes = path.stat().st_size if path.is_file() else None
    if size_bytes != file.size_bytes:
        raise ValueError(f"commit: got {path} with {size_bytes} bytes, wanted {file.size_bytes} as digested")
    sync_path(path)
    parent = path.parent
    while parent != run:
        sync_path(parent)
        parent = parent.parent


def _reopen_rejected(run: Path, iteration: int, *, id_columns: Mapping[str, str]) -> None:
    """Turn an iteration whose commit fails back into an open one, with the rows of its intact segments logged.

    Each step can be repeated: a kill in between leaves COMMIT.json in place, and the next open comes here again.
    """
    directory = run / "journal" / _iteration_dir(iteration)
    log = directory / "append.log"
    num_lost = 0
    if not log.exists():
        beside = directory / ".append.log.tmp"
        beside.unlink(missing_ok=True)
        rebuilt = AppendLog(beside)
        for stage, segment in _segments_to_recover(run, iteration, id_columns=id_columns).items():
            table = _intact_segment(run, segment)
            if table is None:
                num_lost += 1
            else:
                rebuilt.append([_encode_record(LoggedRecord(stage, iteration, 0, table))])
        rebuilt.close()
        if num_lost:
            _set_aside_later_logs(run, iteration)
        os.replace(beside, log)
        sync_path(directory)
    os.replace(directory / "COMMIT.json", directory / "COMMIT.rejected.json")
    sync_path(directory)
    logger.error("%s: iteration %d is open again, %d of its segments lost", run, iteration, num_lost)


def _set_aside_later_logs(run: Path, iteration: int) -> None:
    """Rename later iterations' logs: sampled from weights that this iteration, with other rows, may not reproduce."""
    for log in sorted((run / "journal").glob("iteration=*/append.log")):
        if _iteration_of(log.parent) > iteration:
            log.rename(log.with_name("append.rejected.log"))
            logger.error("%s: set aside as append.rejected.log", log)


def _segments_to_recover(run: Path, iteration: int, *, id_columns: Mapping[str, str]) -> dict[str, Segment]:
    try:
        return _read_commit(run, iteration).segments
    except CorruptRun as error:
        # Without COMMIT.json nothing vouches for the segments.
        logger.error("%s: its segments cannot be verified, their rows are made again (%s)", run, error)
        names = {path.stem for path in (run / "journal" / _iteration_dir(iteration)).glob("*.parquet")}
        nothing = FileDigest(path="", size_bytes=0, sha256="")
        return {stage: Segment(file=nothing, num_rows=0) for stage in sorted(names & set(id_columns))}


def _intact_segment(run: Path, segment: Segment) -> pa.Table | None:
    if not segment.file.path:
        return None
    try:
        return _read_segment(run, segment)
    except CorruptRun as error:
        logger.error("segment lost: %s", error)
        return None


def _prune_checkpoints(run: Path) -> None:
    """Remove the checkpoints that neither of the two newest commits names."""
    newest = _committed_iterations(run)[-NUM_CHECKPOINTS_KEPT:]
    named = {Path(file.path).parts[:2] for number in newest for file in _read_commit(run, number).checkpoint}
    for directory in sorted((run / "checkpoints").glob("iteration=*")):
        if ("checkpoints", directory.name) not in named and _iteration_of(directory) <= newest[-1]:
            shutil.rmtree(directory)


def _open_metrics(path: Path) -> int:
    """Return a descriptor that appends to metrics.jsonl, its last line cut when a kill left it unfinished."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        logger.warning("%s: cut an unfinished last line", path)
        os.ftruncate(descriptor, data.rfind(b"\n") + 1)
    return descriptor


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


# ---------------------------------------------------------------------------------------------------- environment


def environment() -> dict[str, Any]:
    """Return what the run is computed on: Python, packages' versions, processor, memory, and the git commit if any."""
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    commit, is_clean = git_commit(Path(__file__).resolve().parent.parent)
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "num_usable_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "commit": commit,
        "commit_is_clean": is_clean,
        "packages": dict(sorted(packages.items())),
    }


def git_commit(directory: Path) -> tuple[str | None, bool | None]:
    """Return the commit checked out at `directory` and whether its tracked files are unchanged; None, None without."""
    if shutil.which("git") is None:
        return None, None
    git = ["git", "-C", str(directory)]
    head = subprocess.run([*git, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=30)
    if head.returncode != 0:
        return None, None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=30
    )
    return head.stdout.strip(), changed.returncode == 0 and not changed.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
