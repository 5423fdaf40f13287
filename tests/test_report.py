"""The report: one offline page, everything written by models shown as text, also for a run that is not finished."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from serve.report import write_report
from serve.report_samples import CONFIRMED, CONTRAST, OVERRULED, pick_samples
from tests.synthetic_run import RIGHT, make_row, make_summary, write_journal
from trainers.summary import append_metrics, write_summary

HOSTILE = "</script><script>document.title='owned'</script><img src=http://evil.test/x onerror=alert(1)>"


class _Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)
        elif self.cdata_elem == "style":
            self.styles.append(data)
        else:
            self.text += data


def _finished_run(run_dir: Path, *, wrong: str | None = None) -> Path:
    rows = [make_row(i, probe_accuracy=0.35 + 0.05 * i, good_passed=88 + i) for i in (1, 2, 3)]
    for row in rows:
        append_metrics(run_dir, row)
        if wrong is None:
            write_journal(run_dir, iteration=row.iteration)
        else:
            write_journal(run_dir, iteration=row.iteration, wrong=wrong, question=wrong)
    write_summary(run_dir, make_summary(rows))
    return write_report(run_dir)


def test_the_report_states_the_sealed_gain_with_its_interval(tmp_path: Path) -> None:
    page = _Page(_finished_run(tmp_path).read_text())
    summary = json.loads((tmp_path / "summary.json").read_text())["sealed_accuracy"]
    assert "40.0 %" in page.text
    assert "70.0 %" in page.text
    assert "+30.0 points" in page.text
    assert f"+{100 * summary['ci_low']:.1f} to +{100 * summary['ci_high']:.1f}" in page.text
    assert "finished" in page.text
    assert "not finished" not in page.text


def test_what_models_write_is_text_and_never_markup(tmp_path: Path) -> None:
    text = _finished_run(tmp_path, wrong=HOSTILE).read_text()
    page = _Page(text)
    assert HOSTILE in page.text, "the reader sees it as it was written"
    assert HOSTILE not in text
    assert "&lt;script&gt;document.title" in text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not any("title='owned'" in script for script in page.scripts)


def test_a_cell_or_metric_with_markup_in_its_name_stays_text(tmp_path: Path) -> None:
    row = make_row(1)
    cell = row.cells[0].model_copy(update={"facets": (HOSTILE,)})
    append_metrics(tmp_path, row.model_copy(update={"cells": (cell,), "training": {HOSTILE: 1.0}}))
    text = write_report(tmp_path).read_text()
    assert HOSTILE not in text
    assert not [tag for tag, _ in _Page(text).tags if tag == "img"]
    # plotly draws its texts with a markup of its own: names reach it escaped.
    assert "&lt;" in _figures(text)["weakness"]["data"][0]["y"][0]


def test_the_report_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    page = _Page(_finished_run(tmp_path).read_text())
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
    assert not any("url(" in style or "@import" in style for style in page.styles)
    # The browser enforces it: nothing but this file's own scripts, no connection at all.
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    nonces = {a.get("nonce") for tag, a in page.tags if tag == "script"}
    assert len(nonces) == 1
    assert f"'nonce-{nonces.pop()}'" in policy


def test_the_charting_library_is_embedded_once(tmp_path: Path) -> None:
    page = _Page(_finished_run(tmp_path).read_text())
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1


def _figures(text: str) -> dict[str, dict[str, object]]:
    found = re.search(r'<script type="application/json" id="figures"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_curves_and_the_weakness_map_hold_the_rows_figures(tmp_path: Path) -> None:
    figures = _figures(_finished_run(tmp_path).read_text())
    assert set(figures) == {"probe", "attack", "critic", "weakness", "experts", "pairs", "seconds", "tokens"}
    line = figures["probe"]["data"][1]
    assert line["x"] == [1, 2, 3]
    assert line["y"] == pytest.approx([0.40, 0.45, 0.50])
    heat = figures["weakness"]["data"][0]
    assert heat["y"] == ["+ · 3 · 2", "- · 3 · 1"]
    assert heat["z"] == [[0.25, 0.25, 0.25], [None, None, None]]


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_a_run_that_is_not_finished_gets_a_report_that_says_so(tmp_path: Path, num_rows: int) -> None:
    for iteration in range(1, num_rows + 1):
        append_metrics(tmp_path, make_row(iteration))
    page = _Page(write_report(tmp_path).read_text())
    assert "This run is not finished." in page.text
    assert f"elenchus resume {tmp_path.name}" in page.text
    assert ("No iteration is committed yet" in page.text) == (num_rows == 0)
    if num_rows:
        assert f"It has committed {num_rows} iteration" in page.text
        assert "50.0 %" in page.text


def test_a_report_is_refused_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted the directory of a run"):
        write_report(tmp_path / "nowhere")


def test_disagreements_with_the_expert_come_first_and_no_answer_is_shown_twice(tmp_path: Path) -> None:
    for iteration in (1, 2):
        write_journal(tmp_path, iteration=iteration, num_queries=6)
    samples = pick_samples(tmp_path)
    # Per iteration the critic was fooled by two wrong answers; the other four queries have a passed and a failed one,
    # 16 answers in all, of which 12 are shown.
    assert [sample.why for sample in samples[:4]] == [OVERRULED] * 4
    assert [sample.iteration for sample in samples[:4]] == [2, 2, 1, 1]
    first = samples[0]
    assert (first.critic_label, first.expert_label, first.label) == ("pass", "fail", "fail")
    assert first.score == pytest.approx(0.6)
    assert sum(sample.why == CONTRAST for sample in samples) == 12
    assert not [sample for sample in samples if sample.why == CONFIRMED]
    assert len({sample.response_id for sample in samples}) == len(samples)


def test_samples_carry_their_own_texts(tmp_path: Path) -> None:
    write_journal(tmp_path, iteration=7, num_queries=1)
    good = next(sample for sample in pick_samples(tmp_path) if sample.label == "pass")
    assert (good.query, good.answer, good.cell, good.iteration) == ("87+75", RIGHT, "+ · 2 · 0", 7)
    assert good.critique == f"{RIGHT[:8]}?{RIGHT[:8]}yP"
    assert good.policy_version == "v6"


def test_an_iteration_without_all_its_tables_is_left_out(tmp_path: Path) -> None:
    write_journal(tmp_path, iteration=1)
    write_journal(tmp_path, iteration=2)
    (tmp_path / "journal" / "iteration=000002" / "verdicts.parquet").unlink()
    assert {sample.iteration for sample in pick_samples(tmp_path)} == {1}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 480])
def test_a_browser_draws_every_chart_and_the_page_fits_its_width(tmp_path: Path, width: int) -> None:
    path = _finished_run(tmp_path, wrong=HOSTILE)
    # A frame of the wanted width, since a headless window has a least width of its own; it reports what it holds.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id=f src="{path.name}" style="width:{width}px;height:900px;border:0"></iframe><pre id=out></pre>'
        "<script>onload=()=>setTimeout(()=>{const d=document.getElementById('f').contentDocument;"
        "out.textContent=JSON.stringify({charts:d.querySelectorAll('.plot .main-svg').length>0"
        "&&[...d.querySelectorAll('.plot')].every(p=>p.querySelector('.main-svg')),"
        "scroll:d.documentElement.scrollWidth,title:d.title})},1500)</script>"
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
    seen = json.loads(found[1].replace("&amp;", "&"))
    assert seen["charts"]
    assert seen["scroll"] <= width
    assert seen["title"] == "demo · Elenchus report"
