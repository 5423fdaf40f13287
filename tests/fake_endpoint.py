"""Owns what surrounds the gateway in its tests: a backend in place of replicas, a client of the bare ASGI app."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.auth import KeyRing, add_key
from serve.gateway import Gateway, GatewayConfig
from serve.wire import Catalog, Piece, ServedRequest, ServedVersion, TokenLogprob
from tests.tiny_models import char_tokenizer

CONTEXT = 64
CATALOG = Catalog(
    current="v2",
    versions=tuple(
        ServedVersion(version=f"v{i}", created=1_700_000_000.0 + i, metrics={"probe_accuracy": i / 10})
        for i in range(3)
    ),
)


class FakeBackend:
    """Answers "word word …", one token a word; fails, waits or hangs as it is told."""

    def __init__(self) -> None:
        self.asked: list[ServedRequest] = []
        self.errors: list[Exception] = []
        """One for each attempt, first to last, before any piece; then none."""
        self.error_after: int | None = None
        """Raise `late_error` after so many pieces, every time."""
        self.late_error: Exception = RuntimeError("broken")
        self.pause_s = 0.0
        self.hangs = False
        self.num_aborted = 0
        self.words = 3
        self.spans: tuple[tuple[str, int, int], ...] | None = None

    async def answer(self, request: ServedRequest) -> AsyncGenerator[Sequence[Piece], None]:
        self.asked.append(request)
        if self.errors:
            raise self.errors.pop(0)
        done = False
        try:
            if self.hangs:
                await asyncio.Event().wait()
            pieces = [list(self._pieces(request, index)) for index in range(request.num_choices)]
            for number, step in enumerate(zip(*pieces, strict=True)):
                await asyncio.sleep(self.pause_s)
                if self.error_after == number:
                    raise self.late_error
                yield list(step)
            done = True
        finally:
            self.num_aborted += not done

    async def catalog(self) -> Catalog:
        return CATALOG

    def _pieces(self, request: ServedRequest, index: int) -> Iterable[Piece]:
        words = min(self.words, request.sampling.max_tokens or self.words)
        spans = self.spans or ((request.version or CATALOG.current, 0, words),)
        top = request.sampling.num_top_logprobs
        logprobs = () if top is None else (TokenLogprob(token="word ", logprob=-0.5, top=(("word ", -0.5),) * top),)
        if not request.stream:
            yield Piece(
                index=index,
                text="word " * words,
                num_tokens=words,
                logprobs=logprobs * words,
                finish_reason="stop",
                weight_spans=spans,
            )
            return
        for number in range(words):
            last = number == words - 1
            yield Piece(
                index=index,
                text="word ",
                num_tokens=1,
                logprobs=logprobs,
                finish_reason="stop" if last else None,
                weight_spans=spans if last else (),
            )


@dataclass(slots=True)
class Answer:
    """What the app sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])

    @property
    def events(self) -> list[Any]:
        """The stream's events; the last of a good one is "[DONE]"."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Endpoint:
    """The gateway over a fake backend, with one key."""

    def __init__(self, run_dir: Path, *, config: GatewayConfig | None = None, **limits: int) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.key_id, self.key = add_key(run_dir, label="test", **limits)
        self.backend = FakeBackend()
        self.gateway = Gateway(
            config or GatewayConfig(max_model_len=CONTEXT, body_timeout_s=0.2, answer_timeout_s=5.0),
            backend=self.backend,
            keys=KeyRing(run_dir),
            tokenizer=char_tokenizer(),
        )

    async def send(
        self,
        path: str = "/v1/chat/completions",
        body: Any = None,
        *,
        method: str | None = None,
        raw: Sequence[bytes] | None = None,
        headers: dict[str, str] | None = None,
        leaves_after_s: float | None = None,
        stalls: bool = False,
    ) -> Answer:
        """Send a request as a server would hand it over; `stalls` never ends its body."""
        chunks = list(raw) if raw is not None else [] if body is None else [json.dumps(body).encode()]
        sent = {
            "authorization": f"Bearer {self.key}",
            **({"content-type": "application/json"} if chunks or stalls else {}),
            **(headers or {}),
        }
        scope = {
            "type": "http",
            "method": method or ("POST" if chunks or stalls else "GET"),
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in sent.items() if value],
        }
        answer = Answer()

        async def receive() -> dict[str, Any]:
            if chunks:
                return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks) or stalls}
            if leaves_after_s is None:
                await asyncio.Event().wait()
            await asyncio.sleep(leaves_after_s or 0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message.get("body", b"")

        await self.gateway(scope, receive, send)
        return answer

    def ask(self, path: str = "/v1/chat/completions", body: Any = None, **more: Any) -> Answer:
        """Send a request in a loop of its own."""
        return asyncio.run(self.send(path, body, **more))

    def chat(self, **parameters: Any) -> Answer:
        """Ask for a chat completion."""
        return self.ask(body=chat_body(**parameters))


def chat_body(**parameters: Any) -> dict[str, Any]:
    """Return a good chat request with other parameters."""
    return {"model": "learner", "messages": [{"role": "user", "content": "1+2"}], **parameters}
