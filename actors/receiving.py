"""Owns weights that come straight from the ranks, in parts: the engine's thread waits for each and steps nothing else.

    rank 0: vLLM's sender ──► ReplicaClient ──► the replica's actor ──► Receiving.do ─► [ engine's thread: serve ]

Knows neither vLLM nor how the bytes travel (NCCL, CUDA IPC, RDMA): those calls only say when.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from actors.engine_thread import InferenceEngine

Command = Callable[[InferenceEngine], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A replica that waits for weights."""

    replica_id: int
    num_workers: int
    """Processes that receive, one on each of its GPUs."""


class Receiving:
    """One update, from its opening to its end."""

    def __init__(self, *, silence_s: float) -> None:
        """Describe an update that is given up when no part comes for so many seconds."""
        self._silence_s = silence_s
        self._parts: queue.SimpleQueue[tuple[Command, concurrent.futures.Future[None]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_over = False

    def do(self, command: Command) -> concurrent.futures.Future[None]:
        """Have the engine's thread run a part of the update, after those before it.

        Raises:
            RuntimeError: the update is over, or failed.
        """
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            if self._is_over:
                raise RuntimeError("weights: got a part of an update that is over, wanted a new one to be opened")
            self._parts.put((command, future))
        return future

    def end(self) -> None:
        """Let the engine's thread go on once it has run what was asked for."""
        self._parts.put(None)

    def serve(self, engine: InferenceEngine) -> None:
        """Run the parts as they come, until the end; for the engine's thread.

        Raises:
            TimeoutError: no part came in time.
            Exception: what a part raised; its caller gets it too.
        """
        try:
            while (part := self._next()) is not None:
                command, future = part
                try:
                    command(engine)
                except Exception as error:
                    future.set_exception(error)
                    raise
                future.set_result(None)
        finally:
            self._refuse_the_rest()

    def _next(self) -> tuple[Command, concurrent.futures.Future[None]] | None:
        try:
            return self._parts.get(timeout=self._silence_s)
        except queue.Empty:
            raise TimeoutError(f"weights: no part of the update came for {self._silence_s:g} s") from None

    def _refuse_the_rest(self) -> None:
        with self._lock:
            self._is_over = True
            while not self._parts.empty():
                part = self._parts.get()
                if part is not None:
                    part[1].set_exception(RuntimeError("weights: the update failed at an earlier part"))


class ReplicaClient:
    """What vLLM's half of a transfer in rank 0 calls, by vLLM's protocol (`VLLMWeightSyncClient`): one replica."""

    def __init__(self, actor: Any, *, backend: str, deadline_s: float) -> None:
        """Speak to a replica's actor; every call has the deadline."""
        self._actor = actor
        self._backend = backend
        self._deadline_s = deadline_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the replica's workers meet the ranks."""
        self._wait(self._actor.connect_weights.remote(self._backend, init_info))

    def start_weight_update(self) -> None:
        """Have the replica make ready for new weights."""
        self._wait(self._actor.start_weights.remote())

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Have the replica receive, while the ranks send."""
        self._wait(self._actor.receive_weights.remote(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have the replica put together what it received; its version is set when it is asked to prove it."""
        self._wait(self._actor.finish_weights.remote())

    def _wait(self, answer: ray.ObjectRef[None]) -> None:
        ray.get(answer, timeout=self._deadline_s)
