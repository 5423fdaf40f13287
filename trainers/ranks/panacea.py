"""Owns Panacea's layers: one model for all trade-offs between objectives, whose weights hang on a preference vector.

    W(lambda) = W_0 + U diag(sigma_1 .. sigma_k, s lambda_1 .. s lambda_m) V^T

(Zhong et al. 2024, "Panacea: Pareto alignment via preference adaptation for LLMs", arXiv 2402.02030.) W_0 (d_out, d_in)
is frozen; U (d_out, k + m), V (d_in, k + m), sigma (k,) and the one number s of each matrix are learnt; lambda, in the
simplex of m objectives, is put in and has no gradient. With m = 0 it is LoRA with singular values.

    add_panacea ──► set_preference ──► an iteration's rollouts, log-probs and update with that vector ──► the next
                               └────► export: merged weights, or LoRA's A and B, of one vector

The paper orthogonalises U and V softly; ours leaves them free (their span is what matters for W). Knows no DeepSpeed: a
whole tensor under ZeRO 3 is what the caller's `whole` gives. Who draws the vectors is trainers/feedback/trade_offs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from actors.adapter import tensor_name, write_adapter
from trainers.ranks.lora import check_targets
from trainers.ranks.panacea_config import PanaceaConfig

BASE = ".base_layer."
"""What wrapping puts into the names of a layer's own parameters."""


Whole: TypeAlias = Callable[[Any], AbstractContextManager[Any]]
"""A context within which a parameter is whole."""
LEARNT = ("left", "right", "singular_values", "scale")
"""What is learnt of a layer: U, V, sigma, s."""


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
        self.scale = nn.Parameter(weight.new_zeros(1))
        """s, (1,): DeepSpeed takes no tensor without a dimension."""
        share = 1.0 / max(config.num_objectives, 1)
        self.register_buffer("preference", weight.new_full((config.num_objectives,), share), persistent=False)
        self.adapted = True
        """Whether what is added is added; else the layer answers as its base."""

    def diagonal(self) -> Tensor:
        """Return (k + m,): sigma, then s * lambda."""
        return torch.cat([self.singular_values, self.scale * self.preference])

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., d_out] of [..., d_in]: W(lambda) x, and the bias."""
        base = cast(Tensor, self.base_layer(x))
        return base + ((x @ self.right) * self.diagonal()) @ self.left.T if self.adapted else base

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
    check_targets(model, config.adapter, key="panacea")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in list(model.named_modules()):
        path, _, last = name.rpartition(".")
        if last in config.targets and any(part.isdigit() for part in path.split(".")):
            assert isinstance(layer, nn.Linear), "checked above"
            setattr(model.get_submodule(path), last, PanaceaLinear(layer, config, generator=generator))


def layers_of(model: Any) -> Iterator[tuple[str, PanaceaLinear]]:
    """Yield the wrapped layers by the names that they have in the base model."""
    for name, layer in model.named_modules():
        if isinstance(layer, PanaceaLinear):
            yield name, layer


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


@contextmanager
def without_panacea(model: Any) -> Iterator[None]:
    """Have the model answer as its base does: the policy at the run's start, whatever the vector."""
    layers = [layer for _, layer in layers_of(model)]
    for layer in layers:
        layer.adapted = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapted = True


# -------------------------------------------------------------------------------------------------------------- export


def merged_parameters(
    model: Any, *, whole: Whole = nullcontext, leave_out: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the base model's parameters with W(lambda) in W_0's place, by the base's names, for the vector set.

    Added up in fp32 and rounded to W_0's type.

    Args:
        model: one with the layers.
        whole: within it a parameter is whole.
        leave_out: name of a child that is no part of the base model.
    """
    layers = {f"{name}{BASE}weight": layer for name, layer in layers_of(model)}
    own = {id(parameter) for layer in layers.values() for parameter in learnt_of(layer).values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in own or name.startswith(f"{leave_out}."):
            continue
        layer = layers.get(name)
        with _all_whole(whole, parameter, *(() if layer is None else learnt_of(layer).values())), torch.no_grad():
            value = parameter.detach()
            if layer is not None:
                value = (value.float() + layer.update()).to(value.dtype)
            yield name.replace(BASE, "."), value


def adapter_parameters(model: Any, *, whole: Whole = nullcontext) -> Iterator[tuple[str, Tensor]]:
    """Yield A = diag V^T (k + m, d_in) and B = U (d_out, k + m) of every layer, by peft's names, for the vector set."""
    for name, layer in layers_of(model):
        with _all_whole(whole, *learnt_of(layer).values()), torch.no_grad():
            a = (layer.right * layer.diagonal()).T.contiguous()
            b = layer.left.detach().clone()
        yield tensor_name(name, "lora_A"), a
        yield tensor_name(name, "lora_B"), b


def learnt_parameters(model: Any, *, whole: Whole = nullcontext) -> Iterator[tuple[str, Tensor]]:
    """Yield copies of U, V, sigma and s of every layer, by layer and attribute: what all vectors' weights are of."""
    for name, layer in layers_of(model):
        for attribute, parameter in learnt_of(layer).items():
            with whole(parameter):
                value = parameter.detach().cpu().clone()
            yield f"{name}.{attribute}", value


def learnt_of(layer: PanaceaLinear) -> dict[str, nn.Parameter]:
    """Return U, V, sigma and s by their attribute."""
    return {attribute: getattr(layer, attribute) for attribute in LEARNT}


@contextmanager
def _all_whole(whole: Whole, *parameters: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for parameter in parameters:
            stack.enter_context(whole(parameter))
        yield


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
    write_adapter(path, adapter_parameters(model), config.adapter, base_model=base_model)
