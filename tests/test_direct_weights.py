"""Weights from DeepSpeed's ranks straight into vLLM's engines, by vLLM's interface; the wire alone is a stand-in."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

import actors.engine
import trainers.training_group
from actors.engine import start_engine_replica
from actors.engine_config import EngineConfig
from actors.generation import Completion, GenerationRequest
from actors.records import Message
from cluster.pool import Pool
from cluster.weight_sync import sync_weights
from cluster.weights import ParityProbe, WeightManifest
from tests.inline_transfer import InlineRank, InlineReplica
from tests.test_training_group import PROBE, settings, update
from tests.tiny_models import write_llama
from trainers.training_group import ModelSource, TrainingGroup

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_session")]

BOUND = 1e-4


async def published(group: TrainingGroup, version: str) -> tuple[WeightManifest, ParityProbe]:
    """Train a little and publish."""
    await update(group, num_steps=2)
    manifest = await group.publish(version=version)
    return manifest, ParityProbe(token_ids=PROBE, logprobs=await group.logprobs(PROBE), bound=BOUND)


async def answers(pool: Pool[GenerationRequest, Completion], name: str) -> list[Completion]:
    message = Message(role="user", content="1+1")
    asked = [GenerationRequest(request_id=f"{name}{i}", messages=(message,), max_tokens=40) for i in range(8)]
    return [done async for chunk in pool.route(asked) for done in chunk]


@pytest.mark.parametrize("stage", [0, 3])
def test_replicas_hold_what_the_ranks_sent_and_a_new_one_takes_it_from_the_store(
    stage: Literal[0, 3], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers.training_group, "DeepSpeedRank", InlineRank)
    monkeypatch.setattr(actors.engine, "EngineActor", InlineReplica)
    path = write_llama(tmp_path / "model", tied=False)
    config = EngineConfig(model=str(path), kv_cache_gb=0.05, max_num_seqs=16)
    group = TrainingGroup(config=settings(zero_stage=stage), source=ModelSource(path=str(path)))
    pool: Pool[GenerationRequest, Completion] = Pool(
        name="rollouts",
        start_replica=lambda replica_id: start_engine_replica(config, replica_id=replica_id, num_cpus=0.1),
        num_replicas=2,
    )
    pool.deliver = partial(group.deliver, backend="ipc")

    async def story() -> None:
        await asyncio.gather(group.start(), pool.start())
        for version in ("v1", "v2"):
            manifest, probe = await published(group, version)
            asked = asyncio.create_task(answers(pool, version))
            await asyncio.sleep(0.05)
            # Without buckets: what does not come from the ranks does not come at all.
            report = await sync_weights(pool, replace(manifest, buckets=()), probe=probe, deadline_s=120.0)
            assert (report.accepted, report.quarantined) == ((0, 1), {})
            assert report.max_abs_diff <= BOUND
            assert {done.weight_version for done in await asked} <= {"v0", "v1", version}
            assert {done.weight_version for done in await answers(pool, f"{version}-after-")} == {version}
        manifest, probe = await published(group, "v3")
        await sync_weights(pool, manifest, probe=probe, deadline_s=120.0)
        infos: dict[int, Any] = await pool.fanout(lambda actor: actor.ready.remote(), timeout_s=60.0)
        os.kill(infos[0].pid, signal.SIGKILL)
        async with asyncio.timeout(240):
            while {*(await methods(pool))} != {1, 2}:
                await asyncio.sleep(0.3)
        assert await methods(pool) == {
            1: ["v1 from the ranks", "v2 from the ranks", "v3 from the ranks"],
            2: ["v3 by the store"],
        }

    async def whole() -> None:
        try:
            await story()
        finally:
            await pool.shutdown()
            await group.shutdown()

    asyncio.run(whole())


async def methods(pool: Pool[GenerationRequest, Completion]) -> dict[int, Any]:
    """Return by replica how each version came to it."""
    return await pool.fanout(lambda actor: actor.methods.remote(), timeout_s=60.0)


def test_what_is_put_aside_and_taken_back_trains_on_bit_by_bit(tmp_path: Path) -> None:
    source = ModelSource(path=str(write_llama(tmp_path / "model", tied=True)))
    group = TrainingGroup(config=settings(zero_stage=2), source=source)

    async def losses(*, aside: bool) -> list[float]:
        await group.reopen(config=settings(zero_stage=2), source=source)
        found = [step.loss for step in (await update(group, num_steps=2)).steps]
        if aside:
            await group.offload()
            await group.offload()
            found += [value for row in await group.logprobs(PROBE) for value in row]
            await group.reload()
            await group.reload()
        else:
            found += [value for row in await group.logprobs(PROBE) for value in row]
        return found + [step.loss for step in (await update(group, start=2, num_steps=2)).steps]

    async def whole() -> None:
        await group.start()
        try:
            assert await losses(aside=True) == await losses(aside=False)
        finally:
            await group.shutdown()

    asyncio.run(whole())
