"""A hand-written replica for the fast tests: a plain Ray actor that answers by a function, and fails on command.

    pool = Pool(name="fake", start_replica=fake_starter(answer=letters), num_replicas=2)

`answer` is any picklable function from a request to its list of results (or to an exception class to be raised).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cluster.replica import EngineStats, Replica, ReplicaInfo
from cluster.weights import WeightAnswer, WeightManifest, iter_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRequest:
    """What a pool needs of a request, and a prompt."""

    request_id: str
    num_samples: int = 1
    max_tokens: int = 1
    prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeResult:
    """What a pool needs of a result, and who made it."""

    request_id: str
    sample_index: int
    finish_reason: str = "stop"
    text: str = ""
    replica_id: int = -1
    weight_version: str = ""


def echo(request: Any) -> list[FakeResult]:
    """Answer every sample with the prompt and the sample's index."""
    return [
        FakeResult(request_id=request.request_id, sample_index=i, text=f"{request.prompt}#{i}")
        for i in range(request.num_samples)
    ]


@dataclass(slots=True, kw_only=True)
class Behaviour:
    """How a fake replica misbehaves; the default is well."""

    chunk: int = 64
    """Results per yielded list."""
    delay_s: float = 0.0
    """Pause before every yielded list."""
    start_delay_s: float = 0.0
    fail_start: bool = False
    """Its constructor raises."""
    die_after_chunks: int | None = None
    """SIGKILL itself after that many lists of one call."""
    hang_after_chunks: int | None = None
    """Never yield again after that many lists of one call."""
    deaf_canary: bool = False
    """check() never answers."""
    error_samples: bool = False
    """Every sample ends with finish_reason "error"."""
    parity_error: float = 0.0
    """Nats added to every log-prob of a probe."""
    apply_delay_s: float = 0.0
    apply_delays_from: str = ""
    """First version that is delayed."""
    die_on_apply: bool = False


class FakeReplica:
    """The methods of `cluster.replica`, without an engine.

    Its "model" is the sum of its weights: the log-prob of every probe token is -sum.
    """

    def __init__(self, replica_id: int, behaviour: Behaviour, answer: Callable[[Any], list[Any]]) -> None:
        if behaviour.fail_start:
            raise ValueError("this fake was told not to start")
        self.replica_id = replica_id
        self.behaviour = behaviour
        self.answer = answer
        self.version = "v0"
        self.total = 0.0
        self.served: list[str] = []
        self.versions_at_requests: list[str] = []
        self.num_aborted = 0
        self.num_generated = 0
        self.num_running = 0

    async def ready(self) -> ReplicaInfo:
        await asyncio.sleep(self.behaviour.start_delay_s)
        return ReplicaInfo(replica_id=self.replica_id, node_id=ray.get_runtime_context().get_node_id(), pid=os.getpid())

    async def generate(self, requests: Sequence[Any]) -> AsyncIterator[list[Any]]:
        self.versions_at_requests.append(self.version)
        self.num_running += len(requests)
        behaviour, num_chunks = self.behaviour, 0
        pending: list[Any] = []
        try:
            for position, request in enumerate(requests):
                self.served.append(request.request_id)
                pending += [self._stamped(result) for result in self.answer(request)]
                last = position == len(requests) - 1
                while len(pending) >= behaviour.chunk or (last and pending):
                    if behaviour.die_after_chunks is not None and num_chunks >= behaviour.die_after_chunks:
                        sys.stderr.write("famous last words\n")
                        sys.stderr.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
                    if behaviour.hang_after_chunks is not None and num_chunks >= behaviour.hang_after_chunks:
                        await asyncio.Event().wait()
                    if behaviour.delay_s:
                        await asyncio.sleep(behaviour.delay_s)
                    chunk, pending = pending[: behaviour.chunk], pending[behaviour.chunk :]
                    num_chunks += 1
                    self.num_generated += len(chunk)
                    yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.num_aborted += 1
            raise
        finally:
            self.num_running -= len(requests)

    async def apply_weights(self, manifest: WeightManifest, probe_token_ids: Sequence[Sequence[int]]) -> WeightAnswer:
        if self.behaviour.die_on_apply:
            os.kill(os.getpid(), signal.SIGKILL)
        if manifest.version >= self.behaviour.apply_delays_from:
            await asyncio.sleep(self.behaviour.apply_delay_s)
        # In a thread: a blocking get would stop the actor's event loop.
        self.total = await asyncio.to_thread(
            lambda: sum(float(tensor.float().sum()) for _, tensor in iter_tensors(manifest))
        )
        self.version = manifest.version
        logprob = -self.total + self.behaviour.parity_error
        return WeightAnswer(
            version=self.version, logprobs=tuple((logprob,) * (len(row) - 1) for row in probe_token_ids)
        )

    async def stats(self) -> EngineStats:
        return EngineStats(
            num_generated_tokens=self.num_generated, num_prompt_tokens=0, busy_s=0.0, num_running=self.num_running
        )

    async def check(self) -> None:
        if self.behaviour.deaf_canary:
            await asyncio.Event().wait()

    async def behave(self, behaviour: Behaviour) -> None:
        """Change how it behaves from now on."""
        self.behaviour = behaviour

    async def seen(self) -> dict[str, Any]:
        """Return what it was asked, what it held then, and how many calls were aborted."""
        return {
            "served": self.served,
            "versions_at_requests": self.versions_at_requests,
            "num_aborted": self.num_aborted,
            "version": self.version,
            "total": self.total,
        }

    def _stamped(self, result: Any) -> Any:
        if not isinstance(result, FakeResult):
            return result
        return FakeResult(
            request_id=result.request_id,
            sample_index=result.sample_index,
            finish_reason="error" if self.behaviour.error_samples else result.finish_reason,
            text=result.text,
            replica_id=self.replica_id,
            weight_version=self.version,
        )


def fake_starter(
    behaviours: dict[int, Behaviour] | None = None,
    *,
    answer: Callable[[Any], list[Any]] = echo,
    default: Behaviour | None = None,
    num_cpus: float = 0.01,
) -> Callable[[int], Replica]:
    """Return a `start_replica` of fakes; `behaviours` by replica id, ids beyond it get `default` (well-behaved)."""

    def start(replica_id: int) -> Replica:
        behaviour = (behaviours or {}).get(replica_id, default or Behaviour())
        actor = ray.remote(FakeReplica).options(num_cpus=num_cpus, max_concurrency=1000)
        return Replica(actor=actor.remote(replica_id, behaviour, answer))

    return start
