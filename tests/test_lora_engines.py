"""An adapter on a pool of real engines: what peft trains is what they answer with, from the first update on."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.engine import EngineConfig, start_engine_replica
from actors.engine_config import with_adapter
from actors.generation import Completion, GenerationRequest
from cluster.pool import Pool
from cluster.replica import Replica
from cluster.weight_sync import SyncFailed, sync_weights
from cluster.weights import ParityProbe, WeightManifest, put_weights
from tests.published_learner import BOUND, PublishedLearner, answers, assert_made_by
from tests.tiny_models import write_llama
from trainers.ranks.lora import LoraConfig, adapter_parameters, add_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_session")]

DEADLINE_S = 240.0
LORA = LoraConfig(rank=4, alpha=16.0)


class Learner(PublishedLearner):
    """A base with an adapter, in this process; its adapter is published."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        add_adapter(self.model, LORA, seed=0)
        self.model.eval()

    def publish(self, version: str, *, seed: int) -> tuple[WeightManifest, ParityProbe]:
        """Draw the adapter anew and return it with its own log-probs of the probe sequences."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in adapter_parameters(self.model):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        manifest = put_weights(adapter_parameters(self.model), version=version)
        return manifest, self.probe()


def engine_pool(path: Path) -> Pool[GenerationRequest, Completion]:
    engine = EngineConfig(model=str(path), kv_cache_gb=0.05, max_num_seqs=16)
    config = with_adapter(engine, LORA.adapter, base_too=True)

    def start(replica_id: int) -> Replica:
        return start_engine_replica(config, replica_id=replica_id, num_cpus=0.2)

    return Pool(name="rollouts", start_replica=start, num_replicas=1)


def test_replicas_answer_with_the_adapter_that_was_published_and_a_newcomer_takes_it_too(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model", tied=True, seed=3)
    untrained, learner, other = Learner(path), Learner(path), Learner(path)

    async def story() -> None:
        pool = engine_pool(path)
        await pool.start()
        try:
            assert_made_by(await answers(pool, num=3), untrained, version="v0")
            for version, seed in (("v1", 1), ("v2", 2)):
                manifest, probe = learner.publish(version, seed=seed)
                report = await sync_weights(pool, manifest, probe=probe, deadline_s=DEADLINE_S)
                assert report.quarantined == {}
                assert report.max_abs_diff < BOUND
                assert_made_by(await answers(pool, num=6), learner, version=version)
            # In one batch the base's answers are the base's, and say so.
            mixed = await answers(pool, num=8, of_base=(0, 3, 4, 7))
            base = [done for done in mixed if done.request_id in ("r0", "r3", "r4", "r7")]
            assert_made_by(base, untrained, version="v0")
            assert_made_by([done for done in mixed if done not in base], learner, version="v2")
            # What is no adapter of this model is refused, and the one before goes on.
            manifest, probe = other.publish("v3", seed=3)
            with pytest.raises(SyncFailed, match="28 parameters: 1 missing"):
                await sync_weights(
                    pool, replace(manifest, tensors=manifest.tensors[1:]), probe=probe, deadline_s=DEADLINE_S
                )
            assert_made_by(await answers(pool, num=3), learner, version="v2")
            await pool.quarantine(0, reason="a test")
            async with asyncio.timeout(240):
                while (await pool.stats()).ready < 1:
                    await asyncio.sleep(0.2)
            assert_made_by(await answers(pool, num=3), learner, version="v2")
        finally:
            await pool.shutdown()

    asyncio.run(story())
