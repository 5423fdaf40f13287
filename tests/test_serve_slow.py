"""The endpoint on Ray Serve with real engines: clients, swaps, faults, load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import torch
from ray import serve as ray_serve
from transformers import AutoModelForCausalLM

from actors.chat import encode_chat
from actors.records import Message
from serve.auth import add_key
from serve.learner_app import APP, ServingConfig, start_serving
from serve.publisher import read_state, want_version
from tests.endpoint_load import MAX_OPEN_SAMPLES, load
from tests.served_run import commit_version, free_port, make_run
from tests.tiny_models import char_tokenizer
from trainers.run_config import read_resolved

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MESSAGES: Any = [{"role": "user", "content": "12+34"}]
PROMPT = (Message(role="user", content="12+34"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """An endpoint of two replicas, and the run that it serves."""

    run: Path
    url: str
    key: str
    publisher: Any

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=0, **more)

    def commit(self) -> str:
        """Commit the next version."""
        return commit_version(self.run, len(list((self.run / "policies").iterdir())))

    def pids(self) -> dict[int, str]:
        """Process of each replica that lives, and the version that it holds."""
        holding: dict[str, str] = ray.get(self.publisher.holding.remote())
        found = {int(name.partition("@")[0]): version for name, version in holding.items()}
        return {pid: version for pid, version in found.items() if Path(f"/proc/{pid}").exists()}

    async def until(self, is_so: Callable[[], bool], *, timeout_s: float = 90.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not await asyncio.to_thread(is_so):
                await asyncio.sleep(0.1)

    async def promoted(self, version: str) -> None:
        """Wait until every replica holds a version."""
        await self.until(lambda: list(self.pids().values()) == [version] * 2)


@pytest.fixture(scope="module")
def served(ray_session: str, short_tmp_path: Path) -> Iterator[Served]:
    run = make_run(short_tmp_path / "served", num_versions=2)
    _, key = add_key(run, label="test", requests_per_minute=10**9, max_concurrent=10**6)
    config = ServingConfig(port=free_port(), min_replicas=2, max_replicas=2, max_open_samples=MAX_OPEN_SAMPLES)
    engine = read_resolved(run / "resolved.json").rollouts.engine
    serving = start_serving(run, config, engine=engine, parity_bound=1e-4, log_path=run / "serve.log")
    publisher = ray.get_actor(serving.publisher)
    try:
        yield Served(run=run, url=serving.url, key=key, publisher=publisher)
    finally:
        serving.stop()


def logprobs_of(run: Path, version: str, tokens: Sequence[str]) -> list[float]:
    """Return what transformers says of each token of an answer, by a version's files.

    Not of the answer's text: these models have random weights and draw control tokens, which no text shows.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(run / "policies" / f"v{int(version[1:]):06d}")
    tokenizer = char_tokenizer()
    prompt = list(encode_chat(tokenizer, PROMPT))
    answer = tokenizer.convert_tokens_to_ids(list(tokens))
    with torch.inference_mode():
        table = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return [table[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]


# ----------------------------------------------------------------------------------------------------------- clients


def test_the_openai_client_chats(served: Served) -> None:
    client = served.client()
    one = client.chat.completions.create(model="learner", messages=MESSAGES, max_tokens=8, n=2, seed=5)
    again = client.chat.completions.create(model="learner", messages=MESSAGES, max_tokens=8, n=2, seed=5)
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]
    assert one.system_fingerprint == "v1"
    assert one.usage is not None
    assert one.usage.prompt_tokens == len(encode_chat(char_tokenizer(), PROMPT))
    assert one.usage.completion_tokens <= 16


def test_log_probs_are_those_of_the_version_that_the_answer_names(served: Served) -> None:
    answer = served.client().chat.completions.create(
        model="learner", messages=MESSAGES, max_tokens=12, logprobs=True, top_logprobs=3, seed=1, stop=["\x00"]
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    said = [token.logprob for token in content]
    assert said == pytest.approx(logprobs_of(served.run, "v1", [token.token for token in content]), abs=1e-4)
    for token in content:
        values = [other.logprob for other in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0] + 1e-6


def test_the_openai_client_streams_and_the_last_event_has_the_version(served: Served) -> None:
    stream = served.client().chat.completions.create(
        model="learner", messages=MESSAGES, max_tokens=40, seed=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = served.client().chat.completions.create(model="learner", messages=MESSAGES, max_tokens=40, seed=3)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].system_fingerprint == "v1"
    finished = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert [chunk.model_extra["weight_version"] for chunk in finished] == ["v1"]  # type: ignore[index]


def test_completions_stop_at_stop_strings_and_schemas_are_met(served: Served) -> None:
    client = served.client()
    done = client.completions.create(
        model="learner", prompt=["1+1", "2+2"], max_tokens=60, stop=["a", "e", "1"], logprobs=2
    )
    assert len(done.choices) == 2
    assert all(not set("ae1") & set(choice.text) for choice in done.choices)
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "boolean"}, "unit": {"enum": ["m", "s"]}},
        "required": ["answer", "unit"],
        "additionalProperties": False,
    }
    shaped = client.chat.completions.create(
        model="learner",
        messages=MESSAGES,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    found = json.loads(shaped.choices[0].message.content or "")
    assert set(found) == {"answer", "unit"}
    assert found["answer"] in (True, False)
    assert found["unit"] in ("m", "s")


def test_the_largest_schema_that_is_taken_compiles_within_a_second(served: Served) -> None:
    properties = {f"p{i}": {"type": "array", "items": {"type": "string", "maxLength": 256}} for i in range(60)}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    begin = time.perf_counter()
    served.client().chat.completions.create(
        model="learner",
        messages=MESSAGES,
        max_tokens=1,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert time.perf_counter() - begin < 2.0


def test_the_openai_client_raises_its_own_errors(served: Served) -> None:
    def ask(client: openai.OpenAI, **more: Any) -> None:
        client.chat.completions.create(**{"model": "learner", "messages": MESSAGES, **more})

    with pytest.raises(openai.AuthenticationError, match="a key that is not known"):
        ask(openai.OpenAI(base_url=served.url, api_key="elk-wrong", max_retries=0))
    with pytest.raises(openai.NotFoundError, match="model: got gpt-4"):
        ask(served.client(), model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="max_tokens: got -1"):
        ask(served.client(), max_tokens=-1)
    with pytest.raises(openai.BadRequestError, match="wanted at most 255"):
        ask(served.client(), messages=[{"role": "user", "content": "x" * 300}])
    _, slow = add_key(served.run, label="slow", requests_per_minute=6)
    time.sleep(1.2)  # the gateway looks at the file once a second
    client = openai.OpenAI(base_url=served.url, api_key=slow, max_retries=0)
    ask(client, max_tokens=1)
    with pytest.raises(openai.RateLimitError, match="more than 6 requests a minute") as caught:
        ask(client, max_tokens=1)
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_the_async_client_has_many_answers_at_once(served: Served) -> None:
    async def story() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key=served.key, max_retries=0) as client:
            asked = [
                client.chat.completions.create(model="learner", messages=MESSAGES, max_tokens=16) for _ in range(40)
            ]
            return list(await asyncio.gather(*asked))

    answers = asyncio.run(story())
    assert {answer.system_fingerprint for answer in answers} == {"v1"}
    assert len({answer.choices[0].message.content for answer in answers}) > 30


def test_curl_asks_and_streams(served: Served) -> None:
    def curl(path: str, *words: str) -> str:
        command = ["curl", "-sS", "--max-time", "30", "-H", f"Authorization: Bearer {served.key}", *words]
        return subprocess.run([*command, served.url + path], capture_output=True, text=True, check=True).stdout

    listed = json.loads(curl("/models"))
    assert [model["id"] for model in listed["data"]] == ["learner", "learner@v1", "learner@v0"]
    body = json.dumps({"model": "learner", "messages": MESSAGES, "max_tokens": 5, "stream": True})
    events = curl("/chat/completions", "-N", "-H", "Content-Type: application/json", "-d", body).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["weight_version"] == "v1"


def test_what_is_too_large_or_never_ends_is_told_so_by_the_real_server(served: Served) -> None:
    headers = {"authorization": f"Bearer {served.key}", "content-type": "application/json"}

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    large = httpx.post(f"{served.url}/chat/completions", headers=headers, content=endless(), timeout=30)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")

    lines = ["POST /v1/chat/completions HTTP/1.1", "host: x", *(f"{k}: {v}" for k, v in headers.items())]
    no_headers = "\r\n".join(lines).encode()
    no_body = "\r\n".join([*lines, "content-length: 100", "", "{"]).encode()

    async def slow(begun: bytes) -> tuple[bytes, bytes]:
        host, port = served.url.split("/")[2].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(begun)
        try:
            async with asyncio.timeout(14):
                head = await reader.readuntil(b"\r\n\r\n")
                return head, await reader.readuntil(b"}}")
        finally:
            writer.close()

    async def both() -> list[tuple[bytes, bytes]]:
        return await asyncio.gather(slow(no_headers), slow(no_body))

    for (head, body), what in zip(asyncio.run(both()), ("headers: got", "body: got"), strict=True):
        assert head.startswith(b"HTTP/1.1 408")
        error = json.loads(body)["error"]
        assert error["code"] == "request_timeout"
        assert error["message"].startswith(what)


def test_a_client_that_leaves_frees_the_engine(served: Served) -> None:
    with served.client().chat.completions.create(
        model="learner", messages=MESSAGES, max_tokens=240, n=16, stream=True, frequency_penalty=2.0
    ) as stream:
        next(iter(stream))
    handle = ray_serve.get_deployment_handle("learner", APP)
    deadline = time.monotonic() + 5
    while (open_now := sum(handle.broadcast("num_open").results(timeout_s=5))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert open_now == 0


# ------------------------------------------------------------------------------------------------------------- swaps


def test_a_swap_in_the_middle_of_an_answer_is_told_token_by_token(served: Served) -> None:
    async def story() -> tuple[str, Any]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key=served.key, max_retries=0) as client:
            for _ in range(5):
                asked = [
                    client.chat.completions.create(
                        model="learner", messages=MESSAGES, max_tokens=230, logprobs=True, frequency_penalty=0.3
                    )
                    for _ in range(48)
                ]
                answers = asyncio.gather(*asked)
                version = await asyncio.to_thread(served.commit)
                done = [choice for answer in await answers for choice in answer.choices]
                await served.promoted(version)
                mixed = [choice for choice in done if len(choice.model_extra["weight_spans"]) == 2]  # type: ignore[index]
                if mixed:
                    return version, mixed[0]
            raise AssertionError("no swap met a running answer")

    version, choice = asyncio.run(story())
    first, second = choice.model_extra["weight_spans"]
    assert (second["version"], first["start"], second["start"]) == (version, 0, first["end"])
    assert first["version"] != version


def test_ten_swaps_under_load_lose_nothing(served: Served) -> None:
    async def story() -> None:
        async with load(served.url, served.key, num_clients=8) as found:
            for _ in range(10):
                version = await asyncio.to_thread(served.commit)
                await served.promoted(version)
        assert found.failures == []
        committed = {f"v{int(path.name[1:])}" for path in (served.run / "policies").iterdir()}
        assert set(found.versions) <= committed
        assert len(found.versions) >= 10
        assert sum(found.statuses.values()) > 50

    asyncio.run(story())


def test_weights_that_are_not_finite_are_refused_and_the_version_before_goes_on(served: Served) -> None:
    async def story() -> None:
        before = read_state(served.run)["current"]
        number = len(list((served.run / "policies").iterdir()))
        bad = commit_version(served.run, number, nan=True)
        async with load(served.url, served.key, num_clients=2) as found:
            await served.until(lambda: bad in read_state(served.run)["refused"])
        assert found.failures == []
        assert set(found.versions) == {before}
        await served.promoted(await asyncio.to_thread(served.commit))

    asyncio.run(story())


def test_a_pinned_version_answers_beside_the_current_one(served: Served) -> None:
    client = served.client(timeout=120.0)
    for version in ("v0", "v1", "v0"):
        answer = client.chat.completions.create(
            model=f"learner@{version}", messages=MESSAGES, max_tokens=6, logprobs=True
        )
        assert answer.system_fingerprint == version
        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content or []
        said = [token.logprob for token in content]
        tokens = [token.token for token in content]
        assert said == pytest.approx(logprobs_of(served.run, version, tokens), abs=1e-4)


def test_a_person_promotes_a_version_and_goes_back(served: Served) -> None:
    async def story() -> None:
        newest = read_state(served.run)["current"]
        want_version(served.run, "v1")
        await served.promoted("v1")
        assert read_state(served.run)["history"][-2:] == [newest, "v1"]
        assert served.client().models.list().data[0].model_extra["weight_version"] == "v1"  # type: ignore[index]
        want_version(served.run, "newest")
        await served.promoted(newest)

    asyncio.run(story())


# ------------------------------------------------------------------------------------------------------------ faults


def test_killed_replicas_lose_no_answer_and_their_streams_end_with_an_error_event(served: Served) -> None:
    body = {"model": "learner", "messages": MESSAGES, "max_tokens": 240, "stream": True, "n": 16, "temperature": 1.5}

    async def stream(client: httpx.AsyncClient) -> list[str]:
        async with client.stream("POST", "/chat/completions", json=body) as response:
            lines = [line async for line in response.aiter_lines() if line]
            return [str(response.status_code), *lines]

    async def story() -> list[list[str]]:
        version = read_state(served.run)["current"]
        victims = set(served.pids())
        headers = {"authorization": f"Bearer {served.key}"}
        async with (
            httpx.AsyncClient(base_url=served.url, headers=headers, timeout=120) as client,
            load(served.url, served.key, num_clients=6) as found,
        ):
            await served.until(lambda: found.statuses[200] > 20)
            streams = [asyncio.create_task(stream(client)) for _ in range(3)]
            await asyncio.sleep(0.4)
            os.kill(max(victims), signal.SIGKILL)
            await asyncio.sleep(0.2)
            os.kill(min(victims), signal.SIGKILL)
            done = await asyncio.gather(*streams)
            await served.until(lambda: len(served.pids()) == 2)
            await served.promoted(version)
        assert found.failures == []
        assert set(found.versions) == {version}
        assert not victims & set(served.pids())
        return done

    ends = [lines for lines in asyncio.run(story()) if lines[0] == "200"]
    broken = [json.loads(lines[-1].removeprefix("data: ")) for lines in ends if lines[-1] != "data: [DONE]"]
    assert broken, "the kills met no stream"
    assert {end["error"]["code"] for end in broken} == {"answer_lost"}


def test_a_replica_that_hangs_costs_no_answer(served: Served) -> None:
    async def story() -> None:
        await served.until(lambda: len(served.pids()) == 2)
        victim = min(served.pids())
        async with load(served.url, served.key, num_clients=4) as found:
            await served.until(lambda: found.statuses[200] > 8)
            os.kill(victim, signal.SIGSTOP)
            try:
                # Twenty seconds of silence, and the answer anew.
                await served.until(lambda: max(found.seconds) > 15, timeout_s=40)
            finally:
                os.kill(victim, signal.SIGKILL)
        assert found.failures == []
        await served.until(lambda: len(served.pids()) == 2)

    asyncio.run(story())


def test_without_its_controller_the_endpoint_goes_on(served: Served) -> None:
    async def story() -> None:
        controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
        async with load(served.url, served.key, num_clients=4) as found:
            await served.until(lambda: found.statuses[200] > 8)
            ray.kill(controller, no_restart=False)
            await asyncio.sleep(5)
            await served.promoted(await asyncio.to_thread(served.commit))
        assert found.failures == []

    asyncio.run(story())


def test_a_killed_gateway_costs_a_client_that_retries_nothing(served: Served) -> None:
    async def story() -> None:
        found = await retried_through(served, lambda: ray.kill(serve_actor("#gateway#"), no_restart=True))
        assert found >= 20

    asyncio.run(story())


def test_a_killed_proxy_is_an_outage_on_one_node_that_ends(served: Served) -> None:
    headers = {"authorization": f"Bearer {served.key}"}
    ray.kill(serve_actor("SERVE_PROXY_ACTOR"), no_restart=False)
    begin, is_out = time.monotonic(), False
    while time.monotonic() - begin < 60:
        try:
            answered = httpx.get(f"{served.url}/models", headers=headers, timeout=5).status_code == 200
        except httpx.TransportError:
            answered, is_out = False, True
        if is_out and answered:
            return
        time.sleep(0.05)
    raise AssertionError(f"no answer {time.monotonic() - begin:.0f} s after the proxy's kill; out: {is_out}")


def serve_actor(part: str) -> Any:
    """Return one of Ray Serve's own actors by a part of its name."""
    names = [found["name"] for found in ray.util.list_named_actors(all_namespaces=True)]
    return ray.get_actor(next(name for name in names if part in name), namespace="serve")


async def retried_through(served: Served, fault: Callable[[], None]) -> int:
    """Ask by clients that retry, before a fault, over it and after; return the number of answers, all of them good."""
    async with openai.AsyncOpenAI(base_url=served.url, api_key=served.key, max_retries=5) as client:
        num_answers = 0

        async def ask() -> None:
            nonlocal num_answers
            for _ in range(8):
                await client.chat.completions.create(model="learner", messages=MESSAGES, max_tokens=24)
                num_answers += 1

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        await asyncio.sleep(0.2)
        await asyncio.to_thread(fault)
        await asyncio.gather(*asking)
    return num_answers


def test_a_killed_publisher_comes_back_and_publishes_on(served: Served) -> None:
    async def story() -> None:
        async with load(served.url, served.key, num_clients=4) as found:
            ray.kill(served.publisher, no_restart=False)
            version = await asyncio.to_thread(served.commit)
            await served.until(lambda: read_state(served.run)["current"] == version)
            await served.promoted(version)
        assert found.failures == []
        assert version in found.versions

    asyncio.run(story())


def test_ten_times_too_much_is_told_to_come_back(served: Served) -> None:
    async def story() -> None:
        async with load(served.url, served.key, num_clients=MAX_OPEN_SAMPLES) as peak:
            await asyncio.sleep(3)
        async with load(served.url, served.key, num_clients=10 * MAX_OPEN_SAMPLES, pause_s=1.0) as flood:
            await asyncio.sleep(5)
        assert peak.failures == []
        assert set(flood.statuses) == {200, 503}
        # Refused by the proxy: none of them has been to the gateway.
        assert all("64 requests are open, as many as are taken at once" in failure for failure in flood.failures)
        # One after another: not all at once.
        assert min(map(int, flood.retry_after)) >= 1
        assert max(map(int, flood.retry_after)) > 5
        assert flood.statuses[200] > 0

    asyncio.run(story())
