"""The loop's time to an accuracy by that of TRL's GRPOTrainer, with the same start, queries, labels and steps.

    make against-trl                                            (TRL lives in .parity/, an environment of its own)
    .venv/bin/python -m benchmarks.loop_against_trl --seeds 51 52 53 --until 0.95

For each seed the loop runs first, with GRPO, to its last iteration; then TRL gets its start, its queries in their order
and its critic (benchmarks/trl_online.py says what is the same on both sides). Each side's time is that of its rounds up
to the first one after which the probe problems are answered so well; evaluations and the start of processes do not
count, our attacker's queries, experts, journal and weight sync do, and the commits of all iterations but the last. One
side after the other in one sitting, on an otherwise idle machine: both sides' load is written down. Where TRL does not
get there, its whole time stands for it and the figure is an upper bound; where the loop does not, the seed has none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
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


def ours(seed: int) -> Path:
    """Make a seed's run, afresh.

    Raises:
        RuntimeError: it failed.
    """
    run = RUNS / f"grpo-{seed}"
    words = ["run", "--name", run.name, "--seed", str(seed), f"runs_dir={RUNS}"]
    settings = ["loss.kind=grpo", f"learner.training.learning_rate={RATE}"]
    run_afresh(run, [*words, *settings])
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
    ratios: list[float] = []
    details: dict[str, float] = {}
    for seed in said.seeds:
        details[f"load_before_ours_{seed}"] = os.getloadavg()[0]
        run = ours(seed)
        rows = read_metrics(run)
        mine = seconds_to(rows, said.until)
        if mine is None:
            best = max(row.probe_accuracy for row in rows)
            print(f"✗ {run}: got a probe accuracy of {best:.3f} at best, wanted {said.until}", file=sys.stderr)
            continue
        details[f"load_before_trl_{seed}"] = os.getloadavg()[0]
        found = theirs(run, said.until)
        ratios.append(mine / found["seconds"][-1])
        details |= {
            f"ours_s_{seed}": mine,
            f"trl_s_{seed}": found["seconds"][-1],
            f"trl_probe_{seed}": found["probe"][-1],
            f"trl_rounds_{seed}": len(found["seconds"]),
        }
    if not ratios:
        return 1
    what = f"seconds to a probe accuracy of {said.until:g} ÷ those of TRL's GRPOTrainer"
    figures = [Figure.of("loop_against_trl", what, ratios, at_most=0.5, details=details)]
    said.out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(said.out, record(figures, quick=False, load_before=load_before))
    print(table(figures))
    print(json.dumps(details, indent=1))
    return 0 if len(ratios) == len(said.seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
