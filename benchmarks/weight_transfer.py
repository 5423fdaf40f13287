"""Weight sync of a model of about 125M parameters: whole, its transport alone, and its transport to four readers.

    weight_sync         put_weights in the publisher + sync_weights over a pool of one engine replica, parity probe
                        included, ÷ (memcpy of the bytes + vLLM's own reload of the same tensors in a plain process)
    weight_transport    put_weights + one reader on the same node that holds every tensor ÷ memcpy of the bytes
    weight_transport_4  the same with four readers at once ÷ with one

The publisher is a Ray actor that holds a transformers model, as rank 0 of a training group does; a reader is a Ray
actor that takes the manifest and goes through all its tensors, as a replica does before it touches its engine. memcpy
is one thread's copy of one flat buffer into another that is there already, in the publisher. vLLM's own reload is
`reload_weights` of its worker, from tensors in the process's own memory, with the repacking of the head that it leaves
out on CPUs; without that what it loads is wrong. Weights change before every sync, and the replica's log-probs must be
the publisher's.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.engine import engine_environment, make_vllm_engine
from actors.engine_config import EngineConfig
from benchmarks.figure import Figure, in_turns
from benchmarks.plain_process import PlainProcess, worker_niceness
from benchmarks.pool_speed import engine_pool
from cluster.weight_sync import sync_weights
from cluster.weights import ParityProbe, WeightManifest, iter_tensors, put_weights
from trainers.base_model import BaseModelConfig, write_base_model
from trainers.logprobs import token_logprobs

SHAPE = BaseModelConfig(hidden_size=768, intermediate_size=3456, num_layers=12, num_heads=12)
"""Of 124M parameters."""
NUM_READERS = 4
PROBE = ((11, 12, 13, 14),)
PARITY_BOUND = 1e-3
"""Nats; the demo's 1e-4 is for a model a hundred times smaller."""


async def measure(*, quick: bool) -> list[Figure]:
    """Return the three figures; Ray runs."""
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        model = write_base_model(Path(folder) / "model", BaseModelConfig() if quick else SHAPE, seed=0)
        publisher: Any = ray.remote(Publisher).options(num_cpus=0.1).remote(str(model))
        readers: list[Any] = [ray.remote(Reader).options(num_cpus=0.05).remote() for _ in range(NUM_READERS)]
        try:
            num_rounds = 2 if quick else 11
            transport = await _transport(publisher, readers, num_rounds=num_rounds)
            return [await _sync(publisher, model, num_rounds=num_rounds), *transport]
        finally:
            for actor in (publisher, *readers):
                ray.kill(actor)


async def _transport(publisher: Any, readers: list[Any], *, num_rounds: int) -> list[Figure]:
    size = await publisher.size_bytes.remote()

    async def to(some: list[Any]) -> float:
        begin = time.perf_counter()
        manifest = await publisher.put.remote("v1")
        read = await asyncio.gather(*(reader.read.remote(manifest) for reader in some))
        seconds = time.perf_counter() - begin
        if set(read) != {size}:
            raise RuntimeError(f"the readers hold {read} bytes, wanted {size} each")
        return seconds

    async def memcpy() -> float:
        seconds: float = await publisher.memcpy.remote()
        return seconds

    # The object store's pages are touched for the first time by the first puts: two versions are in it at once.
    alone = await in_turns(lambda: to(readers[:1]), memcpy, num_rounds=num_rounds, num_warm=4)
    all_readers = await in_turns(lambda: to(readers), lambda: to(readers[:1]), num_rounds=num_rounds)
    return [
        Figure.of(
            "weight_transport",
            "weight transport to one reader ÷ memcpy",
            alone.ratios,
            at_most=2.0,
            details={**alone.medians("s"), "mb": size / 1e6},
        ),
        Figure.of(
            "weight_transport_4",
            f"weight transport to {NUM_READERS} readers ÷ to one",
            all_readers.ratios,
            at_most=1.3,
            details=all_readers.medians("s"),
        ),
    ]


async def _sync(publisher: Any, model: Path, *, num_rounds: int) -> Figure:
    engine = EngineConfig(model=str(model), max_num_seqs=16, kv_cache_gb=0.25)
    pool = engine_pool(engine)
    plain = PlainProcess(environment=engine_environment(engine), niceness=worker_niceness())
    reload_s: list[float] = []
    versions = iter(range(1, 10_000))

    async def ours() -> float:
        version = f"v{next(versions)}"
        logprobs = await publisher.change.remote(PROBE)
        begin = time.perf_counter()
        manifest = await publisher.put.remote(version)
        probe = ParityProbe(token_ids=PROBE, logprobs=logprobs, bound=PARITY_BOUND)
        await sync_weights(pool, manifest, probe=probe, deadline_s=120.0)
        return time.perf_counter() - begin

    async def floor() -> float:
        copying: float = await publisher.memcpy.remote()
        reload_s.append(await plain.call(reload))
        return copying + reload_s[-1]

    try:
        await asyncio.gather(pool.start(), plain.start(open_engine, engine))
        rounds = await in_turns(ours, floor, num_rounds=num_rounds)
    finally:
        plain.close()
        await pool.shutdown()
    return Figure.of(
        "weight_sync",
        "weight sync ÷ (memcpy + vLLM's own in-process reload)",
        rounds.ratios,
        at_most=1.2,
        details={**rounds.medians("s"), "reload_s": float(np.median(reload_s[2:]))},
    )


class Publisher:
    """Holds the weights, as rank 0 of a training group."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
        self._generator = torch.Generator().manual_seed(0)
        # Both are written beforehand: a page that is touched for the first time costs more than its copy.
        self._flat = np.ones(self.size_bytes(), dtype=np.uint8)
        self._copy = np.ones_like(self._flat)

    def size_bytes(self) -> int:
        """Return the size of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._model.named_parameters())

    def change(self, probe: tuple[tuple[int, ...], ...]) -> tuple[tuple[float, ...], ...]:
        """Make new weights and return their log-probs of the probe."""
        with torch.no_grad():
            for parameter in self._model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=self._generator) * 0.1)
            rows = [token_logprobs(self._model(torch.tensor([row])).logits, torch.tensor([row]))[0] for row in probe]
        return tuple(tuple(row[1:].tolist()) for row in rows)

    def put(self, version: str) -> WeightManifest:
        """Publish the weights."""
        return put_weights(self._model.named_parameters(), version=version)

    def memcpy(self) -> float:
        """Copy as many bytes from one place to another and return the seconds."""
        begin = time.perf_counter()
        np.copyto(self._copy, self._flat)
        return time.perf_counter() - begin


class Reader:
    """Takes weights and does nothing with them."""

    def read(self, manifest: WeightManifest) -> int:
        """Go through all tensors and return their bytes."""
        return sum(math.prod(tensor.shape) * tensor.element_size() for _, tensor in iter_tensors(manifest))


# ------------------------------------------------------------------------------------------ in the plain process


class PlainEngine:
    """vLLM's own engine and the tensors that it loads."""

    def __init__(self, engine: Any, tensors: list[tuple[str, torch.Tensor]]) -> None:
        self.engine = engine
        self.tensors = tensors


def open_engine(config: EngineConfig) -> PlainEngine:
    """Start vLLM's engine with the settings of a replica, and read the model's tensors into memory."""
    from safetensors.torch import load_file

    engine = make_vllm_engine(config, config.base_seed)._engine
    return PlainEngine(engine, list(load_file(Path(config.model) / "model.safetensors").items()))


def reload(held: PlainEngine) -> float:
    """Load the tensors into the engine and return the seconds."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    def load(worker: Any) -> None:
        worker.reload_weights(weights_iterator=iter(held.tensors))
        for module in worker.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    begin = time.perf_counter()
    held.engine.collective_rpc(load)
    return time.perf_counter() - begin
