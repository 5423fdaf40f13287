"""Owns `report.html`: one offline page made from what a run has written. Knows neither Ray nor engines."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from serve import report_figures
from serve.report_samples import pick_samples
from trainers.statistics import wilson
from trainers.summary import (
    AgreementMetrics,
    CriticAgreement,
    GainSummary,
    IterationMetrics,
    Summary,
    read_metrics,
    read_summary,
)

REPORT_FILE = "report.html"
_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """One headline figure."""

    name: str
    value: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    """One figure with its place and its caption."""

    key: str
    title: str
    caption: str
    figure: go.Figure
    wide: bool = False


def write_report(run_dir: Path) -> Path:
    """Write the run's `report.html` from its summary, metrics and journal, and return its path.

    A run that is still going, or was stopped, gets a report of what it has committed, and says so.

    Raises:
        ValueError: `run_dir` is not a directory.
    """
    if not run_dir.is_dir():
        raise ValueError(f"report: got {run_dir}, wanted the directory of a run; `elenchus run CONFIG` makes one")
    summary, rows = read_summary(run_dir), read_metrics(run_dir)
    charts = _charts(rows)
    template = _environment().get_template(_TEMPLATE)
    page = template.render(
        run=summary.run if summary else run_dir.resolve().name,
        summary=summary,
        rows=rows,
        tiles=_final_tiles(summary) if summary else _live_tiles(rows),
        hero=_dumbbell(summary.sealed_accuracy) if summary else None,
        charts=charts,
        # Through JSON: plotly's own objects hold NumPy arrays.
        figures={chart.key: json.loads(chart.figure.to_json()) for chart in charts},
        training=sorted({name for row in rows for name in row.training}),
        samples=pick_samples(run_dir),
        plotly_js=Markup(get_plotlyjs()),
        nonce=secrets.token_urlsafe(16),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    path = run_dir / REPORT_FILE
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "duration": _duration, "tone": _tone}
    return environment


def _final_tiles(summary: Summary) -> list[_Tile]:
    agreement, attack, ood = summary.critic_agreement, summary.attack_success, summary.ood_accuracy
    well_formed = summary.sealed_accuracy_well_formed
    return [
        _Tile(
            name="Frozen attack set: answers that fail",
            value=f"{_percent(attack.before)} → {_percent(attack.after)}",
            detail=f"n = {attack.n:,}; {_interval(attack.after, attack.n)} at the end",
        ),
        _Tile(
            name="Out of distribution: right answers",
            value=f"{_percent(ood.before)} → {_percent(ood.after)}",
            detail=f"n = {ood.n:,}; families that no role was trained on",
        ),
        _Tile(
            name="Critic agrees with truth, lowest iteration",
            value=_percent(agreement.lowest),
            detail=f"balanced; {_errors(agreement)}, AUROC {_number(agreement.auroc)}",
        ),
        _Tile(
            name="Answers that experts were asked about",
            value=_percent(summary.experts.fraction),
            detail=f"{summary.experts.asked:,} of {summary.experts.verdicts:,} verdicts",
        ),
        _Tile(
            name="Well-formed sealed answers",
            value=f"{_percent(summary.well_formed.before)} → {_percent(summary.well_formed.after)}",
            detail=f"gain where well-formed both times: {_points(well_formed.gain)} "
            f"({_points(well_formed.ci_low)} to {_points(well_formed.ci_high)}), n = {well_formed.n:,}"
            if well_formed
            else "none is well-formed both times",
        ),
        _Tile(
            name="Preference pairs trained",
            value=f"{summary.pairs.trained:,}",
            detail=f"{sum(summary.pairs.dropped.values()):,} dropped, counted by reason below",
        ),
        _Tile(
            name="Replicas against the learner",
            value=f"{summary.parity_max_abs_diff:.1e}",
            detail=f"largest log-prob difference in nats, up to {summary.policy_version}",
        ),
        _Tile(
            name="Wall-clock time",
            value=_duration(summary.wall_s.total),
            detail=f"bootstrap {_duration(summary.wall_s.bootstrap)}, start {_duration(summary.wall_s.start)}, "
            f"loop {_duration(summary.wall_s.iterations)}",
        ),
    ]


def _live_tiles(rows: Sequence[IterationMetrics]) -> list[_Tile]:
    if not rows:
        return []
    last = rows[-1]
    agreement = last.critic_agreement
    asked, verdicts = sum(row.experts_asked for row in rows), sum(row.num_verdicts for row in rows)
    return [
        _Tile(
            name=f"Probe problems answered rightly, {last.policy_version}",
            value=_percent(last.probe_accuracy),
            detail=f"{_interval(last.probe_accuracy, last.num_probe)}, n = {last.num_probe:,}; "
            f"{_percent(rows[0].probe_accuracy)} after iteration {rows[0].iteration}",
        ),
        _Tile(
            name="Live attack success",
            value=_percent(last.live_attack_success),
            detail=f"of {last.num_attacks:,} queries, by the critic's verdicts",
        ),
        _Tile(
            name="Critic agrees with truth",
            value=_percent(agreement.balanced_accuracy),
            detail=f"balanced; {_errors(agreement)}",
        ),
        _Tile(
            name="Answers that experts were asked about",
            value=_percent(asked / verdicts if verdicts else 0.0),
            detail=f"{asked:,} of {verdicts:,} verdicts",
        ),
    ]


def _charts(rows: Sequence[IterationMetrics]) -> list[_Chart]:
    if not rows:
        return []
    seconds = report_figures.seconds_by_stage(rows)
    return [
        _Chart(
            key="probe",
            title="Probe accuracy",
            caption="Right greedy answers to the probe problems after each update; band: 95 % interval.",
            figure=report_figures.probe_accuracy(rows),
        ),
        _Chart(
            key="attack",
            title="Live attack success",
            caption="New queries of which the critic fails at least half of the answers.",
            figure=report_figures.live_attack_success(rows),
        ),
        _Chart(
            key="critic",
            title="Critic's agreement with truth",
            caption="Balanced accuracy on a uniform sample of live answers, before any expert was asked.",
            figure=report_figures.critic_agreement(rows),
        ),
        _Chart(
            key="weakness",
            title="Weakness map",
            caption="Percentage of answers that the critic failed, taxonomy cell by iteration. Blank: not asked.",
            figure=report_figures.weakness_map(rows),
            wide=True,
        ),
        _Chart(
            key="experts",
            title="Experts asked",
            caption="Share of an iteration's answers that went to an expert.",
            figure=report_figures.experts(rows),
        ),
        _Chart(
            key="pairs",
            title="Pairs and drops",
            caption="Preference pairs trained on, and the queries or candidates that gave none.",
            figure=report_figures.pairs(rows),
        ),
        _Chart(
            key="seconds",
            title="Time per stage",
            caption="Mean seconds per iteration; whiskers: shortest and longest. Stages stream, so they overlap.",
            figure=seconds,
        ),
        _Chart(
            key="tokens",
            title="Generated tokens per second",
            caption="By pool.",
            figure=report_figures.tokens_per_s(rows, height=seconds.layout.height),
        ),
    ]


def _dumbbell(gain: GainSummary) -> dict[str, str]:
    """Return the places, as CSS percentages, of before, after and the gain's interval laid from before."""
    low, high = (min(1.0, max(0.0, gain.before + end)) for end in (gain.ci_low, gain.ci_high))
    left, right = sorted((gain.before, gain.after))
    places = {
        "before": gain.before,
        "after": gain.after,
        "left": left,
        "width": right - left,
        "ci_left": low,
        "ci_width": high - low,
    }
    return {name: f"{100 * place:.2f}%" for name, place in places.items()}


def _interval(value: float, n: int) -> str:
    share = wilson(round(value * n), n)
    return f"95 % CI {_percent(share.ci_low)} to {_percent(share.ci_high)}"


def _errors(found: CriticAgreement | AgreementMetrics) -> str:
    return f"false pass {_percent(found.false_pass)}, false fail {_percent(found.false_fail)}"


def _percent(value: float | None) -> str:
    """Return a share as text; a dash when it was not measured."""
    return "–" if value is None else f"{100 * value:.1f} %"


def _points(value: float) -> str:
    """Return a difference of shares in percentage points, always with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _tone(label: str | None) -> str:
    """Return the CSS class of a verdict; a plain word whatever the label says."""
    return {"pass": "pass", "fail": "fail"}.get(label or "", "none")
