"""The run directory survives every kill, truncation and flipped bit, or says which file is damaged where."""

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

from cluster.store import (
    EXIT_SYNC_FAILED,
    AppendLog,
    CorruptLog,
    CorruptRun,
    RunStore,
    StaleLease,
    digest_directory,
    last_commit,
    read_log,
    read_stage,
    write_json_atomic,
)

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


# ---------------------------------------------------------------------------------------------------- append log


@pytest.fixture
def fifty_records(tmp_path: Path) -> tuple[list[bytes], list[int], bytes]:
    """Return payloads, the offset at which each record begins, and the file's bytes."""
    payloads = [f"record {number}".encode() * (number % 5) for number in range(50)]
    log = AppendLog(tmp_path / "fifty.log")
    for payload in payloads:
        log.append([payload])
    log.close()
    offsets = [HEADER_BYTES]
    for payload in payloads[:-1]:
        offsets.append(offsets[-1] + RECORD_HEADER_BYTES + len(payload))
    data = (tmp_path / "fifty.log").read_bytes()
    assert len(data) == offsets[-1] + RECORD_HEADER_BYTES + len(payloads[-1])
    return payloads, offsets, data


def test_every_truncation_recovers_exactly_the_whole_records_before_it(
    fifty_records: tuple[list[bytes], list[int], bytes], tmp_path: Path
) -> None:
    payloads, offsets, data = fifty_records
    ends = [*offsets[1:], len(data)]
    path = tmp_path / "cut.log"
    for size_bytes in range(len(data) + 1):
        path.write_bytes(data[:size_bytes])
        num_whole = sum(end <= size_bytes for end in ends)
        assert read_log(path).payloads == payloads[:num_whole], size_bytes


def test_every_flipped_bit_is_named_or_costs_the_last_record_alone(
    fifty_records: tuple[list[bytes], list[int], bytes], tmp_path: Path
) -> None:
    payloads, offsets, data = fifty_records
    path = tmp_path / "flipped.log"
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position * 5 % 8)
        path.write_bytes(damaged)
        if position >= offsets[-1]:
            assert read_log(path).payloads == payloads[:-1], position
            continue
        hit = max((offset for offset in offsets if offset <= position), default=0)
        with pytest.raises(CorruptLog, match=f"flipped.log: .* at offset {hit}[ ,]"):
            read_log(path)


def test_a_log_goes_on_after_its_torn_tail_was_cut(
    fifty_records: tuple[list[bytes], list[int], bytes], tmp_path: Path
) -> None:
    payloads, offsets, data = fifty_records
    path = tmp_path / "torn.log"
    for size_bytes in (0, 7, HEADER_BYTES, offsets[10] + 3, len(data) - 1):
        path.write_bytes(data[:size_bytes])
        log = AppendLog(path)
        num_whole = len(log.payloads())
        log.append([b"new", b"newer"])
        assert log.payloads() == [*payloads[:num_whole], b"new", b"newer"]
        log.close()
        assert read_log(path).payloads == [*payloads[:num_whole], b"new", b"newer"]


def test_a_copy_of_a_log_inside_a_torn_record_is_not_taken_for_records(
    fifty_records: tuple[list[bytes], list[int], bytes], tmp_path: Path
) -> None:
    log = AppendLog(tmp_path / "outer.log")
    log.append([b"whole", fifty_records[2]])
    log.close()
    os.truncate(log.path, log.path.stat().st_size - 1)
    assert read_log(log.path).payloads == [b"whole"]


def test_concurrent_appends_keep_the_order_of_their_calls(tmp_path: Path) -> None:
    async def append_all(log: AppendLog) -> None:
        await asyncio.gather(*(log.append_async([str(number).encode()]) for number in range(300)))

    log = AppendLog(tmp_path / "many.log")
    asyncio.run(append_all(log))
    assert log.payloads() == [str(number).encode() for number in range(300)]
    log.close()


def test_a_cancelled_append_is_written_all_the_same_and_harms_no_other(tmp_path: Path) -> None:
    async def cancel_one_of_three(log: AppendLog) -> None:
        tasks = [asyncio.create_task(log.append_async([name])) for name in (b"a", b"b", b"c")]
        await asyncio.sleep(0)
        tasks[1].cancel()
        assert await asyncio.gather(*tasks[::2]) == [None, None]

    log = AppendLog(tmp_path / "cancelled.log", sync=lambda _: time.sleep(0.05))
    asyncio.run(cancel_one_of_three(log))
    assert log.payloads() == [b"a", b"b", b"c"]
    log.close()


def test_records_that_wait_together_share_one_sync_of_at_most_64(tmp_path: Path) -> None:
    num_syncs = 0

    def slow_sync(_: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        time.sleep(0.05)

    log = AppendLog(tmp_path / "grouped.log", sync=slow_sync)  # one sync at recovery
    for future in [log.submit([b"x"]) for _ in range(129)]:
        future.result()
    log.close()
    # The first group holds what was there when the writer woke (1 to 64), the others 64: 128 in between at most.
    assert num_syncs - 1 in (3, 4)


def test_a_failed_sync_ends_the_process_and_acknowledges_nothing(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from cluster.store import AppendLog
num_calls = 0
def sync(descriptor):
    global num_calls
    num_calls += 1
    if num_calls > 2:
        raise OSError(5, "Input/output error")
log = AppendLog(Path(sys.argv[1]), sync=sync)
log.append([b"first"])
print("first acknowledged", flush=True)
log.append([b"second"])
print("second acknowledged", flush=True)
"""
    done = run_python(script, str(tmp_path / "failing.log"))
    assert done.returncode == EXIT_SYNC_FAILED
    assert done.stdout == "first acknowledged\n"
    assert "fsync failed" in done.stderr


def test_a_full_disk_is_reported_and_the_log_stays_sound(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from cluster.store import AppendLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = AppendLog(Path(sys.argv[1]))
log.append([b"small"])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    log.append([b"x" * 2000])
except OSError as error:
    print("refused", error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append([b"again"])
print(log.payloads())
"""
    done = run_python(script, str(tmp_path / "full.log"))
    assert done.stdout == "refused 27\n[b'small', b'again']\n", done.stderr


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )


# ------------------------------------------------------------------------------------------------------- killing

FORKING_WRITER = """
import asyncio, os, signal, sys
from pathlib import Path
import pyarrow as pa
from cluster.store import RunStore, digest_directory

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
        assert store.superseded(0) == {"responses": 2}
        commit = store.commit(0, state={})
        assert commit.superseded == {"responses": ("b", "c")}
        assert commit.segments["responses"].num_rows == 3
        assert ids(store.read("responses")) == ["a", "b", "c"]


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
        with pytest.raises(ValueError, match="got iteration 3, wanted the open one, 0"):
            store.logged(3)


def test_iterations_are_committed_and_read_alone_and_together(run: Path) -> None:
    with make_run(run) as store:
        for iteration in range(3):
            append(store, "queries", rows(f"q{iteration}", f"p{iteration}"))
            store.commit(iteration, state={"rng": iteration})
        append(store, "queries", rows("open"))
        assert ids(store.read("queries")) == ["q0", "p0", "q1", "p1", "q2", "p2"]
        assert ids(store.read("queries", iteration=1)) == ["q1", "p1"]
        assert ids(store.read("queries", iteration=3)) == ["open"]
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
        assert store.config == {"seed": 7}


def test_a_state_that_json_cannot_hold_leaves_the_iteration_open(run: Path) -> None:
    with make_run(run) as store:
        append(store, "queries", rows("a"))
        with pytest.raises(ValueError, match=r"commit.state: got a value that JSON cannot hold"):
            store.commit(0, state={"loss": float("nan")})
        append(store, "queries", rows("b"))
        store.commit(0, state={"loss": None})
        assert ids(store.read("queries")) == ["a", "b"]


# ------------------------------------------------------------------------------------------------ commits that fail


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


# ----------------------------------------------------------------------------------------------- metrics and files


def test_metrics_are_whole_lines_of_strict_json(run: Path) -> None:
    with make_run(run) as store:
        store.log_metrics({"iteration": 1, "loss": float("nan"), "pool": {"tokens_per_s": 7.5}})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "lo')  # a kill
    with RunStore.open(run) as store:
        store.log_metrics({"iteration": 2})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["iteration"]) for line in lines] == [(1, 1), (2, 2)]
    assert lines[0]["loss"] == "nan"
    assert lines[0]["pool"] == {"tokens_per_s": 7.5}


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"gain": 0.2})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"gain": float("inf")})
    assert json.loads(path.read_text()) == {"gain": 0.2}
    assert list(tmp_path.iterdir()) == [path]


def test_the_environment_names_python_packages_and_processor(run: Path) -> None:
    make_run(run).close()
    written = json.loads((run / "environment.json").read_text())
    assert written["python"].startswith("3.")
    assert written["num_usable_cpus"] >= 1
    assert written["packages"]["pyarrow"] == pa.__version__
