"""Compares the ways to learn from feedback in the loop, and prints docs/experiments.md's tables as Markdown.

    .venv/bin/python -m benchmarks.algorithms choose --seeds 0
    .venv/bin/python -m benchmarks.algorithms report --seeds 51 52 53 54 55 --algorithms dpo kto grpo sft

`choose` tries every algorithm with every learning rate of its family and looks at probe problems alone. (To try one
rate of each and the others of the best alone is not enough: dpo's mean was 0.81 at 3e-5, the thirteenth, and 0.96 at
1e-4.) `report` runs each algorithm with the learning rate that was chosen, on seeds that nothing was chosen on, and
looks at sealed problems. The measure of the choice is the mean of the probe accuracies after each iteration: how fast
it learns and how far, in one figure; the last accuracy alone does not tell the good ones apart.

Losses of pairs all have the demo's NLL term on the chosen answer (`nll_weight` 10), without which its tiny model
forgets how to write; `dpo_plain` is dpo without it.

All of a seed's runs start from one base model and generate as much: the same number of queries and of answers to each
in every iteration. "At equal wall" is the probe accuracy that a run had reached when the quickest of the seed's runs
was through its iterations.

Regime: `critic_expert`. Every run has a directory, runs/algorithms/SEED/ALGORITHM-RATE; what is finished is not run
again, and --table runs nothing.
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

from benchmarks.cold_demo import ROOT, run_measured
from benchmarks.experiments import markdown_table, points
from benchmarks.run_figures import RunFigures, figures_of
from trainers.summary import GainSummary, read_metrics, read_summary

RUNS = ROOT / "runs" / "algorithms"
PAIR_RATES, SAMPLE_RATES, TOKEN_RATES = ("3e-5", "1e-4", "3e-4"), ("1e-5", "3e-5", "1e-4"), ("3e-5", "1e-4", "3e-4")
CHOICE = ROOT / "benchmarks" / "algorithms.json"
"""The learning rates that `choose` has found, by algorithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One way to learn: what the TOML says of it."""

    rates: tuple[str, ...]
    """Learning rates to be tried."""
    settings: Mapping[str, str]


def _pairs(*, nll_weight: str = "10", **loss: str) -> Algorithm:
    settings = {f"loss.{key}": value for key, value in loss.items()}
    return Algorithm(rates=PAIR_RATES, settings=settings | {"loss.nll_weight": nll_weight})


def _samples(*, value_head: bool = False, **loss: str) -> Algorithm:
    settings = {f"loss.{key}": value for key, value in loss.items()}
    if value_head:
        settings["learner.training.value_head"] = "true"
    return Algorithm(rates=SAMPLE_RATES, settings=settings)


def _tokens(**loss: str) -> Algorithm:
    return Algorithm(rates=TOKEN_RATES, settings={f"loss.{key}": value for key, value in loss.items()})


ALGORITHMS: Mapping[str, Algorithm] = {
    "dpo": _pairs(kind="dpo"),
    "dpo_plain": _pairs(kind="dpo", nll_weight="0"),
    "cdpo": _pairs(kind="cdpo"),
    "rdpo": _pairs(kind="rdpo"),
    "ipo": _pairs(kind="ipo"),
    "exo": _pairs(kind="exo"),
    "rso": _pairs(kind="rso"),
    "modpo": Algorithm(
        rates=PAIR_RATES,
        settings=_pairs(kind="modpo", weights="[0.9, 0.1]").settings
        | {"objectives.names": '["verdict", "brevity"]', "objectives.weights": "[0.9, 0.1]"},
    ),
    "kto": Algorithm(rates=PAIR_RATES, settings={"loss.kind": "kto"}),
    "sft": _tokens(kind="sft"),
    "gce": _tokens(kind="gce"),
    "token_noise": _tokens(kind="token_noise"),
    "span_noise": _tokens(kind="span_noise"),
    "weak_to_strong": _tokens(kind="weak_to_strong"),
    "forward_correction": _tokens(kind="forward_correction"),
    "exo_group": _samples(kind="exo_group"),
    "pro": _samples(kind="pro"),
    "grpo": _samples(kind="grpo"),
    "dapo": _samples(kind="grpo", form="dapo"),
    "dr_grpo": _samples(kind="grpo", form="dr_grpo", max_tokens="48"),
    "gspo": _samples(kind="grpo", form="gspo"),
    "rloo": _samples(kind="rloo"),
    "reinforce_pp": _samples(kind="reinforce_pp"),
    "ppo": _samples(kind="ppo", value_head=True),
    "relc": _samples(kind="relc", value_head=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run."""

    algorithm: str
    rate: str
    seed: int
    probe: tuple[float, ...]
    """Accuracy after each iteration."""
    walls: tuple[float, ...]
    """Seconds of each iteration."""
    sealed: GainSummary
    attack_success: float
    """On the frozen attack set, after the loop."""
    figures: RunFigures

    @property
    def speed(self) -> float:
        """Return the mean probe accuracy over iterations: what `choose` goes by."""
        return statistics.fmean(self.probe)

    def probe_by(self, seconds: float) -> float | None:
        """Return the probe accuracy of the last iteration that had ended by then; None when none had."""
        elapsed, reached = 0.0, None
        for accuracy, wall in zip(self.probe, self.walls, strict=True):
            elapsed += wall
            if elapsed <= seconds + 1e-9:
                reached = accuracy
        return reached


def directory(algorithm: str, *, rate: str, seed: int) -> Path:
    """Return where a run is."""
    return RUNS / str(seed) / f"{algorithm}-{rate}"


def words_of(algorithm: str, *, rate: str, seed: int) -> list[str]:
    """Return the command line of a run."""
    run = directory(algorithm, rate=rate, seed=seed)
    settings = {
        "runs_dir": str(run.parent),
        "learner.training.learning_rate": rate,
        **ALGORITHMS[algorithm].settings,
    }
    words = ["elenchus.py", "run", "--name", run.name, "--seed", str(seed)]
    return [*words, *(f"{key}={value}" for key, value in settings.items())]


def run_one(algorithm: str, *, rate: str, seed: int) -> None:
    """Make a run from the seed's base model.

    Raises:
        RuntimeError: it failed.
    """
    run = directory(algorithm, rate=rate, seed=seed)
    shutil.rmtree(run, ignore_errors=True)
    print(f"━━ seed {seed}, {run.name}", flush=True)
    ended = run_measured(words_of(algorithm, rate=rate, seed=seed))
    if ended.exit_code != 0:
        raise RuntimeError(f"algorithms: {run} ended with exit code {ended.exit_code}, wanted 0")


def outcome_of(algorithm: str, *, rate: str, seed: int) -> Outcome | None:
    """Return what a run came to; None where there is none, or none that is through."""
    run = directory(algorithm, rate=rate, seed=seed)
    summary = read_summary(run) if run.is_dir() else None
    if summary is None:
        return None
    rows = read_metrics(run)
    resolved = json.loads((run / "resolved.json").read_text())
    return Outcome(
        algorithm=algorithm,
        rate=rate,
        seed=seed,
        probe=tuple(row.probe_accuracy for row in rows),
        walls=tuple(row.wall_s for row in rows),
        sealed=summary.sealed_accuracy,
        attack_success=summary.attack_success.after,
        figures=figures_of(run, temperature=float(resolved["rollouts"]["sampling"]["temperature"])),
    )


def outcomes_of(plan: Sequence[tuple[str, str]], *, seeds: Sequence[int], run: bool) -> list[Outcome]:
    """Return what the runs of a plan of algorithms and rates came to; `run` makes those that are missing."""
    for seed in seeds:
        for name, rate in plan:
            if run and outcome_of(name, rate=rate, seed=seed) is None:
                run_one(name, rate=rate, seed=seed)
    found = [outcome_of(name, rate=rate, seed=seed) for name, rate in plan for seed in seeds]
    return [one for one in found if one is not None]


def best_rates(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """Return for each algorithm the learning rate whose runs learnt best on probe, over all seeds."""
    speeds: dict[str, dict[str, list[float]]] = {}
    for outcome in outcomes:
        speeds.setdefault(outcome.algorithm, {}).setdefault(outcome.rate, []).append(outcome.speed)
    return {name: max(by_rate, key=lambda rate: statistics.fmean(by_rate[rate])) for name, by_rate in speeds.items()}


# ------------------------------------------------------------------------------------------------------------- print


def choice_table(outcomes: Sequence[Outcome]) -> str:
    """Return the table of the choice, a row for each algorithm and learning rate; nothing sealed is in it."""
    best = best_rates(outcomes)
    rows = [
        (
            one.algorithm,
            f"**{one.rate}**" if best[one.algorithm] == one.rate else one.rate,
            str(one.seed),
            f"{one.speed:.3f}",
            ", ".join(f"{accuracy:.2f}" for accuracy in one.probe),
            f"{statistics.fmean(one.walls):.1f}",
        )
        for one in outcomes
    ]
    head = ("algorithm", "learning rate", "seed", "probe, mean over iterations", "after each", "s per iteration")
    return markdown_table(head, rows)


def report_table(outcomes: Sequence[Outcome]) -> str:
    """Return the table of the report, a row for each algorithm: medians over its seeds, and each seed's gain."""
    quickest = {
        seed: min(sum(one.walls) for one in outcomes if one.seed == seed) for seed in {one.seed for one in outcomes}
    }
    rows = []
    for name in dict.fromkeys(one.algorithm for one in outcomes):
        mine = [one for one in outcomes if one.algorithm == name]
        sealed = [one.sealed for one in mine]
        equal_wall = [one.probe_by(quickest[one.seed]) for one in mine]
        rows.append(
            (
                name,
                mine[0].rate,
                str(len(mine)),
                f"{statistics.median(one.speed for one in mine):.3f}",
                points(
                    statistics.median(gain.gain for gain in sealed),
                    min(gain.ci_low for gain in sealed),
                    max(gain.ci_high for gain in sealed),
                ),
                ", ".join(f"{100 * gain.gain:+.1f}" for gain in sealed),
                _median([one.attack_success for one in mine]),
                _median(equal_wall),
                _median([one.figures.kl_from_start for one in mine]),
                _median([one.figures.distinct for one in mine]),
                _median([one.figures.self_bleu for one in mine], digits=1),
                _median([statistics.fmean(one.walls) for one in mine], digits=1),
                f"{statistics.median(one.figures.num_tokens for one in mine):,.0f}",
            )
        )
    head = (
        "algorithm",
        "learning rate",
        "seeds",
        "probe, mean over iterations",
        "sealed gain, median (least and greatest bound, 95 %)",
        "each seed",
        "attack success after",
        "probe at equal wall",
        "KL from start, nats per answer",
        "distinct texts ÷ samples",
        "self-BLEU",
        "s per iteration",
        "tokens generated",
    )
    return markdown_table(head, rows)


def _median(values: Sequence[float | None], *, digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{digits}f}" if len(known) == len(values) else "–"


def main() -> int:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("choose", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--algorithms", nargs="+", choices=tuple(ALGORITHMS), default=tuple(ALGORITHMS))
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    said = parser.parse_args()
    if said.what == "choose":
        plan = [(name, rate) for name in said.algorithms for rate in ALGORITHMS[name].rates]
    else:
        chosen: dict[str, str] = json.loads(CHOICE.read_text())
        plan = [(name, chosen[name]) for name in said.algorithms]
    outcomes = outcomes_of(plan, seeds=said.seeds, run=not said.table)
    if said.what == "choose":
        known = json.loads(CHOICE.read_text()) if CHOICE.is_file() else {}
        CHOICE.write_text(json.dumps(known | best_rates(outcomes), indent=1) + "\n")
        print(choice_table(outcomes))
    else:
        print(report_table(outcomes))
    (RUNS / f"{said.what}.json").write_text(json.dumps([_plain(one) for one in outcomes], indent=1))
    return 0


def _plain(outcome: Outcome) -> dict[str, object]:
    return {
        **{key: getattr(outcome, key) for key in ("algorithm", "rate", "seed", "probe", "walls", "attack_success")},
        "sealed": outcome.sealed.model_dump(),
        "figures": asdict(outcome.figures),
    }


if __name__ == "__main__":
    sys.exit(main())
