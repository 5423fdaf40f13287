"""Owns one measured sitting of the command line: exit code, wall-clock time, peak memory of all its processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_EVERY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sitting:
    """What one command took."""

    exit_code: int
    wall_s: float
    peak_gb: float
    """Greatest sum of the proportional set sizes of the command and all its descendants, sampled every two seconds."""


def run_measured(words: Sequence[str]) -> Sitting:
    """Run `elenchus.py WORDS` from the repository's root and measure it from outside."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, tree_gb(process.pid))
        time.sleep(SAMPLE_EVERY_S)
    return Sitting(exit_code=process.returncode, wall_s=time.monotonic() - begin, peak_gb=peak)


def run_afresh(run: Path, words: Sequence[str]) -> None:
    """Run `elenchus.py WORDS`, which makes the run in that directory, after what is there is gone.

    Raises:
        RuntimeError: it failed.
    """
    shutil.rmtree(run, ignore_errors=True)
    ended = run_measured(["elenchus.py", *words])
    if ended.exit_code != 0:
        raise RuntimeError(f"{run}: got exit code {ended.exit_code}, wanted 0")


def tree_gb(pid: int) -> float:
    """Return the proportional set size of a process and all its descendants, in GB."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 1e9
