"""A run over several nodes: raylets of one machine, and two hosts with addresses of their own in network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.records import Response, from_table
from cluster.store import read_stage
from tests.sitting import CONFIG, NUM_ITERATIONS, REPOSITORY, finished
from tests.tiny_models import write_llama
from trainers.summary import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MARK = "ELENCHUS_NODES_TEST"
TOKEN = "n" * 64


class Process:
    """A process with its output in a file, in a group of its own; what it leaves behind is found by its mark."""

    def __init__(self, place: Path, name: str, *command: str, mark: str, stdin: int | None = None) -> None:
        self._output = place / f"{name}.txt"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(place / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "120",  # else a busy machine's raylet is given up after 30 s
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(REPOSITORY),
            MARK: mark,
        }
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=place,
                env=environment,
                text=True,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, words: str, *, timeout_s: float = 240.0) -> str:
        """Return what follows these words in the first line that has them."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in self.output.splitlines():
                if words in line:
                    return line.partition(words)[2].strip()
            assert self.process.poll() is None, self.output[-3000:]
            time.sleep(0.1)
        raise AssertionError(f"no line with {words!r} within {timeout_s:g} s:\n{self.output[-3000:]}")


@pytest.fixture
def place(home: Path) -> Path:
    """Give the directory that all nodes share: where the session's other runs are, and their base model."""
    (home / "token").write_text(TOKEN)
    (home / "token").chmod(0o600)
    return home


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Process]]:
    """Give what starts a process; at the end none of them, and none that they started, is left."""
    mark = f"{time.time_ns()}"
    started: list[Process] = []

    def start(name: str, *command: str, stdin: int | None = None) -> Process:
        started.append(Process(place, name, *command, mark=mark, stdin=stdin))
        return started[-1]

    yield start
    for one in reversed(started):
        if one.process.stdin is not None:
            one.process.stdin.close()
        else:
            one.process.terminate()
        try:
            one.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            continue  # it is among those that are killed below
    _, left = psutil.wait_procs(marked(mark), timeout=20)
    for orphan in left:
        orphan.kill()
    psutil.wait_procs(left, timeout=10)


def marked(mark: str) -> list[psutil.Process]:
    """Return the living processes with the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def config_for(place: Path, *, address: str, pools: str, learner: str, num_rollouts: int) -> None:
    """Write the tiny run's config for a cluster, each role pinned to nodes by their label."""
    here = f'address = "{address}"\ntoken_path = "{place / "token"}"\n'
    text = CONFIG.replace("num_cpus = 2\n", here).replace(
        "[learner.training]\n", f'[learner.training]\nnode_labels = ["elenchus/node={learner}"]\n'
    )
    for role in ("attacker", "rollouts", "critic"):
        text += f'\n[{role}.engine]\nkv_cache_gb = 0.05\narrangement = "spread"\n'
        text += f'node_labels = ["elenchus/node={pools}"]\n'
    text += f"\n[rollouts]\nreplicas = {num_rollouts}\n"
    (place / "nodes.toml").write_text(text)


def notes(run: Path, iteration: int) -> dict[str, Any] | None:
    """Return where everybody was at a commit; None before it."""
    path = run / f"nodes-{iteration}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def labels(places: list[dict[str, str]]) -> list[str]:
    return sorted(place["label"] for place in places)


def wait_for_note(run: Path, sitting: Process, iteration: int, *, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while (found := notes(run, iteration)) is None:
        assert sitting.process.poll() is None, sitting.output[-3000:]
        assert time.monotonic() < deadline, sitting.output[-3000:]
        time.sleep(0.1)
    return found


def test_roles_on_nodes_of_their_own_train_together_and_outlive_a_pools_node(
    place: Path, start: Callable[..., Process]
) -> None:
    raylets = start(
        "raylets",
        sys.executable,
        "-m",
        "tests.raylets",
        json.dumps({"learner": 2, "pools-a": 1, "pools-b": 1}),
        stdin=subprocess.PIPE,
    )
    address = raylets.wait_for("ready ")
    config_for(place, address=address, learner="learner", pools="in(pools-a,pools-b)", num_rollouts=2)
    run = place / "runs" / "nodes"
    sitting = start("sitting", sys.executable, "-m", "tests.noted_sitting", "run", "nodes.toml", "--name", "nodes")
    before = wait_for_note(run, sitting, 0, timeout_s=400.0)
    assert before["driver"]["label"] == "head"
    assert labels(before["ranks"]) == ["learner", "learner"]
    assert labels(before["replicas"]["rollouts"]) == ["pools-a", "pools-b"]
    assert {*labels(before["replicas"]["attacker"]), *labels(before["replicas"]["critic"])} <= {"pools-a", "pools-b"}
    # The node of the critic dies while the run goes on.
    (lost,) = labels(before["replicas"]["critic"])
    (kept,) = {"pools-a", "pools-b"} - {lost}
    assert raylets.process.stdin is not None
    raylets.process.stdin.write(f"remove {lost}\n")
    raylets.process.stdin.flush()
    raylets.wait_for("removed ")
    assert sitting.process.wait(timeout=400) == 0, sitting.output[-3000:]
    finished(run)
    after = notes(run, NUM_ITERATIONS)
    assert after is not None
    assert {label for pool in after["replicas"].values() for label in labels(pool)} == {kept}
    assert {len(after["replicas"][pool]) for pool in ("attacker", "critic")} == {1}
    assert_weights_crossed(run)


def assert_weights_crossed(run: Path) -> None:
    """Check that every answer was made with the weights that the ranks published last, and that none was lost."""
    for row in read_metrics(run):
        assert row.lost == {}
        assert row.training["num_steps"] > 0, "no batch reached the ranks"
        answers = from_table(read_stage(run, "responses", iteration=row.iteration), Response)
        assert {answer.policy_version for answer in answers} == {f"v{row.iteration - 1}"}


# ------------------------------------------------------------------------------------------------------- two hosts

SUBNET = "10.231.77"
"""Of the cable between the two hosts; in namespaces of their own, it is in nobody's way."""


def ip(*words: str) -> None:
    """Run iproute2.

    Raises:
        subprocess.CalledProcessError: it refused; its words are in `stderr`.
    """
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Give two network namespaces that only a cable joins: a has the address SUBNET.1, b SUBNET.2."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need network namespaces: there is no `ip` (iproute2) here")
    a, b = (f"el{os.getpid()}{side}" for side in "ab")
    try:
        ip("netns", "add", a)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two hosts need network namespaces: {error.stderr.strip()}")
    try:
        ip("netns", "add", b)
        ip("link", "add", f"{a}v", "netns", a, "type", "veth", "peer", "name", f"{b}v", "netns", b)
        for number, host in enumerate((a, b), start=1):
            ip("-n", host, "addr", "add", f"{SUBNET}.{number}/24", "dev", f"{host}v")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", f"{host}v", "up")
            # Ray asks the routes for this host's own address.
            ip("-n", host, "route", "add", "default", "via", f"{SUBNET}.{3 - number}")
        yield a, b
    finally:
        for host in (a, b):
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def ray_start(start: Callable[..., Process], host: str, *words: str, number: int, cpus: int) -> Process:
    """Start a Ray node on a host."""
    return start(
        f"ray-{number}",
        *("ip", "netns", "exec", host, str(Path(sys.executable).parent / "ray"), "start", "--block"),
        *(f"--node-ip-address={SUBNET}.{number}", f"--num-cpus={cpus}", f"--object-store-memory={100 << 20}"),
        f"--labels=elenchus/node=host-{number}",
        *words,
    )


def test_two_hosts_with_addresses_of_their_own_train_one_learner(
    place: Path, start: Callable[..., Process], hosts: tuple[str, str]
) -> None:
    address = f"{SUBNET}.1:6379"
    head = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={place / 'ray'}"]
    ray_start(start, hosts[0], *head, number=1, cpus=1).wait_for("Ray runtime started.")
    ray_start(start, hosts[1], f"--address={address}", number=2, cpus=2).wait_for("Ray runtime started.")
    # The driver on the first host, a rank on each, the pools on the second.
    config_for(place, address=address, learner="in(host-1,host-2)", pools="host-2", num_rollouts=1)
    path = place / "nodes.toml"
    path.write_text(path.read_text().replace("[learner.training]\n", '[learner.training]\narrangement = "spread"\n'))
    run = place / "runs" / "hosts"
    command = [sys.executable, "-m", "tests.noted_sitting", "run", "nodes.toml", "--name", "hosts"]
    sitting = start("sitting", "ip", "netns", "exec", hosts[0], *command)
    assert sitting.process.wait(timeout=900) == 0, sitting.output[-3000:]
    finished(run)
    found = notes(run, NUM_ITERATIONS)
    assert found is not None
    assert found["driver"]["address"] == f"{SUBNET}.1"
    assert sorted(rank["address"] for rank in found["ranks"]) == [f"{SUBNET}.1", f"{SUBNET}.2"]
    assert {place["address"] for pool in found["replicas"].values() for place in pool} == {f"{SUBNET}.2"}
    assert_weights_crossed(run)


# ------------------------------------------------------------------------------------------------------ shared GPUs


def test_a_rank_and_the_engine_that_takes_turns_with_it_are_on_one_gpu(
    place: Path, start: Callable[..., Process], tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "model")
    process = start("shared", sys.executable, "-m", "tests.shared_gpus", str(model))
    assert process.process.wait(timeout=400) == 0, process.output[-3000:]
    found = json.loads(process.output.splitlines()[-1])
    assert [seat["ids"] for seat in found["ranks"]] == [[0], [1], [2], [3]]
    assert [seat["ids"] for seat in found["rollouts"]] == [[0], [1]]
    # The actor of a tensor-parallel engine has no GPU; vLLM's workers are told which bundles are theirs, and how much.
    assert found["critic"] == [{"ids": [], "told": ["2,3", "0.5"]}]
    assert found["after a death"] == [{"ids": [0], "told": ["0", "0.5"]}]
    # All four are taken, and stay so when the ranks are gone: they are not the ranks' to give back.
    assert (found["free"], found["still"]) == (0.0, 0.0)
