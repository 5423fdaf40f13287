"""Owns how the columns of an Arrow table are read: as arrays, with one clear line for what is not as it must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ids: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Lists of numbers, one behind the other in a single array."""

    values: npt.NDArray[Any]
    lengths: Ids

    @property
    def starts(self) -> Ids:
        """Return where each list begins."""
        return np.cumsum(self.lengths) - self.lengths

    def rows(self) -> tuple[npt.NDArray[Any], ...]:
        """Return each list as a view."""
        ends = np.cumsum(self.lengths).tolist()
        return tuple(self.values[start:end] for start, end in zip([0, *ends], ends, strict=False))


def concatenated(first: Lists, second: Lists) -> Lists:
    """Return each list of the one followed by the other's."""
    lengths = first.lengths + second.lengths
    values = np.empty(int(lengths.sum()), dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    values[_positions(starts, first.lengths)] = first.values
    values[_positions(starts + first.lengths, second.lengths)] = second.values
    return Lists(values=values, lengths=lengths)


def responses_of(prompts: Lists, responses: Lists) -> Lists:
    """Return, for each prompt followed by its response, which tokens are the response's."""
    lengths = prompts.lengths + responses.lengths
    values = np.zeros(int(lengths.sum()), dtype=np.bool_)
    values[_positions(np.cumsum(lengths) - responses.lengths, responses.lengths)] = True
    return Lists(values=values, lengths=lengths)


def _positions(starts: Ids, lengths: Ids) -> Ids:
    """Return start, start + 1, … of every list, one behind the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def require_columns(table: pa.Table, *names: str) -> None:
    """Check that a table has all of some columns.

    Raises:
        ValueError: it lacks one; names the first, and those that there are.
    """
    for name in names:
        if name not in table.column_names:
            raise ValueError(f"table: no column {name!r}, have {', '.join(table.column_names)}")


def read_lists(table: pa.Table, name: str) -> Lists:
    """Return a column of lists of numbers.

    Raises:
        ValueError: there is no such column, or it holds nulls.
    """
    require_columns(table, name)
    column: Any = table.column(name).combine_chunks()
    if column.null_count or column.flatten().null_count:
        raise ValueError(f"table: column {name!r} holds nulls, wanted lists of numbers")
    return Lists(
        values=column.flatten().to_numpy(zero_copy_only=False),
        lengths=column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64),
    )


def read_numbers(table: pa.Table, name: str, *, default: float, least: float = 0.0) -> Floats:
    """Return a column of finite numbers, none below `least`; the default where the table lacks it.

    Raises:
        ValueError: a number is none of these.
    """
    if name not in table.column_names:
        return np.full(table.num_rows, default)
    values = table.column(name).to_numpy().astype(np.float64)
    bad = ~(np.isfinite(values) & (values >= least))
    if bad.any():
        refuse_rows(bad, table, f"a {name} of {values[bad][0]}, wanted a finite number >= {least:g}")
    return values


def ages_of(table: pa.Table) -> Ids:
    """Return (rows,) how many versions each row's samples are behind the weights to be trained; 0 where none is said.

    Raises:
        ValueError: an age below 0.
    """
    if "age" not in table.column_names:
        return np.zeros(table.num_rows, dtype=np.int64)
    column: Any = table.column("age")
    ages: Ids = column.fill_null(0).to_numpy().astype(np.int64)
    refuse_rows(ages < 0, table, "an age below 0: its samples are newer than the weights that it is to train")
    return ages


def refuse_rows(bad: npt.NDArray[np.bool_], table: pa.Table, what: str) -> None:
    """Check that no row is bad.

    Raises:
        ValueError: one is; names the first, what it has, and how many there are.
    """
    if bad.any():
        row = int(np.argmax(bad))
        ids = [name for name in ("pair_id", "row_id") if name in table.column_names]
        which = f"row {row}" + (f" ({table.column(ids[0])[row]})" if ids else "")
        raise ValueError(f"table: {which} has {what} ({int(bad.sum())} such rows of {table.num_rows})")
