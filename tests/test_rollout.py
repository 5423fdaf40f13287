"""The learner is asked for every sample once, each with its own seed, and a resumed run asks for what is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from actors.records import Query, Response
from actors.rollout import Rollout, RolloutConfig
from tests.fake_pool import FakePool
from tests.small_records import make_query

QUERIES = [make_query(f"q{i}", text=f"4{i}+86") for i in range(3)]


def rollout_over(pool: FakePool, *, seed: int = 1) -> Rollout:
    return Rollout(pool, config=RolloutConfig(num_samples=4, temperature=0.8), run="test", seed=seed)  # type: ignore[arg-type]


def responses(rollout: Rollout, queries: Sequence[Query] = QUERIES, *, known: Sequence[str] = ()) -> list[Response]:
    async def collect() -> list[Response]:
        return [row async for chunk in rollout.respond(queries, known=known) for row in chunk]

    return asyncio.run(collect())


@pytest.mark.parametrize("arrival_seed", [None, 0, 1])
def test_every_sample_of_every_query_is_there_once_in_any_order_of_arrival(arrival_seed: int | None) -> None:
    pool = FakePool(lambda request: request.messages[-1].content, chunk=5, arrival_seed=arrival_seed)
    rollout = rollout_over(pool)
    found = responses(rollout)
    assert sorted((row.query_id, row.sample_index) for row in found) == [
        (f"q{q}", i) for q in range(3) for i in range(4)
    ]
    assert all(row.text == f"4{row.query_id[1]}+86" for row in found)
    for query in QUERIES:
        mine = {row.sample_index: row.response_id for row in found if row.query_id == query.query_id}
        assert [mine[i] for i in range(4)] == rollout.expected(query)
    assert {(request.temperature, request.num_samples) for request in pool.asked} == {(0.8, 1)}


def test_every_sample_has_a_seed_of_its_own_that_a_replay_finds_again() -> None:
    first, again, other = (FakePool(lambda request: "x") for _ in range(3))
    for pool, seed in ((first, 1), (again, 1), (other, 2)):
        responses(rollout_over(pool, seed=seed))
    seeds = [request.seed for request in first.asked]
    assert len(set(seeds)) == len(seeds) == 12
    assert [request.seed for request in again.asked] == seeds
    assert [request.seed for request in other.asked] != seeds


def test_a_resumed_run_asks_for_what_is_missing_only() -> None:
    rollout = rollout_over(FakePool(lambda request: "x"))
    everything = responses(rollout)
    pool = FakePool(lambda request: "x")
    rest = responses(rollout_over(pool), known=[row.response_id for row in everything[:7]])
    assert rest == everything[7:]
    assert len(pool.asked) == 5
    assert responses(rollout_over(pool), known=[row.response_id for row in everything]) == []


def test_a_response_carries_the_tokens_and_the_weights_that_made_it() -> None:
    row = responses(rollout_over(FakePool(lambda request: "133")), QUERIES[:1])[0]
    assert (row.text, row.token_ids, row.prompt_token_ids) == ("133", (*map(ord, "133"), 0), (1, 2, 3))
    assert (row.policy_version, row.finish_reason) == ("v0", "stop")
    assert len(row.logprobs) == len(row.token_ids)
