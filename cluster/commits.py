"""Owns committed iterations: COMMIT.json, the Parquet segments and the files that it names, what is kept and pruned.

Knows neither the append log nor the lease: rows come as tables, and the caller may write.

    write_segments ─► {stage}.parquet ─► write_commit ─► COMMIT.json (atomic rename): the iteration is done
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.durable_files import FileDigest, digest_file, publish, sync_path

logger = logging.getLogger(__name__)

NUM_CHECKPOINTS_KEPT = 2


class CorruptRun(ValueError):
    """Committed files do not have the hashes that their COMMIT.json names."""


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
    return newest_commit(run).commit


def committed_policy(run: Path, version: str) -> Commit:
    """Return the commit of a policy version, "v3" or the name of its directory, when its files are as committed.

    Raises:
        ValueError: there is no such version; names those that there are.
        CorruptRun: a file of the policy is missing or changed.
    """
    iterations = committed_iterations(run)
    number = int(version[1:]) if version[:1] == "v" and version[1:].isdecimal() else -1
    if not iterations:
        raise ValueError(f'{run}: got version "{version}" and no commit yet; go on by `elenchus resume {run.name}`')
    if number not in iterations:
        there = f"one of {', '.join(f'v{i}' for i in iterations)}"
        if len(iterations) > 12:
            there = f"v{iterations[0]} to v{iterations[-1]}"
        raise ValueError(f'{run}: got version "{version}", wanted {there}')
    commit = read_commit(run, number)
    failure = _files_failure(run, commit.policy)
    if failure is not None:
        raise CorruptRun(f"{run / failure}; restore the file from a copy, or take another version")
    return commit


def newest_commit(run: Path) -> NewestCommit:
    """Return the newest commit whose hashes pass, and the iteration of the one that was passed over for it.

    Raises:
        CorruptRun: the two newest commits both fail.
    """
    iterations = committed_iterations(run)
    failures: list[str] = []
    for iteration in reversed(iterations[-NUM_CHECKPOINTS_KEPT:]):
        failure = _commit_failure(run, iteration)
        if failure is None:
            return NewestCommit(read_commit(run, iteration), iterations[-1] if failures else None)
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
        commit = read_commit(run, iteration)
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


def committed_iterations(run: Path) -> list[int]:
    """Return the iterations that have a COMMIT.json, in order; its hashes are not looked at."""
    return sorted(iteration_of(path.parent) for path in (run / "journal").glob("iteration=*/COMMIT.json"))


def iteration_of(directory: Path) -> int:
    """Return the iteration whose directory this is; the inverse of `iteration_dir`."""
    return int(directory.name.removeprefix("iteration="))


def iteration_dir(iteration: int) -> str:
    """Return the name of an iteration's directory, under journal/ and under checkpoints/."""
    return f"iteration={iteration:06d}"


def read_commit(run: Path, iteration: int) -> Commit:
    """Return what an iteration's COMMIT.json says.

    Raises:
        CorruptRun: the file is damaged.
    """
    path = run / "journal" / iteration_dir(iteration) / "COMMIT.json"
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


def write_segments(
    run: Path, iteration: int, tables: Mapping[str, pa.Table], *, on_step: Callable[[str], None]
) -> dict[str, Segment]:
    """Write each stage's rows as {stage}.parquet, durably, and return the segments as a commit names them."""
    segments: dict[str, Segment] = {}
    for stage, table in tables.items():
        path = run / "journal" / iteration_dir(iteration) / f"{stage}.parquet"
        beside = path.with_name(f".{path.name}.tmp")
        pq.write_table(table, beside, compression="zstd")
        on_step(f"{stage} written")
        publish(beside, path)
        on_step(f"{stage} renamed")
        segments[stage] = Segment(file=digest_file(path, root=run), num_rows=table.num_rows)
    return segments


def write_commit(run: Path, commit: Commit, *, on_step: Callable[[str], None]) -> None:
    """Write COMMIT.json at once and durably: from its rename on, the iteration is committed.

    Raises:
        ValueError: the caller's state is not JSON.
    """
    body = dataclasses.asdict(commit)
    try:
        body = json.loads(json.dumps(body, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"commit.state: got a value that JSON cannot hold ({error}), wanted plain values") from error
    body["sha256"] = _json_digest(body)
    path = run / "journal" / iteration_dir(commit.iteration) / "COMMIT.json"
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(body, indent=2) + "\n")
    on_step("manifest written")
    publish(beside, path)


def _json_digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_segment(run: Path, segment: Segment) -> pa.Table:
    """Return the rows of a segment.

    Raises:
        CorruptRun: the file is missing or does not have the hash that its COMMIT.json names.
    """
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


def sync_named_file(run: Path, file: FileDigest) -> None:
    """Make a file that a commit will name durable, with its directories up to the run's.

    Raises:
        ValueError: the path leaves the run, or no file of that size is there.
    """
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


def prune_checkpoints(run: Path) -> None:
    """Remove the checkpoints, whosever they are, that neither of the two newest commits names."""
    newest = committed_iterations(run)[-NUM_CHECKPOINTS_KEPT:]
    named = {Path(file.path).parts[:2] for number in newest for file in read_commit(run, number).checkpoint}
    for directory in sorted(run.glob("checkpoints*/iteration=*")):
        if directory.relative_to(run).parts not in named and iteration_of(directory) <= newest[-1]:
            shutil.rmtree(directory)
