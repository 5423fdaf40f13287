"""Runs on a Ray cluster of several raylets with a token, by the command line: submitted, scaled, stopped, resumed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

import elenchus
from actors.records import Critique, Query, Response, Verdict, from_table
from cluster.commits import committed_iterations, last_commit
from cluster.jobs import Job, Jobs, token_headers
from cluster.lease import holder
from cluster.room import NODE_GROUP
from cluster.scaling import read_pools
from cluster.store import read_stage
from serve.watch import states
from tests.sitting import CONFIG, NUM_QUERIES, NUM_SAMPLES, REPOSITORY, finished
from trainers.live import MARK
from trainers.summary import IterationMetrics, read_metrics, read_summary

TOKEN = "a-token-of-some-length" * 2
TEST_MARK = "ELENCHUS_CLUSTER_TEST"
"""An environment variable that every process of a cluster inherits, those of its jobs included."""
STORE_BYTES = 200 << 20


def free_ports(num: int) -> list[int]:
    listeners = [socket.socket() for _ in range(num)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


class RayCluster:
    """A head and workers by `ray start`, each with a loopback address of its own, with a token."""

    def __init__(self, place: Path) -> None:
        self._place = place
        place.mkdir()
        self.token_path = place / "token"
        self.token_path.write_text(TOKEN)
        self.token_path.chmod(0o600)
        self._mark = f"{time.time_ns()}"
        self._started: list[subprocess.Popen[bytes]] = []
        self._port, self._dashboard_port = free_ports(2)
        self.address = f"127.0.0.1:{self._port}"
        self.dashboard = f"http://127.0.0.1:{self._dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What the cluster's processes see: nothing of Ray's but the token."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return others | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            TEST_MARK: self._mark,
        }

    def start_head(self, *, num_cpus: float, labels: dict[str, str] | None = None) -> None:
        """Start the head and wait until its dashboard takes jobs."""
        (client_port,) = free_ports(1)
        flags = {
            "--port": self._port,
            "--dashboard-host": "127.0.0.1",
            "--dashboard-port": self._dashboard_port,
            "--ray-client-server-port": client_port,
            "--temp-dir": self._place / "ray",
        }
        output = self._start("--head", host="127.0.0.1", num_cpus=num_cpus, flags=flags, labels=labels)
        deadline = time.monotonic() + 120
        while not self._takes_jobs():
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.5)

    def _takes_jobs(self) -> bool:
        try:
            Jobs.at(self.dashboard, token_path=self.token_path)
        except ValueError:
            return False
        return True

    def start_worker(self, number: int, *, num_cpus: float, labels: dict[str, str] | None = None) -> None:
        """Start another raylet; does not wait for it."""
        # Raylets of one temporary directory unpack a job's packages over one another.
        flags = {"--temp-dir": self._place / f"w{number}"}
        self._start(
            f"--address={self.address}", host=f"127.0.0.{number + 1}", num_cpus=num_cpus, flags=flags, labels=labels
        )

    def await_nodes(self, num: int) -> None:
        """Wait until so many raylets are there."""
        deadline = time.monotonic() + 120
        headers = token_headers(self.token_path)
        while True:
            asked = requests.get(f"{self.dashboard}/nodes?view=summary", headers=headers, timeout=10)
            alive = [node["raylet"].get("state") for node in asked.json()["data"]["summary"]].count("ALIVE")
            if alive == num:
                return
            assert time.monotonic() < deadline, f"got {alive} nodes, wanted {num}"
            time.sleep(0.5)

    def _start(
        self, kind: str, *, host: str, num_cpus: float, flags: dict[str, Any], labels: dict[str, str] | None
    ) -> Path:
        (agent_port,) = free_ports(1)
        usual = {
            "--node-ip-address": host,
            "--num-cpus": num_cpus,
            "--object-store-memory": STORE_BYTES,
            "--dashboard-agent-listen-port": agent_port,
        }
        if labels:
            usual["--labels"] = ",".join(f"{name}={value}" for name, value in labels.items())
        output = self._place / f"{host}.txt"
        with output.open("w") as stream:
            words = [str(Path(sys.executable).parent / "ray"), "start", kind, "--block"]
            self._started.append(
                subprocess.Popen(
                    [*words, *(f"{flag}={value}" for flag, value in {**usual, **flags}.items())],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    start_new_session=True,
                )
            )
        return output

    def close(self) -> list[str]:
        """End what was started, and return what did not end by itself."""
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
        for process in self._started:
            process.wait(timeout=60)
        psutil.wait_procs(self._alive(), timeout=30)
        left = self._alive()
        lines = [" ".join(orphan.cmdline())[:100] for orphan in left]
        for orphan in left:
            orphan.kill()
        psutil.wait_procs(left, timeout=10)
        return lines

    def _alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TEST_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


@pytest.fixture
def cluster(short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """A cluster to be started; this process has its token."""
    found = RayCluster(short_tmp_path / f"c{time.time_ns() % 1_000_000}")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(found.token_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        yield found
    finally:
        left = found.close()
    assert left == []


class Terminal:
    """The command line with an address, and what it has said."""

    def __init__(self, address: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._address = address
        self._capsys = capsys

    def __call__(self, *words: str, code: int = 0) -> str:
        """Run a command and return what it has written; it must end with the code."""
        ended = elenchus.main([*words, "--address", self._address])
        said = self._capsys.readouterr()
        assert ended == code, said.out + said.err
        return said.out if code == 0 else said.err


@pytest.fixture
def base_models(home: Path) -> Path:
    """Where the session's tests of whole runs keep the base model that the first of them trains."""
    path = home / "runs" / ".cache"
    path.mkdir(parents=True, exist_ok=True)
    return path


def runs_in(folder: Path, *, base_models: Path) -> Path:
    """Return a new directory for runs, which finds the session's base model."""
    folder.mkdir(parents=True)
    (folder / ".cache").symlink_to(base_models)
    return folder


def write_config(path: Path, *, runs: Path) -> Path:
    path.write_text(f'runs_dir = "{runs}"\n{CONFIG}')
    return path


# ------------------------------------------------------------------------------------------------------------- one node


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_is_submitted_watched_stopped_and_resumed_on_a_cluster_with_a_token(
    cluster: RayCluster, short_tmp_path: Path, base_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.start_head(num_cpus=2)
    runs = runs_in(short_tmp_path / "jobs", base_models=base_models)
    config = write_config(short_tmp_path / "job.toml", runs=runs)
    say = Terminal(cluster.dashboard, capsys)
    jobs = Jobs.at(cluster.dashboard)
    begin = ["submit", str(config), "--python", sys.executable, "--name"]

    said = say(*begin, "safe", "--critic.replicas", "60", code=2)
    assert said.startswith("✗ elenchus-safe: cluster: got 2 CPUs in all, wanted ")
    assert "60 × 0.2 critic" in said
    assert not (runs / "safe").exists()

    said = say(*begin, "tiny")
    assert said.splitlines()[:2] == [
        f"● elenchus-tiny is submitted to {cluster.dashboard}; it writes {runs}/tiny",
        "● elenchus-tiny is running",
    ]
    assert say(*begin, "tiny") == (
        f"● elenchus-tiny is running already: elenchus watch tiny --address {cluster.dashboard}\n"
    )
    assert "got another config for" in say(*begin, "tiny", "--seed", "9", code=2)

    state = next(states(jobs.follow(jobs.newest("tiny"))), None)
    assert state is not None, jobs.logs(jobs.newest("tiny"))
    assert state.pools.keys() == {"attacker", "rollouts", "critic"}
    assert say("stop", "tiny", "--timeout-s", "300").startswith("● elenchus-tiny: stopped ")
    assert holder(runs / "tiny") is None
    assert "stopped cleanly" in jobs.logs(jobs.newest("tiny"))

    said = say("scale", "rollouts", "2", "--run", "tiny")
    assert said.startswith("rollouts: wanted 2; it had ")
    assert "elenchus-tiny is stopped" in said
    assert json.loads((runs / "tiny" / "wanted.json").read_text()) == {"rollouts": 2}
    said = say("scale", "rollouts", "none", "--run", "tiny", code=2)
    assert said == '✗ elenchus scale: got "none" replicas, wanted a number, at least 1, or "auto"\n'

    say("resume", "tiny")
    said = say("watch", "tiny")
    assert "bottleneck: " in said
    assert said.splitlines()[-1] == "● elenchus-tiny~2: succeeded"
    finished(runs / "tiny")

    said = say("logs", "tiny")
    assert "Sealed problems: " in said
    assert MARK not in said
    assert TOKEN not in said
    rows = say("list").splitlines()[2:5]
    assert [line.split()[:3] for line in rows] == [
        ["safe", "failed", "elenchus-safe"],
        ["tiny", "stopped", "elenchus-tiny"],
        ["tiny", "succeeded", "elenchus-tiny~2"],
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_is_stopped_before_its_base_model_is_trained(
    cluster: RayCluster, short_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.start_head(num_cpus=2)
    runs = short_tmp_path / "early"
    config = write_config(short_tmp_path / "early.toml", runs=runs)
    say = Terminal(cluster.dashboard, capsys)
    # An hour of bootstrap.
    long = ("--bootstrap.steps", "100000", "--bootstrap.num-chunks", "1000")
    say("submit", str(config), "--python", sys.executable, "--name", "early", *long)
    jobs = Jobs.at(cluster.dashboard)
    deadline = time.monotonic() + 120
    while "bootstrap " not in jobs.logs(jobs.newest("early")) and time.monotonic() < deadline:
        time.sleep(0.5)
    begun = time.monotonic()
    said = say("stop", "early")
    assert said.startswith("● elenchus-early: stopped before the first iteration; continue with ")
    assert time.monotonic() - begun < 60
    assert holder(runs / "early") is None


# ---------------------------------------------------------------------------------------------------- a growing cluster


WAIT = """
import asyncio, sys
from cluster.ray_runtime import RayConfig, start_ray
from cluster.room import cluster_room
from trainers.preflight import await_room
from trainers.run_config import RunConfig
runtime = start_ray(RayConfig(address=sys.argv[1]))
asyncio.run(await_room(RunConfig(), look=cluster_room, note=lambda text: print(text, flush=True)))
print("there is room:", sorted(node.resources["CPU"] for node in cluster_room().nodes), flush=True)
runtime.stop()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_waits_for_the_nodes_that_a_growing_cluster_brings(cluster: RayCluster) -> None:
    cluster.start_head(num_cpus=1, labels={NODE_GROUP: "head"})
    waiting = subprocess.Popen(
        [sys.executable, "-c", WAIT, cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=cluster.environment,
    )
    try:
        assert waiting.stdout is not None
        first = waiting.stdout.readline()
        assert first.startswith("waiting up to 1800 s for room: cluster: got 1 nodes with 1 CPUs and 0 GPUs, wanted ")
        cluster.start_worker(1, num_cpus=2, labels={NODE_GROUP: "critic"})
        said, _ = waiting.communicate(timeout=120)
    finally:
        waiting.kill()
        waiting.wait()
    assert said.splitlines()[-1] == "there is room: [1.0, 2.0]"
    assert waiting.returncode == 0


# ---------------------------------------------------------------------------------------------------------- three nodes


MANY_ITERATIONS = 1000
"""More than a machine gets through before a test has seen what it waits for: it stops the run then."""


def accounting(run: Path) -> dict[int, dict[str, Any]]:
    """Return what each iteration made, and what became of it, by ids where ids tell."""
    found = {}
    for row in read_metrics(run):
        tables = {
            stage: read_stage(run, stage, iteration=row.iteration)
            for stage in ("queries", "responses", "critiques", "verdicts")
        }
        responses = from_table(tables["responses"], Response)
        found[row.iteration] = {
            "queries": sorted(query.query_id for query in from_table(tables["queries"], Query)),
            "responses": sorted(response.response_id for response in responses),
            "versions": {response.policy_version for response in responses},
            "judged": sorted(critique.response_ids for critique in from_table(tables["critiques"], Critique)),
            "verdicts": sorted(verdict.response_id for verdict in from_table(tables["verdicts"], Verdict)),
            "lost": row.lost,
            "attacks": row.num_attacks,
            "probe": row.num_probe,
        }
    return found


def assert_balanced(row: IterationMetrics, made: dict[str, Any]) -> None:
    """Check that an iteration lost nothing, made nothing twice and trained on what it had judged."""
    assert len(made["queries"]) == len(set(made["queries"])) == NUM_QUERIES
    assert len(made["responses"]) == len(set(made["responses"])) == NUM_QUERIES * NUM_SAMPLES
    assert [ids for (ids,) in made["judged"]] == made["responses"] == made["verdicts"]
    assert made["versions"] == {f"v{row.iteration - 1}"}
    assert made["lost"] == {}
    assert row.parity_max_abs_diff is not None
    assert row.parity_max_abs_diff <= 1e-4


def wait_for_critics(run: Path, num: int, *, job: Callable[[], Job], timeout_s: float = 600.0) -> int:
    """Wait until so many critics, and no others, have been there for a whole iteration, and return which that was."""
    deadline = time.monotonic() + timeout_s
    first = None
    while time.monotonic() < deadline:
        pools = read_pools(run) if run.is_dir() else {}
        committed = max(committed_iterations(run), default=None) if pools else None
        if committed is not None and [pools["critic"][key] for key in ("ready", "starting", "leaving")] == [num, 0, 0]:
            first = committed if first is None else first
            # The one that was going on then is not a whole one.
            if committed >= first + 2:
                return first + 2
        assert not job().ended, f"the run was over before {num} critics had made an iteration"
        time.sleep(0.5)
    raise AssertionError(f"after {timeout_s:g} s the pools stand at {read_pools(run)}, wanted {num} critics")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_critics_scaled_from_one_to_three_to_one_on_three_nodes_leave_the_accounting_as_it_is(
    cluster: RayCluster, short_tmp_path: Path, base_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No node alone has room for all.
    cluster.start_head(num_cpus=1)
    for number in (1, 2):
        cluster.start_worker(number, num_cpus=1)
    cluster.await_nodes(3)
    say = Terminal(cluster.dashboard, capsys)
    jobs = Jobs.at(cluster.dashboard)
    places = {kind: runs_in(short_tmp_path / kind, base_models=base_models) for kind in ("scaled", "undisturbed")}

    def submit(kind: str, *, iterations: int) -> Path:
        config = write_config(short_tmp_path / f"{kind}.toml", runs=places[kind])
        # One name, as ids are made from it.
        words = ("--name", "three", "--python", sys.executable, "--loop.iterations", str(iterations))
        say("submit", str(config), *words)
        return places[kind] / "three"

    run = submit("scaled", iterations=MANY_ITERATIONS)
    at = [wait_for_critics(run, 1, job=lambda: jobs.newest("three"))]
    for num in (3, 1):
        assert say("scale", "critic", str(num), "--run", "three").startswith(f"critic: wanted {num}; it had ")
        at.append(wait_for_critics(run, num, job=lambda: jobs.newest("three")))
    assert at == sorted(set(at))
    assert say("stop", "three", "--timeout-s", "300").startswith("● elenchus-three: stopped ")
    rows, made = read_metrics(run), accounting(run)
    assert at[-1] <= len(rows) < MANY_ITERATIONS

    calm = submit("undisturbed", iterations=len(rows))
    assert jobs.ended(jobs.newest("three"), timeout_s=900).status == "SUCCEEDED"

    assert [row.iteration for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        assert_balanced(row, made[row.iteration])
    assert made == accounting(calm)
    end = read_summary(calm)
    assert end is not None
    assert end.policy_version == f"v{len(rows)}"
    for folder in (run, calm):
        commit = last_commit(folder)
        assert commit is not None
        assert commit.iteration == len(rows)
