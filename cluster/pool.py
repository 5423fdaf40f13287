"""Owns a pool: N replicas of one actor behind one queue, with retries, restarts and one version of the weights.

    route ─┐            ┌─► replica 0 ─┐
    route ─┼─► queue ───┼─► replica 1 ─┼─► results, each once, back to the route that asked
    route ─┘ (least     └─► replica 4 ─┘   (a lost replica's unanswered requests go back to the queue)
              outstanding work)

Knows requests and results by their ids alone, and neither engines nor what is generated. One asyncio loop calls
everything; replicas are Ray actors with the methods that `cluster.replica.Replica` names.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import psutil
import ray
from ray.exceptions import RayActorError, RayError

from cluster.placement import PlacementTimeout
from cluster.pool_errors import PoolExhausted, PoolFailed, first_line, last_lines
from cluster.ray_runtime import worker_stderr
from cluster.replica import EngineStats, Replica, ReplicaInfo, added, end, end_late, kill, local_process, processes_of
from cluster.weights import ParityFailed, WeightAnswer, Weights, parity

logger = logging.getLogger(__name__)

LOST_REASONS = frozenset({"error", "abort"})
"""Finish reasons that are no answer: the sample is asked for again."""

REMOTE_ERRORS = (RayError, TimeoutError)

KILL_GRACE_S = 3.0
"""How long a replica may take to end after Ray has been told to kill it."""


class Request(Protocol):
    """What a pool reads of a request; a `max_tokens`, when there is one, weighs it."""

    @property
    def request_id(self) -> str: ...

    @property
    def num_samples(self) -> int: ...


class Result(Protocol):
    """What a pool reads of a result."""

    @property
    def request_id(self) -> str: ...

    @property
    def sample_index(self) -> int: ...

    @property
    def finish_reason(self) -> str: ...


Req = TypeVar("Req", bound=Request)
Res = TypeVar("Res", bound=Result)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """How a pool stands to what is wanted of it."""

    wanted: int
    ready: int
    starting: int
    leaving: int
    """Replicas that finish what they are at and go."""
    why: str | None
    """What the replicas that are wanted and not ready wait for; None when there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A pool's state; token counts and seconds are totals over all replicas that ever were, as far as known."""

    name: str
    wanted: int
    ready: int
    starting: int
    num_lost: int
    """Replicas that died, hung or were quarantined."""
    num_retried: int
    """Requests that were issued again."""
    num_queued: int
    """Requests that wait for a replica."""
    num_open: int
    """Samples asked for and not answered yet."""
    num_answered: int
    """Samples answered since the pool began."""
    why: str | None
    """What the replicas that are wanted and not ready wait for; None when there are none."""
    version: str | None
    """None before the first sync."""
    num_generated_tokens: int
    num_prompt_tokens: int
    busy_s: float
    num_running: int
    replicas: dict[int, EngineStats]
    """Of the replicas that answered."""


class _State(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class _Route(Generic[Req, Res]):
    """One `route` call: what it still waits for and what it has not fetched yet."""

    open: dict[str, _Work[Req, Res]] = field(default_factory=dict)
    chunks: deque[list[Res]] = field(default_factory=deque)
    lost: dict[str, str] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class _Work(Generic[Req, Res]):
    """One request on its way."""

    request: Req
    route: _Route[Req, Res]
    sample_load: int
    missing: set[int]
    """Sample indices that have not arrived."""
    attempts: int = 0
    tried: frozenset[int] = frozenset()
    """Replicas that failed it."""
    alone: bool = False
    """Its last call raised: it goes alone from now on, so that one bad request does not take others with it."""
    reason: str = ""


@dataclass(slots=True, eq=False)
class _Call(Generic[Req, Res]):
    """One remote `generate` of several requests."""

    member: _Member[Req, Res]
    open: dict[str, _Work[Req, Res]]
    num_samples: int
    load: int
    stream: Any = None
    task: asyncio.Task[None] | None = None
    closed: bool = False


@dataclass(slots=True, eq=False)
class _Member(Generic[Req, Res]):
    """One incarnation of a replica; ids are never used twice."""

    replica_id: int
    state: _State = _State.STARTING
    starting: asyncio.Future[Replica] | None = None
    replica: Replica | None = None
    process: psutil.Process | None = None
    weights: Weights | None = None
    max_abs_diff: float = 0.0
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared from the offer of new weights until they are accepted: nothing it says meanwhile leaves the pool."""
    calls: set[_Call[Req, Res]] = field(default_factory=set)
    num_samples: int = 0
    load: int = 0
    last_progress: float = 0.0
    num_stalls: int = 0
    examination: asyncio.Task[None] | None = None
    stats: EngineStats | None = None

    @property
    def actor(self) -> Any:
        assert self.replica is not None, "a replica is called only after it was started"
        return self.replica.actor


class Pool(Generic[Req, Res]):
    """N replicas of one actor; see the module's docstring.

    `current` holds the weights that every replica must have (None: those it starts with). A replica that comes up takes
    them and passes their parity probe before its first request. Only `sync_weights` writes it, under `weights_lock`.
    """

    def __init__(
        self,
        *,
        name: str,
        start_replica: Callable[[int], Replica],
        num_replicas: int,
        max_restarts: int = 3,
        max_attempts: int = 3,
        progress_timeout_s: float = 120.0,
        canary_timeout_s: float = 10.0,
        ready_timeout_s: float = 300.0,
        max_samples_per_call: int = 256,
        max_samples_per_replica: int = 2048,
    ) -> None:
        """Describe the pool; nothing starts yet.

        Args:
            name: For messages and metrics.
            start_replica: Called in a thread with an id that no replica of this pool had before (add it to the seed);
                may block.
            num_replicas: Wanted replicas.
            max_restarts: Replicas in a row that may fail to come up before the pool gives up.
            max_attempts: Times that a request is issued before it is lost.
            progress_timeout_s: A replica with outstanding work and no result for so long is asked for a canary.
            canary_timeout_s: A replica that does not answer the canary within this is killed.
            ready_timeout_s: Longest start of a replica, loading of weights apart, which has the same limit again.
            max_samples_per_call: Samples in one remote call.
            max_samples_per_replica: Samples outstanding at a replica; more wait in the queue for whoever is free first.
        """
        self.name = name
        self.current: Weights | None = None
        self.weights_lock = asyncio.Lock()
        self.deliver: Callable[[Any, Weights], Awaitable[WeightAnswer]] | None = None
        """How weights reach the actor of a replica that serves; None, and for one that starts: `apply_weights`."""
        self._is_asleep = False
        self._start_replica = start_replica
        self._wanted = _checked_count(name, num_replicas)
        self._max_restarts = max_restarts
        self._max_attempts = max_attempts
        self._progress_timeout_s = progress_timeout_s
        self._canary_timeout_s = canary_timeout_s
        self._ready_timeout_s = ready_timeout_s
        self._max_samples_per_call = max_samples_per_call
        self._max_samples_per_replica = max_samples_per_replica
        self._ids = itertools.count()
        self._members: dict[int, _Member[Req, Res]] = {}
        self._queue: deque[_Work[Req, Res]] = deque()
        self._routes: set[_Route[Req, Res]] = set()
        self._open_ids: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._supervisor: asyncio.Task[None] | None = None
        self._wakeup = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure: str | None = None
        self._started = False
        self._was_ready = False
        self._failed_starts = 0
        self._next_start = 0.0
        self._dying: list[tuple[float, psutil.Process]] = []
        self._num_lost = 0
        self._num_retried = 0
        self._num_answered = 0
        self._shortfall: str | None = None
        """Why the last start did not succeed; None after one that did."""
        self._retired = EngineStats(num_generated_tokens=0, num_prompt_tokens=0, busy_s=0.0, num_running=0)

    # ------------------------------------------------------------------------------------------------------ public

    async def start(self) -> None:
        """Start the replicas and return when all are ready.

        Raises:
            PoolFailed: one can't come up; what was started is stopped.
        """
        assert self._supervisor is None, f"pool {self.name} was started twice"
        self._supervisor = asyncio.create_task(self._supervise(), name=f"pool {self.name}")
        try:
            while len(self._in_state(_State.READY)) < self._wanted:
                await self._wait_for_change(None)
                if self._failure is not None:
                    raise PoolFailed(f"pool {self.name}: {self._failure}")
        except BaseException:
            await self.shutdown()
            raise
        self._started = True

    async def route(self, requests: Sequence[Req]) -> AsyncIterator[list[Res]]:
        """Yield the results of all requests in chunks, in the order in which they finish, each (request, sample) once.

        Requests of a lost replica are issued again elsewhere, and so are samples that ended in "error" or "abort". What
        still has no answer after `max_attempts` is raised at the end, when everything else has been yielded. Closing
        the iterator, or cancelling its consumer, aborts what is running for it.

        Raises:
            ValueError: a request id occurs twice, here or in another route that is running, or asks for no sample.
            PoolExhausted: requests without an answer, from a pool that goes on; has their ids and reasons.
            PoolFailed: the pool is not running, or does not any more.
        """
        route = self._admit(requests)
        try:
            while route.open or route.chunks:
                while route.chunks:
                    yield route.chunks.popleft()
                if route.open:
                    route.arrived.clear()
                    await route.arrived.wait()
        finally:
            self._withdraw(route)
        if route.lost and self._failure is not None:
            raise PoolFailed(
                f"pool {self.name}: {self._failure}; {len(route.lost)} of {len(requests)} requests have no answer"
            )
        if route.lost:
            shown = "; ".join(f"{request_id}: {reason}" for request_id, reason in list(route.lost.items())[:5])
            raise PoolExhausted(
                f"pool {self.name}: {len(route.lost)} of {len(requests)} requests have no answer after "
                f"at most {self._max_attempts} attempts: {shown}{' …' if len(route.lost) > 5 else ''}",
                reasons=route.lost,
            )

    async def fanout(self, call: Callable[[Any], Awaitable[T]], *, timeout_s: float) -> dict[int, T | Exception]:
        """Make one remote call on every ready replica and return each answer, or the error in its place.

        `call` gets the actor and returns the ObjectRef: `pool.fanout(lambda actor: actor.stats.remote(), timeout_s=5)`.
        """
        members = self._in_state(_State.READY)
        answers = await asyncio.gather(*(self._ask(member, call, timeout_s=timeout_s) for member in members))
        return {member.replica_id: answer for member, answer in zip(members, answers, strict=True)}

    async def quarantine(self, replica_id: int, *, reason: str) -> None:
        """Kill a replica and have another brought up in its place; unknown and lost ids are left alone."""
        member = self._members.get(replica_id)
        if member is not None:
            self._lose(member, reason=f"quarantined: {reason}")

    async def scale(self, num_replicas: int) -> None:
        """Set the wanted number of replicas and return at once; those that go finish what they are at."""
        self._wanted = _checked_count(self.name, num_replicas)
        self._failed_starts = 0
        self._next_start = 0.0
        self._wakeup.set()

    async def sleep(self) -> None:
        """Have every replica give its GPU's memory to whoever shares it; one that does not is ended.

        What is on its way is answered first; until `wake` nothing more is dispatched, and no replica is started.
        """
        self._is_asleep = True
        # What starts takes of the GPU, and what is on its way is answered first.
        while self._in_state(_State.STARTING) or any(member.calls for member in self._members.values()):
            await asyncio.sleep(0.02)
        await self._all_or_lost("sleep", lambda actor: actor.sleep.remote())

    async def wake(self) -> None:
        """Have every replica take its GPU's memory again; one that does not is ended, and another is brought up."""
        try:
            await self._all_or_lost("wake", lambda actor: actor.wake.remote())
        finally:
            self._is_asleep = False
            for member in self._in_state(_State.READY):
                member.last_progress = time.monotonic()
            self._wakeup.set()

    async def _all_or_lost(self, what: str, call: Callable[[Any], Awaitable[None]]) -> None:
        for replica_id, answer in (await self.fanout(call, timeout_s=self._ready_timeout_s)).items():
            if isinstance(answer, Exception):
                await self.quarantine(replica_id, reason=f"{what}: {first_line(answer)}")

    def readiness(self) -> Readiness:
        """Return how the pool stands to what is wanted of it, without asking anybody."""
        return Readiness(
            wanted=self._wanted,
            ready=len(self._in_state(_State.READY)),
            starting=len(self._in_state(_State.STARTING)),
            leaving=len(self._in_state(_State.DRAINING)),
            why=self._why(),
        )

    async def stats(self) -> PoolStats:
        """Ask every ready replica what it has done and return the pool's totals."""
        answers = await self.fanout(lambda actor: actor.stats.remote(), timeout_s=self._canary_timeout_s)
        known: dict[int, EngineStats] = {}
        for replica_id, answer in answers.items():
            member = self._members.get(replica_id)
            if member is not None and not isinstance(answer, Exception):
                member.stats = known[replica_id] = answer
        latest = [self._retired, *(m.stats for m in self._members.values() if m.stats is not None)]
        return PoolStats(
            name=self.name,
            wanted=self._wanted,
            ready=len(self._in_state(_State.READY)),
            starting=len(self._in_state(_State.STARTING)),
            num_lost=self._num_lost,
            num_retried=self._num_retried,
            num_queued=len(self._queue),
            num_open=sum(len(work.missing) for route in self._routes for work in route.open.values()),
            num_answered=self._num_answered,
            why=self._why(),
            version=None if self.current is None else self.current[0].version,
            num_generated_tokens=sum(stats.num_generated_tokens for stats in latest),
            num_prompt_tokens=sum(stats.num_prompt_tokens for stats in latest),
            busy_s=sum(stats.busy_s for stats in latest),
            num_running=sum(stats.num_running for stats in known.values()),
            replicas=known,
        )

    async def shutdown(self) -> None:
        """Stop every replica and end running routes with `PoolFailed`; a second call does nothing."""
        if self._failure is None:
            self._failure = "the pool has been shut down"
        if self._supervisor is not None:
            self._supervisor.cancel()
        self._end_routes(self._failure)
        starting = [member.starting for member in self._members.values() if member.starting is not None]
        tasks = list(self._tasks)
        for member in list(self._members.values()):
            self._stop(member)
        for task in tasks:
            task.cancel()
        ended = [task for task in (self._supervisor, *tasks) if task is not None]
        await asyncio.gather(*ended, return_exceptions=True)
        if starting:
            # A start that is in its thread can't be cancelled; `_stop` ends what it gives.
            await asyncio.wait(starting, timeout=5)
        dying = [process for _, process in self._dying]
        _, alive = await asyncio.to_thread(psutil.wait_procs, dying, timeout=KILL_GRACE_S)
        for process in alive:
            kill(process)
        self._dying = []

    # ------------------------------------------------------------------------------------------------------ weights

    async def offer_weights(self, *, timeout_s: float) -> dict[int, float | Exception]:
        """Have every ready replica take `current`; return max |Δ log-prob| in nats, or what is wrong, by replica id.

        From the offer to its acceptance no result of a replica leaves the pool. One that does not accept stays shut:
        its requests go back to the queue, and the caller must quarantine it or offer it other weights.
        """
        weights = self.current
        assert weights is not None, "sync_weights sets pool.current first"
        members = [*self._in_state(_State.READY), *self._in_state(_State.DRAINING)]
        try:
            answers = await asyncio.gather(*(self._offer(member, weights, timeout_s=timeout_s) for member in members))
        except asyncio.CancelledError:
            # What such a replica holds is not known.
            for member in members:
                if member.weights is not weights:
                    self._lose(member, reason="the weight sync was cancelled")
            raise
        return {member.replica_id: answer for member, answer in zip(members, answers, strict=True)}

    async def wait_for_weights(self, *, timeout_s: float) -> dict[int, float]:
        """Wait until a ready replica holds `current`; return max |Δ log-prob| in nats of those that do, or {}."""
        deadline = time.monotonic() + timeout_s
        while True:
            holders = {
                member.replica_id: member.max_abs_diff
                for member in self._in_state(_State.READY)
                if member.weights is self.current and member.may_answer.is_set()
            }
            left = deadline - time.monotonic()
            if holders or left <= 0 or self._failure is not None:
                return holders
            await self._wait_for_change(left)

    async def _offer(self, member: _Member[Req, Res], weights: Weights, *, timeout_s: float) -> float | Exception:
        try:
            return await self._take_weights(member, weights, timeout_s=timeout_s)
        except (*REMOTE_ERRORS, ParityFailed) as error:
            self._recall(member)
            if isinstance(error, TimeoutError) and not isinstance(error, RayError):
                return TimeoutError(f"no answer within {timeout_s:g} s")
            return error

    async def _take_weights(self, member: _Member[Req, Res], weights: Weights, *, timeout_s: float) -> float:
        manifest, probe = weights
        member.may_answer.clear()
        if self.deliver is None or member.state is _State.STARTING:
            taken = member.actor.apply_weights.remote(manifest, probe.token_ids)
        else:
            taken = self.deliver(member.actor, weights)
        answer: WeightAnswer = await _within(timeout_s, taken)
        member.max_abs_diff = parity(answer, version=manifest.version, probe=probe)
        member.weights = weights
        member.last_progress = time.monotonic()
        member.may_answer.set()
        self._notify()
        return member.max_abs_diff

    def _recall(self, member: _Member[Req, Res]) -> None:
        """Take a replica's unanswered requests back into the queue without holding it against them."""
        for call in list(member.calls):
            works = list(call.open.values())
            self._abort(call)
            self._queue.extendleft(reversed(works))
        self._wakeup.set()

    # ------------------------------------------------------------------------------------------------------ routes

    def _admit(self, requests: Sequence[Req]) -> _Route[Req, Res]:
        if self._supervisor is None or self._failure is not None:
            raise PoolFailed(f"pool {self.name}: {self._failure or 'the pool was not started'}")
        route: _Route[Req, Res] = _Route()
        for request in requests:
            request_id = request.request_id
            if request_id in route.open or request_id in self._open_ids:
                raise ValueError(f"pool {self.name}: request id {request_id!r} occurs twice; ids must be unique")
            if request.num_samples < 1:
                raise ValueError(f"pool {self.name}: request {request_id!r} asks for {request.num_samples} samples")
            route.open[request_id] = _Work(
                request=request,
                route=route,
                sample_load=max(1, int(getattr(request, "max_tokens", 1))),
                missing=set(range(request.num_samples)),
            )
        self._open_ids.update(route.open)
        self._routes.add(route)
        self._queue.extend(route.open.values())
        self._wakeup.set()
        return route

    def _withdraw(self, route: _Route[Req, Res]) -> None:
        self._routes.discard(route)
        if not route.open:
            return
        for call in [call for member in self._members.values() for call in member.calls]:
            mine = [request_id for request_id, work in call.open.items() if work.route is route]
            for request_id in mine:
                del call.open[request_id]
            if mine and not call.open:
                self._abort(call)
        self._queue = deque(work for work in self._queue if work.route is not route)
        self._open_ids.difference_update(route.open)
        route.open.clear()
        self._wakeup.set()

    def _end_routes(self, reason: str) -> None:
        for route in list(self._routes):
            for work in list(route.open.values()):
                self._give_up(work, reason=reason)
        self._queue.clear()

    def _give_up(self, work: _Work[Req, Res], *, reason: str) -> None:
        request_id = work.request.request_id
        work.route.lost[request_id] = reason
        self._close_work(work)

    def _close_work(self, work: _Work[Req, Res]) -> None:
        request_id = work.request.request_id
        if work.route.open.pop(request_id, None) is not None:
            self._open_ids.discard(request_id)
            work.route.arrived.set()

    def _retry(self, works: Iterable[_Work[Req, Res]], *, member: _Member[Req, Res], reason: str, alone: bool) -> None:
        again: list[_Work[Req, Res]] = []
        for work in works:
            work.attempts += 1
            work.tried |= {member.replica_id}
            work.alone = work.alone or alone
            work.reason = reason
            if work.attempts >= self._max_attempts:
                self._give_up(work, reason=reason)
            else:
                again.append(work)
        self._num_retried += len(again)
        self._queue.extendleft(reversed(again))
        self._wakeup.set()

    # ------------------------------------------------------------------------------------------------------ calls

    def _dispatch(self) -> None:
        serving = [m for m in self._in_state(_State.READY) if m.may_answer.is_set()]
        if not serving or not self._queue:
            return
        size = self._max_samples_per_call
        if len(self._queue) < size * len(serving):
            queued = sum(work.request.num_samples for work in self._queue)
            size = min(size, math.ceil(queued / len(serving)))
        while self._queue:
            free = [m for m in serving if m.num_samples < self._max_samples_per_replica]
            if not free:
                return
            works = self._next_works(size)
            untried = [m for m in free if m.replica_id not in works[0].tried]
            self._issue(min(untried or free, key=lambda m: (m.load, m.replica_id)), works)

    def _next_works(self, size: int) -> list[_Work[Req, Res]]:
        """Take works from the queue for one call: those that avoid the same replicas, or one that must go alone."""
        works = [self._queue.popleft()]
        first = works[0]
        num_samples = first.request.num_samples
        while self._queue and not first.alone:
            work = self._queue[0]
            num_samples += work.request.num_samples
            if num_samples > size or work.alone or work.tried != first.tried:
                break
            works.append(self._queue.popleft())
        return works

    def _issue(self, member: _Member[Req, Res], works: list[_Work[Req, Res]]) -> None:
        call: _Call[Req, Res] = _Call(
            member=member,
            open={work.request.request_id: work for work in works},
            num_samples=sum(work.request.num_samples for work in works),
            load=sum(work.request.num_samples * work.sample_load for work in works),
        )
        if not member.calls:
            member.last_progress = time.monotonic()
        member.calls.add(call)
        member.num_samples += call.num_samples
        member.load += call.load
        call.task = self._spawn(self._follow(call))

    async def _follow(self, call: _Call[Req, Res]) -> None:
        """Read the results of one remote call to its end."""
        member = call.member
        failed: RayError | None = None
        try:
            call.stream = member.actor.generate.remote([work.request for work in call.open.values()])
            async for ref in call.stream:
                results = await ref
                await member.may_answer.wait()
                self._deliver(call, results)
        except RayActorError as error:
            self._lose(member, reason=first_line(error))
            return
        except RayError as error:
            failed = error
        await member.may_answer.wait()
        if call.closed:
            return
        left = list(call.open.values())
        self._close(call)
        if left:
            reason = first_line(failed) if failed else "the replica ended its answer with samples missing"
            logger.warning("pool %s: replica %d left %d requests: %s", self.name, member.replica_id, len(left), reason)
            for work in left:
                self._retry([work], member=member, reason=work.reason or reason, alone=failed is not None)
        self._wakeup.set()

    def _deliver(self, call: _Call[Req, Res], results: Sequence[Res]) -> None:
        if call.closed:
            return
        member = call.member
        member.last_progress = time.monotonic()
        member.num_stalls = 0
        fresh: dict[_Route[Req, Res], list[Res]] = {}
        for result in results:
            work = call.open.get(result.request_id)
            if work is None or result.sample_index not in work.missing:
                continue  # withdrawn, or yielded by an earlier attempt
            if result.finish_reason in LOST_REASONS:
                work.reason = f"sample {result.sample_index} ended with {result.finish_reason!r}"
                continue
            work.missing.remove(result.sample_index)
            self._num_answered += 1
            fresh.setdefault(work.route, []).append(result)
            if not work.missing:
                del call.open[result.request_id]
                self._close_work(work)
                done = work.request.num_samples
                call.num_samples -= done
                call.load -= done * work.sample_load
                member.num_samples -= done
                member.load -= done * work.sample_load
        for route, chunk in fresh.items():
            route.chunks.append(chunk)
            route.arrived.set()
        if self._queue:
            self._wakeup.set()

    def _close(self, call: _Call[Req, Res]) -> None:
        call.closed = True
        call.member.calls.discard(call)
        call.member.num_samples -= call.num_samples
        call.member.load -= call.load

    def _abort(self, call: _Call[Req, Res]) -> None:
        """Forget a call and have the replica drop it."""
        self._close(call)
        if call.stream is not None and call.member.state is not _State.GONE:
            ray.cancel(call.stream)
        if call.task is not None and call.task is not asyncio.current_task():
            call.task.cancel()

    # ------------------------------------------------------------------------------------------------------ replicas

    async def _supervise(self) -> None:
        """Keep queue, replicas and wanted state together; an error of ours ends the pool instead of hanging it."""
        interval_s = max(0.05, min(1.0, self._progress_timeout_s / 4))
        try:
            while True:
                if not self._is_asleep:
                    self._reconcile()
                    self._dispatch()
                self._watch()
                self._reap()
                try:
                    await _within(interval_s, self._wakeup.wait())
                except TimeoutError:
                    continue
                finally:
                    self._wakeup.clear()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self._fail(f"the supervisor failed: {error!r}")
            raise

    def _reconcile(self) -> None:
        for member in self._in_state(_State.DRAINING):
            if not member.calls:
                self._stop(member)
        kept = [*self._in_state(_State.STARTING), *self._in_state(_State.READY)]
        if self._failed_starts <= self._max_restarts and time.monotonic() >= self._next_start:
            for _ in range(self._wanted - len(kept)):
                fresh: _Member[Req, Res] = _Member(replica_id=next(self._ids))
                self._members[fresh.replica_id] = fresh
                self._spawn(self._bring_up(fresh))
        spare = max(0, len(kept) - self._wanted)
        for member in sorted(kept, key=lambda m: (m.state is _State.READY, m.load))[:spare]:
            if member.state is _State.STARTING:
                self._stop(member)
            else:
                member.state = _State.DRAINING
                self._wakeup.set()

    async def _bring_up(self, member: _Member[Req, Res]) -> None:
        weights: Weights | None = None
        started = time.monotonic()
        try:
            member.starting = asyncio.ensure_future(asyncio.to_thread(self._start_replica, member.replica_id))
            member.replica = await asyncio.shield(member.starting)
            if member.state is _State.GONE:
                return
            info: ReplicaInfo = await _within(self._ready_timeout_s, member.actor.ready.remote())
            member.process = local_process(info)
            while member.weights is not self.current:
                weights = self.current
                if weights is None:
                    self._lose(member, reason="its weights were withdrawn, and there are none before them")
                    return
                await self._take_weights(member, weights, timeout_s=self._ready_timeout_s)
        except PlacementTimeout as error:
            if member.state is _State.GONE:
                return
            if not self._started:
                self._start_failed(member, error, blameless=False)
                return
            # No fault of the replica's: it is wanted, so it goes on asking for room.
            self._shortfall = str(error)
            logger.warning("pool %s: replica %d waits: %s", self.name, member.replica_id, error)
            self._stop(member)
            self._wakeup.set()
            return
        except (*REMOTE_ERRORS, ParityFailed) as error:
            if member.state is not _State.GONE:
                self._start_failed(member, error, blameless=weights not in (None, self.current))
            return
        except Exception as error:
            # Not a matter of luck: the same call would fail again.
            self._fail(f"replica {member.replica_id} can't be started: {type(error).__name__}: {error}")
            raise
        if member.replica_id not in self._members:
            return
        member.state = _State.READY
        member.last_progress = time.monotonic()
        member.may_answer.set()
        self._was_ready = True
        self._failed_starts = 0
        self._shortfall = None
        logger.info("pool %s: replica %d ready in %.1f s", self.name, member.replica_id, time.monotonic() - started)
        self._notify()
        self._wakeup.set()

    def _start_failed(self, member: _Member[Req, Res], error: Exception, *, blameless: bool) -> None:
        """Count a start that failed and plan the next; `blameless`: for weights that have been withdrawn since."""
        reason = f"did not come up: {last_lines(error)}" if str(error) else "did not come up in time"
        self._lose(member, reason=reason)
        if blameless and self._was_ready:
            return
        self._failed_starts += 1
        self._shortfall = reason
        self._next_start = time.monotonic() + min(30.0, 0.25 * 2.0**self._failed_starts)
        # A constructor that fails on the very first start will fail again: a missing model, a wrong setting.
        hopeless = not self._was_ready and isinstance(error, RayActorError) and error.actor_init_failed
        if hopeless or self._failed_starts > self._max_restarts:
            message = f"gave up after {self._failed_starts} failed starts; replica {member.replica_id} {reason}"
            if hopeless or not self._started or not self._members:
                self._fail(message)
            else:
                logger.error("pool %s: goes on with %d replicas; %s", self.name, len(self._members), message)

    def _lose(self, member: _Member[Req, Res], *, reason: str) -> None:
        """Kill a replica, send its unanswered requests elsewhere and have another one brought up."""
        if member.state is _State.GONE:
            return
        process = member.process
        last_words = worker_stderr(pid=process.pid, num_lines=10) if process is not None else ""
        calls = list(member.calls)
        self._stop(member)
        self._num_lost += 1
        logger.error(
            "pool %s: replica %d lost with %d calls: %s%s",
            self.name,
            member.replica_id,
            len(calls),
            reason,
            f"; its last lines on stderr:\n{last_words}" if last_words else "",
        )
        said = f"replica {member.replica_id} lost: {reason}" + (f"; stderr: {last_words}" if last_words else "")
        for call in calls:
            works = list(call.open.values())
            self._abort(call)
            self._retry(works, member=member, reason=said, alone=False)
        if not self._members and self._failed_starts > self._max_restarts:
            self._fail(f"no replica is left, and none came up in {self._failed_starts} attempts; {said}")
        self._notify()
        self._wakeup.set()

    def _stop(self, member: _Member[Req, Res]) -> None:
        """End a replica's process and give its resources back."""
        member.state = _State.GONE
        self._members.pop(member.replica_id, None)
        if member.stats is not None:
            self._retired = added(self._retired, member.stats)
        # Whoever waits for its permission to answer finds its call closed.
        member.may_answer.set()
        if member.replica is not None:
            ends_by = time.monotonic() + KILL_GRACE_S
            self._dying += [(ends_by, process) for process in processes_of(member.process)]
            end(member.replica)
        elif member.starting is not None:
            member.starting.add_done_callback(end_late)
        self._notify()

    def _reap(self) -> None:
        """Kill what Ray's own kill did not end: a stopped or wedged process does not hear it, nor do its children."""
        now = time.monotonic()
        overdue = [process for ends_by, process in self._dying if now > ends_by]
        self._dying = [(ends_by, process) for ends_by, process in self._dying if now <= ends_by]
        for process in overdue:
            kill(process)

    def _watch(self) -> None:
        now = time.monotonic()
        for member in [*self._in_state(_State.READY), *self._in_state(_State.DRAINING)]:
            examined = member.examination is not None and not member.examination.done()
            waits = bool(member.calls) and member.may_answer.is_set()
            if waits and not examined and now - member.last_progress > self._progress_timeout_s:
                member.examination = self._spawn(self._examine(member))

    async def _examine(self, member: _Member[Req, Res]) -> None:
        """Ask a silent replica for a canary; one that answers it and still gets nowhere is lost the second time."""
        silent_since = member.last_progress
        try:
            await _within(self._canary_timeout_s, member.actor.check.remote())
        except REMOTE_ERRORS as error:
            silent_s = time.monotonic() - silent_since
            self._lose(member, reason=f"no result for {silent_s:.0f} s and no canary: {first_line(error)}")
            return
        if member.last_progress == silent_since:
            member.num_stalls += 1
            if member.num_stalls > 1:
                self._lose(member, reason="answers canaries, but its outstanding work does not move")
            member.last_progress = time.monotonic()

    # ------------------------------------------------------------------------------------------------------ plumbing

    async def _ask(
        self, member: _Member[Req, Res], call: Callable[[Any], Awaitable[T]], *, timeout_s: float
    ) -> T | Exception:
        try:
            return await _within(timeout_s, call(member.actor))
        except RayActorError as error:
            self._lose(member, reason=first_line(error))
            return error
        except REMOTE_ERRORS as error:
            return error

    def _why(self) -> str | None:
        ready = len(self._in_state(_State.READY))
        if ready >= self._wanted:
            return None
        gave_up = self._failed_starts > self._max_restarts
        waits = "given up" if gave_up else "starting" if self._in_state(_State.STARTING) else "waiting to start again"
        return f"{waits}; the last start: {self._shortfall}" if self._shortfall else waits

    def _in_state(self, state: _State) -> list[_Member[Req, Res]]:
        return [member for member in self._members.values() if member.state is state]

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(coroutine, name=coroutine.__qualname__)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail(f"{task.get_name()} failed: {task.exception()!r}")

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            logger.error("pool %s: %s", self.name, reason)
            self._failure = reason
        self._end_routes(self._failure)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for_change(self, timeout_s: float | None) -> None:
        try:
            await _within(timeout_s, self._changed.wait())
        except TimeoutError:
            return


async def _within(timeout_s: float | None, awaitable: Awaitable[T]) -> T:
    """Await with a deadline; `asyncio.wait_for` swallows a cancellation that meets the result (Python 3.11)."""
    async with asyncio.timeout(timeout_s):
        return await awaitable


def _checked_count(name: str, num_replicas: int) -> int:
    if num_replicas < 1:
        raise ValueError(f"pool {name}: num_replicas: got {num_replicas}, wanted at least 1")
    return num_replicas
