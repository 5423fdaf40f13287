"""Owns what knows DeepSpeed: its import, its engine over a model, its checkpoints for another number of ranks.

The only module that imports DeepSpeed, and it does so when a rank starts: importing it here costs no engine. What the
engine is told is engine_settings.py's; what is done with it, a rank's (deepspeed_worker.py).
"""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainers.ranks.engine_settings import engine_settings
from trainers.ranks.muon import MuonAdamW
from trainers.training_config import TrainingConfig


def import_deepspeed() -> Any:
    """Return the module, quietened."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Else DeepSpeed 0.19 compiles an operator that training never uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def convert_to_universal(source: Path, target: Path) -> None:
    """Write a ZeRO checkpoint's parameters and moments as whole tensors, which any number of ranks can split again."""
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    told = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # what only Megatron's checkpoints carry
    )
    with redirect_stdout(io.StringIO()):
        ds_to_universal.main(told)


def repair_universal(optimizer: Any, decays: Sequence[float]) -> None:
    """Undo what DeepSpeed 0.19 does when it reads a universal checkpoint under ZeRO 3.

    It gives every parameter group the settings of the first one, and all of them one and the same count of steps, which
    each group then raises.
    """
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def build_engine(model: Any, *, config: TrainingConfig, num_ranks: int, universal: bool = False) -> Any:
    """Return a DeepSpeed engine over a model; a universal one reads checkpoints of any number of ranks, no others."""
    import deepspeed

    optimizer = _optimizer(model, config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    settings = engine_settings(
        config,
        num_ranks=num_ranks,
        num_parameters=num_parameters,
        num_trained=num_trained,
        on_gpu=torch.cuda.is_available(),
        universal=universal,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _optimizer(model: Any, config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "muon":
        return MuonAdamW(
            model,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(
        _parameter_groups(model, weight_decay=config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def _parameter_groups(model: Any, *, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay == 0.0:
        return [{"params": parameters, "weight_decay": 0.0}]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def join_deepspeed(*, timeout_s: float) -> None:
    """Have DeepSpeed take the process group that there is."""
    import deepspeed

    timeout = timedelta(seconds=timeout_s)
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, timeout=timeout
    )


def put_aside(engine: Any, *, on_gpu: bool) -> None:
    """Move to the host's memory what training needs beside the weights; `engine.reload_states` takes it back."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    states = OffloadStateTypeEnum
    include = [states.optim_states, states.hp_params, states.lp_grads]
    engine.offload_states(include=include, pin_memory=on_gpu)


def whole_parameter(parameter: Tensor) -> AbstractContextManager[Any]:
    """Return a context within which a parameter that ZeRO 3 has split is whole; all ranks enter it."""
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)
    return context
