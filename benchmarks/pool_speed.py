"""Tokens per second of a pool of one engine replica, over those of the same vLLM engine without Ray.

The plain side is a process of its own that adds all prompts, as token ids, to vLLM's LLMEngine and steps it until all
are finished. Both engines have the same settings, environment and niceness, the same prompts, seeds and sampling
parameters, and the same number of sequences in flight; only one of them computes at a time. What our side has on top
is all that a caller of a pool gets: chat templates, routing, text, log-probs, weight versions, records.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.chat import encode_chat, load_tokenizer
from actors.domains import load_domain
from actors.engine import engine_environment, make_vllm_engine, start_engine_replica
from actors.engine_config import EngineConfig
from actors.generation import Completion, GenerationRequest, sample_seed
from actors.records import Split
from benchmarks.figure import Figure, in_turns
from benchmarks.plain_process import PlainProcess, worker_niceness
from cluster.pool import Pool
from trainers.base_model import BaseModelConfig, write_base_model
from trainers.run_config import RunConfig

SAMPLES_PER_QUERY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the plain engine is asked for."""

    token_ids: tuple[int, ...]
    seed: int | None
    max_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoken:
    """What generating took and gave."""

    seconds: float
    num_tokens: int


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figure; Ray runs."""
    requests = learner_requests(num_queries=4 if quick else 64, max_tokens=8 if quick else 48)
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        model = write_base_model(Path(folder) / "model", BaseModelConfig(), seed=0)
        # The demo's model and engine; random weights seldom end an answer, so nearly all have their full length.
        engine = EngineConfig(model=str(model))
        pool = engine_pool(engine)
        plain = PlainProcess(environment=engine_environment(engine), niceness=worker_niceness())
        try:
            await pool.start()
            await plain.start(open_engine, engine)
            return [await _measure(pool, plain, requests=requests, prompts=plain_prompts(requests, model), quick=quick)]
        finally:
            plain.close()
            await pool.shutdown()


def engine_pool(engine: EngineConfig) -> Pool[GenerationRequest, Completion]:
    """Return a pool of one replica, not started yet."""
    return Pool(
        name="bench",
        start_replica=lambda number: start_engine_replica(engine, replica_id=number, num_cpus=0.2),
        num_replicas=1,
    )


async def _measure(
    pool: Pool[GenerationRequest, Completion],
    plain: PlainProcess,
    *,
    requests: Sequence[GenerationRequest],
    prompts: Sequence[Prompt],
    quick: bool,
) -> Figure:
    num_tokens: dict[str, int] = {}

    async def ours() -> float:
        begin = time.perf_counter()
        done = [completion async for chunk in pool.route(requests) for completion in chunk]
        seconds = time.perf_counter() - begin
        num_tokens["ours"] = sum(len(completion.token_ids) for completion in done)
        return num_tokens["ours"] / seconds

    async def without_ray() -> float:
        spoken: Spoken = await plain.call(generate, prompts)
        num_tokens["plain"] = spoken.num_tokens
        return spoken.num_tokens / spoken.seconds

    rounds = await in_turns(ours, without_ray, num_rounds=2 if quick else 12)
    if num_tokens["ours"] != num_tokens["plain"]:
        raise RuntimeError(f"the two sides have not made the same tokens: {num_tokens}")
    return Figure.of(
        "pool_tokens_per_s",
        "pool tokens/s ÷ the same vLLM engine without Ray",
        rounds.ratios,
        at_least=0.95,
        details={**rounds.medians("tokens_per_s"), **{f"{side}_tokens": n for side, n in num_tokens.items()}},
    )


def learner_requests(*, num_queries: int, max_tokens: int) -> list[GenerationRequest]:
    """Return what a rollout asks of the learner's pool: eight samples of each problem, each with its seed."""
    config = RunConfig().domain
    domain, _ = load_domain(config.kind, config)
    cells = domain.cells()
    problems = [
        problem
        for cell in cells
        for problem in domain.seeds(cell, split=Split.TRAIN, num=-(-num_queries // len(cells)), seed=0)
    ]
    return [
        GenerationRequest(
            request_id=f"{number}/{sample}",
            messages=domain.learner_messages(problem.text),
            max_tokens=max_tokens,
            seed=number * SAMPLES_PER_QUERY + sample,
        )
        for number, problem in enumerate(problems[:num_queries])
        for sample in range(SAMPLES_PER_QUERY)
    ]


def plain_prompts(requests: Sequence[GenerationRequest], model: Path) -> list[Prompt]:
    """Return the same requests as the plain engine takes them."""
    tokenizer = load_tokenizer(model)
    return [
        Prompt(
            token_ids=encode_chat(tokenizer, request.messages),
            seed=sample_seed(request.seed, sample_index=0),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
        )
        for request in requests
    ]


# ------------------------------------------------------------------------------------------ in the plain process


def open_engine(config: EngineConfig) -> Any:
    """Return vLLM's own LLMEngine with the settings of a replica."""
    return make_vllm_engine(config, config.base_seed)._engine


def generate(engine: Any, prompts: Sequence[Prompt]) -> Spoken:
    """Add all prompts and step the engine until all are finished."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    num_tokens = 0
    begin = time.perf_counter()
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=prompt.max_tokens,
            temperature=prompt.temperature,
            top_p=prompt.top_p,
            seed=prompt.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(number), {"type": "token", "prompt_token_ids": list(prompt.token_ids)}, params)
    while engine.has_unfinished_requests():
        num_tokens += sum(len(output.outputs[0].token_ids) for output in engine.step() if output.finished)
    return Spoken(seconds=time.perf_counter() - begin, num_tokens=num_tokens)
