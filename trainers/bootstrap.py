"""Owns the bootstrap: one small base model for all three roles, trained from nothing on a domain's demonstrations.

Only train problems are shown. The loss falls on a role's own tokens: what stands in a prompt (an answer that the critic
is to judge, say) is masked. The result is cached by everything that it depends on.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa

from actors.chat import encode_chat, load_tokenizer
from actors.domains import Demonstration, Domain, Role
from cluster.config import Config
from trainers.base_model import END, BaseModelConfig, BootstrapConfig, write_base_model
from trainers.base_model import cache_key as cache_key
from trainers.losses.pretraining import Config as PretrainingConfig
from trainers.progress import Progress
from trainers.training_group import ModelSource, StepReport, TrainingConfig, TrainingGroup, TrainingPlan

logger = logging.getLogger(__name__)

LOCK_POLL_S = 0.5
"""Between two looks whether another run has finished the same base model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapResult:
    """A base model and what it took."""

    model_dir: Path
    seconds: float
    """0 when it came from the cache."""
    gold: dict[str, int]
    """Demonstrations made with knowledge of the truth, by role (SCIENCE §1), those of a forgetful teacher included."""
    group: TrainingGroup | None
    """The group that trained it, still running, for whoever trains next; None when it came from the cache."""


def demonstration_mix(domain: Domain, config: BootstrapConfig, *, seed: int) -> Iterator[list[Demonstration]]:
    """Yield the bootstrap's demonstrations in chunks, roles mixed by their shares, the same for the same seed."""
    rng = random.Random(f"bootstrap/{seed}")
    per_chunk = config.steps * config.batch_size // config.num_chunks
    for chunk in range(config.num_chunks):
        easy = chunk < round(config.easy_first_share * config.num_chunks)
        num_attacker = round(per_chunk * config.attacker_share)
        num_learner = round(per_chunk * config.learner_share)
        rows = [
            *domain.demonstrations(Role.ATTACKER, rng=rng, num=num_attacker),
            *domain.demonstrations(Role.LEARNER, rng=rng, num=num_learner),
            *domain.demonstrations(Role.CRITIC, rng=rng, num=per_chunk - num_attacker - num_learner, easy=easy),
        ]
        rng.shuffle(rows)
        yield rows


async def bootstrap(
    config: BootstrapConfig,
    *,
    base_model: BaseModelConfig,
    domain: Domain,
    domain_config: Config,
    training: TrainingConfig,
    seed: int,
    cache_dir: Path,
    progress: Progress,
) -> BootstrapResult:
    """Return the base model of a config and seed, trained now or found in the cache.

    Of several runs that want the same one, the first trains it and the others wait.
    """
    key = cache_key(config, base_model=base_model, domain=domain_config, training=training, seed=seed)
    target = cache_dir / f"bootstrap-{key}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f".{target.name}.lock").open("w") as lock:
        while not _locked(lock):
            await asyncio.sleep(LOCK_POLL_S)
        if (target / "bootstrap.json").is_file():
            gold = json.loads((target / "bootstrap.json").read_text())["gold"]
            return BootstrapResult(model_dir=target, seconds=0.0, gold=gold, group=None)
        return await _train_base_model(
            config,
            base_model=base_model,
            domain=domain,
            training=training,
            seed=seed,
            target=target,
            progress=progress,
        )


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _train_base_model(
    config: BootstrapConfig,
    *,
    base_model: BaseModelConfig,
    domain: Domain,
    training: TrainingConfig,
    seed: int,
    target: Path,
    progress: Progress,
) -> BootstrapResult:
    begin = time.monotonic()
    start_dir = target.parent / f".{target.name}.start"
    write_base_model(start_dir, base_model, seed=seed)
    group = TrainingGroup(
        name="learner_group",
        source=ModelSource(path=str(start_dir)),
        config=bootstrap_training(config, training, num_steps=config.steps, seed=seed),
    )
    await group.start()
    try:
        gold = await train_on(
            group,
            demonstration_mix(domain, config, seed=seed),
            num_steps=config.steps,
            batch_size=config.batch_size,
            start_dir=start_dir,
            seed=seed,
            progress=progress,
        )
        building = target.parent / f".{target.name}.building"
        shutil.rmtree(building, ignore_errors=True)
        await group.export(building)
    except BaseException:
        await group.shutdown()
        raise
    seconds = time.monotonic() - begin
    (building / "bootstrap.json").write_text(json.dumps({"gold": gold, "seconds": seconds, "seed": seed}))
    shutil.rmtree(start_dir, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
    return BootstrapResult(model_dir=target, seconds=seconds, gold=gold, group=group)


def bootstrap_training(
    config: BootstrapConfig, training: TrainingConfig, *, num_steps: int, seed: int
) -> TrainingConfig:
    """Return how a group trains on demonstrations: the bootstrap's optimizer and a cosine schedule over all steps."""
    return training.model_copy(
        update={
            "batch_size": config.batch_size,
            "optimizer": config.optimizer,
            "lora": None,
            "panacea": None,
            "learning_rate": config.learning_rate,
            "schedule": "cosine",
            "warmup_steps": min(50, num_steps // 10),
            "total_steps": num_steps,
            "weight_decay": config.weight_decay,
            "seed": seed,
        }
    )


async def train_on(
    group: TrainingGroup,
    demonstrations: Iterator[list[Demonstration]],
    *,
    num_steps: int,
    batch_size: int,
    start_dir: Path,
    seed: int,
    progress: Progress,
) -> dict[str, int]:
    """Train on chunks of demonstrations, one epoch, and return how many of each role there were."""
    tokenizer = load_tokenizer(start_dir)
    end_id = tokenizer.convert_tokens_to_ids(END)
    counts = {role.value: 0 for role in Role}
    num_done = 0

    def tick(report: StepReport) -> None:
        nonlocal num_done
        num_done += 1
        progress.stage("bootstrap", done=num_done, total=num_steps)

    chunks = enumerate(demonstrations)

    def next_table() -> pa.Table | None:
        chunk, rows = next(chunks, (0, None))
        if rows is None:
            return None
        for row in rows:
            counts[row.role.value] += 1
        return pa.table(
            {
                "row_id": [f"{chunk}/{i}" for i in range(len(rows))],
                "prompt_token_ids": [encode_chat(tokenizer, row.messages) for row in rows],
                "response_token_ids": [
                    [*tokenizer.encode(row.response, add_special_tokens=False), end_id] for row in rows
                ],
            }
        )

    table = await asyncio.to_thread(next_table)
    while table is not None:
        # The next piece is written while this one is trained on.
        following = asyncio.create_task(asyncio.to_thread(next_table))
        plan = TrainingPlan.of(
            [str(row) for row in table.column("row_id").to_pylist()], batch_size=batch_size, epochs=1, seed=seed
        )
        report = await group.update(table, loss="pretraining", loss_config=PretrainingConfig(), plan=plan, on_step=tick)
        logger.info("bootstrap: %d of %d steps, %s", num_done, num_steps, report.means)
        table = await following
    return counts
