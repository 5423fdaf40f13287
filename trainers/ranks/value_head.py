"""Owns the value head: what a response is expected to score, token by token, read off the policy's last hidden state.

A part of the policy's module while it is trained, so that optimizer, ZeRO and checkpoints know of it; no part of the
policy that is published or exported. It starts at 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAME = "value_head"


def add_value_head(model: Any) -> None:
    """Give a Hugging Face causal language model a value head; its outputs then carry `token_values`."""
    head = nn.Linear(model.config.hidden_size, 1, bias=False, dtype=model.dtype)
    nn.init.zeros_(head.weight)
    model.add_module(NAME, head)
    # Within the model's own forward pass, so that ZeRO 3 has the head's weights at hand.
    model.register_forward_hook(_with_values)


def _with_values(model: Any, inputs: Any, output: Any) -> Any:
    if output.hidden_states is not None:
        output["token_values"] = model.value_head(output.hidden_states[-1])[..., 0]
    return output


def aligned_values(values: Tensor) -> Tensor:
    """Return [B, T] fp32 values: that at t is what was expected *before* the token at t; column 0 is 0.

    Args:
        values: [B, T] as the head gives them, each after having seen its token.
    """
    whole = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.cat([torch.zeros_like(whole[:, :1]), whole[:, :-1]], dim=1)


def policy_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the model's named parameters but for the value head's."""
    return ((name, p) for name, p in model.named_parameters() if not name.startswith(f"{NAME}."))
