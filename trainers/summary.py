"""Owns what a run says about itself: the rows of `metrics.jsonl` and `summary.json`, and how both are read and written.

Knows neither how a figure is measured (trainers/evaluation.py) nor how it is shown (serve/report.py).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from cluster.config import Config
from cluster.durable_files import write_bytes_atomic
from trainers.feedback.mixed_feedback import PoweredMean
from trainers.feedback.training_data import Material
from trainers.statistics import Agreement, PairedGain

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0.0)]


class AgreementMetrics(Config):
    """The critic against truth on a uniform sample of an iteration's live answers, before escalation."""

    balanced_accuracy: Fraction | None
    """Mean of the shares of good answers passed and of bad answers failed; None when either kind is absent."""
    ci_low: float | None
    """Lower end of its 95 % interval; None with `balanced_accuracy`."""
    ci_high: float | None
    """Upper end of its 95 % interval; None with `balanced_accuracy`."""
    false_pass: Fraction | None
    """Share of the bad answers that the critic passed; None when no answer is bad."""
    false_fail: Fraction | None
    """Share of the good answers that the critic failed; None when no answer is good."""
    auroc: Fraction | None
    """Chance that a good answer's P(good) is above a bad one's; None when either kind is absent."""
    num_good: Count
    """Sampled answers that are right."""
    num_bad: Count
    """Sampled answers that are wrong."""
    num_unjudged: Count
    """Sampled answers without a readable critique; missing, never counted as failed."""

    @classmethod
    def of(cls, found: Agreement, *, auroc: float | None, num_unjudged: int) -> AgreementMetrics:
        """Return the row of a measured agreement."""
        return cls(
            balanced_accuracy=found.balanced_accuracy,
            ci_low=found.ci_low,
            ci_high=found.ci_high,
            false_pass=found.false_pass,
            false_fail=found.false_fail,
            auroc=auroc,
            num_good=found.num_good,
            num_bad=found.num_bad,
            num_unjudged=num_unjudged,
        )


INTERVAL_FROM = 40
"""Drawn answers from which a normal interval of their share covers as it says (simulated in the tests)."""


class FeedbackMetrics(Config):
    """What experts' labels of answers drawn at random say of the critic, and of all live answers (METHODS M-MIX)."""

    checked: dict[str, Count]
    """The critic's verdicts so far that they checked, by what it said ("pass", "fail"), and how many of them were wrong
    ("pass wrong", "fail wrong")."""
    error_rates: dict[str, Fraction]
    """How often its verdicts are taken to be wrong in this iteration's pairs, by what they say; empty without a mix."""
    failure_share: float | None
    """Share of this iteration's distinct answers that experts would fail: the critic's verdicts on all of them, put
    right by the experts' on the drawn ones (prediction-powered inference); None with fewer than two drawn."""
    ci_low: float | None
    """Lower end of its 95 % interval; None with `failure_share`, and with fewer than 40 drawn: a normal interval covers
    too seldom then."""
    ci_high: float | None
    """Upper end of it."""
    kappa: Fraction | None
    """How far it relies on the critic, from 0 (experts alone) to 1; None with `failure_share`."""
    num_drawn: Count
    """Answers of this iteration that both judged; 0 with fewer than two."""
    num_expert_pairs: Count | None
    """Trained pairs with an expert's verdict on a side; None where the loss takes no pairs."""

    @classmethod
    def of(
        cls,
        found: PoweredMean | None,
        *,
        checked: Mapping[str, int],
        rates: Mapping[str, float],
        num_expert_pairs: int | None,
    ) -> FeedbackMetrics | None:
        """Return the row of an iteration; None when no answer was ever drawn."""
        if not checked:
            return None
        sure = found if found is not None and found.num_human >= INTERVAL_FROM else None
        return cls(
            checked=dict(checked),
            error_rates=dict(rates),
            failure_share=None if found is None else found.value,
            ci_low=None if sure is None else sure.ci_low,
            ci_high=None if sure is None else sure.ci_high,
            kappa=None if found is None else found.kappa,
            num_drawn=0 if found is None else found.num_human,
            num_expert_pairs=num_expert_pairs,
        )


class CellCounts(Config):
    """The critic's verdicts (before escalation) on one taxonomy cell in one iteration."""

    facets: tuple[str, ...]
    """The cell, one value per declared axis."""
    num_pass: Count
    """Answers that the critic passed."""
    num_fail: Count
    """Answers that the critic failed."""


class IterationMetrics(Config):
    """One committed iteration: one line of `metrics.jsonl`."""

    iteration: int = Field(ge=1)
    """Number of the iteration, from 1."""
    policy_version: str
    """Version of the learner's weights that this iteration published."""
    live_attack_success: Fraction | None
    """Share of the valid, novel queries of which the critic failed at least half of the answers; None without any."""
    num_attacks: Count
    """Valid, novel queries: what `live_attack_success` is a share of."""
    probe_accuracy: Fraction
    """Share of the probe problems that the learner answers rightly after this iteration's update, greedily."""
    num_probe: int = Field(ge=1)
    """Probe problems asked."""
    critic_agreement: AgreementMetrics
    """The critic against truth on this iteration's live answers."""
    experts_asked: Count
    """Expert labels asked for in this iteration, every purpose included."""
    num_verdicts: Count
    """Answers judged in this iteration: what the experts' budget is a share of."""
    material: Material = "pairs"
    """What the loss was given: preference pairs, scored answers or accepted ones."""
    pairs_trained: Count
    """Rows of it trained on."""
    pairs_dropped: dict[str, Count]
    """Queries, answers or candidate pairs that gave none, by reason."""
    refinement: dict[str, Count] = Field(default_factory=dict)
    """Distinct failed answers (`failed`), how many were mended into a pair (`refined`), and what became of the others,
    by cause (trainers.feedback.refinement); empty where none is mended."""
    proposals: dict[str, Count]
    """The attacker's proposals by what became of them (accepted, invalid, repeated, ...)."""
    sample_ages: dict[int, Count] = Field(default_factory=dict)
    """Samples in the trained rows by age: how many policy versions the weights that made one were behind those that
    were trained on it."""
    lost: dict[str, Count] = Field(default_factory=dict)
    """Requests that no replica answered after all attempts, by stage; missing, never counted as failed."""
    cells: tuple[CellCounts, ...]
    """The critic's verdicts per taxonomy cell."""
    seconds: dict[str, Seconds]
    """Wall-clock seconds per stage; stages that stream into one another overlap."""
    wall_s: Seconds
    """Wall-clock seconds of the whole iteration."""
    tokens_per_s: dict[str, Annotated[float, Field(ge=0.0)]]
    """Generated tokens per second, by pool."""
    parity_max_abs_diff: Annotated[float, Field(ge=0.0)] | None
    """Largest |log-prob difference| in nats, learner against replicas, at this publication; None when none was made."""
    training: dict[str, float]
    """Means over this iteration's optimizer steps, by name: loss, KL, gradient norm and what else a loss reports."""
    feedback: FeedbackMetrics | None = None
    """What experts' labels of answers drawn at random say; None where none was drawn (oversight.calibration)."""
    preference: tuple[Fraction, ...] | None = None
    """Weights of objectives.names that were drawn for this iteration's rollouts and update, of a learner that is
    trained for all of them (learner.training.panacea); None of others."""


class BeforeAfter(Config):
    """A share at the start and at the end of the run."""

    before: Fraction
    """At policy version 0."""
    after: Fraction
    """At the last published version."""


class CountedBeforeAfter(BeforeAfter):
    """A share at the start and at the end of the run, and of how many."""

    n: int = Field(ge=1)
    """Items asked, the same both times."""


class GainSummary(CountedBeforeAfter):
    """A share of the same items at the start and at the end, and the paired interval of the difference."""

    gain: float = Field(ge=-1.0, le=1.0)
    """after - before."""
    ci_low: float = Field(ge=-1.0, le=1.0)
    """Lower end of the gain's 95 % interval (Tango's score interval for paired items)."""
    ci_high: float = Field(ge=-1.0, le=1.0)
    """Upper end of the gain's 95 % interval."""

    @classmethod
    def of(cls, found: PairedGain) -> GainSummary:
        """Return the summary of a measured gain."""
        return cls(
            before=found.before,
            after=found.after,
            n=found.n,
            gain=found.gain,
            ci_low=found.ci_low,
            ci_high=found.ci_high,
        )


class CriticAgreement(Config):
    """Balanced accuracy of the critic against truth; the lowest iteration counts."""

    lowest: Fraction | None
    """The lowest iteration's balanced accuracy; None when no iteration had both right and wrong answers."""
    by_iteration: dict[int, Fraction | None]
    """Balanced accuracy by iteration; None where either kind of answer was absent."""
    false_pass: Fraction | None
    """Share of the bad answers passed, in the lowest iteration."""
    false_fail: Fraction | None
    """Share of the good answers failed, in the lowest iteration."""
    auroc: Fraction | None
    """AUROC of P(good), in the lowest iteration."""
    n: Count
    """Sampled answers with a readable critique, in the lowest iteration."""
    num_unjudged: Count
    """Sampled answers without one, over all iterations."""


class Experts(Config):
    """How much the experts were asked."""

    asked: Count
    """Expert labels asked for, calibration included."""
    verdicts: Count
    """Answers judged."""
    fraction: Fraction
    """asked / verdicts; the budget is a bound on it."""


class Gold(Config):
    """How often computable truth was used as a label, by purpose; evaluation is not a label."""

    learner_bootstrap: Count
    """Right answers in the learner's bootstrap demonstrations."""
    critic_bootstrap: Count
    """Critiques in the critic's bootstrap whose verdict was known by construction (planted flaws)."""
    expert: Count
    """Labels that the simulated expert drew from truth."""
    calibration: Count
    """Those that it drew for answers chosen at random, which tell how often the critic errs; not part of `expert`."""
    canaries: Count
    """Items with known answers, slipped in to watch a judge."""


class PairCounts(Config):
    """Preference pairs over the whole run."""

    trained: Count
    """Pairs trained on."""
    dropped: dict[str, Count]
    """Queries or candidates that gave no pair, by reason."""


class WallSeconds(Config):
    """Wall-clock seconds by phase of the run, of all its sittings; what a kill cut off is not in them."""

    bootstrap: Seconds
    """Pretraining of the base model; 0 when it came from the cache."""
    start: Seconds
    """Ray, pools, learner group, frozen attack set, evaluation before the first iteration."""
    iterations: Seconds
    """The loop, commits and the evaluation at its end included."""
    total: Seconds
    """Their sum."""


class Summary(Config):
    """A finished run in figures: `summary.json`. Every measure is defined in SCIENCE §3."""

    run: str
    """The run's name."""
    sealed_accuracy: GainSummary
    """Share of the sealed problems answered rightly, greedily."""
    sealed_accuracy_well_formed: GainSummary | None
    """The same on the items well-formed both times; None when there are none."""
    well_formed: BeforeAfter
    """Share of the sealed answers that are well-formed."""
    ood_accuracy: CountedBeforeAfter
    """Accuracy on families of problems that no role saw in training."""
    attack_success: CountedBeforeAfter
    """Share of the frozen attack set that the learner answers wrongly, greedily."""
    live_attack_success: dict[int, Fraction | None]
    """By iteration: share of the current attacker's queries of which the critic failed at least half of the answers."""
    critic_agreement: CriticAgreement
    """The critic against truth."""
    experts: Experts
    """How much the experts were asked."""
    gold: Gold
    """Uses of truth as a label."""
    regime: str
    """Supervision regime: "critic_expert" or "gold"."""
    policy_version: str
    """The last published version of the learner's weights."""
    parity_max_abs_diff: Annotated[float, Field(ge=0.0)]
    """Largest |log-prob difference| in nats of any replica against the learner, over all publications."""
    pairs: PairCounts
    """Preference pairs trained and dropped."""
    wall_s: WallSeconds
    """Wall-clock seconds by phase."""
    tokens_per_s: dict[str, Annotated[float, Field(ge=0.0)]]
    """Generated tokens per second over the loop, by pool."""
    seed: int
    """The run's seed."""
    commit: str
    """Git commit of the code; "unknown" outside a repository."""


def summarise_agreement(rows: Sequence[IterationMetrics]) -> CriticAgreement:
    """Return the critic's agreement by iteration, with the error rates and AUROC of the lowest one."""
    found = {row.iteration: row.critic_agreement for row in rows}
    measured = [row for row in found.values() if row.balanced_accuracy is not None]
    lowest = min(measured, key=lambda row: row.balanced_accuracy or 0.0) if measured else None
    return CriticAgreement(
        lowest=lowest.balanced_accuracy if lowest else None,
        by_iteration={iteration: row.balanced_accuracy for iteration, row in found.items()},
        false_pass=lowest.false_pass if lowest else None,
        false_fail=lowest.false_fail if lowest else None,
        auroc=lowest.auroc if lowest else None,
        n=lowest.num_good + lowest.num_bad if lowest else 0,
        num_unjudged=sum(row.num_unjudged for row in found.values()),
    )


def summarise_experts(rows: Sequence[IterationMetrics]) -> Experts:
    """Return how much the experts were asked over all iterations."""
    asked, verdicts = sum(row.experts_asked for row in rows), sum(row.num_verdicts for row in rows)
    return Experts(asked=asked, verdicts=verdicts, fraction=asked / verdicts if verdicts else 0.0)


def summarise_pairs(rows: Sequence[IterationMetrics]) -> PairCounts:
    """Return the pairs trained and dropped over all iterations."""
    dropped: Counter[str] = Counter()
    for row in rows:
        dropped.update(row.pairs_dropped)
    return PairCounts(trained=sum(row.pairs_trained for row in rows), dropped=dict(dropped))


def append_metrics(run_dir: Path, row: IterationMetrics) -> None:
    """Append one row to the run's `metrics.jsonl` and put it on the disk; a line that a crash cut short is cut off."""
    path = run_dir / METRICS_FILE
    with path.open("ab+") as file:
        _cut_torn_line(path)
        file.write(row.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(run_dir: Path) -> list[IterationMetrics]:
    """Return the run's rows in order of iteration; the last row of an iteration wins, a torn last line is ignored.

    Raises:
        ValueError: a line other than the last is damaged.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    rows: dict[int, IterationMetrics] = {}
    # What follows the last newline was never acknowledged.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = IterationMetrics.model_validate_json(line)
        except ValidationError as error:
            raise ValueError(
                f"{path}, line {number}: got {line[:60]!r}, wanted a row of IterationMetrics "
                f"({error.error_count()} problems, first: {error.errors()[0]['msg']}); remove or restore the line"
            ) from error
        rows[row.iteration] = row
    return [rows[iteration] for iteration in sorted(rows)]


def rewind_metrics(run_dir: Path, *, last_iteration: int) -> None:
    """Drop the rows after the last committed iteration, as a resumed run writes them again."""
    kept = [row for row in read_metrics(run_dir) if row.iteration <= last_iteration]
    write_bytes_atomic(run_dir / METRICS_FILE, b"".join(row.model_dump_json().encode() + b"\n" for row in kept))


def write_summary(run_dir: Path, summary: Summary) -> Path:
    """Write `summary.json` at once or not at all, and return its path."""
    path = run_dir / SUMMARY_FILE
    write_bytes_atomic(path, json.dumps(summary.model_dump(mode="json"), indent=2, ensure_ascii=False).encode() + b"\n")
    return path


def read_summary(run_dir: Path) -> Summary | None:
    """Return the run's summary; None when the run is not finished.

    Raises:
        ValueError: the file is not a summary.
    """
    path = run_dir / SUMMARY_FILE
    if not path.exists():
        return None
    try:
        return Summary.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{path}: got {error.error_count()} problems, first at {'.'.join(map(str, first['loc']))}: {first['msg']}; "
            "wanted a summary of this version; finish the run again with `elenchus resume`"
        ) from error


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        os.truncate(path, whole)
