"""What stands in a proxy before Ray Serve: the time limit for headers over real sockets, and the door for overload."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from serve.front import HEADERS_S, Door, TimedProtocol, front_environment, middlewares
from trainers.serving_config import ServingConfig

LIMIT_S = 0.4


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    body = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A uvicorn with our protocol."""
    monkeypatch.setenv(HEADERS_S, str(LIMIT_S))
    config = uvicorn.Config(echo, port=0, http=TimedProtocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def told(connection: socket.socket) -> bytes:
    """Return all that a server says until it closes."""
    connection.settimeout(5)
    said = b""
    while chunk := connection.recv(65_536):
        said += chunk
    return said


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat", b"POST / HTTP/1.1\r\nhost: x\r\nx-slow: "])
def test_headers_that_do_not_end_are_408_and_the_connection_is_closed(port: int, begun: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        begin = time.monotonic()
        connection.sendall(begun)
        head, _, body = told(connection).partition(b"\r\n\r\n")
    assert LIMIT_S <= time.monotonic() - begin < LIMIT_S + 1
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"] == {
        "message": "headers: got no end of them in 0.4 s, wanted all of them",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_timeout",
    }


def test_drops_of_headers_do_not_begin_the_time_anew(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        begin = time.monotonic()
        connection.sendall(b"GET / HTTP/1.1\r\n")
        connection.settimeout(LIMIT_S / 4)
        said = b""
        while not said:
            connection.sendall(b"x: y\r\n")
            with contextlib.suppress(TimeoutError):
                said = connection.recv(65_536)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - begin < 2 * LIMIT_S


def test_a_connection_that_goes_on_has_the_time_for_each_request(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(3):
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            said = b""
            while not said.endswith(b"\r\n\r\n0"):
                said += connection.recv(65_536)
            time.sleep(LIMIT_S * 0.75)  # idle: uvicorn's own limit is for that
        connection.sendall(b"GET / HT")
        assert told(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_bytes_that_begin_no_request_do_not_keep_a_connection(port: int, begun: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(begun)
        time.sleep(LIMIT_S / 2)
        connection.sendall(b"\r\n")
        assert b"HTTP/1.1 408 " in told(connection)


def test_a_body_may_take_longer_than_headers(port: int) -> None:
    def slow() -> Iterator[bytes]:
        yield b"a"
        time.sleep(2 * LIMIT_S)
        yield b"b"

    assert httpx.post(f"http://127.0.0.1:{port}/", content=slow()).text == "2"


# -------------------------------------------------------------------------------------------------------------- door


class House:
    """What is behind the door: keeps everybody until it is told to let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.inside = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.inside += 1
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def knock(door: Door, *, method: str = "POST") -> dict[str, Any]:
    """Return the first and the last message that are sent, as one."""
    found: dict[str, Any] = {}

    async def send(message: Any) -> None:
        found.update(message)

    async def receive() -> Any:
        raise AssertionError("who is refused is not read")

    await door({"type": "http", "method": method}, receive, send)
    return found


def test_beyond_what_is_taken_at_once_requests_are_503_and_come_back_one_after_another() -> None:
    async def story() -> None:
        house, refused = House(), []
        door = Door(house, max_open=2, on_refused=lambda: refused.append(1))
        inside = [asyncio.create_task(knock(door)) for _ in range(2)]
        await asyncio.sleep(0)
        late = [await knock(door) for _ in range(40)]
        assert {one["status"] for one in late} == {503}
        error = json.loads(late[0]["body"])["error"]
        assert error["code"] == "overloaded"
        assert error["message"] == ("overload: 2 requests are open, as many as are taken at once; come back later")
        waits = [int(dict(one["headers"])[b"retry-after"]) for one in late]
        # 5 a second, from half a second on: the fortieth after 0.5 + 39 / 5 = 8.3 s.
        assert (waits[0], waits[-1]) == (1, 9)
        assert len(refused) == 40
        # Who asks for no answer is not counted, and not kept out.
        looking = asyncio.create_task(knock(door, method="GET"))
        await asyncio.sleep(0)
        assert house.inside == 3
        house.go.set()
        assert [one["status"] for one in await asyncio.gather(*inside, looking)] == [200] * 3
        assert (await knock(door))["status"] == 200

    asyncio.run(story())


def test_a_place_is_free_again_after_a_request_that_failed() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ConnectionResetError

    async def story() -> None:
        door = Door(broken, max_open=1)
        for _ in range(3):
            with pytest.raises(ConnectionResetError):
                await knock(door)

    asyncio.run(story())


def test_a_client_that_has_its_whole_answer_finds_the_door_open_at_once() -> None:
    async def lingering(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
        await asyncio.sleep(0.05)

    async def story() -> None:
        door, answered = Door(lingering, max_open=1), []

        async def ask_again(message: Any) -> None:
            if message["type"] != "http.response.body" or answered:
                return
            if message.get("more_body"):
                assert (await knock(door))["status"] == 503
            else:
                answered.append((await knock(door))["status"])

        async def receive() -> Any: ...

        await door({"type": "http", "method": "POST"}, receive, ask_again)
        assert answered == [200]
        assert (await knock(door))["status"] == 200

    asyncio.run(story())


def test_a_proxy_is_told_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util.metrics
    from uvicorn.config import HTTP_PROTOCOLS

    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", "x")
    monkeypatch.setattr(ray.util.metrics, "Counter", lambda name, description: _Counter())
    for name, value in front_environment(ServingConfig(max_open_samples=7, headers_timeout_s=3.0)).items():
        monkeypatch.setenv(name, value)
    (door,) = middlewares()
    assert door.kwargs["max_open"] == 7
    loaded = uvicorn.Config(echo, log_config=None)
    loaded.load()
    assert loaded.http_protocol_class is TimedProtocol


class _Counter:
    def inc(self) -> None: ...
