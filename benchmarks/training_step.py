"""An optimizer step of a training group, over the same DeepSpeed step without our code.

The plain side is a DeepSpeed script in two processes of their own: the same model, optimizer, ZeRO stage, clipping,
threads and niceness, the same pairs in the same micro-batches, padded beforehand and kept in memory; a step is forward,
DPO loss, backward, step. Our side is a whole `update` without its reference log-probs: laying out and padding, metrics
over all ranks, reports, Ray's calls. Both train on from round to round, and their losses must agree: it is the same
work.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from actors.chat import load_tokenizer
from benchmarks.figure import Figure, in_turns
from benchmarks.plain_process import PlainProcess, worker_niceness
from trainers.base_model import BaseModelConfig, write_base_model
from trainers.batches import TrainingPlan, micro_batches
from trainers.losses.dpo import Config as DpoConfig
from trainers.rows.pairs import PairRows, pair_rows
from trainers.run_config import RunConfig
from trainers.training_group import ModelSource, TrainingConfig, TrainingGroup

LOSS_TOLERANCE = 1e-3
"""Relative: fp32 sums in another order, over some hundred steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What both sides train."""

    model: str
    training: TrainingConfig
    loss: DpoConfig
    plan: TrainingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What one rank's round took and came to."""

    seconds: float
    last_loss: float
    """This rank's share."""


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figure; Ray runs."""
    run = RunConfig()
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        model = write_base_model(Path(folder) / "model", BaseModelConfig(), seed=0)
        table = made_up_pairs(32 if quick else 160, num_tokens=len(load_tokenizer(model)))
        setting = Setting(
            model=str(model),
            training=run.learner.training.model_copy(update={"cpus_per_rank": 0.1}),
            loss=DpoConfig(nll_weight=10.0),
            plan=TrainingPlan.of(
                [str(pair_id) for pair_id in table.column("pair_id").to_pylist()],
                batch_size=run.learner.training.batch_size,
                epochs=2,
                seed=0,
            ),
        )
        group = TrainingGroup(config=setting.training, source=ModelSource(path=setting.model), name="bench")
        niceness = worker_niceness()
        plain = [
            PlainProcess(environment=_rank_environment(rank, setting.training), niceness=niceness)
            for rank in range(setting.training.num_ranks)
        ]
        try:
            meeting = str(Path(folder) / "meeting")
            await asyncio.gather(
                group.start(), *(p.start(open_rank, setting, meeting, rank) for rank, p in enumerate(plain))
            )
            return [await _measure(group, plain, setting=setting, table=table, quick=quick)]
        finally:
            for process in plain:
                process.close()
            await group.shutdown()


async def _measure(
    group: TrainingGroup, plain: Sequence[PlainProcess], *, setting: Setting, table: pa.Table, quick: bool
) -> Figure:
    num_steps = len(setting.plan.steps)
    losses: dict[str, float] = {}

    async def ours() -> float:
        report = await group.update(table, loss="dpo", loss_config=setting.loss, plan=setting.plan)
        losses["ours"] = report.steps[-1].loss
        return (report.wall_s - report.reference_s) / num_steps

    async def without_us() -> float:
        await asyncio.gather(*(process.call(prepare, table) for process in plain))
        trained: list[Trained] = await asyncio.gather(*(process.call(train) for process in plain))
        losses["plain"] = sum(rank.last_loss for rank in trained)
        return max(rank.seconds for rank in trained) / num_steps

    rounds = await in_turns(ours, without_us, num_rounds=2 if quick else 10, num_warm=2)
    if abs(losses["ours"] - losses["plain"]) > LOSS_TOLERANCE * abs(losses["plain"]):
        raise RuntimeError(f"the two sides have not done the same work: their last losses are {losses}")
    return Figure.of(
        "training_step",
        "training-group step ÷ the same DeepSpeed step without our code",
        rounds.ratios,
        at_most=1.05,
        details={**rounds.medians("s_per_step"), "last_loss": losses["plain"]},
    )


DEMO_LENGTHS = (7, 11), (22, 34), (8, 28)
"""Least and most tokens of a prompt, a chosen and a rejected response."""


def made_up_pairs(num: int, *, num_tokens: int, lengths: Sequence[tuple[int, int]] = DEMO_LENGTHS) -> pa.Table:
    """Return pairs of random tokens: `lengths` are the least and most of prompts, chosen and rejected responses."""
    rng = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(num_tokens) for _ in range(rng.randint(least, most))]

    return pa.table(
        {
            "pair_id": [f"p{number:05d}" for number in range(num)],
            "prompt_token_ids": [ids(*lengths[0]) for _ in range(num)],
            "chosen_token_ids": [ids(*lengths[1]) for _ in range(num)],
            "rejected_token_ids": [ids(*lengths[2]) for _ in range(num)],
        }
    )


def _rank_environment(rank: int, training: TrainingConfig) -> dict[str, str]:
    threads = str(training.threads_per_rank)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(training.num_ranks),
        "LOCAL_RANK": "0",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }


# --------------------------------------------------------------------------------------- in the plain processes


@dataclass(slots=True, kw_only=True)
class PlainRank:
    """One rank of a DeepSpeed script."""

    engine: Any
    setting: Setting
    rank: int
    steps: list[Batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step's pairs on one rank, ready for the model; the demo's steps have one micro-batch."""

    passes: tuple[tuple[Tensor, Tensor, Tensor], ...]
    """For each forward pass [P, T] token ids, [P, T - 1] targets, [P] positions in chosen block + rejected block."""
    reference: Tensor
    """[2B]: the log-probs of the chosen, then of the rejected, by the weights at the round's start."""
    num_pairs: int
    """Of the step, over all ranks."""
    num_chosen_tokens: int


def open_rank(setting: Setting, meeting: str, rank: int) -> PlainRank:
    """Meet the other rank and make the engine."""
    torch.set_num_threads(setting.training.threads_per_rank)
    import deepspeed
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    # Else DeepSpeed compiles an operator that training never uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    training = setting.training
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=training.num_ranks)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32, local_files_only=True)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.epsilon,
        weight_decay=training.weight_decay,
        fused=True,
    )
    bucket = sum(parameter.numel() for parameter in model.parameters())
    config = {
        "train_batch_size": training.num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": training.max_grad_norm,
        "zero_optimization": {
            "stage": training.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
        },
        "steps_per_print": 1_000_000_000,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return PlainRank(engine=engine, setting=setting, rank=rank, steps=[])


def prepare(held: PlainRank, table: pa.Table) -> None:
    """Pad the round's batches and compute the reference's log-probs with the weights as they are now."""
    rows = pair_rows(table)
    held.steps = [_batch(held, rows, planned.rows) for planned in held.setting.plan.steps]


def train(held: PlainRank) -> Trained:
    """Make the round's steps."""
    settings, num_ranks = held.setting.loss, held.setting.training.num_ranks
    engine = held.engine
    engine.train()
    torch.distributed.barrier()
    begin = time.perf_counter()
    loss = torch.zeros(())
    for batch in held.steps:
        chosen, rejected = _sums(engine, batch.passes).chunk(2)
        delta = (chosen - rejected) - (batch.reference[: len(chosen)] - batch.reference[len(chosen) :])
        preference = torch.nn.functional.softplus(-settings.beta * delta).sum() / batch.num_pairs
        loss = preference + settings.nll_weight * -chosen.sum() / batch.num_chosen_tokens
        engine.backward(loss * num_ranks)
        engine.step()
    return Trained(seconds=time.perf_counter() - begin, last_loss=float(loss.detach()))


def _batch(held: PlainRank, rows: PairRows, chosen: Sequence[int]) -> Batch:
    training = held.setting.training
    layout = micro_batches(rows, chosen, num_ranks=training.num_ranks, micro_batch_tokens=training.micro_batch_tokens)
    [micro] = layout[held.rank]
    padded = rows.pad(micro.rows, num_passes=micro.num_passes)
    passes = tuple(
        (padded.token_ids[part, :length].contiguous(), padded.mask[part, 1:length].contiguous(), part)
        for part, length in padded.passes
    )
    with torch.no_grad():
        held.engine.eval()
        reference = _sums(held.engine, passes)
    return Batch(
        passes=passes,
        reference=reference,
        num_pairs=len(chosen),
        num_chosen_tokens=int(rows.chosen_lengths[list(chosen)].sum()),
    )


def _sums(engine: Any, passes: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return [2B] log-probs of the responses, as a plain script computes them."""
    sums = []
    for token_ids, mask, _ in passes:
        logits = engine(input_ids=token_ids, use_cache=False).logits[:, :-1]
        negative = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), token_ids[:, 1:].reshape(-1), reduction="none"
        )
        sums.append(-(negative.view(mask.shape) * mask).sum(dim=1))
    if len(passes) == 1:
        return sums[0]
    return torch.cat(sums)[torch.argsort(torch.cat([part for _, _, part in passes]))]
