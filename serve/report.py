"""Owns `report.html`: one offline page made from what a run has written. Knows neither Ray nor engines.

    metrics, summary ──► report_figures, report_judges ──► charts ───┐
    journal ──► report_journal ──► report_samples ──► rows to read ──┼──► report.html.jinja, report.css, report.js
                       └─────────► report_story ────► words ─────────┘

The page runs three scripts that are inside it, each named by its hash in the page's policy, which allows no connection
of any kind. Whatever models wrote is escaped by the template or stored as JSON and put in as text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from serve import report_figures, report_journal, report_judges, report_story
from serve.report_chart import Cell, Chart, Table
from serve.report_journal import TRAINED_FATES, Journal, read_journal
from serve.report_samples import LIVE, MOST_CHARACTERS, PROPOSALS, Samples, link, pick_samples
from serve.report_words import DASH, duration, material_of_rows, number, percent
from serve.visible_text import visible
from trainers.summary import GainSummary, IterationMetrics, Summary, read_metrics, read_summary

REPORT_FILE = "report.html"
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """Charts that belong together."""

    key: str
    short: str
    title: str
    lead: str
    charts: tuple[Chart, ...]
    size: str = ""
    """CSS class of its charts: "" for two in a line, "third", "most" for two thirds of it, "wide"."""
    table: Table | None = None
    table_title: str = ""
    table_caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Preset:
    """A selection of samples to begin with."""

    name: str
    link: str
    num: int
    """Rows in the journal."""


def write_report(run_dir: Path) -> Path:
    """Write the run's `report.html` from its summary, metrics and journal, and return its path.

    A run that is still going, or was stopped, gets a report of what it has committed, and says so.

    Raises:
        ValueError: `run_dir` is not a directory, or its metrics or summary are damaged.
    """
    if not run_dir.is_dir():
        raise ValueError(f"report: got {run_dir}, wanted the directory of a run; `elenchus run CONFIG` makes one")
    summary, rows = read_summary(run_dir), read_metrics(run_dir)
    journal = read_journal(run_dir, material=material_of_rows(rows))
    config = _config(run_dir)
    samples = pick_samples(journal)
    sections = _sections(rows, journal, budget=config.budget)
    scripts = {"plotly_js": get_plotlyjs(), "report_js": (_HERE / "report.js").read_text(encoding="utf-8")}
    figures = {
        # Through JSON: plotly's own objects hold NumPy arrays.
        chart.key: json.loads(chart.figure.to_json())
        for section in sections
        for chart in section.charts
        if chart.figure is not None
    }
    page = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            run=summary.run if summary else run_dir.resolve().name,
            summary=summary,
            rows=rows,
            oversight=config.oversight,
            story=report_story.story(
                summary, rows, journal, oversight=config.oversight, num_iterations=config.num_iterations
            ),
            hero=_dumbbell(summary.sealed_accuracy) if summary else None,
            changes=report_story.changes(summary, journal),
            facts=report_story.facts(summary, rows, journal, budget=config.budget),
            sections=sections,
            figures=htmlsafe_json_dumps(figures, separators=(",", ":")),
            samples=samples.data,
            samples_note=_samples_note(samples),
            presets=_presets(samples, journal),
            tables=_tables(summary, rows),
            css=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
            policy=_policy(scripts.values()),
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            **{name: Markup(script) for name, script in scripts.items()},
        )
    )
    path = run_dir / REPORT_FILE
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8", newline="\n")
    part.replace(path)
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _printed(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
    )
    environment.filters |= {"percent": percent, "json": lambda value: htmlsafe_json_dumps(value, separators=(",", ":"))}
    return environment


def _printed(text: str) -> str:
    """Return what the template prints of a text that is not markup: nothing invisible, no figure torn from its sign."""
    return visible(text).replace(" %", "\u00a0%").replace("n = ", "n\u00a0=\u00a0")


def _policy(scripts: Iterable[str]) -> str:
    """Return the page's Content-Security-Policy: its own scripts by their hashes, no connection, no text as markup.

    Styles stay open, since plotly writes its own into the page; without connections or images they can tell nobody.
    """
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


class _Config(NamedTuple):
    """What the run's config says of what the page tells; None where nothing is written down."""

    oversight: str | None
    """The kind of oversight."""
    budget: float | None
    """The experts' budget."""
    num_iterations: int | None
    """Iterations that the run was to have."""


def _config(run_dir: Path) -> _Config:
    path = run_dir / "resolved.json"
    config = json.loads(path.read_bytes()) if path.exists() else {}
    oversight, loop = config.get("oversight") or {}, config.get("loop") or {}
    return _Config(oversight.get("kind"), oversight.get("budget"), loop.get("iterations"))


def _sections(rows: Sequence[IterationMetrics], journal: Journal, *, budget: float | None) -> list[_Section]:
    if not rows:
        return []
    recorded, matrix = bool(journal.sampled), report_judges.expert_matrix(journal)
    failures = report_judges.expected_failures(rows)
    return [
        _Section(
            key="learner",
            short="Learner",
            title="What the learner learnt",
            lead="Curves with their 95 % intervals. A click on any point, here and below, opens the samples behind it.",
            charts=(report_figures.learner(rows, journal), report_figures.attacks(rows, journal)),
        ),
        _Section(
            key="weakness",
            short="Weaknesses",
            title="Where it is weak",
            lead="What the attacker looks for: the kinds of problems on which the learner's answers fail.",
            charts=(report_figures.weakness_map(rows),),
            size="wide",
        ),
        _Section(
            key="critic",
            short="Critic",
            title="Whether the critic can be trusted",
            lead="All that the learner is trained on comes from these verdicts. Here they are held against truth.",
            charts=(
                report_judges.agreement(rows, recorded=recorded),
                report_judges.error_rates(rows, recorded=recorded),
                report_judges.calibration(rows, journal.sampled),
            ),
            size="third",
        ),
        _Section(
            key="experts",
            short="Experts",
            title="What the experts had to do",
            lead="The verdicts that the critic was least sure of go to experts, as far as their budget reaches.",
            charts=(report_judges.experts(rows, journal, budget=budget), *failures),
            size="most" if matrix and not failures else "",
            table=matrix,
            table_title="The critic's verdicts against theirs",
            table_caption="Over the whole run; only answers that an expert was asked about.",
        ),
        _Section(
            key="dropped",
            short="Drops",
            title="What was dropped, and why",
            lead="Nothing vanishes: what became neither a query nor part of an update is counted by its reason.",
            charts=(report_figures.proposals(rows), report_figures.pairs(rows)),
        ),
        _Section(
            key="time",
            short="Time",
            title="Where the time went",
            lead="Wall-clock time of the loop and what each pool of engines generated in it.",
            charts=(report_figures.seconds(rows), report_figures.tokens_per_s(rows)),
        ),
    ]


def _presets(samples: Samples, journal: Journal) -> list[_Preset]:
    """Return the selections to begin with, the most telling first; those that lead to nothing are left out."""
    last = max((answer.iteration for answer in journal.live), default=0)
    offers: list[tuple[str, dict[str, Any]]] = [
        ("expert overruled the critic", {"set": LIVE, "expert": report_journal.OVERRULED}),
        ("critic passed a wrong answer", {"set": LIVE, "critic": "pass", "truth": report_journal.WRONG}),
        ("critic failed a right answer", {"set": LIVE, "critic": "fail", "truth": report_journal.RIGHT}),
        ("critique could not be read", {"set": LIVE, "critic": report_journal.UNREADABLE}),
        ("expert gave no label", {"set": LIVE, "expert": report_journal.ABSTAINED}),
        ("answers trained on", {"set": LIVE, "fate": [fate for some in TRAINED_FATES.values() for fate in some]}),
        ("failed in the last iteration", {"set": LIVE, "iteration": last, "critic": "fail"}),
        ("sealed: learnt", {"set": "sealed", "iteration": last, "fate": report_journal.IMPROVED}),
        ("sealed: unlearnt", {"set": "sealed", "iteration": last, "fate": report_journal.WORSENED}),
        ("out of distribution", {"set": "out_of_distribution", "iteration": last}),
        ("dropped proposals", {"set": PROPOSALS}),
    ]
    found = [_Preset(name=name, link=link(**wanted), num=samples.count(**wanted)) for name, wanted in offers]
    return [preset for preset in found if preset.num]


def _samples_note(samples: Samples) -> str:
    num_shown, num_rows = sum(samples.num_shown.values()), sum(samples.num_rows.values())
    said = f"All {num_rows:,} rows of the journal are in this file"
    if num_shown < num_rows:
        sampled = [
            f"{samples.num_shown[name]:,} of {num:,} {_SET_NAMES.get(name, name)}"
            for name, num in samples.num_rows.items()
            if samples.num_shown[name] < num
        ]
        said = (
            f"This file holds {num_shown:,} of the journal's {num_rows:,} rows: {', '.join(sampled)}"
            f"{' and all others' if len(sampled) < len(samples.num_rows) else ''}. They are drawn with a fixed seed so "
            "that every iteration, kind of problem and verdict has some, and more where critic, experts and truth "
            "differ"
        )
    cut = f"; {samples.num_cut:,} texts longer than {MOST_CHARACTERS:,} characters are cut" if samples.num_cut else ""
    return said + cut + "."


_SET_NAMES = {
    LIVE: "live answers",
    PROPOSALS: "dropped proposals",
    "sealed": "sealed answers",
    "probe": "probe answers",
    "out_of_distribution": "out-of-distribution answers",
    "attack_set": "answers to the frozen attack set",
}


def _tables(summary: Summary | None, rows: Sequence[IterationMetrics]) -> list[tuple[str, str, Table]]:
    """Return the tables at the end: title, note, table."""
    if not rows:
        return []
    found = [("Per iteration", "", _per_iteration(rows))]
    names = sorted({name for row in rows for name in row.training})
    if names:
        lines = [
            (
                Cell(text=str(row.iteration)),
                *(Cell(text=f"{row.training[name]:.4g}" if name in row.training else DASH) for name in names),
            )
            for row in rows
        ]
        head = ("iteration", *(name.replace("_", " ") for name in names))
        found.append(
            ("Training", "Means over the optimizer steps of an iteration.", Table(head=head, rows=tuple(lines)))
        )
    fates = sorted({fate for row in rows for fate in row.refinement}, key=lambda fate: (fate != "failed", fate))
    if fates:
        lines = [
            tuple(
                Cell(text=str(number)) for number in (row.iteration, *(row.refinement.get(fate, 0) for fate in fates))
            )
            for row in rows
        ]
        note = "Distinct failed answers, how many were mended into a pair, and the others by cause."
        head = ("iteration", *(fate.replace("_", " ") for fate in fates))
        found.append(("Mended answers", note, Table(head=head, rows=tuple(lines))))
    if summary:
        note = (
            "By purpose. Under the critic_expert regime truth labels nothing but the bootstrap's demonstrations and "
            "the simulated expert's answers."
        )
        found.append(("Gold: uses of computable truth as a label", note, _counts(summary.gold.model_dump())))
        note = "Queries, answers or candidate pairs over the whole run, by reason."
        found.append(("Dropped before the update", note, _counts(summary.pairs.dropped)))
    return found


def _per_iteration(rows: Sequence[IterationMetrics]) -> Table:
    head = (
        *("iteration", "version", "probe accuracy", "live attack success", "critic agrees", "false pass"),
        *("false fail", "AUROC", "to experts", "trained", "parity, nats", "time"),
    )
    lines = [
        (
            Cell(text=str(row.iteration), link=link(set=LIVE, iteration=row.iteration)),
            Cell(text=row.policy_version, detail=_preferred(row)),
            Cell(text=percent(row.probe_accuracy), link=link(set="probe", iteration=row.iteration)),
            Cell(
                text=percent(row.live_attack_success),
                link=link(set=LIVE, iteration=row.iteration, attack="succeeded"),
            ),
            Cell(text=percent(row.critic_agreement.balanced_accuracy)),
            Cell(text=percent(row.critic_agreement.false_pass)),
            Cell(text=percent(row.critic_agreement.false_fail)),
            Cell(text=number(row.critic_agreement.auroc)),
            Cell(
                text=f"{row.experts_asked:,}",
                detail=f"of {row.num_verdicts:,}",
                link=link(set=LIVE, iteration=row.iteration, expert=report_journal.EXPERT_ANSWERS),
            ),
            Cell(
                text=f"{row.pairs_trained:,}",
                link=link(set=LIVE, iteration=row.iteration, fate=TRAINED_FATES[row.material]),
            ),
            Cell(text=DASH if row.parity_max_abs_diff is None else f"{row.parity_max_abs_diff:.1e}"),
            Cell(text=duration(row.wall_s)),
        )
        for row in rows
    ]
    return Table(head=head, rows=tuple(lines))


def _preferred(row: IterationMetrics) -> str:
    """Return the trade-off that an iteration was made at; nothing where the learner is of one alone."""
    return "" if row.preference is None else f"trained at {', '.join(f'{part:.2f}' for part in row.preference)}"


def _counts(values: Mapping[str, int]) -> Table:
    return Table(
        head=("what", "how often"),
        rows=tuple((Cell(text=name.replace("_", " ")), Cell(text=f"{num:,}")) for name, num in values.items()),
    )


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
