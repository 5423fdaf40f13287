"""Runs a local Ray that is told of GPUs, and says who is on which: the places that a config asks for, without a device.

python -m tests.shared_gpus MODEL_DIR        prints one JSON object
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray

import actors.engine
import trainers.training_group
from actors.engine_config import EngineConfig
from cluster.placement import release
from trainers.gpu_turns import Tenant, share_gpus
from trainers.training_config import TrainingConfig
from trainers.training_group import ModelSource, TrainingGroup


class Seat:
    """Stands in for a rank or an engine: says which GPUs Ray shows it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def gpus(self) -> dict[str, Any]:
        """Return GPU ids, and what vLLM would be told."""
        names = ("VLLM_RAY_BUNDLE_INDICES", "VLLM_RAY_PER_WORKER_GPUS")
        return {"ids": ray.get_gpu_ids(), "told": [os.environ.get(name) for name in names]}


def main() -> None:
    """Place four ranks, two replicas of one GPU and one of two, and a replica that comes after another's death."""
    ray.init(num_cpus=8, num_gpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    actors.engine.EngineActor = Seat  # type: ignore[misc, assignment]
    trainers.training_group.DeepSpeedRank = Seat  # type: ignore[misc, assignment]
    engine = EngineConfig(model=sys.argv[1], device="cuda", num_cpus=0.5)
    wide = engine.model_copy(update={"tensor_parallel_size": 2})
    pools = {
        "rollouts": Tenant(engine=engine, replicas=2, most_replicas=2),
        "critic": Tenant(engine=wide, replicas=1, most_replicas=1),
    }
    training = TrainingConfig(num_ranks=4, batch_size=4, gpus_per_rank=1, zero_stage=2)
    shared = share_gpus(pools, training=training)
    assert shared is not None
    group = TrainingGroup(config=training, source=ModelSource(path=sys.argv[1]), shared=shared.group)
    group._placement = shared.group
    group._ranks = [group._start_rank(rank, {"CPU": 1.0, "GPU": 1.0}) for rank in range(4)]

    def start(pool: str, replica_id: int) -> Any:
        config = pools[pool].engine
        return actors.engine.start_engine_replica(
            config, replica_id=replica_id, name=pool, num_cpus=config.num_cpus, places=shared.places[pool]
        ).actor

    first, second, third = start("rollouts", 0), start("rollouts", 1), start("critic", 0)
    seats = {"ranks": group._ranks, "rollouts": [first, second], "critic": [third]}
    said = {name: ray.get([one.gpus.remote() for one in found], timeout=120) for name, found in seats.items()}
    ray.kill(first)
    said["after a death"] = [ray.get(start("rollouts", 2).gpus.remote(), timeout=120)]
    free = ray.available_resources().get("GPU", 0.0)
    # The group does not give back what others share with it.
    group._kill()
    still = ray.available_resources().get("GPU", 0.0)
    release(shared.group)
    sys.stdout.write(json.dumps({**said, "free": free, "still": still}) + "\n")
    ray.shutdown()


if __name__ == "__main__":
    main()
