"""The endpoint that a run has of its own: when it begins and ends, what a plan counts, what is refused."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elenchus
from serve.manifest import Target, run_manifest
from serve.run_endpoint import RunEndpoint, serving_problems
from tests.machines import TWO_CORES
from tests.served_run import commit_version, free_port, make_run
from trainers.memory_estimate import SERVE_BYTES
from trainers.plan import Plan, plan_run
from trainers.preflight import reserved
from trainers.run_config import RunConfig, load_run_config


def config_of(run: Path, *flags: str) -> RunConfig:
    where = (f"name={run.name}", f"runs_dir={run.parent}", "serve.enabled=true", f"serve.port={free_port()}")
    return load_run_config([], flags=[(key, value) for key, _, value in (f.partition("=") for f in (*where, *flags))])


def until(is_so: Callable[[], bool]) -> None:
    ends_by = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < ends_by
        time.sleep(0.02)


class Kept:
    """What takes the place of `keep_endpoint`: serves until it is told to stop, and keeps what it was told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Path, dict[str, Any]]] = []
        self.is_over = threading.Event()
        self._error = error

    def __call__(self, run_dir: Path, config: Any, **more: Any) -> None:
        self.calls.append((run_dir, {"config": config, **more}))
        if self._error is not None:
            raise self._error
        more["tell"]("● http://127.0.0.1:1/v1")
        while not more["is_stopped"]():
            time.sleep(0.01)
        self.is_over.set()


def test_a_run_serves_from_its_first_commit_to_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", num_versions=0)
    config, kept, said = config_of(run), Kept(), []
    endpoint = RunEndpoint(config, note=said.append, keep=kept)
    endpoint.start()
    time.sleep(0.2)
    assert kept.calls == []  # nothing is committed
    commit_version(run, 0)
    until(lambda: bool(said))
    assert said == ["http://127.0.0.1:1/v1"]
    ((run_dir, told),) = kept.calls
    assert run_dir == config.run_dir
    assert told["config"] == config.serve
    assert told["engine"] == config.rollouts.engine
    assert told["parity_bound"] == config.loop.parity_bound
    assert told["whole_serve"] is True
    assert not kept.is_over.is_set()
    endpoint.stop()
    assert kept.is_over.is_set()


def test_a_run_that_ends_before_its_first_commit_has_served_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", num_versions=0)
    kept = Kept()
    endpoint = RunEndpoint(config_of(run), note=lambda _: None, keep=kept)
    endpoint.start()
    endpoint.stop()
    assert kept.calls == []


def test_an_endpoint_that_fails_is_told_of_and_the_run_goes_on(tmp_path: Path) -> None:
    run, said = make_run(tmp_path / "mine"), []
    endpoint = RunEndpoint(config_of(run), note=said.append, keep=Kept(RuntimeError("no room\nmore of it")))
    endpoint.start()
    until(lambda: bool(said))
    endpoint.stop()
    assert said == ["! the endpoint failed, the run goes on: no room"]


def test_the_endpoints_replicas_are_counted_where_a_run_is_placed(tmp_path: Path) -> None:
    def planned(*flags: str) -> Plan:
        return plan_run(config_of(tmp_path / "mine", *flags), machine=TWO_CORES)

    without, served = planned("serve.enabled=false"), planned("serve.min_replicas=2")
    assert "endpoint" not in {role.role for role in without.roles}
    (endpoint,) = [role for role in served.roles if role.role == "endpoint"]
    (rollouts,) = [role for role in served.roles if role.role == "rollouts"]
    assert (endpoint.count, endpoint.cpus, endpoint.memory) == (2, rollouts.cpus, rollouts.memory)
    assert served.cpus == pytest.approx(without.cpus + 2 * 0.2)
    assert served.memory_bytes - without.memory_bytes == endpoint.memory_bytes + SERVE_BYTES
    assert served.problems == ()
    # 1.6 CPUs of the roles and five fifths more are 2.6.
    (problem,) = planned("serve.min_replicas=5").problems
    assert problem.startswith("placement: the roles reserve 2.6 CPUs (")
    assert " + 5 × 0.2 endpoint + " in problem
    assert ("endpoint", 2) in {(n.role, n.count) for n in reserved(config_of(tmp_path / "m", "serve.min_replicas=2"))}


def test_pods_have_room_for_the_endpoint_and_grow_for_it(tmp_path: Path) -> None:
    config = config_of(Path("runs/mine"), "serve.max_replicas=3", "name=mine")
    manifest = run_manifest(config, target=Target())
    # One to begin with, beside the other roles; two more and the one for pinned versions fit into one more pod.
    assert "1 replica of endpoint" in manifest
    assert "endpoint  pods: 0 to 1, each for 3 replicas of endpoint: 1 CPUs" in manifest


def test_what_stands_against_serving_is_told_before_a_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        path.write_text(f'runs_dir = "{tmp_path}/runs"\n[serve]\nenabled = true\nport = {port}\n')
        assert elenchus.main(["run", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"✗ {path}:4: serve.port: got {port} of 127.0.0.1, which can't be had (Address already in use), wanted a "
            "free one: choose another by serve.port"
        )
        assert not (tmp_path / "runs").exists()
        # A run that does not serve does not ask for the port.
        assert list(serving_problems(config_of(tmp_path / "x", f"serve.port={port}", "serve.enabled=false"))) == []
    (line,) = serving_problems(config_of(tmp_path / "x", "serve.host=0.0.0.0"))
    assert line == (
        "serve.host: got 0.0.0.0, which others can reach, wanted 127.0.0.1: a new run has no key yet; once it goes on, "
        "`elenchus key x --label WHO`, then `elenchus serve x --host 0.0.0.0`"
    )
