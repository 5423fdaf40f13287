"""Ten times as many clients as the endpoint takes: what is answered meanwhile, what the others are told, and memory.

    .venv/bin/python -m benchmarks.serve_overload [--quick]

The peak is what `AT_ONCE` clients get who ask without pause, as many samples as are taken at once. Then ten times as
many ask, who come back after the Retry-After that they are told. Clients run in this process, on the same cores; they
are plain sockets, and what they cost is told: CPU seconds of this process for each of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from actors.engine_config import EngineConfig
from benchmarks.figure import Figure, table
from benchmarks.serve_run import free_port, make_run
from serve.auth import add_key
from serve.front import front_environment
from serve.learner_app import ServingConfig, start_serving
from trainers.base_model import BaseModelConfig

AT_ONCE = 32
TIMES = 10
BODY = {"model": "learner", "messages": [{"role": "user", "content": "347+586"}], "max_tokens": 32}
SHAPE = BaseModelConfig(hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=8)
CONFIG = ServingConfig(max_open_samples=AT_ONCE)


SETTLE_S = 2.0
"""All clients knock at once when a window begins; counting begins so much later, at the peak and in the flood."""


@dataclass(slots=True)
class Window:
    """What came back in one window."""

    statuses: Counter[int] = field(default_factory=Counter)
    cpu_share: float = 0.0
    """CPU seconds of the clients for each second."""
    missing_retry_after: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where clients ask, and with what."""

    host: str
    port: int
    request: bytes

    @classmethod
    def of(cls, url: str, key: str) -> Target:
        """Return the target of an endpoint's URL."""
        parts, body = urlsplit(url), json.dumps(BODY).encode()
        head = (
            f"POST {parts.path}/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        assert parts.hostname is not None, "an endpoint has one"
        assert parts.port is not None, "and a port"
        return cls(host=parts.hostname, port=parts.port, request=head.encode() + body)


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figures; Ray runs, with the front's variables in its environment."""
    seconds = 2.0 if quick else 15.0
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        run = make_run(Path(folder) / "overload", SHAPE)
        _, key = add_key(run, label="bench", requests_per_minute=10**9, max_concurrent=10**6)
        engine = EngineConfig(model=str(run / "policies" / "v000000"), max_num_seqs=AT_ONCE, kv_cache_gb=0.2)
        config = CONFIG.model_copy(update={"port": free_port()})
        serving = await asyncio.to_thread(start_serving, run, config, engine=engine, parity_bound=1e-3)
        try:
            target = Target.of(serving.url, key)
            await _ask(target, num_clients=AT_ONCE, seconds=seconds / 4)
            peaks, floods, memory = [], [], []
            for _ in range(2 if quick else 4):
                peaks.append(await _ask(target, num_clients=AT_ONCE, seconds=seconds))
                before = _memory_mb()
                floods.append(await _ask(target, num_clients=AT_ONCE * TIMES, seconds=seconds))
                memory.append(_memory_mb() - before)
        finally:
            await asyncio.to_thread(serving.stop)
    told = sum((flood.statuses for flood in floods), Counter[int]())
    others = sum(number for status, number in told.items() if status not in (200, 429, 503))
    others += sum(flood.missing_retry_after for flood in floods)
    pairs = list(zip(floods, peaks, strict=True))
    return [
        Figure.of(
            "serve_goodput",
            f"answers under {TIMES} × the load ÷ answers at the peak",
            [flood.statuses[200] / max(1, peak.statuses[200]) for flood, peak in pairs],
            at_least=0.9,
            details={
                **{f"status_{status}": float(n) for status, n in sorted(told.items())},
                "peak_per_s": sum(peak.statuses[200] for peak in peaks) / len(peaks) / seconds,
                "memory_first_mb": memory[0],
                "memory_last_mb": memory[-1],
                "clients_cpu_peak": max(peak.cpu_share for peak in peaks),
                "clients_cpu_flood": max(flood.cpu_share for flood in floods),
            },
        ),
        Figure.of(
            "serve_other_statuses",
            "answers under the load that are not 200, 429 or 503 with Retry-After",
            [float(others)],
            at_most=0.0,
        ),
    ]


async def _ask(target: Target, *, num_clients: int, seconds: float) -> Window:
    """Return what came within the time, after a while in which everybody has come."""
    found = Window()
    counts_from = time.monotonic() + SETTLE_S
    ends_by = counts_from + seconds

    async def ask() -> None:
        reader, writer = await asyncio.open_connection(target.host, target.port)
        try:
            while (now := time.monotonic()) < ends_by:
                writer.write(target.request)
                status, headers = await _response(reader)
                if counts_from < (now := time.monotonic()) < ends_by:
                    found.statuses[status] += 1
                if status != 200:
                    found.missing_retry_after += "retry-after" not in headers
                    wait_s = float(headers.get("retry-after", "1"))
                    await asyncio.sleep(min(wait_s, max(0.0, ends_by - now)))
        finally:
            writer.close()

    begin, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*(ask() for _ in range(num_clients)))
    found.cpu_share = (time.process_time() - cpu) / (time.monotonic() - begin)
    return found


async def _response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Return the status and the headers of a response, whose body is read."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    first, *lines = head.split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if line)
    await reader.readexactly(int(headers["content-length"]))
    return int(first.split()[1]), headers


def _memory_mb() -> float:
    """Return the resident memory of all processes below this one."""
    children = psutil.Process().children(recursive=True)
    return sum(child.memory_info().rss for child in children if child.is_running()) / 1e6


def on_its_own_ray(*, quick: bool) -> list[Figure]:
    """Return the figures, on a Ray whose proxies take as many as the benchmark says."""
    from cluster.ray_runtime import RayConfig, start_ray

    before = {name: os.environ.get(name) for name in front_environment(CONFIG)}
    os.environ.update(front_environment(CONFIG))
    runtime = start_ray(RayConfig(object_store_gb=0.5))
    try:
        return asyncio.run(measure(quick=quick))
    finally:
        runtime.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main() -> int:
    """Measure, and print the table."""

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small form, which only shows that it runs")
    said = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    figures = on_its_own_ray(quick=said.quick)
    print(table(figures))
    for figure in figures:
        print(figure.name, {name: round(value, 4) for name, value in figure.details.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
