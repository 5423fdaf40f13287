"""Owns the settings of one engine; apart from it, so that reading a config imports neither Ray nor an engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import Config


class EngineConfig(Config):
    """How one replica of a pool runs its model."""

    model: str
    """A Hugging Face model directory with tokenizer and chat template; a local path on every node."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Must be what the installed vLLM was built for."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of weights, activations and KV cache; "auto" takes the model's own."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Tokens, prompt and samples together; None takes the model's own."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Greatest number of samples in one step."""
    kv_cache_gb: float = Field(default=0.5, gt=0)
    """GiB of KV cache on CPU; on GPU `gpu_memory_utilization` decides."""
    num_cpus: float = Field(default=0.2, gt=0)
    """CPUs that Ray reserves for one replica; pools may share cores, so it may be less than `threads`."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one replica's matrix products."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of each GPU's memory."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per replica."""
    enforce_eager: bool = True
    """Compile nothing; False compiles kernels and records graphs, which pays for large models on GPUs alone."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """"dummy" fills random weights: for a replica whose first weights come by a sync."""
    base_seed: int = Field(default=0, ge=0)
    """Replica i samples its unseeded requests with seed base_seed + i."""
    weight_version: str = "v0"
    """What the weights of the model directory are called until the first sync."""
    coalesce_ms: float = Field(default=20.0, ge=0)
    """Samples that finish within this many milliseconds travel to the caller together."""
