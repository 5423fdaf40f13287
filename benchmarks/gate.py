"""Runs the demo over the seeds named beforehand, cold, and prints the gate's table as Markdown.

    .venv/bin/python benchmarks/gate.py --seeds 11 12 13

Each seed starts with an empty cache. Peak memory is the sum of the proportional set sizes of the demo's process tree,
sampled every two seconds. The table goes to docs/experiments.md; the raw figures stay in runs/gate-SEED/summary.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Sitting:
    """One cold demo."""

    seed: int
    exit_code: int
    wall_s: float
    peak_gb: float
    run_dir: Path


def run_demo(seed: int, *, runs_dir: Path) -> Sitting:
    """Run the demo with an empty cache and measure it from outside."""
    name = f"gate-{seed}"
    for path in (runs_dir / name, runs_dir / ".cache"):
        shutil.rmtree(path, ignore_errors=True)
    begin = time.monotonic()
    command = [sys.executable, "elenchus.py", "demo", "--seed", str(seed), "--name", name]
    process = subprocess.Popen(command, cwd=ROOT)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, tree_gb(process.pid))
        time.sleep(2.0)
    return Sitting(
        seed=seed,
        exit_code=process.returncode,
        wall_s=time.monotonic() - begin,
        peak_gb=peak,
        run_dir=runs_dir / name,
    )


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


def row(sitting: Sitting) -> str:
    """Return a seed's row of the table."""
    path = sitting.run_dir / "summary.json"
    if sitting.exit_code != 0 or not path.exists():
        return f"| {sitting.seed} | failed with exit code {sitting.exit_code} after {sitting.wall_s:.0f} s |"
    summary = json.loads(path.read_text())
    sealed, agreement = summary["sealed_accuracy"], summary["critic_agreement"]
    attack, form, ood = summary["attack_success"], summary["well_formed"], summary["ood_accuracy"]
    wall = summary["wall_s"]
    cells = [
        str(sitting.seed),
        f"{sealed['before']:.3f} → {sealed['after']:.3f}",
        f"{100 * sealed['gain']:+.1f} ({100 * sealed['ci_low']:+.1f} to {100 * sealed['ci_high']:+.1f})",
        f"{form['before']:.3f} → {form['after']:.3f}",
        f"{attack['before']:.3f} → {attack['after']:.3f}",
        f"{ood['before']:.3f} → {ood['after']:.3f}",
        f"{agreement['lowest']:.3f}",
        f"{100 * summary['experts']['fraction']:.1f} %",
        f"{summary['parity_max_abs_diff']:.0e}",
        f"{wall['bootstrap']:.0f} + {wall['start']:.0f} + {wall['iterations']:.0f}",
        f"{sitting.wall_s:.0f}",
        f"{sitting.peak_gb:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| seed | sealed accuracy | gain, points (95 % CI) | well-formed | attack success | out of distribution "
    "| critic agreement, lowest | experts | parity, nats | bootstrap + start + iterations, s | whole command, s "
    "| peak GB |"
)


def main() -> int:
    """Run the seeds and print the table; exit 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    seeds = parser.parse_args().seeds
    sittings = [run_demo(seed, runs_dir=ROOT / "runs") for seed in seeds]
    print(HEAD)
    print("|" + "---|" * HEAD.count(" | ") + "---|")
    for sitting in sittings:
        print(row(sitting))
    return int(any(sitting.exit_code for sitting in sittings))


if __name__ == "__main__":
    sys.exit(main())
