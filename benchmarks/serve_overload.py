"""Ten times as many clients as the endpoint takes: what is answered meanwhile, what the others are told, and memory.

    .venv/bin/python -m benchmarks.serve_overload [--quick]

The peak is what `AT_ONCE` clients get who ask without pause, as many samples as are taken at once. Then ten times as
many ask, who come back after the Retry-After that they are told. Clients run in this process, on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

from actors.engine_config import EngineConfig
from benchmarks.figure import Figure
from benchmarks.serve_run import make_run
from benchmarks.serve_speed import free_port
from serve.auth import add_key
from serve.learner_app import ServingConfig, start_serving
from trainers.base_model import BaseModelConfig

AT_ONCE = 32
TIMES = 10
BODY = {"model": "learner", "messages": [{"role": "user", "content": "347+586"}], "max_tokens": 32}
SHAPE = BaseModelConfig(hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=8)


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figures; Ray runs."""
    seconds = 2.0 if quick else 15.0
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        run = make_run(Path(folder) / "overload", SHAPE)
        _, key = add_key(run, label="bench", requests_per_minute=10**9, max_concurrent=10**6)
        engine = EngineConfig(model=str(run / "policies" / "v000000"), max_num_seqs=AT_ONCE, kv_cache_gb=0.2)
        config = ServingConfig(port=free_port(), max_open_samples=AT_ONCE)
        serving = await asyncio.to_thread(start_serving, run, config, engine=engine, parity_bound=1e-3)
        try:
            limits = httpx.Limits(max_connections=None)
            headers = {"authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(base_url=serving.url, headers=headers, limits=limits, timeout=300.0) as client:
                await _ask(client, num_clients=AT_ONCE, seconds=seconds / 4)
                ratios, told, memory = [], Counter[int](), []
                for _ in range(2 if quick else 4):
                    peak = await _ask(client, num_clients=AT_ONCE, seconds=seconds)
                    before = _memory_mb()
                    flood = await _ask(client, num_clients=AT_ONCE * TIMES, seconds=seconds)
                    memory.append(_memory_mb() - before)
                    ratios.append(flood[200] / max(1, peak[200]))
                    told.update(flood)
        finally:
            await asyncio.to_thread(serving.stop)
    others = sum(number for status, number in told.items() if status not in (200, 429, 503))
    return [
        Figure.of(
            "serve_goodput",
            f"answers under {TIMES} × the load ÷ answers at the peak",
            ratios,
            at_least=0.9,
            details={**{f"status_{status}": float(n) for status, n in sorted(told.items())}, "memory_mb": max(memory)},
        ),
        Figure.of("serve_other_statuses", "answers that are not 200, 429 or 503", [float(others)], at_most=0.0),
    ]


async def _ask(client: httpx.AsyncClient, *, num_clients: int, seconds: float) -> Counter[int]:
    """Return how many answers of which status came within the time."""
    found: Counter[int] = Counter()
    ends_by = time.monotonic() + seconds

    async def ask() -> None:
        while time.monotonic() < ends_by:
            response = await client.post("/chat/completions", json=BODY)
            if time.monotonic() < ends_by:
                found[response.status_code] += 1
            if response.status_code != 200:
                await asyncio.sleep(float(response.headers.get("retry-after", "1")))

    await asyncio.gather(*(ask() for _ in range(num_clients)))
    return found


def _memory_mb() -> float:
    """Return the resident memory of all processes below this one."""
    children = psutil.Process().children(recursive=True)
    return sum(child.memory_info().rss for child in children if child.is_running()) / 1e6


def main() -> int:
    """Measure, and print the table."""
    from benchmarks.bench import table
    from cluster.ray_runtime import RayConfig, start_ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small form, which only shows that it runs")
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
