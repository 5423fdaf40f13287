"""Compares the ways to learn from feedback in the loop, and prints docs/experiments.md's tables as Markdown.

    .venv/bin/python -m benchmarks.algorithms choose --seeds 0
    .venv/bin/python -m benchmarks.algorithms confirm --seeds 1 2 --algorithms gce sft rloo dpo
    .venv/bin/python -m benchmarks.algorithms report --seeds 51 52 53 54 55 --algorithms dpo kto grpo sft

`choose` climbs, for every algorithm, over the learning rates of its family: it begins with the middle one and goes on
until no neighbour of the best is untried. It looks at probe problems alone. (One rate of each is not enough: dpo's mean
was 0.81 at 3e-5, the thirteenth, and 0.96 at 1e-4.) `confirm` runs algorithms with the rate that was chosen on further
seeds, for one seed does not tell the best apart, and looks at probe problems and at the critic. `report` runs each with
that rate on seeds that nothing was chosen on, and looks at sealed problems. The measure of the choice is the mean of
the probe accuracies after each iteration: how fast it learns and how far, in one figure; the last accuracy alone does
not tell the good ones apart.

Losses of pairs all have the demo's NLL term on the chosen answer (`nll_weight` 10), without which its tiny model
forgets how to write; `dpo_plain` is dpo without it.

All of a seed's runs start from one base model and generate as much: the same number of queries and of answers to each
in every iteration. "At equal wall" is the probe accuracy that a run had reached when the quickest of the seed's runs
was through its iterations.

Regime: `critic_expert`. Every run has a directory, runs/algorithms/SEED/ALGORITHM-RATE, and its figures go to
benchmarks/algorithms.json as soon as it is through: a campaign takes hours, and goes on where that file ends, on
another machine too. --table runs nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cold_demo import ROOT, run_afresh
from benchmarks.experiments import markdown_table, points
from benchmarks.run_figures import RunFigures, figures_of
from cluster.durable_files import write_json_atomic
from trainers.summary import GainSummary, read_metrics, read_summary

RUNS = ROOT / "runs" / "algorithms"
PAIR_RATES = TOKEN_RATES = ("1e-5", "3e-5", "1e-4", "3e-4")
SAMPLE_RATES = ("3e-6", "1e-5", "3e-5", "1e-4", "3e-4")
FIGURES = ROOT / "benchmarks" / "algorithms.json"
"""What has been measured: `choice`, the probe accuracy after each iteration by algorithm, rate and seed; `confirm` and
`report`, the outcomes."""
Choice = dict[str, dict[str, dict[str, list[float]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """One way to learn: what the TOML says of it."""

    rates: tuple[str, ...]
    """Learning rates that may be tried, the least first."""
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
        settings=_pairs(kind="modpo").settings
        | {"objectives.names": '["verdict", "brevity"]', "objectives.weights": "[0.9, 0.1]"},
    ),
    "kto": Algorithm(rates=PAIR_RATES, settings={"loss.kind": "kto"}),
    "sft": _tokens(kind="sft"),
    "pretraining": _tokens(kind="pretraining"),
    "gce": _tokens(kind="gce"),
    "token_noise": _tokens(kind="token_noise"),
    "span_noise": _tokens(kind="span_noise"),
    "weak_to_strong": _tokens(kind="weak_to_strong"),
    "forward_correction": _tokens(kind="forward_correction"),
    "exo_group": _samples(kind="exo_group"),
    "pro": _samples(kind="pro"),
    "grpo": _samples(kind="grpo"),
    "dapo": _samples(kind="grpo", form="dapo"),
    "dr_grpo": _samples(kind="grpo", form="dr_grpo"),
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
    agreement: float | None
    """The critic's balanced accuracy on live answers, of the iteration where it was lowest; None: it was in none."""
    attack_success: float
    """On the frozen attack set, after the loop."""
    figures: RunFigures
    commit: str
    """Of the code."""

    @property
    def speed(self) -> float:
        """Return the mean probe accuracy over iterations: what `choose` goes by."""
        return statistics.fmean(self.probe)

    def plain(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {**asdict(self), "sealed": self.sealed.model_dump()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Outcome:
        """Return what `plain` has written."""
        return cls(
            **{
                **plain,
                "probe": tuple(plain["probe"]),
                "walls": tuple(plain["walls"]),
                "sealed": GainSummary.model_validate(plain["sealed"]),
                "figures": RunFigures(**plain["figures"]),
            }
        )

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
    words = ["run", "--name", run.name, "--seed", str(seed)]
    return [*words, *(f"{key}={value}" for key, value in settings.items())]


def run_one(algorithm: str, *, rate: str, seed: int) -> Outcome:
    """Make a run from the seed's base model, and return what it came to.

    Raises:
        RuntimeError: it failed.
    """
    run = directory(algorithm, rate=rate, seed=seed)
    print(f"━━ seed {seed}, {run.name}", flush=True)
    run_afresh(run, words_of(algorithm, rate=rate, seed=seed))
    return outcome_of(run, algorithm=algorithm, rate=rate, seed=seed)


def outcome_of(run: Path, *, algorithm: str, rate: str, seed: int) -> Outcome:
    """Return what a finished run came to.

    Raises:
        RuntimeError: it has no summary.
    """
    summary, rows = read_summary(run), read_metrics(run)
    if summary is None:
        raise RuntimeError(f"{run}: got no summary, wanted one")
    resolved = json.loads((run / "resolved.json").read_text())
    return Outcome(
        algorithm=algorithm,
        rate=rate,
        seed=seed,
        probe=tuple(row.probe_accuracy for row in rows),
        walls=tuple(row.wall_s for row in rows),
        sealed=summary.sealed_accuracy,
        agreement=summary.critic_agreement.lowest,
        attack_success=summary.attack_success.after,
        figures=figures_of(run, temperature=float(resolved["rollouts"]["sampling"]["temperature"])),
        commit=summary.commit[:7],
    )


# ------------------------------------------------------------------------------------------------------------- choose


def rate_means(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return by learning rate the mean over seeds of the mean probe accuracy over iterations."""
    return {
        rate: statistics.fmean(statistics.fmean(probe) for probe in seeds.values()) for rate, seeds in found.items()
    }


def best_rate(means: Mapping[str, float]) -> str:
    """Return the learning rate with the greatest mean, the first of equals."""
    return max(means, key=lambda rate: means[rate])


def next_rate(rates: Sequence[str], means: Mapping[str, float]) -> str | None:
    """Return which learning rate is to be tried next, or None when no neighbour of the best is untried.

    Args:
        rates: those that may be tried, the least first.
        means: what came of those that were.
    """
    tried = {rate: means[rate] for rate in rates if rate in means}
    if not tried:
        return rates[len(rates) // 2]
    place = rates.index(best_rate(tried))
    neighbours = rates[max(0, place - 1) : place + 2]
    return next((rate for rate in neighbours if rate not in tried), None)


def choose(names: Sequence[str], seeds: Sequence[int]) -> None:
    """Try learning rates of the algorithms, on all seeds each, and write down what comes of them."""
    for name in names:
        while True:
            choice: Choice = read_figures()["choice"]
            found = choice.setdefault(name, {})
            whole = {rate: by for rate, by in found.items() if all(str(seed) in by for seed in seeds)}
            rate = next_rate(ALGORITHMS[name].rates, rate_means(whole))
            if rate is None:
                break
            by_seed = found.setdefault(rate, {})
            for seed in seeds:
                if str(seed) not in by_seed:
                    by_seed[str(seed)] = list(run_one(name, rate=rate, seed=seed).probe)
                    keep(choice=choice)


# ------------------------------------------------------------------------------------------------------------- report


def run_chosen(part: str, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Run the algorithms with their chosen learning rates, seed by seed, and write down what comes of them.

    Args:
        part: of the figures, "confirm" or "report".
        names: the algorithms.
        seeds: none of which they were chosen on.
    """
    for seed in seeds:
        for name in names:
            figures = read_figures()
            if any((one["algorithm"], one["seed"]) == (name, seed) for one in figures[part]):
                continue
            rate = best_rate(rate_means(figures["choice"][name]))
            keep(**{part: [*figures[part], run_one(name, rate=rate, seed=seed).plain()]})


# -------------------------------------------------------------------------------------------------------------- files


def read_figures() -> dict[str, Any]:
    """Return what has been measured so far."""
    found: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    return {"choice": {}, "confirm": [], "report": []} | found


def keep(**parts: object) -> None:
    """Put parts of the figures in the place of what is written there."""
    write_json_atomic(FIGURES, read_figures() | parts)


# ------------------------------------------------------------------------------------------------------------- print


def choice_table(choice: Choice) -> str:
    """Return the table of the choice, a row for each algorithm, the best first; nothing sealed is in it."""
    rates = sorted({rate for found in choice.values() for rate in found}, key=float)
    means = {name: rate_means(found) for name, found in choice.items() if found}
    rows = []
    for name in sorted(means, key=lambda name: -max(means[name].values())):
        best = best_rate(means[name])
        cells = [f"{means[name][rate]:.3f}" if rate in means[name] else "" for rate in rates]
        probes = [", ".join(f"{accuracy:.2f}" for accuracy in probe) for probe in choice[name][best].values()]
        shown = [f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells, strict=True)]
        rows.append((name, *shown, " · ".join(probes)))
    return markdown_table(("algorithm", *rates, "probe after each iteration, best rate"), rows)


def confirm_table(choice: Choice, outcomes: Sequence[Outcome]) -> str:
    """Return the table of the choice's further seeds, a row for each algorithm, the best first; nothing sealed."""
    rows = []
    for name in dict.fromkeys(one.algorithm for one in outcomes):
        mine = [one for one in outcomes if one.algorithm == name]
        speeds = [
            *(statistics.fmean(probe) for probe in choice[name][mine[0].rate].values()),
            *(one.speed for one in mine),
        ]
        rows.append(
            (
                name,
                mine[0].rate,
                f"{statistics.fmean(speeds):.3f}",
                ", ".join(f"{speed:.3f}" for speed in speeds),
                " · ".join(", ".join(f"{accuracy:.2f}" for accuracy in one.probe) for one in mine),
                ", ".join(_three(one.agreement) for one in mine),
            )
        )
    head = (
        "algorithm",
        "learning rate",
        "probe, mean over seeds and iterations",
        "each seed",
        "probe after each iteration, further seeds",
        "critic agreement, lowest, further seeds",
    )
    return markdown_table(head, sorted(rows, key=lambda row: row[2], reverse=True))


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
                _three(min((one.agreement for one in mine if one.agreement is not None), default=None)),
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
        "critic agreement, lowest",
        "probe at equal wall",
        "KL from start, nats per answer",
        "distinct texts ÷ samples",
        "self-BLEU",
        "s per iteration",
        "tokens generated",
    )
    return markdown_table(head, rows)


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _median(values: Sequence[float | None], *, digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{digits}f}" if len(known) == len(values) else "–"


def main() -> int:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("choose", "confirm", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--algorithms", nargs="+", choices=tuple(ALGORITHMS), default=tuple(ALGORITHMS))
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    said = parser.parse_args()
    if not said.table:
        if said.what == "choose":
            choose(said.algorithms, said.seeds)
        else:
            run_chosen(said.what, said.algorithms, said.seeds)
    figures = read_figures()
    if said.what == "choose":
        print(choice_table(figures["choice"]))
        return 0
    found = [Outcome.of(one) for one in figures[said.what]]
    outcomes = [one for one in found if one.algorithm in said.algorithms and one.seed in said.seeds]
    print(confirm_table(figures["choice"], outcomes) if said.what == "confirm" else report_table(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
