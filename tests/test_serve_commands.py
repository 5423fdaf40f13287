"""The commands around the endpoint: what they say, what they refuse, and a whole sitting of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from serve.endpoint_chat import endpoint_learner
from serve.learner_app import ServingConfig, check_address
from serve.publisher import read_state
from serve.serving_commands import Key, Promote, Rollback, Serve, key, living_endpoint, promote, rollback, serve
from tests.served_run import commit_version, free_port, make_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", num_versions=2)


def test_a_key_is_shown_once_then_listed_by_its_label_and_revoked(run: Path) -> None:
    said: list[str] = []
    assert key(Key("run", label="ann", requests_per_minute=30), run, tell=said.append) == 0
    assert said[0].startswith("elk-")
    assert key(Key("run"), run, tell=said.append) == 0
    assert "30 a minute, 64 at once" in said[1]
    assert said[1].endswith("  ann")
    assert said[0] not in said[1]
    key_id = said[1].split()[0]
    assert key(Key("run", revoke=key_id), run, tell=said.append) == 0
    assert said[2] == f"{key_id} (ann) is refused from now on"
    with pytest.raises(ValueError, match="got --label beside --revoke, wanted one of the two"):
        key(Key("run", label="x", revoke=key_id), run, tell=said.append)


def test_a_promotion_without_an_endpoint_says_how_to_begin_one(run: Path) -> None:
    said: list[str] = []
    assert promote(Promote("run", "v0"), run, tell=said.append) == 0
    assert said == ["v0 will be served: begin by `elenchus serve run`"]
    with pytest.raises(ValueError, match='got version "v9", wanted one of v0, v1'):
        promote(Promote("run", "v9"), run, tell=said.append)
    with pytest.raises(ValueError, match="no version that was served before"):
        rollback(Rollback("run"), run, tell=said.append)


def test_nothing_listens_beyond_loopback_without_a_key(run: Path) -> None:
    with pytest.raises(ValueError, match=r"host: got 0\.0\.0\.0, which others can reach, and no key, wanted one"):
        serve(Serve("run", host="0.0.0.0"), run, tell=lambda _: None)
    assert not (run / "api_key").exists()
    key(Key("run", label="ann"), run, tell=lambda _: None)
    check_address(run, ServingConfig(host="0.0.0.0", port=free_port()))


def test_a_port_that_is_in_use_is_refused_before_anything_starts(run: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port: got {port} of 127\.0\.0\.1, which can't be had"):
            serve(Serve("run", port=port), run, tell=lambda _: None)


def test_a_run_without_a_commit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    empty = make_run(tmp_path / "empty", num_versions=0)
    with pytest.raises(
        ValueError, match="got no committed policy, wanted at least v0; go on by `elenchus resume empty`"
    ):
        serve(Serve("empty"), empty, tell=lambda _: None)


def test_an_endpoint_whose_process_is_gone_is_none(run: Path) -> None:
    assert living_endpoint(run) is None
    (run / "endpoint.json").write_text('{"url": "x", "pid": 1, "process_created": 0}')
    assert living_endpoint(run) is None, "another process has its number"
    own = psutil.Process()
    (run / "endpoint.json").write_text(
        f'{{"url": "http://x/v1", "pid": {own.pid}, "process_created": {own.create_time()}}}'
    )
    found = living_endpoint(run)
    assert found is not None
    assert found.url == "http://x/v1"
    with pytest.raises(ValueError, match=rf"a second endpoint, the first is at http://x/v1 \(pid {own.pid}\)"):
        serve(Serve("run"), run, tell=lambda _: None)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sitting_serves_chats_promotes_rolls_back_and_leaves_nothing(short_tmp_path: Path) -> None:
    run = make_run(short_tmp_path / "sitting", num_versions=2)
    port = free_port()
    program = (
        "import sys, pathlib; from serve.serving_commands import Serve, serve; "
        f"sys.exit(serve(Serve('sitting', port={port}), pathlib.Path({str(run)!r}), "
        "tell=lambda line: print(line, flush=True)))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_AUTH_TOKEN_PATH": str(short_tmp_path / "sitting-token")},
    )
    try:
        deadline = time.monotonic() + 200
        while living_endpoint(run) is None:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        url, secret = f"http://127.0.0.1:{port}/v1", (run / "api_key").read_text().strip()
        assert httpx.get(f"{url}/models").status_code == 401
        listed = httpx.get(f"{url}/models", headers={"authorization": f"Bearer {secret}"}).json()
        assert listed["data"][0]["weight_version"] == "v1"
        said: list[str] = []
        commit_version(run, 2)
        while read_state(run)["current"] != "v2":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert promote(Promote("sitting", "v0"), run, tell=said.append) == 0
        assert rollback(Rollback("sitting"), run, tell=said.append) == 0
        assert promote(Promote("sitting", "newest"), run, tell=said.append) == 0
        assert said == ["learner = v0", "learner = v2", "learner = v2"]
        learner = endpoint_learner(run)
        assert learner is not None
        text = "".join(learner.answer("12+34", max_tokens=8))
        assert 0 < len(text) <= 8
        assert learner.version == "v2"
        with pytest.raises(ValueError, match="wanted at most 255"):
            list(learner.answer("1" * 300, max_tokens=8))
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == 0, printed
        lines = [line for line in printed.splitlines() if line.startswith(("●", "!", "stopped"))]
        assert lines[0] == "● serving sitting v1: starting 1 engine …"
        assert lines[1].startswith(f"● {url} · model learner = v1 · key in {run / 'api_key'} · ready in ")
        assert "● learner = v2" in lines
        assert lines[-1] == "stopped; nothing of it is left"
        assert living_endpoint(run) is None
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)
