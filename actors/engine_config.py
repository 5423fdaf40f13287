"""Owns the settings of one engine and what they reserve; apart, so that reading a config imports no Ray, no engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from actors.adapter import AdapterConfig
from cluster.config import Config
from cluster.node_labels import checked_labels


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
    """GPUs per replica, over which each of its matrices is split; all of them on one node."""
    num_gpus: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU that Ray reserves for a replica on one GPU; None reserves what `gpu_memory_utilization` takes."""
    sleeps: bool = False
    """Can give its GPU's memory back while others compute there; `placement.colocate` sets it where it is needed."""
    arrangement: Literal["pack", "spread"] = "pack"
    """"spread" keeps the pool's replicas on as many nodes as there is room on; "pack" leaves it to Ray, which fills
    nodes."""
    node_labels: tuple[str, ...] = ()
    """Labels of the nodes that replicas may be on, as "label=value"; for example "ray.io/node-group=critic"."""
    enforce_eager: bool = True
    """Compile nothing; False compiles kernels and records graphs, which pays for large models on GPUs alone."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """"dummy" fills random weights: for a replica whose first weights come by a sync."""
    base_seed: int = Field(default=0, ge=0)
    """Replica i samples its unseeded requests with seed base_seed + i."""
    weight_version: str = "v0"
    """What the weights of the model directory are called until the first sync."""
    coalesce_ms: float = Field(default=50.0, ge=0)
    """Samples that finish within this many milliseconds travel to the caller together."""

    @field_validator("node_labels")
    @classmethod
    def _labels(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        return checked_labels(labels)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = list(_gpu_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self


class AdaptedEngineConfig(EngineConfig):
    """An engine whose every request goes through an adapter; a run makes one where the learner trains an adapter."""

    adapter: AdapterConfig
    """New weights are its tensors alone; the model's own stay as they are."""
    base_too: bool = False
    """Requests may ask for the model without its adapter: other roles share the engine."""


def with_adapter(config: EngineConfig, adapter: AdapterConfig | None, *, base_too: bool = False) -> EngineConfig:
    """Return the settings of an engine that has the adapter; without one they are as before."""
    if adapter is None:
        return config
    return AdaptedEngineConfig(**config.model_dump(), adapter=adapter, base_too=base_too)


def adapter_of(config: EngineConfig) -> AdapterConfig | None:
    """Return the adapter that an engine has; None where new weights are the model's own."""
    return config.adapter if isinstance(config, AdaptedEngineConfig) else None


def has_base(config: EngineConfig) -> bool:
    """Whether requests may ask for the model without its adapter."""
    return isinstance(config, AdaptedEngineConfig) and config.base_too


def _gpu_problems(config: EngineConfig) -> Iterator[str]:
    parallel, share = config.tensor_parallel_size, config.num_gpus
    if config.device == "cpu":
        if parallel > 1:
            yield f'tensor_parallel_size: got {parallel} with device = "cpu", wanted 1; it is for GPUs: device = "cuda"'
        if share is not None:
            yield f'num_gpus: got {share:g} with device = "cpu", wanted none; set device = "cuda"'
        if config.sleeps:
            yield 'sleeps: got true with device = "cpu", wanted false: there is no GPU whose memory it could give back'
        return
    if share is not None and parallel > 1:
        yield (
            f"num_gpus: got {share:g} with tensor_parallel_size = {parallel}, wanted none: its {parallel} workers have "
            "a whole GPU each"
        )
    elif share is not None and share < config.gpu_memory_utilization:
        yield (
            f"num_gpus: got {share:g}, wanted at least gpu_memory_utilization = {config.gpu_memory_utilization:g}: "
            "another would be placed on the GPU whose memory this one fills"
        )


def gpus_reserved(config: EngineConfig) -> float:
    """Return what Ray reserves of a GPU for the actor itself: the share of its memory that vLLM will take.

    So engines whose shares fit are placed on one GPU together. None on a CPU; none for tensor parallelism, whose
    workers have whole GPUs of their own.
    """
    if config.device == "cpu" or config.tensor_parallel_size > 1:
        return 0.0
    return config.gpu_memory_utilization if config.num_gpus is None else config.num_gpus


def replica_bundles(config: EngineConfig, *, num_cpus: float) -> list[dict[str, float]]:
    """Return what one replica reserves: a bundle for its actor, and one for each worker of tensor parallelism."""
    share = gpus_reserved(config)
    bundles: list[dict[str, float]] = [{"CPU": num_cpus, **({"GPU": share} if share else {})}]
    if config.tensor_parallel_size > 1:
        bundles += [{"GPU": 1.0} for _ in range(config.tensor_parallel_size)]
    return bundles


def split_problem(parallel: int, *, num_heads: int, num_kv_heads: int) -> str | None:
    """Return why a model's attention can't be split over so many GPUs; None when it can.

    >>> split_problem(4, num_heads=28, num_kv_heads=4) is None
    True
    >>> split_problem(8, num_heads=28, num_kv_heads=4)
    'got 8, wanted a divisor of the model\'s 28 attention heads: 1, 2, 4, 7, 14, 28'
    """
    if num_heads % parallel:
        divisors = ", ".join(str(number) for number in range(1, num_heads + 1) if num_heads % number == 0)
        return f"got {parallel}, wanted a divisor of the model's {num_heads} attention heads: {divisors}"
    if num_kv_heads % parallel and parallel % num_kv_heads:
        return f"got {parallel}, wanted a divisor or a multiple of the model's {num_kv_heads} key-value heads"
    return None
