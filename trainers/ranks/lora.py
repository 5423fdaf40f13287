"""Owns what knows peft: an adapter inside a rank's model, apart from the base for publishing, merged for export.

    model ── add_adapter ──► frozen base + A, B of the targets ─┬─► adapter_parameters ──► the rollout pool
                                                                └─► merged_parameters  ──► a Hugging Face directory

What an adapter is and how it travels is actors/adapter.py's. Of DeepSpeed it knows nothing: a whole tensor under ZeRO 3
is what the caller's `whole` gives. peft and torch are imported where they are used: reading a config needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from actors.adapter import HALVES, AdapterConfig, adapter_shapes, tensor_name

if TYPE_CHECKING:
    from torch import Tensor

NAME = "default"
"""peft's name of a model's only adapter."""
BASE = ".base_layer."
"""What peft puts into the names of the parameters of a layer that it has wrapped."""


class LoraConfig(AdapterConfig):
    """An adapter that is trained in the place of the weights, which stay as they are."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the values that A reads that are dropped, in training alone."""

    @property
    def adapter(self) -> AdapterConfig:
        """What an engine is told of it."""
        return AdapterConfig(rank=self.rank, alpha=self.alpha, targets=self.targets)


def check_targets(model: Any, config: AdapterConfig, *, key: str = "lora") -> None:
    """Check that a model has the layers that an adapter is for; it may be one without memory.

    Args:
        model: a Hugging Face causal language model.
        config: the adapter's settings.
        key: as in `actors.adapter.adapter_shapes`.

    Raises:
        ValueError: a target names no linear layer of the model's blocks.
    """
    import torch

    adapter_shapes({name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, config, key=key)
    other = {type(layer).__name__ for layer in _targets(model, config) if not isinstance(layer, torch.nn.Linear)}
    if other:
        raise ValueError(
            f"{key}: got a {type(model).__name__}, whose layers are {', '.join(sorted(other))}, wanted a model of "
            f"Linear layers; train all of its weights: leave {key} out"
        )


def add_adapter(model: Any, config: LoraConfig, *, seed: int) -> None:
    """Freeze a Hugging Face causal language model and put an adapter into it; until it is trained it changes nothing.

    A is drawn with the seed alone, so that all ranks, however many, begin with the same.

    Raises:
        ValueError: as `check_targets`.
    """
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    check_targets(model, config)
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, adapter_name=NAME)


def adapter_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the adapter's parameters by the names that its files have (`actors.adapter.adapter_shapes`)."""
    for name, parameter in model.named_parameters():
        for half in HALVES:
            module, found, _ = name.partition(f".{half}.{NAME}.")
            if found:
                yield tensor_name(module, half), parameter


def merged_parameters(
    model: Any, *, whole: Callable[[Any], AbstractContextManager[Any]], leave_out: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of the base model as they are with the adapter in them: W + (alpha / rank) B A.

    Added up in fp32 and rounded to W's type: of bf16 weights an update that is smaller than half a unit in the last
    place is lost, as it is in the weights of full training.

    Args:
        model: one with an adapter.
        whole: within it a parameter is whole.
        leave_out: name of a child that is no part of the base model.
    """
    import torch

    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.startswith(f"{leave_out}.") or any(f".{half}.{NAME}." in name for half in HALVES):
            continue
        module, wrapped, kind = name.partition(BASE)
        if not wrapped or kind != "weight":
            with whole(parameter):
                yield f"{module}.{kind}" if wrapped else name, parameter.detach()
            continue
        a, b = (parameters[f"{module}.{half}.{NAME}.weight"] for half in HALVES)
        with whole(parameter), whole(a), whole(b), torch.no_grad():
            update = (b.float() @ a.float()) * model.get_submodule(module).scaling[NAME]
            yield f"{module}.{kind}", (parameter.float() + update).to(parameter.dtype)


def without_adapter(model: Any) -> AbstractContextManager[Any]:
    """Return a context in which the model answers as its base does: the policy at the run's start."""
    from peft.helpers import rescale_adapter_scale

    context: AbstractContextManager[Any] = rescale_adapter_scale(model, multiplier=0.0)
    return context


def base_checksum(model: Any) -> str:
    """Return a checksum of a model's parameters, by which a checkpoint of an adapter knows its base again.

    Reads all of them once, at the speed of memory.
    """
    import torch

    from cluster.weights import checksum

    total = 0
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        total = checksum(flat, checksum(np.frombuffer(name.encode(), dtype=np.uint8), total))
    return f"{total:08x}"


def _targets(model: Any, config: AdapterConfig) -> Iterator[Any]:
    for name, module in model.named_modules():
        if "." in name and name.rsplit(".", 1)[-1] in config.targets:
            yield module
