"""Owns the report's charts: plotly figures made from the rows of a run's metrics. Knows nothing of HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

import plotly.graph_objects as go

from trainers.statistics import wilson
from trainers.summary import IterationMetrics

LEARNER, ATTACKER, CRITIC, EXPERT, INK, GRID = "#2458d3", "#c4441c", "#0b7a6b", "#7a3fc4", "#30363d", "#e6e8eb"
_SERIES = ("#c4441c", "#2458d3", "#0b7a6b", "#7a3fc4", "#e08a1e", "#5b6470", "#3fa7d6", "#a8326e")
_DROPPED = ("#f0c689", "#b9d8c9", "#d9a9a0", "#c9bfe3", "#c4ccd6", "#e7d9b8", "#a9c4d4")
_HEAT = ((0.0, "#f3f6fb"), (0.25, "#fbe3c4"), (0.5, "#f4a96a"), (0.75, "#dc5f35"), (1.0, "#8c1d18"))
_BAND_OPACITY = "24"


def probe_accuracy(rows: Sequence[IterationMetrics]) -> go.Figure:
    """Return the curve of the accuracy on probe problems, with Wilson intervals."""
    points = [(row.iteration, row.probe_accuracy, row.num_probe) for row in rows]
    return _shares(points, colour=LEARNER, unit="problems")


def live_attack_success(rows: Sequence[IterationMetrics]) -> go.Figure:
    """Return the curve of the live attack success, with Wilson intervals."""
    points = [
        (row.iteration, row.live_attack_success, row.num_attacks)
        for row in rows
        if row.live_attack_success is not None and row.num_attacks
    ]
    return _shares(points, colour=ATTACKER, unit="queries")


def critic_agreement(rows: Sequence[IterationMetrics]) -> go.Figure:
    """Return the curve of the critic's balanced agreement with truth, with its interval and the level of chance."""
    points = []
    for row in rows:
        found = row.critic_agreement
        if found.balanced_accuracy is not None and found.ci_low is not None and found.ci_high is not None:
            n = found.num_good + found.num_bad
            points.append((row.iteration, found.balanced_accuracy, found.ci_low, found.ci_high, n))
    figure = _curve(points, colour=CRITIC, unit="answers")
    figure.add_hline(
        y=0.5,
        line={"dash": "dot", "color": "#8b949e", "width": 1},
        annotation={"text": "chance", "font": {"color": "#6e7781"}},
        annotation_position="bottom right",
    )
    lowest = min((low for _, _, low, _, _ in points), default=0.5)
    figure.update_yaxes(range=[min(0.42, lowest - 0.03), 1.02])
    return figure


def weakness_map(rows: Sequence[IterationMetrics]) -> go.Figure:
    """Return the heat map of the critic's fail share: cells down, iterations across; what was not asked is blank."""
    cells = sorted({cell.facets for row in rows for cell in row.cells})
    found = {(row.iteration, cell.facets): cell for row in rows for cell in row.cells}
    iterations = [row.iteration for row in rows]
    shares: list[list[float | None]] = []
    hovers: list[list[str]] = []
    for facets in cells:
        shares.append([])
        hovers.append([])
        for iteration in iterations:
            cell = found.get((iteration, facets))
            judged = cell.num_pass + cell.num_fail if cell else 0
            share = cell.num_fail / judged if cell and judged else None
            shares[-1].append(share)
            detail = f"{share:.0%} failed of {judged} answers" if share is not None else "not asked"
            hovers[-1].append(f"{_cell_name(facets)}, iteration {iteration}<br>{detail}")
    figure = go.Figure(
        go.Heatmap(
            x=[str(iteration) for iteration in iterations],
            y=[_cell_name(facets) for facets in cells],
            z=shares,
            text=[[_whole_percent(share) for share in line] for line in shares],
            texttemplate="%{text}" if len(iterations) <= 12 else None,
            hovertext=hovers,
            hoverinfo="text",
            colorscale=_HEAT,
            zmin=0,
            zmax=1,
            xgap=2,
            ygap=2,
            colorbar={"tickformat": ".0%", "thickness": 10, "outlinewidth": 0, "len": 0.9, "dtick": 0.5},
        )
    )
    _style(figure, height=80 + 28 * max(len(cells), 2))
    figure.update_xaxes(type="category", title_text="iteration", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, ticksuffix=" ")
    return figure


def pairs(rows: Sequence[IterationMetrics]) -> go.Figure:
    """Return stacked bars of what became preference pairs and what was dropped, by reason."""
    reasons = sorted({reason for row in rows for reason in row.pairs_dropped})
    figure = go.Figure()
    figure.add_bar(name="pairs trained", x=_numbers(rows), y=[r.pairs_trained for r in rows], marker_color=LEARNER)
    for reason, colour in zip(reasons, _cycle(_DROPPED, len(reasons)), strict=True):
        counts = [row.pairs_dropped.get(reason, 0) for row in rows]
        name = f"dropped: {html.escape(reason.replace('_', ' '))}"
        figure.add_bar(name=name, x=_numbers(rows), y=counts, marker_color=colour)
    return _bars(figure)


def experts(rows: Sequence[IterationMetrics]) -> go.Figure:
    """Return bars of the share of answers for which an expert was asked."""
    figure = go.Figure()
    figure.add_bar(
        x=_numbers(rows),
        y=[row.experts_asked / row.num_verdicts if row.num_verdicts else 0.0 for row in rows],
        customdata=[[row.experts_asked, row.num_verdicts] for row in rows],
        hovertemplate="%{y:.1%}: %{customdata[0]} of %{customdata[1]} answers<extra></extra>",
        marker_color=EXPERT,
        showlegend=False,
    )
    _bars(figure)
    figure.update_yaxes(tickformat=".1%", rangemode="tozero")
    return figure


def seconds_by_stage(rows: Sequence[IterationMetrics]) -> go.Figure:
    """Return each stage's mean seconds per iteration with its range; not stacked, since stages that stream overlap."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row.seconds))
    spent = [[row.seconds[stage] for row in rows if stage in row.seconds] for stage in stages]
    means = [sum(values) / len(values) for values in spent]
    figure = go.Figure(
        go.Bar(
            orientation="h",
            y=[html.escape(stage.replace("_", " ")) for stage in stages],
            x=means,
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [max(values) - mean for values, mean in zip(spent, means, strict=True)],
                "arrayminus": [mean - min(values) for values, mean in zip(spent, means, strict=True)],
                "color": "#5b6470",
                "thickness": 1.2,
                "width": 4,
            },
            customdata=[[min(values), max(values)] for values in spent],
            hovertemplate="%{y}: %{x:.1f} s (%{customdata[0]:.1f} to %{customdata[1]:.1f})<extra></extra>",
            marker_color="#7d93c9",
            showlegend=False,
        )
    )
    _style(figure, height=90 + 30 * max(len(stages), 2))
    figure.update_layout(bargap=0.35)
    figure.update_xaxes(title_text="seconds per iteration", rangemode="tozero")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, ticksuffix=" ")
    return figure


def tokens_per_s(rows: Sequence[IterationMetrics], *, height: int) -> go.Figure:
    """Return the curve of generated tokens per second by pool, `height` pixels high."""
    pools = list(dict.fromkeys(pool for row in rows for pool in row.tokens_per_s))
    figure = go.Figure()
    for pool, colour in zip(pools, _cycle(_SERIES, len(pools)), strict=True):
        figure.add_scatter(
            name=html.escape(pool),
            x=_numbers(rows),
            y=[row.tokens_per_s.get(pool) for row in rows],
            mode="lines+markers",
            line={"color": colour, "width": 2},
        )
    _style(figure, height=height)
    figure.update_layout(hovermode="x unified", legend=_LEGEND)
    figure.update_xaxes(title_text="iteration", **_ticks(len(rows)))
    figure.update_yaxes(rangemode="tozero", tickformat=",.0f")
    figure.update_traces(hovertemplate="%{y:,.0f} tokens/s")
    return figure


_LEGEND = {"orientation": "h", "y": -0.28, "x": 0, "yanchor": "top", "font": {"size": 12}, "traceorder": "normal"}


def _shares(points: Sequence[tuple[int, float, int]], *, colour: str, unit: str) -> go.Figure:
    intervals = [(i, value, wilson(round(value * n), n), n) for i, value, n in points]
    return _curve([(i, value, w.ci_low, w.ci_high, n) for i, value, w, n in intervals], colour=colour, unit=unit)


def _curve(points: Sequence[tuple[int, float, float, float, int]], *, colour: str, unit: str) -> go.Figure:
    """Return a line through (iteration, value, low, high, n) with its 95 % band."""
    x = [point[0] for point in points]
    figure = go.Figure()
    figure.add_scatter(
        x=x + x[::-1],
        y=[point[3] for point in points] + [point[2] for point in reversed(points)],
        fill="toself",
        fillcolor=colour + _BAND_OPACITY,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )
    figure.add_scatter(
        x=x,
        y=[point[1] for point in points],
        customdata=[[point[2], point[3], point[4]] for point in points],
        hovertemplate="iteration %{x}: %{y:.1%}<br>95 % CI %{customdata[0]:.1%} to %{customdata[1]:.1%}"
        f"<br>n = %{{customdata[2]:,}} {unit}<extra></extra>",
        mode="lines+markers",
        line={"color": colour, "width": 2.5},
        # With one point there is no band to see.
        error_y=_error_bar(points[0], colour) if len(points) == 1 else None,
        marker={"size": 7},
        showlegend=False,
    )
    _style(figure, height=260)
    figure.update_xaxes(title_text="iteration", **_ticks(len(points)))
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], dtick=0.25)
    return figure


def _error_bar(point: tuple[int, float, float, float, int], colour: str) -> dict[str, object]:
    _, value, low, high, _ = point
    return {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low], "color": colour}


def _bars(figure: go.Figure) -> go.Figure:
    _style(figure, height=300)
    figure.update_layout(barmode="stack", bargap=0.3, legend=_LEGEND)
    figure.update_xaxes(title_text="iteration", type="category", showgrid=False)
    return figure


def _style(figure: go.Figure, *, height: int) -> None:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 12, "t": 12, "b": 8},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"bgcolor": "white", "bordercolor": GRID, "font": {"color": INK, "size": 13}},
        dragmode=False,
    )
    soft = {"size": 12, "color": "#6e7781"}
    figure.update_xaxes(
        automargin=True, gridcolor=GRID, zeroline=False, fixedrange=True, title={"standoff": 8, "font": soft}
    )
    figure.update_yaxes(automargin=True, gridcolor=GRID, zeroline=False, fixedrange=True)


def _ticks(num_points: int) -> dict[str, object]:
    return {"dtick": 1} if num_points <= 12 else {"nticks": 10}


def _numbers(rows: Sequence[IterationMetrics]) -> list[int]:
    return [row.iteration for row in rows]


def _cycle(colours: Sequence[str], num: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(num)]


def _cell_name(facets: tuple[str, ...]) -> str:
    # plotly reads <b>, <a> and more in its texts: a facet is a plain word.
    return html.escape(" · ".join(facets))


def _whole_percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"
