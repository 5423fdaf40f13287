"""How much of an iteration's wall-clock time is its longest stage, and what more replicas add: the driver's own share.

Rollouts and updates are sleeps under the real driver, pools and journal (benchmarks/instant_loop.py), so whatever is
longer than the longest sleep is the loop's own making. `overlap_age_1` lets samples be one version old, so an iteration
is sampled while the one before it is learnt; `overlap_age_0` stands beside it as the control, where both add up.

The pools of `pool_scaling_*` have replicas that keep sixteen requests for a second, then the next sixteen: N of them
should answer N times as many per second as one. The wall-clock times of pools of one and of N are taken in turns. All
replicas are processes of this machine: beside their sleeps they, too, need its cores.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from actors.generation import Completion, GenerationRequest
from actors.records import Message
from benchmarks.figure import Figure, in_turns
from benchmarks.instant_loop import answer, instant_pool, run_loop
from cluster.pool import Pool
from trainers.progress import Silent
from trainers.run_config import RunConfig
from trainers.summary import IterationMetrics

BATCH = 16
"""Requests that a sleeping replica holds at a time; as many more wait there for their turn, as they do at an engine."""


class Rows(Silent):
    """Keeps the rows of the iterations."""

    def __init__(self) -> None:
        self.rows: list[IterationMetrics] = []

    def row(self, metrics: IterationMetrics) -> None:
        """Keep one."""
        self.rows.append(metrics)


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figures; Ray runs."""
    figures = [await _overlap(age, quick=quick) for age in (1, 0)]
    for num_replicas, target in ((2, 0.95),) if quick else ((16, 0.95), (64, 0.90)):
        figures.append(await _scaling(num_replicas, target=target, quick=quick))
    return figures


async def _overlap(age: int, *, quick: bool) -> Figure:
    rollout_s, update_s = (0.3, 0.2) if quick else (4.0, 3.0)
    shares, seconds = [], {}
    for _ in range(2 if quick else 3):
        rows = await _run(age, rollout_s=rollout_s, update_s=update_s, quick=quick)
        # Of the first iteration nothing can overlap, and beside the last nothing is sampled any more.
        kept = rows[1:-1]
        shares.append(sum(max(row.seconds.values()) for row in kept) / sum(row.wall_s for row in kept))
        seconds = {f"{name}_s": sum(row.seconds[name] for row in kept) / len(kept) for name in kept[0].seconds}
        seconds["iteration_s"] = sum(row.wall_s for row in kept) / len(kept)
    return Figure.of(
        f"overlap_age_{age}",
        f"longest stage ÷ iteration, samples at most {age} version{'' if age == 1 else 's'} old",
        shares,
        at_least=0.95 if age else 0.5,
        details=seconds,
    )


async def _run(age: int, *, rollout_s: float, update_s: float, quick: bool) -> list[IterationMetrics]:
    config, rows = RunConfig(), Rows()
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        await run_loop(
            config,
            Path(folder) / "run",
            progress=rows,
            num_queries=8 if quick else config.loop.queries_per_iteration,
            num_iterations=4 if quick else 6,
            max_policy_age=age,
            rollout_s=rollout_s,
            update_s=update_s,
        )
    return rows.rows


async def _scaling(num_replicas: int, *, target: float, quick: bool) -> Figure:
    hold_s, num_waves = (0.2, 2) if quick else (1.0, 8)
    one = instant_pool("one", answer, sleep_s=hold_s, max_batch=BATCH)
    many = instant_pool("many", answer, sleep_s=hold_s, num_replicas=num_replicas, max_batch=BATCH)
    try:
        await one.start()
        await many.start()

        async def seconds(pool: Pool[GenerationRequest, Completion], *, size: int) -> float:
            requests = [_request(i) for i in range(size * BATCH * num_waves)]
            begin = time.monotonic()
            num = 0
            async for chunk in pool.route(requests):
                num += len(chunk)
            assert num == len(requests), "every request is answered"
            return time.monotonic() - begin

        rounds = await in_turns(
            lambda: seconds(one, size=1),
            lambda: seconds(many, size=num_replicas),
            num_rounds=2 if quick else 5,
            num_warm=1,
        )
    finally:
        await one.shutdown()
        await many.shutdown()
    return Figure.of(
        f"pool_scaling_{num_replicas}",
        f"samples/s of {num_replicas} sleeping replicas ÷ {num_replicas} × those of one",
        rounds.ratios,
        at_least=target,
        details=rounds.medians("s"),
    )


def _request(number: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"r{number}",
        messages=(Message(role="user", content=f"{100 + number % 900}+{100 + number // 900}"),),
        max_tokens=16,
        seed=number,
    )
