"""Owns the connection to Ray: a local cluster on loopback with token authentication, or an existing one by address.

A local cluster lives in a session directory of its own under the temporary directory. After `stop` nothing of it is
left: no process, nothing in /dev/shm, no directory.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants, services
from ray._private import worker as ray_worker
from ray._raylet import Config as RayletConfig  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from cluster.ray_config import RayConfig as RayConfig
from cluster.ray_config import address_to_join

logger = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds the flat packages; workers must be able to import from it."""

MAX_TEMP_DIR_CHARS = 45
"""Ray puts sockets some 60 characters below its directory, and a Unix socket's path ends at 107."""

TOO_SLOW = "timed out during startup"
"""How Ray (2.60) says that its processes were not up in time; it raises a bare Exception."""
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

ANSWER_DEADLINE_S = 5.0
"""Longest time for a cluster's address to answer a first call."""


@dataclass(slots=True)
class RayRuntime:
    """A connection to Ray."""

    address: str
    is_local: bool
    """True when this process started the cluster and `stop` will end it."""
    dashboard_url: str | None
    """None when there is no dashboard."""
    session_dir: Path | None
    """Where a local Ray writes its logs; None for a joined cluster."""
    start_s: float
    """Seconds that the start took."""
    _restore: dict[str, str | None] = field(default_factory=dict)
    _shm_before: frozenset[str] = frozenset()

    def stop(self) -> None:
        """Disconnect; end a local cluster with everything that belongs to it. A second call does nothing."""
        if ray.is_initialized():
            processes = psutil.Process().children(recursive=True) if self.is_local else []
            ray_processes = [process for process in processes if _is_ray_process(process)]
            # A worker's own children (engine processes) die later than it, or not at all when they were orphaned.
            below = [child for process in ray_processes for child in _children(process)]
            ray.shutdown()
            _end_processes([*ray_processes, *below])
        if self.is_local:
            if self.session_dir is not None:
                shutil.rmtree(self.session_dir, ignore_errors=True)
            _remove_own_shm(self._shm_before)
        _set_environment(self._restore)
        self._restore = {}


def start_ray(config: RayConfig) -> RayRuntime:
    """Start a local Ray, or join the one at `config.address` or RAY_ADDRESS, and return the connection.

    Raises:
        ValueError: authentication is switched off, the token file can't be used, the temporary directory's path is too
            long, or the cluster to be joined is not there, knows another token or runs another version.
        RuntimeError: this process is connected to Ray already.
        ConnectionError: the cluster answered, but Ray can't connect.
    """
    if ray.is_initialized():
        raise RuntimeError("this process is connected to a Ray cluster already; call stop() on it first")
    address = reachable_cluster(config)
    return _start_local_patiently(config) if address is None else _join(config, address=address)


def reachable_cluster(config: RayConfig) -> str | None:
    """Return the address of the cluster to be joined, which answers and knows our token; None to start a local Ray.

    Ray itself (2.60) prints a warning every second and gives up after 20 s when the token is wrong, and waits for ever
    where nothing listens.

    Raises:
        ValueError: nothing answers at the address, or not with this token; says what to set.
    """
    address = address_to_join(config)
    if address is None:
        return None
    if config.token_path is not None and not config.token_path.is_file():
        raise ValueError(f"ray.token_path: no file {config.token_path}, wanted the one that holds the cluster's token")
    where = f'{_address_key(config)}: got "{address}"'
    if address == "auto":
        address = _only_cluster_here(config, where=where)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f'{where}, wanted "host:port", "ray://host:port" or "auto"')
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_DEADLINE_S).close()
    except OSError as error:
        raise ValueError(
            f"{where}, where nothing answers ({error.strerror or error}), wanted the address of a running Ray: start "
            "one there by `ray start --head`, or leave the address out for a local one"
        ) from None
    if not address.startswith("ray://") and os.environ.get("RAY_USE_TLS", "0") != "1":
        _check_token(address, token=_token(config), where=where)
    return address


def _only_cluster_here(config: RayConfig, *, where: str) -> str:
    """Return the address of the Ray of this machine: what `ray start` wrote down, or the only one that runs."""
    running = sorted(services.find_gcs_addresses())
    started = services.find_bootstrap_address(None if config.temp_dir is None else str(config.temp_dir))
    if started in running:
        return str(started)
    if len(running) == 1:
        return str(running[0])
    there = f"{len(running)} Rays on this machine ({', '.join(running[:3])})" if running else "no Ray on this machine"
    raise ValueError(
        f"{where} and {there}, wanted one: "
        + ("give the address of one" if running else "start it by `ray start --head`, or leave the address out")
    )


def _check_token(address: str, *, token: str | None, where: str) -> None:
    import grpc

    # Ray's own channels ignore a proxy too.
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            ask(b"", timeout=ANSWER_DEADLINE_S, metadata=(("authorization", f"Bearer {token}"),) if token else ())
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise ValueError(
                    f"{where}, where something answers that is no Ray ({error.code().name}), wanted the address of a "
                    "running Ray, as `ray start --head` prints it"
                ) from None
            got = "a token that it does not know" if token else "no token"
            raise ValueError(
                f"{where} and {got}, wanted that cluster's: set ray.token_path to a file that holds it, or export "
                "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN (on its head node `ray get-auth-token` prints it)"
            ) from None


def worker_stderr(*, pid: int, num_lines: int = 20) -> str:
    """Return the last lines that a Ray worker of this node wrote to stderr; empty when its file can't be found here.

    `ActorDiedError` carries none of it, and Ray's own log API needs the dashboard.
    """
    node = ray_worker._global_node  # no public way to the log directory without the dashboard (Ray 2.60)
    if node is None:
        return ""
    files = sorted(Path(node.get_logs_dir_path()).glob(f"worker-*-{pid}.err"))
    if not files:
        return ""
    with files[-1].open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - 32_768))
        text = stream.read().decode("utf-8", errors="replace")
    # Ray's own markers (":job_id:01000000") say nothing.
    return "\n".join([line for line in text.splitlines() if not line.startswith(":")][-num_lines:])


def _start_local_patiently(config: RayConfig) -> RayRuntime:
    """Start a local Ray, and once more where the first was too slow.

    Ray gives its own processes 30 s to come up, a fixed number (2.60), which a machine busy with other work can exceed.
    """
    try:
        return _start_local(config)
    except Exception as error:
        if TOO_SLOW not in str(error):
            raise
        logger.warning("Ray took more than 30 s to start, as it does on a machine that is very busy; once more")
        return _start_local(config)


def _start_local(config: RayConfig) -> RayRuntime:
    _refuse_open_cluster()
    parent = config.temp_dir or Path(tempfile.gettempdir())
    if len(str(parent.resolve())) > MAX_TEMP_DIR_CHARS:
        raise ValueError(
            f"ray.temp_dir: {parent} has {len(str(parent.resolve()))} characters, wanted at most {MAX_TEMP_DIR_CHARS} "
            '(Unix sockets have short paths); set ray.temp_dir = "/tmp"'
        )
    started = time.monotonic()
    parent.mkdir(parents=True, exist_ok=True)
    session_dir = Path(tempfile.mkdtemp(prefix="elenchus-", dir=parent))
    token_path = ensure_token(config.token_path)
    python_path = os.environ.get("PYTHONPATH", "")
    environment: dict[str, str | None] = {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else every Ray process listens on all interfaces, even with 127.0.0.1 as the node's address (Ray 2.60).
        LOOPBACK_SWITCH: "0",
        "PYTHONPATH": os.pathsep.join([str(PROJECT_ROOT), *([python_path] if python_path else [])]),
        **({} if token_path is None else {"RAY_AUTH_TOKEN_PATH": str(token_path)}),
    }
    shm_before = frozenset(shm_files())
    restore = _set_environment(environment)
    _quiet_ray_logger()
    try:
        _use_loopback(True)
        _reread_environment()
        context: Any = ray.init(
            address="local",
            num_cpus=config.num_cpus or len(os.sched_getaffinity(0)),
            object_store_memory=int(config.object_store_gb * (1 << 30)),
            include_dashboard=config.dashboard,
            dashboard_host="127.0.0.1",
            dashboard_port=config.dashboard_port if config.dashboard else None,
            namespace=config.namespace,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=str(session_dir),
        )
    except BaseException:
        ray.shutdown()
        # Of a start that failed half-way Ray itself leaves processes behind.
        _end_processes([p for p in _children(psutil.Process()) if str(session_dir) in _command(p)])
        _set_environment(restore)
        shutil.rmtree(session_dir, ignore_errors=True)
        raise
    finally:
        _use_loopback(False)
    runtime = RayRuntime(
        address=context.address_info["gcs_address"],
        is_local=True,
        dashboard_url=f"http://{context.dashboard_url}" if context.dashboard_url else None,
        session_dir=session_dir,
        start_s=time.monotonic() - started,
        _restore=restore,
        _shm_before=shm_before,
    )
    logger.info("local Ray at %s in %.1f s, logs in %s", runtime.address, runtime.start_s, session_dir)
    return runtime


def _join(config: RayConfig, *, address: str) -> RayRuntime:
    started = time.monotonic()
    environment: dict[str, str | None] = {"RAY_USAGE_STATS_ENABLED": "0"}
    if config.token_path is not None:
        environment["RAY_AUTH_TOKEN_PATH"] = str(config.token_path)
    if "RAY_AUTH_MODE" not in os.environ and _token(config) is not None:
        environment["RAY_AUTH_MODE"] = "token"
    on_loopback = address.removeprefix("ray://").startswith(("127.", "localhost:", "[::1]:"))
    if on_loopback:
        environment[LOOPBACK_SWITCH] = "0"  # else Ray looks for it at this node's outer address, and waits for minutes
    restore = _set_environment(environment)
    _quiet_ray_logger()
    # Excludes are Ray's gitignore-like patterns; without them the virtual environment would be sent.
    shipped = {
        "working_dir": str(PROJECT_ROOT),
        "excludes": ["/.git", "/.venv", "/runs", "/tests", "/docs", "*.safetensors", "*.parquet"],
    }
    try:
        _use_loopback(on_loopback)
        _reread_environment()
        context: Any = ray.init(
            address=address,
            namespace=config.namespace,
            log_to_driver=False,
            configure_logging=False,
            runtime_env=shipped if config.ship_code else None,
        )
    except BaseException as error:
        ray.shutdown()
        _set_environment(restore)
        refusal = _refusal(error, where=f'{_address_key(config)}: got "{address}"')
        if refusal is not None:
            raise ValueError(refusal) from error
        raise
    finally:
        _use_loopback(False)
    return RayRuntime(
        address=context.address_info["gcs_address"],
        is_local=False,
        dashboard_url=f"http://{context.dashboard_url}" if context.dashboard_url else None,
        session_dir=None,
        start_s=time.monotonic() - started,
        _restore=restore,
    )


def _address_key(config: RayConfig) -> str:
    return "ray.address" if config.address else "RAY_ADDRESS"


def _refusal(error: BaseException, *, where: str) -> str | None:
    """Return what the user can do about a cluster that can't be joined; None when it is no fault of theirs."""
    if isinstance(error, AuthenticationError):
        return (
            f"{where} and no token while RAY_AUTH_MODE asks for one, wanted that cluster's: set "
            "ray.token_path to a file that holds it, or export RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        )
    versions = re.findall(r"(?:Ray|Python): (\S+)", str(error))
    if isinstance(error, RuntimeError) and str(error).startswith("Version mismatch") and len(versions) == 4:
        there, here = versions[:2], versions[2:]
        return (
            f"{where}, which runs Ray {there[0]} on Python {there[1]}, wanted Ray {here[0]} on "
            f"Python {here[1]} as here: install the same on both sides"
        )
    return None


def ensure_token(path: Path | None = None) -> Path | None:
    """Make sure that a token exists in a file that its owner alone can read, and return the file.

    None means that RAY_AUTH_TOKEN itself holds the token, and no file is used.

    Raises:
        ValueError: the file belongs to somebody else, or is empty.
    """
    if path is None:
        if os.environ.get("RAY_AUTH_TOKEN"):
            return None
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        found = path.stat()
        if found.st_uid != os.getuid():
            raise ValueError(
                f"{path}: the Ray token belongs to user {found.st_uid}, wanted {os.getuid()}; set RAY_AUTH_TOKEN_PATH"
            ) from None
        if found.st_size == 0:
            raise ValueError(f"{path}: the Ray token is empty; delete the file, and a new one is made") from None
        if stat.S_IMODE(found.st_mode) != 0o600:
            path.chmod(0o600)  # Ray itself writes it readable for everybody
        return path
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_hex(32))
    return path


def _refuse_open_cluster() -> None:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        raise ValueError(
            f"RAY_AUTH_MODE: got {mode!r}, wanted 'token' or nothing, for an open Ray runs anybody's code; unset it"
        )


def _use_loopback(wanted: bool) -> None:
    """Set what Ray read from LOOPBACK_SWITCH when it was imported, for the duration of an init."""
    ray_constants.ENABLE_RAY_CLUSTER = not wanted


def _reread_environment() -> None:
    """Have Ray's C++ side see RAY_AUTH_MODE, which it read when Ray was imported."""
    RayletConfig.initialize("")


def _token(config: RayConfig) -> str | None:
    """Return the token that Ray will send, from where Ray takes it; None when there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = config.token_path or (Path(named) if named else Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() or None if path.is_file() else None


def _quiet_ray_logger() -> None:
    """Keep Ray's notices off the terminal; they still reach the run's log through the root logger."""
    ray_logger = logging.getLogger("ray")
    for handler in list(ray_logger.handlers):
        ray_logger.removeHandler(handler)
    ray_logger.propagate = True
    ray_logger.setLevel(logging.WARNING)
    if not logging.getLogger().handlers:
        ray_logger.addHandler(logging.NullHandler())
    # Ray prints "(raylet) A worker died …" to stdout even with log_to_driver=False (2.60).
    ray_worker.print_to_stdstream = _log_ray_message


def _log_ray_message(data: dict[str, Any], ignore_prefix: bool) -> None:
    logger.info("%s: %s", data.get("pid"), " ".join(data.get("lines", [])))


def _set_environment(values: dict[str, str | None]) -> dict[str, str | None]:
    """Set variables (None unsets) and return what they were."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _is_ray_process(process: psutil.Process) -> bool:
    command = _command(process)
    return command.startswith("ray::") or f"{os.sep}ray{os.sep}" in command or "raylet" in command


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _end_processes(processes: list[psutil.Process]) -> None:
    """Wait for processes to leave by themselves, then kill the rest; psutil checks that a pid was not reused."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        try:
            logger.warning("process %d outlived Ray, killing it", process.pid)
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5)


def shm_files() -> set[str]:
    folder = Path("/dev/shm")
    return {entry.name for entry in folder.iterdir()} if sys.platform == "linux" and folder.is_dir() else set()


def _remove_own_shm(before: frozenset[str]) -> None:
    """Remove what killed engines left in shared memory: new files of ours that no living process maps."""
    left = [Path("/dev/shm") / name for name in shm_files() - before]
    ours = [path for path in left if path.name.startswith(("psm_", "sem.mp-", "torch_")) and _is_mine(path)]
    if not ours:
        return
    mapped = mapped_shm()
    for path in ours:
        if str(path) not in mapped:
            logger.warning("removing %s, left behind by a killed process", path)
            path.unlink(missing_ok=True)


def _is_mine(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def mapped_shm() -> set[str]:
    """Return the /dev/shm files that any process of this user maps."""
    mapped: set[str] = set()
    for process in psutil.process_iter():
        try:
            mapped.update(area.path for area in process.memory_maps() if area.path.startswith("/dev/shm/"))
        except (psutil.Error, OSError):
            continue
    return mapped
