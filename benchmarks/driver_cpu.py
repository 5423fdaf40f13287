"""CPU time of the driver's process per sample, with engines and learner replaced by instant fakes.

Everything in the driver's process is real: the loop, three pools with their routing, Ray's client and its threads, the
roles, the rubric, the journal with its Arrow tables, commits. The replicas are Ray actors in processes of their own
that answer at once with what the tests' fake roles write (whose CPU time is not counted), sixteen samples at a time;
the learner group has done at once what it is asked for. A sample is one answer of the learner: its query, critique,
verdict and pair are counted with it, and so is its share of publishing, evaluating and committing. Each iteration is a
round; the first is warm-up, and the last is left out with the final evaluation.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.figure import Figure
from benchmarks.instant_loop import run_loop
from trainers.progress import Silent
from trainers.run_config import load_run_config
from trainers.summary import IterationMetrics


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figure; Ray runs."""
    config = load_run_config([], flags=[("loss.kind", "dpo")])
    num_queries = 8 if quick else config.loop.queries_per_iteration
    clock = IterationClock()
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        await run_loop(
            config,
            Path(folder) / "run",
            progress=clock,
            num_queries=num_queries,
            num_iterations=4 if quick else 8,
        )
    num_samples = num_queries * config.rollouts.sampling.num_samples
    milliseconds = [1e3 * seconds / num_samples for seconds in clock.cpu_s[1:-1]]
    return [
        Figure.of(
            "driver_cpu",
            "driver CPU per sample, instant engines and learner",
            milliseconds,
            at_most=0.3,
            unit="ms",
            details={"samples_per_iteration": num_samples},
        )
    ]


class IterationClock(Silent):
    """Takes the driver's CPU time at the end of every iteration."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []
        """Of each iteration; iteration 0's evaluation is in the first."""
        self._last = time.process_time()

    def row(self, metrics: IterationMetrics) -> None:
        """Note what the iteration took; all threads of the process count."""
        now = time.process_time()
        self.cpu_s.append(now - self._last)
        self._last = now
