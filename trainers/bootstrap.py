"""Owns the bootstrap: one small base model for all three roles, trained from nothing on a domain's demonstrations.

Only train problems are shown. The loss falls on a role's own tokens: what stands in a prompt (an answer that the critic
is to judge, say) is masked. The result is cached by everything that it depends on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import Field

from actors.chat import encode_chat, load_tokenizer
from actors.domains import Demonstration, Domain, Role
from cluster.config import Config
from trainers.base_model import END, BaseModelConfig, write_base_model
from trainers.losses.pretraining import Config as PretrainingConfig
from trainers.progress import Progress
from trainers.training_group import ModelSource, StepReport, TrainingConfig, TrainingGroup, TrainingPlan

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
"""Raise it when the data or the training of the bootstrap changes in a way that its config does not show."""


class BootstrapConfig(Config):
    """How the base model is trained."""

    steps: int = Field(default=2400, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=40, ge=1)
    """Demonstrations per optimizer step."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Muon learns this in about half the tokens that AdamW takes."""
    learning_rate: float = Field(default=3e-3, gt=0.0)
    """Peak learning rate; cosine schedule."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay of matrices."""
    easy_first_share: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of the steps whose critic demonstrations are the shortest problems only: a curriculum."""
    attacker_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of demonstrations of the attacker's role."""
    learner_share: float = Field(default=0.12, ge=0.0, le=1.0)
    """Share of demonstrations of the learner's role; the critic's role has the rest."""
    num_chunks: int = Field(default=20, ge=1)
    """The data is made and handed over in this many pieces; one tick of the progress bar each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapResult:
    """A base model and what it took."""

    model_dir: Path
    seconds: float
    """0 when it came from the cache."""
    gold: dict[str, int]
    """Demonstrations whose content was known to be right by construction, by role (SCIENCE §1)."""
    group: TrainingGroup | None
    """The group that trained it, still running, for whoever trains next; None when it came from the cache."""


def cache_key(
    config: BootstrapConfig, *, base_model: BaseModelConfig, domain: Config, training: TrainingConfig, seed: int
) -> str:
    """Return the name of the cached result: a hash of all that the result depends on."""
    sections = [section.model_dump(mode="json") for section in (config, base_model, domain)]
    parts = [CACHE_FORMAT, *sections, training.num_ranks, seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


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
    """Return the base model of a config and seed, trained now or found in the cache."""
    key = cache_key(config, base_model=base_model, domain=domain_config, training=training, seed=seed)
    target = cache_dir / f"bootstrap-{key}"
    if (target / "bootstrap.json").is_file():
        gold = json.loads((target / "bootstrap.json").read_text())["gold"]
        return BootstrapResult(model_dir=target, seconds=0.0, gold=gold, group=None)
    begin = time.monotonic()
    start_dir = cache_dir / f".{target.name}.start"
    write_base_model(start_dir, base_model, seed=seed)
    group = TrainingGroup(
        name="learner_group",
        source=ModelSource(path=str(start_dir)),
        config=training.model_copy(
            update={
                "batch_size": config.batch_size,
                "optimizer": config.optimizer,
                "learning_rate": config.learning_rate,
                "schedule": "cosine",
                "warmup_steps": min(50, config.steps // 10),
                "total_steps": config.steps,
                "weight_decay": config.weight_decay,
                "seed": seed,
            }
        ),
    )
    await group.start()
    try:
        gold = await _train(group, config, start_dir=start_dir, domain=domain, seed=seed, progress=progress)
        building = cache_dir / f".{target.name}.building"
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


async def _train(
    group: TrainingGroup,
    config: BootstrapConfig,
    *,
    start_dir: Path,
    domain: Domain,
    seed: int,
    progress: Progress,
) -> dict[str, int]:
    """Train on the demonstrations and return how many of each role there were."""
    tokenizer = load_tokenizer(start_dir)
    end_id = tokenizer.convert_tokens_to_ids(END)
    counts = {role.value: 0 for role in Role}
    num_done = 0

    def tick(report: StepReport) -> None:
        nonlocal num_done
        num_done += 1
        progress.stage("bootstrap", done=num_done, total=config.steps)

    chunks = enumerate(demonstration_mix(domain, config, seed=seed))

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
            [str(row) for row in table.column("row_id").to_pylist()], batch_size=config.batch_size, epochs=1, seed=seed
        )
        report = await group.update(table, loss="pretraining", loss_config=PretrainingConfig(), plan=plan, on_step=tick)
        logger.info("bootstrap: %d of %d steps, %s", num_done, config.steps, report.means)
        table = await following
    return counts
