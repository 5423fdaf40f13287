"""Owns the report's charts of those who judge: the critic held against truth, its confidence, the experts."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import plotly.graph_objects as go

from actors.experts import ExpertBudget
from actors.rubrics import FAIL, PASS
from serve import report_journal
from serve.report_chart import (
    ATTACKER,
    CRITIC,
    GRID,
    HEIGHT,
    INK,
    LEARNER,
    MANY,
    SOFT,
    Cell,
    Chart,
    Key,
    Point,
    Series,
    Table,
    draw_line,
    series_keys,
    series_table,
    share_table,
    stacked,
    style,
    style_shares,
    whiskers,
)
from serve.report_journal import EXPERT_ANSWERS, Journal, LiveAnswer
from serve.report_samples import LIVE, confidence_bin, link
from serve.report_words import count, interval, number, percent, share_of
from trainers import statistics
from trainers.statistics import Share
from trainers.summary import INTERVAL_FROM, IterationMetrics


def agreement(rows: Sequence[IterationMetrics], *, recorded: bool) -> Chart:
    """Return the critic's balanced agreement with truth, with the level of chance; `recorded`: its answers are kept."""
    points = []
    for row in rows:
        found = row.critic_agreement
        if found.balanced_accuracy is not None and found.ci_low is not None and found.ci_high is not None:
            share = Share(
                value=found.balanced_accuracy,
                ci_low=found.ci_low,
                ci_high=found.ci_high,
                n=found.num_good + found.num_bad,
            )
            to = _agreement_link(row.iteration, recorded=recorded)
            points.append(
                Point(x=row.iteration, share=share, name=f"iteration {row.iteration}", unit="answers", link=to)
            )
    figure = go.Figure()
    draw_line(figure, points, colour=CRITIC)
    style_shares(figure, rows)
    figure.add_hline(y=0.5, line={"dash": "dot", "color": SOFT, "width": 1})
    lowest = min((point.share.ci_low for point in points), default=0.5)
    figure.update_yaxes(range=[min(0.4, lowest - 0.05), 1.03])
    return Chart(
        key="agreement",
        title="The critic agrees with truth",
        caption="Balanced accuracy of its verdicts on a uniform sample of live answers, before any expert was asked. "
        "Truth is asked for this figure and labels nothing.",
        figure=figure,
        keys=(
            Key(name="balanced accuracy, 95 % band", colour=CRITIC, mark="line"),
            Key(name="chance", colour=SOFT, mark="dash"),
        ),
        table=share_table(["balanced agreement"], [points]),
    )


def error_rates(rows: Sequence[IterationMetrics], *, recorded: bool) -> Chart:
    """Return the critic's false passes and false fails with their intervals."""
    passes, fails = [], []
    for row in rows:
        found = row.critic_agreement
        if found.false_pass is not None:
            passes.append(_error_point(row.iteration, "false pass", found.false_pass, found.num_bad, recorded=recorded))
        if found.false_fail is not None:
            fails.append(_error_point(row.iteration, "false fail", found.false_fail, found.num_good, recorded=recorded))
    figure = go.Figure()
    aside = 0.012 * max(len(rows), 1)
    draw_line(figure, passes, colour=ATTACKER, band=False, aside=-aside)
    draw_line(figure, fails, colour=LEARNER, band=False, aside=aside, symbol="square")
    style_shares(figure, rows)
    highest = max((point.share.ci_high for point in [*passes, *fails]), default=0.1)
    figure.update_yaxes(range=[-0.04 * highest, min(1.03, 1.12 * highest)], dtick=None, nticks=6, tickformat=".0%")
    if highest < 0.05:
        figure.update_yaxes(tickformat=".1%")
    return Chart(
        key="errors",
        title="The critic's mistakes",
        caption="False pass: share of the wrong answers that it passed. False fail: share of the right answers that it "
        "failed. Same sample, with 95 % intervals.",
        figure=figure,
        keys=(
            Key(name="false pass", colour=ATTACKER, mark="line"),
            Key(name="false fail", colour=LEARNER, mark="square"),
        ),
        table=share_table(["false pass", "false fail"], [passes, fails]),
    )


def expected_failures(rows: Sequence[IterationMetrics]) -> tuple[Chart, ...]:
    """Return the share of live answers that experts would fail, as their random checks say; none without any."""
    points = []
    for row in rows:
        found = row.feedback
        if found is None or found.failure_share is None:
            continue
        # Of too few there is no interval: the share may be anything.
        ends = (0.0, 1.0) if found.ci_low is None or found.ci_high is None else (found.ci_low, found.ci_high)
        # The interval is a normal one: near 0 and 1 it reaches beyond what a share can be.
        low, value, high = (min(max(end, 0.0), 1.0) for end in (ends[0], found.failure_share, ends[1]))
        share = Share(value=value, ci_low=low, ci_high=high, n=found.num_drawn)
        to = link(set=LIVE, iteration=row.iteration)
        points.append(
            Point(x=row.iteration, share=share, name=f"iteration {row.iteration}", unit="drawn answers", link=to)
        )
    if not points:
        return ()
    figure = go.Figure()
    draw_line(figure, points, colour=CRITIC)
    style_shares(figure, rows)
    return (
        Chart(
            key="failures",
            title="What experts would fail",
            caption="Share of each iteration's distinct answers: the critic's verdicts on all of them, put right by "
            "the experts' on answers drawn at random (prediction-powered inference). No truth is asked. With "
            f"fewer than {INTERVAL_FROM} drawn the band is everything.",
            figure=figure,
            keys=(Key(name="share failed, 95 % band", colour=CRITIC, mark="line"),),
            table=share_table(["experts would fail"], [points]),
        ),
    )


def calibration(rows: Sequence[IterationMetrics], sampled: Sequence[LiveAnswer]) -> Chart:
    """Return the reliability diagram of P(good) over all iterations, with the number of answers in every bin."""
    title = "What the critic's P(good) is worth"
    if not sampled:
        return Chart(
            key="calibration",
            title=title,
            caption="Not recorded by this version of the run: it kept no list of the answers that truth was asked "
            "about. How well P(good) orders them is known from the metrics.",
            figure=None,
            table=_auroc_table(rows),
        )
    scores = [answer.score or 0.0 for answer in sampled]
    right = [answer.truth == report_journal.RIGHT for answer in sampled]
    bins = [b for b in statistics.calibration(scores, right).bins if b.accuracy is not None]
    names = [confidence_bin((b.low + b.high) / 2) for b in bins]
    shares = [share_of(b.accuracy or 0.0, b.n) for b in bins]
    links = [link(set=LIVE, truth=[report_journal.RIGHT, report_journal.WRONG], sure=name) for name in names]
    hovers = [
        f"P(good) {name}: {count(s.n, 'answer')}<br>{percent(s.value)} right "
        f"(95 % interval {interval(s.ci_low, s.ci_high)} %)<br>mean P(good) {number(b.mean_confidence)}"
        for name, s, b in zip(names, shares, bins, strict=True)
    ]
    means = [b.mean_confidence for b in bins]
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": SOFT, "width": 1, "dash": "dot"}, hoverinfo="skip"
    )
    figure.add_scatter(
        x=means,
        y=[s.value for s in shares],
        error_y=whiskers(shares, colour=CRITIC),
        mode="markers",
        marker={"size": 9, "color": CRITIC},
        hovertext=hovers,
        hoverinfo="text",
        customdata=links,
    )
    figure.add_bar(
        x=[(b.low + b.high) / 2 for b in bins],
        y=[b.n for b in bins],
        width=0.085,
        marker={"color": CRITIC, "opacity": 0.55},
        hovertext=hovers,
        hoverinfo="text",
        customdata=links,
        yaxis="y2",
    )
    style(figure, height=HEIGHT)
    figure.update_layout(
        yaxis={"domain": [0.36, 1], "range": [-0.04, 1.04], "tickformat": ".0%", "dtick": 0.25, "gridcolor": GRID},
        yaxis2={"domain": [0, 0.24], "type": "log", "gridcolor": GRID, "automargin": True, "fixedrange": True},
    )
    most = max(b.n for b in bins)
    figure.update_yaxes(
        range=[math.log10(0.6), math.log10(2 * most)], dtick=1, tickformat=",d", selector={"type": "log"}
    )
    figure.update_yaxes(title={"text": "right", "standoff": 6, "font": {"size": 12, "color": SOFT}})
    figure.layout.yaxis2.title = {"text": "answers", "standoff": 6, "font": {"size": 12, "color": SOFT}}
    figure.update_xaxes(range=[-0.03, 1.03], dtick=0.25, title_text="P(good), in tenths", anchor="y2")
    found = statistics.calibration(scores, right)
    return Chart(
        key="calibration",
        title=title,
        caption=f"Of the {count(len(sampled), 'sampled answer')} of all iterations: the share that truth accepts, by "
        f"the P(good) that the critic gave (below: how many, on a log scale). AUROC "
        f"{number(statistics.auroc(right, scores))}, Brier score {number(found.brier)}, calibration error (ECE) "
        f"{number(found.expected_error)}. Truth is used for this report only: nothing is calibrated on it.",
        figure=figure,
        keys=(
            Key(name="share that is right, 95 % interval", colour=CRITIC, mark="ends"),
            Key(name="perfectly calibrated", colour=SOFT, mark="dash"),
        ),
        table=_calibration_table(sampled),
    )


def _agreement_link(iteration: int, *, recorded: bool) -> str:
    if not recorded:
        return link(set=LIVE, iteration=iteration)
    return link(set=LIVE, iteration=iteration, truth=[report_journal.RIGHT, report_journal.WRONG])


def _error_point(iteration: int, name: str, value: float, n: int, *, recorded: bool) -> Point:
    critic, truth = (PASS, report_journal.WRONG) if name == "false pass" else (FAIL, report_journal.RIGHT)
    to = link(set=LIVE, iteration=iteration, critic=critic, truth=truth)
    return Point(
        x=iteration,
        share=share_of(value, n),
        name=f"{name}, iteration {iteration}",
        unit="answers",
        link=to if recorded else link(set=LIVE, iteration=iteration, critic=critic),
    )


def _auroc_table(rows: Sequence[IterationMetrics]) -> Table:
    return Table(
        head=("iteration", "AUROC", "answers"),
        rows=tuple(
            (
                Cell(text=str(row.iteration), link=link(set=LIVE, iteration=row.iteration)),
                Cell(text=number(row.critic_agreement.auroc)),
                Cell(text=f"{row.critic_agreement.num_good + row.critic_agreement.num_bad:,}"),
            )
            for row in rows
        ),
    )


def _calibration_table(sampled: Sequence[LiveAnswer]) -> Table:
    by_iteration: defaultdict[int, list[LiveAnswer]] = defaultdict(list)
    for answer in sampled:
        by_iteration[answer.iteration].append(answer)
    lines: list[tuple[Cell, ...]] = []
    for name, answers in [*((str(i), found) for i, found in sorted(by_iteration.items())), ("all", list(sampled))]:
        scores = [answer.score or 0.0 for answer in answers]
        right = [answer.truth == report_journal.RIGHT for answer in answers]
        found = statistics.calibration(scores, right)
        truth = [report_journal.RIGHT, report_journal.WRONG]
        to = link(set=LIVE, truth=truth) if name == "all" else link(set=LIVE, iteration=name, truth=truth)
        lines.append(
            (
                Cell(text=name, link=to),
                Cell(text=number(statistics.auroc(right, scores))),
                Cell(text=number(found.brier)),
                Cell(text=number(found.expected_error)),
                Cell(text=f"{len(answers):,}"),
            )
        )
    return Table(head=("iteration", "AUROC", "Brier score", "ECE", "answers"), rows=tuple(lines))


# ---------------------------------------------------------------------------------------------------------- the experts


def experts(rows: Sequence[IterationMetrics], journal: Journal, *, budget: float | None) -> Chart:
    """Return how many answers experts were asked about, by what they said, against what their budget allowed."""
    said = Counter((answer.iteration, answer.expert) for answer in journal.live)
    links = [link(set=LIVE, iteration=row.iteration, expert=EXPERT_ANSWERS) for row in rows]
    series = [
        Series(
            name="no label: abstained, or still to come" if answer == report_journal.ABSTAINED else answer,
            values=[said[row.iteration, answer] for row in rows],
            links=[link(set=LIVE, iteration=row.iteration, expert=answer) for row in rows],
        )
        for answer in EXPERT_ANSWERS
        if any(said[row.iteration, answer] for row in rows)
    ]
    # Without the journal the metrics still say how many were asked.
    series = series or [Series(name="asked", values=[row.experts_asked for row in rows], links=links)]
    figure = stacked(rows, series, unit="answers")
    keys, allowed, caption = series_keys(series), [], ""
    if budget is not None:
        allowed = _allowed(rows, budget)
        caption = f" The budget is {100 * budget:g} % of all verdicts so far, less what was asked before."
        keys += (Key(name="budget", colour=INK, mark="dash"),)
        figure.add_scatter(
            x=[row.iteration for row in rows],
            y=allowed,
            mode="markers" if len(rows) <= MANY else "lines",
            marker={"symbol": "line-ew", "size": 26, "line": {"color": INK, "width": 2}},
            line={"color": INK, "width": 1.5, "shape": "hvh"},
            hovertext=[f"iteration {row.iteration}<br>budget: {num}" for row, num in zip(rows, allowed, strict=True)],
            hoverinfo="text",
            customdata=links,
        )
    return Chart(
        key="experts",
        title="What the experts were asked",
        caption=f"Answers whose verdict was put before an expert, by what the expert said of the critic's.{caption}",
        figure=figure,
        keys=keys,
        table=series_table(rows, series, last=("budget", allowed) if allowed else None),
    )


def expert_matrix(journal: Journal) -> Table | None:
    """Return the critic's verdicts against the experts', counted over the run; None when none was asked."""
    asked = [answer for answer in journal.live if answer.expert != report_journal.NOT_ASKED]
    if not asked:
        return None
    counts = Counter((answer.critic, _expert_label(answer)) for answer in asked)
    columns = (PASS, FAIL, "no label")
    lines = [line for line in (PASS, FAIL, report_journal.UNREADABLE) if any(counts[line, c] for c in columns)]
    return Table(
        head=("critic said", *(f"expert: {column}" for column in columns)),
        rows=tuple(
            (
                Cell(text=line, link=link(set=LIVE, critic=line, expert=EXPERT_ANSWERS)),
                *(
                    Cell(text=f"{counts[line, column]:,}", link=_matrix_link(line, column, num=counts[line, column]))
                    for column in columns
                ),
            )
            for line in lines
        ),
    )


def _expert_label(answer: LiveAnswer) -> str:
    return "no label" if answer.expert == report_journal.ABSTAINED else answer.label or "no label"


def _matrix_link(critic: str, expert: str, *, num: int) -> str | None:
    if not num:
        return None
    if critic == report_journal.UNREADABLE and expert != "no label":
        return link(set=LIVE, critic=critic, expert=report_journal.DECIDED)
    if expert == "no label":
        return link(set=LIVE, critic=critic, expert=report_journal.ABSTAINED)
    return link(set=LIVE, critic=critic, expert=report_journal.AGREED if critic == expert else report_journal.OVERRULED)


def _allowed(rows: Sequence[IterationMetrics], budget: float) -> list[int]:
    """Return how many answers the budget let be asked in each iteration."""
    allowed, num_verdicts, num_asked = [], 0, 0
    for row in rows:
        num_verdicts += row.num_verdicts
        allowed.append(ExpertBudget(fraction=budget).allowed(num_verdicts, num_asked=num_asked))
        num_asked += row.experts_asked
    return allowed
