"""The loop's time to an accuracy by that of TRL's GRPOTrainer, with the same start, queries, labels and steps.

    make against-trl                                            (TRL lives in .parity/, an environment of its own)
    .venv/bin/python -m benchmarks.loop_against_trl --seeds 51 52 53 --until 0.95

For each seed the loop runs twice, with GRPO and as it comes, with the default loss and rate; then TRL gets the first
run's start, its queries in their order and its critic (benchmarks/trl_online.py says what is the same on both sides).
Two figures: the loop with GRPO, which is engine against engine, and the loop as it comes, which is what a user of
either waits for. Each side's time is that of its rounds up to the first one after which the probe problems are answered
so well; evaluations and the start of processes do not count, our attacker's queries, experts, journal and weight sync
do, and the commits of all iterations but the last. One side after the other in one sitting, on an otherwise idle
machine: both sides' load is written down. Where TRL does not get there, its whole time stands for it and the figure is
an upper bound; where the loop does not, the seed has none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.against_trl import PYTHON
from benchmarks.bench import record
from benchmarks.cold_demo import ROOT, run_afresh
from benchmarks.figure import Figure, table
from cluster.durable_files import write_json_atomic
from trainers.summary import IterationMetrics, read_metrics

RUNS = ROOT / "runs" / "against_trl"
RESULTS = ROOT / "runs" / "bench" / "loop_against_trl.json"
RATE = "3e-5"
"""GRPO's learning rate, on both sides: of 3e-5 and 1e-4 the better one on seed 0's probe problems, for the loop."""


def seconds_to(rows: Sequence[IterationMetrics], until: float) -> float | None:
    """Return the seconds up to the first iteration that reached an accuracy, without evaluations; None: none did."""
    elapsed = 0.0
    for row in rows:
        elapsed += row.wall_s - row.seconds.get("evaluate", 0.0)
        if row.probe_accuracy >= until:
            return elapsed
    return None


LOOPS: Mapping[str, Sequence[str]] = {
    "grpo": ("loss.kind=grpo", f"learner.training.learning_rate={RATE}"),
    "default": (),
}
"""The loops that are measured, by name: what their command lines say. TRL has the queries of grpo's."""


def ours(name: str, seed: int) -> Path:
    """Make a seed's run, afresh.

    Raises:
        RuntimeError: it failed.
    """
    run = RUNS / f"{name}-{seed}"
    words = ["run", "--name", run.name, "--seed", str(seed), f"runs_dir={RUNS}"]
    run_afresh(run, [*words, *LOOPS[name]])
    return run


def theirs(run: Path, until: float) -> dict[str, list[float]]:
    """Return TRL's seconds and probe accuracies after each round.

    Raises:
        CalledProcessError: it failed.
    """
    out = run.with_suffix(".trl.json")
    words = ["-m", "benchmarks.trl_online", str(run), "--until", str(until), "--out", str(out)]
    subprocess.run([str(PYTHON), *words], cwd=ROOT, check=True)
    found: dict[str, list[float]] = json.loads(out.read_text())
    return found


def main() -> int:
    """Measure, write it down and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=(51, 52, 53))
    parser.add_argument("--until", type=float, default=0.95, help="probe accuracy")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    said = parser.parse_args()
    if not PYTHON.is_file():
        print(f"✗ {PYTHON}: got nothing, wanted an environment with TRL: make against-trl", file=sys.stderr)
        return 2
    load_before = os.getloadavg()[0]
    ratios: dict[str, list[float]] = {name: [] for name in LOOPS}
    details: dict[str, float] = {}
    for seed in said.seeds:
        runs: dict[str, Path] = {}
        for name in LOOPS:
            details[f"load_before_{name}_{seed}"] = os.getloadavg()[0]
            runs[name] = ours(name, seed)
        details[f"load_before_trl_{seed}"] = os.getloadavg()[0]
        found = theirs(runs["grpo"], said.until)
        details[f"trl_s_{seed}"] = found["seconds"][-1]
        details[f"trl_probe_{seed}"] = found["probe"][-1]
        details[f"trl_rounds_{seed}"] = len(found["seconds"])
        for name, run in runs.items():
            rows = read_metrics(run)
            mine = seconds_to(rows, said.until)
            if mine is None:
                best = max(row.probe_accuracy for row in rows)
                print(f"✗ {run}: got a probe accuracy of {best:.3f} at best, wanted {said.until}", file=sys.stderr)
                continue
            ratios[name].append(mine / found["seconds"][-1])
            details[f"{name}_s_{seed}"] = mine
    if not any(ratios.values()):
        return 1
    what = f"seconds to a probe accuracy of {said.until:g} ÷ those of TRL's GRPOTrainer"
    figures = [
        Figure.of(f"loop_against_trl_{name}", f"{name}: {what}", each, at_most=0.5, details=details)
        for name, each in ratios.items()
        if each
    ]
    said.out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(said.out, record(figures, quick=False, load_before=load_before))
    print(table(figures))
    print(json.dumps(details, indent=1))
    return 0 if all(len(found) == len(said.seeds) for found in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
