"""Owns the one thread that touches an engine: it steps it, and runs other threads' commands between two steps.

    call, post ─► commands ─► [ thread: add, abort, load … │ step │ step … ] ─► outboxes
                  (queue)

Knows neither vLLM nor asyncio.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from actors.generation import GenerationRequest
from cluster.weights import WeightManifest

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the engine is asked for: one sample of a request, or the log-probs of a probe sequence."""

    prompt_token_ids: tuple[int, ...]
    request: GenerationRequest
    sample_index: int = 0
    label_ids: tuple[int, ...] = ()
    """Token ids of the request's labels."""
    score_prompt: bool = False
    """Report the prompt's log-probs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What the engine says of one sample; the fields are those of `Completion`, with token ids for labels."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    mark_positions: tuple[int, ...]
    label_logprobs: tuple[tuple[float, ...], ...]
    weight_spans: tuple[tuple[str, int, int], ...]
    finish_reason: str
    prompt_logprobs: tuple[float, ...] = ()
    """Of prompt tokens 2..n, in nats at temperature 1; only with `score_prompt`."""


class InferenceEngine(Protocol):
    """What the thread and the actor need of an engine; one thread alone calls it."""

    max_model_len: int

    def add(self, name: str, sample: Sample, *, priority: int) -> None:
        """Take a sample; lower priorities go first."""

    def abort(self, names: list[str]) -> None:
        """Drop samples."""

    def is_busy(self) -> bool:
        """Return whether samples are left to be stepped."""

    def step(self) -> list[tuple[str, Finished]]:
        """Compute one step and return what finished, by name."""

    def load_weights(self, manifest: WeightManifest) -> None:
        """Replace all weights and take the manifest's version; after an exception the engine is unusable."""

    def connect(self, backend: str, rendezvous: Mapping[str, Any]) -> None:
        """Meet the ranks by one of vLLM's own ways to send weights."""

    def start_update(self) -> None:
        """Make ready for weights that come in parts; until the end of the update nothing may be stepped."""

    def receive(self, part: Any) -> None:
        """Receive a part from the ranks."""

    def finish_update(self) -> None:
        """Put together what was received."""

    def adopt(self, version: str) -> None:
        """Forget what the weights before computed, and call the new ones by their version."""

    def sleep(self, level: int) -> None:
        """Give the GPU's memory back; only while there is nothing to step."""

    def wake(self) -> None:
        """Take the GPU's memory again, with the weights as they were."""


class Outbox(Protocol):
    """Where the thread puts what a caller waits for."""

    def put(self, sample: Sample, finished: Finished) -> None:
        """Take one finished sample."""

    def flush(self) -> None:
        """Called once after each step in which `put` was."""

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""


class EngineThread:
    """One daemon thread that makes an engine, steps it, and runs other threads' commands between two steps."""

    def __init__(
        self, make_engine: Callable[[], InferenceEngine], *, on_fatal: Callable[[BaseException], None]
    ) -> None:
        self.started: concurrent.futures.Future[InferenceEngine] = concurrent.futures.Future()
        self.busy_s = 0.0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._make_engine = make_engine
        self._on_fatal = on_fatal
        self._commands: queue.SimpleQueue[Callable[[InferenceEngine], None]] = queue.SimpleQueue()
        self._names = itertools.count()
        self._waiting: dict[str, tuple[Sample, Outbox]] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    @property
    def num_running(self) -> int:
        """Return the number of samples in the engine."""
        return len(self._waiting)

    def post(self, command: Callable[[InferenceEngine], None]) -> None:
        """Run a command in the thread, between two steps, and wait for nothing; an exception of it is fatal."""
        self._commands.put(command)

    def call(self, command: Callable[[InferenceEngine], T]) -> concurrent.futures.Future[T]:
        """Run a command in the thread and return the future of its result or exception."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run(engine: InferenceEngine) -> None:
            # What was queued runs, even when its caller has gone: its own clean-up follows in the queue.
            is_wanted = future.set_running_or_notify_cancel()
            try:
                result = command(engine)
            except Exception as error:  # noqa: BLE001 - it is the caller's
                if is_wanted:
                    future.set_exception(error)
                else:
                    logger.warning("a command whose caller has gone failed: %s", error)
            else:
                if is_wanted:
                    future.set_result(result)

        self._commands.put(run)
        return future

    # What follows is for commands: it runs in the thread.

    def add(self, engine: InferenceEngine, samples: Iterable[Sample], outbox: Outbox, *, priority: int = 0) -> None:
        """Add samples; all of them or, on an exception, none."""
        try:
            for sample in samples:
                name = str(next(self._names))
                engine.add(name, sample, priority=priority)
                self._waiting[name] = (sample, outbox)
        except Exception:
            self.abort(engine, outbox)
            raise

    def abort(self, engine: InferenceEngine, outbox: Outbox) -> None:
        """Drop the samples of a caller that waits for them no more."""
        gone = [name for name, (_, owner) in self._waiting.items() if owner is outbox]
        for name in gone:
            del self._waiting[name]
        if gone:
            engine.abort(gone)

    def abort_all(self, engine: InferenceEngine, *, error: Exception) -> None:
        """Drop every sample and tell its caller why."""
        for outbox in {id(outbox): outbox for _, outbox in self._waiting.values()}.values():
            self.abort(engine, outbox)
            outbox.fail(error)

    def step(self, engine: InferenceEngine) -> None:
        """Run one engine step and hand out what finished."""
        started = time.perf_counter()
        try:
            done = engine.step()
        except Exception as error:
            # Also from within a command: what the engine core holds is lost, whoever asked for this step.
            self._on_fatal(error)
            raise
        self.busy_s += time.perf_counter() - started
        touched: dict[int, Outbox] = {}
        for name, finished in done:
            sample, outbox = self._waiting.pop(name)
            self.num_prompt_tokens += len(sample.prompt_token_ids)
            self.num_generated_tokens += len(finished.token_ids)
            outbox.put(sample, finished)
            touched[id(outbox)] = outbox
        for outbox in touched.values():
            outbox.flush()

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except BaseException as error:  # noqa: BLE001 - whoever asks whether the engine is ready gets it
            self.started.set_exception(error)
            return
        self.started.set_result(engine)
        try:
            while True:
                if not engine.is_busy():
                    self._commands.get()(engine)
                while not self._commands.empty():
                    self._commands.get()(engine)
                if engine.is_busy():
                    self.step(engine)
        except BaseException as error:  # noqa: BLE001 - the thread ends, and with it the replica
            self._on_fatal(error)
