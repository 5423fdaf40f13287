"""Owns a LoRA adapter as it travels: its settings, the names and shapes of its tensors, and the files that hold it.

    y = W x + (alpha / rank) · B (A x)       W [out, in] of the frozen base, A [rank, in], B [out, rank] and 0 at first

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Names and files are those that
peft writes and vLLM reads. Knows neither of them: who trains an adapter is trainers/ranks/lora.py, or panacea.py, who
answers with it the engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from cluster.config import Config

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
"""What peft puts before the name of every adapted layer."""
HALVES = ("lora_A", "lora_B")
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, as Llama, Qwen, Mistral and Gemma name them."""
ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Greatest ranks that vLLM can be told to make room for."""


class AdapterConfig(Config):
    """Which layers an adapter has, and how large it is."""

    rank: int = Field(default=8, ge=1, le=ENGINE_RANKS[-1])
    """Rank of every adapted layer's update."""
    alpha: float = Field(default=16.0, gt=0.0)
    """The update counts alpha / rank times."""
    targets: tuple[str, ...] = LINEAR_LAYERS
    """Names of the linear layers that are adapted, in every block alike."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_bad_targets(self.targets)
        return self


def refuse_bad_targets(targets: Sequence[str]) -> None:
    """Raise ValueError for what can't be the names of layers, each once."""
    bad = [name for name in targets if not name or "." in name]
    if not targets or bad or len(set(targets)) != len(targets):
        raise ValueError(
            f"targets: got {json.dumps(list(targets))}, wanted names of layers, each once and without a dot; "
            'for example ["q_proj", "v_proj"]'
        )


def adapter_shapes(
    parameters: Mapping[str, Sequence[int]], config: AdapterConfig, *, key: str = "lora"
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of an adapter.

    Args:
        parameters: name and shape of every parameter of the base model.
        config: the adapter's settings.
        key: what a message calls them; whoever knows the run's config gives their place in it.

    Raises:
        ValueError: a target names no linear layer of the model's blocks; says which there are.

    >>> shapes = adapter_shapes({"h.0.q_proj.weight": (6, 4)}, AdapterConfig(rank=2, targets=("q_proj",)))
    >>> shapes["base_model.model.h.0.q_proj.lora_A.weight"], shapes["base_model.model.h.0.q_proj.lora_B.weight"]
    ((2, 4), (6, 2))
    """
    shapes: dict[str, tuple[int, ...]] = {}
    layers: set[str] = set()
    for name, shape in parameters.items():
        module, _, kind = name.rpartition(".")
        *path, layer = module.split(".")
        if kind != "weight" or len(shape) != 2 or not any(part.isdigit() for part in path):
            continue  # a norm, a bias; or an embedding or the head, which are in no block
        layers.add(layer)
        if layer in config.targets:
            shapes[tensor_name(module, "lora_A")] = (config.rank, int(shape[1]))
            shapes[tensor_name(module, "lora_B")] = (int(shape[0]), config.rank)
    absent = [target for target in config.targets if target not in layers]
    if absent:
        raise ValueError(
            f"{key}.targets: got {', '.join(absent)}, wanted layers of the model's blocks: {', '.join(sorted(layers))}"
        )
    return shapes


def tensor_name(module: str, half: str) -> str:
    """Return what peft calls one half of a layer's adapter.

    >>> tensor_name("model.layers.0.mlp.up_proj", "lora_A")
    'base_model.model.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    return f"{PREFIX}{module}.{half}.weight"


def engine_rank(rank: int) -> int:
    """Return the rank that vLLM makes room for: the least of its own that is enough.

    >>> engine_rank(4), engine_rank(16), engine_rank(300)
    (8, 16, 320)
    """
    return next(most for most in ENGINE_RANKS if most >= rank)


def zero_adapter(shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield an adapter that changes nothing: the answers are the base model's."""
    import torch

    return ((name, torch.zeros(*shape)) for name, shape in shapes.items())


def write_adapter(
    path: Path, named: Iterable[tuple[str, torch.Tensor]], config: AdapterConfig, *, base_model: str
) -> None:
    """Write an adapter as peft's `save_pretrained` does: adapter_config.json and adapter_model.safetensors.

    Args:
        path: a directory, made if it is not there.
        named: name and tensor, as in `adapter_shapes`.
        config: the adapter's settings.
        base_model: what it is an adapter of.
    """
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in named}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
