"""The run directory survives every kill and damage, or says which file is damaged where; one driver at a time."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.append_log import CorruptLog
from cluster.commits import CorruptRun, last_commit
from cluster.durable_files import digest_directory
from cluster.lease import StaleLease
from cluster.log_records import LoggedRecord, encode_record, first_rows
from cluster.store import RunStore, read_stage

HEADER_BYTES = 20  # magic 8, salt 8, crc32 4
RECORD_HEADER_BYTES = 12  # marker 4, length 4, crc32 4
ROWS = pa.schema([pa.field("row_id", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=True)])
STAGES = {"queries": "row_id", "responses": "row_id"}
COMMIT_STEPS = [
    "log drained",
    "queries written",
    "queries renamed",
    "responses written",
    "responses renamed",
    "manifest written",
    "committed",
    "log retired",
    "checkpoints pruned",
]
REPOSITORY = Path(__file__).resolve().parent.parent


def rows(*names: str, text: str | None = "x") -> pa.Table:
    return pa.table({"row_id": list(names), "text": [text] * len(names)}, schema=ROWS)


def ids(table: pa.Table) -> list[str]:
    return [str(name) for name in table.column("row_id").to_pylist()]


def append(store: RunStore, stage: str, table: pa.Table) -> None:
    asyncio.run(store.append(stage, table))


def make_run(path: Path) -> RunStore:
    return RunStore.create(path, config={"seed": 7}, id_columns=STAGES)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "demo"


# ------------------------------------------------------------------------------------------------------- killing

FORKING_WRITER = """
import asyncio, os, signal, sys
from pathlib import Path
import pyarrow as pa
from cluster.durable_files import digest_directory
from cluster.store import RunStore

ROWS = pa.schema([pa.field("row_id", pa.string(), nullable=False), pa.field("text", pa.string(), nullable=True)])

def rows(names):
    return pa.table({"row_id": names, "text": ["some text " * 20] * len(names)}, schema=ROWS)

async def append_for_ever(store):
    async def one_writer(writer):
        number = 0
        while True:
            names = [f"{store.epoch}-{writer}-{number}-{row}" for row in range(3)]
            await store.append("queries", rows(names))
            os.write(1, (" ".join(names) + "\\n").encode())
            number += 1
    await asyncio.gather(*(one_writer(writer) for writer in range(4)))

def commit_and_die(path, step):
    def kill_at(name):
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)
    store = RunStore.create(path, config={}, id_columns={"queries": "row_id", "responses": "row_id"}, on_step=kill_at)
    asyncio.run(store.append("queries", rows(["q1", "q2"])))
    asyncio.run(store.append("responses", rows(["r1", "r2", "r3"])))
    directory = store.checkpoint_dir(0)
    directory.mkdir()
    (directory / "weights").write_bytes(b"v0")
    store.commit(0, state={"rng": [1, 2]}, checkpoint=digest_directory(directory, root=path))

rows(["warm"])  # pyarrow's first conversion of lists imports pandas: once here, not in every child
for line in sys.stdin:
    path, task = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        if task == "append":
            asyncio.run(append_for_ever(RunStore.open(Path(path))))
        else:
            commit_and_die(Path(path), task)
        os._exit(0)
    os.write(1, f"pid {pid}\\n".encode())
    os.waitpid(pid, 0)
    os.write(1, b"dead\\n")
"""


class Writer:
    """A process that forks a writer per task, so that twenty kills cost one start of the interpreter."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKING_WRITER],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, path: Path, task: str, *, kill_after_acks: int | None = None, delay_s: float = 0.0) -> list[str]:
        """Return the lines that the task printed before it died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{path}\t{task}\n")
        stdin.flush()
        lines: list[str] = []
        pid = None
        while (line := stdout.readline().strip()) != "dead":
            assert line or self._process.poll() is None, "the writer's parent died"
            if line.startswith("pid "):
                pid = int(line.removeprefix("pid "))
            else:
                lines.append(line)
            if kill_after_acks is not None and pid is not None and len(lines) >= kill_after_acks:
                time.sleep(delay_s)
                os.kill(pid, signal.SIGKILL)
                kill_after_acks = None
        return lines

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    process = Writer()
    yield process
    process.close()


def test_twenty_kills_lose_no_acknowledged_row_and_double_none(run: Path, writer: Writer) -> None:
    make_run(run).close()
    rng = random.Random(20)
    acknowledged: list[str] = []
    for _ in range(20):
        lines = writer.run(run, "append", kill_after_acks=rng.randrange(12), delay_s=rng.random() * 0.02)
        acknowledged += [name for line in lines for name in line.split()]
        with RunStore.open(run) as store:
            recovered = ids(store.logged(0)["queries"]) if acknowledged else []
            assert set(acknowledged) <= set(recovered)
            assert len(recovered) == len(set(recovered))
    assert len(acknowledged) > 100


@pytest.mark.parametrize("step", COMMIT_STEPS)
def test_a_kill_within_a_commit_leaves_the_iteration_open_or_committed(run: Path, writer: Writer, step: str) -> None:
    writer.run(run, step)
    is_committed = COMMIT_STEPS.index(step) >= COMMIT_STEPS.index("committed")
    with RunStore.open(run) as store:
        assert store.iteration == (1 if is_committed else 0)
        assert (last_commit(run) is not None) == is_committed
        if not is_committed:
            logged = store.logged(0)
            assert {stage: ids(table) for stage, table in logged.items()} == {
                "queries": ["q1", "q2"],
                "responses": ["r1", "r2", "r3"],
            }
            files = digest_directory(store.checkpoint_dir(0), root=run)
            store.commit(0, state={"rng": [1, 2]}, checkpoint=files)
        commit = store.last_commit()
        assert commit is not None
        assert commit.state == {"rng": [1, 2]}
        assert ids(store.read("responses", iteration=0)) == ["r1", "r2", "r3"]
        assert not (run / "journal" / "iteration=000000" / "append.log").exists()


# --------------------------------------------------------------------------------------------------------- stages


def test_the_first_row_of_an_id_wins_and_later_ones_are_counted(run: Path) -> None:
    with make_run(run) as store:
        append(store, "responses", rows("a", "b", text="first"))
        append(store, "responses", rows("b", "c", "c", text="second"))
        logged = store.logged(0)["responses"]
        assert ids(logged) == ["a", "b", "c"]
        assert logged.column("text").to_pylist() == ["first", "first", "second"]
        commit = store.commit(0, state={})
        assert commit.superseded == {"responses": ("b", "c")}
        assert commit.segments["responses"].num_rows == 3
        assert ids(store.read("responses")) == ["a", "b", "c"]


def test_only_the_stages_asked_for_are_decoded_and_records_of_others_still_count_for_the_epoch(run: Path) -> None:
    with make_run(run) as store:
        append(store, "queries", rows("q"))
        append(store, "responses", rows("r", "r"))
        assert {stage: ids(table) for stage, table in store.logged(0, stages=["responses"]).items()} == {
            "responses": ["r"]
        }
        assert store.logged(0, stages=[]) == {}
    stale = [encode_record(LoggedRecord("responses", 0, epoch, rows(f"r{epoch}"))) for epoch in (1, 2, 1)]
    newer = encode_record(LoggedRecord("queries", 0, 3, rows("q3")))[:64]  # its header alone: no table to decode
    found = first_rows([*stale, newer, stale[1]], id_columns=STAGES, stages=["responses"])
    assert ids(found.tables["responses"]) == ["r1", "r2"]
    assert (found.num_stale_records, found.highest_epoch) == (2, 3)


def test_none_in_a_required_field_is_refused_also_inside_lists(run: Path) -> None:
    item = pa.struct([pa.field("role", pa.string(), nullable=False)])
    nested = pa.schema(
        [
            pa.field("row_id", pa.string(), nullable=False),
            pa.field("messages", pa.list_(pa.field("item", item, nullable=False)), nullable=False),
        ]
    )
    with make_run(run) as store:
        with pytest.raises(ValueError, match="stage queries, column row_id: got None in row 1"):
            append(store, "queries", pa.table({"row_id": ["a", None], "text": ["x", "y"]}, schema=ROWS))
        table = pa.table({"row_id": ["a"], "messages": [[{"role": "user"}, {"role": None}]]}, schema=nested)
        with pytest.raises(ValueError, match=r"column messages\[\].role: got None in row 1"):
            append(store, "responses", table)
        append(store, "queries", rows("a", text=None))
        assert ids(store.logged(0)["queries"]) == ["a"]


def test_wrong_stages_columns_and_schemas_are_named(run: Path) -> None:
    with make_run(run) as store:
        with pytest.raises(ValueError, match='got stage "query", wanted one of queries, responses'):
            append(store, "query", rows("a"))
        with pytest.raises(ValueError, match='wanted a string column "row_id"'):
            append(store, "queries", pa.table({"text": ["a"]}))
        append(store, "queries", rows("a"))
        with pytest.raises(ValueError, match="got schema row_id: string, wanted row_id: string required, text"):
            append(store, "queries", pa.table({"row_id": ["b"]}))
        store.commit(0, state={})
        with pytest.raises(ValueError, match="got iteration 0, wanted an open one: 1 or later"):
            store.logged(0)
        with pytest.raises(ValueError, match="got iteration 0, wanted an open one: 1 or later"):
            asyncio.run(store.append("queries", rows("late"), iteration=0))


def test_iterations_are_committed_and_read_alone_and_together(run: Path) -> None:
    with make_run(run) as store:
        for iteration in range(3):
            append(store, "queries", rows(f"q{iteration}", f"p{iteration}"))
            store.commit(iteration, state={"rng": iteration})
        append(store, "queries", rows("open"))
        assert ids(store.read("queries")) == ["q0", "p0", "q1", "p1", "q2", "p2"]
        assert ids(store.read("queries", iteration=1)) == ["q1", "p1"]
        assert ids(store.read("queries", iteration=3)) == ["open"]
        assert store.read("responses", iteration=3).num_rows == 0
        assert store.read("responses").num_rows == 0
        with pytest.raises(ValueError, match="got iteration 0, wanted the open one, 3"):
            store.commit(0, state={})
        # A report reads while the driver holds the lease.
        assert ids(read_stage(run, "queries", iteration=2)) == ["q2", "p2"]
    with RunStore.open(run) as store:
        assert store.iteration == 3
        commit = store.last_commit()
        assert commit is not None
        assert commit.state == {"rng": 2}
        assert ids(store.logged(3)["queries"]) == ["open"]
        assert json.loads((run / "resolved.json").read_bytes()) == {"seed": 7}


def test_rows_of_a_later_iteration_wait_for_their_turn(run: Path) -> None:
    with make_run(run) as store:
        append(store, "queries", rows("now"))
        asyncio.run(store.append("queries", rows("next"), iteration=1))
        asyncio.run(store.append_all({"queries": rows("after"), "responses": rows("after-r")}, iteration=2))
        assert ids(store.read("queries", iteration=1)) == ["next"]
        store.commit(0, state={})
        assert ids(read_stage(run, "queries")) == ["now"]
    # As after a kill: what was logged ahead is there, whoever opens the run next.
    with RunStore.open(run) as store:
        assert store.iteration == 1
        assert ids(store.logged(1)["queries"]) == ["next"]
        assert ids(store.logged(2)["responses"]) == ["after-r"]
        assert store.logged(3) == {}
        append(store, "queries", rows("later", "next", text="again"))
        store.commit(1, state={})
        store.commit(2, state={})
    assert ids(read_stage(run, "queries")) == ["now", "next", "later", "after"]


def test_a_commit_loses_nothing_that_is_appended_ahead_meanwhile(run: Path) -> None:
    async def both(store: RunStore) -> None:
        await store.append("queries", rows("now"))
        done = asyncio.create_task(asyncio.to_thread(store.commit, 0, state={}))
        names = []
        while not done.done():
            names.append(f"ahead-{len(names)}")
            await store.append("queries", rows(names[-1]), iteration=1)
        await done
        assert ids(store.logged(1)["queries"]) == names

    slow = RunStore.create(run, config={}, id_columns=STAGES, on_step=lambda _: time.sleep(0.02))
    with slow as store:
        asyncio.run(both(store))


def test_a_state_that_json_cannot_hold_leaves_the_iteration_open(run: Path) -> None:
    with make_run(run) as store:
        append(store, "queries", rows("a"))
        with pytest.raises(ValueError, match=r"commit.state: got a value that JSON cannot hold"):
            store.commit(0, state={"loss": float("nan")})
        append(store, "queries", rows("b"))
        store.commit(0, state={"loss": None})
        assert ids(store.read("queries")) == ["a", "b"]


# ------------------------------------------------------------------------------------------------ commits that fail


def test_checkpoints_of_several_are_pruned_alike(run: Path) -> None:
    with make_run(run) as store:
        for number in range(4):
            directories = [store.checkpoint_dir(number, of=of) for of in (None, "reward")]
            for directory in directories:
                directory.mkdir(parents=True)
                (directory / "weights").write_bytes(b"w")
            files = [file for directory in directories for file in digest_directory(directory, root=run)]
            store.commit(number, state={}, checkpoint=files)
        for kind in ("checkpoints", "checkpoints-reward"):
            assert sorted(path.name for path in (run / kind).iterdir()) == ["iteration=000002", "iteration=000003"]


def commit_with_checkpoint(store: RunStore, name: str) -> None:
    directory = store.checkpoint_dir(store.iteration)
    directory.mkdir()
    (directory / "weights").write_bytes(f"weights of {name}".encode() * 100)
    append(store, "queries", rows(f"{name}-1", f"{name}-2"))
    append(store, "responses", rows(f"{name}-r"))
    files = digest_directory(directory, root=store.path)
    store.commit(store.iteration, state={"name": name}, checkpoint=files)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_only_the_two_newest_checkpoints_are_kept(run: Path) -> None:
    with make_run(run) as store:
        for name in ("a", "b", "c"):
            commit_with_checkpoint(store, name)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iteration=000001", "iteration=000002"]


@pytest.mark.parametrize(
    ("damaged", "rows_left"),
    [
        ("checkpoints/iteration=000001/weights", {"queries": ["b-1", "b-2"], "responses": ["b-r"]}),
        ("journal/iteration=000001/queries.parquet", {"responses": ["b-r"]}),
        ("journal/iteration=000001/COMMIT.json", {}),
    ],
)
def test_a_damaged_newest_commit_reopens_its_iteration_with_what_is_intact(
    run: Path, damaged: str, rows_left: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with make_run(run) as store:
        commit_with_checkpoint(store, "a")
        commit_with_checkpoint(store, "b")
        append(store, "queries", rows("c-1"))
    flip_a_bit(run / damaged)
    for _ in range(2):  # the fallback itself survives being opened again
        with RunStore.open(run) as store:
            commit = store.last_commit()
            assert commit is not None
            assert commit.iteration == 0
            assert commit.state == {"name": "a"}
            assert store.iteration == 1
            assert {stage: ids(table) for stage, table in store.logged(1).items()} == rows_left
    assert "the commit of iteration 1 is rejected" in caplog.text
    assert damaged in caplog.text
    with RunStore.open(run) as store:
        append(store, "queries", rows("b-1", "b-2", text="again"))
        store.commit(1, state={"name": "b again"})
        # What followed the lost rows was sampled from weights that are gone; what followed intact rows is kept.
        kept = {stage: ids(table) for stage, table in store.logged(2).items()}
        assert kept == ({"queries": ["c-1"]} if len(rows_left) == 2 else {})
    commit = last_commit(run)
    assert commit is not None
    assert commit.state == {"name": "b again"}


def test_two_damaged_commits_are_fatal_and_named(run: Path) -> None:
    with make_run(run) as store:
        for name in ("a", "b", "c"):
            commit_with_checkpoint(store, name)
    flip_a_bit(run / "checkpoints/iteration=000001/weights")
    (run / "checkpoints/iteration=000002/weights").unlink()
    with pytest.raises(CorruptRun, match=r"iteration 2: .*weights is missing; iteration 1: .*got SHA-256"):
        RunStore.open(run)


def test_damage_in_the_middle_of_the_open_log_refuses_the_run(run: Path) -> None:
    with make_run(run) as store:
        append(store, "queries", rows("a"))
        append(store, "queries", rows("b"))
    log = run / "journal" / "iteration=000000" / "append.log"
    data = bytearray(log.read_bytes())
    data[HEADER_BYTES + RECORD_HEADER_BYTES + 9] ^= 1
    log.write_bytes(data)
    with pytest.raises(CorruptLog, match=f"append.log: got a damaged record .* at offset {HEADER_BYTES}"):
        RunStore.open(run)


def test_a_damaged_old_segment_is_refused_when_it_is_read(run: Path) -> None:
    with make_run(run) as store:
        for name in ("a", "b", "c"):
            commit_with_checkpoint(store, name)
        flip_a_bit(run / "journal/iteration=000000/queries.parquet")
        with pytest.raises(CorruptRun, match=r"iteration=000000/queries.parquet: got SHA-256"):
            store.read("queries")


def test_a_commit_refuses_files_that_are_not_as_digested(run: Path) -> None:
    with make_run(run) as store:
        directory = store.policy_dir(1)
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"12345")
        files = digest_directory(run / "policies", root=run)
        assert files[0].path == "policies/v000001/model.safetensors"
        (directory / "model.safetensors").write_bytes(b"1234")
        with pytest.raises(ValueError, match="with 4 bytes, wanted 5 as digested"):
            store.commit(0, state={}, policy=files)


# ---------------------------------------------------------------------------------------------------------- lease


def test_a_second_driver_is_told_who_holds_the_run(run: Path) -> None:
    with (
        make_run(run),
        pytest.raises(ValueError, match=f"demo: run already active, held by pid {os.getpid()} on .* since "),
    ):
        RunStore.open(run)
    with RunStore.open(run) as store:
        assert store.epoch == 2


def test_a_stale_driver_can_neither_append_nor_commit(run: Path) -> None:
    stale = make_run(run)
    append(stale, "queries", rows("a"))
    (run / "LEASE").unlink()  # what a file system without locks looks like
    with RunStore.open(run) as current:
        assert current.epoch == 2
        with pytest.raises(StaleLease, match="got an append from epoch 1"):
            append(stale, "queries", rows("b"))
        with pytest.raises(StaleLease):
            stale.commit(0, state={})
        append(current, "queries", rows("c"))
        assert ids(current.logged(0)["queries"]) == ["a", "c"]
    stale.close()


def test_a_directory_that_holds_another_run_or_other_files_is_refused(run: Path, tmp_path: Path) -> None:
    make_run(run).close()
    with pytest.raises(ValueError, match=r"holds another run, wanted a new or an empty one; .*elenchus resume demo"):
        make_run(run)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(runs, thesis.tex\)"):
        make_run(tmp_path)
    with pytest.raises(ValueError, match=r"no run .* the runs there are demo"):
        RunStore.open(run.parent / "dmeo")


def test_an_unfinished_creation_can_be_done_again(run: Path) -> None:
    make_run(run).close()
    (run / "store.json").unlink()
    with make_run(run) as store:
        assert store.iteration == 0


def test_the_environment_names_python_packages_and_processor(run: Path) -> None:
    make_run(run).close()
    written = json.loads((run / "environment.json").read_text())
    assert written["python"].startswith("3.")
    assert written["num_usable_cpus"] >= 1
    assert written["packages"]["pyarrow"] == pa.__version__
