"""Shared fixtures: one local Ray for the whole session, `slow` handling, and a check that nothing is left behind."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.ray_runtime import RayConfig, mapped_shm, shm_files, start_ray
from serve.front import front_environment
from tests.endpoint_load import MAX_OPEN_SAMPLES
from tests.one_loop import Loop
from tests.sitting import CONFIG, UNTRAINED, Sitting
from trainers.serving_config import ServingConfig


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # `-m slow` asks for them as clearly as --slow does.
    if config.getoption("--slow") or "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def living(process: psutil.Process) -> str | None:
    """Return a process's id and command, or None when it has ended, were it only just now."""
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:100]}"
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return None


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Fail the session when a child process or a file in /dev/shm outlives it."""
    shm_before = shm_files()
    yield
    deadline = time.monotonic() + 10
    while (processes := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [line for process in processes if (line := living(process)) is not None]
    assert not left, f"processes left behind: {left}"
    # Other programs of this machine use /dev/shm too: a file that a living process maps is not ours.
    files = sorted(name for name in shm_files() - shm_before if f"/dev/shm/{name}" not in mapped_shm())
    assert not files, f"files left in /dev/shm: {files}"


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    """One event loop for all tests of a module."""
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def short_tmp_path() -> Iterator[Path]:
    """A session's directory with a path short enough for the sockets that Ray puts below it."""
    path = Path(tempfile.mkdtemp(prefix="el-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session(short_tmp_path: Path, _nothing_is_left_behind: None) -> Iterator[str]:
    """A local Ray with two logical cores; gives its address. Actors of tests take a hundredth of a core each."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        environment.delenv("RAY_AUTH_MODE", raising=False)
        # Functions of a test module travel to the workers by name.
        environment.setenv("PYTHONPATH", str(Path(__file__).parent))
        # For the proxies of Ray Serve, where a test has any: read when Ray starts.
        for name, value in front_environment(ServingConfig(max_open_samples=MAX_OPEN_SAMPLES)).items():
            environment.setenv(name, value)
        runtime = start_ray(
            RayConfig(
                num_cpus=2,
                object_store_gb=0.25,
                namespace=f"tests-{short_tmp_path.name}",
                temp_dir=short_tmp_path,
                token_path=short_tmp_path / "token",
            )
        )
        try:
            yield runtime.address
        finally:
            runtime.stop()


@pytest.fixture(scope="session")
def home(short_tmp_path: Path) -> Path:
    """Give the directory with the configs and, once a run has trained it, the base model in runs/.cache."""
    path = short_tmp_path / "loop"
    path.mkdir()
    where = f'temp_dir = "{short_tmp_path}"\ntoken_path = "{short_tmp_path / "loop-token"}"\n'
    (path / "tiny.toml").write_text(CONFIG + where)
    (path / "untrained.toml").write_text(UNTRAINED)
    return path


@pytest.fixture
def sit(home: Path) -> Iterator[Callable[..., Sitting]]:
    """Give what starts a sitting; at the end no process and no file in /dev/shm may be left of any."""
    started: list[Sitting] = []
    shm_before = shm_files()

    def start(*words: str, killed: str | None = None) -> Sitting:
        started.append(Sitting(home, *words, killed=killed))
        return started[-1]

    yield start
    try:
        for sitting in started:
            sitting.assert_gone(timeout_s=30.0)
        files = sorted(name for name in shm_files() - shm_before if f"/dev/shm/{name}" not in mapped_shm())
        assert not files, f"files left in /dev/shm: {files}"
    finally:
        for sitting in started:
            sitting.close()
