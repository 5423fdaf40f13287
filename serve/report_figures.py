"""Owns the report's charts of the learner and its attacker, of what was dropped, and of the time."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from actors.rubrics import FAIL
from serve import report_journal
from serve.report_chart import (
    ATTACKER,
    EXPERT,
    HEAT,
    HEIGHT,
    LEARNER,
    MANY,
    OTHER,
    SERIES,
    SOFT,
    SYMBOLS,
    Cell,
    Chart,
    Key,
    Point,
    Series,
    Table,
    cycle,
    draw_ends,
    draw_line,
    graded_ends,
    graded_share,
    plain,
    series_keys,
    series_table,
    share_table,
    stacked,
    style,
    style_iterations,
    style_shares,
)
from serve.report_journal import Journal, cell_name
from serve.report_samples import LIVE, PROPOSALS, link
from serve.report_words import DASH, TRAINED_ROWS, count, material_of_rows, share_of
from trainers.feedback.training_data import Material
from trainers.summary import IterationMetrics

_FATES = {
    "all_pass": report_journal.ALL_PASS,
    "all_fail": report_journal.ALL_FAIL,
    "unjudged": report_journal.UNJUDGED,
    "no_verdict": report_journal.UNJUDGED,
    "rejected": report_journal.FAILS,
}
"""Where the answers behind a reason are; what the margin or equal texts drop is among those in no pair, or left out."""
_MOST_TALL_CELLS = 40
"""A map of more kinds of problems has thinner lines."""
_LEAST_REST_S = 0.05
"""Time outside of all stages that is worth a bar of its own."""


# ------------------------------------------------------------------------------------------------- learner and attacker


def learner(rows: Sequence[IterationMetrics], journal: Journal) -> Chart:
    """Return accuracy: probe after every iteration, sealed and out-of-distribution at the start and at the end."""
    probe = [
        Point(
            x=0,
            share=graded_share(journal, "probe", 0, truth=report_journal.RIGHT),
            name="probe, before training",
            unit="problems",
            link=link(set="probe", iteration=0),
        )
        for _ in journal.grades.get(("probe", 0), [])[:1]
    ]
    probe += [
        Point(
            x=row.iteration,
            share=share_of(row.probe_accuracy, row.num_probe),
            name=f"probe, after iteration {row.iteration}",
            unit="problems",
            link=link(set="probe", iteration=row.iteration),
        )
        for row in rows
    ]
    sealed = graded_ends(journal, "sealed", name="sealed", unit="problems")
    ood = graded_ends(journal, "out_of_distribution", name="out of distribution", unit="problems")
    figure = go.Figure()
    draw_line(figure, probe, colour=LEARNER)
    # Aside of the probe's first and last point, so that no interval hides another.
    aside = 0.018 * max(len(rows), 1)
    draw_ends(figure, ood, colour=OTHER, symbol="square")
    draw_ends(figure, sealed, colour=EXPERT, symbol="diamond", aside=aside)
    style_shares(figure, rows)
    keys = [Key(name="probe problems, 95 % band", colour=LEARNER, mark="line")]
    keys += [Key(name="sealed problems, start and end", colour=EXPERT, mark="ends")] if sealed else []
    keys += [Key(name="out of distribution", colour=OTHER, mark="square")] if ood else []
    return Chart(
        key="learner",
        title="Right answers of the learner",
        caption="Greedy answers that truth accepts. Probe problems are asked after every iteration; sealed ones and "
        "kinds of problems that no role was trained on only at the start and at the end. Truth is used here alone.",
        figure=figure,
        keys=tuple(keys),
        table=share_table(["probe", "sealed", "out of distribution"], [probe, sealed, ood]),
    )


def attacks(rows: Sequence[IterationMetrics], journal: Journal) -> Chart:
    """Return how often attacks succeed: live ones by the critic's verdicts, the frozen set by truth."""
    live = [
        Point(
            x=row.iteration,
            share=share_of(row.live_attack_success, row.num_attacks),
            name=f"live attacks, iteration {row.iteration}",
            unit="queries",
            link=link(set=LIVE, iteration=row.iteration, attack="succeeded"),
        )
        for row in rows
        if row.live_attack_success is not None and row.num_attacks
    ]
    frozen = graded_ends(journal, "attack_set", name="frozen attack set", unit="queries", truth=report_journal.WRONG)
    figure = go.Figure()
    draw_line(figure, live, colour=ATTACKER)
    draw_ends(figure, frozen, colour=EXPERT, symbol="diamond")
    style_shares(figure, rows)
    keys = [Key(name="live attacks, 95 % band", colour=ATTACKER, mark="line")]
    keys += [Key(name="frozen set, start and end", colour=EXPERT, mark="ends")] if frozen else []
    return Chart(
        key="attacks",
        title="Attacks that succeed",
        caption="Live: new queries of which the critic fails at least half of the answers; the attacker follows the "
        "weakness, so this need not fall. Frozen: queries made before training, answers that truth fails.",
        figure=figure,
        keys=tuple(keys),
        table=share_table(["live attacks", "frozen attack set"], [live, frozen]),
    )


def weakness_map(rows: Sequence[IterationMetrics]) -> Chart:
    """Return the critic's fail share: cells down, iterations across; what was not asked is blank."""
    cells = sorted({cell.facets for row in rows for cell in row.cells})
    found = {(cell.facets, row.iteration): cell for row in rows for cell in row.cells}
    iterations = [row.iteration for row in rows]
    shares: list[list[float | None]] = []
    hovers: list[list[str]] = []
    links: list[list[str]] = []
    table: list[tuple[Cell, ...]] = []
    for facets in cells:
        counts = [found.get((facets, iteration)) for iteration in iterations]
        judged = [cell.num_pass + cell.num_fail if cell else 0 for cell in counts]
        line = [c.num_fail / n if c and n else None for c, n in zip(counts, judged, strict=True)]
        shares.append(line)
        links.append([link(set=LIVE, iteration=i, cell=cell_name(facets), critic=FAIL) for i in iterations])
        hovers.append(
            [
                f"{plain(cell_name(facets))}, iteration {i}<br>"
                + (DASH if share is None else f"{share:.0%} failed of {count(n, 'answer')}")
                for i, share, n in zip(iterations, line, judged, strict=True)
            ]
        )
        table.append(
            (
                Cell(text=cell_name(facets), link=link(set=LIVE, cell=cell_name(facets))),
                *(
                    Cell(text=DASH)
                    if share is None
                    else Cell(text=f"{share:.0%}", detail=f"of {n}", link=link(set=LIVE, iteration=i, cell=name))
                    for i, share, n, name in zip(iterations, line, judged, [cell_name(facets)] * len(line), strict=True)
                ),
            )
        )
    figure = go.Figure(
        go.Heatmap(
            x=[str(iteration) for iteration in iterations],
            y=[plain(cell_name(facets)) for facets in cells],
            z=shares,
            customdata=links,
            text=[["" if share is None else f"{100 * share:.0f}" for share in line] for line in shares],
            texttemplate="%{text}" if len(iterations) <= MANY else None,
            hovertext=hovers,
            hoverinfo="text",
            colorscale=HEAT,
            showscale=False,
            zmin=0,
            zmax=1,
            xgap=2 if len(iterations) <= MANY else 0.5,
            ygap=2,
        )
    )
    style(figure, height=70 + (27 if len(cells) <= _MOST_TALL_CELLS else 15) * max(len(cells), 2))
    figure.update_xaxes(type="category", title_text="iteration", showgrid=False, tickangle=0, nticks=12)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, ticksuffix="  ")
    longest = max((len(cell_name(facets)) for facets in cells), default=0)
    return Chart(
        key="weakness",
        min_width=8 * longest + (26 if len(iterations) <= MANY else 12) * len(iterations),
        title="Weakness map",
        caption="Percentage of the sampled answers that the critic failed, kind of problem by iteration. Blank: the "
        "attacker asked nothing of that kind.",
        figure=figure,
        keys=(Key(name="0 % to 100 % failed", colour="", mark="scale"),),
        table=Table(head=("kind of problem", *(f"iteration {i}" for i in iterations)), rows=tuple(table)),
    )


# ----------------------------------------------------------------------------------------------------- what was dropped


def proposals(rows: Sequence[IterationMetrics]) -> Chart:
    """Return what became of the attacker's proposals."""
    outcomes = {outcome for row in rows for outcome in row.proposals}
    series = [
        Series(
            name=outcome.replace("_", " "),
            values=[row.proposals.get(outcome, 0) for row in rows],
            links=[
                link(set=LIVE, iteration=row.iteration)
                if outcome == "accepted"
                else link(set=PROPOSALS, iteration=row.iteration, fate=outcome.replace("_", " "))
                for row in rows
            ],
        )
        for outcome in sorted(outcomes, key=lambda outcome: (outcome != "accepted", outcome))
    ]
    return Chart(
        key="proposals",
        title="The attacker's proposals",
        caption="What it wrote, by what became of it. Only valid, new problems of the training split become queries.",
        figure=stacked(rows, series, unit="proposals"),
        keys=series_keys(series),
        table=series_table(rows, series),
    )


_TRAINED_CAPTIONS: dict[Material, str] = {
    "pairs": "A pair needs an answer that passes and one that fails to the same query. All pass, all fail: queries; "
    "the other reasons: answers or candidate pairs.",
    "judged": "Every judged answer, good or bad by its verdict, each text once for a query. The reasons count answers.",
    "samples": "Every judged answer with the score of its verdict. The reasons count answers.",
    "groups": "A group is a query with its judged answers, each text once. Lone, equal scores: queries; the other "
    "reasons: answers.",
    "accepted": "Every answer that passes, each text once for a query. The reasons count answers.",
}


def pairs(rows: Sequence[IterationMetrics]) -> Chart:
    """Return what became rows of an update, of preference pairs mostly, and what was dropped, by reason."""
    material = material_of_rows(rows)
    fates = report_journal.TRAINED_FATES[material]
    series = [
        Series(
            name=f"{TRAINED_ROWS[material]} trained",
            values=[row.pairs_trained for row in rows],
            links=[link(set=LIVE, iteration=row.iteration, fate=fates) for row in rows],
        )
    ]
    for reason in sorted({reason for row in rows for reason in row.pairs_dropped}):
        fate = _FATES.get(reason, report_journal.UNPAIRED if material == "pairs" else report_journal.LEFT_OUT)
        series.append(
            Series(
                name=f"dropped: {reason.replace('_', ' ')}",
                values=[row.pairs_dropped.get(reason, 0) for row in rows],
                links=[link(set=LIVE, iteration=row.iteration, fate=fate) for row in rows],
            )
        )
    return Chart(
        key="pairs",
        title="Pairs trained, and what gave none" if material == "pairs" else "Answers trained, and what was left out",
        caption=_TRAINED_CAPTIONS[material],
        figure=stacked(rows, series, unit=""),
        keys=series_keys(series),
        table=series_table(rows, series),
    )


# -------------------------------------------------------------------------------------------------------- time and rate


def seconds(rows: Sequence[IterationMetrics]) -> Chart:
    """Return the wall-clock time of every iteration by stage."""
    values = {
        stage: [row.seconds.get(stage, 0.0) for row in rows]
        for stage in dict.fromkeys(stage for row in rows for stage in row.seconds)
    }
    rest = [max(0.0, row.wall_s - sum(row.seconds.values())) for row in rows]
    if max(rest) >= _LEAST_REST_S:
        values["between stages"] = rest
    series = [
        Series(name=stage.replace("_", " "), values=spent, links=[_stage_link(stage, row) for row in rows])
        for stage, spent in values.items()
    ]
    figure = stacked(rows, series, unit="s")
    figure.update_yaxes(title={"text": "seconds", "standoff": 6, "font": {"size": 12, "color": SOFT}})
    return Chart(
        key="seconds",
        title="Time per stage",
        caption="Wall-clock seconds of each iteration. Rollout is attack, answers and critiques, which stream into one "
        "another. A bar leads to what its stage worked on.",
        figure=figure,
        keys=series_keys(series),
        table=series_table(rows, series, last=("whole iteration", [row.wall_s for row in rows])),
    )


def tokens_per_s(rows: Sequence[IterationMetrics]) -> Chart:
    """Return generated tokens per second by pool."""
    series = [
        Series(
            name=pool,
            values=[row.tokens_per_s.get(pool, 0.0) for row in rows],
            links=[_pool_link(pool, row.iteration) for row in rows],
        )
        for pool in dict.fromkeys(pool for row in rows for pool in row.tokens_per_s)
    ]
    figure = go.Figure()
    for pool, colour, symbol in zip(series, cycle(SERIES, len(series)), cycle(SYMBOLS, len(series)), strict=True):
        figure.add_scatter(
            x=[row.iteration for row in rows],
            y=list(pool.values),
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 8, "symbol": symbol},
            hovertext=[
                f"{plain(pool.name)}, iteration {row.iteration}<br>{rate:,.0f} tokens/s"
                for row, rate in zip(rows, pool.values, strict=True)
            ],
            hoverinfo="text",
            customdata=list(pool.links),
        )
    style(figure, height=HEIGHT)
    style_iterations(figure, rows)
    rates = [rate for pool in series for rate in pool.values]
    # Pools differ by orders of magnitude; a rate of 0 has no place on a log scale.
    is_log = bool(rates) and min(rates) > 0 and max(rates) > 20 * min(rates)
    figure.update_yaxes(**({"type": "log", "dtick": 1} if is_log else {"rangemode": "tozero"}), tickformat=",.0f")
    return Chart(
        key="tokens",
        title="Generated tokens per second",
        caption=f"By pool, over the whole iteration, waiting included{'; log scale' if is_log else ''}.",
        figure=figure,
        keys=series_keys(series, mark="line"),
        table=series_table(rows, series),
    )


def _stage_link(stage: str, row: IterationMetrics) -> str:
    iteration = row.iteration
    match stage:
        case "judge":
            return link(set=LIVE, iteration=iteration, expert=report_journal.EXPERT_ANSWERS)
        case "pair" | "update":
            return link(set=LIVE, iteration=iteration, fate=report_journal.TRAINED_FATES[row.material])
        case "publish" | "evaluate":
            return link(set="probe", iteration=iteration)
        case _:
            return link(set=LIVE, iteration=iteration)


def _pool_link(pool: str, iteration: int) -> str:
    return link(set=[PROPOSALS, LIVE] if pool == "attacker" else LIVE, iteration=iteration)
