"""The report: one offline page; every figure leads to its samples; what models wrote is text, whatever it says."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve import report_figures, report_judges
from serve.report import write_report
from serve.report_chart import Chart, Table
from serve.report_journal import CHOSEN, OVERRULED, REJECTED, read_journal
from serve.report_samples import DIMENSIONS, MOST_CHARACTERS, ROOM, Room, link, pick_samples
from serve.report_story import story
from serve.visible_text import visible
from tests.synthetic_run import RIGHT, WRONG, make_row, make_summary, write_journal, write_start
from trainers.feedback.mixed_feedback import powered_mean
from trainers.statistics import paired_gain, wilson
from trainers.summary import FeedbackMetrics, GainSummary, IterationMetrics, append_metrics, write_summary

HOSTILE = "</script><script>document.title='owned'</script><img src=http://evil.test/x onerror=alert(1)>"
BACKWARDS = "12\u202e34\u200b5"
ROWS = [make_row(i, probe_accuracy=0.35 + 0.05 * i, good_passed=88 + i) for i in (1, 2, 3)]


class _Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self.cdata_elem == "style":
            self.styles.append(data)
        else:
            self.text += data.replace("\u00a0", " ")

    def data(self, name: str) -> Any:
        """Return the JSON that a script element holds."""
        (found,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(found)


def write_run(run_dir: Path, **journal: Any) -> Path:
    """Write a finished run of three iterations, with its journal."""
    write_start(run_dir)
    for row in ROWS:
        append_metrics(run_dir, row)
        write_journal(run_dir, iteration=row.iteration, is_last=row.iteration == 3, **journal)
    write_summary(run_dir, make_summary(ROWS))
    return run_dir


def finished(run_dir: Path, **journal: Any) -> Path:
    return write_report(write_run(run_dir, **journal))


def rows_of(page: _Page, address: str | None) -> tuple[int, int]:
    """Return what a link of the page leads to: how many rows there are, and how many of them are in the file."""
    assert address is not None
    assert address.startswith("#samples?")
    wanted: dict[str, set[str]] = {}
    for name, value in parse_qsl(address.removeprefix("#samples?")):
        wanted.setdefault(name, set()).add(value)
    data = page.data("samples-data")
    places = [data["dimensions"].index(name) for name in wanted]
    found = [
        all(data["values"][place][group[place]] in wanted[name] for place, name in zip(places, wanted, strict=True))
        for group in data["groups"]
    ]
    total = sum(group[-1] for group, is_wanted in zip(data["groups"], found, strict=True) if is_wanted)
    return total, sum(found[row[0]] for _, _, rows in data["units"] for row in rows)


# ---------------------------------------------------------------------------------------------------------- the summary


def test_the_page_opens_with_what_happened(tmp_path: Path) -> None:
    page = _Page(finished(tmp_path).read_text())
    summary = json.loads((tmp_path / "summary.json").read_text())["sealed_accuracy"]
    said = " ".join(page.text.split())
    assert said.index("What happened") < said.index("What the learner learnt") < said.index("Samples: what the models")
    interval = f"+{100 * summary['ci_low']:.1f} to +{100 * summary['ci_high']:.1f}"
    assert (
        "In 3 iterations the learner's share of right answers to 100 sealed problems, which no role ever saw, rose "
        f"from 40.0 % to 70.0 %: +30.0 points (95 % interval {interval}, all of it above 0, more than chance explains)."
    ) in said
    assert "Of 500 attacks that were written before training it fails 25.0 %; at the start it failed 60.0 %." in said
    # The worst of 88 + i good answers passed of 100, and 95 bad ones failed of 100: (0.89 + 0.95) / 2.
    assert (
        "A critic judged 1,152 sampled answers; compared with truth on a sample of every iteration, it agreed" in said
    )
    assert "it agreed in no iteration less than 92.0 % (balanced; chance is 50 %)" in said
    assert "Experts were asked about 36 of them (3.1 %), simulated here: their labels were drawn from truth." in said
    assert "180 pairs of a passing and a failing answer came of it" in said


@pytest.mark.parametrize(
    ("num_before", "num_after", "says"),
    [
        (70, 40, "fell from 70.0 % to 40.0 %: −30.0 points"),
        (70, 40, "all of it below 0: the learner got worse"),
        (50, 52, "which holds 0: no gain is shown"),
        (50, 50, "stayed from 50.0 % to 50.0 %"),
    ],
)
def test_a_loss_and_no_gain_are_said_as_they_are(tmp_path: Path, num_before: int, num_after: int, says: str) -> None:
    gain = paired_gain([i < num_before for i in range(100)], [i < num_after for i in range(100)])
    summary = make_summary(ROWS).model_copy(update={"sealed_accuracy": GainSummary.of(gain)})
    assert says in story(summary, ROWS, read_journal(tmp_path), oversight=None)[0]


def test_updates_that_a_kl_budget_ended_are_named(tmp_path: Path) -> None:
    journal, summary = read_journal(tmp_path), make_summary(ROWS)
    cut = [row.model_copy(update={"training": {"num_left_out": 4.0 + row.iteration}}) for row in ROWS[1:]]
    said = story(summary, [ROWS[0], *cut], journal, oversight=None)[1]
    assert said.endswith(
        "Stopped by KL budget: 2 updates ended early (iteration 2, 3), with 13 optimizer steps left out."
    )
    assert "budget:" not in story(summary, ROWS, journal, oversight=None)[1]


def test_a_run_that_its_kl_budget_ended_says_so(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(row.model_dump_json() + "\n" for row in [*ROWS[:-1], far(ROWS[-1])]))
    said = (
        f"The run's KL budget ended it after {len(ROWS)} of 9 iterations, 12.3 nats per answer from its first weights."
    )
    for num_iterations, is_said in ((9, True), (len(ROWS), False)):
        (tmp_path / "resolved.json").write_text(json.dumps({"loop": {"iterations": num_iterations}}))
        assert (said in _Page(write_report(tmp_path).read_text()).text) == is_said
    assert "KL budget" not in " ".join(story(None, ROWS, read_journal(tmp_path), oversight=None, num_iterations=9))


def far(row: IterationMetrics) -> IterationMetrics:
    """Return a row whose learner is 12.34 nats from the run's start."""
    return row.model_copy(update={"training": {"kl_from_run_start": 12.34}})


def test_a_control_says_that_it_is_one(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "resolved.json").write_text('{"oversight": {"kind": "shuffled", "budget": 0.05}}')
    page = _Page(write_report(tmp_path).read_text())
    assert "This run is a control: its verdicts were permuted within each query." in page.text


def test_changes_carry_intervals_from_the_answers_themselves(tmp_path: Path) -> None:
    text = " ".join(_Page(finished(tmp_path).read_text()).text.split())
    # Frozen attacks, answered rightly: no, no, yes before; yes, no, yes after. One of three fails no longer.
    gain = paired_gain([False, False, True], [True, False, True])
    low, high = (f"{100 * -end:+.1f}".replace("-", "−") for end in (gain.ci_high, gain.ci_low))
    assert f"−33.3 {low} to {high}" in text
    # Without the two sets of answers there is nothing to pair: 25 % after, 60 % before.
    assert "−35.0" not in text


# ------------------------------------------------------------------------------------------------------------- security


def test_what_models_write_is_data_and_never_markup(tmp_path: Path) -> None:
    text = finished(tmp_path, wrong=HOSTILE, question=HOSTILE).read_text()
    page = _Page(text)
    assert HOSTILE not in text
    assert "\\u003c/script\\u003e" in text
    assert HOSTILE in page.data("samples-data")["texts"], "the reader gets it as it was written"
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not any("title='owned'" in script for attributes, script in page.scripts if "type" not in attributes)


def test_a_cell_or_metric_with_markup_in_its_name_stays_text(tmp_path: Path) -> None:
    row = make_row(1)
    cell = row.cells[0].model_copy(update={"facets": (HOSTILE,)})
    changed = {"cells": (cell,), "training": {HOSTILE: 1.0}, "pairs_dropped": {HOSTILE: 3}, "seconds": {HOSTILE: 1.0}}
    append_metrics(tmp_path, row.model_copy(update=changed))
    text = write_report(tmp_path).read_text()
    assert HOSTILE not in text
    page = _Page(text)
    assert HOSTILE in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    # plotly draws its texts with a markup of its own: names reach it escaped.
    assert "&lt;" in page.data("figures")["weakness"]["data"][0]["y"][0]


def test_invisible_characters_are_named_wherever_the_template_writes(tmp_path: Path) -> None:
    cell = make_row(1).cells[0].model_copy(update={"facets": (BACKWARDS,)})
    append_metrics(tmp_path, make_row(1).model_copy(update={"cells": (cell,), "training": {BACKWARDS: 1.0}}))
    write_journal(tmp_path, iteration=1, wrong=BACKWARDS, question=BACKWARDS)
    text = write_report(tmp_path).read_text()
    assert "\u202e" not in text
    assert "\u200b" not in text
    page = _Page(text)
    assert page.text.count("12⟨U+202E⟩34⟨U+200B⟩5") >= 2
    # In the samples they are as they were, escaped; the script names them, as the browser's test shows.
    assert BACKWARDS in page.data("samples-data")["texts"]


@pytest.mark.parametrize("character", ["\x00", "\r", "\x1b", "\x7f", "\x9b", "\u061c", "\u200d", "\u2028", "\u2066"])
def test_what_cannot_be_seen_is_named(character: str) -> None:
    assert visible(f"a{character}b") == f"a⟨U+{ord(character):04X}⟩b"


def test_what_can_be_seen_stays() -> None:
    text = "47+86 → 133\n\té, 中文, العربية, 🙂 {} <b>"
    assert visible(text) == text


def test_the_report_loads_nothing_and_runs_its_own_scripts_alone(tmp_path: Path) -> None:
    page = _Page(finished(tmp_path).read_text())
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "action", "data", "poster"):
            assert name not in attributes, (tag, attributes)
        assert (attributes.get("href") or "#").startswith(("#", "data:,")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
    assert not any("url(" in style or "@import" in style for style in page.styles)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert (rules["require-trusted-types-for"], rules["trusted-types"]) == ("'script'", "'none'")
    assert not {"connect-src", "frame-src", "font-src", "object-src"} & rules.keys()
    run = [script for attributes, script in page.scripts if attributes.get("type") != "application/json"]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in run]
    assert rules["script-src"].split() == hashes
    assert [len(script) > 1_000_000 for script in run] == [True, False], "plotly once, and the report's own"


def test_the_reports_own_script_writes_no_markup() -> None:
    script = (Path(__file__).parent.parent / "serve" / "report.js").read_text()
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|fetch\(|XMLH", script
    )


# --------------------------------------------------------------------------------------------------------------- charts


def test_the_curves_and_the_weakness_map_hold_the_rows_figures(tmp_path: Path) -> None:
    figures = _Page(finished(tmp_path).read_text()).data("figures")
    assert set(figures) == {
        *("learner", "attacks", "weakness", "agreement", "errors", "calibration", "experts", "proposals", "pairs"),
        *("seconds", "tokens"),
    }
    band, line, ood, sealed = figures["learner"]["data"]
    # Before training one of three probe problems is answered rightly.
    assert line["x"] == [0, 1, 2, 3]
    assert line["y"] == pytest.approx([1 / 3, 0.40, 0.45, 0.50])
    low = [wilson(num, n).ci_low for num, n in ((1, 3), (96, 240), (108, 240), (120, 240))]
    assert band["y"][:3:-1] == pytest.approx(low)
    assert (ood["y"], sealed["y"]) == ([0, 0], [0.5, 0.75])
    assert sealed["error_y"]["array"][0] == pytest.approx(wilson(2, 4).ci_high - 0.5)
    heat = figures["weakness"]["data"][0]
    assert heat["y"] == ["+ · 3 · 2", "- · 3 · 1"]
    assert heat["z"] == [[0.25, 0.25, 0.25], [None, None, None]]


def links_in(chart: Chart | Table) -> list[str]:
    table = chart.table if isinstance(chart, Chart) else chart
    assert table is not None
    found = [cell.link for row in table.rows for cell in row if cell.link]
    if isinstance(chart, Chart):
        assert chart.figure is not None
        for trace in json.loads(chart.figure.to_json())["data"]:
            for item in trace.get("customdata", []):
                found += item if isinstance(item, list) else [item]
    return found


def test_every_point_and_every_figure_of_a_table_leads_to_its_samples(tmp_path: Path) -> None:
    write_run(tmp_path)
    journal = read_journal(tmp_path)
    page = _Page(write_report(tmp_path).read_text())
    charts: list[Chart | Table] = [
        report_figures.learner(ROWS, journal),
        report_figures.attacks(ROWS, journal),
        report_figures.weakness_map(ROWS),
        report_judges.agreement(ROWS, recorded=True),
        report_judges.error_rates(ROWS, recorded=True),
        report_judges.calibration(ROWS, journal.sampled),
        report_judges.experts(ROWS, journal, budget=0.05),
        report_figures.proposals(ROWS),
        report_figures.pairs(ROWS),
        report_figures.seconds(ROWS),
        report_figures.tokens_per_s(ROWS),
    ]
    matrix = report_judges.expert_matrix(journal)
    assert matrix is not None
    for chart in [*charts, matrix]:
        links = links_in(chart)
        assert links
        for address in links:
            assert rows_of(page, address)[0] >= rows_of(page, address)[1] >= 0, address
    # Of the links in the page itself all are understood too.
    assert len([a for tag, a in page.tags if tag == "a" and (a.get("href") or "").startswith("#samples?")]) > 100
    # The synthetic metrics count more than the synthetic journal holds; these are in the journal, all of them shown.
    assert rows_of(page, link(set="live", iteration=2, cell="+ · 3 · 2", critic="fail")) == (2, 2)
    assert rows_of(page, link(set="live", iteration=2, critic="pass", truth="wrong")) == (2, 2)
    assert rows_of(page, link(set="live", iteration=2, critic="fail", truth="right")) == (0, 0)
    assert rows_of(page, link(set="live", expert=OVERRULED)) == (6, 6)
    assert rows_of(page, link(set="live", iteration=1, fate=[CHOSEN, REJECTED])) == (12, 12)
    assert rows_of(page, link(set="proposals", iteration=1, fate="invalid")) == (2, 2)
    assert rows_of(page, link(set="sealed", iteration=3, fate="improved")) == (2, 2)
    assert rows_of(page, link(set="attack_set", iteration=0, truth="wrong")) == (2, 2)
    # P(good): 18 right answers at 0.98; 12 wrong ones at 0.03 and 6 at 0.6.
    assert rows_of(page, link(set="live", sure="0.9 to 1.0")) == (18, 18)
    assert rows_of(page, link(set="live", sure="0.6 to 0.7", truth="wrong")) == (6, 6)


def test_confidence_is_held_against_truth_by_hand(tmp_path: Path) -> None:
    journal = read_journal(write_run(tmp_path))
    chart = report_judges.calibration(ROWS, journal.sampled)
    # 18 right answers at 0.98, 12 wrong ones at 0.03, 6 wrong ones at 0.6; of 36.
    brier = (18 * 0.02**2 + 12 * 0.03**2 + 6 * 0.6**2) / 36
    error = (18 * 0.02 + 12 * 0.03 + 6 * 0.6) / 36
    assert f"AUROC 1.000, Brier score {brier:.3f}, calibration error (ECE) {error:.3f}" in chart.caption
    assert "nothing is calibrated on it" in chart.caption
    _, points, bars = json.loads(chart.figure.to_json())["data"]
    assert points["x"] == pytest.approx([0.03, 0.6, 0.98])
    assert points["y"] == [0.0, 0.0, 1.0]
    assert points["error_y"]["array"] == pytest.approx([wilson(0, 12).ci_high, wilson(0, 6).ci_high, 0.0])
    assert bars["y"] == [12, 6, 18]


def test_a_run_that_kept_no_list_of_the_answers_says_so(tmp_path: Path) -> None:
    page = _Page(finished(tmp_path, keeps_agreement=False).read_text())
    assert "Not recorded by this version of the run" in page.text
    assert "calibration" not in page.data("figures")
    # The points of the critic's agreement then lead to all answers of their iteration.
    (line,) = [trace for trace in page.data("figures")["agreement"]["data"] if "customdata" in trace]
    assert [rows_of(page, address) for address in line["customdata"]] == [(12, 12)] * 3


def test_the_experts_load_is_held_against_their_budget(tmp_path: Path) -> None:
    journal = read_journal(write_run(tmp_path))
    figure = report_judges.experts(ROWS, journal, budget=0.05).figure
    bars, budget = json.loads(figure.to_json())["data"]
    assert bars["y"] == [2, 2, 2]
    # 5 % of 384, 768 and 1,152 verdicts, less the 12 and 24 that the metrics say were asked before.
    assert budget["y"] == [19, 26, 33]
    matrix = report_judges.expert_matrix(journal)
    assert matrix is not None
    assert [[cell.text for cell in row] for row in matrix.rows] == [["pass", "0", "6", "0"]]


def test_what_experts_would_fail_is_shown_where_answers_were_drawn_for_them(tmp_path: Path) -> None:
    assert report_judges.expected_failures(ROWS) == ()
    found = powered_mean([1, 0, 0, 1], [1, 0, 1, 1], [1.0, 0.0, 0.0, 1.0, 0.0], kappa=1.0)
    told = FeedbackMetrics.of(found, checked={"pass": 3, "pass wrong": 1, "fail": 1}, rates={}, num_expert_pairs=2)
    assert told is not None
    rows = [ROWS[0], *(row.model_copy(update={"feedback": told}) for row in ROWS[1:])]
    (chart,) = report_judges.expected_failures(rows)
    line = next(trace for trace in json.loads(chart.figure.to_json())["data"] if trace.get("customdata"))
    # 0.4 + (0.5 - 0.75)
    assert line["x"] == [2, 3]
    assert line["y"] == pytest.approx([0.15, 0.15])
    write_start(tmp_path)
    for row in rows:
        append_metrics(tmp_path, row)
        write_journal(tmp_path, iteration=row.iteration, is_last=row.iteration == 3)
    write_summary(tmp_path, make_summary(rows))
    page = _Page(write_report(tmp_path).read_text())
    assert "What experts would fail" in page.text
    assert [rows_of(page, address) for address in line["customdata"]] == [(12, 12)] * 2


def test_an_answer_in_no_pair_says_why(tmp_path: Path) -> None:
    write_journal(tmp_path, iteration=1, num_queries=5)
    directory = tmp_path / "journal" / "iteration=000001"
    # Right answers come first in each query.
    labels = [["pass", "pass"], ["fail", "fail"], [None, None], [None, "fail"], ["pass", "fail"]]
    table = pq.read_table(directory / "verdicts.parquet", partitioning=None)
    said = pa.array([label for pair in labels for label in pair])
    pq.write_table(table.set_column(table.column_names.index("label"), "label", said), directory / "verdicts.parquet")
    pairs = pq.read_table(directory / "pairs.parquet", partitioning=None)
    pq.write_table(pairs.slice(0, 0), directory / "pairs.parquet")
    fates = {answer.response_id: answer.fate for answer in read_journal(tmp_path).live}
    assert [fates[f"q1-{query}-r{sample}"] for query in range(5) for sample in (0, 1)] == [
        *("all pass", "all pass"),
        *("all fail", "all fail"),
        *("unjudged", "unjudged"),
        *("unjudged", "all fail"),
        *("in no pair", "in no pair"),
    ]
    # Without pairs every judged answer, or every one that passes, was trained on.
    for material in ("judged", "samples", "groups"):
        scored = {answer.response_id: answer.fate for answer in read_journal(tmp_path, material=material).live}
        assert Counter(scored.values()) == {"trained on": 7, "unjudged": 3}
    accepted = {answer.response_id: answer.fate for answer in read_journal(tmp_path, material="accepted").live}
    assert Counter(accepted.values()) == {"trained on": 3, "fails": 4, "unjudged": 3}
    # What gave no row is not called trained on; what fails was never meant to.
    unused = pa.table({"response_id": ["q1-0-r1", "q1-1-r0"]})
    pq.write_table(unused, directory / "left_out.parquet")
    kept = {answer.response_id: answer.fate for answer in read_journal(tmp_path, material="accepted").live}
    assert Counter(kept.values()) == {"trained on": 2, "left out": 1, "fails": 4, "unjudged": 3}
    (directory / "left_out.parquet").unlink()
    # What a reward model scored was trained on, judged or not.
    pq.write_table(pa.table({"response_id": ["q1-2-r0"]}), directory / "rewards.parquet")
    rewarded = {answer.response_id: answer.fate for answer in read_journal(tmp_path, material="samples").live}
    assert rewarded == scored | {"q1-2-r0": "trained on"}


@pytest.mark.parametrize(
    ("material", "says", "fact"),
    [
        ("samples", "trained on 180 answers, each with the score of its verdict", "Scored answers trained"),
        ("judged", "trained on 180 judged answers, good or bad by themselves", "Judged answers trained"),
        ("groups", "trained on 180 groups of judged answers", "Groups of answers trained"),
        ("accepted", "trained on 180 answers that passed", "Passing answers trained"),
    ],
)
def test_a_loss_of_answers_is_not_told_of_as_one_of_pairs(material: Any, says: str, fact: str, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.dumps({**json.loads(line), "material": material}) + "\n" for line in lines]
    (run / "metrics.jsonl").write_text("".join(rows))
    page = _Page(write_report(run).read_text(encoding="utf-8"))
    assert says in page.text
    assert fact in page.text
    assert "Answers trained, and what was left out" in page.text
    assert "of a passing and a failing answer" not in page.text


def test_a_reward_models_scores_are_told_of_as_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["material"] = "samples"
        row["training"] |= {"reward_model_pairs": 40.0, "reward_model_held_out": 0.0}
        if number == 0:
            row["training"] |= {"reward_model_held_out": 10.0, "reward_model_accuracy": 0.7}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = _Page(write_report(run).read_text(encoding="utf-8"))
    pairs = 40 * len(rows)
    assert f"the score of a reward model, which learnt from {pairs} pairs of a passing and a failing" in page.text
    assert "of 10 others, never learnt from, it put 7 in the right order" in page.text


# -------------------------------------------------------------------------------------------------------------- samples


def test_a_small_run_is_in_the_file_whole(tmp_path: Path) -> None:
    journal = read_journal(write_run(tmp_path))
    samples = pick_samples(journal)
    assert samples.num_shown == samples.num_rows
    assert samples.num_rows == {
        "live": 36,
        "proposals": 9,
        "sealed": 8,
        "probe": 12,
        "out_of_distribution": 4,
        "attack_set": 6,
    }
    page = _Page(write_report(tmp_path).read_text())
    assert "All 75 rows of the journal are in this file." in " ".join(page.text.split())


def test_samples_carry_their_own_texts(tmp_path: Path) -> None:
    write_journal(tmp_path, iteration=7, num_queries=1)
    data = pick_samples(read_journal(tmp_path)).data
    (live,) = [u for u in data["units"] if data["texts"][u[0]] == "87+75"]
    assert data["abouts"][live[1]] == {"attack": "quality_diversity", "attacker": "v0", "split": "train"}
    good, bad = live[2]
    assert (data["texts"][good[1]], data["texts"][bad[1]]) == (RIGHT, WRONG)
    group = dict(zip(DIMENSIONS, data["groups"][bad[0]], strict=False))
    named = {name: data["values"][DIMENSIONS.index(name)][place] for name, place in group.items()}
    assert named == {
        "set": "live",
        "iteration": "7",
        "cell": "+ · 3 · 2",
        "critic": "fail",
        "expert": "not asked",
        "truth": "wrong",
        "sure": "0.0 to 0.1",
        "attack": "succeeded",
        "fate": "rejected",
    }
    critique = data["critiques"][bad[3][0]]
    assert data["texts"][critique["text"]] == f"{WRONG[:8]}?{WRONG[:8]}nF"
    assert critique["score"] == 0.03
    assert critique["issues"] == [[0, 8, "step", "recomputed otherwise", ""]]
    assert data["abouts"][bad[2]] == {"version": "v6", "counted": "fail", "end": "stop"}


def test_a_file_with_little_room_has_some_of_every_group_and_whole_queries(tmp_path: Path) -> None:
    for iteration in (1, 2):
        write_journal(tmp_path, iteration=iteration, num_queries=30)
    journal = read_journal(tmp_path)
    room = ROOM | {"live": Room(rows=24, size_bytes=10**6)}
    samples = pick_samples(journal, room=room)
    assert samples.num_shown["live"] == 24
    assert samples.num_rows["live"] == 120
    shown = Counter(row[0] for _, _, rows in samples.data["units"] for row in rows)
    live = {
        place for place, group in enumerate(samples.data["groups"]) if samples.data["values"][0][group[0]] == "live"
    }
    assert len(live) > 10
    assert live <= shown.keys()
    # An answer of a query never comes without the others.
    queries = [rows for query, _, rows in samples.data["units"] if samples.data["texts"][query] == "87+75"]
    assert [len(rows) for rows in queries] == [2] * 12
    # What is not in the file is counted all the same, and the choice is the same every time.
    assert samples.count(set="live", critic="pass", truth="wrong") == 20
    assert pick_samples(journal, room=room).data == samples.data


def test_more_is_shown_of_what_critic_experts_and_truth_differ_on(tmp_path: Path) -> None:
    write_journal(tmp_path, iteration=1, num_queries=60)
    samples = pick_samples(read_journal(tmp_path), room=ROOM | {"live": Room(rows=60, size_bytes=10**6)})
    data = samples.data
    cells = Counter(
        data["values"][2][data["groups"][row[0]][2]]
        for query, _, rows in data["units"]
        for row in rows
        if data["texts"][query] == "87+75"
    )
    # The critic is fooled in the cell that does not carry; each cell has 20 queries of two answers.
    assert cells["+ · 3 · 0"] == 40
    assert cells["+ · 3 · 1"] == cells["+ · 3 · 2"] == 10


def test_the_file_stops_growing_at_its_size(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        # Texts that are all different, 1,000 characters each.
        write_journal(tmp_path, iteration=iteration, num_queries=20, wrong=f"{iteration}" * 1_000)
    room = ROOM | {"live": Room(rows=10_000, size_bytes=2_500)}
    samples = pick_samples(read_journal(tmp_path), room=room)
    assert 0 < samples.num_shown["live"] < samples.num_rows["live"] == 120
    note = " ".join(str(text) for text in samples.data["texts"])
    assert len(note) < 2_500 + 4 * 1_200


def test_a_long_text_is_cut_and_says_by_how_much(tmp_path: Path) -> None:
    write_journal(tmp_path, iteration=1, num_queries=1, wrong="é" * (MOST_CHARACTERS + 7))
    samples = pick_samples(read_journal(tmp_path))
    assert ["é" * MOST_CHARACTERS, 7] in samples.data["texts"]
    assert samples.num_cut == 1


def test_a_link_to_nothing_that_exists_is_refused() -> None:
    with pytest.raises(ValueError, match="got colour, wanted one of set, iteration"):
        link(colour="red")


def test_an_iteration_that_is_not_committed_is_left_out(tmp_path: Path) -> None:
    write_journal(tmp_path, iteration=1)
    write_journal(tmp_path, iteration=2)
    (tmp_path / "journal" / "iteration=000002" / "COMMIT.json").unlink()
    assert {answer.iteration for answer in read_journal(tmp_path).live} == {1}


# ------------------------------------------------------------------------------------------------------ unfinished runs


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_a_run_that_is_not_finished_gets_a_report_that_says_so(tmp_path: Path, num_rows: int) -> None:
    write_start(tmp_path)
    for iteration in range(1, num_rows + 1):
        append_metrics(tmp_path, make_row(iteration))
        write_journal(tmp_path, iteration=iteration)
    page = _Page(write_report(tmp_path).read_text())
    assert "This run is not finished." in page.text
    assert f"elenchus resume {tmp_path.name}" in page.text
    assert ("No iteration is committed yet" in page.text) == (num_rows == 0)
    if num_rows:
        assert f"It has committed {num_rows} iteration" in page.text
        assert f"Of 240 probe problems the learner answers 50.0 % rightly after iteration {num_rows}" in page.text
        # What was measured before training is there already.
        assert [trace["y"] for trace in page.data("figures")["learner"]["data"]][-1] == [0.5]


def test_metrics_without_a_journal_make_a_report(tmp_path: Path) -> None:
    rows: list[IterationMetrics] = [make_row(1), make_row(2, live=None)]
    for row in rows:
        append_metrics(tmp_path, row)
    page = _Page(write_report(tmp_path).read_text())
    assert "samples-data" not in {a.get("id") for _, a in page.tags}
    assert [bar["y"] for bar in page.data("figures")["experts"]["data"]] == [[12, 12]]


def test_a_report_is_refused_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted the directory of a run"):
        write_report(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------ a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_draws_every_chart_and_the_page_fits_a_phone(tmp_path: Path) -> None:
    # More is asked of it in tests/test_report_browser.py, where playwright is installed.
    path = finished(tmp_path, wrong=HOSTILE)
    # A frame of the wanted width, since a headless window has a least width of its own; it reports what it holds.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id=f src="{path.name}" style="width:420px;height:900px;border:0"></iframe><pre id=out></pre>'
        "<script>onload=()=>setTimeout(()=>{const d=document.getElementById('f').contentDocument;"
        "out.textContent=JSON.stringify({charts:[...d.querySelectorAll('.plot')].filter(p=>p.querySelector('.main-svg'))"
        ".length,samples:d.querySelectorAll('#units article').length,scroll:d.documentElement.scrollWidth,"
        "title:d.title})},1500)</script>"
    )
    assert CHROMIUM
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"),
        *("--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
    ]
    shown = subprocess.run([CHROMIUM, *flags, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="out">(.*?)</pre>', shown.stdout)
    assert found, shown.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    # At first the answers on which an expert overruled the critic: two queries of every iteration.
    assert seen.pop("scroll") <= 420
    assert seen == {"charts": 11, "samples": 6, "title": "demo · Elenchus report"}
