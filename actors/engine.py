"""Owns the engine: a Ray actor around vLLM's in-process engine, stepped by the one thread that touches it.

    generate ─┐                        ┌─► add ─► step ─► step … ─► finished ─┐
    generate ─┼─► commands ─► thread ──┤                                      ├─► call_soon_threadsafe ─► the callers
    apply_…  ─┘     (queue)            └─► load weights, probe ───────────────┘

Requests of all callers share vLLM's continuous batching. Knows nothing of roles, domains, losses or pools. vLLM is
imported inside functions: the environment must be set first, and a driver that only wants the records pays nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import ray

from actors.adapter import AdapterConfig, adapter_shapes, engine_rank, write_adapter, zero_adapter
from actors.chat import Tokenizer, decode, encode_chat, encode_text, label_token_id, load_tokenizer
from actors.engine_config import EngineConfig, adapter_of, gpus_reserved, has_base, replica_bundles
from actors.engine_thread import EngineThread, Finished, InferenceEngine, Sample
from actors.generation import Completion, GenerationRequest, check_request, sample_seed
from actors.model_directory import check_model_directory, expected_shapes
from actors.receiving import Opened, Receiving, ReplicaClient
from actors.records import Message
from cluster.log import quiet_libraries, start_log
from cluster.node_labels import label_selector
from cluster.placement import SHARED_GPU, SharedPlaces, Slot, inside, place_replica
from cluster.replica import EngineStats, Replica, ReplicaInfo
from cluster.weight_transfer import Backend
from cluster.weights import WeightAnswer, WeightManifest, iter_tensors

logger = logging.getLogger(__name__)

__all__ = [
    "Completion",
    "EngineActor",
    "EngineBroken",
    "EngineConfig",
    "GenerationRequest",
    "start_engine_replica",
]

FIRST = -1
"""Priority of probes and canaries: before every request that waits, so that a busy engine answers its deadline."""


PROMPTS_KEPT = 256
"""Prompts whose token ids a replica keeps: the samples of a prompt come close together."""
RECEIVING_SILENCE_S = 120.0
"""Longest time between two parts of an update from the ranks, after which the replica gives itself up."""


class EngineAsleep(RuntimeError):
    """The engine has given its GPU's memory away and was asked for something."""


class EngineBroken(RuntimeError):
    """The engine failed in the middle of loading weights and holds neither the old ones nor the new ones."""


class _Stream:
    """Outputs of one `generate` call on their way from the thread to its event loop."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._stepped: list[tuple[Sample, Finished]] = []
        self._outputs: list[tuple[Sample, Finished]] = []

    def put(self, sample: Sample, finished: Finished) -> None:
        self._stepped.append((sample, finished))

    def flush(self) -> None:
        outputs, self._stepped = self._stepped, []
        self._loop.call_soon_threadsafe(self._push, outputs, None)

    def fail(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._push, [], error)

    def take(self) -> list[tuple[Sample, Finished]]:
        outputs, self._outputs = self._outputs, []
        self.arrived.clear()
        return outputs

    def __len__(self) -> int:
        return len(self._outputs)

    def _push(self, outputs: list[tuple[Sample, Finished]], error: Exception | None) -> None:
        self._outputs += outputs
        self.error = self.error or error
        self.arrived.set()


class _Collected:
    """Outputs that the thread itself waits for."""

    def __init__(self) -> None:
        self.finished: dict[int, Finished] = {}

    def put(self, sample: Sample, finished: Finished) -> None:
        self.finished[sample.sample_index] = finished

    def flush(self) -> None:
        pass

    def fail(self, error: Exception) -> None:
        raise error


# -------------------------------------------------------------------------------------------------------------- actor


class EngineActor:
    """A replica: the Ray actor that a pool calls.

    A failure of the engine core ends the process, so that callers see `ActorDiedError` and a pool re-issues elsewhere.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        replica_id: int,
        log_path: str | None = None,
        make_engine: Callable[[EngineConfig, int], InferenceEngine] | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
    ) -> None:
        if log_path is not None:
            start_log(Path(log_path), console_level=None)
        self._config = config
        self._replica_id = replica_id
        self._broken: str | None = None
        self._is_asleep = False
        self._receiving: Receiving | None = None
        self._make_engine = make_engine or make_vllm_engine
        self._thread = EngineThread(self._start, on_fatal=on_fatal or _die)

    async def ready(self) -> ReplicaInfo:
        """Return where the replica lives, once its engine runs.

        Raises:
            ValueError: the model directory lacks its config, tokenizer or chat template.
        """
        await self._engine_started()
        node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        return ReplicaInfo(replica_id=self._replica_id, node_id=node_id, pid=os.getpid())

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Completion]]:
        """Yield finished samples in chunks, in the order in which they finish.

        A caller that goes away (cancellation, a closed generator) aborts what it has left in the engine.

        Raises:
            ValueError: a request that cannot be run; then none of them is.
            EngineBroken: a weight update failed half-way.
        """
        max_model_len = await self._engine_started()
        self._refuse_if_broken()
        samples = [sample for request in requests for sample in self._samples(request, max_model_len=max_model_len)]
        stream = _Stream()
        left = len(samples)
        try:
            await asyncio.wrap_future(self._thread.call(lambda engine: self._thread.add(engine, samples, stream)))
            while left:
                await stream.arrived.wait()
                if stream.error is None and len(stream) < left:
                    await asyncio.sleep(self._config.coalesce_ms / 1000)
                outputs = stream.take()
                if stream.error is not None:
                    raise stream.error
                left -= len(outputs)
                yield [self._completion(sample, finished) for sample, finished in outputs]
        finally:
            if left:
                self._thread.post(lambda engine: self._thread.abort(engine, stream))

    async def apply_weights(self, manifest: WeightManifest, probe_token_ids: Sequence[Sequence[int]]) -> WeightAnswer:
        """Load a version of the weights, then return what the engine says of the probe sequences.

        Requests in flight are not drained: they go on under the new weights, their caches computed anew, and their
        `weight_spans` say which tokens came from which version. Weights that are refused (`ValueError`) leave the
        engine as it was; a failure while they are loaded leaves it broken, and it answers nothing more.

        Raises:
            ValueError: tensors are missing, unexpected, of another shape, or their bytes are corrupt; or a probe
                sequence is too short or too long.
            EngineBroken: loading failed half-way, now or earlier.
        """
        max_model_len = await self._engine_started()
        self._refuse_if_broken()
        probe = tuple(tuple(row) for row in probe_token_ids)
        for row in probe:
            if not 2 <= len(row) < max_model_len:
                raise ValueError(f"probe: got a sequence of {len(row)} tokens, wanted 2 to {max_model_len - 1}")
        return await asyncio.wrap_future(self._thread.call(lambda engine: self._apply(engine, manifest, probe)))

    async def open_weights(self, manifest: WeightManifest) -> Opened:
        """Expect a version straight from the ranks: from now on nothing is stepped, until `prove_weights`.

        Raises:
            ValueError: the manifest's tensors are not the model's; nothing has begun.
            EngineBroken: loading failed half-way, now or earlier.
        """
        await self._engine_started()
        self._refuse_if_broken()
        if self._receiving is not None:
            raise RuntimeError(f"weights {manifest.version}: an update is under way, wanted one at a time")
        if adapter_of(self._config) is not None:
            raise ValueError(f"weights {manifest.version}: got an adapter from the ranks, wanted apply_weights")
        check_manifest(manifest, expected=expected_shapes(self._config.model))
        receiving = self._receiving = Receiving(silence_s=RECEIVING_SILENCE_S)
        self._thread.post(lambda engine: self._receive(engine, receiving))
        return Opened(replica_id=self._replica_id, num_workers=self._config.tensor_parallel_size)

    async def connect_weights(self, backend: str, rendezvous: Mapping[str, Any]) -> None:
        """Meet the ranks; once, before the first update."""
        await self._part(lambda engine: engine.connect(backend, rendezvous))

    async def start_weights(self) -> None:
        """Make ready for new weights."""
        await self._part(lambda engine: engine.start_update())

    async def receive_weights(self, part: Any) -> None:
        """Receive, while the ranks send."""
        await self._part(lambda engine: engine.receive(part))

    async def finish_weights(self) -> None:
        """Put together what was received."""
        await self._part(lambda engine: engine.finish_update())

    async def prove_weights(self, version: str, probe_token_ids: Sequence[Sequence[int]]) -> WeightAnswer:
        """End the update: take the version, go on with what waits, and return what the engine says of the probe.

        Raises:
            EngineBroken: a part of the update failed, or none was opened.
        """
        if self._receiving is None:
            self._refuse_if_broken()
            raise EngineBroken(f"weights {version}: there is no update to prove, wanted open_weights first")
        receiving, self._receiving = self._receiving, None
        probe = tuple(tuple(row) for row in probe_token_ids)
        try:
            await asyncio.wrap_future(receiving.do(lambda engine: engine.adopt(version)))
        except RuntimeError as error:
            self._refuse_if_broken()
            raise EngineBroken(str(error)) from error
        receiving.end()
        logprobs = await asyncio.wrap_future(self._thread.call(lambda engine: self._score(engine, probe)))
        return WeightAnswer(version=version, logprobs=logprobs)

    async def sleep(self, level: int = 1) -> None:
        """Give the GPU's memory to whoever shares it; the weights are kept in the host's memory (level 1).

        Raises:
            ValueError: samples are running, which would be lost.
            EngineBroken: a weight update failed half-way.
        """
        await self._engine_started()
        self._refuse_if_broken()

        def fall_asleep(engine: InferenceEngine) -> None:
            if engine.is_busy():
                raise ValueError(
                    f"engine: got {self._thread.num_running} samples running, wanted none before it sleeps"
                )
            engine.sleep(level)

        await asyncio.wrap_future(self._thread.call(fall_asleep))
        self._is_asleep = True

    async def wake(self) -> None:
        """Take the GPU's memory again; an engine that is awake stays so."""
        await self._engine_started()
        if self._is_asleep:
            await asyncio.wrap_future(self._thread.call(lambda engine: engine.wake()))
            self._is_asleep = False

    async def stats(self) -> EngineStats:
        """Return the replica's counters."""
        return EngineStats(
            num_generated_tokens=self._thread.num_generated_tokens,
            num_prompt_tokens=self._thread.num_prompt_tokens,
            busy_s=self._thread.busy_s,
            num_running=self._thread.num_running,
        )

    async def check(self) -> None:
        """Sample one token, before all that waits: the canary of a replica that may hang.

        Raises:
            EngineBroken: a weight update failed half-way.
        """
        await self._engine_started()
        self._refuse_if_broken()
        request = GenerationRequest(request_id="canary", messages=(Message(role="user", content="?"),), max_tokens=1)
        sample = Sample(request=request, prompt_token_ids=encode_chat(self._tokenizer, request.messages))
        stream = _Stream()
        try:
            await asyncio.wrap_future(
                self._thread.call(lambda engine: self._thread.add(engine, [sample], stream, priority=FIRST))
            )
            await stream.arrived.wait()
        finally:
            self._thread.post(lambda engine: self._thread.abort(engine, stream))
        if stream.error is not None:
            raise stream.error

    def _start(self) -> InferenceEngine:
        check_model_directory(self._config.model)
        self._tokenizer: Tokenizer = load_tokenizer(self._config.model)
        # The samples of a query share its prompt, and to render and encode one takes longer than to add it.
        self._encoded = lru_cache(maxsize=PROMPTS_KEPT)(partial(encode_chat, self._tokenizer))
        self._label_id = lru_cache(maxsize=PROMPTS_KEPT)(partial(label_token_id, self._tokenizer))
        return self._make_engine(self._config, self._config.base_seed + self._replica_id)

    async def _engine_started(self) -> int:
        """Wait for the engine and return its `max_model_len`."""
        return (await asyncio.wrap_future(self._thread.started)).max_model_len

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            raise EngineBroken(self._broken)
        if self._is_asleep:
            raise EngineAsleep("engine: it sleeps, its GPU's memory is another's; wanted wake() first")

    async def _part(self, command: Callable[[InferenceEngine], None]) -> None:
        if self._receiving is None:
            raise RuntimeError("weights: got a part of an update, wanted open_weights first")
        await asyncio.wrap_future(self._receiving.do(command))

    def _receive(self, engine: InferenceEngine, receiving: Receiving) -> None:
        """Serve an update to its end, in the engine's thread."""
        try:
            receiving.serve(engine)
        except Exception as error:  # noqa: BLE001 - whoever asked for the part has it; the replica is broken
            self._broken = f"weights from the ranks: receiving failed half-way ({error}); start the replica anew"
            self._thread.abort_all(engine, error=EngineBroken(self._broken))

    def _samples(self, request: GenerationRequest, *, max_model_len: int) -> list[Sample]:
        check_request(request)
        if request.of_base and not has_base(self._config):
            raise ValueError(f"request {request.request_id}: of_base: got true, wanted an engine that others share")
        prompt = self._encoded(request.messages)
        if request.prefix:
            prompt += encode_text(self._tokenizer, request.prefix)
        if len(prompt) >= max_model_len:
            raise ValueError(
                f"request {request.request_id}: the prompt has {len(prompt)} tokens, the engine's max_model_len is "
                f"{max_model_len}; shorten the messages or raise max_model_len"
            )
        label_ids = tuple(self._label_id(label) for label in request.labels)
        return [
            Sample(request=request, sample_index=index, prompt_token_ids=prompt, label_ids=label_ids)
            for index in range(request.num_samples)
        ]

    def _completion(self, sample: Sample, finished: Finished) -> Completion:
        label_of = dict(zip(sample.label_ids, sample.request.labels, strict=True))
        spans = finished.weight_spans
        if sample.request.of_base:
            # vLLM has one version for all that an engine answers; the base is what it began with.
            spans = ((self._config.weight_version, 0, len(finished.token_ids)),)
        return Completion(
            request_id=sample.request.request_id,
            sample_index=sample.sample_index,
            text=self._text(sample.request.prefix, finished.token_ids),
            prompt_token_ids=sample.prompt_token_ids,
            token_ids=finished.token_ids,
            logprobs=finished.logprobs,
            label_marks=tuple((p, label_of[finished.token_ids[p]]) for p in finished.mark_positions),
            label_logprobs=finished.label_logprobs,
            weight_version=spans[-1][0] if spans else "",
            weight_spans=spans,
            finish_reason=finished.finish_reason,
        )

    def _text(self, prefix: str, token_ids: Sequence[int]) -> str:
        """Return what was sampled; after a prefix as it reads there, where a vocabulary would drop its first space."""
        if not prefix:
            return decode(self._tokenizer, token_ids)
        begun = encode_text(self._tokenizer, prefix)
        whole, before = decode(self._tokenizer, (*begun, *token_ids)), decode(self._tokenizer, begun)
        return whole.removeprefix(before)

    def _apply(
        self, engine: InferenceEngine, manifest: WeightManifest, probe: tuple[tuple[int, ...], ...]
    ) -> WeightAnswer:
        self._refuse_if_broken()
        # All that can be refused is refused before the model is touched: vLLM would load part of it in silence.
        check_manifest(manifest, expected=published_shapes(self._config))
        for _ in iter_tensors(manifest):
            pass
        self._load(engine, manifest)
        return WeightAnswer(version=manifest.version, logprobs=self._score(engine, probe))

    def _load(self, engine: InferenceEngine, manifest: WeightManifest) -> None:
        try:
            engine.load_weights(manifest)
        except Exception as error:
            self._broken = f"weights {manifest.version}: loading failed half-way ({error}); start the replica anew"
            broken = EngineBroken(self._broken)
            self._thread.abort_all(engine, error=broken)
            raise broken from error

    def _score(self, engine: InferenceEngine, rows: tuple[tuple[int, ...], ...]) -> tuple[tuple[float, ...], ...]:
        request = GenerationRequest(request_id="probe", messages=(), max_tokens=1)
        samples = [
            Sample(request=request, sample_index=i, prompt_token_ids=row, score_prompt=True)
            for i, row in enumerate(rows)
        ]
        answers = _Collected()
        self._thread.add(engine, samples, answers, priority=FIRST)
        while len(answers.finished) < len(rows):
            self._thread.step(engine)
        return tuple(answers.finished[i].prompt_logprobs for i in range(len(rows)))


# ------------------------------------------------------------------------------------------------------------ weights


def published_shapes(config: EngineConfig) -> Mapping[str, tuple[int, ...]]:
    """Return name and shape of every tensor that an update must bring: the model's parameters, or an adapter's alone.

    Raises:
        ValueError: the adapter's targets are no layers of the model.
    """
    shapes, adapter = expected_shapes(config.model), adapter_of(config)
    return shapes if adapter is None else adapter_shapes(shapes, adapter)


def check_manifest(manifest: WeightManifest, *, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an update that is not exactly the model's parameters: vLLM itself would load part of them in silence.

    Raises:
        ValueError: missing names, unexpected names, or other shapes; names the first few of each.
    """
    got = {spec.name: spec.shape for spec in manifest.tensors}
    missing = sorted(expected.keys() - got.keys())
    unexpected = sorted(got.keys() - expected.keys())
    misshapen = [
        f"{name} {list(got[name])} for {list(shape)}"
        for name, shape in expected.items()
        if name in got and tuple(got[name]) != tuple(shape)
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    found = [
        f"{len(names)} {fault} ({', '.join(names[:5])}{', …' * (len(names) > 5)})"
        for fault, names in faults.items()
        if names
    ]
    if found:
        raise ValueError(
            f"weights {manifest.version}: got {len(got)} tensors for {len(expected)} parameters: {'; '.join(found)}; "
            "publish every named_parameters() of the model once (a tied head is not one of them); where the engine has "
            "an adapter, that alone"
        )


# --------------------------------------------------------------------------------------------------------------- vLLM


class VllmEngine:
    """vLLM's `LLMEngine` in this process, as the thread wants it."""

    def __init__(self, engine: Any) -> None:
        self.max_model_len = int(engine.vllm_config.model_config.max_model_len)
        self._engine = engine
        self._samples: dict[str, Sample] = {}
        self._adapter: AdapterConfig | None = None
        self._loaded: dict[bool, Any] = {}
        """What a request says of the adapter that answers it, by whether it asks for the base."""

    def load_adapter(self, named: Iterable[tuple[str, Any]], config: AdapterConfig, *, of_base: bool = False) -> None:
        """Have requests, also those in flight, be answered with an adapter, in the place of the one before it.

        vLLM takes it from a directory, which is gone again when this returns. Those that ask for the base have one of
        their own, which changes nothing: in a batch with others a row without an adapter would get theirs.
        """
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(prefix="elenchus-adapter-") as folder:
            write_adapter(Path(folder), named, config, base_model=self._engine.vllm_config.model_config.model)
            name, number = ("base", 2) if of_base else ("adapter", 1)
            found = {"lora_name": name, "lora_int_id": number, "lora_path": folder}
            if not self._engine.add_lora(LoRARequest(**found, load_inplace=True)):
                raise RuntimeError("engine: vLLM did not take the adapter")
        # `load_inplace` would have it read again before every step.
        self._adapter, self._loaded[of_base] = config, LoRARequest(**found)

    def add(self, name: str, sample: Sample, *, priority: int) -> None:
        """See `InferenceEngine`."""
        prompt = {"type": "token", "prompt_token_ids": list(sample.prompt_token_ids)}
        adapter = self._loaded.get(sample.request.of_base)
        self._engine.add_request(name, prompt, _sampling_params(sample), lora_request=adapter, priority=priority)
        self._samples[name] = sample

    def abort(self, names: list[str]) -> None:
        """See `InferenceEngine`."""
        self._engine.abort_request(names)
        for name in names:
            del self._samples[name]

    def is_busy(self) -> bool:
        """See `InferenceEngine`."""
        busy: bool = self._engine.has_unfinished_requests()
        return busy

    def step(self) -> list[tuple[str, Finished]]:
        """See `InferenceEngine`."""
        return [
            (output.request_id, _finished(self._samples.pop(output.request_id), output))
            for output in self._engine.step()
            if output.finished
        ]

    def load_weights(self, manifest: WeightManifest) -> None:
        """See `InferenceEngine`; requests in flight keep their tokens, and their caches are computed anew."""
        if self._adapter is not None:
            self.load_adapter(iter_tensors(manifest, verified=True), self._adapter)
            self.adopt(manifest.version)
            return
        self._engine.collective_rpc(lambda worker: worker.weight_transfer_engine.take(directly=False))
        self._engine.collective_rpc(lambda worker: worker.start_weight_update())
        self._engine.collective_rpc(lambda worker: worker.update_weights({"manifest": manifest}))
        self._engine.collective_rpc(lambda worker: worker.finish_weight_update())
        self.adopt(manifest.version)

    def connect(self, backend: str, rendezvous: Mapping[str, Any]) -> None:
        """See `InferenceEngine`."""
        ends = {"backend": backend, "rendezvous": dict(rendezvous)}
        self._engine.collective_rpc(lambda worker: worker.init_weight_transfer_engine(ends))

    def start_update(self) -> None:
        """See `InferenceEngine`."""
        self._engine.collective_rpc(lambda worker: worker.weight_transfer_engine.take(directly=True))
        self._engine.collective_rpc(lambda worker: worker.start_weight_update())

    def receive(self, part: Any) -> None:
        """See `InferenceEngine`."""
        self._engine.collective_rpc(lambda worker: worker.update_weights(part))

    def finish_update(self) -> None:
        """See `InferenceEngine`."""
        self._engine.collective_rpc(lambda worker: worker.finish_weight_update())

    def adopt(self, version: str) -> None:
        """See `InferenceEngine`."""
        # Blocks that the old weights computed must go, also those that running requests hold.
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.set_weight_version(version)

    def sleep(self, level: int) -> None:
        """See `InferenceEngine`."""
        self._engine.sleep(level=level)

    def wake(self) -> None:
        """See `InferenceEngine`."""
        self._engine.wake_up()


def make_vllm_engine(config: EngineConfig, seed: int) -> VllmEngine:
    """Start vLLM in this process, whose environment must be that of `engine_environment`.

    Raises:
        ValueError: the installed vLLM is built for another device.
    """
    import torch  # noqa: F401 - its loggers exist from here on, and it complains of what vLLM imports (no triton)

    quiet_libraries()
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    on_cpu = bool(current_platform.is_cpu())
    if on_cpu != (config.device == "cpu"):
        raise ValueError(
            f"engine: device is {config.device!r}, but the installed vLLM is built for "
            f"{current_platform.device_type!r}; set device accordingly or install the other build"
        )
    register_object_store()
    transfer = WeightTransferConfig(backend="object_store")
    engine = LLMEngine.from_engine_args(
        EngineArgs(**vllm_arguments(config, seed=seed), weight_transfer_config=transfer)
    )
    engine.collective_rpc(lambda worker: worker.init_weight_transfer_engine({}))
    engine.set_weight_version(config.weight_version)
    ready = VllmEngine(engine)
    adapter = adapter_of(config)
    if adapter is not None:
        for of_base in (False, True)[: 1 + has_base(config)]:
            ready.load_adapter(zero_adapter(published_shapes(config)), adapter, of_base=of_base)
    return ready


def vllm_arguments(config: EngineConfig, *, seed: int) -> dict[str, Any]:
    """Return the fields of vLLM's `EngineArgs` that an engine's settings come to, by name; it has the others' say."""
    on_cpu, parallel = config.device == "cpu", config.tensor_parallel_size > 1
    return {
        "model": config.model,
        "trust_remote_code": False,
        "dtype": config.dtype,
        "load_format": config.load_format,
        "use_tqdm_on_load": False,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "kv_cache_memory_bytes": int(config.kv_cache_gb * 2**30) if on_cpu else None,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": "ray" if parallel else "uni",
        "worker_extension_cls": f"{__name__}.WorkerExtension" if parallel else "",
        "enforce_eager": config.enforce_eager,
        "enable_sleep_mode": config.sleeps,
        # On CPU a seeded request whose prompt is prefilled in chunks ends the engine: "CPU Generator does not use
        # offset" (vLLM 0.32).
        "enable_chunked_prefill": False if on_cpu else None,
        # With a step in flight, a swap between two steps would give its tokens the wrong version.
        "async_scheduling": False,
        "scheduling_policy": "priority",
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        **_adapter_arguments(config),
    }


def _adapter_arguments(config: EngineConfig) -> dict[str, Any]:
    adapter = adapter_of(config)
    if adapter is None:
        return {}
    return {
        "enable_lora": True,
        "max_loras": 1 + has_base(config),
        "max_lora_rank": engine_rank(adapter.rank),
        "lora_target_modules": list(adapter.targets),
    }


def _sampling_params(sample: Sample) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    request = sample.request
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=sample_seed(request.seed, sample_index=sample.sample_index),
        # The sampled token comes first in any case; 0 asks for no other, the list for exactly its own.
        logprobs=None if sample.label_ids else 0,
        logprob_token_ids=list(sample.label_ids) or None,
        prompt_logprobs=0 if sample.score_prompt else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _finished(sample: Sample, output: Any) -> Finished:
    done = output.outputs[0]
    token_ids = tuple(done.token_ids)
    starts, values = done.logprobs.start_indices, done.logprobs.logprobs
    num_labels, labels = len(sample.label_ids), frozenset(sample.label_ids)
    marks = tuple(position for position, token in enumerate(token_ids) if token in labels)
    prompt_logprobs: tuple[float, ...] = ()
    if sample.score_prompt:
        # Raw log-probs, whatever the temperature; the first token has none. The prompt's own token comes first.
        flat = output.prompt_logprobs
        prompt_logprobs = tuple(flat.logprobs[start] for start in flat.start_indices[1:])
    return Finished(
        token_ids=token_ids,
        logprobs=tuple(values[start] for start in starts),
        mark_positions=marks,
        # The sampled token comes first, then the labels in the request's order.
        label_logprobs=tuple(tuple(values[starts[p] + 1 : starts[p] + 1 + num_labels]) for p in marks),
        weight_spans=tuple((span.version, span.start, span.end) for span in done.weight_versions or ()),
        finish_reason=done.finish_reason,
        prompt_logprobs=prompt_logprobs,
    )


@cache
def register_object_store() -> None:
    """Register our backend of vLLM's weight transfer as `object_store`."""
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class ObjectStoreInitInfo(WeightTransferInitInfo):
        """Without a backend there is nothing to connect to: a manifest carries its references."""

        backend: str = ""
        """One of vLLM's own, by which the ranks send besides."""
        rendezvous: dict[str, Any] = field(default_factory=dict)
        """That backend's own init info."""

    @dataclass
    class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
        """One update is one manifest, that is all parameters."""

        manifest: WeightManifest

    class ObjectStoreTransfer(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
        """Loads the tensors of a manifest from the Ray object store of the worker's node.

        An engine of vLLM has one weight-transfer engine for life. This one therefore keeps one of vLLM's own beside
        it, once ranks have connected by it: which of the two takes an update is said before each.
        """

        init_info_cls = ObjectStoreInitInfo
        update_info_cls = ObjectStoreUpdateInfo

        _direct: WeightTransferEngine[Any, Any] | None = None
        _taking: WeightTransferEngine[Any, Any] | None = None

        def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
            if not init_info.backend:
                return
            if self._direct is not None:
                self._direct.shutdown()
            self._direct = WeightTransferEngineFactory.create_engine(
                WeightTransferConfig(backend=init_info.backend), self.vllm_config, self.device, self.model
            )
            self._direct.init_transfer_engine(self._direct.parse_init_info(init_info.rendezvous))

        def take(self, *, directly: bool) -> None:
            assert self._direct is not None or not directly, "ranks connect before they send"
            self._taking = self._direct if directly else None

        def start_weight_update(self) -> None:
            if self._taking is not None:
                self._taking.start_weight_update()
            else:
                initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            if self._taking is not None:
                self._taking.update_weights(update_info)
            else:
                super().update_weights(update_info)

        def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
            # `EngineActor._apply` has gone through all of them.
            self.model.load_weights(iter_tensors(update_info.manifest, verified=True))

        def finish_weight_update(self) -> None:
            if self._taking is not None:
                self._taking.finish_weight_update()
                return
            finalize_layerwise_reload(self.model, self.model_config)
            # vLLM 0.32 leaves the packed head of the CPU backend stale (0.2 nats off, in silence).
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

        def shutdown(self) -> None:
            if self._direct is not None:
                self._direct.shutdown()

    WeightTransferEngineFactory.register_engine("object_store", ObjectStoreTransfer)


def make_sender(
    backend: Backend,
    *,
    rank: int,
    parameters: Sequence[tuple[str, Any, tuple[int, ...]]],
    weights: Callable[[], Iterator[tuple[str, Any]]],
    client: ReplicaClient,
    num_workers: int,
    rendezvous: tuple[str, int],
) -> Any:
    """Return one rank's half of vLLM's transfer to one replica; its `send_weights()` is a collective of all ranks.

    Rank 0 meets the replica's workers here and drives them by the client; the others gather with it. A group for each
    replica, not one for all: a replica that dies, or comes, concerns no other.

    Args:
        parameters: name, torch dtype and whole shape of everything that will be sent, in its order.
        weights: gives a fresh pass over (name, whole tensor on this rank's GPU), in that order.
        num_workers: the replica's processes, one per GPU.
        rendezvous: address and free port on rank 0's node; "nccl" alone meets there.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Parameters(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name=name, dtype=dtype, shape=shape) for name, dtype, shape in parameters]

        def __iter__(self) -> Iterator[tuple[str, Any]]:
            return weights()

    info = sender_info(backend, rank=rank, num_workers=num_workers, rendezvous=rendezvous)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=Parameters())


def sender_info(backend: Backend, *, rank: int, num_workers: int, rendezvous: tuple[str, int]) -> Any:
    """Return vLLM's own description of a sending rank."""
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address, port = rendezvous
        # Rank 0 alone sends; the replica's workers are 1, 2, ….
        return NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=1 + num_workers, rank=rank)
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        # Packed: one buffer at a time, instead of a second copy of all weights.
        return IPCTrainerInitInfo(packed=True, rank=rank)
    if backend == "sharded_rdt":
        from vllm.distributed.weight_transfer.sharded_rdt_trainer import ShardedRDTTrainerInitInfo

        return ShardedRDTTrainerInitInfo(
            num_consumers=num_workers,
            workers_per_replica=num_workers,
            trainer_actor_namespace=ray.get_runtime_context().namespace,
            rank=rank,
        )
    raise ValueError(f'weights: got backend "{backend}", wanted "nccl", "ipc" or "sharded_rdt"')


def __getattr__(name: str) -> type:
    """Give vLLM's own worker processes (tensor parallelism) a class by whose name they register our backend."""
    if name == "WorkerExtension":
        register_object_store()
        return type("WorkerExtension", (), {})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# -------------------------------------------------------------------------------------------------------------- start


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Return the environment of a replica's process; vLLM and OpenMP read it when they are imported."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(config.threads),
        "MKL_NUM_THREADS": str(config.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Deprecations inside vLLM and torch's note on NUMA would otherwise reach the terminal through Ray.
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if config.enforce_eager:
        # vLLM compiles one small sampling function whatever enforce_eager says: 12 s at the first sampled token.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    return environment


def start_engine_replica(
    config: EngineConfig,
    *,
    replica_id: int,
    name: str = "engine",
    num_cpus: float = 1.0,
    log_path: str | Path | None = None,
    places: SharedPlaces | None = None,
    placement_timeout_s: float = 60.0,
) -> Replica:
    """Reserve room for a replica and start it there, or in one of the `places` that it shares in turn with others.

    `ready()` says when it serves. Blocks until there is room.

    Replicas of one `name` are one another's like where `config.arrangement` keeps them apart.
    `num_cpus` is what Ray's scheduler counts (pools may share cores: 0.5); `config.threads` is what is used. What the
    process logs is appended to `log_path`, on the replica's node.

    Raises:
        ValueError: the model directory lacks its config, tokenizer or chat template.
        PlacementTimeout: the cluster has no room.
    """
    check_model_directory(config.model)
    arguments = {"replica_id": replica_id, "log_path": None if log_path is None else str(log_path)}
    environment = engine_environment(config)
    if places is not None:
        with places.next(timeout_s=placement_timeout_s) as slot:
            options = {
                "name": slot.name,
                "num_gpus": SHARED_GPU if config.tensor_parallel_size == 1 else 0,
                "scheduling_strategy": inside(places.group, bundle=slot.bundles[0]),
                "runtime_env": {"env_vars": environment | shared_environment(slot)},
            }
            actor = ray.remote(EngineActor).options(num_cpus=num_cpus, max_restarts=0, **options)
            return Replica(actor=actor.remote(config, **arguments))
    group = place_replica(
        replica_bundles(config, num_cpus=num_cpus),
        pool=name,
        apart=config.arrangement == "spread",
        labels=label_selector(config.node_labels),
        timeout_s=placement_timeout_s,
    )
    actor = ray.remote(EngineActor).options(
        num_cpus=num_cpus,
        num_gpus=gpus_reserved(config),
        max_restarts=0,
        scheduling_strategy=inside(group),
        runtime_env={"env_vars": environment},
    )
    return Replica(actor=actor.remote(config, **arguments), placement_group=group)


def shared_environment(slot: Slot) -> dict[str, str]:
    """Return what tells vLLM's Ray executor where its workers stand in a gang, and that each has a part of a GPU."""
    return {
        "VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, slot.bundles)),
        "VLLM_RAY_PER_WORKER_GPUS": f"{SHARED_GPU:g}",
    }


def _die(error: BaseException) -> None:
    """End the process at once: an engine core that failed holds requests that nobody will ever finish."""
    logger.critical("the engine core failed; the replica ends", exc_info=error)
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    logging.shutdown()
    os._exit(1)
