"""Owns where a training group's weights come from: a Hugging Face directory, or a seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.model_directory import context_length


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Which weights a group starts from."""

    path: str
    """A Hugging Face directory: config.json, tokenizer, and safetensors unless `init_seed` is given."""
    init_seed: int | None = None
    """Weights are drawn with this seed; needed when the directory has none."""


def load_model(source: ModelSource, *, dtype: torch.dtype) -> Any:
    """Return the causal language model of a Hugging Face directory. Never runs code from it, never unpickles.

    Raises:
        ValueError: no such directory, no config.json, or no safetensors and no `init_seed`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(source.path)
    if not (path / "config.json").is_file():
        raise ValueError(f"model: {path} has no config.json, wanted a Hugging Face model directory")
    if source.init_seed is not None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.random.fork_rng():
            torch.manual_seed(source.init_seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model: {path} has no *.safetensors; save it as safetensors, or give init_seed to draw random weights"
        )
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
    )


def max_positions(config: Any) -> int | None:
    """Return the longest sequence that a rank takes of a Hugging Face config's model; None where that has no bound.

    What an engine may stretch positions by (`actors.model_directory.context_length`) is not in it.
    """
    found: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found


def longest_sequence(path: str | Path) -> int | None:
    """Return the longest sequence that is sure to be taken by engines and by ranks; None where neither has a bound."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    return min((bound for bound in (context_length(path), max_positions(config)) if bound is not None), default=None)
