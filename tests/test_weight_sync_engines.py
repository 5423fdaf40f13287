"""Weight sync over a pool of real engines: one and three replicas, tied and untied heads, corruption, a death."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.engine import EngineConfig, start_engine_replica
from actors.generation import Completion, GenerationRequest
from cluster.pool import Pool
from cluster.replica import Replica
from cluster.weight_sync import SyncFailed, sync_weights
from cluster.weights import ParityProbe, WeightManifest, put_weights
from tests.published_learner import BOUND, PublishedLearner, answers, assert_made_by
from tests.tiny_models import perturb, write_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_session")]

DEADLINE_S = 120.0


class Learner(PublishedLearner):
    """A model in this process whose weights are published; what every replica must agree with."""

    def publish(self, version: str, *, seed: int) -> tuple[WeightManifest, ParityProbe]:
        """Change the weights and return them with their own log-probs of the probe sequences."""
        perturb(self.model, seed=seed)
        manifest = put_weights(self.model.named_parameters(), version=version, bucket_bytes=40_000)
        return manifest, self.probe()


@asynccontextmanager
async def engine_pool(path: Path, *, num_replicas: int) -> AsyncIterator[Pool[GenerationRequest, Completion]]:
    config = EngineConfig(model=str(path), kv_cache_gb=0.05, max_num_seqs=16)

    def start(replica_id: int) -> Replica:
        return start_engine_replica(config, replica_id=replica_id, num_cpus=0.2)

    pool: Pool[GenerationRequest, Completion] = Pool(name="rollouts", start_replica=start, num_replicas=num_replicas)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.shutdown()


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_replica_answers_with_the_weights_that_were_published(
    num_replicas: int, tied: bool, tmp_path: Path
) -> None:
    path = write_llama(tmp_path / "model", tied=tied, seed=3)
    learner = Learner(path)

    async def story() -> None:
        async with engine_pool(path, num_replicas=num_replicas) as pool:
            for version, seed in (("v1", 1), ("v2", 2)):
                manifest, probe = learner.publish(version, seed=seed)
                report = await sync_weights(pool, manifest, probe=probe, deadline_s=DEADLINE_S)
                assert report.accepted == tuple(range(num_replicas))
                assert report.quarantined == {}
                assert report.max_abs_diff < BOUND
                assert_made_by(await answers(pool, num=6 * num_replicas), learner, version=version)

    asyncio.run(story())


def test_a_corrupt_bucket_is_refused_and_the_old_version_keeps_answering(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model", tied=False, seed=3)
    learner, spoilt = Learner(path), Learner(path)

    async def story() -> None:
        async with engine_pool(path, num_replicas=1) as pool:
            manifest, probe = learner.publish("v1", seed=1)
            await sync_weights(pool, manifest, probe=probe, deadline_s=DEADLINE_S)
            manifest, probe = spoilt.publish("v2", seed=2)
            parts = [part.copy() for part in ray.get(manifest.buckets[-1].ref)]
            parts[-1][-1] ^= 1
            bad = replace(manifest.buckets[-1], ref=ray.put(parts), node_id="another")
            with pytest.raises(SyncFailed, match="CorruptBucket"):
                await sync_weights(
                    pool,
                    replace(manifest, buckets=(*manifest.buckets[:-1], bad)),
                    probe=probe,
                    deadline_s=DEADLINE_S,
                )
            assert_made_by(await answers(pool, num=6), learner, version="v1")

    asyncio.run(story())


def test_a_replica_killed_in_mid_sync_comes_back_with_the_version_before_its_first_request(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model", tied=False, seed=3)
    learner = Learner(path)

    async def story() -> None:
        async with engine_pool(path, num_replicas=3) as pool:
            pids = {info.replica_id: info.pid for info in (await pool.fanout(_ready, timeout_s=60.0)).values()}  # type: ignore[union-attr]
            # Stopped, it can't take the weights; killed while the others have them, it is in the middle of the sync.
            os.kill(pids[1], signal.SIGSTOP)
            manifest, probe = learner.publish("v1", seed=1)
            sync = asyncio.create_task(sync_weights(pool, manifest, probe=probe, deadline_s=DEADLINE_S))
            await asyncio.sleep(2.0)
            assert not sync.done(), "the sync did not wait for the stopped replica"
            os.kill(pids[1], signal.SIGKILL)
            report = await sync
            assert set(report.accepted) == {0, 2}
            assert set(report.quarantined) == {1}
            assert_made_by(await answers(pool, num=12), learner, version="v1")
            async with asyncio.timeout(180):
                while (await pool.stats()).ready < 3:
                    await asyncio.sleep(0.2)
            newcomers = await pool.fanout(_ready, timeout_s=60.0)
            assert len(newcomers) == 3
            assert {info.pid for info in newcomers.values()} & {pids[1]} == set()  # type: ignore[union-attr]
            # Enough requests that the newcomer has its share of them.
            assert_made_by(await answers(pool, num=30), learner, version="v1")

    asyncio.run(story())


async def _ready(actor: Any) -> Any:
    return await actor.ready.remote()
