"""What an answer costs through the endpoint over the same vLLM engine without it, on a model of 125M parameters.

    .venv/bin/python -m benchmarks.serve_speed [--quick]

The plain side is a process of its own with vLLM's LLMEngine, the same settings, prompts and lengths; what is on top
here is HTTP, key, limits, JSON, tokens of the chat, Ray Serve's proxy and two hops, and text. In turns: one request
alone (seconds), then 64 at once (tokens per second). Details have what a client sees: p50 and p99 of the 64, requests
per second, and the time to the first token of a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np

from actors.chat import encode_chat, load_tokenizer
from actors.engine import engine_environment
from actors.engine_config import EngineConfig
from actors.generation import sample_seed
from actors.records import Message
from benchmarks.figure import Figure, in_turns, table
from benchmarks.plain_process import PlainProcess, worker_niceness
from benchmarks.pool_speed import Prompt, Spoken, generate, open_engine
from benchmarks.serve_run import LARGE, free_port, make_run
from serve.auth import add_key
from serve.learner_app import ServingConfig, start_serving
from trainers.base_model import BaseModelConfig

AT_ONCE = 64
NUM_TOKENS = 32
PARITY_BOUND = 1e-3
"""Nats; the demo's 1e-4 is for a model a hundred times smaller."""
QUESTION = "Compute 4711 + 1147 and write every step."
MESSAGES = [{"role": "user", "content": QUESTION}]


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figures; Ray runs."""
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        run = make_run(Path(folder) / "speed", BaseModelConfig() if quick else LARGE)
        model = run / "policies" / "v000000"
        _, key = add_key(run, label="bench", requests_per_minute=10**9, max_concurrent=10**6)
        engine = EngineConfig(model=str(model), max_num_seqs=AT_ONCE, kv_cache_gb=0.5)
        plain = PlainProcess(environment=engine_environment(engine), niceness=worker_niceness())
        config = ServingConfig(port=free_port())
        serving = await asyncio.to_thread(start_serving, run, config, engine=engine, parity_bound=PARITY_BOUND)
        try:
            await plain.start(open_engine, engine)
            async with httpx.AsyncClient(
                base_url=serving.url, headers={"authorization": f"Bearer {key}"}, timeout=600.0
            ) as client:
                return await _figures(client, plain, prompt=_prompt(model), quick=quick)
        finally:
            plain.close()
            await asyncio.to_thread(serving.stop)


async def _figures(client: httpx.AsyncClient, plain: PlainProcess, *, prompt: Prompt, quick: bool) -> list[Figure]:
    latencies: list[float] = []
    # Of the same seed both sides draw the same answer. One that has its full length:
    full = 0
    while (await plain.call(generate, [_seeded(prompt, full)])).num_tokens < NUM_TOKENS:
        full += 1

    async def one(seed: int) -> tuple[float, int]:
        begin = time.perf_counter()
        body = {"model": "learner", "messages": MESSAGES, "max_tokens": NUM_TOKENS, "seed": seed}
        answer = (await client.post("/chat/completions", json=body)).raise_for_status().json()
        return time.perf_counter() - begin, int(answer["usage"]["completion_tokens"])

    async def alone() -> float:
        seconds, num_tokens = await one(full)
        return seconds / num_tokens

    async def plain_alone() -> float:
        spoken: Spoken = await plain.call(generate, [_seeded(prompt, full)])
        return spoken.seconds / spoken.num_tokens

    async def together() -> float:
        begin = time.perf_counter()
        done = await asyncio.gather(*(one(seed) for seed in range(AT_ONCE)))
        seconds = time.perf_counter() - begin
        latencies.extend(took for took, _ in done)
        return sum(num for _, num in done) / seconds

    async def plain_together() -> float:
        spoken: Spoken = await plain.call(generate, [_seeded(prompt, seed) for seed in range(AT_ONCE)])
        return spoken.num_tokens / spoken.seconds

    single = await in_turns(alone, plain_alone, num_rounds=2 if quick else 12)
    many = await in_turns(together, plain_together, num_rounds=2 if quick else 4, num_warm=1)
    first = [await _first_token_s(client) for _ in range(2 if quick else 12)]
    seen = latencies[AT_ONCE:]
    return [
        Figure.of(
            "serve_latency",
            "seconds per token of one request through the endpoint ÷ the engine alone",
            single.ratios,
            at_most=1.15,
            details={
                **{name: value * NUM_TOKENS for name, value in single.medians("s").items()},
                "first_token_s": float(np.median(first)),
            },
        ),
        Figure.of(
            "serve_throughput",
            f"tokens/s of {AT_ONCE} requests at once through the endpoint ÷ the engine alone",
            many.ratios,
            at_least=0.9,
            details={
                **many.medians("tokens_per_s"),
                "p50_s": float(np.quantile(seen, 0.5)),
                "p99_s": float(np.quantile(seen, 0.99)),
                "requests_per_s": float(np.median(many.ours)) / NUM_TOKENS,
            },
        ),
    ]


async def _first_token_s(client: httpx.AsyncClient) -> float:
    body = {"model": "learner", "messages": MESSAGES, "max_tokens": 8, "stream": True}
    begin = time.perf_counter()
    async with client.stream("POST", "/chat/completions", json=body) as response:
        async for _ in response.aiter_bytes():
            return time.perf_counter() - begin
    raise RuntimeError("the stream had no event")


def _prompt(model: Path) -> Prompt:
    token_ids = encode_chat(load_tokenizer(model), (Message(role="user", content=QUESTION),))
    return Prompt(token_ids=token_ids, seed=0, max_tokens=NUM_TOKENS, temperature=1.0, top_p=1.0)


def _seeded(prompt: Prompt, seed: int) -> Prompt:
    """Return the prompt with the seed that the endpoint gives to the first choice of a request with this one."""
    return replace(prompt, seed=sample_seed(seed, sample_index=0))


def main() -> int:
    """Measure, and print the table."""
    from cluster.ray_runtime import RayConfig, start_ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small form, which only shows that it runs")
    said = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    load_before = os.getloadavg()[0]
    runtime = start_ray(RayConfig(object_store_gb=1.5))
    try:
        figures = asyncio.run(measure(quick=said.quick))
    finally:
        runtime.stop()
    print(table(figures))
    for figure in figures:
        print(figure.name, {name: round(value, 4) for name, value in figure.details.items()})
    print(f"load before: {load_before:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
