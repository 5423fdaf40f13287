"""The whole loop on real engines, by the command line: killed, resumed, replayed; nothing is left behind.

The base model is bootstrapped by the first run that asks for it, on two-digit problems alone, and found in the cache
by all others of the session.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from actors.records import PreferencePair, from_table
from cluster.ray_runtime import mapped_shm, shm_files
from cluster.store import last_commit, read_log, read_stage
from trainers.run_config import read_resolved
from trainers.summary import read_metrics, read_summary
from trainers.training_group import ModelSource, TrainingGroup, TrainingPlan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_ITERATIONS, NUM_QUERIES, NUM_SAMPLES = 2, 8, 8
MARK = "ELENCHUS_SLOW_TEST"
"""An environment variable that every process of a run inherits, orphans included."""
CONFIG = f"""
[domain]
digits = [2]
out_of_distribution_digits = [3]

[base_model]
hidden_size = 64
intermediate_size = 128
num_layers = 2
num_heads = 2

[bootstrap]
steps = 500
attacker_share = 0.15
learner_share = 0.35

[attacker.sampling]
max_proposals_per_query = 40.0

[rollouts.sampling]
num_samples = {NUM_SAMPLES}

[preferences]
margin = 0.0

[learner.training]
batch_size = 2

[loop]
iterations = {NUM_ITERATIONS}
queries_per_iteration = {NUM_QUERIES}
epochs = 10

[evaluation]
sealed_per_cell = 3
probe_per_cell = 3
out_of_distribution_per_cell = 1
attack_set = 8
agreement_sample = 16

[ray]
num_cpus = 2
object_store_gb = 0.2
"""
UNTRAINED = """
[bootstrap]
steps = 10
"""


class Sitting:
    """One `elenchus.py run` or `resume` in a process group of its own."""

    def __init__(self, home: Path, *words: str) -> None:
        self._mark = f"{time.time_ns()}"
        self._output = home / f"output-{self._mark}.txt"
        environment = {**os.environ, MARK: self._mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
            environment.pop(name, None)
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(REPOSITORY / "elenchus.py"), *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=home,
                env=environment,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def end(self, *, timeout_s: float = 600.0) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(timeout=timeout_s)

    def kill_when(self, reached: Callable[[], bool], *, timeout_s: float = 600.0) -> None:
        """End the process with SIGKILL as soon as a condition holds."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, f"ended before it could be killed:\n{self.output[-3000:]}"
            assert time.monotonic() < deadline, f"the point of the kill was not reached:\n{self.output[-3000:]}"
            time.sleep(0.01)
        self.process.send_signal(signal.SIGKILL)
        assert self.process.wait(timeout=30) == -signal.SIGKILL

    def left(self) -> list[psutil.Process]:
        """Return the living processes of this sitting, its orphans included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def assert_gone(self, *, timeout_s: float) -> None:
        """Wait until no process of this sitting is left."""
        deadline = time.monotonic() + timeout_s
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.25)
        lines = [f"{process.pid} {' '.join(process.cmdline())[:120]}" for process in left]
        assert not lines, f"{len(lines)} processes outlived the driver: {lines}"

    def close(self) -> None:
        """End what a failed test left, by process id."""
        for process in self.left():
            process.kill()


@pytest.fixture(scope="module")
def home(short_tmp_path: Path) -> Path:
    """Give the directory with the configs and, once a run has trained it, the base model in runs/.cache."""
    path = short_tmp_path / "loop"
    path.mkdir()
    where = f'temp_dir = "{short_tmp_path}"\ntoken_path = "{short_tmp_path / "loop-token"}"\n'
    (path / "tiny.toml").write_text(CONFIG + where)
    (path / "untrained.toml").write_text(UNTRAINED)
    return path


@pytest.fixture
def sit(home: Path) -> Iterator[Callable[..., Sitting]]:
    """Give what starts a sitting; at the end no process and no file in /dev/shm may be left of any."""
    started: list[Sitting] = []
    shm_before = shm_files()

    def start(*words: str) -> Sitting:
        started.append(Sitting(home, *words))
        return started[-1]

    yield start
    try:
        for sitting in started:
            sitting.assert_gone(timeout_s=30.0)
        files = sorted(name for name in shm_files() - shm_before if f"/dev/shm/{name}" not in mapped_shm())
        assert not files, f"files left in /dev/shm: {files}"
    finally:
        for sitting in started:
            sitting.close()


def logged_stages(run: Path, *, iteration: int) -> list[str]:
    """Return the stage of each record in the log of an open iteration, while its driver is writing."""
    path = run / "journal" / f"iteration={iteration:06d}" / "append.log"
    try:
        payloads = read_log(path).payloads
    except FileNotFoundError:
        return []
    return [str(json.loads(payload[4 : 4 + int.from_bytes(payload[:4], "little")])["stage"]) for payload in payloads]


def finished(run: Path) -> None:
    """Check what every finished run of these tests must be."""
    commit = last_commit(run)
    assert commit is not None
    assert commit.iteration == NUM_ITERATIONS
    metrics = read_metrics(run)
    assert [row.iteration for row in metrics] == [1, 2]
    for iteration in (1, 2):
        counts = {
            stage: read_stage(run, stage, iteration=iteration).num_rows
            for stage in ("queries", "responses", "critiques", "verdicts")
        }
        answers = NUM_QUERIES * NUM_SAMPLES
        assert counts == {"queries": NUM_QUERIES, "responses": answers, "critiques": answers, "verdicts": answers}
    summary = read_summary(run)
    assert summary is not None
    # The bound of the parity probe; each publication was checked against it.
    assert summary.parity_max_abs_diff <= 1e-4
    assert summary.experts.fraction <= 0.05


def replayed(run: Path, *, target: Path) -> Path:
    """Train a fresh group on the run's committed pairs, as planned, and return the policy that it exports."""
    config = read_resolved(run / "resolved.json")
    (base,) = (run.parent / ".cache").glob("bootstrap-*")

    async def replay() -> None:
        group = TrainingGroup(name="replay", source=ModelSource(path=str(base)), config=config.learner.training)
        await group.start()
        try:
            for iteration in range(1, config.loop.iterations + 1):
                table = read_stage(run, "pairs", iteration=iteration)
                plan = TrainingPlan.of(
                    [pair.pair_id for pair in from_table(table, PreferencePair)],
                    batch_size=config.learner.training.batch_size,
                    epochs=config.loop.epochs,
                    seed=config.seed * 1_000 + iteration,
                )
                await group.update(table, loss=config.loss.kind, loss_config=config.loss, plan=plan)
            await group.export(target)
        finally:
            await group.shutdown()

    asyncio.run(replay())
    return target


def assert_same_weights(found: Path, wanted: Path) -> None:
    a, b = (load_file(path / "model.safetensors") for path in (found, wanted))
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


def run_killed_and_resumed(
    home: Path, sit: Callable[..., Sitting], *, name: str, reached: Callable[[Path], bool]
) -> Path:
    run = home / "runs" / name
    sitting = sit("run", "tiny.toml", "--name", name)
    sitting.kill_when(lambda: reached(run))
    # Ray's own processes notice that their driver is gone.
    sitting.assert_gone(timeout_s=60.0)
    commit = last_commit(run)
    assert commit is not None
    assert commit.iteration == 0, "the kill came too late: iteration 1 was committed"
    resumed = sit("resume", name)
    assert resumed.end() == 0, resumed.output[-3000:]
    finished(run)
    return run


def test_a_run_killed_among_the_critiques_resumes_and_replays(
    home: Path, sit: Callable[..., Sitting], ray_session: str, tmp_path: Path
) -> None:
    kept: list[str] = []

    def reached(run: Path) -> bool:
        kept[:] = logged_stages(run, iteration=1)
        return "critiques" in kept and "verdicts" not in kept

    run = run_killed_and_resumed(home, sit, name="among-critiques", reached=reached)
    assert "verdicts" not in kept
    assert sum(row.pairs_trained for row in read_metrics(run)) > 0, "no pair, so nothing was trained"
    assert_same_weights(replayed(run, target=tmp_path / "replayed"), run / "policies" / "v000002")


def test_a_run_killed_in_training_resumes_and_replays(
    home: Path, sit: Callable[..., Sitting], ray_session: str, tmp_path: Path
) -> None:
    seen: list[float] = []

    def reached(run: Path) -> bool:
        # Training has no record of its own: half a second after the pairs it is under way.
        if "pairs" in logged_stages(run, iteration=1):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] > 0.5

    run = run_killed_and_resumed(home, sit, name="in-training", reached=reached)
    assert_same_weights(replayed(run, target=tmp_path / "replayed"), run / "policies" / "v000002")


def test_an_attacker_that_was_hardly_trained_ends_the_run_with_one_clear_line(
    home: Path, sit: Callable[..., Sitting]
) -> None:
    sitting = sit("run", "tiny.toml", "untrained.toml", "--name", "untrained")
    assert sitting.end() == 1
    (line,) = [line for line in sitting.output.splitlines() if "AttackCollapsed" in line]
    assert "proposals were usable in iteration 0, wanted 8 queries; train the attacker longer" in line
    assert last_commit(home / "runs" / "untrained") is None
