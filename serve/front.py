"""Owns what stands in Ray Serve's proxies before anything of Serve: a time limit for headers, and a door for overload.

    client ─► uvicorn (headers in time, or 408) ─► Door (as many as are taken, or 503) ─► Serve's proxy ─► gateway

What the gateway refuses has been through two processes and Serve's router; refused here it costs a tenth of that, so
that those who are turned away do not take the time of those who are answered. Limits are a proxy's own.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from starlette.middleware import Middleware
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.limits import Returns
from serve.openai_answers import error_body
from trainers.serving_config import ServingConfig

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Ray Serve's variable for what a proxy calls before it listens."""
MAX_OPEN, HEADERS_S = "ELENCHUS_PROXY_MAX_OPEN", "ELENCHUS_PROXY_HEADERS_S"


def front_environment(config: ServingConfig) -> dict[str, str]:
    """Return the variables that the nodes' Ray must have when it starts, for its proxies to be as the config says."""
    return {
        CALLBACK: f"{__name__}.middlewares",
        MAX_OPEN: str(config.max_open_samples),
        HEADERS_S: str(config.headers_timeout_s),
    }


def middlewares() -> list[Middleware]:
    """Return what Serve is to wrap a proxy in; a proxy calls it before it listens."""
    from ray.util.metrics import Counter

    # Serve's proxy takes uvicorn's "auto", and has no setting for it (Ray 2.60).
    HTTP_PROTOCOLS["auto"] = f"{__name__}:TimedProtocol"
    refused = Counter("elenchus_refused_at_the_door", description="Requests refused for overload by a proxy")
    return [Middleware(Door, max_open=int(os.environ[MAX_OPEN]), on_refused=refused.inc)]


class Door:
    """Lets so many requests for answers in at once and tells all others when to come back; everything else passes."""

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        max_open: int,
        on_refused: Callable[[], object] = lambda: None,
    ) -> None:
        self._app = app
        self._max_open = max_open
        self._num_open = 0
        self._on_refused = on_refused
        self._returns = Returns()
        message = f"overload: {max_open} requests are open, as many as are taken at once; come back later"
        self._body = json.dumps(error_body(message, kind="server_error", code="overloaded")).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._num_open >= self._max_open:
            self._on_refused()
            await _refuse(send, self._body, retry_after_s=self._returns.retry_after_s())
            return
        self._num_open += 1
        is_inside = True

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal is_inside
            # Before the client has the end of its answer, and may come with the next request.
            if message["type"] == "http.response.body" and not message.get("more_body", False) and is_inside:
                is_inside = False
                self._leave()
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            if is_inside:
                self._leave()

    def _leave(self) -> None:
        self._num_open -= 1
        self._returns.note_end()


async def _refuse(send: Send, body: bytes, *, retry_after_s: int) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(retry_after_s).encode()),
        (b"x-content-type-options", b"nosniff"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class TimedProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP, whose headers must have arrived so many seconds after the connection, or a request, began."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._limit_s = float(os.environ[HEADERS_S])
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        """Take what arrives; what begins no request, such as an empty line, ends uvicorn's own clock all the same."""
        super().data_received(data)
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._begin()

    def on_message_begin(self) -> None:
        """Begin to wait for a request's headers."""
        super().on_message_begin()
        self._begin()

    def on_headers_complete(self) -> None:
        """Wait no more: bodies have a limit of their own."""
        self._end()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._end()
        super().connection_lost(exc)

    def _begin(self) -> None:
        # A connection's first request has begun with the connection: what it sends does not begin the time anew.
        if self._limit is None:
            self._limit = self.loop.call_later(self._limit_s, self._give_up)

    def _end(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _give_up(self) -> None:
        if self.transport.is_closing():
            return
        message = f"headers: got no end of them in {self._limit_s:g} s, wanted all of them"
        body = json.dumps(error_body(message, kind="invalid_request_error", code="request_timeout")).encode()
        head = (
            "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
