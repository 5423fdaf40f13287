"""Owns what the report says first: what happened, in plain words, and the summary's tables with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve import report_journal
from serve.report_chart import Cell
from serve.report_journal import Journal
from serve.report_samples import LIVE, link
from serve.report_words import (
    DASH,
    TRAINED_ROWS,
    count,
    duration,
    interval,
    material_of_rows,
    number,
    percent,
    points,
    share_of,
)
from trainers import statistics
from trainers.statistics import paired_gain
from trainers.summary import AgreementMetrics, CountedBeforeAfter, IterationMetrics, Summary

CONTROLS = {
    "shuffled": "its verdicts were permuted within each query",
    "experts_only": "only the experts' labels counted, none of the critic's",
    "majority": "the majority of the answers was taken for right",
}
"""Oversights that exist to be beaten (SCIENCE §5)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A measure at the start and at the end."""

    name: str
    detail: str
    before: Cell
    after: Cell
    change: Cell
    """Points with the paired interval; a dash where the answers are not there to be paired."""
    n: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A measure of the whole run."""

    name: str
    detail: str
    value: Cell


# ------------------------------------------------------------------------------------------------------- in plain words


def story(
    summary: Summary | None,
    rows: Sequence[IterationMetrics],
    journal: Journal,
    *,
    oversight: str | None,
    num_iterations: int | None = None,
) -> list[str]:
    """Return what happened, by paragraph.

    Args:
        summary: None while the run is not finished.
        rows: what its iterations measured.
        journal: its records.
        oversight: the kind that its config names; None when unknown.
        num_iterations: how many it was to have; None when unknown.
    """
    if summary is not None:
        said = [
            _gain_sentence(summary, num_iterations=len(rows)),
            _attack_sentence(summary),
            _transfer_sentence(summary, journal),
            *_end_sentence(rows, num_iterations=num_iterations),
        ]
    elif rows:
        first, last = rows[0], rows[-1]
        said = [
            f"So far {count(len(rows), 'iteration')} of this run {'is' if len(rows) == 1 else 'are'} committed. Of "
            f"{last.num_probe:,} probe problems the learner answers {percent(last.probe_accuracy)} rightly after "
            f"iteration {last.iteration}"
            + (f", {percent(first.probe_accuracy)} after iteration {first.iteration}." if len(rows) > 1 else ".")
        ]
    else:
        return []
    control = CONTROLS.get(oversight or "")
    if control:
        said.append(f"This run is a control: {control}.")
    judged = [_judge_sentence(rows), _expert_sentence(rows, summary), _pairs_sentence(rows), *_budget_sentence(rows)]
    return [" ".join(said), " ".join(judged)]


def _gain_sentence(summary: Summary, *, num_iterations: int) -> str:
    sealed = summary.sealed_accuracy
    fate = "rose" if sealed.gain > 0 else "fell" if sealed.gain < 0 else "stayed"
    if sealed.ci_low > 0:
        verdict = "all of it above 0, more than chance explains"
    elif sealed.ci_high < 0:
        verdict = "all of it below 0: the learner got worse"
    else:
        verdict = "which holds 0: no gain is shown"
    return (
        f"In {count(num_iterations, 'iteration')} the learner's share of right answers to {sealed.n:,} sealed "
        f"problems, which no role ever saw, {fate} from {percent(sealed.before)} to {percent(sealed.after)}: "
        f"{points(sealed.gain)} points (95 % interval {points(sealed.ci_low)} to {points(sealed.ci_high)}, {verdict})."
    )


def _attack_sentence(summary: Summary) -> str:
    attack = summary.attack_success
    return (
        f"Of {attack.n:,} attacks that were written before training it fails {percent(attack.after)}; at the start it "
        f"failed {percent(attack.before)}."
    )


def _transfer_sentence(summary: Summary, journal: Journal) -> str:
    ood = summary.ood_accuracy
    said = (
        f"On kinds of problems that no role was trained on it went from {percent(ood.before)} to {percent(ood.after)} "
        f"(n = {ood.n:,})"
    )
    gain = _paired(journal, "out_of_distribution")
    if gain is None:
        return said + "."
    if gain.ci_low > 0:
        return said + ": what it learnt carries over."
    return said + (": it got worse there." if gain.ci_high < 0 else ": nothing shows that what it learnt carries over.")


def _judge_sentence(rows: Sequence[IterationMetrics]) -> str:
    num_verdicts = sum(row.num_verdicts for row in rows)
    lowest = lowest_agreement(rows)
    said = f"A critic judged {num_verdicts:,} sampled answers"
    if lowest is None:
        return said + "."
    return (
        f"{said}; compared with truth on a sample of every iteration, it agreed in no iteration less than "
        f"{percent(lowest.balanced_accuracy)} (balanced; chance is 50 %)."
    )


def _expert_sentence(rows: Sequence[IterationMetrics], summary: Summary | None) -> str:
    asked, verdicts = sum(row.experts_asked for row in rows), sum(row.num_verdicts for row in rows)
    if not asked:
        return "No expert was asked."
    simulated = summary is not None and summary.gold.expert > 0
    return (
        f"Experts were asked about {asked:,} of them ({percent(asked / verdicts)})"
        + (", simulated here: their labels were drawn from truth" if simulated else "")
        + "."
    )


def _pairs_sentence(rows: Sequence[IterationMetrics]) -> str:
    trained, material = sum(row.pairs_trained for row in rows), material_of_rows(rows)
    if material == "judged":
        return f"The learner was trained on {count(trained, 'judged answer')}, good or bad by themselves."
    if material == "samples":
        return f"The learner was trained on {count(trained, 'answer')}, each with {_score_of(rows)}."
    if material == "groups":
        return f"The learner was trained on {count(trained, 'group')} of judged answers, each to one query."
    if material == "accepted":
        return f"The learner was trained on {count(trained, 'answer')} that passed."
    if not trained:
        return "No pair of a passing and a failing answer came of it: nothing was trained."
    return (
        f"{count(trained, 'pair')} of a passing and a failing answer came of it, and those the learner was trained on."
    )


def _score_of(rows: Sequence[IterationMetrics]) -> str:
    """Return whose score a sample had, as the end of a sentence; of a reward model also how well it knew the pairs."""
    pairs = round(sum(row.training.get("reward_model_pairs", 0.0) for row in rows))
    if not any("reward_model_pairs" in row.training for row in rows):
        return "the score of its verdict"
    tested = [row.training for row in rows if "reward_model_accuracy" in row.training]
    num = round(sum(figures["reward_model_held_out"] for figures in tested))
    right = round(sum(figures["reward_model_accuracy"] * figures["reward_model_held_out"] for figures in tested))
    return (
        f"the score of a reward model, which learnt from {count(pairs, 'pair')} of a passing and a failing answer; of "
        f"{num:,} others, never learnt from, it put {right:,} in the right order"
    )


def _budget_sentence(rows: Sequence[IterationMetrics]) -> list[str]:
    """Return which updates a KL budget has ended before their time; [] where none was."""
    cut = [row for row in rows if row.training.get("num_left_out")]
    if not cut:
        return []
    numbers = ", ".join(str(row.iteration) for row in cut)
    left_out = sum(int(row.training["num_left_out"]) for row in cut)
    return [
        f"Stopped by KL budget: {count(len(cut), 'update')} ended early (iteration {numbers}), with "
        f"{count(left_out, 'optimizer step')} left out."
    ]


def _end_sentence(rows: Sequence[IterationMetrics], *, num_iterations: int | None) -> list[str]:
    """Return that its KL budget ended a finished run before its last iteration; [] where it did not."""
    distance = rows[-1].training.get("kl_from_run_start") if rows else None
    if distance is None or num_iterations is None or rows[-1].iteration >= num_iterations:
        return []
    return [
        f"The run's KL budget ended it after {len(rows)} of {num_iterations} iterations, {distance:.1f} nats per "
        "answer from its first weights."
    ]


# ----------------------------------------------------------------------------------------------------------- the tables


def changes(summary: Summary | None, journal: Journal) -> list[Change]:
    """Return the measures that were taken at the start and at the end; none before the run is finished."""
    if summary is None:
        return []
    sealed, formed = summary.sealed_accuracy, summary.sealed_accuracy_well_formed
    lines = [_change("Sealed problems: right answers", "never seen by any role", sealed, journal, "sealed")]
    if formed is not None:
        lines.append(
            Change(
                name="… where both answers are well-formed",
                detail="the gain that is not better form alone",
                before=_share_cell(formed.before, formed.n),
                after=_share_cell(formed.after, formed.n),
                change=_gain_cell(formed.gain, formed.ci_low, formed.ci_high),
                n=f"{formed.n:,}",
            )
        )
    attack, ood = summary.attack_success, summary.ood_accuracy
    lines.append(_change("Frozen attacks: answers that fail", "written before training", attack, journal, "attack_set"))
    lines.append(
        _change("Out of distribution: right answers", "kinds absent from training", ood, journal, "out_of_distribution")
    )
    form = summary.well_formed
    lines.append(
        Change(
            name="Sealed answers that are well-formed",
            detail="whether right or not",
            before=_share_cell(form.before, sealed.n),
            after=_share_cell(form.after, sealed.n),
            change=Cell(text=points(form.after - form.before)),
            n=f"{sealed.n:,}",
        )
    )
    return lines


def facts(
    summary: Summary | None, rows: Sequence[IterationMetrics], journal: Journal, *, budget: float | None
) -> list[Fact]:
    """Return the measures of the whole run so far."""
    if not rows:
        return []
    return [*_critic_facts(rows, journal), *_expert_facts(rows, journal, budget=budget), *_run_facts(summary, rows)]


def lowest_agreement(rows: Sequence[IterationMetrics]) -> AgreementMetrics | None:
    """Return the critic's agreement in its worst iteration; None when no iteration had right and wrong answers."""
    measured = [row.critic_agreement for row in rows if row.critic_agreement.balanced_accuracy is not None]
    return min(measured, key=lambda found: found.balanced_accuracy or 0.0, default=None)


def _change(name: str, detail: str, found: CountedBeforeAfter, journal: Journal, set_name: str) -> Change:
    """Return a line of the table; `found` counts failures in the attack set, right answers elsewhere."""
    iterations = sorted(iteration for stored, iteration in journal.grades if stored == set_name)
    links = (
        [link(set=set_name, iteration=iteration) for iteration in iterations] if len(iterations) == 2 else [None] * 2
    )
    gain = _paired(journal, set_name)
    change = Cell(text=points(found.after - found.before))
    if gain is not None and set_name == "attack_set":
        change = _gain_cell(-gain.gain, -gain.ci_high, -gain.ci_low)
    elif gain is not None:
        change = _gain_cell(gain.gain, gain.ci_low, gain.ci_high)
    return Change(
        name=name,
        detail=detail,
        before=_share_cell(found.before, found.n, to=links[0]),
        after=_share_cell(found.after, found.n, to=links[1]),
        change=change,
        n=f"{found.n:,}",
    )


def _paired(journal: Journal, set_name: str) -> statistics.PairedGain | None:
    """Return the paired gain of right answers, from the answers themselves; None when they are not all there."""
    iterations = sorted(iteration for stored, iteration in journal.grades if stored == set_name)
    if len(iterations) != 2:
        return None
    before, after = (
        {answer.item: answer.correct for answer in journal.grades[set_name, iteration]} for iteration in iterations
    )
    if before.keys() != after.keys():
        return None
    return paired_gain(list(before.values()), [after[item] for item in before])


def _share_cell(value: float, n: int, *, to: str | None = None) -> Cell:
    share = share_of(value, n)
    return Cell(text=percent(value), detail=interval(share.ci_low, share.ci_high), link=to)


def _gain_cell(gain: float, low: float, high: float) -> Cell:
    return Cell(text=points(gain), detail=f"{points(low)} to {points(high)}")


def _critic_facts(rows: Sequence[IterationMetrics], journal: Journal) -> list[Fact]:
    lowest = lowest_agreement(rows)
    if lowest is None:
        return [
            Fact(
                name="Critic agrees with truth",
                detail="no iteration had right and wrong answers",
                value=Cell(text=DASH),
            )
        ]
    at = next(row.iteration for row in rows if row.critic_agreement is lowest)
    recorded = bool(journal.sampled)
    false_pass = share_of(lowest.false_pass or 0.0, lowest.num_bad)
    false_fail = share_of(lowest.false_fail or 0.0, lowest.num_good)
    wrong, right = report_journal.WRONG, report_journal.RIGHT
    found = [
        Fact(
            name="Critic agrees with truth",
            detail=f"balanced, worst iteration ({at}), before any expert; n = {lowest.num_good + lowest.num_bad:,}",
            value=Cell(
                text=percent(lowest.balanced_accuracy),
                detail=interval(lowest.ci_low, lowest.ci_high),
                link=link(set=LIVE, iteration=at, truth=[right, wrong]) if recorded else None,
            ),
        ),
        Fact(
            name="False pass",
            detail=f"wrong answers that it passed there; n = {lowest.num_bad:,}",
            value=Cell(
                text=percent(false_pass.value),
                detail=interval(false_pass.ci_low, false_pass.ci_high),
                link=link(set=LIVE, iteration=at, critic="pass", truth=wrong) if recorded else None,
            ),
        ),
        Fact(
            name="False fail",
            detail=f"right answers that it failed there; n = {lowest.num_good:,}",
            value=Cell(
                text=percent(false_fail.value),
                detail=interval(false_fail.ci_low, false_fail.ci_high),
                link=link(set=LIVE, iteration=at, critic="fail", truth=right) if recorded else None,
            ),
        ),
    ]
    if recorded:
        scores = [answer.score or 0.0 for answer in journal.sampled]
        good = [answer.truth == right for answer in journal.sampled]
        quality = statistics.calibration(scores, good)
        found.append(
            Fact(
                name="P(good): AUROC · Brier · ECE",
                detail=f"all iterations; n = {len(scores):,}",
                value=Cell(
                    text=f"{number(statistics.auroc(good, scores))} · {number(quality.brier)} · "
                    f"{number(quality.expected_error)}",
                    link=link(set=LIVE, truth=[right, wrong]),
                ),
            )
        )
    return found


def _expert_facts(rows: Sequence[IterationMetrics], journal: Journal, *, budget: float | None) -> list[Fact]:
    asked, verdicts = sum(row.experts_asked for row in rows), sum(row.num_verdicts for row in rows)
    bound = "" if budget is None else f"; the budget is {100 * budget:g} %"
    overruled = sum(answer.expert == report_journal.OVERRULED for answer in journal.live)
    return [
        Fact(
            name="Answers that experts were asked about",
            detail=f"{asked:,} of {verdicts:,} verdicts{bound}",
            value=Cell(
                text=percent(asked / verdicts if verdicts else None),
                link=link(set=LIVE, expert=report_journal.EXPERT_ANSWERS) if asked and journal.live else None,
            ),
        ),
        Fact(
            name="… of which the critic was overruled",
            detail="an expert's label takes the place of the critic's",
            value=Cell(
                text=f"{overruled:,}", link=link(set=LIVE, expert=report_journal.OVERRULED) if overruled else None
            ),
        ),
    ]


def _run_facts(summary: Summary | None, rows: Sequence[IterationMetrics]) -> list[Fact]:
    dropped, material = sum(sum(row.pairs_dropped.values()) for row in rows), material_of_rows(rows)
    parity = max((row.parity_max_abs_diff for row in rows if row.parity_max_abs_diff is not None), default=None)
    parity = summary.parity_max_abs_diff if summary else parity
    found = [
        Fact(
            name=f"{TRAINED_ROWS[material].capitalize()} trained",
            detail=f"{dropped:,} queries or answers gave none",
            value=Cell(
                text=f"{sum(row.pairs_trained for row in rows):,}",
                link=link(set=LIVE, fate=report_journal.TRAINED_FATES[material]),
            ),
        ),
        Fact(
            name="Replicas against the learner",
            detail="largest difference of a log-probability in nats, over all publications",
            value=Cell(text=DASH if parity is None else f"{parity:.1e}"),
        ),
    ]
    if summary is None:
        return [*found, Fact(name="Time", detail="iterations", value=Cell(text=duration(sum(r.wall_s for r in rows))))]
    wall = summary.wall_s
    return [
        *found,
        Fact(
            name="Time",
            detail=f"bootstrap {duration(wall.bootstrap)}, start {duration(wall.start)}, "
            f"loop {duration(wall.iterations)}",
            value=Cell(text=duration(wall.total)),
        ),
    ]
