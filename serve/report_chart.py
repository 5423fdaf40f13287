"""Owns how a chart of the report is made: a plotly figure, its legend, and a table of the same figures.

Every point, bar, field and cell of a table carries the link to the samples behind it (serve/report_samples.py). Colours
are names of the page's CSS variables, so that a chart follows the reader's light or dark theme.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from serve import report_journal
from serve.report_journal import Journal
from serve.report_samples import LIVE, link
from serve.report_words import DASH, interval, percent
from serve.visible_text import visible
from trainers.statistics import Share, wilson
from trainers.summary import IterationMetrics

LEARNER, ATTACKER, CRITIC, EXPERT, OTHER = (f"var(--{n})" for n in ("learner", "attacker", "critic", "expert", "other"))
INK, SOFT, GRID, CARD = (f"var(--{name})" for name in ("ink", "soft", "grid", "card"))
SERIES = tuple(f"var(--series-{i})" for i in range(1, 9))
HEAT = tuple((i / 4, f"var(--heat-{i})") for i in range(5))
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "star", "x")
HEIGHT = 290
MANY = 12
"""Iterations from which on points are drawn small and whiskers as bands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure of a table."""

    text: str
    detail: str = ""
    """Smaller, after it."""
    link: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The figures of a chart, or others, to read."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of a legend."""

    name: str
    colour: str
    mark: str
    """How it is drawn: "line", "square", "ends", "bar", "dash" or "scale"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One figure with everything that stands around it."""

    key: str
    title: str
    caption: str
    figure: go.Figure | None
    """None when the run did not record what it shows; `caption` then says so."""
    keys: tuple[Key, ...] = ()
    table: Table | None = None
    min_width: int = 0
    """Pixels that it needs; in a narrower window it scrolls within its frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A share at an iteration, and where its samples are."""

    x: float
    share: Share
    name: str
    """What was measured and when, for the one who points at it."""
    unit: str
    link: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One value per iteration."""

    name: str
    values: Sequence[float]
    links: Sequence[str]


# --------------------------------------------------------------------------------------------------------------- shares


def graded_share(journal: Journal, name: str, iteration: int, *, truth: str) -> Share:
    """Return the share of a set's answers, asked in one iteration, of which truth says so."""
    answers = journal.grades[name, iteration]
    return wilson(sum(answer.truth == truth for answer in answers), len(answers))


def graded_ends(
    journal: Journal, set_name: str, *, name: str, unit: str, truth: str = report_journal.RIGHT
) -> list[Point]:
    """Return the share of a set's answers of which truth says so, wherever the set was asked."""
    found = sorted(iteration for stored, iteration in journal.grades if stored == set_name)
    return [
        Point(
            x=iteration,
            share=graded_share(journal, set_name, iteration, truth=truth),
            name=f"{name}, {'before training' if iteration == 0 else f'after iteration {iteration}'}",
            unit=unit,
            link=link(set=set_name, iteration=iteration)
            if truth == report_journal.RIGHT
            else link(set=set_name, iteration=iteration, truth=truth),
        )
        for iteration in found
    ]


def draw_line(
    figure: go.Figure,
    points: Sequence[Point],
    *,
    colour: str,
    band: bool = True,
    aside: float = 0.0,
    symbol: str = "circle",
) -> None:
    """Draw a line through points with its 95 % band, or with whiskers."""
    is_dense = len(points) > MANY + 1
    has_band = (band or is_dense) and len(points) > 1
    x = [point.x + (0 if is_dense else aside) for point in points]
    if has_band:
        figure.add_scatter(
            x=x + x[::-1],
            y=[p.share.ci_high for p in points] + [p.share.ci_low for p in reversed(points)],
            fill="toself",
            fillcolor=colour.replace(")", "-band)"),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
        )
    size = 4 if is_dense else 7
    _draw_points(figure, points, x=x, colour=colour, symbol=symbol, dash="solid", has_whiskers=not has_band, size=size)


def draw_ends(figure: go.Figure, points: Sequence[Point], *, colour: str, symbol: str, aside: float = 0.0) -> None:
    """Draw what was measured at the start and at the end: two points with whiskers, joined faintly."""
    x = [point.x + (aside if point.x else -aside) for point in points]
    _draw_points(figure, points, x=x, colour=colour, symbol=symbol, dash="dot", has_whiskers=True, size=10)


def _draw_points(
    figure: go.Figure,
    points: Sequence[Point],
    *,
    x: Sequence[float],
    colour: str,
    symbol: str,
    dash: str,
    has_whiskers: bool,
    size: int,
) -> None:
    figure.add_scatter(
        x=list(x),
        y=[point.share.value for point in points],
        error_y=whiskers([point.share for point in points], colour=colour) if has_whiskers else None,
        mode="lines+markers",
        line={"color": colour, "width": 2.5 if dash == "solid" else 1.2, "dash": dash},
        marker={"size": size, "symbol": symbol, "color": colour},
        hovertext=[_hover(point) for point in points],
        hoverinfo="text",
        customdata=[point.link for point in points],
    )


def _hover(point: Point) -> str:
    share = point.share
    return (
        f"{point.name}<br>{percent(share.value)} (95 % interval {interval(share.ci_low, share.ci_high)} %)"
        f"<br>n = {share.n:,} {point.unit}"
    )


def whiskers(shares: Sequence[Share], *, colour: str) -> dict[str, Any]:
    """Return plotly's error bars of shares."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [share.ci_high - share.value for share in shares],
        "arrayminus": [share.value - share.ci_low for share in shares],
        "color": colour,
        "thickness": 1.4,
        "width": 4,
    }


def share_table(names: Sequence[str], series: Sequence[Sequence[Point]]) -> Table:
    """Return shares with their intervals: a line per iteration, a column per name that is known."""
    known = [(name, {point.x: point for point in points}) for name, points in zip(names, series, strict=True) if points]
    iterations = sorted({x for _, points in known for x in points})
    return Table(
        head=("after iteration", *(name for name, _ in known)),
        rows=tuple(
            (
                Cell(text=f"{x:.0f}"),
                *(
                    Cell(
                        text=percent(points[x].share.value),
                        detail=f"{interval(points[x].share.ci_low, points[x].share.ci_high)}, "
                        f"n = {points[x].share.n:,}",
                        link=points[x].link,
                    )
                    if x in points
                    else Cell(text=DASH)
                    for _, points in known
                ),
            )
            for x in iterations
        ),
    )


def style_shares(figure: go.Figure, rows: Sequence[IterationMetrics]) -> None:
    """Give a figure of shares by iteration its axes."""
    style(figure, height=HEIGHT)
    style_iterations(figure, rows)
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03], dtick=0.25)


# --------------------------------------------------------------------------------------------------------------- series


def stacked(rows: Sequence[IterationMetrics], series: Sequence[Series], *, unit: str) -> go.Figure:
    """Return stacked bars, one per iteration."""
    figure = go.Figure()
    for one, colour in zip(series, cycle(SERIES, len(series)), strict=True):
        figure.add_bar(
            x=[row.iteration for row in rows],
            y=list(one.values),
            marker={"color": colour, "line": {"color": CARD, "width": 0.6}},
            hovertext=[
                f"{plain(one.name)}<br>iteration {row.iteration}: {_written(value)} {unit}"
                for row, value in zip(rows, one.values, strict=True)
            ],
            hoverinfo="text",
            customdata=list(one.links),
        )
    style(figure, height=HEIGHT)
    style_iterations(figure, rows)
    figure.update_layout(barmode="stack", bargap=0.28)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(rangemode="tozero")
    return figure


def series_keys(series: Sequence[Series], *, mark: str = "bar") -> tuple[Key, ...]:
    """Return the legend of series in the order of their colours."""
    colours = cycle(SERIES, len(series))
    return tuple(Key(name=one.name, colour=colour, mark=mark) for one, colour in zip(series, colours, strict=True))


def series_table(
    rows: Sequence[IterationMetrics], series: Sequence[Series], *, last: tuple[str, Sequence[float]] | None = None
) -> Table:
    """Return series as a table, a line per iteration; `last` is a column that leads nowhere."""
    lines = []
    for place, row in enumerate(rows):
        line = [Cell(text=str(row.iteration), link=link(set=LIVE, iteration=row.iteration))]
        line += [
            Cell(text=_written(one.values[place]), link=one.links[place] if one.values[place] else None)
            for one in series
        ]
        lines.append((*line, *([Cell(text=_written(last[1][place]))] if last else [])))
    head = ("iteration", *(one.name for one in series), *([last[0]] if last else []))
    return Table(head=head, rows=tuple(lines))


def _written(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


# ---------------------------------------------------------------------------------------------------------------- style


def style_iterations(figure: go.Figure, rows: Sequence[IterationMetrics]) -> None:
    """Number the iterations along the bottom, as many as there is room for."""
    ticks = {"dtick": 1} if len(rows) <= MANY else {"nticks": 10}
    figure.update_xaxes(title_text="iteration", tickformat="d", **ticks)


def style(figure: go.Figure, *, height: int) -> None:
    """Give a figure the report's fonts, colours and margins; its legend stands outside of it."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 10, "t": 10, "b": 8},
        font={"family": "system-ui, sans-serif", "size": 12.5, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"bgcolor": CARD, "bordercolor": GRID, "font": {"color": INK, "size": 13}, "align": "left"},
        hovermode="closest",
        showlegend=False,
        dragmode=False,
    )
    soft = {"size": 12, "color": SOFT}
    figure.update_xaxes(
        automargin=True, gridcolor=GRID, zeroline=False, fixedrange=True, ticks="", title={"standoff": 8, "font": soft}
    )
    figure.update_yaxes(automargin=True, gridcolor=GRID, zeroline=False, fixedrange=True, ticks="")


def cycle(values: Sequence[str], num: int) -> list[str]:
    """Return `num` values, from the beginning again when there are fewer."""
    return [values[i % len(values)] for i in range(num)]


def plain(name: str) -> str:
    """Return a name for plotly's texts, in which <b>, <a> and more would be read as markup."""
    return html.escape(visible(name))
