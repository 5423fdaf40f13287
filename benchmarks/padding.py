"""Real tokens among those computed in training, padding included: the demo's pairs, and its bootstrap.

Nothing is timed and nothing trained: plans, layouts and padding are what the ranks compute, over rows as the demo has
them. The bootstrap's are its own demonstrations. The pairs are made by the loop itself, over the tests' fake roles: a
learner that forgets carries as the demo's does before the loop, a critic that is always right, the rubric that reads
it, and rejected answers cut at their flaws.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from actors.chat import encode_chat, load_tokenizer
from actors.domains import load_domain
from actors.domains.arithmetic import Config, write_forgetful_answer
from actors.generation import GenerationRequest
from actors.records import PreferencePair, from_table, to_table
from benchmarks.figure import Figure
from cluster.store import read_stage
from tests.fake_roles import FakeCritic, Settings, Weights, fake_run, write_blank_run
from trainers.base_model import END, BaseModelConfig, write_base_model
from trainers.batches import TrainingPlan, micro_batches
from trainers.bootstrap import demonstration_mix
from trainers.rows import Rows
from trainers.rows.documents import token_rows
from trainers.rows.pairs import pair_rows
from trainers.run_config import RunConfig
from trainers.training_config import TrainingConfig

TARGET = 0.9


def measure(*, quick: bool) -> list[Figure]:
    """Return both figures."""
    config = RunConfig()
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        model = write_base_model(Path(folder) / "model", BaseModelConfig(), seed=0)
        pairs = loop_pairs(Path(folder) / "run", model, config=config, num_queries=24 if quick else 400)
        documents = list(bootstrap_documents(model, config=config, num_steps=10 if quick else 200))
    training = config.learner.training
    plan = _plan(pairs, "pair_id", batch_size=training.batch_size, epochs=config.loop.epochs)
    of_pairs = list(shares(pair_rows(pairs), plan, training))
    of_documents: list[tuple[int, int]] = []
    for table in documents:
        plan = _plan(table, "row_id", batch_size=config.bootstrap.batch_size, epochs=1)
        of_documents += shares(token_rows(table), plan, training)
    return [
        _figure("padding_pairs", "real ÷ padded tokens, the loop's preference pairs", of_pairs),
        _figure("padding_bootstrap", "real ÷ padded tokens, the bootstrap's demonstrations", of_documents),
    ]


def loop_pairs(path: Path, model: Path, *, config: RunConfig, num_queries: int) -> pa.Table:
    """Return the pairs of an iteration over fake roles, as the ranks get them."""
    settings = Settings(
        iterations=1,
        queries_per_iteration=num_queries,
        num_samples=config.rollouts.sampling.num_samples,
        answer=forgetful,
        critic=FakeCritic(error_rate=0.0, unsure_rate=0.0),
    )
    fake_run(write_blank_run(path), settings).finish()
    tokenizer = load_tokenizer(model)
    pairs = from_table(read_stage(path, "pairs", iteration=1), PreferencePair)
    # A token is a character in the fakes' answers as in the demo's, but their prompts are stubs.
    pairs = [replace(pair, prompt_token_ids=encode_chat(tokenizer, pair.prompt)) for pair in pairs]
    return to_table(pairs, PreferencePair)


def forgetful(request: GenerationRequest, weights: Weights) -> str:
    """Return what the demo's learner answers before the loop, whose teacher forgot carries."""
    query = request.messages[-1].content
    op = "+" if "+" in query else "-"
    left, right = map(int, query.split(op))
    rate = Config().forget_rate
    return write_forgetful_answer(left, op, right, rate=rate, rng=random.Random(f"{query}/{request.seed}"))


def bootstrap_documents(model: Path, *, config: RunConfig, num_steps: int) -> Iterator[pa.Table]:
    """Yield the pieces of a bootstrap of fewer steps, its curriculum's share as in the whole, as the ranks get them."""
    domain, _ = load_domain(config.domain.kind, config.domain)
    tokenizer = load_tokenizer(model)
    end_id = tokenizer.convert_tokens_to_ids(END)
    shorter = config.bootstrap.model_copy(update={"steps": num_steps, "num_chunks": 5})
    for rows in demonstration_mix(domain, shorter, seed=config.seed):
        yield pa.table(
            {
                "row_id": [str(number) for number in range(len(rows))],
                "prompt_token_ids": [list(encode_chat(tokenizer, row.messages)) for row in rows],
                "response_token_ids": [
                    [*tokenizer.encode(row.response, add_special_tokens=False), end_id] for row in rows
                ],
            }
        )


def shares(rows: Rows, plan: TrainingPlan, training: TrainingConfig) -> Iterator[tuple[int, int]]:
    """Yield (real, padded) tokens of each step, over all ranks."""
    for step in plan.steps:
        ranks = micro_batches(
            rows, step.rows, num_ranks=training.num_ranks, micro_batch_tokens=training.micro_batch_tokens
        )
        padded = [rows.pad(micro.rows, num_passes=micro.num_passes) for rank in ranks for micro in rank]
        yield sum(part.num_real_tokens for part in padded), sum(part.num_padded_tokens for part in padded)


def _plan(table: pa.Table, column: str, *, batch_size: int, epochs: int) -> TrainingPlan:
    row_ids = [str(row_id) for row_id in table.column(column).to_pylist()]
    return TrainingPlan.of(row_ids, batch_size=batch_size, epochs=epochs, seed=0)


def _figure(name: str, what: str, steps: list[tuple[int, int]]) -> Figure:
    real, padded = np.array(steps).T
    return Figure.of(
        name,
        what,
        [float(share) for share in real / padded],
        at_least=TARGET,
        details={"all_steps": float(real.sum() / padded.sum()), "padded_tokens_per_step": float(padded.mean())},
    )
