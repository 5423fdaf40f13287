"""Queries over a run: what the views hold, that nothing can be changed or reached, and how rows are written."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import elenchus
from actors.experts import ExpertItem, ExpertQueue
from actors.records import EvaluationAnswer, ExpertLabel, to_table
from cluster.store import RunStore
from serve.journal_sql import JournalQueries, QueryError
from serve.terminal import harmless, write_rows
from tests.synthetic_run import make_row, write_journal
from trainers.loop_state import STAGES
from trainers.summary import append_metrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Give runs/x: iterations 1 and 2 of six queries committed, without a pair; 3 written and not committed; of two
    items asked, one label."""
    run_dir = tmp_path / "runs" / "x"
    for iteration in (1, 2, 3):
        write_journal(run_dir, iteration=iteration)
        (run_dir / "journal" / f"iteration={iteration:06d}" / "pairs.parquet").unlink()
    (run_dir / "journal" / "iteration=000003" / "COMMIT.json").unlink()
    for iteration in (1, 2):
        append_metrics(run_dir, make_row(iteration))
    (run_dir / "resolved.json").write_text("{}")
    queue = ExpertQueue(run_dir / "labels" / "queue.sqlite3")
    queue.ask(
        [
            ExpertItem(item_id=name, kind="response", query="87+75", responses=("147",), critique=None, why="0.52")
            for name in ("q1-0-r1", "q1-1-r1")
        ]
    )
    queue.answer(
        ExpertLabel(item_id="q1-0-r1", kind="response", label="fail", expert="ada", seconds=4.0, time=9.0, comment="")
    )
    queue.close()
    return run_dir


@pytest.fixture
def queries(run: Path) -> Iterator[JournalQueries]:
    with JournalQueries(run) as opened:
        yield opened


def rows_of(queries: JournalQueries, sql: str) -> list[tuple[object, ...]]:
    return list(queries.query(sql).rows)


# ---------------------------------------------------------------------- what there is


def test_rows_of_committed_iterations_alone_are_seen_with_their_iteration(queries: JournalQueries) -> None:
    assert rows_of(queries, "select iteration, count(*) from responses group by 1 order by 1") == [(1, 12), (2, 12)]
    assert rows_of(queries, "select count(*) from critiques where iteration = 2 and not parse_ok") == [(0,)]
    # A stage whose records have an iteration of their own.
    assert rows_of(queries, "select iteration, count(*) from queries group by 1 order by 1") == [(1, 6), (2, 6)]
    # Of every three queries' wrong answers, one goes to the expert.
    found = rows_of(queries, "select source, label, count(*) from verdicts where escalated group by all")
    assert found == [("expert", "fail", 4)]


def test_views_can_be_joined_and_lists_and_tables_opened(queries: JournalQueries) -> None:
    sql = """
        select q.facets[3], q.messages[1].content, c.issues[1].quote, l.expert
        from expert_labels l join responses r on l.item_id = r.response_id
        join queries q using (query_id) join critiques c on c.response_ids[1] = r.response_id
    """
    assert rows_of(queries, sql) == [("2", "87+75", "7+5+0=12", "ada")]


def test_metrics_have_a_row_for_each_iteration_and_maps_of_what_is_named(queries: JournalQueries) -> None:
    sql = (
        "select iteration, pairs_dropped['all_fail'], pairs_dropped['no such'], critic_agreement.num_good, "
        "cells[1].num_fail from metrics order by 1"
    )
    assert rows_of(queries, sql) == [(1, 11.0, None, 100, 10), (2, 12.0, None, 100, 10)]


def test_what_was_put_before_the_experts_is_there_answered_or_not(queries: JournalQueries) -> None:
    sql = "select item_id, responses[1], label, superseded from expert_items left join expert_labels using (item_id)"
    assert sorted(rows_of(queries, sql), key=str) == [("q1-0-r1", "147", "fail", False), ("q1-1-r1", "147", None, None)]


def test_a_queue_that_is_being_written_is_read(run: Path) -> None:
    queue = ExpertQueue(run / "labels" / "queue.sqlite3")
    try:
        queue.answer(
            ExpertLabel(
                item_id="q1-1-r1", kind="response", label="pass", expert="bo", seconds=1.0, time=9.0, comment=""
            )
        )
        with JournalQueries(run) as queries:
            assert rows_of(queries, "select expert from expert_labels order by 1") == [("ada",), ("bo",)]
    finally:
        queue.close()


def test_without_a_query_the_views_are_listed(queries: JournalQueries) -> None:
    found = {view.name: view for view in queries.views()}
    assert set(found) == {*STAGES, "metrics", "expert_items", "expert_labels"}
    assert [found[name].num_rows for name in ("queries", "responses", "pairs", "metrics")] == [12, 24, 0, 2]
    assert found["verdicts"].columns[-1] == "iteration"
    # A stage without a row has its columns all the same.
    assert {"chosen", "rejected", "iteration"} <= set(found["pairs"].columns)
    assert list(queries.listing().rows)[-1][:2] == ("expert_labels", 1)


def test_a_run_that_has_committed_nothing_has_empty_views(tmp_path: Path) -> None:
    id_columns = {stage: column for stage, (_, column) in STAGES.items()}
    RunStore.create(tmp_path / "x", config={}, id_columns=id_columns).close()
    with JournalQueries(tmp_path / "x") as queries:
        assert {view.num_rows for view in queries.views()} == {0}
        assert (
            rows_of(queries, "select label, iteration from verdicts union all select label, 1 from expert_labels") == []
        )
        assert rows_of(queries, "select pairs_dropped['x'] from metrics") == []


def test_a_column_that_an_older_version_did_not_write_is_null_there(run: Path) -> None:
    path = run / "journal" / "iteration=000001" / "verdicts.parquet"
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns(["flaw_end", "confidence"]), path)
    with JournalQueries(run) as queries:
        found = rows_of(queries, "select iteration, count(confidence), count(*) from verdicts group by 1 order by 1")
    assert found == [(1, 0, 12), (2, 12, 12)]


def test_a_stage_that_this_version_does_not_know_is_a_view_too(run: Path) -> None:
    pq.write_table(pa.table({"note": ["hm"]}), run / "journal" / "iteration=000002" / "afterthoughts.parquet")
    with JournalQueries(run) as queries:
        assert rows_of(queries, "select note, iteration from afterthoughts") == [("hm", 2)]


def test_what_a_real_store_commits_is_read(tmp_path: Path) -> None:
    import asyncio

    answer = EvaluationAnswer(
        answer_id="a", set_name="probe", iteration=0, item=0, query="1+1", facets=("+", "1", "0"), text="2",
        correct=True, well_formed=True, policy_version="v0",
    )  # fmt: skip
    id_columns = {stage: column for stage, (_, column) in STAGES.items()}
    with RunStore.create(tmp_path / "x", config={}, id_columns=id_columns) as store:
        asyncio.run(store.append("evaluations", to_table([answer], EvaluationAnswer)))
        store.commit(0, state={})
        # Read while a driver holds the run.
        with JournalQueries(tmp_path / "x") as queries:
            assert rows_of(queries, "select iteration, text, correct from evaluations") == [(0, "2", True)]


# ---------------------------------------------------------------------- nothing changes


@pytest.mark.parametrize(
    "sql",
    [
        "copy verdicts to '{folder}/out.csv'",
        "copy (select 1) to '{folder}/journal/iteration=000001/verdicts.parquet' (format parquet)",
        "attach '{folder}/other.db'",
        "select * from read_text('/etc/hostname')",
        "select * from '{folder}/journal/iteration=000001/verdicts.parquet'",
        "select * from read_parquet('{folder}/journal/*/verdicts.parquet')",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "export database '{folder}/copy'",
        "select * from run",
    ],
)
def test_a_query_reaches_no_file_and_no_variable(sql: str, queries: JournalQueries, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(QueryError):
        rows_of(queries, sql.format(folder=run))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_queries_leave_the_run_as_it_was(run: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    with JournalQueries(run) as queries:
        for view in queries.views():
            rows_of(queries, f'select * from "{view.name}"')
        rows_of(queries, "create table mine as select 1 as a; select * from mine")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("selec 1", 'sql: Parser Error: syntax error at or near "selec"'),
        ("select foo from verdicts", 'sql: Binder Error: Referenced column "foo" not found in FROM clause!'),
        (
            "select * from verdict",
            'sql: Catalog Error: Table with name verdict does not exist! Did you mean "verdicts"?',
        ),
        ("select cast(text as int) from responses", "sql: Conversion Error: Could not convert string '7+5+0=12"),
        ("", 'sql: got no statement, wanted one such as "select count(*) from verdicts"'),
        ("-- nothing", 'sql: got no statement, wanted one such as "select count(*) from verdicts"'),
    ],
)
def test_a_wrong_query_is_one_line(sql: str, message: str, queries: JournalQueries) -> None:
    with pytest.raises(QueryError) as told:
        rows_of(queries, sql)
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


def test_damaged_files_are_named(run: Path) -> None:
    path = run / "journal" / "iteration=000002" / "queries.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(QueryError, match=r"iteration=000002/queries\.parquet: got no Parquet"):
        JournalQueries(run)


def test_a_damaged_queue_is_named(run: Path) -> None:
    (run / "labels" / "queue.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(QueryError, match=r"queue\.sqlite3: got no readable queue of the experts"):
        JournalQueries(run)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(run / "labels" / "queue.sqlite3").execute("select * from items")


# ---------------------------------------------------------------------- how rows are written

HOSTILE = "a\x1b[2J\u202eb\nc"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_spelt_out() -> None:
    assert harmless(HOSTILE) == "a\\x1b[2J\\u202eb\nc"
    assert harmless("\x00\x7f\x9b\U000e0001ä✓") == "\\x00\\x7f\\x9b\\U000e0001ä✓"


def test_a_table_is_aligned_cut_and_harmless() -> None:
    rows = iter([(1, "x [red]y[/]", None, 0.5), (20, HOSTILE, "z", 1e-20), (3, "", "", 1.0)])
    stream = io.StringIO()
    write_rows(stream, ("n", "text", "what", "p"), rows, format="table", max_rows=2)
    assert stream.getvalue().splitlines() == [
        " n   text              what       p",
        "───────────────────────────────────",
        " 1   x [red]y[/]       NULL     0.5",
        "20   a\\x1b[2J\\u202eb   z      1e-20",
        "     c",
        "(the first 2 rows; --format csv writes all of them, --max-rows 20 more)",
    ]


def test_a_table_on_a_terminal_keeps_to_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    write_rows(stream, ("text",), iter([("word " * 40,), (HOSTILE,)]), format="table", max_rows=9)
    assert max(len(line) for line in stream.getvalue().splitlines() if "word" in line) <= 40
    assert "\x1b[2J" not in stream.getvalue()


def test_csv_is_whole_and_verbatim_but_for_a_terminal() -> None:
    def rows() -> Iterator[tuple[object, ...]]:
        return iter([(1, HOSTILE, None, [1, "ä"], True), (2, 'say "x", y', {"a": Decimal("1.5")}, [], False)])

    stream = io.StringIO()
    write_rows(stream, ("n", "text", "map", "list", "ok"), rows(), format="csv", max_rows=1)
    assert list(csv.reader(io.StringIO(stream.getvalue()))) == [
        ["n", "text", "map", "list", "ok"],
        ["1", HOSTILE, "", '[1, "ä"]', "true"],
        ["2", 'say "x", y', '{"a": 1.5}', "[]", "false"],
    ]
    live = Terminal()
    write_rows(live, ("n", "text", "map", "list", "ok"), rows(), format="csv", max_rows=1)
    assert "\x1b" not in live.getvalue()


def test_json_is_a_list_of_objects_also_of_numbers_that_json_lacks() -> None:
    rows = iter([(Decimal("775570"), float("nan"), [float("inf"), 1.0], date(2026, 1, 2), HOSTILE)])
    stream = io.StringIO()
    write_rows(stream, ("sum", "p", "list", "day", "text"), rows, format="json", max_rows=1)
    assert json.loads(stream.getvalue()) == [
        {"sum": 775570, "p": "nan", "list": ["inf", 1.0], "day": "2026-01-02", "text": HOSTILE}
    ]
    live = Terminal()
    write_rows(live, ("text",), iter([("ä\u202e",)]), format="json", max_rows=1)
    assert "\\u00e4\\u202e" in live.getvalue()
    empty = io.StringIO()
    write_rows(empty, ("a",), iter(()), format="json", max_rows=1)
    assert json.loads(empty.getvalue()) == []


# ---------------------------------------------------------------------- the command


def sql(run: Path, *words: str) -> int:
    return elenchus.main(["sql", run.name, *words, "--runs-dir", str(run.parent)])


def test_a_query_is_answered_as_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sql(run, "select iteration, count(*) as n from verdicts group by 1 order by 1") == 0
    assert capsys.readouterr().out.splitlines() == [
        "iteration    n",
        "──────────────",
        "        1   12",
        "        2   12",
        "(2 rows)",
    ]


def test_a_query_is_answered_in_other_formats(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sql(run, "select 1 as a, sum(iteration) as s from metrics", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out) == [{"a": 1, "s": 3}]
    assert sql(run, "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines()[0] == "view,rows,columns"


def test_a_wrong_query_a_wrong_format_and_a_wrong_run_are_two(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sql(run, "select * from verdict") == 2
    assert capsys.readouterr().err == (
        '✗ sql: Catalog Error: Table with name verdict does not exist! Did you mean "verdicts"?\n'
    )
    assert sql(run, "select 1", "--format", "xml") == 2
    assert elenchus.main(["sql", "y", "--runs-dir", str(run.parent)]) == 2
    assert "wanted one of x" in capsys.readouterr().err


def test_a_statement_without_rows_is_answered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sql(run, "create view mine as select 1 as a") == 0
    assert capsys.readouterr().out.splitlines() == ["Count", "─────", "(0 rows)"]
