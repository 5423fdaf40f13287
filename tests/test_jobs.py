"""Runs as jobs: submitted once, found by name, watched, stopped; what is wrong is one line."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

import elenchus
from cluster.config import ConfigError
from cluster.jobs import ENVIRONMENT, JOB_VARIABLE, Jobs, dashboard_url
from cluster.lease import Holder, Lease, holder
from cluster.pool import PoolStats
from cluster.room import Need, Node, Room, shortages
from serve.shipment import shipment, shipped_config
from serve.watch import bottleneck, plain_log, sample_age, states, table
from tests.fake_roles import RUN, Settings, fake_run, write_blank_run
from tests.sitting import REPOSITORY
from trainers.driver import Stopped
from trainers.live import MARK, IterationRow, Live, LiveState, PoolState, parse_live, read_live
from trainers.preflight import await_room, reserved
from trainers.progress import Silent, StopSignal
from trainers.run_config import RunConfig
from trainers.session import _unless_stopped
from trainers.summary import read_metrics

TOKEN = "a-token-of-some-length"


class FakeCluster:
    """What the adapter uses of Ray's client, in memory."""

    def __init__(self) -> None:
        self.jobs: list[SimpleNamespace] = []
        self.logs = ""
        self.asked_to_stop: list[str] = []
        self.shipped: list[str] = []
        self.num_closed = 0
        """Connections that somebody followed a log by, and that are closed."""
        self.ends: dict[str, tuple[str, int | None]] = {}
        """What becomes of jobs whose command holds a word: status and exit code."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str | None = None,
        runtime_env: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> str:
        assert submission_id is not None
        assert runtime_env is not None
        if submission_id in [job.submission_id for job in self.jobs]:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.shipped = sorted(path.name for path in Path(runtime_env["working_dir"]).iterdir())
        job = SimpleNamespace(
            submission_id=submission_id,
            status="RUNNING",
            message=None,
            start_time=1_000,
            driver_exit_code=None,
            metadata=metadata,
            entrypoint=entrypoint,
            runtime_env=runtime_env,
        )
        for word, (status, code) in self.ends.items():
            if word in entrypoint.split():
                job.status, job.driver_exit_code = status, code
        self.jobs.append(job)
        return submission_id

    def list_jobs(self) -> list[Any]:
        strangers = [
            SimpleNamespace(submission_id=None, metadata=None),
            SimpleNamespace(submission_id="x", metadata={}),
        ]
        return [*strangers, *self.jobs]

    def stop_job(self, job_id: str) -> bool:
        self.asked_to_stop.append(job_id)
        for job in self.jobs:
            if job.submission_id == job_id:
                job.status = "STOPPED"
        return True

    def get_job_logs(self, job_id: str) -> str:
        return self.logs

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return next(job for job in self.jobs if job.submission_id == job_id)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        try:
            for start in range(0, len(self.logs), 7):
                await asyncio.sleep(0)
                yield self.logs[start : start + 7]
        finally:
            await asyncio.sleep(0)
            self.num_closed += 1


def submit(jobs: Jobs, folder: Path, name: str = "safe") -> tuple[str, bool]:
    metadata = {"commit": "c" * 40, "runs_dir": "/shared/runs", "config_hash": "1", "python": "python"}
    submitted = jobs.submit(name, words=["python", "elenchus.py", "run", "job.toml"], folder=folder, metadata=metadata)
    return submitted.job.submission_id, submitted.is_new


# ---------------------------------------------------------------------------------------------------------- the adapter


def test_a_run_that_is_alive_is_not_submitted_again_and_an_ended_one_gets_another_attempt(tmp_path: Path) -> None:
    cluster = FakeCluster()
    jobs = Jobs(cluster, address="http://h:1")
    assert submit(jobs, tmp_path) == ("elenchus-safe", True)
    assert submit(jobs, tmp_path) == ("elenchus-safe", False)
    cluster.jobs[0].status = "FAILED"
    assert submit(jobs, tmp_path) == ("elenchus-safe~2", True)
    assert submit(jobs, tmp_path, "other") == ("elenchus-other", True)
    assert jobs.newest("safe").attempt == 2
    with pytest.raises(
        ValueError, match=r'^run: got "sfae", of which http://h:1 has no job, wanted one of other, safe$'
    ):
        jobs.newest("sfae")


def test_a_job_is_stopped_by_one_interrupt_with_time_to_commit_and_carries_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    cluster = FakeCluster()
    submit(Jobs(cluster, address="http://h:1"), tmp_path)
    (job,) = cluster.jobs
    assert job.runtime_env["env_vars"] == {**ENVIRONMENT, JOB_VARIABLE: "elenchus-safe"}
    assert ENVIRONMENT["RAY_AUTH_MODE"] == "token"
    assert ENVIRONMENT["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert int(ENVIRONMENT["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600
    # Through a shell the signal would reach that one too.
    assert job.entrypoint == "exec python elenchus.py run job.toml"
    assert TOKEN not in json.dumps([job.entrypoint, job.runtime_env, job.metadata])


def test_lines_are_followed_whole_however_they_arrive(tmp_path: Path) -> None:
    cluster = FakeCluster()
    jobs = Jobs(cluster, address="http://h:1")
    submit(jobs, tmp_path)
    cluster.logs = "a first line\nand the second\n\nthe rest"
    assert list(jobs.follow(jobs.newest("safe"))) == ["a first line", "and the second", "", "the rest"]
    assert cluster.num_closed == 1
    followed = jobs.follow(jobs.newest("safe"))
    assert next(followed) == "a first line"
    followed.close()
    assert cluster.num_closed == 2


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def dashboard() -> Iterator[Callable[[str], str]]:
    """Give what starts a server that answers as a Ray of some version does, to those who know TOKEN; gives its URL."""
    servers: list[HTTPServer] = []

    def start(version: str) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                said = self.headers.get("Authorization")
                status = 401 if said is None else 200 if said == f"Bearer {TOKEN}" else 403
                content = json.dumps(
                    {"ray_version": version, "version": "4"} if "version" in self.path else []
                ).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))


REMEDY = (
    "wanted that cluster's: give --token-path a file that holds it, or export RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN "
    "(on its head node `ray get-auth-token` prints it)"
)


def refusal(url: str, token_path: Path | None = None) -> str:
    with pytest.raises(ValueError, match=r"^--") as caught:
        Jobs.at(url, token_path=token_path)
    return str(caught.value)


@pytest.mark.usefixtures("_no_token")
def test_a_missing_and_a_wrong_token_are_one_line(dashboard: Callable[[str], str], tmp_path: Path) -> None:
    url = dashboard(ray.__version__)
    assert refusal(url) == f'--address: got "{url}" and no token, {REMEDY}'
    (tmp_path / "token").write_text("another")
    assert refusal(url, tmp_path / "token") == f'--address: got "{url}" and a token that it does not know, {REMEDY}'
    assert refusal(url, tmp_path / "none") == (
        f"--token-path: got {tmp_path}/none, which is missing or empty, wanted the cluster's token"
    )


def test_another_version_is_one_line(dashboard: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    url = dashboard("2.9.3")
    assert refusal(url) == (
        f'--address: got "{url}", which runs Ray 2.9.3, wanted Ray {ray.__version__} as here: install the same on '
        "both sides"
    )


def test_the_address_that_was_said_counts_and_not_the_environments(
    dashboard: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", "10.255.255.1:6379")
    assert Jobs.at(dashboard(ray.__version__)).all() == []
    assert os.environ["RAY_ADDRESS"] == "10.255.255.1:6379"


def test_an_address_where_nothing_answers_is_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert refusal(url) == (
            f'--address: got "{url}", where nothing answers, wanted the dashboard of a running Ray: start one there by '
            "`ray start --head`, or forward its port"
        )


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "auto", "http://", "10.0.0.1:port"])
def test_an_address_that_takes_no_jobs_is_refused(address: str) -> None:
    with pytest.raises(
        ValueError, match=r"wanted the cluster's dashboard, which takes jobs, such as http://10\.0\.0\.1"
    ):
        dashboard_url(address)


def test_paths_that_would_mean_another_place_on_the_cluster_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        shipped_config(RunConfig())
    assert str(caught.value) == (
        "runs_dir: got runs, wanted an absolute path that all nodes of the cluster can reach, such as /shared/runs"
    )


def test_what_is_shipped_is_the_packages_and_the_config_without_where_the_client_found_things(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"runs_dir": "/shared/runs", "ray": {"address": "a:1", "token_path": "/my/token"}}
    )
    with shipment(shipped_config(config), python="/opt/python") as shipped:
        names = {path.name for path in shipped.folder.iterdir()}
        toml = (shipped.folder / shipped.config_name).read_text()
        assert not list(shipped.folder.rglob("__pycache__"))
    assert names == {"elenchus.py", "cluster", "actors", "trainers", "serve", "job.toml"}
    assert "/my/token" not in toml
    assert 'runs_dir = "/shared/runs"' in toml
    assert shipped.metadata.keys() == {"commit", "version", "config_hash", "runs_dir", "python"}
    assert not shipped.folder.exists()


# ---------------------------------------------------------------------------------------------------- the command line


ELSEWHERE = {
    "submit": ["submit", "runs_dir=/shared/runs"],
    "resume": ["resume", "safe"],
    "status": ["status", "safe"],
    "watch": ["watch", "safe"],
    "logs": ["logs", "safe"],
    "stop": ["stop", "safe"],
    "list": ["list"],
    "scale": ["scale", "critic", "2", "--run", "safe"],
}


@pytest.mark.usefixtures("_no_token")
@pytest.mark.parametrize("command", ELSEWHERE)
def test_every_command_answers_a_cluster_that_it_can_not_speak_to_in_one_line(
    command: str, dashboard: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong").write_text("another")
    (tmp_path / "right").write_text(TOKEN)
    url, old = dashboard(ray.__version__), dashboard("2.9.3")

    def told(*words: str) -> str:
        assert elenchus.main([*ELSEWHERE[command], *words]) == 2
        return capsys.readouterr().err

    assert told("--address", url) == f'✗ --address: got "{url}" and no token, {REMEDY}\n'
    assert told("--address", url, "--token-path", str(tmp_path / "wrong")) == (
        f'✗ --address: got "{url}" and a token that it does not know, {REMEDY}\n'
    )
    assert told("--address", old, "--token-path", str(tmp_path / "right")) == (
        f'✗ --address: got "{old}", which runs Ray 2.9.3, wanted Ray {ray.__version__} as here: install the same on '
        "both sides\n"
    )
    assert told("--address", "10.0.0.1").startswith('✗ --address: got "10.0.0.1", wanted the cluster\'s dashboard')


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "status safe --address h:1 --runs-dir /r",
            "elenchus status: got --address and --runs-dir, wanted one of them: the cluster's job knows where its run "
            "is; without --address it is a run of this machine",
        ),
        (
            "scale critic 2 --run safe --runs_dir=/r --address=h:1",
            "elenchus scale: got --address and --runs-dir, wanted one of them: the cluster's job knows where its run "
            "is; without --address it is a run of this machine",
        ),
        (
            "list --token-path t",
            "elenchus list: got --token-path without --address, wanted both: give the dashboard of the cluster that it "
            "is for",
        ),
        (
            "resume safe --python python3",
            "elenchus resume: got --python without --address, wanted both: give the dashboard of the cluster that it "
            "is for",
        ),
        ("submit", "Missing from elenchus submit: --address STR The cluster's dashboard, such as "
         "http://10.0.0.1:8265. (required) · see elenchus submit --help"),
        ("submit --adress h:1", "elenchus submit: unknown flag --adress; did you mean --address?; a config key is "
         "given in full, such as --critic.replicas 6"),
    ],
)  # fmt: skip
def test_flags_that_exclude_or_need_one_another_are_told(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert elenchus.main(words.split()) == 2
    assert capsys.readouterr().err == f"✗ {message}\n"


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """A cluster that every address leads to."""
    cluster = FakeCluster()
    monkeypatch.setattr(Jobs, "at", lambda address, token_path=None: Jobs(cluster, address="http://h:1"))
    return cluster


BEGIN = ("submit", "runs_dir=/shared/runs", "--name", "safe", "--address", "h:1")


def test_a_submission_says_how_to_follow_it_and_the_same_one_again_is_left_alone(
    there: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    there.logs = "● cluster   Ray at 127.0.0.1:1\n"
    assert elenchus.main([*BEGIN, "--python", "/opt/python"]) == 0
    assert capsys.readouterr().out == textwrap.dedent(
        """\
        ● elenchus-safe is submitted to http://h:1; it writes /shared/runs/safe
        ● elenchus-safe is running
          elenchus watch safe --address h:1
          elenchus logs safe --address h:1
          elenchus stop safe --address h:1
        """
    )
    assert elenchus.main([*BEGIN]) == 0
    assert capsys.readouterr().out == "● elenchus-safe is running already: elenchus watch safe --address h:1\n"
    assert elenchus.main([*BEGIN, "--critic.replicas", "2"]) == 2
    assert capsys.readouterr().err == (
        '✗ elenchus submit: got another config for "safe", which is running as elenchus-safe, wanted a name that is '
        "free: stop that run, or give --name\n"
    )
    assert elenchus.main(["resume", "safe", "--address", "h:1"]) == 0
    assert capsys.readouterr().out == "● elenchus-safe is running already: elenchus watch safe --address h:1\n"
    assert [job.entrypoint for job in there.jobs] == ["exec /opt/python elenchus.py run job.toml"]


def test_a_job_that_can_not_begin_says_why_and_one_that_waits_for_what(
    there: FakeCluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elenchus, "WAITING_WATCHED_S", 0.1)
    there.ends = {"run": ("FAILED", 2)}
    there.logs = "2026 INFO job_manager.py\nRunning entrypoint …\n✗ cluster: got 2 CPUs in all, wanted 13\n"
    assert elenchus.main([*BEGIN]) == 2
    assert capsys.readouterr().err == "✗ elenchus-safe: cluster: got 2 CPUs in all, wanted 13\n"
    there.ends, there.logs = {"run": ("FAILED", 1)}, "Traceback …\nModuleNotFoundError: No module named 'tyro'\n"
    assert elenchus.main([*BEGIN]) == 1
    assert capsys.readouterr().err == "✗ elenchus-safe~2: ModuleNotFoundError: No module named 'tyro'\n"
    there.ends, there.logs = {}, "● waiting up to 1800 s for room: cluster: got 1 nodes\n"
    assert elenchus.main([*BEGIN]) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "● waiting up to 1800 s for room: cluster: got 1 nodes",
        "● elenchus-safe~3 is waiting",
    ]


def test_a_run_is_resumed_by_the_python_and_in_the_place_it_was_submitted_with(
    there: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    there.logs = "● cluster   Ray at 127.0.0.1:1\n"
    elenchus.main([*BEGIN, "--python", "/opt/python"])
    there.jobs[0].status = "STOPPED"
    assert elenchus.main(["resume", "safe", "--address", "h:1"]) == 0
    assert there.jobs[1].submission_id == "elenchus-safe~2"
    assert there.jobs[1].entrypoint == "exec /opt/python elenchus.py resume safe --runs-dir /shared/runs"
    assert there.jobs[1].metadata["config_hash"] == there.jobs[0].metadata["config_hash"]
    assert "job.toml" not in there.shipped
    capsys.readouterr()
    assert elenchus.main(["list", "--address", "h:1"]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        ["safe", "stopped", "elenchus-safe"],
        ["safe", "running", "elenchus-safe~2"],
    ]


def test_scaling_over_an_address_is_said_where_the_run_is_and_is_no_attempt_at_it(
    there: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    there.logs = "● cluster   Ray at 127.0.0.1:1\n"
    elenchus.main([*BEGIN])
    capsys.readouterr()
    scale = ["scale", "critic", "3", "--run", "safe", "--address", "h:1"]
    there.ends = {"scale": ("SUCCEEDED", 0)}
    there.logs = (
        "2026-11-21 13:16:12,061\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
        "critic: wanted 3; it had 1 ready of 1.\n"
        "Running entrypoint for job elenchus-safe~errand-1: exec …\n"
    )
    assert elenchus.main(scale) == 0
    assert capsys.readouterr().out == "critic: wanted 3; it had 1 ready of 1.\n"
    assert there.jobs[1].entrypoint == "exec python elenchus.py scale critic 3 --run safe --runs-dir /shared/runs"
    assert [job.submission_id for job in Jobs(there, address="http://h:1").all()] == ["elenchus-safe"]
    there.ends = {"scale": ("FAILED", 2)}
    there.logs = '✗ run: got "safe", which is not in /shared/runs\n'
    assert elenchus.main(scale) == 2
    assert capsys.readouterr().err == '✗ run: got "safe", which is not in /shared/runs\n'
    scale[2] = "none"
    assert elenchus.main(scale) == 2
    assert capsys.readouterr().err == (
        '✗ elenchus scale: got "none" replicas, wanted a number, at least 1, or "auto"\n'
    )


def test_an_errand_that_does_not_end_is_told_to(tmp_path: Path) -> None:
    cluster = FakeCluster()
    with pytest.raises(TimeoutError, match=r'^errand "elenchus\.py scale" at http://h:1 has not ended within 0\.1 s: '):
        Jobs(cluster, address="http://h:1").errand(
            "a", words=["p", "elenchus.py", "scale"], folder=tmp_path, timeout_s=0.1
        )
    (job,) = cluster.jobs
    assert cluster.asked_to_stop == [job.submission_id]
    # It is no attempt at the run, and does not take its variables for its own.
    assert Jobs(cluster, address="http://h:1").all() == []
    assert job.runtime_env["env_vars"] == {"RAY_AUTH_MODE": "token"}


# ------------------------------------------------------------------------------------------------------------ room


NEEDS = (Need(role="rollouts", count=1, cpus=0.2, gpus=1.0), Need(role="critic", count=6, cpus=0.5, gpus=0.0))


def room(total: dict[str, float], free: dict[str, float] | None = None, **others: Any) -> Room:
    """One node with all of it, of which nobody holds anything."""
    return Room(**{"total": total, "free": total if free is None else free, "nodes": [Node(resources=total)], **others})


def test_what_the_cluster_lacks_and_what_others_hold_is_told_before_anything_is_placed() -> None:
    # 0.2 + 6 × 0.5 = 3.2 CPUs.
    assert list(shortages(NEEDS, room=room({"CPU": 3.2, "GPU": 1.0}))) == []
    assert list(shortages(NEEDS, room=room({"CPU": 8.0, "GPU": 1.0}, {"CPU": 2.0}))) == [
        "cluster: got 2 CPUs free of 8 (6 are held by others), wanted 3.2 = 1 × 0.2 rollouts + 6 × 0.5 critic: "
        "wait for them, or lower the counts",
        "cluster: got 0 GPUs free of 1 (1 are held by others), wanted 1 = 1 × 1 rollouts: "
        "wait for them, or lower the counts",
    ]
    assert list(shortages(NEEDS, room=room({"CPU": 2.0, "GPU": 1.0}))) == [
        "cluster: got 2 CPUs in all, wanted 3.2 = 1 × 0.2 rollouts + 6 × 0.5 critic: add nodes, or lower the counts"
    ]


def test_a_process_that_fits_on_no_node_is_told_though_all_nodes_together_have_enough() -> None:
    pairs = [Node(resources={"CPU": 8.0, "GPU": 2.0})] * 4
    need = Need(role="critic", count=2, cpus=1.0, gpus=4.0)
    found = room({"CPU": 32.0, "GPU": 8.0}, nodes=pairs)
    assert list(shortages([need], room=found)) == [
        "cluster: got at most 2 GPUs on one node, wanted 4 for one of critic: add nodes that have so many, or lower "
        "what one takes"
    ]
    assert list(shortages([replace(need, gpus=2.0)], room=found)) == []


def test_labelled_nodes_that_have_too_little_are_told_though_the_cluster_has_enough() -> None:
    nodes = [
        Node(resources={"CPU": 8.0}, labels={"ray.io/node-group": "head"}),
        Node(resources={"CPU": 2.0}, labels={"ray.io/node-group": "critic"}),
    ]
    need = Need(role="critic", count=6, cpus=0.5, gpus=0.0, node_labels=("ray.io/node-group=critic",))
    found = room({"CPU": 10.0}, nodes=nodes)
    assert list(shortages([need], room=found)) == [
        "cluster: got 2 CPUs on the 1 nodes with ray.io/node-group=critic, wanted 3 = 6 × 0.5 critic: label more nodes "
        "(`ray start --labels`), or change node_labels"
    ]
    assert list(shortages([replace(need, count=4)], room=found)) == []
    assert list(shortages([replace(need, node_labels=())], room=found)) == []
    (line,) = shortages([replace(need, node_labels=("zone=a",))], room=found)
    assert line.startswith("cluster: got 0 CPUs on the 0 nodes with zone=a, wanted 3 = ")


def test_a_config_is_weighed_as_plan_counts_it() -> None:
    # 3 pools × 0.2 + 2 ranks × 0.5 = 1.6 CPUs.
    assert list(shortages(reserved(RunConfig()), room=room({"CPU": 1.6}))) == []
    (line,) = shortages(reserved(RunConfig()), room=room({"CPU": 1.5}))
    assert line.startswith("cluster: got 1.5 CPUs in all, wanted 1.6 = ")


class FakeDemand:
    """Is met after so many looks."""

    def __init__(self, looks: int) -> None:
        self.asked: list[Sequence[Need]] = []
        self.left = looks
        self.released = 0

    def __call__(self, needs: Sequence[Need]) -> FakeDemand:
        self.asked.append(needs)
        return self

    def is_met(self) -> bool:
        self.left -= 1
        return self.left < 0

    def release(self) -> None:
        self.released += 1


def test_a_run_waits_a_moment_for_what_others_give_back_and_says_for_what() -> None:
    held, given = room({"CPU": 2.0}, {"CPU": 1.0}), room({"CPU": 2.0})
    looks = iter([held, held, given])
    notes: list[str] = []
    demand = FakeDemand(0)
    wait = partial(await_room, RunConfig(), note=notes.append, demand=demand)
    asyncio.run(wait(look=lambda: next(looks), timeout_s=5.0))
    (note,) = notes
    assert note.startswith("waiting up to 5 s for room: cluster: got 1 CPUs free of 2 (1 are held by others), wanted ")
    with pytest.raises(ConfigError, match=r"^cluster: got 1 CPUs free of 2"):
        asyncio.run(wait(look=lambda: held, timeout_s=0.2))
    # This one does not grow: nothing is asked of it.
    assert demand.asked == []


def test_a_cluster_that_grows_is_asked_to_and_waited_for() -> None:
    small, grown = room({"CPU": 1.0}, grows=True), room({"CPU": 4.0}, {"CPU": 2.4}, grows=True)
    looks = iter([small, small, grown, grown])
    notes: list[str] = []
    demand = FakeDemand(2)
    asyncio.run(await_room(RunConfig(), look=lambda: next(looks), note=notes.append, demand=demand))
    needs = "1 × attacker (0.2 CPUs) + 1 × rollouts (0.2 CPUs) + 1 × critic (0.2 CPUs) + 2 × learner (0.5 CPUs)"
    assert notes == [
        f"waiting up to 1800 s for room: cluster: got 1 nodes with {there} CPUs and 0 GPUs, wanted room for {needs}: "
        "it was asked to grow (`ray status` on its head says how far that is); lower the counts if it may not"
        for there in (1, 4)
    ]
    assert (len(demand.asked), demand.released) == (1, 1)
    demand = FakeDemand(1_000)
    with pytest.raises(
        ConfigError, match=r"^cluster: got 1 nodes with 1 CPUs and 0 GPUs, wanted room for 1 × attacker"
    ):
        asyncio.run(await_room(RunConfig(), look=lambda: small, note=notes.append, demand=demand, timeout_s=0.2))
    assert demand.released == 1


# ------------------------------------------------------------------------------------------------------------ watching


def pool_state(**changes: Any) -> PoolState:
    usual = {"wanted": 1, "ready": 1, "queued": 0, "open": 0, "answers_per_s": 0.0, "tokens_per_s": 0.0}
    return PoolState(**{**usual, "version": None, "why": None, **changes})


def row(iteration: int, **seconds: float) -> IterationRow:
    return IterationRow(
        iteration=iteration, attack_success=0.5, probe_accuracy=0.4, policy_version=f"v{iteration}", seconds=seconds
    )


def test_the_bottleneck_is_the_pool_with_most_seconds_of_work_and_not_the_longest_queue() -> None:
    # 300 samples at 30/s are 10 s; 80 at 2/s are 40 s.
    pools = {
        "rollouts": pool_state(open=300, answers_per_s=30.0),
        "critic": pool_state(open=80, answers_per_s=2.0, wanted=3, ready=3),
    }
    state = LiveState(run="safe", time=0.0, iterations=5, pools=pools)
    assert bottleneck(state) == ("critic", "elenchus scale critic 4 --run safe")
    assert bottleneck(state, address="h:1") == ("critic", "elenchus scale critic 4 --run safe --address h:1")
    waiting = {**pools, "critic": pool_state(open=80, answers_per_s=2.0, wanted=3, ready=2, why="no room: CPU")}
    assert bottleneck(state.model_copy(update={"pools": waiting})) == ("critic", "2 of 3 replicas: no room: CPU")


def test_the_learner_holds_a_run_up_when_training_takes_longer_than_rollout_and_queues() -> None:
    rows = (row(1, rollout=20.0, update=45.0, publish=5.0),)
    busy = {"critic": pool_state(open=80, answers_per_s=2.0)}  # 40 s, less than 50
    state = LiveState(run="safe", time=0.0, iterations=5, rows=rows, pools=busy)
    assert bottleneck(state)[0] == "learner"
    busier = {"critic": pool_state(open=120, answers_per_s=2.0)}  # 60 s
    assert bottleneck(state.model_copy(update={"pools": busier}))[0] == "critic"
    assert bottleneck(LiveState(run="safe", time=0.0, iterations=5)) == ("none", "no pool has a queue")


def test_the_age_of_samples_is_how_far_the_rollout_pool_is_behind_the_last_commit() -> None:
    state = LiveState(run="safe", time=0.0, iterations=5, rows=(row(3),), pools={"rollouts": pool_state(version="v1")})
    assert sample_age(state) == 2
    assert sample_age(state.model_copy(update={"rows": ()})) is None


def test_the_table() -> None:
    state = LiveState(
        run="safe",
        time=100.0,
        iterations=5,
        stage="critiques",
        done=12,
        total=64,
        rows=(row(2, rollout=9.0, update=1.0),),
        pools={"critic": pool_state(open=80, queued=9, answers_per_s=2.0, tokens_per_s=311.4, version="v0")},
    )
    assert table(state, now=101.0) == textwrap.dedent(
        """\
        ● safe: running · iterations committed: 2 of 5 · critiques 12 of 64
          iteration  attack success  accuracy
                  2            50 %      40 %
          pool        replicas  queued    open  seconds of work  tokens/s  weights
          critic           1/1       9      80               40       311  v0
          sample age: – policy versions
          bottleneck: critic · elenchus scale critic 2 --run safe"""
    )
    assert table(state, now=145.0).startswith("● safe: silent for 45 s · ")
    assert "bottleneck" not in table(state.model_copy(update={"ended": True}), now=145.0)


class FakePool:
    """Gives prepared figures."""

    def __init__(self, *figures: tuple[int, int, int]) -> None:
        self._figures = iter(figures)

    async def stats(self) -> PoolStats:
        num_open, answered, tokens = next(self._figures)
        return PoolStats(
            name="critic", wanted=2, ready=1, starting=1, num_lost=0, num_retried=0, num_queued=3, num_open=num_open,
            num_answered=answered, why=None, version="v0", num_generated_tokens=tokens, num_prompt_tokens=0, busy_s=0.0,
            num_running=0, replicas={},
        )  # fmt: skip


def test_a_runs_state_is_in_a_file_and_in_a_jobs_log_where_people_do_not_see_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = Live(Silent(), run="safe", run_dir=tmp_path, iterations=5, echo=sys.stdout)
    pool = FakePool((100, 0, 0), (80, 20, 600), (0, 100, 3_000))

    async def look() -> None:
        for now in (10.0, 14.0, 20.0):
            live.stage("critiques", done=3, total=9)
            await live.look({"critic": pool}, now=now)

    asyncio.run(look())
    state = read_live(tmp_path)
    assert state is not None
    assert (state.stage, state.done, state.total) == ("critiques", 3, 9)
    # From 10 s to 20 s: 100 answers and 3,000 tokens.
    assert (state.pools["critic"].answers_per_s, state.pools["critic"].tokens_per_s) == (10.0, 300.0)
    lines = [*capsys.readouterr().out.splitlines(), "● a line", f"{MARK}of another version"]
    # Three looks within a moment: one line of the log.
    (echoed,) = states(lines)
    assert (echoed.run, echoed.pools["critic"].open) == ("safe", 100)
    assert list(plain_log(lines)) == ["● a line"]
    assert parse_live("{}") is None


def test_the_real_loop_tells_its_stages_and_iterations_and_a_later_sitting_begins_with_them(tmp_path: Path) -> None:
    blank = write_blank_run(tmp_path / "blank" / RUN)
    settings = Settings()
    run = fake_run(blank, settings)
    live = Live(Silent(), run=RUN, run_dir=blank, iterations=settings.iterations)
    run.driver._progress = live

    async def sit() -> None:
        async with live.looking({}):
            await run.driver.run()

    try:
        asyncio.run(sit())
    finally:
        run.close()
    state = read_live(blank)
    assert state is not None
    assert state.ended
    assert [row.iteration for row in state.rows] == list(range(1, settings.iterations + 1))
    metrics = read_metrics(blank)
    assert [row.probe_accuracy for row in state.rows] == [row.probe_accuracy for row in metrics]
    again = Live(Silent(), run=RUN, run_dir=blank, iterations=settings.iterations, before=metrics)
    asyncio.run(again.look({}, now=0.0))
    later = read_live(blank)
    assert later is not None
    assert (later.rows, later.ended) == (state.rows, False)


# ----------------------------------------------------------------------------------------------- before there is a loop


def test_a_stop_ends_what_comes_before_the_loop_and_lets_it_clean_up() -> None:
    stop = StopSignal()
    cleaned: list[str] = []

    async def bootstrap() -> None:
        try:
            stop.request()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append("group")

    async def three() -> int:
        await asyncio.sleep(0.01)
        return 3

    with pytest.raises(Stopped):
        asyncio.run(_unless_stopped(bootstrap(), stop=stop))
    assert cleaned == ["group"]
    # What is done by then counts.
    assert asyncio.run(_unless_stopped(three(), stop=stop)) == 3


# ------------------------------------------------------------------------------------------------------ on this machine


HOLD = """
import signal, sys, time
from pathlib import Path
from cluster.lease import Lease
lease = Lease(Path(sys.argv[1]) / "LEASE")
lease.claim(at_least=0)
# As a run has it: a background shell's children inherit SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
print("held", flush=True)
try:
    time.sleep(60)
    sys.exit(3)
except KeyboardInterrupt:
    pass
"""


def make_run(runs: Path, name: str) -> Path:
    run = runs / name
    (run / "journal").mkdir(parents=True)
    (run / "store.json").write_text("{}")
    config = RunConfig(name=name, runs_dir=runs).model_dump(mode="json")
    (run / "resolved.json").write_text(json.dumps(config))
    return run


def test_stop_interrupts_the_process_that_holds_a_run_and_waits_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "safe")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, cwd=REPOSITORY, env={**os.environ}
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert holder(run) == Holder(process.pid, socket.gethostname())
        assert elenchus.main(["list", "--runs-dir", str(tmp_path)]) == 0
        assert "safe   running" in capsys.readouterr().out
        assert elenchus.main(["stop", "safe", "--runs-dir", str(tmp_path)]) == 0
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    assert capsys.readouterr().out == (
        "● safe: stopped before the first commit; continue with `elenchus resume safe`\n"
    )
    assert elenchus.main(["stop", "safe", "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "● safe: not running; it stands before the first commit\n"


def test_a_lease_without_its_holders_name_is_nobody_to_be_stopped(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "LEASE")
    assert holder(tmp_path) is None
    lease.claim(at_least=0)
    assert holder(tmp_path) == Holder(os.getpid(), socket.gethostname())
    lease.release()
    assert holder(tmp_path) is None


def test_runs_of_this_machine_are_listed_and_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "a")
    assert elenchus.main(["list", "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["a", "stopped", "NULL", "NULL"]
    assert elenchus.main(["watch", "a", "--runs-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "● a: not running; it has not told how it stands\n"
