"""Seconds from asking a serving pool for one more replica to that replica's first answer, less a bare engine's start.

A pool of one engine answers requests without a pause; it is asked for a second replica, and the clock stops when that
one has made its first token: placement, process, imports, the engine's start, the pool's weights and their parity probe
are in it. The other side is a plain process without Ray that imports the same, opens the same engine and makes one
token, while the first replica answers requests too. A difference, not a ratio: what a pool adds does not grow with a
model.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from actors.engine import engine_environment
from actors.engine_config import EngineConfig
from actors.generation import Completion, GenerationRequest
from benchmarks.figure import Figure, in_turns
from benchmarks.plain_process import PlainProcess, worker_niceness
from benchmarks.pool_speed import engine_pool, generate, learner_requests, open_engine, plain_prompts
from cluster.pool import Pool
from trainers.base_model import BaseModelConfig, write_base_model

LOOK_EVERY_S = 0.05


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figure; Ray runs."""
    requests = learner_requests(num_queries=2, max_tokens=16)
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        model = write_base_model(Path(folder) / "model", BaseModelConfig(), seed=0)
        engine = EngineConfig(model=str(model))
        pool = engine_pool(engine)
        prompts = plain_prompts(requests, model)[:1]
        niceness = worker_niceness()

        async def ours() -> float:
            before = set((await pool.stats()).replicas)
            begin = time.monotonic()
            await pool.scale(2)
            while not any(
                stats.num_generated_tokens
                for number, stats in (await pool.stats()).replicas.items()
                if number not in before
            ):
                await asyncio.sleep(LOOK_EVERY_S)
            seconds = time.monotonic() - begin
            await pool.scale(1)
            while (now := pool.readiness()).ready + now.leaving > 1:
                await asyncio.sleep(LOOK_EVERY_S)
            return seconds

        async def bare() -> float:
            begin = time.monotonic()
            process = PlainProcess(environment=engine_environment(engine), niceness=niceness)
            try:
                await process.start(open_engine, engine)
                await process.call(generate, prompts)
                return time.monotonic() - begin
            finally:
                process.close()

        try:
            await pool.start()
            async with _busy(pool, requests):
                rounds = await in_turns(ours, bare, num_rounds=2 if quick else 5, num_warm=1)
        finally:
            await pool.shutdown()
    differences = [a - b for a, b in zip(rounds.ours, rounds.plain, strict=True)]
    return [
        Figure.of(
            "scale_up",
            "a new replica's first answer after it was asked for - a bare engine's first token",
            differences,
            at_most=1.0,
            unit="s",
            details={**rounds.medians("s"), "worst_s": max(differences), "mean_s": statistics.fmean(differences)},
        )
    ]


@asynccontextmanager
async def _busy(pool: Pool[GenerationRequest, Completion], requests: list[GenerationRequest]) -> AsyncIterator[None]:
    """Keep a pool answering requests, one after the other, as long as the context lasts."""

    async def ask() -> None:
        number = 0
        while True:
            number += 1
            again = [replace(request, request_id=f"{number}/{request.request_id}") for request in requests]
            async for _ in pool.route(again):
                pass
            await asyncio.sleep(0.2)

    task = asyncio.create_task(ask())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
