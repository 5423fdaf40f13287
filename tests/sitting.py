"""Owns what the tests of whole runs share: a tiny config, and one sitting of the command line in a process of its own.

The base model is bootstrapped by the first run that asks for it, on two-digit problems alone, and found in the cache
by all others of the session.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.commits import last_commit
from cluster.store import read_stage
from trainers.summary import read_metrics, read_summary

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
steps = 1000
attacker_share = 0.08
learner_share = 0.15

[attacker.sampling]
max_proposals_per_query = 40.0

[rollouts.sampling]
num_samples = {NUM_SAMPLES}

[preferences]
margin = 0.0

[loss]
kind = "dpo"
nll_weight = 10.0

[learner.training]
batch_size = 2
learning_rate = 3e-5

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
num_chunks = 5
"""


class Sitting:
    """One `elenchus.py run` or `resume` in a process group of its own, which may end itself at a point."""

    def __init__(self, home: Path, *words: str, killed: str | None = None) -> None:
        self._mark = f"{time.time_ns()}"
        self._output = home / f"output-{self._mark}.txt"
        program = [str(REPOSITORY / "elenchus.py")] if killed is None else ["-m", "tests.killed_sitting", killed]
        environment = {**os.environ, MARK: self._mark, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = str(REPOSITORY)
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
            environment.pop(name, None)
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program, *words],
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
        lines = []
        for process in left:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                lines.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
        assert not lines, f"{len(lines)} processes outlived the driver: {lines}"

    def close(self) -> None:
        """End what a failed test left, by process id."""
        for process in self.left():
            process.kill()


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
