"""Owns the commands around the endpoint: serve, promote, rollback and key; what they say goes to `tell`.

    elenchus serve NAME         the endpoint of a run, until Ctrl-C; follows the run's commits
    elenchus promote NAME v7    serve a version from now on, whatever the run commits; `newest` follows again
    elenchus rollback NAME      serve the version before
    elenchus key NAME           make, list or revoke keys

Imports what a command needs only when it runs.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import tyro

if TYPE_CHECKING:
    from actors.engine_config import EngineConfig
    from trainers.serving_config import ServingConfig

Tell = Callable[[str], None]

ENDPOINT_FILE = "endpoint.json"
"""Where a run's endpoint listens, and which process keeps it."""
LOOK_S = 1.0
OBJECT_STORE_GB = 0.25
VERSIONS_IN_STORE = 5
"""Served, tried, before, and two that are pinned."""


@dataclass(frozen=True)
class Serve:
    """Serve a run's learner to OpenAI clients, the newest version at any time, until Ctrl-C."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    host: str | None = None
    """Address to listen on, by default the config's, 127.0.0.1; beyond loopback only after `elenchus key`."""
    port: int | None = None
    """Port to listen on, by default the config's, 8000."""
    replicas: int | None = None
    """Engines when nothing is asked; by default the config's, 1."""
    max_replicas: int | None = None
    """Most engines; their number follows the load. By default the config's, or as many as --replicas."""
    address: str | None = None
    """A Ray cluster to join, such as auto; without it a local Ray is started."""


@dataclass(frozen=True)
class Promote:
    """Have a version of the learner served from now on, whatever the run commits."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    version: tyro.conf.Positional[str]
    """A committed version, such as v7; `newest` follows the run's commits again."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    timeout_s: float = 120.0
    """How long to wait for the endpoint to serve it; what was asked stands all the same."""


@dataclass(frozen=True)
class Rollback:
    """Have the version served that was served before."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    timeout_s: float = 120.0
    """How long to wait for the endpoint to serve it."""


@dataclass(frozen=True)
class Key:
    """Make a key for a run's endpoint and show it once; or list or revoke keys."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    label: str | None = None
    """Whose key it is; makes one."""
    requests_per_minute: int = 600
    """Requests that the key may send in a minute."""
    max_concurrent: int = 64
    """Requests of the key that may be open at once."""
    revoke: str | None = None
    """Id of a key to shut out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An endpoint that is alive."""

    url: str
    pid: int


def serve(command: Serve, run_dir: Path, *, tell: Tell) -> int:
    """Serve a run until Ctrl-C and return the exit code.

    Raises:
        ValueError: the run has committed nothing, is served already, or the address can't be had.
    """
    from cluster.config import Settings, validated
    from serve.address import check_address
    from serve.publisher import wanted_version
    from trainers.run_config import read_resolved
    from trainers.serving_config import ServingConfig

    config = read_resolved(run_dir / "resolved.json")
    version = wanted_version(run_dir)
    asked = {
        "host": command.host,
        "port": command.port,
        "min_replicas": command.replicas,
        "max_replicas": command.max_replicas,
    }
    values = {key: value for key, value in asked.items() if value is not None}
    serving_config = validated(ServingConfig, Settings(values={**config.serve.model_dump(), **values}))
    running = living_endpoint(run_dir)
    if running is not None:
        raise ValueError(_second(run_dir, running))
    check_address(run_dir, serving_config)
    from cluster.ray_runtime import RayConfig, start_ray
    from serve.front import front_environment

    # Of a Ray that is started here; the nodes of another one have what they were started with.
    os.environ.update(front_environment(serving_config))

    num = serving_config.min_replicas
    tell(f"● serving {command.name} {version}: starting {num} engine{'s' * (num > 1)} …")
    runtime = start_ray(
        RayConfig(
            address=command.address or "local",
            namespace=f"elenchus-serve-{command.name}",
            object_store_gb=OBJECT_STORE_GB + VERSIONS_IN_STORE * _largest_gb(run_dir / "policies"),
            temp_dir=config.ray.temp_dir,
            token_path=config.ray.token_path,
            ship_code=command.address is not None and config.ray.ship_code,
        )
    )
    try:
        with _stopped_by_signals() as is_stopped:
            keep_endpoint(
                run_dir,
                serving_config,
                engine=config.rollouts.engine,
                parity_bound=config.loop.parity_bound,
                whole_serve=runtime.is_local,
                is_stopped=is_stopped,
                tell=tell,
            )
    finally:
        runtime.stop()
    tell("stopped; nothing of it is left")
    return 0


def keep_endpoint(
    run_dir: Path,
    config: ServingConfig,
    *,
    engine: EngineConfig,
    parity_bound: float,
    whole_serve: bool,
    is_stopped: Callable[[], bool],
    tell: Tell,
    tells_versions: bool = True,
) -> None:
    """Serve a run on the Ray that this process is connected to until `is_stopped`, and take it down.

    Args:
        run_dir: has a commit.
        config: where it listens, with how many replicas.
        engine: the rollouts' settings.
        parity_bound: nats by which an engine may differ from the learner.
        whole_serve: nobody else uses this cluster's Ray Serve.
        is_stopped: asked once a second.
        tell: is told where the endpoint is, and which versions are refused.
        tells_versions: and which are promoted.

    Raises:
        ValueError: the address can't be had.
        RuntimeError: the deployment failed.
    """
    from serve.address import LOOPBACK
    from serve.auth import ensure_local_key
    from serve.learner_app import start_serving
    from serve.publisher import read_state

    key_file = ensure_local_key(run_dir) if config.host in LOOPBACK else None
    log_path = run_dir / "serve.log"
    serving = start_serving(run_dir, config, engine=engine, parity_bound=parity_bound, log_path=log_path)
    try:
        _write_endpoint(run_dir, url=serving.url)
        key = f"key in {key_file}" if key_file is not None else f"keys by `elenchus key {run_dir.name}`"
        # The run may have gone on while engines started.
        version = str(read_state(run_dir).get("current", serving.version))
        tell(f"● {serving.url} · model learner = {version} · {key} · ready in {serving.start_s:.0f} s")
        _follow(run_dir, is_stopped, tell=tell, served=version, tells_versions=tells_versions)
    finally:
        (run_dir / ENDPOINT_FILE).unlink(missing_ok=True)
        serving.stop(whole_serve=whole_serve)


def promote(command: Promote, run_dir: Path, *, tell: Tell) -> int:
    """Have a version served, wait for the endpoint to do so, and return the exit code.

    Raises:
        ValueError: there is no such version.
    """
    from serve.publisher import want_version

    return _await_version(run_dir, want_version(run_dir, command.version), timeout_s=command.timeout_s, tell=tell)


def rollback(command: Rollback, run_dir: Path, *, tell: Tell) -> int:
    """Have the version before served, wait for the endpoint to do so, and return the exit code.

    Raises:
        ValueError: there is none before.
    """
    from serve.publisher import previous_version, want_version

    version = want_version(run_dir, previous_version(run_dir))
    return _await_version(run_dir, version, timeout_s=command.timeout_s, tell=tell)


def key(command: Key, run_dir: Path, *, tell: Tell) -> int:
    """Make, list or revoke keys, and return the exit code.

    Raises:
        ValueError: --label beside --revoke, no such key, or a limit below 1.
    """
    from serve.auth import add_key, read_keys, revoke_key

    if command.label is not None and command.revoke is not None:
        raise ValueError("key: got --label beside --revoke, wanted one of the two: make a key, or shut one out")
    if command.revoke is not None:
        gone = revoke_key(run_dir, command.revoke)
        tell(f"{gone.key_id} ({gone.label}) is refused from now on")
    elif command.label is not None:
        _, secret = add_key(
            run_dir,
            label=command.label,
            requests_per_minute=command.requests_per_minute,
            max_concurrent=command.max_concurrent,
        )
        tell(secret)
    else:
        for known in read_keys(run_dir):
            made = time.strftime("%Y-%m-%d", time.localtime(known.created))
            limits = f"{known.requests_per_minute} a minute, {known.max_concurrent} at once"
            tell(f"{known.key_id}  {'revoked' if known.revoked else limits:<28}  {made}  {known.label}")
    return 0


def living_endpoint(run_dir: Path) -> Endpoint | None:
    """Return a run's endpoint on this machine; None when there is none, or its process has died."""
    try:
        said: dict[str, Any] = json.loads((run_dir / ENDPOINT_FILE).read_bytes())
        process = psutil.Process(int(said["pid"]))
        if abs(process.create_time() - float(said["process_created"])) > 1.0:
            return None
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return Endpoint(url=str(said["url"]), pid=int(said["pid"]))


def _write_endpoint(run_dir: Path, *, url: str) -> None:
    from cluster.durable_files import write_json_atomic

    own = psutil.Process()
    said = {"url": url, "pid": own.pid, "process_created": own.create_time(), "time": time.time()}
    write_json_atomic(run_dir / ENDPOINT_FILE, said)


def _second(run_dir: Path, running: Endpoint) -> str:
    return f"{run_dir}: got a second endpoint, the first is at {running.url} (pid {running.pid}); stop that one"


def _follow(run_dir: Path, is_stopped: Callable[[], bool], *, tell: Tell, served: str, tells_versions: bool) -> None:
    """Say which version is served and which are refused, until the signal comes."""
    from serve.publisher import read_state

    refused: set[str] = set(read_state(run_dir).get("refused", {}))
    while not is_stopped():
        time.sleep(LOOK_S)
        state = read_state(run_dir)
        if state.get("current") != served:
            served = str(state["current"])
            if tells_versions:
                tell(f"● learner = {served}")
        for version, reason in state.get("refused", {}).items():
            if version not in refused:
                refused.add(version)
                tell(f"! {version} is refused, {served} goes on: {reason}")


def _await_version(run_dir: Path, version: str, *, timeout_s: float, tell: Tell) -> int:
    from serve.publisher import read_state

    if living_endpoint(run_dir) is None:
        tell(f"{version} will be served: begin by `elenchus serve {run_dir.name}`")
        return 0
    ends_by = time.monotonic() + timeout_s
    while time.monotonic() < ends_by:
        state = read_state(run_dir)
        if state.get("current") == version:
            tell(f"learner = {version}")
            return 0
        if version in state.get("refused", {}):
            tell(f"✗ {version} is refused, {state['current']} goes on: {state['refused'][version]}")
            return 1
        time.sleep(0.1)
    tell(f"✗ {version} is not served after {timeout_s:g} s; {run_dir / 'serve.log'} says why. What was asked stands")
    return 1


def _largest_gb(policies: Path) -> float:
    """Return the size of the newest policy's weights in GiB."""
    newest = max(policies.glob("v*"), default=None)
    files = newest.glob("*.safetensors") if newest is not None else ()
    return sum(file.stat().st_size for file in files) / (1 << 30)


@contextmanager
def _stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Give what tells whether SIGINT or SIGTERM came, in the place of what they would do."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            os._exit(130)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
