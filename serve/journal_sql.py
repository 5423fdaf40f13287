"""Owns SQL over what a run has recorded: its committed journal, its metrics and its experts' labels, as DuckDB views.

    queries responses critiques verdicts pairs …   one view per stage; `iteration` says which one a row is of
    metrics                                        one row per committed iteration
    expert_items expert_labels                     what was put before the experts, and what they said

Reads only: the run's files are handed to DuckDB as Arrow data, and DuckDB itself may open no file and no connection.
Of the open iteration nothing is shown: it is in no Parquet file yet.
"""

from __future__ import annotations

import json
import re
import sqlite3
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs

from actors.records import schema_of
from trainers.loop_state import STAGES
from trainers.summary import IterationMetrics, read_metrics

ROWS_PER_BATCH = 1024
LOCKS = (
    "SET python_enable_replacements = false",  # else a table may be a Python variable
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET temp_directory = ''",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)
_ITEMS: dict[str, pa.DataType] = {
    "item_id": pa.string(),
    "kind": pa.string(),
    "query": pa.string(),
    "responses": pa.list_(pa.string()),
    "critique": pa.string(),
    "why": pa.string(),
    "time": pa.float64(),
}
_LABELS: dict[str, pa.DataType] = {
    "item_id": pa.string(),
    "kind": pa.string(),
    "label": pa.string(),
    "expert": pa.string(),
    "seconds": pa.float64(),
    "time": pa.float64(),
    "comment": pa.string(),
    "superseded": pa.bool_(),
}


class QueryError(ValueError):
    """A query can't be run, or what it reads is damaged; the message is one line."""


class View(NamedTuple):
    """A table that a query may name."""

    name: str
    num_rows: int
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a query gives; the rows are read once, as they are asked for."""

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


class JournalQueries:
    """DuckDB over one run; a context manager."""

    def __init__(self, run_dir: Path) -> None:
        """Make the views; reads the footers of the Parquet files, the metrics and the labels.

        Raises:
            ValueError: the metrics are damaged.
            QueryError: a file of the journal is no Parquet.
        """
        tables = {name: _stage(run_dir, name) for name in _stage_names(run_dir)}
        others = {"metrics": _metrics(run_dir), **_labels(run_dir / "labels" / "queue.sqlite3")}
        self._num_rows = {name: table.count_rows() for name, table in tables.items()}
        self._num_rows |= {name: table.num_rows for name, table in others.items()}
        self._connection = duckdb.connect(":memory:")
        for name, table in (tables | others).items():
            self._connection.register(name, table)
        for lock in LOCKS:
            self._connection.execute(lock)

    def listing(self) -> Result:
        """Return what there is to query, as rows; `describe NAME` gives the types of its columns."""
        rows = ((view.name, view.num_rows, ", ".join(view.columns)) for view in self.views())
        return Result(columns=("view", "rows", "columns"), rows=rows)

    def views(self) -> list[View]:
        """Return what there is to query."""
        return [
            View(name, num_rows, tuple(self._connection.view(name).columns))
            for name, num_rows in self._num_rows.items()
        ]

    def query(self, sql: str) -> Result:
        """Return what a query gives.

        Raises:
            QueryError: DuckDB refuses it, now or while its rows are read.
        """
        try:
            if not self._connection.extract_statements(sql):
                raise QueryError('sql: got no statement, wanted one such as "select count(*) from verdicts"')
            reader = self._connection.sql(sql).to_arrow_reader(ROWS_PER_BATCH)
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            raise QueryError(_one_line(error)) from None
        return Result(columns=tuple(reader.schema.names), rows=_rows(reader))

    def close(self) -> None:
        """Forget everything; nothing was written."""
        self._connection.close()

    def __enter__(self) -> Self:
        """Return the views themselves."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the views."""
        self.close()


def _rows(reader: Any) -> Iterator[tuple[Any, ...]]:
    try:
        for batch in reader:
            columns = [column.to_pylist(maps_as_pydicts="lossy") for column in batch.columns]
            yield from zip(*columns, strict=True)
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise QueryError(_one_line(error)) from None


def _one_line(error: BaseException) -> str:
    """Return DuckDB's message without the picture of the query that it draws below."""
    said = re.split(r"\n+LINE \d+:", str(error))[0]
    return f"sql: {' '.join(said.split())}"


# -------------------------------------------------------------------------------------------------------------- tables


def _stage_names(run_dir: Path) -> list[str]:
    """Return the stages that there are views of: those that a run has, and others that this one wrote."""
    written = {path.stem for path in run_dir.glob("journal/iteration=*/*.parquet")}
    return [*STAGES, *sorted(written - STAGES.keys())]


def _stage(run_dir: Path, name: str) -> ds.Dataset:
    """Return a stage's rows of all committed iterations, read when a query needs them.

    Raises:
        QueryError: a file is no Parquet.
    """
    commits = sorted(run_dir.glob("journal/iteration=*/COMMIT.json"))
    files = [path for path in (commit.with_name(f"{name}.parquet") for commit in commits) if path.is_file()]
    local, parquet = fs.LocalFileSystem(), ds.ParquetFileFormat()
    fragments = [
        parquet.make_fragment(
            str(path), filesystem=local, partition_expression=ds.field("iteration") == _iteration_of(path)
        )
        for path in files
    ]
    schemas = []
    for path, fragment in zip(files, fragments, strict=True):
        try:
            schemas.append(fragment.physical_schema)
        except (pa.ArrowException, OSError) as error:
            what = " ".join(str(error).split())[:120]
            raise QueryError(f"{path}: got no Parquet ({what}), wanted a committed segment; restore it") from None
    if not schemas:
        schemas.append(schema_of(STAGES[name][0]))
    # A column that an older version did not write is null in its rows.
    schema = pa.unify_schemas([_nullable(schema) for schema in schemas])
    if "iteration" not in schema.names:
        schema = schema.append(pa.field("iteration", pa.int64()))
    return ds.FileSystemDataset(fragments, schema, parquet, local)


def _nullable(schema: pa.Schema) -> pa.Schema:
    return pa.schema([schema.field(name).with_nullable(True) for name in schema.names])


def _iteration_of(path: Path) -> pa.Scalar[Any]:
    return pa.scalar(int(path.parent.name.removeprefix("iteration=")), pa.int64())


def _metrics(run_dir: Path) -> pa.Table:
    """Return metrics.jsonl; what is counted by name is a map: pairs_dropped['all_fail']."""
    rows = [row.model_dump(mode="json") for row in read_metrics(run_dir)]
    columns = {}
    for name, info in IterationMetrics.model_fields.items():
        values = [row[name] for row in rows]
        if typing.get_origin(info.annotation) is dict:
            kind = pa.map_(pa.string(), pa.float64())
            columns[name] = pa.array([list(value.items()) for value in values], type=kind)
        else:
            columns[name] = pa.array(values)
    return pa.table(columns)


def _labels(path: Path) -> dict[str, pa.Table]:
    """Return the experts' queue; empty tables before the first item.

    Raises:
        QueryError: the file is damaged.
    """
    if not path.is_file():
        return {"expert_items": _table([], _ITEMS), "expert_labels": _table([], _LABELS)}
    # Without a log of writes beside it nobody has the file open, and SQLite need not make files to read it.
    alone = not path.with_name(f"{path.name}-wal").exists()
    address = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if alone else ''}"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=30.0)) as connection:
            items = connection.execute(f"SELECT {', '.join(_ITEMS)} FROM items ORDER BY position").fetchall()
            labels = connection.execute(f"SELECT {', '.join(_LABELS)} FROM labels ORDER BY position").fetchall()
    except sqlite3.Error as error:
        raise QueryError(
            f"{path}: got no readable queue of the experts ({error}), wanted the file as written"
        ) from None
    return {"expert_items": _table(items, _ITEMS), "expert_labels": _table(labels, _LABELS)}


def _table(rows: Sequence[tuple[Any, ...]], kinds: Mapping[str, pa.DataType]) -> pa.Table:
    """Return rows of SQLite, which has no lists and no booleans of its own."""
    columns: dict[str, pa.Array[Any]] = {}
    for i, (name, kind) in enumerate(kinds.items()):
        values = [row[i] for row in rows]
        if pa.types.is_list(kind):
            values = [json.loads(value) for value in values]
        elif pa.types.is_boolean(kind):
            values = [bool(value) for value in values]
        columns[name] = pa.array(values, type=kind)
    return pa.table(columns)
