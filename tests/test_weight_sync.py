"""Weights in buckets, and their sync to fake replicas: parity, quarantine, restarts, corruption, fallback."""

from __future__ import annotations

import asyncio
import warnings
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from cluster.pool import Pool
from cluster.weight_sync import SyncFailed, sync_weights
from cluster.weights import (
    CorruptBucket,
    ParityFailed,
    ParityProbe,
    WeightAnswer,
    WeightManifest,
    checksum,
    iter_tensors,
    parity,
    put_weights,
)
from tests.fake_replica import Behaviour, FakeRequest, FakeResult, fake_starter

pytestmark = pytest.mark.usefixtures("ray_session")


def published(version: str, *, total: float = 3.0) -> tuple[WeightManifest, ParityProbe]:
    """Weights that add up to `total`, and what the fake says of them: -total for each of the two later tokens."""
    manifest = put_weights([("w", torch.tensor([1.0, total - 1.0]))], version=version)
    return manifest, ParityProbe(token_ids=((1, 2, 3),), logprobs=((-total, -total),), bound=1e-4)


def corrupted(manifest: WeightManifest) -> WeightManifest:
    """The same manifest with one bit of its first bucket flipped on its way from another node."""
    parts = [part.copy() for part in ray.get(manifest.buckets[0].ref)]
    parts[0][0] ^= 1
    bucket = replace(manifest.buckets[0], ref=ray.put(parts), node_id="another")
    return replace(manifest, buckets=(bucket, *manifest.buckets[1:]))


@asynccontextmanager
async def fake_pool(
    num_replicas: int, behaviours: dict[int, Behaviour] | None = None
) -> AsyncIterator[Pool[FakeRequest, FakeResult]]:
    pool: Pool[FakeRequest, FakeResult] = Pool(
        name="fake", start_replica=fake_starter(behaviours=behaviours), num_replicas=num_replicas
    )
    await pool.start()
    try:
        yield pool
    finally:
        await pool.shutdown()


async def results_of(pool: Pool[FakeRequest, FakeResult], num_requests: int, *, prefix: str) -> list[FakeResult]:
    requests = [FakeRequest(request_id=f"{prefix}{i}") for i in range(num_requests)]
    return [result async for chunk in pool.route(requests) for result in chunk]


async def until(condition: Callable[[], Coroutine[Any, Any, bool]], *, timeout_s: float = 60) -> None:
    async def wait() -> None:
        while not await condition():
            await asyncio.sleep(0.05)

    await asyncio.wait_for(wait(), timeout_s)


async def num_ready(pool: Pool[FakeRequest, FakeResult]) -> int:
    return (await pool.stats()).ready


# ---------------------------------------------------------------------------------------------------------------- bytes


def test_tensors_come_back_bit_for_bit_in_their_order() -> None:
    named = [
        ("a", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
        ("b", torch.tensor([1.5, -2.25], dtype=torch.bfloat16)),
        ("scalar", torch.tensor(7, dtype=torch.int64)),
        ("empty", torch.empty(0, 4)),
        ("transposed", torch.arange(6, dtype=torch.float16).reshape(2, 3).T),
        ("mask", torch.tensor([True, False])),
    ]
    manifest = put_weights(named, version="v1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = list(iter_tensors(manifest))
    assert [name for name, _ in read] == ["a", "b", "scalar", "empty", "transposed", "mask"]
    for (_, wanted), (name, got) in zip(named, read, strict=True):
        assert got.dtype == wanted.dtype, name
        assert got.shape == wanted.shape, name
        assert torch.equal(got, wanted), name


def test_buckets_close_before_the_tensor_that_would_overfill_them() -> None:
    # 100 + 100 <= 256; the third would make 300; the fourth is larger than a bucket.
    sizes = {"a": 100, "b": 100, "c": 100, "d": 300}
    named = [(name, torch.zeros(size, dtype=torch.uint8)) for name, size in sizes.items()]
    manifest = put_weights(named, version="v1", bucket_bytes=256)
    assert [(spec.bucket, spec.part) for spec in manifest.tensors] == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert [bucket.size_bytes for bucket in manifest.buckets] == [200, 100, 300]


def test_a_bucket_holds_flat_arrays_with_their_checksum() -> None:
    manifest = put_weights([("w", torch.tensor([1, 2, 3], dtype=torch.uint8))], version="v1")
    (data,) = ray.get(manifest.buckets[0].ref)
    assert data.dtype == np.uint8
    assert data.tolist() == [1, 2, 3]
    assert manifest.buckets[0].checksum == checksum(data) == zlib.crc32(bytes([1, 2, 3]), zlib.crc32(bytes(512)))


def test_the_checksum_notices_what_may_happen_to_bytes() -> None:
    data = np.random.default_rng(0).integers(0, 256, 10 * 512 + 77, dtype=np.uint8)
    wrong = {"moved": np.roll(data, 8), "cut": data[:-8], "exchanged": data.copy(), "zeroed": data.copy()}
    wrong["exchanged"][0:8], wrong["exchanged"][8:16] = data[8:16], data[0:8]
    wrong["zeroed"][1024:1536] = 0
    for position in (0, 511, 512, 10 * 512 - 1, 10 * 512, data.size - 1):
        for bit in range(8):
            flipped = data.copy()
            flipped[position] ^= 1 << bit
            wrong[f"bit {bit} of byte {position}"] = flipped
    assert [what for what, other in wrong.items() if checksum(other) == checksum(data)] == []


def test_a_tensor_may_be_overwritten_once_its_bucket_is_put() -> None:
    weights = torch.zeros(2)
    manifest = put_weights([("w", weights)], version="v1")
    weights.fill_(5.0)
    assert {name: tensor.tolist() for name, tensor in iter_tensors(manifest)} == {"w": [0, 0]}


def test_what_is_exchanged_between_two_tensors_is_noticed() -> None:
    named = [("a", torch.arange(128.0)), ("b", torch.arange(128.0) + 1.0)]
    manifest = put_weights(named, version="v1")
    swapped = ray.put(ray.get(manifest.buckets[0].ref)[::-1])
    manifest = replace(manifest, buckets=(replace(manifest.buckets[0], ref=swapped, node_id="another"),))
    with pytest.raises(CorruptBucket, match="has checksum"):
        list(iter_tensors(manifest))


def test_tensors_are_views_of_the_object_store() -> None:
    manifest = put_weights([("w", torch.arange(1 << 18, dtype=torch.float32))], version="v1")
    (_, first), (_, second) = next(iter_tensors(manifest)), next(iter_tensors(manifest))
    assert first.data_ptr() == second.data_ptr()


def test_a_flipped_bit_is_a_corrupt_bucket_that_names_the_bucket() -> None:
    manifest = corrupted(published("v7")[0])
    with pytest.raises(CorruptBucket, match="v7: bucket 0 of 1 has checksum"):
        list(iter_tensors(manifest))


def test_on_the_node_where_it_was_put_a_bucket_is_taken_as_it_lies() -> None:
    manifest = put_weights([("w", torch.arange(128.0))], version="v1")
    here = manifest.buckets[0].node_id
    assert here == ray.get_runtime_context().get_node_id()
    moved = corrupted(manifest)
    taken = replace(moved, buckets=(replace(moved.buckets[0], node_id=here),))
    assert len(list(iter_tensors(taken))) == 1


def test_a_spec_beyond_its_bucket_is_corrupt() -> None:
    manifest = put_weights([("w", torch.zeros(2))], version="v1")
    manifest = replace(manifest, tensors=(replace(manifest.tensors[0], part=1),))
    with pytest.raises(
        CorruptBucket, match=r"needs 8 bytes; the manifest says 8 in part 1 of bucket 0, which has None"
    ):
        list(iter_tensors(manifest))


@pytest.mark.parametrize(
    ("named", "message"),
    [([("w", torch.zeros(1)), ("w", torch.zeros(1))], "two tensors are named 'w'"), ([], "got no tensors")],
)
def test_double_names_and_nothing_are_refused(named: list[tuple[str, torch.Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        put_weights(named, version="v1")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (WeightAnswer(version="v6", logprobs=((-1.0,),)), "holds version 'v6', wanted 'v7'"),
        (WeightAnswer(version="v7", logprobs=((-1.0, -1.0),)), r"answered \[2\] log-probs .*, wanted \[1\]"),
        (WeightAnswer(version="v7", logprobs=((float("nan"),),)), "not finite"),
        (WeightAnswer(version="v7", logprobs=((-1.5,),)), "is 0.5 nats, wanted at most 0.25"),
    ],
)
def test_parity_names_what_is_wrong(answer: WeightAnswer, message: str) -> None:
    probe = ParityProbe(token_ids=((1, 2),), logprobs=((-1.0,),), bound=0.25)
    with pytest.raises(ParityFailed, match=message):
        parity(answer, version="v7", probe=probe)


def test_parity_is_the_greatest_difference() -> None:
    probe = ParityProbe(token_ids=((1, 2, 3), (1, 2)), logprobs=((-1.0, -2.0), (-3.0,)), bound=0.5)
    answer = WeightAnswer(version="v7", logprobs=((-1.125, -2.0), (-2.75,)))
    assert parity(answer, version="v7", probe=probe) == 0.25


# ----------------------------------------------------------------------------------------------------------------- sync


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_every_replica_takes_the_version(num_replicas: int) -> None:
    async def scenario() -> None:
        async with fake_pool(num_replicas) as pool:
            manifest, probe = published("v1")
            report = await sync_weights(pool, manifest, probe=probe, deadline_s=60)
            assert report.version == "v1"
            assert report.accepted == tuple(range(num_replicas))
            assert report.quarantined == {}
            assert report.max_abs_diff == 0.0
            assert {result.weight_version for result in await results_of(pool, 12, prefix="q")} == {"v1"}
            assert (await pool.stats()).version == "v1"

    asyncio.run(scenario())


def test_a_replica_with_wrong_parity_is_replaced_by_one_with_the_new_version() -> None:
    async def scenario() -> None:
        async with fake_pool(3, {1: Behaviour(parity_error=0.5)}) as pool:
            manifest, probe = published("v1")
            report = await sync_weights(pool, manifest, probe=probe, deadline_s=60)
            assert report.accepted == (0, 2)
            assert list(report.quarantined) == [1]
            assert "0.5 nats" in report.quarantined[1]
            await until(lambda: has_ready(pool, 3))
            seen = await pool.fanout(lambda actor: actor.seen.remote(), timeout_s=10)
            assert sorted(seen) == [0, 2, 3]
            assert {replica["version"] for replica in seen.values()} == {"v1"}

    asyncio.run(scenario())


def test_a_replica_killed_in_mid_sync_comes_back_with_the_version_before_its_first_request() -> None:
    async def scenario() -> None:
        async with fake_pool(3, {2: Behaviour(die_on_apply=True)}) as pool:
            manifest, probe = published("v1")
            report = await sync_weights(pool, manifest, probe=probe, deadline_s=60)
            assert report.accepted == (0, 1)
            assert "ActorDiedError" in report.quarantined[2]
            await until(lambda: has_ready(pool, 3))
            assert len(await results_of(pool, 30, prefix="q")) == 30
            seen = await pool.fanout(lambda actor: actor.seen.remote(), timeout_s=10)
            assert set(seen[3]["versions_at_requests"]) == {"v1"}

    asyncio.run(scenario())


def test_the_only_replica_killed_in_mid_sync_is_waited_for() -> None:
    async def scenario() -> None:
        async with fake_pool(1, {0: Behaviour(die_on_apply=True)}) as pool:
            manifest, probe = published("v1")
            report = await sync_weights(pool, manifest, probe=probe, deadline_s=60)
            assert report.accepted == (1,)
            assert list(report.quarantined) == [0]

    asyncio.run(scenario())


def test_a_missed_deadline_is_quarantined() -> None:
    async def scenario() -> None:
        # The first sync also imports torch in the replicas, which takes its time; the deadline is tried on the second.
        async with fake_pool(2, {0: Behaviour(apply_delay_s=60, apply_delays_from="v2")}) as pool:
            manifest, probe = published("v1")
            await sync_weights(pool, manifest, probe=probe, deadline_s=60)
            manifest, probe = published("v2", total=4.0)
            report = await sync_weights(pool, manifest, probe=probe, deadline_s=2)
            assert report.accepted == (1,)
            assert report.quarantined == {0: "TimeoutError: no answer within 2 s"}
            assert report.seconds < 10

    asyncio.run(scenario())


def test_a_corrupt_bucket_fails_the_sync_and_the_old_version_keeps_serving() -> None:
    async def scenario() -> None:
        async with fake_pool(2) as pool:
            manifest, probe = published("v1")
            await sync_weights(pool, manifest, probe=probe, deadline_s=60)
            bad, bad_probe = published("v2", total=5.0)
            with pytest.raises(SyncFailed, match=r"no replica took v2.*CorruptBucket.*back at v1"):
                await sync_weights(pool, corrupted(bad), probe=bad_probe, deadline_s=60)
            assert pool.current is not None
            assert pool.current[0].version == "v1"
            seen = await pool.fanout(lambda actor: actor.seen.remote(), timeout_s=10)
            assert {replica_id: replica["version"] for replica_id, replica in seen.items()} == {0: "v1", 1: "v1"}
            assert {result.weight_version for result in await results_of(pool, 8, prefix="q")} == {"v1"}

    asyncio.run(scenario())


def test_without_an_old_version_a_corrupt_bucket_brings_replicas_back_as_they_started() -> None:
    async def scenario() -> None:
        async with fake_pool(1) as pool:
            manifest, probe = published("v1")
            with pytest.raises(SyncFailed, match="back at its initial weights"):
                await sync_weights(pool, corrupted(manifest), probe=probe, deadline_s=60)
            assert pool.current is None
            results = await results_of(pool, 2, prefix="q")
            assert {(result.replica_id, result.weight_version) for result in results} == {(1, "v0")}

    asyncio.run(scenario())


def test_nothing_made_with_refused_weights_leaves_the_pool() -> None:
    async def scenario() -> None:
        slow = Behaviour(chunk=1, delay_s=0.02, apply_delay_s=0.2, parity_error=0.5)
        async with fake_pool(2, {0: slow}) as pool:
            manifest, probe = published("v1")
            running = asyncio.create_task(results_of(pool, 100, prefix="q"))
            await asyncio.sleep(0.3)
            report = await sync_weights(pool, manifest, probe=probe, deadline_s=60)
            assert list(report.quarantined) == [0]
            results = await running
            assert len({result.request_id for result in results}) == len(results) == 100
            # Replica 0 answers with "v1" as soon as it has loaded it, and is refused a moment later.
            assert (0, "v1") not in {(result.replica_id, result.weight_version) for result in results}

    asyncio.run(scenario())


def test_a_replica_that_starts_during_a_sync_takes_the_new_version() -> None:
    async def scenario() -> None:
        async with fake_pool(1, {1: Behaviour(start_delay_s=0.5)}) as pool:
            manifest, probe = published("v1")
            await sync_weights(pool, manifest, probe=probe, deadline_s=60)
            await pool.scale(2)
            manifest, probe = published("v2", total=4.0)
            await sync_weights(pool, manifest, probe=probe, deadline_s=60)
            await until(lambda: has_ready(pool, 2))
            seen = await pool.fanout(lambda actor: actor.seen.remote(), timeout_s=10)
            assert {replica_id: replica["version"] for replica_id, replica in seen.items()} == {0: "v2", 1: "v2"}

    asyncio.run(scenario())


async def has_ready(pool: Pool[FakeRequest, FakeResult], wanted: int) -> bool:
    return await num_ready(pool) == wanted
