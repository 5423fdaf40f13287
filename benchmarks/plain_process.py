"""Owns a Python process without Ray: the plain side of a benchmark, at the niceness and in the environment of ours.

    process = PlainProcess(environment={"OMP_NUM_THREADS": "1"}, niceness=15)
    await process.start(open_engine, config)          # the process keeps what the function returns …
    seconds = await process.call(generate, prompts)   # … and gives it to this one first

Functions travel by name, so they stand in importable modules; the process imports them in its own environment.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import ray

from benchmarks.cold_demo import ROOT

END_S = 10.0
"""How long a process may take to end."""


class PlainProcess:
    """One process that answers one call at a time."""

    def __init__(self, *, environment: Mapping[str, str], niceness: int, python: Path | None = None) -> None:
        """Start the process; `python` is another environment's, which sees this one's packages."""
        here, there = Pipe()
        self._connection = here
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            [str(python or sys.executable), "-m", __name__, str(there.fileno()), str(niceness)],
            cwd=ROOT,
            env={**os.environ, **environment},
            pass_fds=(there.fileno(),),
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        there.close()

    async def start(self, make: Callable[..., Any], *arguments: Any) -> None:
        """Have the process make what its calls work on.

        Raises:
            RuntimeError: it failed; says how.
        """
        await self._ask(make, arguments)

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function gives for what the process holds and these arguments.

        Raises:
            RuntimeError: it failed; says how.
        """
        return await self._ask(function, arguments)

    def close(self) -> None:
        """End the process; a second call does nothing."""
        if self._output.closed:
            return
        self._connection.close()
        try:
            self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    async def _ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        self._connection.send((function, arguments))
        try:
            failure, answer = await asyncio.to_thread(self._connection.recv)
        except EOFError:
            self._process.wait()
            self._output.seek(0)
            said = self._output.read()[-2000:]
            raise RuntimeError(f"the plain process ended with {self._process.returncode}; it said:\n{said}") from None
        if failure is not None:
            raise RuntimeError(f"the plain process failed:\n{failure}")
        return answer


def worker_niceness() -> int:
    """Return the niceness that Ray gives to its workers, so that a plain process can have the same."""
    found: int = ray.get(ray.remote(_own_niceness).options(num_cpus=0.01).remote())
    return found


def _own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def serve(connection: Connection) -> None:
    """Answer calls until the other end is closed."""
    held: list[Any] = []
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = function(*held, *arguments)
        except Exception:  # noqa: BLE001 - it is the caller's
            connection.send((traceback.format_exc(), None))
            continue
        if held:
            connection.send((None, result))
        else:
            held.append(result)
            connection.send((None, None))


def main() -> None:
    """Take the niceness before anything has a thread, then serve."""
    descriptor, niceness = map(int, sys.argv[1:])
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    sys.path.insert(0, str(Path.cwd()))
    serve(Connection(descriptor))


if __name__ == "__main__":
    main()
