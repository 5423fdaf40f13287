"""Records travel as Arrow tables and come back as they were; ids say where a record is from, not what it says."""

from __future__ import annotations

import dataclasses
import pickle
import types
import typing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle

from actors import records
from actors.generation import Completion, GenerationRequest
from actors.records import (
    Critique,
    ExpertLabel,
    Issue,
    LabelKind,
    Message,
    PreferencePair,
    Query,
    Response,
    Split,
    from_table,
    lineage_id,
    schema_of,
    to_table,
)
from tests.fake_pool import spoken
from tests.small_records import make_critique, make_query, make_response

RECORD_TYPES = [kind for kind in vars(records).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


def values_of(annotation: object) -> st.SearchStrategy[typing.Any]:
    """Return a strategy for a field's annotation, written apart from the code under test."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(st.none(), *[values_of(member) for member in inner if member is not type(None)])
    if origin is tuple:
        return st.lists(values_of(inner[0]), max_size=3).map(tuple)
    if dataclasses.is_dataclass(annotation):
        return records_of(typing.cast(type, annotation))
    # Arrow stores UTF-8, which has no lone surrogates.
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    numbers = {str: text, int: st.integers(-(2**63), 2**63 - 1), bool: st.booleans()}
    return st.floats(allow_nan=False) if annotation is float else numbers[typing.cast(type, annotation)]


def records_of(kind: type) -> st.SearchStrategy[typing.Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(kind)})


@pytest.mark.parametrize("kind", RECORD_TYPES, ids=lambda kind: kind.__name__)
def test_records_are_frozen_slotted_and_keyword_only(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "__slots__" in vars(kind)
    assert all(field.kw_only for field in dataclasses.fields(kind))


@pytest.mark.parametrize("kind", RECORD_TYPES, ids=lambda kind: kind.__name__)
def test_records_come_back_from_a_table_as_they_were(kind: type) -> None:
    @settings(deadline=None, max_examples=30)  # a deadline would fail on a busy machine
    @given(st.lists(records_of(kind), max_size=3))
    def check(rows: list[object]) -> None:
        table = to_table(rows, kind)
        table.validate(full=True)
        assert table.schema == schema_of(kind)
        assert from_table(table, kind) == rows

    check()


def test_records_come_back_from_parquet_with_their_types(tmp_path: Path) -> None:
    critique = dataclasses.replace(
        make_critique(score=0.25),
        issues=(
            Issue(start=2, end=4, quote="né", severity=3, category="step", explanation="日本", fix=""),
            Issue(start=0, end=0, quote="", severity=1, category="result", explanation="", fix="13"),
        ),
        label_logprobs=(-0.1, -20.0, float("-inf")),
    )
    pq.write_table(to_table([critique], Critique), tmp_path / "critiques.parquet")
    (back,) = from_table(pq.read_table(tmp_path / "critiques.parquet"), Critique)
    assert back == critique
    assert isinstance(back.issues, tuple)
    assert isinstance(back.issues[0], Issue)


def test_an_empty_table_has_the_schema_of_its_record() -> None:
    table = to_table([], Query)
    assert table.num_rows == 0
    assert table.schema == schema_of(Query)
    assert from_table(table, Query) == []


def test_an_enumerated_value_travels_as_its_text() -> None:
    query = dataclasses.replace(make_query(), split=Split.PROBE)
    assert to_table([query], Query).column("split").to_pylist() == ["probe"]
    assert Split.PROBE == "probe"
    label = ExpertLabel(item_id="i", kind=LabelKind.PAIR, label="A", expert="ada", seconds=1.0, time=2.0, comment="")
    assert from_table(to_table([label], ExpertLabel), ExpertLabel) == [label]


def test_only_fields_that_are_declared_so_admit_none() -> None:
    nullable = {field.name for field in schema_of(Critique) if field.nullable}
    assert nullable == {"verdict", "score"}
    assert {field.name for field in schema_of(Query) if field.nullable} == {"parent_id"}


def test_a_missing_required_value_is_refused_by_field_and_row() -> None:
    good = make_query()
    bad = dataclasses.replace(good, canonical=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Query\.canonical: got None in row 1, wanted string"):
        to_table([good, bad], Query)


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (dataclasses.replace(make_query(), facets=("+", None)), Query),  # type: ignore[arg-type]
        (dataclasses.replace(make_query(), messages=(Message(role="user", content=None),)), Query),  # type: ignore[arg-type]
        (dataclasses.replace(make_response(), token_ids=(1, None)), Response),  # type: ignore[arg-type]
    ],
    ids=["in a list", "in a nested record", "in a list of numbers"],
)
def test_a_missing_value_inside_a_required_one_is_refused(bad: object, kind: type) -> None:
    with pytest.raises(ValueError, match="got None in row 0"):
        to_table([bad], kind)


def test_a_table_without_a_column_is_refused_by_name() -> None:
    table = to_table([make_response()], Response).drop_columns(["logprobs"])
    with pytest.raises(ValueError, match=r"Response: missing columns \['logprobs'\]"):
        from_table(table, Response)


def test_a_table_may_hold_more_columns_than_its_record() -> None:
    table = to_table([make_response()], Response).append_column("extra", pa.array([1]))
    assert from_table(table, Response) == [make_response()]


def test_the_schema_of_a_pair_is_what_the_wire_carries() -> None:
    schema = schema_of(PreferencePair)
    assert schema.names == [field.name for field in dataclasses.fields(PreferencePair)]
    assert schema.field("chosen_token_ids").type == pa.list_(pa.field("item", pa.int64(), nullable=False))
    assert schema.field("margin").type == pa.float64()
    message = pa.struct(
        [pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)]
    )
    assert schema.field("prompt").type == pa.list_(pa.field("item", message, nullable=False))


def test_ids_of_different_origins_differ() -> None:
    origin = {"iteration": 1, "stage": "responses", "parents": ("q",), "sample_index": 0, "order": 0}
    others = [
        {**origin, "iteration": 2},
        {**origin, "stage": "critiques"},
        {**origin, "parents": ("p",)},
        {**origin, "parents": ("q", "q")},
        {**origin, "parents": ()},
        {**origin, "sample_index": 1},
        {**origin, "order": 1},
    ]
    ids = {lineage_id("demo", **each) for each in [origin, *others]}  # type: ignore[arg-type]
    ids.add(lineage_id("other", **origin))  # type: ignore[arg-type]
    assert len(ids) == 9
    assert lineage_id("demo", **origin) in ids  # type: ignore[arg-type]


def test_an_id_is_the_same_in_every_process_and_release() -> None:
    # sha256("demo\x1f1\x1fqueries\x1fp\x1f2\x1f0"), 24 hex digits: a run of last week can be resumed.
    assert lineage_id("demo", iteration=1, stage="queries", parents=["p"], sample_index=2) == "eae42ba0a1d17c5c5d49eec5"


@pytest.mark.parametrize("kind", [GenerationRequest, Completion])
def test_what_crosses_to_a_replica_comes_out_as_it_went_in(kind: type) -> None:
    request = GenerationRequest(
        request_id="r", messages=(Message(role="user", content="1+1"),), max_tokens=4, seed=7, labels=("y", "n")
    )
    completion = spoken("2", request_id="r", labels=("y", "n"), good_logprobs=())
    value: object = request if kind is GenerationRequest else completion
    assert isinstance(value, kind)
    assert pickle.loads(cloudpickle.dumps(value)) == value
