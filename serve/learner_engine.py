"""Owns vLLM as the endpoint needs it: pieces of answers while they grow, and weights that change under them.

    answer ─┐              ┌─► add ─► step ─► pieces ──────────────┐
    answer ─┼─► commands ─►┤                   (held back while    ├─► call_soon_threadsafe ─► the callers
    swap ───┘   (thread)   └─► load ─► probe ─► weights are proved)┘

The engine, its one thread and its weight transfer are those of the pools (actors/engine.py); here are streams, stop
strings, log-probs of the likeliest tokens and JSON schemas. vLLM is imported inside functions, as there.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.engine import VllmEngine, check_manifest, make_vllm_engine
from actors.engine_config import EngineConfig
from actors.engine_thread import EngineThread, Finished, InferenceEngine, Sample
from actors.generation import GenerationRequest, sample_seed
from actors.model_directory import expected_shapes
from cluster.weights import ParityFailed, WeightAnswer, Weights, iter_tensors, parity
from serve.wire import AnswerLost, Piece, RequestRefused, ServedRequest, TokenLogprob, WeightSpan

logger = logging.getLogger(__name__)

FIRST = -1
"""Priority of probes and canaries."""
UNUSED = GenerationRequest(request_id="served", messages=(), max_tokens=1)
"""The thread's samples carry a pool's request; what is served here has another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSample(Sample):
    """One choice of a served request."""

    asked: ServedRequest
    index: int
    """Of the choice, over all prompts."""
    stream: PieceStream


class PieceStream:
    """Pieces of one request on their way from the thread to its event loop."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._stepped: list[Piece] = []
        self._pieces: list[Piece] = []

    def push(self, piece: Piece) -> None:
        """Take a piece; it leaves when the engine hands over."""
        self._stepped.append(piece)

    def hand_over(self) -> None:
        """Send what has been pushed."""
        pieces, self._stepped = self._stepped, []
        self._loop.call_soon_threadsafe(self._arrive, pieces, None)

    def put(self, sample: Sample, finished: Finished) -> None:
        """See `Outbox`: the last piece has been pushed already."""

    def flush(self) -> None:
        """See `Outbox`: the engine hands over, since it knows whether its weights are proved."""

    def fail(self, error: Exception) -> None:
        """Nothing more will come, and what was held back is forgotten."""
        self._stepped = []
        self._loop.call_soon_threadsafe(self._arrive, [], error)

    def take(self) -> list[Piece]:
        """Return what has arrived."""
        pieces, self._pieces = self._pieces, []
        self.arrived.clear()
        return pieces

    def _arrive(self, pieces: list[Piece], error: Exception | None) -> None:
        self._pieces += pieces
        self.error = self.error or error
        self.arrived.set()


class _Collected:
    """Outputs that the thread itself, or a canary, waits for."""

    def __init__(self) -> None:
        self.finished: dict[int, Finished] = {}

    def put(self, sample: Sample, finished: Finished) -> None:
        self.finished[sample.sample_index] = finished

    def flush(self) -> None:
        pass

    def fail(self, error: Exception) -> None:
        raise error


class Outgoing:
    """Pieces between a step of the engine and their streams; held back while the engine's weights are not proved."""

    def __init__(self) -> None:
        self._is_holding = False
        self._streams: dict[int, PieceStream] = {}
        """Those with pieces that have not been handed over."""

    def push(self, stream: PieceStream, piece: Piece) -> None:
        """Take a piece."""
        stream.push(piece)
        self._streams[id(stream)] = stream

    def step_ends(self) -> None:
        """Hand over what came, unless it is to be held back."""
        if not self._is_holding:
            self.release()

    def hold(self) -> None:
        """Hand over nothing until `release` or `drop`."""
        self._is_holding = True

    def release(self) -> None:
        """Hand over what was held back, and from now on at once."""
        self._is_holding = False
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.hand_over()

    def drop(self, error: Exception) -> None:
        """Forget what was held back, tell whoever waits for it why, and from now on hand over at once."""
        self._is_holding = False
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)


class ServingEngine(InferenceEngine, Protocol):
    """An engine of the thread that pushes pieces while answers grow."""

    outgoing: Outgoing


class StreamingEngine(VllmEngine):
    """The pools' engine, giving pieces while answers grow."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.outgoing = Outgoing()
        self._open: dict[str, _Growing] = {}

    def add(self, name: str, sample: Sample, *, priority: int) -> None:
        """See `InferenceEngine`."""
        prompt = {"type": "token", "prompt_token_ids": list(sample.prompt_token_ids)}
        self._engine.add_request(name, prompt, _sampling_params(sample), priority=priority)
        self._open[name] = _Growing(sample=sample)

    def abort(self, names: list[str]) -> None:
        """See `InferenceEngine`."""
        self._engine.abort_request(names)
        for name in names:
            del self._open[name]

    def is_busy(self) -> bool:
        """See `InferenceEngine`."""
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> list[tuple[str, Finished]]:
        """See `InferenceEngine`; hands the pieces of this step over, unless they are held back."""
        done: list[tuple[str, Finished]] = []
        for output in self._engine.step():
            growing = self._open.get(output.request_id)
            if growing is None:
                continue  # aborted since
            said = output.outputs[0]
            growing.token_ids += said.token_ids
            if isinstance(growing.sample, ServedSample):
                self.outgoing.push(growing.sample.stream, _piece(growing.sample, said))
            if output.finished:
                del self._open[output.request_id]
                done.append((output.request_id, growing.finished(output)))
        self.outgoing.step_ends()
        return done


@dataclass(slots=True, kw_only=True)
class _Growing:
    """A sample that the engine has."""

    sample: Sample
    token_ids: list[int] = field(default_factory=list)

    def finished(self, output: Any) -> Finished:
        prompt_logprobs: tuple[float, ...] = ()
        if self.sample.score_prompt:
            # Raw log-probs; the first token has none, and the prompt's own token comes first.
            flat = output.prompt_logprobs
            prompt_logprobs = tuple(flat.logprobs[start] for start in flat.start_indices[1:])
        said = output.outputs[0]
        return Finished(
            token_ids=tuple(self.token_ids),
            logprobs=(),
            mark_positions=(),
            label_logprobs=(),
            weight_spans=_spans(said),
            finish_reason=said.finish_reason,
            prompt_logprobs=prompt_logprobs,
        )


class LearnerEngine:
    """One engine of the endpoint: answers requests, and takes new weights while it does."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        seed: int,
        on_fatal: Callable[[BaseException], None],
        make_engine: Callable[[EngineConfig, int], ServingEngine] | None = None,
        expected: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Start the engine in its thread.

        Args:
            config: The engine's; `model` is a policy of the run.
            seed: Of samples that were asked for without one.
            on_fatal: Ends the replica.
            make_engine: In the place of vLLM.
            expected: Name and shape of every parameter; by default the model directory's.
        """
        self.weights: Weights | None = None
        """What the engine holds, once it has taken and proved it."""
        self._config = config
        self._expected = expected
        self._on_fatal = on_fatal
        self._num_checked_tokens = -1
        self._make_engine: Callable[[EngineConfig, int], ServingEngine] = make_engine or make_streaming_engine
        self._seed = seed
        self._engine: ServingEngine
        self._thread = EngineThread(self._start, on_fatal=on_fatal)

    @property
    def num_running(self) -> int:
        """Return the number of choices in the engine."""
        return self._thread.num_running

    async def started(self) -> int:
        """Wait for the engine and return its context, in tokens."""
        return (await asyncio.wrap_future(self._thread.started)).max_model_len

    def begin(self, request: ServedRequest) -> PieceStream:
        """Give a request to the engine; its pieces arrive in the stream.

        What the engine can't take is told by the stream's error, a `RequestRefused`.
        """
        stream = PieceStream()
        num = request.sampling.num_samples
        samples = [
            ServedSample(
                request=UNUSED,
                prompt_token_ids=prompt,
                sample_index=sample,
                asked=request,
                index=number * num + sample,
                stream=stream,
            )
            for number, prompt in enumerate(request.prompts)
            for sample in range(num)
        ]

        def add(engine: InferenceEngine) -> None:
            try:
                self._thread.add(engine, samples, stream)
            except ValueError as error:
                stream.fail(RequestRefused(" ".join(str(error).split())[:300]))

        self._thread.post(add)
        return stream

    def abort(self, stream: PieceStream) -> None:
        """Drop what is left of a request."""
        self._thread.post(lambda engine: self._thread.abort(engine, stream))

    async def take(self, weights: Weights) -> float:
        """Load weights under the running requests, prove them, and return max |Δ log-prob| in nats.

        Pieces made meanwhile are held back until the proof. Weights that fail it are taken out again: the engine goes
        on with those before, and what was open is lost (`AnswerLost`), to be begun anew. Without weights before, or
        when loading fails half-way, the replica ends.

        Raises:
            ValueError: the weights were refused before the engine was touched, or (`ParityFailed`) by the probe.
        """
        await self.started()
        diff = await asyncio.wrap_future(self._thread.call(lambda _: self._take(weights)))
        self.weights = weights
        return diff

    async def check(self, *, timeout_s: float) -> None:
        """Make sure that the engine moves: it has finished something since the last check, or samples a canary now.

        Raises:
            TimeoutError: it does not.
        """
        await self.started()
        if self._thread.num_generated_tokens != self._num_checked_tokens:
            self._num_checked_tokens = self._thread.num_generated_tokens
            return
        song = _Canary()
        canary = Sample(request=UNUSED, prompt_token_ids=(0, 0))
        self._thread.post(lambda engine: self._thread.add(engine, [canary], song, priority=FIRST))
        try:
            async with asyncio.timeout(timeout_s):
                await song.heard.wait()
        finally:
            self._thread.post(lambda engine: self._thread.abort(engine, song))

    # What follows runs in the engine's thread.

    def _start(self) -> InferenceEngine:
        self._engine = self._make_engine(self._config, self._seed)
        return self._engine

    def _take(self, weights: Weights) -> float:
        manifest, _ = weights
        expected = expected_shapes(self._config.model) if self._expected is None else self._expected
        check_manifest(manifest, expected=expected)
        for _ in iter_tensors(manifest):
            pass
        self._engine.outgoing.hold()
        try:
            diff = self._load_and_prove(weights)
        except ParityFailed as error:
            lost = AnswerLost(f"{manifest.version} was refused while this was answered")
            self._thread.abort_all(self._engine, error=lost)
            self._restore(error)
            self._engine.outgoing.drop(lost)
            raise
        self._engine.outgoing.release()
        return diff

    def _restore(self, refused: ParityFailed) -> None:
        """Go back to the weights before those that were refused; without any, or when they fail too, end."""
        try:
            if self.weights is None:
                raise refused
            logger.error("%s; back to %s", refused, self.weights[0].version)
            self._load_and_prove(self.weights)
        except ParityFailed as error:
            self._on_fatal(error)
            raise

    def _load_and_prove(self, weights: Weights) -> float:
        manifest, probe = weights
        try:
            self._engine.load_weights(manifest)
        except Exception as error:
            self._on_fatal(error)  # half of the tensors are new
            raise
        answer = WeightAnswer(version=manifest.version, logprobs=self._score(probe.token_ids))
        return parity(answer, version=manifest.version, probe=probe)

    def _score(self, rows: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
        answers = _Collected()
        samples = [
            Sample(request=UNUSED, sample_index=i, prompt_token_ids=tuple(row), score_prompt=True)
            for i, row in enumerate(rows)
        ]
        self._thread.add(self._engine, samples, answers, priority=FIRST)
        while len(answers.finished) < len(rows):
            self._thread.step(self._engine)
        return tuple(answers.finished[i].prompt_logprobs for i in range(len(rows)))


class _Canary(_Collected):
    """One token that somebody waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def flush(self) -> None:
        self._loop.call_soon_threadsafe(self.heard.set)


# --------------------------------------------------------------------------------------------------------------- vLLM


def make_streaming_engine(config: EngineConfig, seed: int) -> StreamingEngine:
    """Start vLLM in this process, whose environment must be that of `engine_environment`."""
    engine = make_vllm_engine(config, seed)._engine
    # Read when the first schema comes; otherwise a model may write white space to the length limit.
    structured = engine.vllm_config.structured_outputs_config
    structured.backend, structured.disable_any_whitespace = "xgrammar", True
    return StreamingEngine(engine)


def _sampling_params(sample: Sample) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if not isinstance(sample, ServedSample):
        return SamplingParams(
            max_tokens=1,
            prompt_logprobs=0 if sample.score_prompt else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    asked = sample.asked.sampling
    return SamplingParams(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=sample_seed(asked.seed, sample_index=sample.index),
        stop=list(asked.stop),
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logprobs=asked.num_top_logprobs,
        flat_logprobs=True,
        structured_outputs=None if asked.json_schema is None else StructuredOutputsParams(json=asked.json_schema),
        output_kind=RequestOutputKind.DELTA if sample.asked.stream else RequestOutputKind.FINAL_ONLY,
    )


def _piece(sample: ServedSample, said: Any) -> Piece:
    """Return what vLLM says of a choice as a piece."""
    num_top = sample.asked.sampling.num_top_logprobs
    return Piece(
        index=sample.index,
        text=said.text,
        num_tokens=len(said.token_ids),
        logprobs=() if num_top is None else _token_logprobs(said.logprobs, num_top=num_top),
        finish_reason=said.finish_reason,
        weight_spans=_spans(said),
    )


def _token_logprobs(flat: Any, *, num_top: int) -> tuple[TokenLogprob, ...]:
    """Return the sampled token of each position, which comes first, and the likeliest, by their ranks."""
    tokens = []
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        scored = {
            flat.token_ids[i]: (flat.ranks[i], flat.decoded_tokens[i] or "", _finite(flat.logprobs[i]))
            for i in range(start, end)
        }
        _, token, logprob = scored[flat.token_ids[start]]
        top = sorted(scored.values())[:num_top]
        tokens.append(TokenLogprob(token=token, logprob=logprob, top=tuple((word, value) for _, word, value in top)))
    return tuple(tokens)


def _finite(logprob: float) -> float:
    """Return a log-prob that JSON can carry: what a schema forbids has minus infinity."""
    return logprob if math.isfinite(logprob) else -9999.0


def _spans(said: Any) -> tuple[WeightSpan, ...]:
    return tuple((span.version, span.start, span.end) for span in said.weight_versions or ())
