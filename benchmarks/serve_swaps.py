"""A hundred new versions under load: requests that failed, and how long a version takes to every replica.

    .venv/bin/python -m benchmarks.serve_swaps [--quick]

Two replicas of the demo's model, eight clients that ask without pause, a commit as soon as both replicas hold the one
before. Every answer's spans must cover it without a gap and name versions that were committed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray

from actors.engine_config import EngineConfig
from benchmarks.figure import Figure, table
from benchmarks.serve_run import commit, free_port, make_run
from serve.auth import add_key
from serve.learner_app import ServingConfig, start_serving
from trainers.base_model import BaseModelConfig

NUM_CLIENTS = 8
BODY = {"model": "learner", "messages": [{"role": "user", "content": "347+586"}], "max_tokens": 32}
LONGEST_SWAP_S = 120.0


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figures; Ray runs."""
    num_swaps = 3 if quick else 100
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        run = make_run(Path(folder) / "swaps", BaseModelConfig())
        _, key = add_key(run, label="bench", requests_per_minute=10**9, max_concurrent=10**6)
        engine = EngineConfig(model=str(run / "policies" / "v000000"), max_num_seqs=64, kv_cache_gb=0.1)
        config = ServingConfig(port=free_port(), min_replicas=2, max_replicas=2)
        serving = await asyncio.to_thread(start_serving, run, config, engine=engine, parity_bound=1e-4)
        try:
            publisher = ray.get_actor(serving.publisher)
            async with httpx.AsyncClient(
                base_url=serving.url, headers={"authorization": f"Bearer {key}"}, timeout=120.0
            ) as client:
                return await _swaps(run, publisher, client, num_swaps=num_swaps)
        finally:
            await asyncio.to_thread(serving.stop)


async def _swaps(run: Path, publisher: Any, client: httpx.AsyncClient, *, num_swaps: int) -> list[Figure]:
    statuses: Counter[str] = Counter()
    versions: Counter[str] = Counter()
    num_mixed = 0
    is_over = asyncio.Event()

    async def ask() -> None:
        nonlocal num_mixed
        while not is_over.is_set():
            try:
                response = await client.post("/chat/completions", json=BODY)
            except httpx.TransportError as error:
                statuses[type(error).__name__] += 1
                continue
            statuses[str(response.status_code)] += 1
            if response.status_code == 200:
                for choice in response.json()["choices"]:
                    spans = choice["weight_spans"]
                    if spans[0]["start"] or any(a["end"] != b["start"] for a, b in pairwise(spans)):
                        raise RuntimeError(f"spans with a gap: {spans}")
                    versions.update(span["version"] for span in spans)
                    num_mixed += len(spans) > 1

    clients = [asyncio.create_task(ask()) for _ in range(NUM_CLIENTS)]
    seconds: list[float] = []
    try:
        for number in range(1, num_swaps + 1):
            version = await asyncio.to_thread(commit, run, number)
            begin = time.perf_counter()
            async with asyncio.timeout(LONGEST_SWAP_S):
                while list((await publisher.holding.remote()).values()) != [version] * 2:
                    await asyncio.sleep(0.02)
            seconds.append(time.perf_counter() - begin)
    finally:
        is_over.set()
        await asyncio.gather(*clients)
    committed = {f"v{number}" for number in range(num_swaps + 1)}
    num_asked = sum(statuses.values())
    num_failed = num_asked - statuses["200"]
    return [
        Figure.of(
            "serve_swaps_failed",
            f"requests that failed or were dropped over {num_swaps} swaps under load, and versions never committed",
            [float(num_failed + len(set(versions) - committed))],
            at_most=0.0,
            details={
                "requests": float(num_asked),
                "versions_seen": float(len(versions)),
                "answers_of_two_versions": float(num_mixed),
            },
        ),
        Figure.of(
            "serve_swap_s",
            "from a commit until both replicas hold it and have passed its probe",
            seconds,
            at_most=5.0,
            unit="s",
            details={"p99_s": float(np.quantile(seconds, 0.99))},
        ),
    ]


def main() -> int:
    """Measure, and print the table."""
    from cluster.ray_runtime import RayConfig, start_ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three swaps, which only show that it runs")
    said = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    runtime = start_ray(RayConfig(object_store_gb=0.5))
    try:
        figures = asyncio.run(measure(quick=said.quick))
    finally:
        runtime.stop()
    print(table(figures))
    for figure in figures:
        print(figure.name, {name: round(value, 4) for name, value in figure.details.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
