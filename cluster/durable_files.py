"""Owns how a file or a directory's entry reaches the disk whole: write beside, fsync, rename, fsync the directory.

Knows nothing of runs: a path and bytes come in; what is there after any crash is the old file or all of the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

EXIT_SYNC_FAILED = 74
"""The process's exit status after a failed fsync (EX_IOERR of sysexits.h)."""


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
        sync_or_exit(descriptor, path=path, sync=os.fsync)
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that after any crash it holds either its old bytes or all of the new ones."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(data)
    publish(beside, path)


def write_json_atomic(path: Path, value: object) -> None:
    """Replace a JSON file atomically and durably.

    Raises:
        ValueError: the value holds NaN or an infinity, which JSON lacks.
        TypeError: the value holds something that JSON cannot say.
    """
    write_bytes_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def publish(beside: Path, path: Path) -> None:
    """Put a written file in the place of another, durably; `beside` lies in the same directory."""
    sync_path(beside)
    os.replace(beside, path)
    sync_path(path.parent)


def sync_or_exit(descriptor: int, *, path: Path, sync: Callable[[int], None]) -> None:
    """Call `sync`, which makes a descriptor's bytes durable; when it fails, end the process."""
    try:
        sync(descriptor)
    except OSError as error:
        # After a failed fsync the kernel may have dropped the dirty pages and marked them clean: a second fsync would
        # succeed and acknowledge what is not on the disk. Only a new process, which reads the file again, is honest.
        logger.critical("%s: fsync failed (%s); the process ends, resume the run when the disk is sound", path, error)
        logging.shutdown()
        os._exit(EXIT_SYNC_FAILED)
