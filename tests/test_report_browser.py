"""The report in Chromium: drawn at two widths and in both themes, from a point to its samples, without a request."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.report import write_report
from tests.synthetic_run import make_row, make_summary, write_journal, write_start
from trainers.statistics import wilson
from trainers.summary import append_metrics, write_summary

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

HOSTILE = "</script><script>document.title='owned'</script><img src=http://evil.test/x onerror=alert(1)>\u202e12\x00"
READS = "</script><script>document.title='owned'</script><img src=http://evil.test/x onerror=alert(1)>U+202E12U+0000"


class Watched:
    """A page with everything that it said and asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def open(self, path: Path) -> Any:
        """Open the report and wait until its charts are drawn."""
        self.page.goto(path.as_uri())
        return self.page

    def spot(self, chart: str, x: float, y: float) -> tuple[float, float]:
        """Return where on the screen a point of a chart is, after bringing it there."""
        self.page.locator(f"#plot-{chart}").scroll_into_view_if_needed()
        found = self.page.evaluate(
            """([id, x, y]) => {
                const plot = document.getElementById(id), {xaxis, yaxis} = plot._fullLayout;
                const box = plot.getBoundingClientRect();
                return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
            }""",
            [f"plot-{chart}", x, y],
        )
        return found[0], found[1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        # As root Chromium has no sandbox of its own.
        found = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "demo"
    run.mkdir()
    rows = [make_row(i, probe_accuracy=0.35 + 0.05 * i, good_passed=88 + i) for i in (1, 2, 3)]
    write_start(run)
    for row in rows:
        append_metrics(run, row)
        write_journal(run, iteration=row.iteration, num_queries=30, wrong=HOSTILE, is_last=row.iteration == 3)
    write_summary(run, make_summary(rows))
    return write_report(run)


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    yield Watched(context.new_page())
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_every_chart_is_drawn_and_the_page_fits_its_width(browser: Any, report: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    watched = Watched(context.new_page())
    page = watched.open(report)
    num_plots = page.locator(".plot").count()
    assert num_plots == 11
    assert page.locator(".plot .main-svg").count() >= num_plots
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.querySelector('#plot-learner .xtick text')).fill")
    assert colour == {"light": "rgb(27, 32, 38)", "dark": "rgb(228, 232, 237)"}[scheme]
    assert page.title() == "demo · Elenchus report"
    assert (watched.said, watched.asked) == ([], [report.as_uri()])
    context.close()


def test_a_click_on_a_point_opens_the_samples_behind_it(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    # The weakness map's first cell, iteration 2: columns and lines are counted from 0.
    page.mouse.click(*watched.spot("weakness", 1, 0))
    page.wait_for_function("location.hash.startsWith('#samples?')")
    assert (
        page.locator("#found")
        .inner_text()
        .startswith(
            "live answers · iteration 2 · kind of problem: + · 3 · 2 · critic says: fail — 10 rows, all in this file"
        )
    )
    assert page.evaluate("document.activeElement.id") == "found"
    assert page.locator("#found").bounding_box()["y"] < 900
    units = page.locator("#units article")
    assert units.count() == 10
    first = units.first
    assert (
        "iteration 2 · + · 3 · 2 · written by the attacker (quality diversity, v0) · train split" in first.inner_text()
    )
    assert first.locator(".answer").count() == 1
    first.locator("summary").click()
    # The query's other answer.
    first.locator(".others .answer").wait_for()
    assert first.locator(".answer").count() == 2
    page.locator("#back").click()
    assert page.evaluate("document.activeElement.id") == "figure-weakness"
    # A point of a curve.
    page.mouse.click(*watched.spot("learner", 3, 0.5))
    page.wait_for_function("location.hash.includes('set=probe')")
    assert page.locator("#found").inner_text().startswith("probe problems · iteration 3 — 3 rows")
    assert watched.said == []


def test_what_a_model_wrote_is_read_as_text(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    page.goto(report.as_uri() + "#samples?set=live&iteration=1&critic=fail")
    answer = page.locator("#units .answer .text").first
    assert answer.inner_text() == READS
    assert answer.locator(".hidden-character").all_inner_texts() == ["U+202E", "U+0000"]
    # The critic quoted its first eight characters.
    assert answer.locator("mark").all_inner_texts() == [HOSTILE[:8]]
    assert page.locator("img").count() == 0
    assert page.title() == "demo · Elenchus report"


def test_filters_and_search_narrow_what_is_shown(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    page.locator("#clear").click()
    assert page.locator("#found").inner_text().startswith("everything — ")
    page.select_option("#filter-set", "live")
    page.select_option("#filter-iteration", "1")
    page.select_option("#filter-truth", "right")
    assert page.locator("#found").inner_text().endswith("30 rows, all in this file")
    assert page.locator("#units article").count() == 15
    page.locator("#more").click()
    assert page.locator("#units article").count() == 30
    assert page.locator("#more").is_hidden()
    page.locator("#search").fill("no such words")
    assert "0 rows with “no such words”" in page.locator("#found").inner_text()
    page.locator("#search").fill("87+75")
    assert "30 rows with" in page.locator("#found").inner_text()


def test_the_keyboard_alone_reaches_the_samples(watched: Watched, report: Path) -> None:
    page = watched.open(report)
    summary = page.locator("#figure-experts summary")
    summary.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash.startsWith('#samples?')")
    assert page.locator("#found").inner_text().startswith("live answers · iteration 1 · expert: overruled")
    assert page.evaluate("document.activeElement.id") == "found"
    assert page.locator("#back").inner_text() == "↑ back to What the experts were asked"


def test_no_script_but_the_pages_own_runs(watched: Watched, report: Path) -> None:
    page, failed = watched.open(report), []
    page.on("requestfailed", lambda request: failed.append((request.url, request.failure)))
    page.evaluate(
        "() => { const script = document.createElement('script'); script.append('window.owned = true');"
        " document.body.append(script); }"
    )
    assert page.evaluate("window.owned") is None
    # Markup that is not the page's own is refused before it could hold a script.
    with pytest.raises(playwright.Error, match="TrustedHTML"):
        page.evaluate("() => { document.body.innerHTML = '<b>markup</b>'; }")
    assert any("TrustedScript" in line for line in watched.said), watched.said
    page.evaluate("() => { const image = new Image(); image.src = 'http://evil.test/x'; document.body.append(image); }")
    page.wait_for_timeout(200)
    assert failed == [("http://evil.test/x", "csp")]


def test_without_scripts_the_figures_are_there_to_read(browser: Any, report: Path) -> None:
    context = browser.new_context(viewport={"width": 420, "height": 900}, java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(report.as_uri())
    text = page.locator("body").inner_text().replace("\u00a0", " ")
    assert "rose from 40.0 % to 70.0 %" in text
    assert "The charts and the samples are drawn by scripts inside this file." in text
    assert page.locator("#figures-of-the-run table").first.is_visible()
    page.locator("#figure-learner summary").click()
    first = wilson(96, 240)
    interval = f"{100 * first.ci_low:.1f} to {100 * first.ci_high:.1f}"
    assert f"40.0 % {interval}, n = 240" in " ".join(page.locator("#figure-learner table").inner_text().split())
    assert page.locator("#units").is_hidden()
    context.close()
