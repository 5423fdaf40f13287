"""Routing over fake replicas: every sample once, whatever dies, hangs, errs or is cancelled."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.placement import PlacementTimeout
from cluster.pool import Pool
from cluster.pool_errors import PoolExhausted, PoolFailed
from cluster.replica import Replica
from tests.fake_replica import Behaviour, FakeRequest, FakeResult, fake_starter

pytestmark = pytest.mark.usefixtures("ray_session")

FakePool = Pool[FakeRequest, FakeResult]


@asynccontextmanager
async def running(pool: FakePool) -> AsyncIterator[FakePool]:
    await pool.start()
    try:
        yield pool
    finally:
        await pool.shutdown()


def requests(num_requests: int, *, num_samples: int = 1, prefix: str = "q", max_tokens: int = 1) -> list[FakeRequest]:
    return [
        FakeRequest(request_id=f"{prefix}{i}", num_samples=num_samples, prompt=f"p{i}", max_tokens=max_tokens)
        for i in range(num_requests)
    ]


async def collect(
    pool: FakePool, asked: list[FakeRequest], *, into: list[FakeResult] | None = None
) -> list[FakeResult]:
    results = [] if into is None else into
    async for chunk in pool.route(asked):
        results += chunk
    return results


def keys(results: list[FakeResult]) -> Counter[tuple[str, int]]:
    return Counter((result.request_id, result.sample_index) for result in results)


def wanted_keys(asked: list[FakeRequest]) -> Counter[tuple[str, int]]:
    return Counter((request.request_id, i) for request in asked for i in range(request.num_samples))


async def until(condition: Callable[[], Awaitable[bool]], *, timeout_s: float = 40) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.05)


async def as_async(value: bool) -> bool:
    return value


def poisoned(request: FakeRequest) -> list[FakeResult]:
    """Raise for one request; answer the others."""
    if request.prompt == "p3":
        raise ValueError("p3 is poison")
    return [FakeResult(request_id=request.request_id, sample_index=i) for i in range(request.num_samples)]


def second_sample_fails(request: FakeRequest) -> list[FakeResult]:
    """Answer sample 0 and end sample 1 with an error."""
    return [
        FakeResult(request_id=request.request_id, sample_index=0),
        FakeResult(request_id=request.request_id, sample_index=1, finish_reason="error"),
    ]


def test_every_sample_comes_back_once_and_both_replicas_work() -> None:
    async def scenario() -> None:
        async with running(Pool(name="fake", start_replica=fake_starter(), num_replicas=2)) as pool:
            asked = requests(50, num_samples=4)
            results = await collect(pool, asked)
            assert keys(results) == wanted_keys(asked)
            assert {result.text for result in results if result.request_id == "q7"} == {"p7#0", "p7#1", "p7#2", "p7#3"}
            # 200 samples in calls of 100, to whoever has less outstanding.
            assert Counter(result.replica_id for result in results) == {0: 100, 1: 100}
            assert await collect(pool, []) == []
            with pytest.raises(ValueError, match="request id 'q0' occurs twice"):
                await collect(pool, requests(1) * 2)
            stats = await pool.stats()
            assert (stats.ready, stats.num_lost, stats.num_generated_tokens) == (2, 0, 200)
            await until(lambda: is_idle(pool))

    asyncio.run(scenario())


def test_many_routes_at_once_get_their_own_results() -> None:
    async def scenario() -> None:
        async with running(Pool(name="fake", start_replica=fake_starter(), num_replicas=2)) as pool:
            asked = [requests(5, num_samples=2, prefix=f"route{i}/") for i in range(40)]
            answers = await asyncio.gather(*(collect(pool, one) for one in asked))
            assert [keys(answer) for answer in answers] == [wanted_keys(one) for one in asked]

    asyncio.run(scenario())


def test_a_dead_replicas_unanswered_requests_are_answered_elsewhere_and_it_is_replaced() -> None:
    async def scenario() -> None:
        behaviours = {0: Behaviour(chunk=10, die_after_chunks=2, delay_s=0.05)}
        async with running(Pool(name="fake", start_replica=fake_starter(behaviours), num_replicas=2)) as pool:
            asked = requests(100, num_samples=2)
            results = await collect(pool, asked)
            assert keys(results) == wanted_keys(asked)
            assert {result.replica_id for result in results} == {0, 1}
            await until(lambda: has_ready(pool, 2))
            stats = await pool.stats()
            assert stats.num_lost == 1
            assert sorted(stats.replicas) == [1, 2]

    asyncio.run(scenario())


def test_a_lost_request_is_raised_with_the_last_words_of_the_replica(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        starter = fake_starter(default=Behaviour(die_after_chunks=0))
        async with running(Pool(name="fake", start_replica=starter, num_replicas=1, max_attempts=2)) as pool:
            with pytest.raises(PoolExhausted, match="2 of 2 requests have no answer after at most 2") as caught:
                await collect(pool, requests(2))
            assert set(caught.value.reasons) == {"q0", "q1"}
            assert "famous last words" in caught.value.reasons["q0"]

    asyncio.run(scenario())
    assert "famous last words" in caplog.text


def test_one_bad_request_is_lost_alone() -> None:
    async def scenario() -> None:
        starter = fake_starter(answer=poisoned)
        async with running(Pool(name="fake", start_replica=starter, num_replicas=2)) as pool:
            asked, results = requests(20), []
            with pytest.raises(PoolExhausted, match="1 of 20") as caught:
                await collect(pool, asked, into=results)
            assert set(caught.value.reasons) == {"q3"}
            assert caught.value.reasons["q3"] == "ValueError: p3 is poison"
            assert keys(results) == wanted_keys(asked) - Counter({("q3", 0): 1})
            assert (await pool.stats()).num_lost == 0

    asyncio.run(scenario())


def test_a_sample_that_ended_in_an_error_is_retried_and_never_a_result() -> None:
    async def scenario() -> None:
        behaviours = {0: Behaviour(error_samples=True)}
        async with running(Pool(name="fake", start_replica=fake_starter(behaviours), num_replicas=2)) as pool:
            asked = requests(10, num_samples=2)
            results = await collect(pool, asked)
            assert keys(results) == wanted_keys(asked)
            assert {(result.replica_id, result.finish_reason) for result in results} == {(1, "stop")}

    asyncio.run(scenario())


def test_what_arrived_before_a_retry_is_not_yielded_again() -> None:
    async def scenario() -> None:
        starter = fake_starter(answer=second_sample_fails)
        async with running(Pool(name="fake", start_replica=starter, num_replicas=1)) as pool:
            results: list[FakeResult] = []
            with pytest.raises(PoolExhausted, match="sample 1 ended with 'error'"):
                await collect(pool, requests(3, num_samples=2), into=results)
            assert keys(results) == Counter({("q0", 0): 1, ("q1", 0): 1, ("q2", 0): 1})
            seen = await pool.fanout(lambda actor: actor.seen.remote(), timeout_s=10)
            assert Counter(seen[0]["served"]) == {"q0": 3, "q1": 3, "q2": 3}

    asyncio.run(scenario())


@pytest.mark.parametrize("deaf", [True, False], ids=["deaf to canaries", "answers canaries"])
def test_a_hanging_replica_is_killed_and_its_requests_are_answered_elsewhere(deaf: bool) -> None:
    async def scenario() -> None:
        pool: FakePool = Pool(
            name="fake",
            start_replica=fake_starter(behaviours={0: Behaviour(chunk=5, hang_after_chunks=1, deaf_canary=deaf)}),
            num_replicas=2,
            progress_timeout_s=0.5,
            canary_timeout_s=0.5,
        )
        async with running(pool):
            asked = requests(40)
            results = await collect(pool, asked)
            assert keys(results) == wanted_keys(asked)
            assert (await pool.stats()).num_lost == 1

    asyncio.run(scenario())


def test_a_stopped_process_is_killed_too() -> None:
    async def scenario() -> None:
        pool: FakePool = Pool(
            name="fake", start_replica=fake_starter(), num_replicas=1, progress_timeout_s=0.5, canary_timeout_s=0.5
        )
        async with running(pool):
            (info,) = (await pool.fanout(lambda actor: actor.ready.remote(), timeout_s=10)).values()
            assert not isinstance(info, Exception)
            process = psutil.Process(info.pid)
            process.suspend()
            assert len(await collect(pool, requests(3))) == 3

            async def is_gone() -> bool:
                return not process.is_running()

            await until(is_gone)

    asyncio.run(scenario())


def test_closing_a_route_aborts_what_runs_for_it_and_nothing_else() -> None:
    async def scenario() -> None:
        starter = fake_starter(default=Behaviour(chunk=1, delay_s=0.05))
        async with running(Pool(name="fake", start_replica=starter, num_replicas=1)) as pool:
            others = asyncio.create_task(collect(pool, requests(10, prefix="other")))
            await asyncio.sleep(0.01)
            cancelled = asyncio.create_task(collect(pool, requests(1000)))
            await asyncio.sleep(0.5)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert len(await others) == 10
            await until(lambda: is_idle(pool), timeout_s=5)
            seen = await pool.fanout(lambda actor: actor.seen.remote(), timeout_s=10)
            assert seen[0]["num_aborted"] >= 1
            # The ids are free again, and the replica's load is forgotten.
            assert len(await collect(pool, requests(5))) == 5

    asyncio.run(scenario())


def test_work_goes_to_the_replica_with_less_of_it() -> None:
    async def scenario() -> None:
        starter = fake_starter(default=Behaviour(delay_s=0.3))
        async with running(Pool(name="fake", start_replica=starter, num_replicas=2)) as pool:
            heavy = asyncio.create_task(collect(pool, requests(1, prefix="heavy", max_tokens=1000)))
            await asyncio.sleep(0.05)
            lights = [requests(1, prefix=f"light{i}/", max_tokens=10) for i in range(5)]
            answers = await asyncio.gather(*(collect(pool, light) for light in lights))
            (first,) = await heavy
            rest = [result for answer in answers for result in answer]
            assert {result.replica_id for result in rest} == {1 - first.replica_id}

    asyncio.run(scenario())


def test_scaling_sets_a_wish_that_the_pool_fulfils_without_losing_requests() -> None:
    async def scenario() -> None:
        starter = fake_starter(default=Behaviour(chunk=5, delay_s=0.05))
        async with running(Pool(name="fake", start_replica=starter, num_replicas=1)) as pool:
            started = time.monotonic()
            await pool.scale(3)
            assert time.monotonic() - started < 0.1
            await until(lambda: has_ready(pool, 3))
            asked = requests(120)
            answers = asyncio.create_task(collect(pool, asked))
            await asyncio.sleep(0.1)
            await pool.scale(1)
            assert keys(await answers) == wanted_keys(asked)
            await until(lambda: has_ready(pool, 1))
            assert (await pool.stats()).num_lost == 0

    asyncio.run(scenario())


def test_a_replica_that_cannot_start_fails_the_pool_at_once() -> None:
    async def scenario() -> None:
        pool: FakePool = Pool(
            name="fake", start_replica=fake_starter(default=Behaviour(fail_start=True)), num_replicas=1
        )
        with pytest.raises(PoolFailed, match=r"gave up after 1 failed starts.*this fake was told not to start"):
            await pool.start()

    asyncio.run(scenario())


def test_a_replica_without_room_says_what_it_waits_for_and_comes_when_there_is_some() -> None:
    room = asyncio.Event()
    start_fake, asked = fake_starter(), []

    def start(replica_id: int) -> Replica:
        asked.append(replica_id)
        if replica_id and not room.is_set():
            time.sleep(0.05)  # as a placement group that is waited for
            raise PlacementTimeout("placement 'critic-1' got no room within 60 s: GPU wanted 1, free 0 of 4")
        return start_fake(replica_id)

    async def scenario() -> None:
        async with running(Pool(name="fake", start_replica=start, num_replicas=1, max_restarts=1)) as pool:
            assert pool.readiness().why is None
            await pool.scale(2)
            # More often than a replica that fails may be started.
            await until(lambda: as_async(len(asked) > 5))
            stands = pool.readiness()
            assert (stands.wanted, stands.ready) == (2, 1)
            assert "GPU wanted 1, free 0 of 4" in str(stands.why)
            # The work goes on meanwhile.
            assert keys(await collect(pool, requests(3))) == wanted_keys(requests(3))
            room.set()
            await until(lambda: as_async(pool.readiness().ready == 2))
            assert pool.readiness().why is None
            assert (await pool.stats()).num_lost == 0

    asyncio.run(scenario())


def test_a_pool_that_finds_no_room_at_its_start_fails_with_what_is_missing() -> None:
    def start(replica_id: int) -> Replica:
        raise PlacementTimeout("GPU wanted 1, free 0 of 0")

    async def scenario() -> None:
        pool: FakePool = Pool(name="fake", start_replica=start, num_replicas=1, max_restarts=0)
        with pytest.raises(PoolFailed, match="GPU wanted 1, free 0 of 0"):
            await pool.start()

    asyncio.run(scenario())


def test_a_wrong_setting_in_start_replica_is_not_retried() -> None:
    attempts: list[int] = []

    def start(replica_id: int) -> Replica:
        attempts.append(replica_id)
        raise ValueError("no such model")

    async def scenario() -> None:
        pool: FakePool = Pool(name="fake", start_replica=start, num_replicas=1)
        with pytest.raises(PoolFailed, match="no such model"):
            await pool.start()

    asyncio.run(scenario())
    assert attempts == [0]


def test_running_routes_end_when_no_replica_comes_up_any_more() -> None:
    async def scenario() -> None:
        starter = fake_starter(behaviours={0: Behaviour(die_after_chunks=0)}, default=Behaviour(fail_start=True))
        async with running(Pool(name="fake", start_replica=starter, num_replicas=1, max_restarts=1)) as pool:
            with pytest.raises(PoolFailed, match="gave up after 2 failed starts"):
                await collect(pool, requests(3))
            with pytest.raises(PoolFailed):
                await collect(pool, requests(3))

    asyncio.run(scenario())


def test_shutdown_ends_running_routes_and_every_process() -> None:
    async def scenario() -> None:
        starter = fake_starter(default=Behaviour(delay_s=60))
        pool: FakePool = Pool(name="fake", start_replica=starter, num_replicas=2)
        await pool.start()
        infos = await pool.fanout(lambda actor: actor.ready.remote(), timeout_s=10)
        answers = asyncio.create_task(collect(pool, requests(10)))
        await asyncio.sleep(0.2)
        await pool.shutdown()
        with pytest.raises(PoolFailed, match="the pool has been shut down"):
            await answers
        assert not [info for info in infos.values() if Path(f"/proc/{pid_of(info)}").exists()]

    asyncio.run(scenario())


def test_driver_cpu_per_sample_is_small() -> None:
    async def scenario() -> float:
        async with running(Pool(name="fake", start_replica=fake_starter(), num_replicas=2)) as pool:
            await collect(pool, requests(64, prefix="warm"))
            started = time.process_time()
            results = await collect(pool, requests(10_000))
            spent_s = time.process_time() - started
            assert len(results) == 10_000
            return spent_s / 10_000

    per_sample_s = asyncio.run(scenario())
    assert per_sample_s < 500e-6, f"{per_sample_s * 1e6:.0f} µs of driver CPU per sample, wanted under 500"


def pid_of(info: Any) -> int:
    assert not isinstance(info, Exception)
    return int(info.pid)


async def has_ready(pool: FakePool, wanted: int) -> bool:
    return (await pool.stats()).ready == wanted


async def is_idle(pool: FakePool) -> bool:
    return (await pool.stats()).num_running == 0
