"""One event loop for all tests of a module: a group's calls belong to the loop they were first made on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Loop:
    """Runs one coroutine after the other; the fixture `loop` holds one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(call, 300))

    def close(self) -> None:
        self._loop.close()
