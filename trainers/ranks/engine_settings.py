"""Owns what DeepSpeed is told of a training group: a dictionary made of its config. Imports nothing of DeepSpeed."""

from __future__ import annotations

from typing import Any

from trainers.training_config import TrainingConfig


def engine_settings(
    config: TrainingConfig,
    *,
    num_ranks: int,
    num_parameters: int,
    num_trained: int,
    on_gpu: bool = False,
    universal: bool = False,
) -> dict[str, Any]:
    """Return DeepSpeed's settings. Accumulation is driven by us: a step has as many micro-batches as its rows fill.

    Args:
        config: the group's.
        num_ranks: in the group.
        num_parameters: of the model.
        num_trained: those of them that are trained.
        on_gpu: the ranks compute on GPUs.
        universal: checkpoints are read in DeepSpeed's universal form, which knows no number of ranks.
    """
    # DeepSpeed's buckets are sized for billions of parameters: 2 GB would be reserved for any model.
    bucket = min(50_000_000, num_parameters)
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": min(bucket, num_trained),
        "allgather_bucket_size": bucket,
        "overlap_comm": False,
        "stage3_prefetch_bucket_size": bucket,
        # Weights below this are kept whole on every rank: norms and biases, whatever the model's size.
        "stage3_param_persistence_threshold": min(100_000, num_parameters // 1000),
    }
    settings: dict[str, Any] = {
        "train_batch_size": num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if config.zero_stage > 0:
        settings["gradient_clipping"] = config.max_grad_norm
    if config.offload == "cpu":
        place = {"device": "cpu", "pin_memory": on_gpu}
        zero["offload_optimizer"] = place
        if config.zero_stage == 3:
            zero["offload_param"] = place
        # DeepSpeed's own CPU Adam is compiled where it runs; torch's is fused on CPUs too.
        settings["zero_force_ds_cpu_optimizer"] = False
    if config.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["communication_data_type"] = "fp32"
        if config.zero_stage > 1:
            # Under stage 1 this would select an optimizer that does not skip a step whose gradient is not finite.
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    return settings
