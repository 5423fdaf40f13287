"""Owns a replica of the learner behind Ray Serve: it answers, and it follows the publisher's versions.

LearnerReplica    the current version: takes what the publisher offers while it answers
AncestorReplica   pinned versions: holds one at a time, requests of another wait for their turn
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import RayError

from actors.engine_config import EngineConfig
from actors.model_directory import check_model_directory
from cluster.commits import committed_policy
from cluster.log import start_log
from serve.learner_engine import LearnerEngine
from serve.publisher import Outcome
from serve.wire import AnswerLost, Piece, RequestRefused, ServedRequest

logger = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
"""A replica with nothing to say yet says that, so that the gateway can tell it from one that hangs."""
COALESCE_S = 0.02
"""Pieces that come within this travel together."""
CANARY_TIMEOUT_S = 10.0
ASK_AGAIN_S = 1.0


class LearnerReplica:
    """Serves the current version."""

    _engine: LearnerEngine

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: EngineConfig, *, run_dir: str, publisher: str, namespace: str, log_path: str | None = None
    ) -> None:
        """Start the engine on the version that is served, take it from the publisher too, and prove it."""
        if log_path is not None:
            start_log(Path(log_path), console_level=None)
        self._publisher = ray.get_actor(publisher, namespace=namespace)
        self._name = f"{os.getpid()}@{ray.get_runtime_context().get_node_id()[:8]}"
        version: str = await self._publisher.start.remote()
        commit = committed_policy(Path(run_dir), version)
        directory = str((Path(run_dir) / commit.policy[0].path).parent)
        check_model_directory(directory)
        config = replace_model(config, directory, version=version)
        # Replicas that sample from one stream would give the same answers.
        seed = int.from_bytes(os.urandom(4), "big") >> 1
        begin = time.monotonic()
        self._engine = LearnerEngine(config, seed=seed, on_fatal=_die)
        await self._engine.started()
        await self._begin()
        logger.info("replica %s of %s ready in %.1f s", self._name, type(self).__name__, time.monotonic() - begin)

    async def answer(self, request: ServedRequest) -> AsyncIterator[list[Piece]]:
        """Yield pieces as they come; an empty list now and then where none does.

        Raises:
            RequestRefused: the engine can't take the request.
            AnswerLost: its weights were refused while it was answered.
        """
        async with self._turn(request):
            stream = self._engine.begin(request)
            left = request.num_choices
            try:
                while left:
                    try:
                        async with asyncio.timeout(HEARTBEAT_S):
                            await stream.arrived.wait()
                    except TimeoutError:
                        yield []
                        continue
                    if stream.error is None and request.stream:
                        await asyncio.sleep(COALESCE_S)
                    pieces = stream.take()
                    if stream.error is not None:
                        raise stream.error
                    left -= sum(piece.finish_reason is not None for piece in pieces)
                    yield joined(pieces)
            finally:
                if left:
                    self._engine.abort(stream)

    async def check_health(self) -> None:
        """End the process when the engine does not move: Serve starts another one."""
        try:
            await self._engine.check(timeout_s=CANARY_TIMEOUT_S)
        except TimeoutError as error:
            _die(error)

    async def num_open(self) -> int:
        """Return the number of choices that its engine is at."""
        return self._engine.num_running

    async def _begin(self) -> None:
        offer = await self._publisher.poll.remote(self._name, None)
        if offer is not None:
            diff = await self._engine.take(offer.weights)
            outcome: Outcome | None = Outcome(version=offer.weights[0].version, max_abs_diff=diff)
        else:
            outcome = None
        self._following = asyncio.create_task(self._follow(outcome))
        self._following.add_done_callback(_die_of_task)

    async def _follow(self, outcome: Outcome | None) -> None:
        """Take every version that the publisher offers, for ever; while it is gone, go on with what there is."""
        while True:
            try:
                offer = await self._publisher.poll.remote(self._name, outcome)
            except RayError as error:
                logger.warning("the publisher does not answer: %s", type(error).__name__)
                await asyncio.sleep(ASK_AGAIN_S)
                continue
            outcome = None
            if offer is None:
                continue
            version = offer.weights[0].version
            begin = time.monotonic()
            try:
                diff = await self._engine.take(offer.weights)
            except (ValueError, RayError) as error:
                # The engine holds what it held. A promoted version that others took is this replica's own failure.
                logger.error("%s was not taken: %s", version, error)
                outcome = Outcome(version=version, max_abs_diff=None, reason=f"{type(error).__name__}: {error}")
                if offer.is_promoted and isinstance(error, ValueError):
                    _die(error)
                await asyncio.sleep(ASK_AGAIN_S)
            else:
                logger.info("%s taken in %.2f s, max |Δ| %.3g nats", version, time.monotonic() - begin, diff)
                outcome = Outcome(version=version, max_abs_diff=diff)

    @asynccontextmanager
    async def _turn(self, request: ServedRequest) -> AsyncIterator[None]:
        yield


class AncestorReplica(LearnerReplica):
    """Serves pinned versions, one at a time: requests of the one it holds run together, another waits for its turn."""

    async def _begin(self) -> None:
        self._turns = Turns()

    @asynccontextmanager
    async def _turn(self, request: ServedRequest) -> AsyncIterator[None]:
        assert request.version is not None, "the gateway sends pinned requests here"
        async with self._turns.of(request.version, self._take):
            yield

    async def _take(self, version: str) -> None:
        held = self._engine.weights
        if held is not None and held[0].version == version:
            return
        try:
            await self._engine.take(await self._publisher.weights.remote(version))
        except RayError as error:
            raise AnswerLost(f"{version} can't be had: {type(error).__name__}") from None
        except ValueError as error:
            raise RequestRefused(f"model: {version} can't be served: {error}") from None


class Turns:
    """Lets uses of one thing in one state run together, and changes the state between them, first come first served."""

    def __init__(self) -> None:
        self._held: str | None = None
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._entry = asyncio.Lock()

    @asynccontextmanager
    async def of(self, state: str, change: Callable[[str], Awaitable[None]]) -> AsyncIterator[None]:
        """Run the body in a state; `change(state)` brings it about when nothing runs in another."""
        async with self._entry:  # fair: whoever comes after waits behind, also for the state that is held
            if self._held != state:
                await self._idle.wait()
                self._held = None
                await change(state)
                self._held = state
            self._num_running += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()


def replace_model(config: EngineConfig, directory: str, *, version: str) -> EngineConfig:
    """Return the run's engine settings for a policy of it."""
    return config.model_copy(update={"model": directory, "weight_version": version, "load_format": "auto"})


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with those of one choice put together, in the order in which choices first come."""
    whole: dict[int, Piece] = {}
    for piece in pieces:
        before = whole.get(piece.index)
        if before is None:
            whole[piece.index] = piece
        else:
            whole[piece.index] = replace(
                piece,
                text=before.text + piece.text,
                num_tokens=before.num_tokens + piece.num_tokens,
                logprobs=(*before.logprobs, *piece.logprobs),
            )
    return list(whole.values())


def _die_of_task(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _die(error)


def _die(error: BaseException) -> None:
    """End the process at once: Serve starts another replica, with the version that is served then."""
    logger.critical("the replica ends", exc_info=error)
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    logging.shutdown()
    os._exit(1)
