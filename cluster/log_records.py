"""Owns what a record of the append log says: rows of one stage, its iteration and the lease's epoch; and their sum.

Knows neither files nor stages' meaning: a payload is bytes, a row's identity is the column that the caller named.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

logger = logging.getLogger(__name__)

_ALIGNMENT = 64


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


def encode_record(record: LoggedRecord) -> bytes:
    """Return a record's payload: length of the header, header as JSON, table as an Arrow stream."""
    header = json.dumps({"stage": record.stage, "iteration": record.iteration, "epoch": record.epoch}).encode()
    # Padded, so that Arrow reads its buffers aligned and without a copy.
    header += b" " * (-(len(header) + 4) % _ALIGNMENT)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, record.table.schema) as writer:
        writer.write_table(record.table)
    return b"".join((len(header).to_bytes(4, "little"), header, sink.getvalue()))


def first_rows(
    payloads: Iterable[bytes], *, id_columns: Mapping[str, str], stages: Collection[str] | None = None
) -> FirstRows:
    """Return per stage the first journaled row of every id, in journal order, and the ids of the rows that lost.

    Args:
        stages: those whose tables are decoded; None means all. Epochs are of all records either way.
    """
    by_stage: dict[str, list[pa.Table]] = {}
    num_stale_records = 0
    highest_epoch = 0
    for payload in payloads:
        end = 4 + int.from_bytes(payload[:4], "little")
        header = json.loads(payload[4:end])
        if header["epoch"] < highest_epoch:
            num_stale_records += 1
            continue
        highest_epoch = header["epoch"]
        if stages is None or header["stage"] in stages:
            by_stage.setdefault(header["stage"], []).append(_decode_table(payload, begin=end))
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


def _decode_table(payload: bytes, *, begin: int) -> pa.Table:
    with pa.ipc.open_stream(pa.py_buffer(payload).slice(begin)) as reader:
        return reader.read_all()


def _is_first(ids: pa.ChunkedArray[Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return [N] bool: whether a row is the first of its id."""
    encoded: Any = pc.dictionary_encode(ids.combine_chunks())
    mask = np.zeros(len(ids), dtype=np.bool_)
    mask[np.unique(encoded.indices.to_numpy(), return_index=True)[1]] = True
    return mask


def refuse_nulls(array: Any, field: pa.Field[Any], *, where: str) -> None:
    """Raise ValueError when a field that is not nullable holds a null: Arrow itself lets it pass."""
    if not field.nullable and array.null_count:
        row = array.is_null().to_pylist().index(True)
        raise ValueError(f"{where}: got None in row {row}, wanted {field.type}; fill the field, or make it nullable")
    if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
        item = field.type.value_field
        if item.type.num_fields or array.values.null_count:
            refuse_nulls(array.flatten(), item, where=f"{where}[]")
    elif pa.types.is_struct(field.type):
        present = array.drop_null() if array.null_count else array
        for child in field.type:
            refuse_nulls(present.field(child.name), child, where=f"{where}.{child.name}")
