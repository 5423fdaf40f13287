"""Owns an endpoint whose proxies are on two nodes, in a process of its own, and clients that ask while one is killed.

    python -m tests.two_proxies ADDRESS RUN PORT OTHER_PORT      prints what became of it as one line of JSON

Clients know one address, as behind a Kubernetes service: a balancer hands each connection to the next proxy, alive or
not. It is the openai client's own retries that find the other one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import ray
from ray import serve as ray_serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from cluster.ray_runtime import RayConfig, start_ray
from serve.auth import add_key
from serve.manifest import serve_config
from trainers.run_config import read_resolved

NUM_CLIENTS = 4
BEFORE_S, AFTER_S = 2.0, 8.0
DEPLOY_TIMEOUT_S = 150.0


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def balanced(ports: list[int]) -> AsyncIterator[int]:
    """Give a port whose connections go to the others in turn; where nobody answers the connection is closed."""
    turns = itertools.cycle(ports)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind, before = await asyncio.open_connection("127.0.0.1", next(turns))
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pipe(reader, before), _pipe(behind, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def story(key: str, ports: list[int]) -> dict[str, Any]:
    """Ask without pause while one proxy after the other is killed, and return what came of it."""
    found: dict[str, Any] = {"answers": 0, "failures": [], "outages": []}
    is_over = asyncio.Event()
    async with balanced(ports) as port:

        async def ask() -> None:
            # Connections do not stay: a client's next request is the balancer's to place.
            transport = httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0))
            async with openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=5, http_client=transport
            ) as client:
                while not is_over.is_set():
                    try:
                        await client.chat.completions.create(
                            model="learner", messages=[{"role": "user", "content": "12+34"}], max_tokens=16
                        )
                        found["answers"] += 1
                    except openai.OpenAIError as error:
                        found["failures"].append(repr(error))

        clients = [asyncio.create_task(ask()) for _ in range(NUM_CLIENTS)]
        await asyncio.sleep(BEFORE_S)
        names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
        proxies = [name for name in names if "SERVE_PROXY_ACTOR" in name]
        found["proxies"] = len(proxies)
        ray.kill(ray.get_actor(proxies[0], namespace="serve"), no_restart=False)
        begin, closed = time.monotonic(), 0.0
        while time.monotonic() - begin < AFTER_S:
            for each in ports:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", each)
                    writer.close()
                except OSError:
                    closed = time.monotonic() - begin
            await asyncio.sleep(0.05)
        found["closed_for_s"] = closed
        is_over.set()
        await asyncio.gather(*clients)
    return found


def deploy(run: Path, *, port: int) -> None:
    """Deploy the endpoint as a RayService does: by Ray Serve's own config, built on the cluster; on loopback here."""
    config = serve_config(read_resolved(run / "resolved.json"))
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] = {"run_dir": str(run)}
    ray_serve.start(proxy_location=config["proxy_location"], http_options=config["http_options"])
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
    name, deadline = config["applications"][0]["name"], time.monotonic() + DEPLOY_TIMEOUT_S
    while (app := ray_serve.status().applications.get(name)) is None or app.status != "RUNNING":
        if time.monotonic() > deadline or (app is not None and app.status == "DEPLOY_FAILED"):
            raise RuntimeError(f"the application is not there: {app}")
        time.sleep(0.2)


def main() -> None:
    """Serve, ask, kill, and print."""
    address, run, *ports = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    runtime = start_ray(RayConfig(address=address, namespace="two-proxies"))
    try:
        _, key = add_key(run, label="test", requests_per_minute=10**9, max_concurrent=10**6)
        deploy(run, port=ports[0])
        try:
            found = asyncio.run(story(key, ports))
        finally:
            ray_serve.shutdown()
    finally:
        runtime.stop()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
