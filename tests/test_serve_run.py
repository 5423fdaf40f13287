"""A run that serves itself while it trains: clients see versions change and no error."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from cluster.commits import committed_iterations
from serve.serving_commands import living_endpoint
from tests.endpoint_load import Load, load
from tests.served_run import free_port
from tests.sitting import Sitting

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_clients_see_versions_change_and_no_error_while_a_run_trains(sit: Callable[..., Sitting], home: Path) -> None:
    port, run = free_port(), home / "runs" / "served"
    flags = ("--loop.iterations", "1000", "--serve.enabled", "true", "--serve.port", str(port))
    sitting = sit("run", "tiny.toml", "--name", run.name, *flags)
    deadline = time.monotonic() + 400
    while living_endpoint(run) is None:
        assert sitting.process.poll() is None, sitting.output
        assert time.monotonic() < deadline, sitting.output
        time.sleep(0.2)
    url, key = f"http://127.0.0.1:{port}/v1", (run / "api_key").read_text().strip()

    async def story() -> Load:
        async with load(url, key, num_clients=4) as found:
            while len(found.versions) < 3:
                assert sitting.process.poll() is None, sitting.output
                assert time.monotonic() < deadline, found.versions
                await asyncio.sleep(0.2)
        return found

    found = asyncio.run(story())
    assert found.failures == []
    assert set(found.versions) <= {f"v{number}" for number in committed_iterations(run)}
    sitting.process.send_signal(signal.SIGINT)
    assert sitting.end(timeout_s=120) == 0, sitting.output
    assert f"● {url} · model learner = v" in sitting.output
    assert "stopped cleanly after iteration" in sitting.output
    assert living_endpoint(run) is None
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")
