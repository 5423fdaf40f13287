"""Owns a run's directory: what lies where, and the one open iteration that is appended to, committed and read.

Puts together the lease, the append log and the commits, each of which knows nothing of the others. Knows no alignment:
a stage is a name, rows are Arrow tables, a row's identity is the column that the caller named.

    append(stage, table) ─► append log ─► fdatasync ─► acknowledged
    commit(iteration)    ─► log's rows, first per id ─► {stage}.parquet ─► COMMIT.json (atomic rename) ─► log retired

    runs/NAME/  store.json LEASE config.toml resolved.json models.json environment.json metrics.jsonl
                journal/iteration=000007/{stage}.parquet COMMIT.json   (append.log while the iteration is open)
                checkpoints/iteration=000007/  policies/v000007/  labels/  tensorboard/
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from cluster.append_log import AppendLog, durable
from cluster.commits import (
    Commit,
    committed_iterations,
    iteration_dir,
    iteration_of,
    newest_commit,
    prune_checkpoints,
    read_commit,
    read_segment,
    sync_named_file,
    write_commit,
    write_segments,
)
from cluster.durable_files import FileDigest, sync_path, write_bytes_atomic, write_json_atomic
from cluster.environment import environment
from cluster.lease import Lease
from cluster.log_records import LoggedRecord, encode_record, first_rows, refuse_nulls
from cluster.reopen import reopen_rejected

FORMAT = 1
_RUN_FILES = ("LEASE", "config.toml", "resolved.json", "models.json", "environment.json", "metrics.jsonl")
_RUN_DIRECTORIES = ("journal", "labels", "policies", "checkpoints", "tensorboard")


def _no_step(_: str) -> None:
    return None


class _OpenIteration:
    """The log of an iteration that is not committed, with what its rows look like."""

    def __init__(self, run: Path, number: int, *, id_columns: Mapping[str, str], check: Callable[[], None]) -> None:
        directory = run / "journal" / iteration_dir(number)
        directory.mkdir(exist_ok=True)
        sync_path(directory.parent)
        self.log = AppendLog(directory / "append.log", check=check)
        try:
            logged = first_rows(self.log.payloads(), id_columns=id_columns)
        except BaseException:
            self.log.close()
            raise
        self.schemas = {stage: table.schema for stage, table in logged.tables.items()}
        self.highest_epoch = logged.highest_epoch
        self.accepting = True


class RunStore:
    """A run's directory under this process's lease: append to open iterations, commit them, read what is committed.

    Iterations are committed one after another; rows of later ones may be appended before it is their turn.

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
        self._last, rejected_iteration = newest_commit(path)
        if rejected_iteration is not None:
            reopen_rejected(path, rejected_iteration, id_columns=self._id_columns)
        self._retire_logs()
        self._iteration = 0 if self._last is None else self._last.iteration + 1
        if rejected_iteration is not None:
            self._iteration = rejected_iteration
        self._open: dict[int, _OpenIteration] = {}
        try:
            for number in (self._iteration, *self._logged_ahead()):
                self._open_iteration(number)
        except BaseException:
            self._close_logs()
            raise
        highest_epoch = max(part.highest_epoch for part in self._open.values())
        lease.claim(at_least=max(highest_epoch, 0 if self._last is None else self._last.epoch))

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
        """The next iteration to be committed; 0 before the first commit."""
        return self._iteration

    @property
    def epoch(self) -> int:
        """This driver's lease; it grows by at least one with every open."""
        return self._lease.epoch

    def checkpoint_dir(self, iteration: int, *, of: str | None = None) -> Path:
        """Return where an iteration's checkpoint belongs; commits prune all but the two newest.

        Args:
            iteration: of which it is.
            of: whose it is where a run has several; None: the run's main one.
        """
        return self.path / ("checkpoints" if of is None else f"checkpoints-{of}") / iteration_dir(iteration)

    def policy_dir(self, version: int) -> Path:
        """Return where a policy version is exported; these are kept."""
        return self.path / "policies" / f"v{version:06d}"

    async def append(self, stage: str, table: pa.Table, *, iteration: int | None = None) -> None:
        """Add rows to an open iteration and return when they are durable.

        Rows whose id is already logged are kept in the log but lose to the first.

        Args:
            iteration: the next to be committed (None), or a later one.

        Raises:
            ValueError: unknown stage, no id column, None in a required field, another schema than the stage's, or an
                iteration that is committed.
            StaleLease: another driver has taken the run over.
            OSError: the disk refused the write; nothing of the table is in the log.
        """
        await self.append_all({stage: table}, iteration=iteration)

    async def append_all(self, tables: Mapping[str, pa.Table], *, iteration: int | None = None) -> None:
        """Add rows of several stages together, in the order given; see `append`.

        After a kill what is there is a beginning of that order.
        """
        number = self._iteration if iteration is None else iteration
        self._refuse_committed(number)
        part = self._open_iteration(number)
        payloads = []
        for stage, table in tables.items():
            self._refuse_invalid(stage, table, known=part.schemas.get(stage))
            if table.num_rows:
                payloads.append(encode_record(LoggedRecord(stage, number, self._lease.epoch, table)))
        if not payloads:
            return
        with self._lock:
            assert part.accepting, "append during a commit: its rows would belong to neither iteration"
            for stage, table in tables.items():
                part.schemas.setdefault(stage, table.schema)
            written = part.log.submit(payloads)
        await durable(written)

    def logged(self, iteration: int, *, stages: Collection[str] | None = None) -> dict[str, pa.Table]:
        """Return an open iteration's rows by stage, the first per id, in journal order; only stages that have rows.

        Args:
            stages: those that are wanted, the others are not decoded; None means all.

        Raises:
            ValueError: the iteration is committed.
        """
        self._refuse_committed(iteration)
        part = self._open.get(iteration)
        return (
            {} if part is None else first_rows(part.log.payloads(), id_columns=self._id_columns, stages=stages).tables
        )

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
        part = self._open[iteration]
        for file in (*checkpoint, *policy):
            sync_named_file(self.path, file)
        with self._lock:
            part.accepting = False
        try:
            commit = self._write(iteration, part.log, state=state, checkpoint=tuple(checkpoint), policy=tuple(policy))
        except BaseException:
            part.accepting = True  # still open: the caller may mend its arguments and commit again
            raise
        part.log.close()
        del self._open[iteration]
        self._last = commit
        self._on_step("committed")
        self._retire_logs()
        self._on_step("log retired")
        prune_checkpoints(self.path)
        self._on_step("checkpoints pruned")
        self._iteration += 1
        self._open_iteration(self._iteration)
        return commit

    def last_commit(self) -> Commit | None:
        """Return the commit that this store resumed from or has made since; None before the first."""
        return self._last

    def read(self, stage: str, *, iteration: int | None = None) -> pa.Table:
        """Return a stage's rows: of one iteration (the open one too), or (None) of all committed ones."""
        if iteration in self._open and stage in self._id_columns:
            return self.logged(iteration, stages=(stage,)).get(stage, pa.table({}))
        return read_stage(self.path, stage, iteration=iteration)

    def close(self) -> None:
        """Write what is queued and give the run free; open iterations stay open."""
        self._close_logs()
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
        log: AppendLog,
        *,
        state: Mapping[str, object],
        checkpoint: tuple[FileDigest, ...],
        policy: tuple[FileDigest, ...],
    ) -> Commit:
        rows = first_rows(log.payloads(), id_columns=self._id_columns)
        self._on_step("log drained")
        segments = write_segments(self.path, iteration, rows.tables, on_step=self._on_step)
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
        write_commit(self.path, commit, on_step=self._on_step)
        return commit

    def _open_iteration(self, number: int) -> _OpenIteration:
        with self._lock:  # a commit, in its thread, opens the next one, which an append may have opened before
            part = self._open.get(number)
            if part is None:
                part = _OpenIteration(self.path, number, id_columns=self._id_columns, check=self._lease.check)
                self._open[number] = part
            return part

    def _logged_ahead(self) -> list[int]:
        """Return the iterations after the next to be committed whose rows were logged before the last stop."""
        logs = (self.path / "journal").glob("iteration=*/append.log")
        return sorted(number for log in logs if (number := iteration_of(log.parent)) > self._iteration)

    def _close_logs(self) -> None:
        for part in self._open.values():
            part.log.close()

    def _retire_logs(self) -> None:
        """Remove the logs of committed iterations: their rows are in Parquet."""
        for iteration in committed_iterations(self.path):
            log = self.path / "journal" / iteration_dir(iteration) / "append.log"
            if log.exists():
                log.unlink()
                sync_path(log.parent)

    def _refuse_other_iteration(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise ValueError(f"{self.path}: got iteration {iteration}, wanted the open one, {self._iteration}")

    def _refuse_committed(self, iteration: int) -> None:
        if iteration < self._iteration:
            raise ValueError(f"{self.path}: got iteration {iteration}, wanted an open one: {self._iteration} or later")

    def _refuse_invalid(self, stage: str, table: pa.Table, *, known: pa.Schema | None) -> None:
        column = self._id_columns.get(stage)
        if column is None:
            raise ValueError(f'{self.path}: got stage "{stage}", wanted one of {", ".join(sorted(self._id_columns))}')
        if column not in table.column_names or not pa.types.is_string(table.schema.field(column).type):
            raise ValueError(f'stage {stage}: got columns {table.column_names}, wanted a string column "{column}"')
        if known is not None and not table.schema.equals(known):
            raise ValueError(
                f"stage {stage}: got schema {_brief(table.schema)}, wanted {_brief(known)} as logged in this "
                "iteration; finish the iteration with the code that began it"
            )
        for field in table.schema:
            required = field.with_nullable(field.nullable and field.name != column)
            for chunk in table.column(field.name).chunks:
                refuse_nulls(chunk, required, where=f"stage {stage}, column {field.name}")


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
    iterations = committed_iterations(run)
    if iteration is not None:
        if iteration not in iterations:
            raise ValueError(f"{run}: got iteration {iteration}, wanted a committed one: {iterations}")
        iterations = [iteration]
    commits = [read_commit(run, number) for number in iterations]
    tables = [read_segment(run, commit.segments[stage]) for commit in commits if stage in commit.segments]
    return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})
