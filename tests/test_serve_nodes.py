"""The endpoint on two nodes, deployed as a RayService does: a killed proxy costs a client that retries nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.served_run import free_port, make_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parent.parent


def test_a_killed_proxy_of_two_costs_clients_that_retry_nothing(short_tmp_path: Path) -> None:
    run = make_run(short_tmp_path / "proxies")
    ports = [free_port(), free_port()]
    token = short_tmp_path / "proxies-token"
    token.write_text("p" * 64)
    token.chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
        # Two nodes of one machine share its addresses.
        "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(ports[1]),
        "PYTHONPATH": str(ROOT),
    }
    # The head, which always has a proxy, and a node that has one because the engine is there.
    cluster = subprocess.Popen(
        [sys.executable, "-m", "tests.raylets", '{"engine": 2}'],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        address = next(line.split()[1] for line in cluster.stdout if line.startswith("ready "))
        told = subprocess.run(
            [sys.executable, "-m", "tests.two_proxies", address, str(run), str(ports[0]), str(ports[1])],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=200,
        )
        assert told.returncode == 0, told.stderr[-3000:]
    finally:
        cluster.stdin.close()
        cluster.wait(timeout=60)
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["proxies"] == 2
    assert found["failures"] == []
    assert found["answers"] > 20
    assert found["closed_for_s"] > 0, "the kill closed no port"
