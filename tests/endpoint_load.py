"""Owns load on an endpoint: clients that ask without pause until told to stop, and what each of them was told."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

MAX_OPEN_SAMPLES = 64
"""What an endpoint on the session's Ray takes at once."""


@dataclass(slots=True)
class Load:
    """What came of it."""

    statuses: Counter[int] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    """Weight versions of spans."""
    failures: list[str] = field(default_factory=list)
    """Whatever is no 200, and broken connections."""
    seconds: list[float] = field(default_factory=list)
    retry_after: set[str] = field(default_factory=set)

    def take(self, response: httpx.Response, seconds: float) -> None:
        self.statuses[response.status_code] += 1
        if response.status_code != 200:
            self.failures.append(f"{response.status_code} {response.text[:300]}")
            self.retry_after.add(response.headers.get("retry-after", ""))
            return
        self.seconds.append(seconds)
        for choice in response.json()["choices"]:
            spans = choice["weight_spans"]
            # Spans cover the answer without a gap.
            assert spans[0]["start"] == 0
            assert all(a["end"] == b["start"] for a, b in pairwise(spans))
            self.versions.update(span["version"] for span in spans)


@asynccontextmanager
async def load(url: str, key: str, *, num_clients: int, pause_s: float = 0.0, **parameters: Any) -> AsyncIterator[Load]:
    """Keep so many clients asking while the body runs; whoever has asked gets its answer before the end."""
    found, is_over = Load(), asyncio.Event()
    body = {"model": "learner", "messages": [{"role": "user", "content": "12+34"}], "max_tokens": 24, **parameters}
    limits = httpx.Limits(max_connections=num_clients, max_keepalive_connections=num_clients)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=120.0) as client:

        async def ask() -> None:
            while not is_over.is_set():
                begin = time.perf_counter()
                try:
                    response = await client.post("/chat/completions", json=body)
                except httpx.TransportError as error:
                    found.failures.append(repr(error))
                    continue
                found.take(response, time.perf_counter() - begin)
                if response.status_code != 200 or pause_s:
                    await asyncio.sleep(max(pause_s, 0.05))

        tasks = [asyncio.create_task(ask()) for _ in range(num_clients)]
        try:
            yield found
        finally:
            is_over.set()
            await asyncio.gather(*tasks)
