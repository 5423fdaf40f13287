"""Starting, joining and leaving Ray; placement groups; the run's log file."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import grpc
import psutil
import pytest
import ray

from cluster.log import Redaction, start_log
from cluster.placement import PlacementTimeout, inside, place_gang, place_replica, release
from cluster.ray_runtime import PROJECT_ROOT, RayConfig, ensure_token, start_ray


def run_python(script: str, *, environment: dict[str, str], timeout_s: float = 120) -> str:
    """Run a script in a process of its own, for this one is connected to the session's Ray; return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=PROJECT_ROOT,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------- Ray


def test_a_local_ray_is_closed_to_others_and_leaves_nothing(short_tmp_path: Path) -> None:
    script = """
        import json, os, stat
        from pathlib import Path
        import psutil, ray
        from cluster.ray_runtime import RayConfig, start_ray
        parent = Path(os.environ["PARENT"])
        runtime = start_ray(RayConfig(num_cpus=2, object_store_gb=0.1, temp_dir=parent, token_path=parent / "token"))

        @ray.remote(num_cpus=0.01)
        def imported():
            import cluster.placement
            return os.environ["RAY_AUTH_MODE"]

        worker_mode = ray.get(imported.remote())
        ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
        ports = {c.laddr.ip for p in ours for c in p.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN}
        mode = stat.S_IMODE((parent / "token").stat().st_mode)
        session_dir = runtime.session_dir
        runtime.stop()
        runtime.stop()
        print(json.dumps({
            "worker_mode": worker_mode, "ports": sorted(ports), "token": oct(mode), "is_local": runtime.is_local,
            "initialized": ray.is_initialized(), "children": len(psutil.Process().children(recursive=True)),
            "session_dir": session_dir.exists(), "address": runtime.address, "start_s": runtime.start_s,
        }))
    """
    parent = short_tmp_path / "own"
    found = json.loads(run_python(script, environment={"PARENT": str(parent)}).splitlines()[-1])
    assert found["worker_mode"] == "token"
    assert set(found["ports"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert found["address"].startswith("127.0.0.1:")
    assert found["token"] == "0o600"
    assert found["is_local"]
    assert (found["initialized"], found["children"], found["session_dir"]) == (False, 0, False)


def test_a_cluster_is_joined_by_address_with_the_token_and_not_without(ray_session: str, short_tmp_path: Path) -> None:
    join = """
        from cluster.ray_runtime import RayConfig, start_ray
        runtime = start_ray(RayConfig(namespace="joined"))
        print(runtime.address, runtime.is_local)
        runtime.stop()
    """
    token = {"RAY_ADDRESS": ray_session, "RAY_AUTH_TOKEN_PATH": str(short_tmp_path / "token")}
    assert run_python(join, environment=token).split()[-2:] == [ray_session, "False"]
    assert ray.is_initialized()
    # A stranger's call, at the wire: no token in its metadata.
    with grpc.insecure_channel(ray_session) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        with pytest.raises(grpc.RpcError) as caught:
            ask(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_ray_that_was_too_slow_to_start_is_started_once_more(short_tmp_path: Path) -> None:
    script = """
        import os
        from pathlib import Path
        import psutil, ray
        from cluster.ray_runtime import RayConfig, start_ray
        parent, begun, real = Path(os.environ["PARENT"]), [], ray.init

        def slow(*arguments, **keywords):
            begun.append(keywords["_temp_dir"])
            context = real(*arguments, **keywords)
            if len(begun) == 1:
                raise Exception("The current node timed out during startup. This could happen because ...")
            return context

        ray.init = slow
        runtime = start_ray(RayConfig(num_cpus=2, object_store_gb=0.1, temp_dir=parent, token_path=parent / "token"))
        first = [p for p in psutil.Process().children(recursive=True) if begun[0] in " ".join(p.cmdline())]
        session_dir = str(runtime.session_dir)
        runtime.stop()
        print(len(begun), len(first), os.path.exists(begun[0]), begun[1] == session_dir)
    """
    found = run_python(script, environment={"PARENT": str(short_tmp_path / "own")})
    assert found.splitlines()[-1] == "2 0 False True"


def test_an_open_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE: got 'disabled', wanted 'token' or nothing"):
        start_ray(RayConfig())


def test_a_directory_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="has 55 characters, wanted at most 45"):
        start_ray(RayConfig(temp_dir=Path("/tmp/" + "x" * 50)))


def test_a_second_connection_is_refused(ray_session: str) -> None:
    with pytest.raises(RuntimeError, match="connected to a Ray cluster already"):
        start_ray(RayConfig(address=ray_session))


def test_a_token_is_made_for_its_owner_alone_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "token"
    assert ensure_token(path) == path
    token = path.read_text()
    assert len(token) == 64
    path.chmod(0o644)
    ensure_token(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == token


def test_an_empty_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    with pytest.raises(ValueError, match="the Ray token is empty"):
        ensure_token(tmp_path / "token")


# ----------------------------------------------------------------------------------------------------------- placement


@ray.remote(num_cpus=0.1)
class Sitter:
    """An actor that sits in a bundle."""

    def pid(self) -> int:
        return os.getpid()


@pytest.mark.usefixtures("ray_session")
def test_releasing_a_group_kills_the_actor_in_it() -> None:
    group = place_replica([{"CPU": 0.1}], pool="one", timeout_s=20)
    sitter = Sitter.options(scheduling_strategy=inside(group)).remote()
    process = psutil.Process(ray.get(sitter.pid.remote(), timeout=40))
    release(group)
    assert process.wait(timeout=20) is None or not process.is_running()


@pytest.mark.usefixtures("ray_session")
def test_a_gang_is_placed_whole_or_says_what_is_missing() -> None:
    group = place_gang([{"CPU": 0.1}, {"CPU": 0.1}], strategy="PACK", timeout_s=20)
    assert len(group.bundle_specs) == 2
    release(group)
    with pytest.raises(PlacementTimeout, match=r"'big' got no room within 0.5 s: CPU wanted 64, free .* of 2; "):
        place_gang([{"CPU": 32}, {"CPU": 32}], name="big", timeout_s=0.5)
    with pytest.raises(PlacementTimeout, match="STRICT_SPREAD, on 1 node"):
        place_gang([{"CPU": 0.1}, {"CPU": 0.1}], strategy="STRICT_SPREAD", timeout_s=0.5)
    with pytest.raises(ValueError, match="every bundle must ask for something"):
        place_gang([{"CPU": 0.0}])


# ----------------------------------------------------------------------------------------------------------------- log


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "log.txt"


def test_libraries_go_to_the_file_alone_and_our_warnings_to_both(
    log_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("vllm.engine")
    library.addHandler(logging.StreamHandler(sys.stderr))
    log = start_log(log_path)
    try:
        library.warning("library speaks")
        logging.getLogger("cluster.pool").warning("we warn")
        logging.getLogger("cluster.pool").info("we inform")
    finally:
        log.close()
    assert capsys.readouterr().err == "WARNING we warn\n"
    text = log_path.read_text()
    assert [line.split(": ", 1)[1] for line in text.splitlines()] == ["library speaks", "we warn", "we inform"]


def test_secrets_are_not_logged(log_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    log = start_log(log_path, console_level=None)
    try:
        logger = logging.getLogger("cluster.test")
        logger.warning("key is %s", "correct-horse-battery")
        logger.warning("header Authorization: Bearer abcdefgh12345678")
        logger.warning("api_key=abcdef123456, max_tokens=4096")
        try:
            raise RuntimeError("with correct-horse-battery inside")
        except RuntimeError:
            logger.exception("failed")
    finally:
        log.close()
    text = log_path.read_text()
    assert "correct-horse-battery" not in text
    assert "abcdef" not in text
    assert "max_tokens=4096" in text
    assert text.count("[redacted]") == 5  # one per line, and the source line in the traceback


def test_redaction_leaves_ordinary_text_alone() -> None:
    text = "replica 3 generated 1,024 tokens; token_ids=[1, 2, 3]; the password policy"
    assert Redaction().redact(text) == text
