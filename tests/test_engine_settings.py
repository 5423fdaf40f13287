"""What DeepSpeed is told, at the seam to it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from trainers.ranks.engine_settings import engine_settings
from trainers.training_config import TrainingConfig


def told(*, on_gpu: bool = False, universal: bool = False, **training: Any) -> dict[str, Any]:
    config = TrainingConfig.model_validate(training)
    return engine_settings(
        config, num_ranks=2, num_parameters=5000, num_trained=4000, on_gpu=on_gpu, universal=universal
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_is_offloaded_unless_it_is_asked_for(stage: int) -> None:
    settings = told(zero_stage=stage)
    assert settings["zero_optimization"].keys().isdisjoint({"offload_optimizer", "offload_param"})
    assert "zero_force_ds_cpu_optimizer" not in settings
    assert "checkpoint" not in settings


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_moves_the_optimizer_and_under_stage_3_the_weights(stage: int, on_gpu: bool) -> None:
    settings = told(zero_stage=stage, offload="cpu", on_gpu=on_gpu)
    zero = settings["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": on_gpu}
    assert zero.get("offload_param") == (zero["offload_optimizer"] if stage == 3 else None)
    # Ours is torch's AdamW: nothing is compiled.
    assert settings["zero_force_ds_cpu_optimizer"] is False


def test_offloading_without_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match='offload: got "cpu" with zero_stage = 0, wanted 1, 2 or 3'):
        TrainingConfig(offload="cpu")


def test_a_universal_checkpoint_is_asked_for_by_name() -> None:
    assert told(zero_stage=2, universal=True)["checkpoint"] == {"load_universal": True}


def test_buckets_are_no_larger_than_the_model() -> None:
    zero = told(zero_stage=3)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (4000, 5000)
    assert zero["stage3_param_persistence_threshold"] == 5
