"""The endpoint as HTTP, over a fake backend: every wrong request has its words, every right one its answer."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from serve.auth import revoke_key
from serve.gateway import GatewayConfig
from serve.limits import Overloaded
from serve.wire import AnswerLost, RequestRefused
from tests.fake_endpoint import CONTEXT, Answer, Endpoint, chat_body

USER = {"role": "user", "content": "1+2"}
INVALID = "invalid_request_error"


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(tmp_path / "run")


def refused(answer: Answer, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
    """Check a whole refusal: status, OpenAI's fields, the words."""
    assert answer.status == status
    assert set(answer.json) == {"error"}
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert message in answer.error["message"]
    assert (answer.error["param"], answer.error["code"]) == (param, code)
    assert answer.headers["content-type"] == "application/json"


# ------------------------------------------------------------------------------------------------------- who may ask


@pytest.mark.parametrize("given", ["", "Bearer elk-wrong", "Bearer ", "Basic {key}", "{key}", "Bearer {key}x"])
def test_without_a_good_key_everything_but_health_is_401(endpoint: Endpoint, given: str) -> None:
    for path, body in (
        ("/v1/chat/completions", chat_body()),
        ("/v1/models", None),
        ("/metrics", None),
        ("/docs", None),
        ("/v1/nowhere", None),
    ):
        answer = endpoint.ask(path, body, headers={"authorization": given.format(key=endpoint.key)})
        wanted = "got no key" if not given else "got a key that is not known here"
        refused(answer, 401, wanted, code="invalid_api_key")
        assert answer.error["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert endpoint.backend.asked == []
    assert endpoint.ask("/health", headers={"authorization": ""}).json == {"status": "ok"}


def test_a_revoked_key_is_refused(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "run")
    assert endpoint.ask("/v1/models").status == 200
    revoke_key(tmp_path / "run", endpoint.key_id)
    time.sleep(1.1)  # how long the file may go unread
    refused(endpoint.ask("/v1/models"), 401, "not known", code="invalid_api_key")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/v1",
        "/v1/",
        "/v1/embeddings",
        "/invocations",
        "/tokenize",
        "/v1/chat/completions/",
        "/v1/../metrics/x",
        "//v1/models",
    ],
)
def test_paths_that_are_not_listed_are_404(endpoint: Endpoint, path: str) -> None:
    refused(endpoint.ask(path), 404, "path: got one that is not served, wanted one of /v1/chat/completions")


def test_a_wrong_method_is_405_and_names_the_right_one(endpoint: Endpoint) -> None:
    answer = endpoint.ask("/v1/chat/completions", method="GET")
    refused(answer, 405, "method: got GET, wanted POST for this path")
    assert answer.headers["allow"] == "POST"
    refused(endpoint.ask("/v1/models", chat_body()), 405, "method: got POST, wanted GET")


# ------------------------------------------------------------------------------------------------------------ bodies


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_another_content_type_is_415(endpoint: Endpoint, content_type: str) -> None:
    answer = endpoint.ask(body=chat_body(), headers={"content-type": content_type})
    refused(answer, 415, f"content-type: got {content_type or 'none'}, wanted application/json")


def test_a_packed_body_is_415(endpoint: Endpoint) -> None:
    answer = endpoint.ask(body=chat_body(), headers={"content-encoding": "gzip"})
    refused(answer, 415, "content-encoding: got a packed body, wanted plain JSON")


def test_a_charset_beside_the_content_type_is_taken(endpoint: Endpoint) -> None:
    assert endpoint.ask(body=chat_body(), headers={"content-type": "Application/JSON; charset=utf-8"}).status == 200


def test_a_body_over_the_limit_is_413_by_what_it_says_before_it_is_read(endpoint: Endpoint) -> None:
    answer = endpoint.ask(raw=[b""], stalls=True, headers={"content-length": str((1 << 20) + 1)})
    refused(answer, 413, "body: got more than 1048576 bytes, wanted at most that", code="body_too_large")


def test_a_body_over_the_limit_is_413_in_the_middle_of_its_stream(endpoint: Endpoint) -> None:
    chunk = b" " * 65_536
    # 17 × 64 KiB are more than 1 MiB; what stalls after them is never waited for.
    answer = endpoint.ask(raw=[chunk] * 17, stalls=True)
    refused(answer, 413, "body: got more than 1048576 bytes", code="body_too_large")
    assert answer.headers["connection"] == "close"


def test_a_body_of_exactly_the_limit_is_read(endpoint: Endpoint) -> None:
    body = json.dumps(chat_body()).encode()
    assert endpoint.ask(raw=[body + b" " * ((1 << 20) - len(body))]).status == 200


def test_a_body_that_does_not_end_is_408(endpoint: Endpoint) -> None:
    answer = endpoint.ask(raw=[b'{"model"'], stalls=True)
    refused(answer, 408, "body: got 8 bytes in 0.2 s and no end", code="request_timeout")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "body: got no JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"hello", "body: got no JSON"),
        (b'{"model": "learner"', "body: got no JSON"),
        (b"[]", "body: got a list of 0, wanted a JSON object"),
        (b'"x"', 'body: got "x", wanted a JSON object'),
        (b"\xff\xfe{}", "body: got bytes that are not UTF-8 at offset 0, wanted JSON in UTF-8"),
        (b'{"temperature": NaN}', "body: got no JSON (NaN is no JSON number)"),
        (b'{"temperature": -Infinity}', "body: got no JSON (-Infinity is no JSON number)"),
        (b'{"n": ' + b"9" * 5000 + b"}", "body: got no JSON (Exceeds the limit (4300 digits)"),
        (b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "body: got JSON that is nested too deeply"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "body: got JSON that is nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_400(endpoint: Endpoint, raw: bytes, message: str) -> None:
    refused(endpoint.ask(raw=[raw]), 400, message)


# -------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("parameters", "param", "message"),
    [
        ({"messages": []}, "messages", "messages: got a list of 0, wanted 1 to 1024 messages"),
        ({"messages": None}, "messages", "messages: got nothing, wanted a list of messages"),
        ({"messages": "hi"}, "messages", 'messages: got "hi", wanted a list of messages'),
        ({"messages": [USER] * 1025}, "messages", "messages: got a list of 1025, wanted 1 to 1024 messages"),
        ({"messages": ["hi"]}, "messages", 'messages[0]: got "hi", wanted an object with role and content'),
        (
            {"messages": [{"role": "root", "content": "x"}]},
            "messages",
            'messages[0].role: got "root", wanted one of system, user, assistant',
        ),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages", "messages[0].role: got a list of 1"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content: got nothing, wanted text"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages", "messages[0].content: got 7, wanted text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages",
            "messages[0].content: got a list of 1, wanted text, or parts of",
        ),
        ({"messages": [{**USER, "tool_calls": []}]}, "messages", "messages[0].tool_calls: unknown key"),
        ({"messages": [USER, {"role": "assistant", "content": "3"}]}, "messages", "messages: ends with the assistant"),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            "messages",
            "messages[0].content: got a lone surrogate at character 0",
        ),
        ({"max_tokens": -1}, "max_tokens", "max_tokens: got -1, wanted 1 to 1000000"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: got 0, wanted 1 to 1000000"),
        ({"max_tokens": 10**9}, "max_tokens", "max_tokens: got 1000000000, wanted 1 to 1000000"),
        ({"max_tokens": "x"}, "max_tokens", 'max_tokens: got "x", wanted a whole number'),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: got 1.5, wanted a whole number"),
        ({"max_tokens": True}, "max_tokens", "max_tokens: got true, wanted a whole number"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens: got -1"),
        ({"temperature": -0.1}, "temperature", "temperature: got -0.1, wanted 0 to 2"),
        ({"temperature": 2.1}, "temperature", "temperature: got 2.1, wanted 0 to 2"),
        ({"temperature": "NaN"}, "temperature", 'temperature: got "NaN", wanted a number'),
        ({"top_p": 0}, "top_p", "top_p: got 0, wanted more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p", "top_p: got 1.1, wanted more than 0 and at most 1"),
        ({"presence_penalty": 3}, "presence_penalty", "presence_penalty: got 3, wanted -2 to 2"),
        ({"frequency_penalty": []}, "frequency_penalty", "frequency_penalty: got a list of 0, wanted a number"),
        ({"n": 10**6}, "n", "n: got 1000000, wanted 1 to 16"),
        ({"n": 0}, "n", "n: got 0, wanted 1 to 16"),
        ({"n": 10**400}, "n", "n: got a number of more than 30 digits, wanted 1 to 16"),
        ({"seed": 2**63}, "seed", "seed: got 9223372036854775808"),
        ({"stop": ["x"] * 1000}, "stop", "stop: got a list of 1000, wanted at most 4 texts of at most 64 characters"),
        ({"stop": ["x" * 65]}, "stop", "stop: got a list of 1, wanted at most 4 texts"),
        ({"stop": [""]}, "stop", "stop: got a list of 1, wanted text, or a list of texts, none of them empty"),
        ({"stop": 7}, "stop", "stop: got 7, wanted text"),
        ({"stream": "yes"}, "stream", 'stream: got "yes", wanted true or false'),
        ({"stream_options": {}}, "stream_options", "wanted an object, beside stream = true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options: unknown key x"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options",
            "stream_options.include_usage: got 1, wanted true or false",
        ),
        ({"logprobs": 3}, "logprobs", "logprobs: got 3, wanted true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs: got it without logprobs = true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs: got 21, wanted 0 to 20"),
        ({"temprature": 1}, "temprature", "temprature: unknown parameter, did you mean temperature?"),
        ({"tools": []}, "tools", "tools: unknown parameter, leave it out"),
        ({"prompt_embeds": "x"}, "prompt_embeds", "prompt_embeds: unknown parameter, leave it out"),
        ({"guided_grammar": "x"}, "guided_grammar", "guided_grammar: unknown parameter, leave it out"),
        ({"model": None}, "model", "model: got nothing, wanted text"),
        ({"model": 5}, "model", "model: got 5, wanted text"),
    ],
)
def test_a_wrong_parameter_is_400_and_named(
    endpoint: Endpoint, parameters: dict[str, Any], param: str, message: str
) -> None:
    answer = endpoint.chat(**parameters)
    refused(answer, 400, message, param=param)
    assert answer.error["type"] == INVALID
    assert endpoint.backend.asked == []


def test_an_infinite_number_in_digits_is_400(endpoint: Endpoint) -> None:
    raw = json.dumps(chat_body(temperature=0)).replace('"temperature": 0', '"temperature": 1e999').encode()
    refused(endpoint.ask(raw=[raw]), 400, "temperature: got Infinity, wanted 0 to 2", param="temperature")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"prompt": None}, "prompt: got nothing, wanted text"),
        ({"prompt": ""}, "prompt: got"),
        ({"prompt": [1, 2]}, "prompt: got a list of 2, wanted text, or a list of texts (token ids are not taken)"),
        ({"prompt": ["a"] * 17}, "prompt: got a list of 17, wanted 1 to 16 texts"),
        ({"prompt": ["a"] * 9, "n": 2}, "n: got 9 prompts × 2, wanted at most 16 choices"),
        ({"prompt": "a", "echo": True}, "echo: unknown parameter, leave it out"),
        ({"prompt": "a", "logprobs": True}, "logprobs: got true, wanted a whole number"),
    ],
)
def test_a_wrong_completion_request_is_400(endpoint: Endpoint, parameters: dict[str, Any], message: str) -> None:
    answer = endpoint.ask("/v1/completions", {"model": "learner", **parameters})
    assert answer.status == 400
    assert message in answer.error["message"]


DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(9):
    DEEP = {"type": "array", "items": DEEP}
WIDE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(129)}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": "(a+)+$"}, "schema has pattern, wanted only"),
        ({"$ref": "#"}, "schema has $ref, wanted only"),
        (
            {"type": "array", "items": {"type": "string"}, "maxItems": 10**6},
            "has a minItems or maxItems beyond 0 to 32",
        ),
        ({"type": "string", "maxLength": 10**9}, "has a minLength or maxLength beyond 0 to 256"),
        (DEEP, "is nested more than 8 deep"),
        (WIDE, "got more than 128 parts"),
        ({"enum": ["x" * 5000]}, "4096 characters of names"),
        ({"type": "tuple"}, 'schema has type "tuple", wanted one of object'),
        ({"properties": 5, "type": "object"}, "has properties or anyOf that are no object or list"),
        ({"type": "array", "items": 5}, "schema.items is 5, wanted an object"),
        ({"type": "object", "required": ["a"]}, "requires what is not among its properties"),
        ({}, "schema has no type"),
        ({"enum": []}, "has an empty enum"),
        (None, "response_format.json_schema.schema: got nothing, wanted an object"),
    ],
)
def test_a_grammar_that_might_not_compile_at_once_is_400(endpoint: Endpoint, schema: Any, message: str) -> None:
    begin = time.perf_counter()
    answer = endpoint.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert time.perf_counter() - begin < 1.0
    refused(answer, 400, message, param="response_format")


def test_another_response_format_is_400(endpoint: Endpoint) -> None:
    refused(
        endpoint.chat(response_format={"type": "grammar", "grammar": "x"}),
        400,
        'response_format: got "grammar", wanted a type of text, json_object or json_schema',
        param="response_format",
    )


@pytest.mark.parametrize(
    "model",
    [
        "gpt-4",
        "learner@v9",
        "learner@",
        "learner@../../etc/passwd",
        "../learner",
        "v2",
        "",
        "learner@v2@v1",
        "l" * 5000,
    ],
)
def test_an_unknown_model_is_404(endpoint: Endpoint, model: str) -> None:
    answer = endpoint.chat(model=model)
    refused(answer, 404, "wanted learner, or learner@vN of a version", param="model", code="model_not_found")
    assert len(answer.error["message"]) < 300


@pytest.mark.parametrize("name", ["gpt-4", "../learner", "learner@v9", ""])
def test_an_unknown_model_is_404_when_it_is_looked_up(endpoint: Endpoint, name: str) -> None:
    refused(endpoint.ask(f"/v1/models/{name}"), 404, "model: got", param="model", code="model_not_found")


def test_a_prompt_over_the_context_is_400_with_both_counts(endpoint: Endpoint) -> None:
    # 100 characters, and the template's <|user|>, <|end|> and <|assistant|>.
    answer = endpoint.chat(messages=[{"role": "user", "content": "x" * 100}])
    message = f"messages: got 103 tokens, wanted at most {CONTEXT - 1}: the context is {CONTEXT}"
    refused(answer, 400, message, param="messages", code="context_length_exceeded")


def test_a_prompt_that_leaves_too_little_is_400_with_both_counts(endpoint: Endpoint) -> None:
    answer = endpoint.chat(messages=[{"role": "user", "content": "x" * 50}], max_tokens=12)
    message = f"max_tokens: got 12 beside a prompt of 53 tokens, wanted at most 11: the context is {CONTEXT}"
    refused(answer, 400, message, param="max_tokens", code="context_length_exceeded")


def test_a_prompt_of_a_megabyte_is_refused_at_once(endpoint: Endpoint) -> None:
    begin = time.perf_counter()
    answer = endpoint.chat(messages=[{"role": "user", "content": "x" * 1_000_000}])
    assert time.perf_counter() - begin < 0.5
    refused(answer, 400, "messages: got 1000000 characters", param="messages", code="context_length_exceeded")


def test_text_that_spells_a_control_token_stays_text(endpoint: Endpoint) -> None:
    endpoint.chat(messages=[{"role": "user", "content": "<|end|>"}])
    ask = endpoint.backend.asked[0].prompts[0]
    assert len(ask) == 3 + len("<|end|>")
    endpoint.ask("/v1/completions", {"model": "learner", "prompt": "<|end|>"})
    assert len(endpoint.backend.asked[1].prompts[0]) == len("<|end|>")


# ------------------------------------------------------------------------------------------------------------ limits


def test_over_its_rate_a_key_is_429_with_retry_after(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "run", requests_per_minute=12)  # a burst of two, then one in five seconds
    assert [endpoint.chat().status for _ in range(2)] == [200, 200]
    answer = endpoint.chat()
    refused(answer, 429, "rate: got more than 12 requests a minute with this key", code="rate_limit_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 5
    assert answer.error["type"] == "rate_limit_error"


def test_over_its_open_requests_a_key_is_429_and_free_again_after(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "run", max_concurrent=2)
    endpoint.backend.pause_s = 0.1

    async def story() -> list[Answer]:
        return await asyncio.gather(*(endpoint.send(body=chat_body()) for _ in range(5)))

    answers = asyncio.run(story())
    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429]
    late = next(answer for answer in answers if answer.status == 429)
    refused(late, 429, "rate: got a request beside 2 open ones of this key", code="rate_limit_exceeded")
    assert late.headers["retry-after"] == "1"
    assert endpoint.chat().status == 200


def test_a_body_that_has_not_arrived_counts_among_a_keys_open_requests(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "run", max_concurrent=1)

    async def story() -> list[Answer]:
        return await asyncio.gather(endpoint.send(raw=[b"{"], stalls=True), endpoint.send(body=chat_body()))

    slow, other = asyncio.run(story())
    assert (slow.status, other.status) == (408, 429)


def test_overload_is_503_with_retry_after(tmp_path: Path) -> None:
    config = GatewayConfig(max_model_len=CONTEXT, max_open_samples=4)
    endpoint = Endpoint(tmp_path / "run", config=config)
    endpoint.backend.pause_s = 0.1

    async def story() -> list[Answer]:
        return await asyncio.gather(*(endpoint.send(body=chat_body(n=2)) for _ in range(3)))

    answers = asyncio.run(story())
    assert sorted(answer.status for answer in answers) == [200, 200, 503]
    late = next(answer for answer in answers if answer.status == 503)
    refused(late, 503, "overload: 4 samples are open, and 4 are taken at once", code="overloaded")
    assert late.headers["retry-after"] == "1"


def test_replicas_without_room_are_503_with_retry_after(endpoint: Endpoint) -> None:
    endpoint.backend.errors = [Overloaded("no room", retry_after_s=2)]
    answer = endpoint.chat()
    refused(answer, 503, "overload: no room", code="overloaded")
    assert answer.headers["retry-after"] == "2"


# ----------------------------------------------------------------------------------------------------------- answers


def test_a_chat_answer_names_the_version_of_every_token(endpoint: Endpoint) -> None:
    endpoint.backend.spans = (("v1", 0, 2), ("v2", 2, 3))
    answer = endpoint.chat(n=2, max_tokens=3)
    assert answer.status == 200
    body = answer.json
    assert body["object"] == "chat.completion"
    assert body["weight_version"] == body["system_fingerprint"] == "v2"
    assert [choice["message"] for choice in body["choices"]] == [
        {"role": "assistant", "content": "word word word "}
    ] * 2
    assert body["choices"][1]["weight_spans"] == [
        {"version": "v1", "start": 0, "end": 2},
        {"version": "v2", "start": 2, "end": 3},
    ]
    # <|user|>1+2<|end|><|assistant|>
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}


def test_a_stream_tells_its_version_with_the_last_of_each_choice(endpoint: Endpoint) -> None:
    answer = endpoint.chat(stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, *parts, usage, done = answer.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["choices"][0]["delta"]["content"] for part in parts) == "word word word "
    assert [part["choices"][0]["finish_reason"] for part in parts] == [None, None, "stop"]
    assert [part.get("weight_version") for part in parts] == [None, None, "v2"]
    assert parts[-1]["choices"][0]["weight_spans"] == [{"version": "v2", "start": 0, "end": 3}]
    assert usage["usage"] == {"prompt_tokens": 6, "completion_tokens": 3, "total_tokens": 9}
    assert usage["weight_version"] == "v2"
    assert done == "[DONE]"


def test_a_pinned_model_asks_for_its_version(endpoint: Endpoint) -> None:
    assert endpoint.chat(model="learner@v1").json["weight_version"] == "v1"
    assert [request.version for request in endpoint.backend.asked] == ["v1"]


def test_completions_continue_texts_with_logprobs(endpoint: Endpoint) -> None:
    answer = endpoint.ask(
        "/v1/completions", {"model": "learner", "prompt": ["a", "bc"], "max_tokens": 2, "logprobs": 1, "n": 2}
    )
    choices = answer.json["choices"]
    assert [choice["text"] for choice in choices] == ["word word "] * 4
    assert choices[0]["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert choices[0]["logprobs"]["top_logprobs"] == [{"word ": -0.5}, {"word ": -0.5}]
    assert answer.json["usage"]["prompt_tokens"] == 3


def test_models_lists_the_current_version_and_those_kept(endpoint: Endpoint) -> None:
    listed = endpoint.ask("/v1/models").json["data"]
    assert [model["id"] for model in listed] == ["learner", "learner@v2", "learner@v1", "learner@v0"]
    assert [model["weight_version"] for model in listed] == ["v2", "v2", "v1", "v0"]
    assert listed[2]["metrics"] == {"probe_accuracy": 0.1}
    assert endpoint.ask("/v1/models/learner@v1").json == listed[2]


def test_metrics_count_requests_by_path_and_status(endpoint: Endpoint) -> None:
    endpoint.chat()
    endpoint.chat(n=0)
    endpoint.ask("/secret")
    text = endpoint.ask("/metrics").body.decode()
    assert 'elenchus_requests_total{path="/v1/chat/completions",status="200"} 1.0' in text
    assert 'elenchus_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
    assert 'elenchus_requests_total{path="other",status="404"} 1.0' in text
    assert "elenchus_sampled_tokens_total 3.0" in text


# ------------------------------------------------------------------------------------------------------------ faults


def test_an_answer_that_a_replica_lost_is_begun_anew(endpoint: Endpoint) -> None:
    endpoint.backend.errors = [AnswerLost("died"), AnswerLost("died")]
    assert endpoint.chat().status == 200
    assert endpoint.chat(stream=True).events[-1] == "[DONE]"
    assert len(endpoint.backend.asked) == 4


def test_a_request_that_kills_every_replica_is_given_up(endpoint: Endpoint) -> None:
    endpoint.backend.errors = [AnswerLost("died")] * 5
    answer = endpoint.chat()
    refused(answer, 503, "the replica that answered was lost", code="answer_lost")
    assert answer.headers["retry-after"] == "1"
    assert len(endpoint.backend.asked) == 3


def test_a_stream_that_breaks_ends_with_an_error_event(endpoint: Endpoint) -> None:
    endpoint.backend.error_after = 2
    endpoint.backend.late_error = AnswerLost("died")
    answer = endpoint.chat(stream=True)
    assert answer.status == 200
    *parts, last = answer.events
    assert len(parts) == 3
    assert last["error"]["code"] == "answer_lost"
    assert "[DONE]" not in answer.events


def test_what_a_replica_refuses_is_400(endpoint: Endpoint) -> None:
    endpoint.backend.errors = [RequestRefused("response_format: can't be compiled")]
    refused(endpoint.chat(), 400, "response_format: can't be compiled")


def test_our_own_failure_is_500_without_its_words(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    endpoint.backend.errors = [RuntimeError("secret of the house")]
    answer = endpoint.chat()
    refused(answer, 500, "the endpoint failed; its log says how", code="internal_error")
    assert b"secret" not in answer.body
    assert "secret of the house" in caplog.text


def test_a_client_that_leaves_has_its_generation_aborted(endpoint: Endpoint) -> None:
    endpoint.backend.hangs = True
    answer = endpoint.ask(body=chat_body(), leaves_after_s=0.05)
    assert answer.body == b""
    assert endpoint.backend.num_aborted == 1
    assert endpoint.gateway._limits.num_open_samples == 0


def test_a_stream_whose_client_leaves_is_aborted(endpoint: Endpoint) -> None:
    endpoint.backend.pause_s = 0.1
    answer = endpoint.ask(body=chat_body(stream=True), leaves_after_s=0.15)
    assert b"[DONE]" not in answer.body
    assert endpoint.backend.num_aborted == 1


def test_an_answer_that_takes_too_long_is_504_and_aborted(tmp_path: Path) -> None:
    config = GatewayConfig(max_model_len=CONTEXT, answer_timeout_s=0.1)
    endpoint = Endpoint(tmp_path / "run", config=config)
    endpoint.backend.hangs = True
    refused(endpoint.chat(), 504, "the answer took more than 0.1 s", code="timeout")
    assert endpoint.backend.num_aborted == 1
