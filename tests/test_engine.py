"""Real engines on tiny random models, held against transformers in fp32: log-probs, seeds, swaps, deaths."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from transformers import AutoModelForCausalLM

from actors.chat import decode, encode_chat, label_token_id
from actors.engine import EngineActor, EngineConfig, start_engine_replica
from actors.generation import Completion, GenerationRequest
from actors.records import Message
from cluster.placement import release
from cluster.ray_runtime import mapped_shm, shm_files, worker_stderr
from cluster.replica import EngineStats, Replica, ReplicaInfo
from cluster.weights import WeightAnswer, WeightManifest, put_weights
from tests.test_engine_requests import make_fake_engine
from tests.tiny_models import char_tokenizer, perturb, write_gpt2, write_llama, write_qwen2

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

BOUND = 1e-4
"""Nats; the bound of a parity probe in fp32. Measured: 3e-6."""
TOKENIZER = char_tokenizer()
T = TypeVar("T")


@dataclass
class Engine:
    """A replica and the transformers model that it must agree with."""

    replica: Replica
    model: Any
    info: ReplicaInfo

    async def generate(self, *requests: GenerationRequest) -> list[Completion]:
        chunks = [await ref async for ref in self.replica.actor.generate.remote(list(requests))]
        return [done for chunk in chunks for done in chunk]

    async def apply(self, manifest: WeightManifest, probe: Sequence[Sequence[int]] = ()) -> WeightAnswer:
        answer: WeightAnswer = await self.replica.actor.apply_weights.remote(manifest, probe)
        return answer

    async def stats(self) -> EngineStats:
        stats: EngineStats = await self.replica.actor.stats.remote()
        return stats

    def publish(self, version: str, *, seed: int, bucket_bytes: int = 40_000) -> WeightManifest:
        perturb(self.model, seed=seed)
        return put_weights(self.model.named_parameters(), version=version, bucket_bytes=bucket_bytes)

    def worst(self, done: Completion, *, temperature: float = 1.0, start: int = 0) -> float:
        """Return max |Δ log-prob| of the sampled tokens from `start` on."""
        table = self.table([*done.prompt_token_ids, *done.token_ids], temperature=temperature)
        first = len(done.prompt_token_ids)
        wanted = [table[first - 1 + i, token].item() for i, token in enumerate(done.token_ids)]
        return max((abs(a - b) for a, b in list(zip(wanted, done.logprobs, strict=True))[start:]), default=0.0)

    def table(self, token_ids: Sequence[int], *, temperature: float = 1.0) -> torch.Tensor:
        """Return log-probs [T, V] of the token after each position."""
        with torch.no_grad():
            return (self.model(torch.tensor([list(token_ids)])).logits[0] / temperature).log_softmax(-1)

    def parity(self, answer: WeightAnswer, probe: Sequence[Sequence[int]]) -> float:
        wanted = [[self.table(row)[i, token].item() for i, token in enumerate(row[1:])] for row in probe]
        return max(abs(a - b) for x, y in zip(wanted, answer.logprobs, strict=True) for a, b in zip(x, y, strict=True))


def ask(text: str, *, request_id: str = "r", max_tokens: int = 30, **changes: Any) -> GenerationRequest:
    messages = (Message(role="user", content=text),)
    return GenerationRequest(request_id=request_id, messages=messages, max_tokens=max_tokens, **changes)


def run(work: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())


def start(path: Path, *, replica_id: int = 0, log_path: Path | None = None, max_num_seqs: int = 16) -> Replica:
    config = EngineConfig(model=str(path), kv_cache_gb=0.05, max_num_seqs=max_num_seqs)
    return start_engine_replica(config, replica_id=replica_id, num_cpus=0.2, log_path=log_path)


def meet(replica: Replica, path: Path) -> Engine:
    info: ReplicaInfo = ray.get(replica.actor.ready.remote(), timeout=240)
    return Engine(replica=replica, model=AutoModelForCausalLM.from_pretrained(path), info=info)


def end(engine: Engine) -> None:
    assert engine.replica.placement_group is not None
    release(engine.replica.placement_group)
    psutil.wait_procs([p for p in psutil.process_iter() if p.pid == engine.info.pid], timeout=10)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "untied", tied=False)


@pytest.fixture(scope="module")
def pair(ray_session: str, model_path: Path) -> Iterator[tuple[Engine, Engine]]:
    """Two replicas of one model, started at once."""
    replicas = [start(model_path, replica_id=i) for i in range(2)]
    first, second = (meet(replica, model_path) for replica in replicas)
    yield first, second
    for engine in (first, second):
        end(engine)


@pytest.fixture
def engine(pair: tuple[Engine, Engine]) -> Engine:
    return pair[0]


def test_log_probs_of_samples_and_labels_are_transformers_own_in_a_mixed_batch(engine: Engine) -> None:
    temperatures = [1.0, 0.7, 1.5]
    label_sets: list[tuple[str, ...]] = [(), ("y", "n"), ("1", "2", "3", "4", "5", "+", " ", "A", "B")]
    requests = {
        f"{t}/{k}": ask(f"{t}+{k}", request_id=f"{t}/{k}", temperature=t, labels=labels, num_samples=4)
        for t in temperatures
        for k, labels in enumerate(label_sets)
    }
    done = run(engine.generate(*requests.values()))
    assert sorted((d.request_id, d.sample_index) for d in done) == sorted((r, i) for r in requests for i in range(4))
    num_marks = 0
    for d in done:
        request = requests[d.request_id]
        assert d.prompt_token_ids == encode_chat(TOKENIZER, request.messages)
        assert engine.worst(d, temperature=request.temperature) < BOUND
        table = engine.table([*d.prompt_token_ids, *d.token_ids], temperature=request.temperature)
        label_ids = [label_token_id(TOKENIZER, label) for label in request.labels]
        assert [p for p, _ in d.label_marks] == [p for p, t in enumerate(d.token_ids) if t in label_ids]
        for (position, label), row in zip(d.label_marks, d.label_logprobs, strict=True):
            assert d.token_ids[position] == label_token_id(TOKENIZER, label)
            wanted = table[len(d.prompt_token_ids) - 1 + position, label_ids].tolist()
            assert row == pytest.approx(wanted, abs=BOUND)
            num_marks += 1
    assert num_marks > 5


def test_with_top_p_the_log_probs_are_those_of_the_truncated_distribution(engine: Engine) -> None:
    [done] = run(engine.generate(ask("5*5", top_p=0.3, max_tokens=20)))
    table = engine.table([*done.prompt_token_ids, *done.token_ids])
    for i, (token, logprob) in enumerate(zip(done.token_ids, done.logprobs, strict=True)):
        p = table[len(done.prompt_token_ids) - 1 + i].exp()
        ordered, ids = p.sort(descending=True)
        kept = int((ordered.cumsum(0) - ordered < 0.3).sum())  # the smallest set that holds 0.3 of the mass
        assert token in ids[:kept].tolist()
        assert logprob == pytest.approx((p[token] / ordered[:kept].sum()).log().item(), abs=1e-3)


def test_greedy_samples_are_the_most_likely_tokens_and_end_with_eos_or_at_the_limit(engine: Engine) -> None:
    done = run(engine.generate(*(ask(f"{i}-{i}", request_id=str(i), temperature=0.0) for i in range(12))))
    for d in done:
        table = engine.table([*d.prompt_token_ids, *d.token_ids])[len(d.prompt_token_ids) - 1 :]
        assert list(d.token_ids) == table.argmax(-1)[: len(d.token_ids)].tolist()
        assert d.finish_reason == ("stop" if d.token_ids[-1] == TOKENIZER.eos_token_id else "length")
        assert d.text == TOKENIZER.decode(list(d.token_ids), skip_special_tokens=True)


def test_after_a_prefix_an_answer_goes_on_as_it_did_after_its_own_beginning(engine: Engine) -> None:
    whole = run(engine.generate(*(ask(f"{i}+{i}", request_id=str(i), temperature=0.0) for i in range(6))))
    for d in whole:
        begun = d.token_ids[: len(d.token_ids) // 2]
        asked = ask(f"{d.request_id}+{d.request_id}", temperature=0.0, prefix=decode(TOKENIZER, begun))
        [rest] = run(engine.generate(replace(asked, max_tokens=30 - len(begun))))
        assert rest.prompt_token_ids == (*d.prompt_token_ids, *begun)
        assert (rest.token_ids, rest.finish_reason) == (d.token_ids[len(begun) :], d.finish_reason)
        assert decode(TOKENIZER, begun) + rest.text == d.text


def test_a_seeded_request_gives_one_text_on_every_replica_and_an_unseeded_one_does_not(
    pair: tuple[Engine, Engine],
) -> None:
    first, second = pair

    async def texts(engine: Engine, *, seed: int | None) -> list[tuple[int, ...]]:
        # A long prompt beside it: the batch must not matter, nor whether a prompt is long (prefill in chunks).
        done = await engine.generate(
            ask("7+8", num_samples=4, seed=seed), ask("9" * 400, request_id="long", seed=seed, num_samples=2)
        )
        ordered = sorted(done, key=lambda d: (d.request_id, d.sample_index))
        return [d.token_ids for d in ordered]

    one, two = run(texts(first, seed=11)), run(texts(second, seed=11))
    assert one == two == run(texts(first, seed=11))
    assert len(set(one)) == 6
    assert one != run(texts(first, seed=12))
    assert run(texts(first, seed=None)) != run(texts(second, seed=None))


def test_concurrent_callers_get_their_own_results_from_shared_steps(engine: Engine) -> None:
    async def both() -> tuple[list[Completion], list[Completion], float]:
        before = await engine.stats()
        mine = [ask(f"{i}", request_id=f"mine{i}", num_samples=2, max_tokens=100) for i in range(4)]
        yours = [ask(f"{i}", request_id=f"mine{i}", num_samples=2, max_tokens=100, labels=("7",)) for i in range(4)]
        one, two = await asyncio.gather(engine.generate(*mine), engine.generate(*yours))
        after = await engine.stats()
        assert after.num_running == 0
        return one, two, after.num_generated_tokens - before.num_generated_tokens

    one, two, num_tokens = run(both())
    assert num_tokens == sum(len(d.token_ids) for d in [*one, *two])
    for done in (one, two):
        assert sorted((d.request_id, d.sample_index) for d in done) == [
            (f"mine{i}", k) for i in range(4) for k in (0, 1)
        ]
    assert not any(d.label_marks for d in one)
    assert all(len(d.label_marks) == d.token_ids.count(label_token_id(TOKENIZER, "7")) for d in two)


def test_a_bad_request_is_refused_and_the_engine_goes_on(engine: Engine) -> None:
    with pytest.raises(RayTaskError, match="the prompt has 603 tokens"):
        run(engine.generate(ask("1" * 600)))
    with pytest.raises(RayTaskError, match="'yes' is 3 tokens"):
        run(engine.generate(ask("1", labels=("yes",))))
    [done] = run(engine.generate(ask("1", max_tokens=10_000)))
    assert len(done.prompt_token_ids) + len(done.token_ids) <= 512


def test_a_cancelled_call_leaves_nothing_in_the_engine(engine: Engine) -> None:
    async def cancel() -> None:
        requests = [ask("1", request_id=str(i), max_tokens=400, num_samples=8) for i in range(20)]
        stream = engine.replica.actor.generate.remote(requests)
        await anext(stream)
        ray.cancel(stream)
        while (await engine.stats()).num_running:
            await asyncio.sleep(0.05)

    run(cancel())
    run(engine.replica.actor.check.remote())


def test_each_new_version_of_the_weights_answers_as_transformers_does(engine: Engine) -> None:
    probe = [list(encode_chat(TOKENIZER, ask(text).messages)) for text in ("1+1", "a longer probe " * 20, "x")]
    for version, seed, bucket_bytes in [("v1", 1, 40_000), ("v2", 2, 1 << 20), ("v3", 3, 1)]:
        manifest = engine.publish(version, seed=seed, bucket_bytes=bucket_bytes)
        answer = run(engine.apply(manifest, probe))
        assert answer.version == version
        assert engine.parity(answer, probe) < BOUND
    assert len(manifest.buckets) == 21  # one per tensor
    del manifest  # what was loaded must not be a view of what is now freed
    done = run(engine.generate(*(ask(f"{i}", request_id=str(i)) for i in range(8))))
    assert {d.weight_version for d in done} == {"v3"}
    assert max(engine.worst(d) for d in done) < BOUND


def test_an_update_that_is_not_the_whole_model_is_refused_and_the_old_weights_stay(engine: Engine) -> None:
    run(engine.apply(engine.publish("whole", seed=4)))
    named = dict(engine.model.named_parameters())
    missing = {name: p for name, p in named.items() if name != "model.layers.1.self_attn.k_proj.weight"}
    with pytest.raises(RayTaskError, match=r"1 missing \(model\.layers\.1\.self_attn\.k_proj\.weight\)"):
        run(engine.apply(put_weights(missing.items(), version="v5")))
    extra = {**named, "model.layers.7.extra": torch.zeros(3)}
    with pytest.raises(RayTaskError, match=r"1 unexpected \(model\.layers\.7\.extra\)"):
        run(engine.apply(put_weights(extra.items(), version="v5")))
    reshaped = {**named, "model.norm.weight": torch.zeros(63)}
    with pytest.raises(RayTaskError, match="1 of another shape"):
        run(engine.apply(put_weights(reshaped.items(), version="v5")))
    [done] = run(engine.generate(ask("3+3")))
    assert done.weight_version == "whole"
    assert engine.worst(done) < BOUND


def test_a_corrupted_bucket_is_refused_and_the_old_weights_stay(engine: Engine) -> None:
    run(engine.apply(engine.publish("sound", seed=5)))
    manifest = put_weights(engine.model.named_parameters(), version="rotten", bucket_bytes=40_000)
    parts = [np.array(part) for part in ray.get(manifest.buckets[3].ref)]
    parts[0][100] ^= 1
    rotten = replace(manifest.buckets[3], ref=ray.put(parts), node_id="another")
    with pytest.raises(RayTaskError, match="bucket 3 of"):
        run(engine.apply(replace(manifest, buckets=(*manifest.buckets[:3], rotten, *manifest.buckets[4:]))))
    [done] = run(engine.generate(ask("3+3")))
    assert done.weight_version == "sound"
    assert engine.worst(done) < BOUND


def test_a_swap_under_load_answers_at_once_and_every_token_knows_its_weights(engine: Engine) -> None:
    # 300 equal characters: more than two cache blocks of 128 tokens, which the new weights must not find again.
    run(engine.apply(engine.publish("old", seed=6)))
    requests = [ask("8" * 300, request_id=str(i), max_tokens=150, num_samples=4) for i in range(20)]
    probe = [list(encode_chat(TOKENIZER, requests[0].messages))]

    async def swap() -> tuple[WeightAnswer, int, list[Completion]]:
        running = asyncio.create_task(engine.generate(*requests))
        while (await engine.stats()).busy_s == busy or (await engine.stats()).num_running == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        answer = await engine.apply(manifest, probe)
        left = (await engine.stats()).num_running
        return answer, left, [*(await running), *(await engine.generate(*requests[:2]))]

    busy = run(engine.stats()).busy_s
    manifest = engine.publish("new", seed=7)
    answer, left, done = run(swap())
    assert engine.parity(answer, probe) < BOUND
    assert left > 16  # the probe did not wait for what waited
    assert {d.weight_spans[-1][0] for d in done} == {"old", "new"} or {d.weight_version for d in done} == {"new"}
    across = [d for d in done if len(d.weight_spans) == 2]
    assert across, "no sample was in flight during the swap"
    for d in done:
        assert d.weight_spans[0][1] == 0
        assert d.weight_spans[-1][2] == len(d.token_ids)
        if d.weight_version == "new":
            assert engine.worst(d, start=d.weight_spans[-1][1]) < BOUND
    for d in across:
        assert engine.worst(d) > BOUND  # its first tokens came from the old weights


@pytest.mark.parametrize(
    ("write", "tied"), [(write_llama, True), (write_qwen2, False), (write_gpt2, True)], ids=["llama", "qwen2", "gpt2"]
)
def test_every_architecture_loads_and_swaps_through_the_same_path(write: Any, tied: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "model", tied=tied, seed=5)
    log_path = tmp_path / "logs" / "engine.log"
    engine = meet(start(path, log_path=log_path), path)
    try:
        done = run(engine.generate(*(ask(f"{i}+1", request_id=str(i), num_samples=2) for i in range(4))))
        assert max(engine.worst(d) for d in done) < BOUND
        assert {d.weight_version for d in done} == {"v0"}
        probe = [[*d.prompt_token_ids, *d.token_ids] for d in done]
        for version, seed in [("v1", 1), ("v2", 2)]:
            assert engine.parity(run(engine.apply(engine.publish(version, seed=seed), probe)), probe) < BOUND
        done = run(engine.generate(*(ask(f"{i}+1", request_id=str(i)) for i in range(4))))
        assert max(engine.worst(d) for d in done) < BOUND
        assert ("lm_head.weight" in dict(engine.model.named_parameters())) is not tied
        # Nothing of vLLM's own reaches the terminal; it is all in the file.
        assert "vllm" in log_path.read_text()
        assert [line for line in worker_stderr(pid=engine.info.pid).splitlines() if not line.startswith(":")] == []
    finally:
        end(engine)


def test_a_directory_without_a_chat_template_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        start(write_llama(tmp_path / "m", chat_template=None))


def test_a_failing_engine_core_ends_its_process_and_says_why_on_stderr(model_path: Path) -> None:
    actor = (
        ray.remote(EngineActor)
        .options(num_cpus=0.2)
        .remote(EngineConfig(model=str(model_path)), replica_id=0, make_engine=make_fake_engine)
    )
    info: ReplicaInfo = ray.get(actor.ready.remote(), timeout=60)
    with pytest.raises(ActorDiedError):
        ray.get(next(actor.generate.remote([ask("1", request_id="explode")])), timeout=20)
    assert "RuntimeError: the core failed" in worker_stderr(pid=info.pid)


def test_a_killed_replica_is_seen_at_once_and_leaves_nothing(pair: tuple[Engine, Engine]) -> None:
    victim = pair[1]
    process = psutil.Process(victim.info.pid)
    shared = {area.path for area in process.memory_maps() if area.path.startswith("/dev/shm/")}

    async def kill() -> None:
        running = asyncio.create_task(victim.generate(ask("1", max_tokens=400, num_samples=200)))
        while not (await victim.stats()).num_running:
            await asyncio.sleep(0.01)
        assert process.children(recursive=True) == []  # one process alone: nobody is left to clean up
        process.kill()
        with pytest.raises(ActorDiedError):
            await running

    run(kill())
    assert process.wait(timeout=10) is None  # gone, once Ray, whose child it is, has taken note of its end
    left = shared & {f"/dev/shm/{name}" for name in shm_files()}
    assert left <= mapped_shm()  # the object store, which Ray's own processes still use
