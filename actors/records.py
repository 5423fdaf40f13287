"""Owns the records that cross between parts: frozen dataclasses, and the Arrow tables derived from them.

Knows nothing of Ray, of engines or of how a record is stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from actors.compact import pickled_fast

R = typing.TypeVar("R")


class Split(StrEnum):
    """Where a canonical problem belongs, fixed by its hash before any data exists (docs: splits)."""

    TRAIN = "train"
    PROBE = "probe"
    SEALED = "sealed"


@pickled_fast
@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What the attacker asks of the learner."""

    query_id: str
    sample_index: int
    """Position of its proposal in the iteration's sequence, from 0."""
    messages: tuple[Message, ...]
    domain: str
    facets: tuple[str, ...]
    """The taxonomy cell, one value per declared axis; e.g. ("+", "3", "2")."""
    canonical: str
    """The canonical problem: equal for two queries that ask the same thing."""
    attack: str
    parent_id: str | None
    iteration: int
    attacker_version: str
    split: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One text that the attacker's model wrote, and what became of it; an accepted one has a Query."""

    proposal_id: str
    iteration: int
    sample_index: int
    """Position in the iteration's sequence of proposals, from 0."""
    text: str
    target: tuple[str, ...]
    """The cell that the attack asked for."""
    outcome: str
    """"accepted", "invalid", "out_of_scope", "wrong_split", "repeated", "surplus"; "lost": no replica answered."""
    query_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled answer of the learner."""

    response_id: str
    query_id: str
    sample_index: int
    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Sampled tokens, end-of-sequence included."""
    logprobs: tuple[float, ...]
    """Nats per sampled token, of the sampling distribution."""
    policy_version: str
    """Of the oldest weights that sampled a token of it."""
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinedResponse:
    """What was made of an answer in which the critic found fault; no sample, and no answer of the learner's (L-DCR)."""

    refinement_id: str
    """Its critiques and the pair that it is the chosen of name it so."""
    response_id: str
    """The answer that it was made of."""
    query_id: str
    sample_index: int
    """That answer's."""
    text: str
    token_ids: tuple[int, ...]
    """The learner's tokens of it, end-of-sequence included where it has one."""
    policy_version: str
    """Of the oldest weights that went on with it; where none did, of those that sampled the answer."""
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """A flaw that a critique points at; `quote` equals response[start:end] (half-open character offsets)."""

    start: int
    end: int
    quote: str
    severity: int
    category: str
    explanation: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Critique:
    """What the critic wrote about one response (METHODS C-SCHEMA)."""

    critique_id: str
    query_id: str
    response_ids: tuple[str, ...]
    mode: str
    text: str
    issues: tuple[Issue, ...]
    verdict: str | None
    """"pass" or "fail"; None when the critique could not be parsed (then it is missing, never a low score)."""
    score: float | None
    """P(good) in [0, 1]: the product of P(correct) over the step marks and the final label; None when missing."""
    label_logprobs: tuple[float, ...]
    """log P(correct) in nats at each mark, the final label last."""
    order: str
    critic_version: str
    parse_ok: bool
    num_dropped_issues: int
    cost_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What critiques and experts add up to for one response."""

    verdict_id: str
    query_id: str
    response_id: str
    label: str | None
    """"pass", "fail", or None when unjudged."""
    score: float | None
    confidence: float | None
    """max(P(good), 1 - P(good)); 1.0 for an expert's label; None when unjudged."""
    source: str
    """"critic" or "expert"; "majority" in that control; "checker" only under the gold regime."""
    escalated: bool
    """Experts were asked about this response; an equal answer to the same query shares their label unasked."""
    drawn: bool | None
    """They were asked because it was drawn at random, whatever the critic said; None: of an older version."""
    flaw_end: int | None
    """Characters of the response up to the end of the first flaw that the critique quotes; None when it quotes none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A chosen and a rejected response to one prompt."""

    pair_id: str
    query_id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    prompt_token_ids: tuple[int, ...]
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    margin: float
    """P(good) of the chosen minus that of the rejected."""
    weight: float
    noise: float
    """Assumed probability that the preference is flipped."""
    source: str
    chosen_id: str
    rejected_id: str
    iteration: int
    age: int | None
    """How many policy versions the older of the two samples is behind the weights that the pair is to train."""
    chosen_logprobs: tuple[float, ...] | None
    """Nats per token of `chosen_token_ids`, of the distribution that they were sampled from."""
    rejected_logprobs: tuple[float, ...] | None
    """Nats per token of `rejected_token_ids`."""
    other_margins: tuple[float, ...] | None
    """Of each objective besides P(good): the chosen's score minus the rejected's, standardised; None: no such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """What a reward model said of one response, just before the learner was trained on it."""

    reward_id: str
    query_id: str
    response_id: str
    score: float
    held_out: bool
    """No pair of its query has trained the reward model."""
    iteration: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A judged response that an update of samples, groups or accepted responses did not learn from."""

    left_out_id: str
    query_id: str
    response_id: str
    iteration: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationAnswer:
    """One answer judged by truth, greedy or of the critic's agreement sample; never seen by any stage of learning."""

    answer_id: str
    """In the agreement sample the id of the live response, whose critiques and verdict bear it too."""
    set_name: str
    """"sealed", "probe", "out_of_distribution" or "attack_set": greedy answers; "agreement": sampled live ones."""
    iteration: int
    item: int
    query: str
    facets: tuple[str, ...]
    text: str
    correct: bool
    well_formed: bool
    policy_version: str


class LabelKind(StrEnum):
    """What an expert labelled."""

    RESPONSE = "response"
    PAIR = "pair"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLabel:
    """One decision of a human (or simulated) expert."""

    item_id: str
    kind: str
    label: str | None
    """"pass"/"fail" for a response, "A"/"B"/"tie" for a pair; None when the expert abstained."""
    expert: str
    seconds: float
    time: float
    """Unix seconds."""
    comment: str


def lineage_id(
    run: str,
    *,
    iteration: int,
    stage: str,
    parents: Sequence[str] = (),
    sample_index: int = 0,
    order: int = 0,
) -> str:
    """Return the id of a record from where it comes from, never from what it says.

    A replay of the same stage makes the same ids, so the first journaled result wins.

    >>> lineage_id("demo", iteration=1, stage="query") == lineage_id("demo", iteration=1, stage="query")
    True
    """
    parts = "\x1f".join([run, str(iteration), stage, *parents, str(sample_index), str(order)])
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def policy_number(version: str) -> int:
    """Return which iteration's update a policy version is of, whatever trade-off it was published at.

    >>> policy_number("v3"), policy_number("v3@0.2500,0.7500")
    (3, 3)
    """
    return int(version.removeprefix("v").partition("@")[0])


def draw_seed(seed: int, *coordinates: int | str) -> int:
    """Return the 48-bit seed of one random draw, by the run's seed and what is drawn, never by the run's name.

    Two runs of one seed draw alike, so a control differs from the run it stands beside by what it controls alone.

    >>> draw_seed(1, "responses", 3, 0) == draw_seed(1, "responses", 0, 3)
    False
    """
    parts = "\x1f".join(map(str, (seed, *coordinates)))
    return int(hashlib.sha256(parts.encode()).hexdigest()[:12], 16)


def arrow_type(annotation: object) -> tuple[pa.DataType, bool]:
    """Return the Arrow type of a field annotation and whether it admits None."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        members = [a for a in typing.get_args(annotation) if a is not type(None)]
        assert len(members) == 1, f"a record field holds one type or None, got {annotation}"
        return arrow_type(members[0])[0], True
    if origin is tuple:
        item, _ = typing.get_args(annotation)
        inner, nullable = arrow_type(item)
        return pa.list_(pa.field("item", inner, nullable=nullable)), False
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return pa.struct(list(schema_of(annotation))), False
    plain: dict[object, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    assert annotation in plain, f"no Arrow type for {annotation}"
    return plain[annotation], False


@cache
def schema_of(record_type: type) -> pa.Schema:
    """Return the Arrow schema of a record type; its fields are the dataclass's, in order."""
    hints = typing.get_type_hints(record_type)
    fields = []
    for field in dataclasses.fields(record_type):
        kind, nullable = arrow_type(hints[field.name])
        fields.append(pa.field(field.name, kind, nullable=nullable))
    return pa.schema(fields)


def to_table(records: Iterable[R], record_type: type[R]) -> pa.Table:
    """Return the records as an Arrow table with the schema of `record_type`.

    Raises:
        ValueError: a required value is None, in a list or a nested record too (pyarrow itself lets it pass).
    """
    rows = list(records)
    kind: type = record_type
    schema = schema_of(kind)
    columns = []
    for field in schema:
        column = _array([getattr(row, field.name) for row in rows], field.type)
        missing = _missing(column, field)
        if missing is not None:
            name, position = missing
            raise ValueError(
                f"{record_type.__name__}.{name}: got None in row {position}, wanted {field.type}; "
                "fill the field, or declare it `| None`"
            )
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def from_table(table: pa.Table, record_type: type[R]) -> list[R]:
    """Return the rows of a table as records; the inverse of `to_table`.

    An optional column that an older version did not write is None in every row.

    Raises:
        ValueError: the table lacks a required column of the record.
    """
    kind: type = record_type
    schema = schema_of(kind)
    absent = [name for name in schema.names if name not in table.column_names]
    missing = [name for name in absent if not schema.field(name).nullable]
    if missing:
        raise ValueError(f"{record_type.__name__}: missing columns {missing}, have {table.column_names}")
    hints = typing.get_type_hints(record_type)
    columns = {
        name: [None] * table.num_rows if name in absent else table.column(name).to_pylist() for name in schema.names
    }
    return [
        record_type(**{name: _typed(columns[name][i], hints[name]) for name in schema.names})
        for i in range(table.num_rows)
    ]


def _array(values: Sequence[typing.Any], kind: typing.Any) -> pa.Array[typing.Any]:
    """Return values as an array: records column by column, so that no row becomes a dict on the way."""
    if pa.types.is_struct(kind):
        is_missing = [value is None for value in values]
        children = [
            _array([None if value is None else getattr(value, part.name) for value in values], part.type)
            for part in kind
        ]
        mask = pa.array(is_missing) if True in is_missing else None
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        ends = itertools.accumulate((0 if value is None else len(value) for value in values), initial=0)
        items = _array([item for value in values if value is not None for item in value], kind.value_type)
        is_missing = [value is None for value in values]
        mask = pa.array(is_missing) if True in is_missing else None
        return pa.ListArray.from_arrays(pa.array(ends, type=pa.int32()), items, type=kind, mask=mask)
    return pa.array(values, type=kind)


def _missing(array: typing.Any, field: pa.Field[typing.Any]) -> tuple[str, int] | None:
    """Return the dotted name of a required field that is null somewhere and the row of the first null, or None."""
    kind: typing.Any = field.type
    if array.null_count and not field.nullable:
        return field.name, _first_null(array)
    if pa.types.is_list(kind):
        item = kind.value_field
        found = _missing(array.flatten(), item) if array.values.null_count or item.type.num_fields else None
        if found is None:
            return None
        row: int = pc.list_parent_indices(array)[found[1]].as_py()
        return field.name + found[0].removeprefix(item.name), row
    if pa.types.is_struct(kind):
        present = pa.array(range(len(array))).filter(array.is_valid()) if array.null_count else None
        for i, part in enumerate(kind):
            child = array.field(i)
            found = _missing(child if present is None else child.take(present), part)
            if found is not None:
                row = found[1] if present is None else present[found[1]].as_py()
                return f"{field.name}.{found[0]}", row
    return None


def _first_null(array: typing.Any) -> int:
    row: int = pc.index(array.is_null(), True).as_py()
    return row


def _typed(value: typing.Any, annotation: object) -> object:
    if value is None:
        return None
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _typed(value, next(a for a in typing.get_args(annotation) if a is not type(None)))
    if origin is tuple:
        item = typing.get_args(annotation)[0]
        return tuple(value) if item in (int, float, str) else tuple(_typed(v, item) for v in value)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        hints = typing.get_type_hints(annotation)
        return annotation(**{k: _typed(v, hints[k]) for k, v in value.items()})
    return value
