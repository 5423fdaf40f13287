"""Owns Panacea's layers: one model for all trade-offs between objectives, whose weights hang on a preference vector.

    W(lambda) = W_0 + U diag(sigma_1 .. sigma_k, s lambda_1 .. s lambda_m) V^T

(Zhong et al. 2024, "Panacea: Pareto alignment via preference adaptation for LLMs", arXiv 2402.02030.) W_0 (d_out, d_in)
is frozen; U (d_out, k + m), V (d_in, k + m), sigma (k,) and the scalar s of each matrix are learnt; lambda, in the
simplex of m objectives, is put in and has no gradient. With m = 0 it is LoRA with singular values.

    add_panacea ──► draw_preference ──► set_preference ──► rollouts and update with that vector ──► the next
                                                    └────► export: merged weights, or LoRA's A and B, of one vector

The paper orthogonalises U and V softly; ours leaves them free (their span is what matters for W). Knows no DeepSpeed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from actors.adapter import AdapterConfig, adapter_shapes, tensor_name, write_adapter
from actors.records import draw_seed

BASE = ".base_layer."
"""What wrapping puts into the names of a layer's own parameters."""


class PanaceaConfig(AdapterConfig):
    """Which layers are adapted, and to how many objectives; `rank` is k, `alpha` has no part."""

    num_objectives: int = Field(default=2, ge=0)
    """m: entries of the preference vector; 0 makes it LoRA with singular values."""
    initial_deviation: float = Field(default=0.02, gt=0.0)
    """Standard deviation of U and V at first; sigma and s are 0, so that the model begins as W_0 exactly."""

    @property
    def width(self) -> int:
        """k + m: the rank of an exported adapter."""
        return self.rank + self.num_objectives


class PanaceaLinear(nn.Module):
    """A frozen linear layer and what a preference vector adds to it."""

    preference: Tensor
    """(m,) lambda."""

    def __init__(self, base_layer: nn.Linear, config: PanaceaConfig, *, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        self.left = nn.Parameter(_normal((weight.shape[0], config.width), config, generator).to(weight))
        """U (d_out, k + m)."""
        self.right = nn.Parameter(_normal((weight.shape[1], config.width), config, generator).to(weight))
        """V (d_in, k + m)."""
        self.singular_values = nn.Parameter(weight.new_zeros(config.rank))
        """sigma (k,)."""
        self.scale = nn.Parameter(weight.new_zeros(()))
        """s."""
        share = 1.0 / max(config.num_objectives, 1)
        self.register_buffer("preference", weight.new_full((config.num_objectives,), share), persistent=False)

    def diagonal(self) -> Tensor:
        """Return (k + m,): sigma, then s * lambda."""
        return torch.cat([self.singular_values, self.scale * self.preference])

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., d_out] of [..., d_in]: W(lambda) x, and the bias."""
        added = ((x @ self.right) * self.diagonal()) @ self.left.T
        return cast(Tensor, self.base_layer(x)) + added

    def update(self) -> Tensor:
        """Return (d_out, d_in) fp32: W(lambda) - W_0."""
        return (self.left.float() * self.diagonal().float()) @ self.right.float().T


def _normal(shape: tuple[int, int], config: PanaceaConfig, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * config.initial_deviation


def add_panacea(model: Any, config: PanaceaConfig, *, seed: int) -> None:
    """Freeze a model and wrap the linear layers of its blocks that the config names; until trained it changes nothing.

    U and V are drawn with the seed alone, so that all ranks begin with the same.

    Raises:
        ValueError: a target names no linear layer of the model's blocks.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    adapter_shapes(shapes, config, key="panacea")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in list(model.named_modules()):
        path, _, last = name.rpartition(".")
        if last in config.targets and any(part.isdigit() for part in path.split(".")):
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"panacea: got {name}, a {type(layer).__name__}, wanted a Linear layer")
            setattr(model.get_submodule(path), last, PanaceaLinear(layer, config, generator=generator))


def layers_of(model: Any) -> Iterator[tuple[str, PanaceaLinear]]:
    """Yield the wrapped layers by the names that they have in the base model."""
    for name, layer in model.named_modules():
        if isinstance(layer, PanaceaLinear):
            yield name, layer


def draw_preference(num_objectives: int, *, seed: int, iteration: int) -> tuple[float, ...]:
    """Return an iteration's vector, uniform on the simplex and the same on every rank.

    It holds for the iteration's rollouts and for its whole update: what one vector sampled another must not be blamed
    for.
    """
    rng = random.Random(draw_seed(seed, "preference", iteration))
    parts = [rng.expovariate(1.0) for _ in range(num_objectives)]
    total = sum(parts)
    return tuple(part / total for part in parts)


def set_preference(model: Any, preference: Sequence[float]) -> None:
    """Give every wrapped layer the vector that it answers by from now on.

    Raises:
        ValueError: the model has no such layer, or the vector is not in the simplex of its objectives.
    """
    layers = [layer for _, layer in layers_of(model)]
    if not layers:
        raise ValueError("panacea: got a model without its layers, wanted one that add_panacea has wrapped")
    wanted = len(layers[0].preference)
    outside = min(preference, default=0.0) < 0 or (wanted and abs(sum(preference) - 1.0) > 1e-6)
    if len(preference) != wanted or outside:
        raise ValueError(
            f"panacea: got the preference {list(preference)}, wanted {wanted} numbers, none below 0, that add up to 1"
        )
    for layer in layers:
        layer.preference.copy_(layer.preference.new_tensor(list(preference)))


# -------------------------------------------------------------------------------------------------------------- export


def merged_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the base model's parameters with W(lambda) in W_0's place, by the base's names, for the vector set.

    Added up in fp32 and rounded to W_0's type.
    """
    updates = {f"{name}{BASE}weight": layer for name, layer in layers_of(model)}
    own = {
        id(p) for _, layer in layers_of(model) for p in (layer.left, layer.right, layer.singular_values, layer.scale)
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            continue
        value = parameter.detach()
        if name in updates:
            with torch.no_grad():
                value = (value.float() + updates[name].update()).to(value.dtype)
        yield name.replace(BASE, "."), value


def adapter_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield A = diag V^T (k + m, d_in) and B = U (d_out, k + m) of every layer, by peft's names, for the vector set."""
    for name, layer in layers_of(model):
        with torch.no_grad():
            yield tensor_name(name, "lora_A"), (layer.right * layer.diagonal()).T.contiguous()
            yield tensor_name(name, "lora_B"), layer.left.detach().clone()


def export_merged(model: Any, path: Path, preference: Sequence[float]) -> None:
    """Write a Hugging Face directory of the model at one preference vector; vLLM serves it as any other.

    The tokenizer is the caller's to write. The vector stays set.
    """
    set_preference(model, preference)
    model.save_pretrained(path, state_dict=dict(merged_parameters(model)))


def export_adapter(
    model: Any, path: Path, preference: Sequence[float], *, config: PanaceaConfig, base_model: str
) -> None:
    """Write a LoRA adapter of the model at one preference vector, of rank k + m; the vector stays set.

    One base with an adapter for each of several vectors serves several trade-offs at once.
    """
    set_preference(model, preference)
    adapter = AdapterConfig(rank=config.width, alpha=float(config.width), targets=config.targets)
    write_adapter(path, adapter_parameters(model), adapter, base_model=base_model)
