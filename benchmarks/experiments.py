"""Runs the loop and its controls over seeds named beforehand, and prints docs/experiments.md's tables as Markdown.

    .venv/bin/python -m benchmarks.experiments --seeds 31 32 33 34 35
    .venv/bin/python -m benchmarks.experiments --seeds 31 32 33 --arms main shuffled

Every seed has a directory, runs/experiments/SEED, with a run for each arm and one cached base model. The main arm
runs cold: its directory is emptied first. A finished arm is not run again unless --fresh says so; --table prints what
is there. All arms of a seed answer the same sealed problems, so differences between them are paired.

Arms (SCIENCE §5):
    main            the loop as the demo runs it
    shuffled        (a) final verdicts, critic's and experts', permuted within each query
    experts_only    (b) the experts' labels alone, within the same budget
    majority        (c) the majority's result for right
    more_bootstrap  (d) no loop: the bootstrap goes on for as many steps as the loop's wall-clock time allows
    distillation    gold: the learner fine-tuned on a right answer to every problem of the critic's bootstrap
    critic_solver   no training: what the critic recomputes in its critiques, taken for an answer

With --recipe honest_teacher the learner's teacher forgets nothing and shows few hard problems: a start that luck
decides, but one from which a majority and more of the same demonstrations could win. Its runs are in
runs/experiments/honest_teacher/SEED.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.records import EvaluationAnswer, from_table
from benchmarks.cold_demo import ROOT, run_measured
from cluster.store import read_stage
from trainers.run_config import RunConfig
from trainers.statistics import paired_gain

ARMS = ("main", "shuffled", "experts_only", "majority", "more_bootstrap", "distillation", "critic_solver")
EXPERIMENTS = ROOT / "runs" / "experiments"
RECIPES: Mapping[str, Mapping[str, str]] = {
    "demo": {},
    "honest_teacher": {"domain.hard_share": "0.005", "domain.forget_rate": "0.0"},
}
"""What a recipe changes of the demo's settings, in every arm."""
NO_LOOP = ("--loop.iterations", "0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One arm of one seed. Accuracies are shares of the sealed problems; intervals are 95 %, paired (Tango)."""

    arm: str
    seed: int
    before: float
    """The main run's start: the learner before any loop."""
    after: float
    gain: float
    ci_low: float
    ci_high: float
    behind_main: float | None
    """The main run's end minus this arm's; None for the main arm."""
    behind_ci_low: float | None
    behind_ci_high: float | None
    n: int
    well_formed: float
    attack_success_before: float
    attack_success: float | None
    """None for the critic as a solver, which is asked about sealed problems alone; so is the next."""
    out_of_distribution: float | None
    summary: Mapping[str, Any]
    sitting: Mapping[str, float] | None
    """Exit code, seconds and peak GB, where the arm was measured cold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """The runs of one recipe: where they are, how an arm is run, what came of it."""

    recipe: str = "demo"

    def directory(self, seed: int) -> Path:
        """Return where a seed's runs are."""
        return (EXPERIMENTS if self.recipe == "demo" else EXPERIMENTS / self.recipe) / str(seed)

    def words_of(self, arm: str, *, seed: int) -> list[str]:
        """Return the command line of an arm."""
        directory = self.directory(seed)
        settings = [f"{key}={value}" for key, value in RECIPES[self.recipe].items()]
        if arm == "critic_solver":
            return ["-m", "benchmarks.critic_solver", "--seed", str(seed), "--runs-dir", str(directory), *settings]
        words = ["elenchus.py", "run", "--name", arm, "--seed", str(seed), f"runs_dir={directory}", *settings]
        match arm:
            case "main":
                return words
            case "shuffled" | "experts_only" | "majority":
                return [*words, "--oversight.kind", arm]
            case "more_bootstrap":
                return [*words, "--bootstrap.steps", str(self.steps_of_equal_time(seed)), *NO_LOOP]
            case "distillation":
                model = str(directory / "distilled")
                gold = ("--supervision.regime", "gold")
                return [*words, "--learner.model", model, "--rollouts.engine.model", model, *gold, *NO_LOOP]
        raise ValueError(f"arm: got {arm!r}, wanted one of {', '.join(ARMS)}")

    def steps_of_equal_time(self, seed: int) -> int:
        """Return the bootstrap's steps plus as many as the main run's loop would have had time for."""
        wall = self.summary_of("main", seed=seed)["wall_s"]
        steps = RunConfig().bootstrap.steps
        return steps + round(steps * wall["iterations"] / wall["bootstrap"])

    def run_arm(self, arm: str, *, seed: int) -> None:
        """Run one arm of one seed.

        Raises:
            RuntimeError: it failed.
        """
        directory = self.directory(seed)
        # The main arm is cold, and the others stand on its base model: they go with it.
        others = [other for other in ARMS if other != "main" and self.is_finished(other, seed=seed)]
        if arm == "main" and others:
            raise RuntimeError(
                f"experiments: main of seed {seed} would begin anew under the finished arms {', '.join(others)}; "
                f"move {directory} away"
            )
        shutil.rmtree(directory if arm == "main" else directory / arm, ignore_errors=True)
        print(f"━━ seed {seed}, {arm}", flush=True)
        if arm == "distillation" and not (directory / "distilled" / "distillation.json").is_file():
            settings = [f"{key}={value}" for key, value in RECIPES[self.recipe].items()]
            words = ["-m", "benchmarks.distil", "--seed", str(seed), "--runs-dir", str(directory), *settings]
            _check(run_measured([*words, "--out", str(directory / "distilled")]).exit_code, arm=arm, seed=seed)
        sitting = run_measured(self.words_of(arm, seed=seed))
        _check(sitting.exit_code, arm=arm, seed=seed)
        if arm != "critic_solver":
            (directory / arm / "sitting.json").write_text(json.dumps(asdict(sitting)))

    def is_finished(self, arm: str, *, seed: int) -> bool:
        """Whether an arm has what the tables read of it."""
        directory = self.directory(seed)
        return (directory / ("critic_solver.json" if arm == "critic_solver" else f"{arm}/summary.json")).is_file()

    def summary_of(self, arm: str, *, seed: int) -> dict[str, Any]:
        """Return an arm's summary.json."""
        found: dict[str, Any] = json.loads((self.directory(seed) / arm / "summary.json").read_text())
        return found

    def sealed_answers(self, arm: str, *, seed: int, at_the_end: bool) -> list[bool]:
        """Return which sealed problems an arm solves, in the order of the set."""
        if arm == "critic_solver":
            return list(self._solved(seed)["correct"])
        iteration = int(self.summary_of(arm, seed=seed)["policy_version"].removeprefix("v")) if at_the_end else 0
        table = read_stage(self.directory(seed) / arm, "evaluations", iteration=iteration)
        rows = [row for row in from_table(table, EvaluationAnswer) if row.set_name == "sealed"]
        return [row.correct for row in sorted(rows, key=lambda row: row.item)]

    def result_of(self, arm: str, *, seed: int) -> Result:
        """Return an arm's figures, all against the main run's start and end."""
        gain = paired_gain(
            self.sealed_answers("main", seed=seed, at_the_end=False),
            self.sealed_answers(arm, seed=seed, at_the_end=True),
        )
        behind = None
        if arm != "main":
            behind = paired_gain(
                self.sealed_answers(arm, seed=seed, at_the_end=True),
                self.sealed_answers("main", seed=seed, at_the_end=True),
            )
        solver = arm == "critic_solver"
        summary = {} if solver else self.summary_of(arm, seed=seed)
        form = self._solved(seed)["well_formed"] if solver else []
        sitting = self.directory(seed) / arm / "sitting.json"
        return Result(
            arm=arm,
            seed=seed,
            before=gain.before,
            after=gain.after,
            gain=gain.gain,
            ci_low=gain.ci_low,
            ci_high=gain.ci_high,
            behind_main=None if behind is None else behind.gain,
            behind_ci_low=None if behind is None else behind.ci_low,
            behind_ci_high=None if behind is None else behind.ci_high,
            n=gain.n,
            well_formed=sum(form) / len(form) if solver else summary["well_formed"]["after"],
            attack_success_before=self.summary_of("main", seed=seed)["attack_success"]["before"],
            attack_success=None if solver else summary["attack_success"]["after"],
            out_of_distribution=None if solver else summary["ood_accuracy"]["after"],
            summary=summary,
            sitting=json.loads(sitting.read_text()) if sitting.is_file() else None,
        )

    def _solved(self, seed: int) -> dict[str, list[bool]]:
        found: dict[str, list[bool]] = json.loads((self.directory(seed) / "critic_solver.json").read_text())
        return found


def _check(exit_code: int, *, arm: str, seed: int) -> None:
    if exit_code != 0:
        raise RuntimeError(f"experiments: {arm} of seed {seed} ended with exit code {exit_code}, wanted 0")


# ------------------------------------------------------------------------------------------------------------- print


def main_table(results: Sequence[Result]) -> str:
    """Return the table of the main arm, a row a seed."""
    head = (
        "seed",
        "sealed accuracy",
        "gain, points (95 % CI)",
        "well-formed",
        "attack success",
        "out of distribution",
        "critic agreement, lowest",
        "experts",
        "parity, nats",
        "bootstrap + start + iterations, s",
        "whole command, s",
        "peak GB",
    )
    return markdown_table(head, [_main_row(result) for result in results if result.arm == "main"])


def _main_row(result: Result) -> tuple[str, ...]:
    summary, sitting = result.summary, result.sitting or {}
    wall, form, ood = summary["wall_s"], summary["well_formed"], summary["ood_accuracy"]
    return (
        str(result.seed),
        f"{result.before:.3f} → {result.after:.3f}",
        points(result.gain, result.ci_low, result.ci_high),
        f"{form['before']:.3f} → {form['after']:.3f}",
        f"{result.attack_success_before:.3f} → {summary['attack_success']['after']:.3f}",
        f"{ood['before']:.3f} → {ood['after']:.3f}",
        f"{summary['critic_agreement']['lowest']:.3f}",
        f"{100 * summary['experts']['fraction']:.1f} %",
        f"{summary['parity_max_abs_diff']:.0e}",
        f"{wall['bootstrap']:.0f} + {wall['start']:.0f} + {wall['iterations']:.0f}",
        f"{sitting['wall_s']:.0f}" if sitting else "–",
        f"{sitting['peak_gb']:.1f}" if sitting else "–",
    )


def controls_table(results: Sequence[Result]) -> str:
    """Return the table of all arms, a row an arm: medians over the seeds, each seed's value, worst intervals."""
    head = (
        "arm",
        "labels",
        "sealed after, median",
        "each seed",
        "gain, median (each seed's 95 % CI)",
        "main − arm, median (least and greatest bound)",
        "well-formed, least",
        "attack success",
        "out of distribution",
    )
    rows = []
    for arm in ARMS:
        mine = [result for result in results if result.arm == arm]
        if mine:
            rows.append(_control_row(arm, mine))
    return markdown_table(head, rows)


LABELS = {
    "main": "critic, experts ≤ 5 %",
    "shuffled": "the same, permuted",
    "experts_only": "experts ≤ 5 %",
    "majority": "majority of 8",
    "more_bootstrap": "none (bootstrap)",
    "distillation": "gold",
    "critic_solver": "–",
}


def _control_row(arm: str, mine: Sequence[Result]) -> tuple[str, ...]:
    behind = [(r.behind_main, r.behind_ci_low, r.behind_ci_high) for r in mine if r.behind_main is not None]
    return (
        arm,
        LABELS[arm],
        f"{statistics.median(r.after for r in mine):.3f}",
        ", ".join(f"{r.after:.3f}" for r in mine),
        f"{100 * statistics.median(r.gain for r in mine):+.1f} ("
        + ", ".join(f"{100 * r.ci_low:+.1f} to {100 * r.ci_high:+.1f}" for r in mine)
        + ")",
        points(
            statistics.median(b[0] for b in behind if b[0] is not None),
            min(b[1] for b in behind if b[1] is not None),
            max(b[2] for b in behind if b[2] is not None),
        )
        if behind
        else "–",
        f"{min(r.well_formed for r in mine):.3f}",
        _median([r.attack_success for r in mine]),
        _median([r.out_of_distribution for r in mine]),
    )


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3f}" if known else "–"


def points(value: float, low: float, high: float) -> str:
    """Return shares as percentage points: the value and its interval."""
    return f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--fresh", action="store_true", help="run finished arms again")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="demo", help="what the learner starts from")
    said = parser.parse_args()
    campaign = Campaign(recipe=said.recipe)
    plan = [(arm, seed) for arm in ARMS if arm in said.arms for seed in said.seeds]
    for arm, seed in plan:
        if not said.table and (said.fresh or not campaign.is_finished(arm, seed=seed)):
            campaign.run_arm(arm, seed=seed)
    results = [campaign.result_of(arm, seed=seed) for arm, seed in plan if campaign.is_finished(arm, seed=seed)]
    (EXPERIMENTS / f"results_{said.recipe}.json").write_text(
        json.dumps([asdict(result) for result in results], indent=1)
    )
    print(main_table(results), controls_table(results), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
