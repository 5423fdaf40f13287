"""Owns what a run was computed on, in words: Python, packages' versions, processor, memory, the git commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Return what the run is computed on: Python, packages' versions, processor, memory, and the git commit if any."""
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    commit, is_clean = git_commit(Path(__file__).resolve().parent.parent)
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "num_usable_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "commit": commit,
        "commit_is_clean": is_clean,
        "packages": dict(sorted(packages.items())),
    }


def git_commit(directory: Path) -> tuple[str | None, bool | None]:
    """Return the commit checked out at `directory` and whether its tracked files are unchanged; None, None without."""
    if shutil.which("git") is None:
        return None, None
    git = ["git", "-C", str(directory)]
    head = subprocess.run([*git, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, timeout=30)
    if head.returncode != 0:
        return None, None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=30
    )
    return head.stdout.strip(), changed.returncode == 0 and not changed.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
