"""Owns the engine: a Ray actor around vLLM's in-process engine, stepped by the one thread that touches it.

    generate ─┐                        ┌─► add ─► step ─► step … ─► finished ─┐
    generate ─┼─► commands ─► thread ──┤                                      ├─► call_soon_threadsafe ─► the callers
    apply_…  ─┘     (queue)            └─► load weights, probe ───────────────┘

Requests of all callers share vLLM's continuous batching. Knows nothing of roles, domains, losses or pools. vLLM is
imported inside functions: the environment must be set first, and a driver that only wants the records pays nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import itertools
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import ray
from pydantic import Field

from actors.chat import Tokenizer, check_model_directory, decode, encode_chat, label_token_id, load_tokenizer
from actors.records import Message
from cluster.config import Config
from cluster.log import start_log
from cluster.weight_sync import WeightAnswer, WeightManifest, iter_tensors, probe_rows, verify_buckets

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST = -1
"""Priority of probes and canaries: before every request that waits, so that a busy engine answers its deadline."""

MAX_LABELS = 128
"""vLLM's limit of `logprob_token_ids`."""


class EngineBroken(RuntimeError):
    """The engine failed in the middle of loading weights and holds neither the old ones nor the new ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A conversation to be continued `num_samples` times."""

    request_id: str
    messages: tuple[Message, ...]
    max_tokens: int
    """Greatest number of sampled tokens per sample; also bounded by what the model's length leaves after the prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    num_samples: int = 1
    seed: int | None = None
    """The same seed gives the same samples, whichever replica answers; None samples from the replica's own stream."""
    top_p: float = 1.0
    labels: tuple[str, ...] = ()
    """Single tokens; wherever one of them is sampled, the log-probs of all are reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished sample of a request."""

    request_id: str
    sample_index: int
    text: str
    """Without control tokens."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Sampled tokens, the end-of-sequence token included."""
    logprobs: tuple[float, ...]
    """Nats per sampled token, of the sampling distribution (after temperature and top-p)."""
    label_marks: tuple[tuple[int, str], ...]
    """(index into `token_ids`, label) wherever the sampled token is one of the request's labels."""
    label_logprobs: tuple[tuple[float, ...], ...]
    """For each mark the log-probs of all labels, in the request's order; nats, of the sampling distribution."""
    weight_version: str
    """Version of the weights that sampled the last token."""
    weight_spans: tuple[tuple[str, int, int], ...]
    """(version, start, end): tokens [start, end) were sampled by that version's weights."""
    finish_reason: str
    """"stop", "length", "error" or "abort"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """Where a replica lives."""

    replica_id: int
    node_id: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What a replica has done since it started."""

    num_generated_tokens: int
    num_prompt_tokens: int
    busy_s: float
    """Seconds inside engine steps."""
    num_running: int
    """Samples in the engine, waiting ones included."""


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


# ------------------------------------------------------------------------------------------------------------- thread


class SteppedEngine(Protocol):
    """What the thread needs of vLLM's `LLMEngine`."""

    def add_request(self, request_id: str, prompt: Any, params: Any, *, priority: int = 0) -> str: ...

    def abort_request(self, request_ids: list[str]) -> None: ...

    def has_unfinished_requests(self) -> bool: ...

    def step(self) -> list[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One engine request: a sample of a `GenerationRequest`, or a probe."""

    request: GenerationRequest
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    label_ids: tuple[int, ...]


class Outbox(Protocol):
    """Where the thread puts what a caller waits for."""

    def put(self, sample: Sample, output: Any) -> None:
        """Take one finished output."""

    def flush(self) -> None:
        """Called after each step in which `put` was."""

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""


class EngineThread:
    """One daemon thread that makes an engine, steps it, and runs other callers' commands between two steps."""

    def __init__(self, make_engine: Callable[[], SteppedEngine], *, on_fatal: Callable[[BaseException], None]) -> None:
        self.started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.busy_s = 0.0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._make_engine = make_engine
        self._on_fatal = on_fatal
        self._commands: queue.SimpleQueue[Callable[[SteppedEngine], None]] = queue.SimpleQueue()
        self._names = itertools.count()
        self._waiting: dict[str, tuple[Sample, Outbox]] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    @property
    def num_running(self) -> int:
        """Return the number of samples in the engine."""
        return len(self._waiting)

    def post(self, command: Callable[[SteppedEngine], None]) -> None:
        """Run a command in the thread, between two steps, and wait for nothing; an exception of it is fatal."""
        self._commands.put(command)

    def call(self, command: Callable[[SteppedEngine], T]) -> concurrent.futures.Future[T]:
        """Run a command in the thread and return the future of its result or exception."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run(engine: SteppedEngine) -> None:
            try:
                result = command(engine)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._commands.put(run)
        return future

    def add(
        self, engine: SteppedEngine, samples: Iterable[tuple[Sample, Any]], outbox: Outbox, *, priority: int = 0
    ) -> None:
        """Add samples with their vLLM parameters; all of them or, on an exception, none."""
        try:
            for sample, params in samples:
                name = str(next(self._names))
                prompt = {"type": "token", "prompt_token_ids": list(sample.prompt_token_ids)}
                engine.add_request(name, prompt, params, priority=priority)
                self._waiting[name] = (sample, outbox)
        except Exception:
            self.abort(engine, outbox)
            raise

    def abort(self, engine: SteppedEngine, outbox: Outbox) -> None:
        """Drop the samples of a caller that waits for them no more."""
        gone = [name for name, (_, owner) in self._waiting.items() if owner is outbox]
        for name in gone:
            del self._waiting[name]
        if gone:
            engine.abort_request(gone)

    def abort_all(self, engine: SteppedEngine, *, error: Exception) -> None:
        """Drop every sample and tell its caller why."""
        for outbox in {id(outbox): outbox for _, outbox in self._waiting.values()}.values():
            self.abort(engine, outbox)
            outbox.fail(error)

    def step(self, engine: SteppedEngine) -> None:
        """Run one engine step and hand out what finished."""
        started = time.perf_counter()
        try:
            outputs = engine.step()
        except Exception as error:
            # Also from within a command: what the engine core holds is lost, whoever asked for this step.
            self._on_fatal(error)
            raise
        self.busy_s += time.perf_counter() - started
        touched: dict[int, Outbox] = {}
        for output in outputs:
            if output.finished and output.request_id in self._waiting:
                sample, outbox = self._waiting.pop(output.request_id)
                self.num_prompt_tokens += len(sample.prompt_token_ids)
                self.num_generated_tokens += len(output.outputs[0].token_ids)
                outbox.put(sample, output)
                touched[id(outbox)] = outbox
        for outbox in touched.values():
            outbox.flush()

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except BaseException as error:
            self.started.set_exception(error)
            return
        self.started.set_result(None)
        try:
            while True:
                if not engine.has_unfinished_requests():
                    self._commands.get()(engine)
                while not self._commands.empty():
                    self._commands.get()(engine)
                if engine.has_unfinished_requests():
                    self.step(engine)
        except BaseException as error:
            self._on_fatal(error)


class _Stream:
    """Outputs of one `generate` call on their way from the thread to its event loop."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._stepped: list[tuple[Sample, Any]] = []
        self._outputs: list[tuple[Sample, Any]] = []

    def put(self, sample: Sample, output: Any) -> None:
        self._stepped.append((sample, output))

    def flush(self) -> None:
        outputs, self._stepped = self._stepped, []
        self._loop.call_soon_threadsafe(self._push, outputs, None)

    def fail(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._push, [], error)

    def take(self) -> list[tuple[Sample, Any]]:
        outputs, self._outputs = self._outputs, []
        self.arrived.clear()
        return outputs

    def __len__(self) -> int:
        return len(self._outputs)

    def _push(self, outputs: list[tuple[Sample, Any]], error: Exception | None) -> None:
        self._outputs += outputs
        self.error = self.error or error
        self.arrived.set()


class _Collected:
    """Outputs that the thread itself waits for."""

    def __init__(self) -> None:
        self.outputs: dict[int, Any] = {}

    def put(self, sample: Sample, output: Any) -> None:
        self.outputs[sample.sample_index] = output

    def flush(self) -> None:
        pass

    def fail(self, error: Exception) -> None:
        raise error


# -------------------------------------------------------------------------------------------------------------- actor


class EngineActor:
    """A replica: the Ray actor that a pool calls.

    A failure of the engine core ends the process, so that callers see `ActorDiedError` and a pool re-issues elsewhere.
    """

    def __init__(self, config: EngineConfig, *, replica_id: int, log_path: str | None) -> None:
        _log_to(log_path)
        self._config = config
        self._replica_id = replica_id
        self._broken: str | None = None
        self._max_model_len = 0
        self._thread = EngineThread(self._start, on_fatal=_die)

    async def ready(self) -> ReplicaInfo:
        """Return where the replica lives, once its engine runs.

        Raises:
            ValueError: the model directory lacks its config, tokenizer or chat template.
        """
        await asyncio.wrap_future(self._thread.started)
        node_id = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        return ReplicaInfo(replica_id=self._replica_id, node_id=node_id, pid=os.getpid())

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Completion]]:
        """Yield finished samples in chunks, in the order in which they finish.

        A caller that goes away (cancellation, a closed generator) aborts what it has left in the engine.

        Raises:
            ValueError: a request that cannot be run; then none of them is.
            EngineBroken: a weight update failed half-way.
        """
        await self.ready()
        self._refuse_if_broken()
        samples = [sample for request in requests for sample in self._samples(request)]
        stream = _Stream()
        left = len(samples)
        try:
            await asyncio.wrap_future(
                self._thread.call(lambda engine: self._thread.add(engine, _with_params(samples), stream))
            )
            while left:
                await stream.arrived.wait()
                if stream.error is None and len(stream) < left:
                    await asyncio.sleep(self._config.coalesce_ms / 1000)
                outputs = stream.take()
                if stream.error is not None:
                    raise stream.error
                left -= len(outputs)
                yield [_completion(sample, output, tokenizer=self._tokenizer) for sample, output in outputs]
        finally:
            if left:
                self._thread.post(lambda engine: self._thread.abort(engine, stream))

    async def apply_weights(
        self, manifest: WeightManifest, probe_token_ids: Sequence[Sequence[int]]
    ) -> WeightAnswer:
        """Load a version of the weights, then return what the engine says of the probe sequences.

        Requests in flight are not drained: they go on under the new weights, their caches computed anew, and their
        `weight_spans` say which tokens came from which version. Weights that are refused (`ValueError`) leave the
        engine as it was; a failure while they are loaded leaves it broken, and it answers nothing more.

        Raises:
            ValueError: tensors are missing, unexpected, of another shape, or their bytes are corrupt; or a probe
                sequence is too short or too long.
            EngineBroken: loading failed half-way, now or earlier.
        """
        await self.ready()
        self._refuse_if_broken()
        probe = tuple(tuple(row) for row in probe_token_ids)
        return await asyncio.wrap_future(self._thread.call(lambda engine: self._apply(engine, manifest, probe)))

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
        await self.ready()
        self._refuse_if_broken()
        canary = (Message(role="user", content="?"),)
        request = GenerationRequest(request_id="canary", messages=canary, max_tokens=1)
        samples = list(self._samples(request))
        stream = _Stream()
        await asyncio.wrap_future(
            self._thread.call(lambda engine: self._thread.add(engine, _with_params(samples), stream, priority=FIRST))
        )
        await stream.arrived.wait()
        if stream.error is not None:
            raise stream.error

    def _start(self) -> SteppedEngine:
        check_model_directory(self._config.model)
        self._tokenizer: Tokenizer = load_tokenizer(self._config.model)
        engine = _make_engine(self._config, seed=self._config.base_seed + self._replica_id)
        self._max_model_len = int(engine.vllm_config.model_config.max_model_len)
        stepped: SteppedEngine = engine
        return stepped

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            raise EngineBroken(self._broken)

    def _samples(self, request: GenerationRequest) -> Iterable[Sample]:
        check_request(request)
        prompt = encode_chat(self._tokenizer, request.messages)
        if len(prompt) >= self._max_model_len:
            raise ValueError(
                f"request {request.request_id}: the prompt has {len(prompt)} tokens, the engine's max_model_len is "
                f"{self._max_model_len}; shorten the messages or raise max_model_len"
            )
        label_ids = tuple(label_token_id(self._tokenizer, label) for label in request.labels)
        for index in range(request.num_samples):
            yield Sample(request=request, sample_index=index, prompt_token_ids=prompt, label_ids=label_ids)

    def _apply(self, engine: Any, manifest: WeightManifest, probe: tuple[tuple[int, ...], ...]) -> WeightAnswer:
        self._refuse_if_broken()
        for row in probe:
            if not 2 <= len(row) < self._max_model_len:
                raise ValueError(
                    f"probe: got a sequence of {len(row)} tokens, wanted 2 to {self._max_model_len - 1}"
                )
        # All that can be refused is refused before the model is touched.
        check_manifest(manifest, expected=expected_shapes(self._config.model))
        verify_buckets(manifest)
        try:
            engine.collective_rpc(lambda worker: worker.start_weight_update())
            engine.collective_rpc(lambda worker: worker.update_weights({"manifest": manifest}))
            engine.collective_rpc(lambda worker: worker.finish_weight_update())
            # Blocks computed by the old weights must go, also those that running requests hold.
            engine.reset_prefix_cache(reset_running_requests=True)
        except Exception as error:
            self._broken = f"weights {manifest.version}: loading failed half-way: {error}; start the replica anew"
            broken = EngineBroken(self._broken)
            self._thread.abort_all(engine, error=broken)
            raise broken from error
        engine.set_weight_version(manifest.version)
        return WeightAnswer(version=engine.get_weight_version(), logprobs=self._probe(engine, probe))

    def _probe(self, engine: Any, probe: tuple[tuple[int, ...], ...]) -> tuple[tuple[float, ...], ...]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        request = GenerationRequest(request_id="probe", messages=(), max_tokens=1)
        answers = _Collected()
        samples = [
            (Sample(request=request, sample_index=i, prompt_token_ids=row, label_ids=()), params)
            for i, row in enumerate(probe)
        ]
        self._thread.add(engine, samples, answers, priority=FIRST)
        while len(answers.outputs) < len(probe):
            self._thread.step(engine)
        rows = []
        for i, row in enumerate(probe):
            # vLLM reports raw log-probs of prompt tokens, whatever the temperature; the first token has none.
            reported = answers.outputs[i].prompt_logprobs
            rows.append([reported[position][token].logprob for position, token in enumerate(row) if position])
        return probe_rows(rows)


def check_request(request: GenerationRequest) -> None:
    """Check the numbers of a request.

    Raises:
        ValueError: one of them is out of range; names the request and the field.
    """
    wanted = {
        "max_tokens": (request.max_tokens, request.max_tokens >= 1, "at least 1"),
        "num_samples": (request.num_samples, request.num_samples >= 1, "at least 1"),
        "temperature": (request.temperature, 0 <= request.temperature < float("inf"), "0 (greedy) or more"),
        "top_p": (request.top_p, 0 < request.top_p <= 1, "more than 0 and at most 1"),
        "labels": (request.labels, len(request.labels) <= MAX_LABELS, f"at most {MAX_LABELS}"),
    }
    for name, (got, right, want) in wanted.items():
        if not right:
            raise ValueError(f"request {request.request_id}: {name}: got {got}, wanted {want}")
    if len(set(request.labels)) < len(request.labels):
        raise ValueError(f"request {request.request_id}: labels: got {request.labels}, wanted each label once")


def sample_seed(seed: int | None, *, sample_index: int) -> int | None:
    """Return the seed of one sample of a request: 63 bits, another for each sample; None stays None.

    >>> sample_seed(1, sample_index=0) == sample_seed(1, sample_index=1)
    False
    """
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample_index}".encode()).digest()[:8], "big") >> 1


def _with_params(samples: Sequence[Sample]) -> Iterable[tuple[Sample, Any]]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for sample in samples:
        request = sample.request
        yield (
            sample,
            SamplingParams(
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=sample_seed(request.seed, sample_index=sample.sample_index),
                # The sampled token comes first in any case; 0 asks for no other, the list for exactly its own.
                logprobs=None if sample.label_ids else 0,
                logprob_token_ids=list(sample.label_ids) or None,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
        )


def _completion(sample: Sample, output: Any, *, tokenizer: Tokenizer) -> Completion:
    request, done = sample.request, output.outputs[0]
    token_ids = tuple(done.token_ids)
    flat = done.logprobs
    logprobs = tuple(flat.logprobs[start] for start in flat.start_indices)
    marks: list[tuple[int, str]] = []
    label_logprobs: list[tuple[float, ...]] = []
    if sample.label_ids:
        label_of = dict(zip(sample.label_ids, request.labels))
        for position, token in enumerate(token_ids):
            if token in label_of:
                # The sampled token comes first, then the labels in the request's order.
                first = flat.start_indices[position] + 1
                marks.append((position, label_of[token]))
                label_logprobs.append(tuple(flat.logprobs[first : first + len(sample.label_ids)]))
    spans = tuple((span.version, span.start, span.end) for span in done.weight_versions or ())
    return Completion(
        request_id=request.request_id,
        sample_index=sample.sample_index,
        text=decode(tokenizer, token_ids),
        prompt_token_ids=sample.prompt_token_ids,
        token_ids=token_ids,
        logprobs=logprobs,
        label_marks=tuple(marks),
        label_logprobs=tuple(label_logprobs),
        weight_version=spans[-1][0] if spans else "",
        weight_spans=spans,
        finish_reason=done.finish_reason,
    )


# ------------------------------------------------------------------------------------------------------------ weights


@cache
def expected_shapes(model: str) -> Mapping[str, tuple[int, ...]]:
    """Return name and shape of every parameter that an update must bring: `named_parameters()` of the model directory.

    A tied head is not among them. Nothing is loaded: the model is built without memory.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        module = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


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
    found = [f"{len(names)} {fault} ({', '.join(names[:5])}{', …' * (len(names) > 5)})" for fault, names in faults.items() if names]
    if found:
        raise ValueError(
            f"weights {manifest.version}: got {len(got)} tensors for {len(expected)} parameters: {'; '.join(found)}; "
            "publish every named_parameters() of the model once (a tied head is not one of them)"
        )


@cache
def _object_store_transfer() -> type:
    """Return our backend of vLLM's weight transfer, registered as `object_store`; made here because of the lazy import."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class ObjectStoreInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
        """There is nothing to connect to: a manifest carries its references."""

    @dataclass
    class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
        """One update is one manifest, that is all parameters."""

        manifest: WeightManifest

    class ObjectStoreTransfer(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):  # type: ignore[misc]
        """Loads the tensors of a manifest from the Ray object store of the worker's node."""

        init_info_cls = ObjectStoreInitInfo
        update_info_cls = ObjectStoreUpdateInfo

        def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
            self.model.load_weights(iter_tensors(update_info.manifest))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            # vLLM 0.32 leaves the packed head of the CPU backend stale (0.2 nats off, in silence).
            for module in self.model.modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

        def shutdown(self) -> None:
            pass

    WeightTransferEngineFactory.register_engine("object_store", ObjectStoreTransfer)
    return ObjectStoreTransfer


def __getattr__(name: str) -> type:
    """Give vLLM's own worker processes (tensor parallelism) a class by whose name they register our backend."""
    if name == "WorkerExtension":
        _object_store_transfer()
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


def _make_engine(config: EngineConfig, *, seed: int) -> Any:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    on_cpu = bool(current_platform.is_cpu())
    if on_cpu != (config.device == "cpu"):
        raise ValueError(f"engine: device is {config.device!r}, but the installed vLLM is built for "
                         f"{current_platform.device_type!r}; set device or install the other build")
    _object_store_transfer()
    parallel = config.tensor_parallel_size > 1
    arguments = EngineArgs(
        model=config.model,
        trust_remote_code=False,
        dtype=config.dtype,
        load_format=config.load_format,
        use_tqdm_on_load=False,
        seed=seed,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=int(config.kv_cache_gb * 2**30) if on_cpu else None,
        gpu_memory_utilization=config.gpu_memory_utilization,
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend="ray" if parallel else "uni",
        worker_extension_cls=f"{__name__}.WorkerExtension" if parallel else "",
        enforce_eager=config.enforce_eager,
        # On CPU a seeded request whose prompt is prefilled in chunks ends the engine ("CPU Generator does not use
        # offset", vLLM 0.32).
        enable_chunked_prefill=False if on_cpu else None,
        # With a step in flight, a swap between two steps would label its tokens with the wrong version.
        async_scheduling=False,
        scheduling_policy="priority",
        logprobs_mode="processed_logprobs",
        max_logprobs=MAX_LABELS,
        weight_transfer_config=WeightTransferConfig(backend="object_store"),
        disable_log_stats=True,
    )
    engine = LLMEngine.from_engine_args(arguments)
    engine.collective_rpc(lambda worker: worker.init_weight_transfer_engine({}))
    engine.set_weight_version(config.weight_version)
    return engine


def start_engine_replica(
    config: EngineConfig,
    *,
    replica_id: int,
    num_cpus: float = 1,
    log_path: str | None = None,
) -> Any:
    return (
        ray.remote(EngineActor)
        .options(num_cpus=num_cpus, runtime_env={"env_vars": engine_environment(config)}, max_restarts=0)
        .remote(config, replica_id=replica_id, log_path=log_path)
    )


def _log_to(log_path: str | None) -> None:
    """Send what this process logs to a file; without one only errors appear, on the worker's stderr."""
    if log_path is None:
        logging.getLogger("vllm").setLevel(logging.ERROR)
    else:
        start_log(Path(log_path), console_level=None)


def _die(error: BaseException) -> None:
    """End the process at once: an engine core that failed holds requests that nobody will ever finish."""
    logger.critical("the engine core failed; the replica ends", exc_info=error)
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    logging.shutdown()
    os._exit(1)
