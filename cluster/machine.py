"""Owns what this machine has: usable cores, memory with a container's limit, GPUs, shared memory, disk.

Knows neither Ray nor what any of it is for. Reads and asks; changes nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SHM = Path("/dev/shm")
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total,memory.free,driver_version",
    "--format=csv,noheader,nounits",
)
NVIDIA_SMI_TIMEOUT_S = 30.0


class GpuError(RuntimeError):
    """There is an NVIDIA driver, and it does not answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU that this process may use."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    driver: str
    """Version of the driver, such as "580.95.05"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a local Ray can give out here."""

    system: str
    """Such as "Linux x86_64"."""
    num_cpus: int
    """Cores that this process may use."""
    memory_bytes: int
    """The machine's memory, or the container's limit where that is lower."""
    free_memory_bytes: int
    """Memory that new processes can take now."""
    gpus: tuple[Gpu, ...]
    gpu_error: str | None = None
    """Why GPUs that may be here can't be seen: the driver does not answer."""
    shm_bytes: int
    """Size of /dev/shm; 0 when there is none."""


def this_machine() -> Machine:
    """Return what this machine has."""
    total, free = memory()
    gpus: tuple[Gpu, ...] = ()
    gpu_error = None
    try:
        gpus = find_gpus()
    except GpuError as error:
        gpu_error = str(error)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        num_cpus=usable_cpus(),
        memory_bytes=total,
        free_memory_bytes=free,
        gpus=gpus,
        gpu_error=gpu_error,
        shm_bytes=shutil.disk_usage(SHM).total if SHM.is_dir() else 0,
    )


def usable_cpus() -> int:
    """Return the number of cores that this process may use, as a local Ray counts them."""
    return len(os.sched_getaffinity(0))


def memory() -> tuple[int, int]:
    """Return total and free memory in bytes, both within a container's limit."""
    found = psutil.virtual_memory()
    total, free = int(found.total), int(found.available)
    for limit, used in memory_limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def memory_limits(
    cgroups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of every control group, v1 or v2, that limits this process's memory."""
    found = []
    for folder, limit_name, used_name in _memory_folders(cgroups, root):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        # Without a limit v2 says "max" and v1 a number near 2^63.
        if limit is not None and used is not None and limit < 1 << 60:
            found.append((limit, used))
    return found


def _memory_folders(cgroups: Path, root: Path) -> list[tuple[Path, str, str]]:
    """Return this process's control group and those around it, with the names of the files that limit and count."""
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = base / path.strip("/")
        # In a container the path is the host's, which is not visible: its own group is the mount's root.
        folders = [
            base,
            *(folder for folder in (here, *here.parents) if folder.is_relative_to(base) and folder != base),
        ]
        found += [(folder, *names) for folder in folders]
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def find_gpus(environment: Mapping[str, str] | None = None, command: Sequence[str] = NVIDIA_SMI) -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves to this process; none without a driver.

    Raises:
        GpuError: the driver is here and does not answer.
    """
    if shutil.which(command[0]) is None:
        return ()
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise GpuError(f"{command[0]} gave no answer within {NVIDIA_SMI_TIMEOUT_S:g} s") from None
    if asked.returncode != 0:
        raise GpuError(f"{command[0]}: {' '.join((asked.stdout + asked.stderr).split())[:120]}")
    return _gpus(asked.stdout, visible=(os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES"))


def _gpus(text: str, *, visible: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs of a table `index, uuid, name, MiB, MiB, driver` that are named in a list of indices or uuids."""
    chosen = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]
    found = []
    for line in text.splitlines():
        if not line.strip():
            continue
        index, uuid, name, total, free, driver = (cell.strip() for cell in line.split(","))
        if chosen is None or any(index == one or uuid.startswith(one) for one in chosen):
            found.append(
                Gpu(
                    index=int(index),
                    name=name,
                    memory_bytes=int(total) << 20,
                    free_bytes=int(free) << 20,
                    driver=driver,
                )
            )
    return tuple(found)


def nearest_folder(path: Path) -> Path:
    """Return a directory that exists: the path itself, or the nearest one above it."""
    here = path.absolute()
    while not here.is_dir() and here != here.parent:
        here = here.parent
    return here


def gib(size_bytes: float) -> str:
    """Return a size as people read it.

    >>> gib(1536 * 1024**2), gib(3 * 1024**2)
    ('1.5 GiB', '3 MiB')
    """
    for unit, width in (("TiB", 1 << 40), ("GiB", 1 << 30)):
        if size_bytes >= width:
            return f"{size_bytes / width:.1f} {unit}"
    return f"{size_bytes / (1 << 20):.0f} MiB" if size_bytes >= 1 << 20 else f"{size_bytes / 1024:.0f} KiB"
