"""Owns the endpoint as HTTP: who may ask, what may be asked, and what every wrong request is told.

    client ─► key ─► path ─► type, size, time ─► JSON ─► parameters ─► limits ─► tokens ─► Backend ─► answer or stream

An ASGI app that denies by default: exact paths, known parameters, a key for all but /health. What answers is behind
`Backend`; nothing here knows Ray or an engine. No text of a request or an answer is logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from actors.chat import Tokenizer, encode_chat, encode_text
from serve.auth import ApiKey, KeyRing
from serve.limits import Limits, Overloaded, TooMany
from serve.openai_answers import LEARNER, Choice, Envelope, error_body, event, model_body, models_body
from serve.openai_requests import (
    BadRequest,
    Call,
    ChatCall,
    CompletionCall,
    chat_call,
    completion_call,
    cut,
    parse_json,
)
from serve.wire import AnswerLost, Catalog, Piece, RequestRefused, ServedRequest

logger = logging.getLogger(__name__)

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
METHODS = {CHAT: "POST", COMPLETIONS: "POST", MODELS: "GET", "/health": "GET", "/metrics": "GET"}
MAX_CHARS_ENCODED = 64
"""Characters per token of the context that are encoded; a longer text is over the context already, or is refused."""
INLINE_CHARS = 4096
"""Longer prompts are encoded in a thread, so that others are not kept waiting."""
MAX_DEATHS = 3
"""Replicas that may die while they answer a request, before it is taken to be what kills them."""
RETRY_PAUSE_S = 0.2
INVALID, NOT_FOUND, DENIED, RATE, SERVER = (
    "invalid_request_error",
    "not_found_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)


class Backend(Protocol):
    """What answers."""

    def answer(self, request: ServedRequest) -> AsyncGenerator[Sequence[Piece], None]:
        """Yield pieces until every choice has its last; closing the generator aborts what is left.

        Raises:
            RequestRefused: the request can't be run.
            AnswerLost: it may be asked for again.
            Overloaded: there is no room for it.
        """
        ...

    async def catalog(self) -> Catalog:
        """Return what can be asked now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What the gateway allows."""

    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 10.0
    """Longest time for a body to arrive."""
    answer_timeout_s: float = 300.0
    """Longest time for an answer, retries included."""
    max_open_samples: int = 512
    """Samples that may be open at once, of all keys; beyond it callers are told to come back."""
    max_model_len: int = 2
    """Tokens of prompt and answer together."""


class _HttpError(Exception):
    """What a request is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind=kind, param=param, code=code)
        self.headers = headers


class _Disconnected(Exception):
    """The client has gone; there is nobody to tell anything."""


class Gateway:
    """The ASGI app."""

    def __init__(self, config: GatewayConfig, *, backend: Backend, keys: KeyRing, tokenizer: Tokenizer) -> None:
        self._config = config
        self._backend = backend
        self._keys = keys
        self._tokenizer = tokenizer
        self._limits = Limits(max_open_samples=config.max_open_samples)
        self._meters = _Meters()
        self._spells_json = _spells_json(tokenizer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        reply = _Reply(send)
        path = scope["path"] if scope["path"] in METHODS else "other"
        with self._meters.timed(path, reply):
            try:
                await self._respond(scope, receive, reply)
            except _Disconnected:
                reply.status = 499  # as proxies count it; nobody reads it
            except _HttpError as error:
                await self._fail(reply, error)
            except Exception:
                logger.exception("%s failed", path)
                await self._fail(
                    reply,
                    _HttpError(500, "the endpoint failed; its log says how", kind=SERVER, code="internal_error"),
                )

    async def _respond(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        path: str = scope["path"]
        headers = {name.lower(): value for name, value in scope["headers"]}
        if path == "/health" and scope["method"] == "GET":
            await reply.json(200, {"status": "ok"})
            return
        key = self._keys.owner(headers.get(b"authorization"))
        if key is None:
            given = "a key that is not known here" if headers.get(b"authorization") else "no key"
            raise _HttpError(
                401,
                f"Authorization: got {given}, wanted `Bearer elk-…`; `elenchus key NAME` makes one",
                kind=DENIED,
                code="invalid_api_key",
                headers=(("www-authenticate", "Bearer"),),
            )
        model = path.removeprefix(f"{MODELS}/") if path.startswith(f"{MODELS}/") else None
        method = "GET" if model is not None else METHODS.get(path)
        if method is None:
            raise _HttpError(
                404, f"path: got one that is not served, wanted one of {', '.join(METHODS)}", kind=NOT_FOUND
            )
        if scope["method"] != method:
            raise _HttpError(
                405, f"method: got {cut(scope['method'])}, wanted {method} for this path", headers=(("allow", method),)
            )
        if model is not None:
            await reply.json(200, _found(model_body(await self._backend.catalog(), model), model))
        elif path == MODELS:
            await reply.json(200, models_body(await self._backend.catalog()))
        elif path == "/metrics":
            await reply.text(200, self._meters.exposition(), content_type="text/plain; version=0.0.4; charset=utf-8")
        else:
            with _rate_told(), self._limits.entered(key):
                body = await self._body(headers, receive)
                await self._generate(path, key, body, receive, reply)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Return the body, read within the time and the size that are allowed."""
        content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if content_type != b"application/json":
            got = cut(content_type.decode("latin-1")) or "none"
            raise _HttpError(415, f"content-type: got {got}, wanted application/json")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _HttpError(415, "content-encoding: got a packed body, wanted plain JSON")
        limit = self._config.max_body_bytes
        said = headers.get(b"content-length", b"")
        if said.isdigit() and len(said) < 20 and int(said) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Disconnected
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        raise _too_large(limit)
                    chunks.append(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise _HttpError(
                408,
                f"body: got {size} bytes in {self._config.body_timeout_s:g} s and no end, wanted all of it",
                code="request_timeout",
                headers=(("connection", "close"),),
            ) from None
        return b"".join(chunks)

    async def _generate(self, path: str, key: ApiKey, body: bytes, receive: Receive, reply: _Reply) -> None:
        try:
            parsed = parse_json(body)
            call: Call = chat_call(parsed) if path == CHAT else completion_call(parsed)
            version = await self._version(call.model)
            if call.sampling.json_schema is not None and not self._spells_json:
                raise BadRequest(
                    "response_format: this model's vocabulary can't spell JSON, wanted text", param="response_format"
                )
            num_prompts = len(call.prompts) if isinstance(call, CompletionCall) else 1
            with self._limits.admitted(key, num_samples=num_prompts * call.sampling.num_samples):
                request = await self._request(call, version)
                await self._watched(self._answer(call, request, reply), receive)
        except BadRequest as error:
            raise _HttpError(400, str(error), param=error.param, code=error.code) from None
        except RequestRefused as error:
            raise _HttpError(400, str(error)) from None
        except Overloaded as error:
            raise _unavailable(f"overload: {error}; come back later", code="overloaded", retry=error) from None

    async def _version(self, model: str) -> str | None:
        """Return the version that a model's name pins; None for the current one."""
        if model == LEARNER:
            return None
        body = _found(model_body(await self._backend.catalog(), model), model)
        return str(body["weight_version"])

    async def _request(self, call: Call, version: str | None) -> ServedRequest:
        num_chars = sum(map(len, _texts(call)))
        if num_chars > self._config.max_model_len * MAX_CHARS_ENCODED:
            prompts: tuple[tuple[int, ...], ...] | None = None
        elif num_chars > INLINE_CHARS:
            prompts = await asyncio.to_thread(self._encoded, call)
        else:
            prompts = self._encoded(call)
        limit, asked = self._config.max_model_len, call.sampling.max_tokens
        param = "messages" if isinstance(call, ChatCall) else "prompt"
        if prompts is None:
            raise _over_context(
                f"{param}: got {num_chars} characters, wanted a prompt of at most {limit - 1} tokens; shorten it", param
            )
        longest = max(map(len, prompts))
        if longest >= limit:
            raise _over_context(
                f"{param}: got {longest} tokens, wanted at most {limit - 1}: the context is {limit}, and an answer "
                "takes one or more; shorten it",
                param,
            )
        if asked is not None and longest + asked > limit:
            raise _over_context(
                f"max_tokens: got {asked} beside a prompt of {longest} tokens, wanted at most {limit - longest}: the "
                f"context is {limit}",
                "max_tokens",
            )
        room = limit - longest
        return ServedRequest(
            request_id=uuid.uuid4().hex,
            prompts=prompts,
            sampling=replace(call.sampling, max_tokens=room if asked is None else asked),
            version=version,
            stream=call.stream,
        )

    def _encoded(self, call: Call) -> tuple[tuple[int, ...], ...]:
        try:
            if isinstance(call, ChatCall):
                return (encode_chat(self._tokenizer, call.messages),)
            return tuple(encode_text(self._tokenizer, text) for text in _texts(call))
        except ValueError as error:
            param = "messages" if isinstance(call, ChatCall) else "prompt"
            raise BadRequest(" ".join(str(error).split())[:300], param=param) from None

    async def _watched(self, work: Any, receive: Receive) -> None:
        """Run the answer until it is done or the client goes; what has gone is aborted."""
        answering = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_disconnect(receive))
        try:
            async with asyncio.timeout(self._config.answer_timeout_s):
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise _Disconnected
            await answering
        except TimeoutError:
            raise _HttpError(
                504,
                f"the answer took more than {self._config.answer_timeout_s:g} s; ask for fewer tokens",
                kind=SERVER,
                code="timeout",
            ) from None
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)

    async def _answer(self, call: Call, request: ServedRequest, reply: _Reply) -> None:
        envelope = Envelope(
            answer_id=("chatcmpl-" if isinstance(call, ChatCall) else "cmpl-") + request.request_id,
            created=int(time.time()),
            model=call.model,
            is_chat=isinstance(call, ChatCall),
            num_prompt_tokens=sum(map(len, request.prompts)),
            wants_logprobs=call.sampling.num_top_logprobs is not None,
            include_usage=call.include_usage,
        )
        num_deaths = 0
        while True:
            try:
                choices = await self._attempt(request, envelope, reply)
                break
            except AnswerLost as error:
                num_deaths += 1
                self._meters.retries.inc()
                logger.warning("answer %s lost (%d): %s", request.request_id, num_deaths, error)
                if reply.begun or num_deaths >= MAX_DEATHS:
                    raise _unavailable("the replica that answered was lost", code="answer_lost") from None
            await asyncio.sleep(RETRY_PAUSE_S * 2 ** (num_deaths - 1))
        self._meters.tokens.inc(sum(choice.num_tokens for choice in choices))
        if not call.stream:
            await reply.json(200, envelope.answer(choices))

    async def _attempt(self, request: ServedRequest, envelope: Envelope, reply: _Reply) -> list[Choice]:
        """Return the choices of one attempt; of a stream, each part has been sent."""
        choices = [Choice() for _ in range(request.num_choices)]
        pieces = self._backend.answer(request)
        try:
            async for chunk in pieces:
                events = []
                for piece in chunk:
                    if piece.finish_reason in ("error", "abort"):
                        raise AnswerLost(f"a sample ended in {piece.finish_reason}")
                    choices[piece.index].add(piece)
                    events.append(envelope.part(piece, choices[piece.index]))
                if request.stream and events:
                    if not reply.begun:
                        await reply.begin_stream()
                        events = [*envelope.opening(len(choices)), *events]
                    await reply.part(b"".join(events))
        finally:
            await pieces.aclose()
        if not all(choice.finish_reason for choice in choices):
            raise AnswerLost("the replica ended before its answer did")
        if request.stream:
            await reply.end(b"".join(envelope.closing(choices)))
        return choices

    async def _fail(self, reply: _Reply, error: _HttpError) -> None:
        """Tell the client, as an event where its stream has begun."""
        if reply.ended:
            return
        if reply.begun:
            reply.status = error.status
            await reply.end(event(error.body))
        else:
            await reply.json(error.status, error.body, headers=error.headers)


class _Reply:
    """The response on its way."""

    def __init__(self, send: Send) -> None:
        self.status = 0
        self.begun = False
        self.ended = False
        self._send = send

    async def json(self, status: int, body: Any, *, headers: tuple[tuple[str, str], ...] = ()) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        await self._whole(status, data, content_type="application/json", headers=headers)

    async def text(self, status: int, data: bytes, *, content_type: str) -> None:
        await self._whole(status, data, content_type=content_type, headers=())

    async def begin_stream(self) -> None:
        await self._start(200, (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-store")))

    async def part(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes) -> None:
        self.ended = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _whole(
        self, status: int, data: bytes, *, content_type: str, headers: tuple[tuple[str, str], ...]
    ) -> None:
        sizes = (("content-type", content_type), ("content-length", str(len(data))))
        await self._start(status, (*sizes, *headers))
        await self.end(data)

    async def _start(self, status: int, headers: tuple[tuple[str, str], ...]) -> None:
        self.status, self.begun = status, True
        safe = (("x-content-type-options", "nosniff"),)
        raw = [(name.encode(), value.encode()) for name, value in (*headers, *safe)]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


class _Meters:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "elenchus_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram("elenchus_request_seconds", "Seconds a request took", ["path"], registry=self.registry)
        self.tokens = Counter("elenchus_sampled_tokens", "Tokens of finished answers", registry=self.registry)
        self.retries = Counter("elenchus_answer_retries", "Answers begun anew", registry=self.registry)
        self.open = Gauge("elenchus_open_requests", "Requests on their way", registry=self.registry)

    @contextmanager
    def timed(self, path: str, reply: _Reply) -> Iterator[None]:
        """Count a request."""
        begin = time.perf_counter()
        self.open.inc()
        try:
            yield
        finally:
            self.open.dec()
            self.seconds.labels(path).observe(time.perf_counter() - begin)
            # A request whose task was cancelled, by the proxy of a client that has gone, has no status.
            self.requests.labels(path, str(reply.status or 499)).inc()

    def exposition(self) -> bytes:
        """Return what Prometheus reads."""
        return generate_latest(self.registry)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _texts(call: Call) -> list[str]:
    if isinstance(call, ChatCall):
        return [message.content for message in call.messages]
    assert isinstance(call, CompletionCall), "there are two kinds of calls"
    return list(call.prompts)


def _found(body: dict[str, Any] | None, model: str) -> dict[str, Any]:
    if body is None:
        name = re.sub(r"[^\w.@+-]", "?", model[:60])
        raise _HttpError(
            404,
            f"model: got {name}, wanted {LEARNER}, or {LEARNER}@vN of a version that {MODELS} lists",
            kind=NOT_FOUND,
            param="model",
            code="model_not_found",
        )
    return body


@contextmanager
def _rate_told() -> Iterator[None]:
    """Answer a key that has used up what it may."""
    try:
        yield
    except TooMany as error:
        raise _HttpError(
            429, f"rate: {error}", kind=RATE, code="rate_limit_exceeded", headers=_retry_after(error.retry_after_s)
        ) from None


def _too_large(limit: int) -> _HttpError:
    return _HttpError(
        413,
        f"body: got more than {limit} bytes, wanted at most that",
        code="body_too_large",
        headers=(("connection", "close"),),
    )


def _over_context(message: str, param: str) -> BadRequest:
    return BadRequest(message, param=param, code="context_length_exceeded")


def _unavailable(message: str, *, code: str, retry: TooMany | None = None) -> _HttpError:
    headers = _retry_after(retry.retry_after_s if retry else 1)
    return _HttpError(503, message, kind=SERVER, code=code, headers=headers)


def _retry_after(seconds: int) -> tuple[tuple[str, str], ...]:
    return (("retry-after", str(seconds)),)


def _spells_json(tokenizer: Tokenizer) -> bool:
    """Return whether printable ASCII comes back from the vocabulary as it went in."""
    text = "".join(chr(code) for code in range(32, 127))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(tokenizer.decode(ids, skip_special_tokens=True) == text)
