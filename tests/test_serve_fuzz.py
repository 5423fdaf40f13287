"""Requests that nobody wrote by hand: none of them is our failure, and none takes long."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from serve.gateway import GatewayConfig
from tests.fake_endpoint import CONTEXT, Answer, Endpoint, chat_body

AT_ONCE = 5
LONGEST_S = 2.0
KNOWN = [
    *(
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
    ),
    *("stream", "stream_options", "logprobs", "top_logprobs", "response_format", "presence_penalty", "user", "tools"),
]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.sampled_from([10**400, -1, 0, 1, 2, 16, 17, 2**63])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=20)
    | st.sampled_from(["learner", "learner@v1", "../x", "user", "assistant", "json_schema", "object", "\ud800", "\x00"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [*KNOWN, "role", "content", "type", "text", "json_schema", "schema", "properties", "items", "anyOf"]
            )
            | st.text(max_size=8),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
schemas = st.recursive(
    st.fixed_dictionaries({"type": st.sampled_from(["string", "integer", "null", "array", "x"])}) | values,
    lambda inner: st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(st.text(max_size=4), inner, max_size=3)}
    ),
    max_leaves=6,
)
bodies = st.one_of(
    st.dictionaries(st.sampled_from(KNOWN), values, max_size=4).map(lambda wrong: chat_body(**wrong)),
    schemas.map(
        lambda schema: chat_body(
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        )
    ),
    st.lists(st.fixed_dictionaries({"role": scalars, "content": values}), max_size=4).map(
        lambda messages: chat_body(messages=messages)
    ),
    values,
)
raws = st.one_of(
    bodies.map(lambda body: json.dumps(body).encode()),
    st.binary(max_size=200),
    st.builds(lambda body, cut: json.dumps(body).encode()[:cut], bodies, st.integers(0, 200)),
    st.integers(1, 20_000).map(lambda depth: b'{"messages":' + b"[" * depth + b"]" * depth + b"}"),
)
requests = st.fixed_dictionaries(
    {
        "path": st.sampled_from(["/v1/chat/completions"] * 6 + ["/v1/completions"] * 3 + ["/v1/models", "/health"])
        | st.text(max_size=20).map(lambda text: "/" + text),
        "raw": raws.map(lambda raw: [raw]) | st.lists(st.binary(max_size=50), max_size=3),
        "method": st.sampled_from(["POST"] * 8 + ["GET", "PUT", "OPTIONS"]),
        "headers": st.just({})
        | st.dictionaries(
            st.sampled_from(["content-type", "authorization", "content-length", "content-encoding", "x"]),
            st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=30),
            max_size=2,
        ),
    }
)


async def _timed(endpoint: Endpoint, request: dict[str, Any]) -> tuple[Answer, float]:
    begin = time.perf_counter()
    answer = await endpoint.send(**request)
    return answer, time.perf_counter() - begin


def fuzz(endpoint: Endpoint, *, num_requests: int) -> dict[int, int]:
    """Send random requests and return how many got which status; fail at the first that is our fault."""
    statuses: dict[int, int] = {}

    @settings(
        max_examples=num_requests // AT_ONCE,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # making a failure smaller takes minutes
    )
    @given(st.lists(requests, min_size=AT_ONCE, max_size=AT_ONCE))
    def send(batch: list[dict[str, Any]]) -> None:
        async def together() -> list[tuple[Answer, float]]:
            return [await _timed(endpoint, request) for request in batch]

        for request, (answer, seconds) in zip(batch, asyncio.run(together()), strict=True):
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            assert 200 <= answer.status < 500, (request, answer.body)
            assert seconds < LONGEST_S, (request, seconds)
            if answer.status >= 400:
                assert set(answer.error) == {"message", "type", "param", "code"}, request
                assert len(answer.error["message"]) < 600, request
                assert answer.error["message"].isprintable(), request

    send()
    return statuses


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    config = GatewayConfig(max_model_len=CONTEXT, body_timeout_s=0.2)
    return Endpoint(tmp_path / "run", config=config, requests_per_minute=10**9)


def test_random_requests_are_answered_or_refused(endpoint: Endpoint) -> None:
    statuses = fuzz(endpoint, num_requests=600)
    assert {400, 404} <= set(statuses), statuses


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_thousand_random_requests_are_answered_or_refused(endpoint: Endpoint) -> None:
    statuses = fuzz(endpoint, num_requests=20_000)
    assert {200, 400, 401, 404, 405, 415} <= set(statuses), statuses
    assert sum(statuses.values()) >= 20_000
