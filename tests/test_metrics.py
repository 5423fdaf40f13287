"""What Ray exports to Prometheus: kept from pools, syncs and rows, declared in one place, shown in a dashboard."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster import metrics
from cluster.metrics import CLUSTER_SERIES, Kind, Recorder, Series, recording
from cluster.pool import PoolStats, Readiness
from cluster.scaling import Follower, write_wanted
from tests.synthetic_run import make_row
from trainers import loop_metrics
from trainers.loop_metrics import LOOP_SERIES

ROOT = Path(__file__).resolve().parent.parent
ALL_SERIES = (*CLUSTER_SERIES, *LOOP_SERIES)
DASHBOARD = ROOT / "docker" / "grafana" / "elenchus.json"

STATS = PoolStats(
    name="critic",
    wanted=3,
    ready=2,
    starting=1,
    num_lost=1,
    num_retried=4,
    num_queued=7,
    num_open=40,
    num_answered=100,
    why="starting",
    version="v1",
    num_generated_tokens=5_000,
    num_prompt_tokens=900,
    busy_s=12.5,
    num_running=16,
    replicas={},
)


@dataclass(slots=True)
class Written:
    """Stands for Ray: what every series was set to, how often, and what it was increased by in all."""

    values: dict[str, float] = field(default_factory=dict)
    num_sets: dict[str, int] = field(default_factory=dict)
    set_again: threading.Event = field(default_factory=threading.Event)

    def make(self, series: Series) -> Any:
        return _Instrument(series, self)


@dataclass(frozen=True, slots=True)
class _Instrument:
    series: Series
    written: Written

    def _key(self, tags: dict[str, str]) -> str:
        assert set(tags) == {"run", *self.series.tags}
        return " ".join([self.series.name.removeprefix("elenchus_"), *(tags[name] for name in self.series.tags)])

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert self.series.kind is Kind.GAUGE
        key = self._key(tags)
        self.written.values[key] = value
        self.written.num_sets[key] = self.written.num_sets.get(key, 0) + 1
        if self.written.num_sets[key] > 1:
            self.written.set_again.set()

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert self.series.kind is Kind.COUNTER
        assert value > 0, "Ray refuses it"
        key = self._key(tags)
        self.written.values[key] = self.written.values.get(key, 0.0) + value


@pytest.fixture
def written() -> Iterator[Written]:
    """Give what a recording of this process writes; its gauges are said again by nobody but the tests."""
    found = Written()
    with recording(run="demo", make=found.make):
        yield found


# ------------------------------------------------------------------------------------------------------------ recorder


def test_a_pool_stands_in_gauges_and_its_totals_are_counted_by_what_they_grew(written: Written) -> None:
    metrics.pool_stands(STATS, tokens_per_s=812.5)
    assert written.values == {
        "pool_replicas critic wanted": 3,
        "pool_replicas critic ready": 2,
        "pool_replicas critic starting": 1,
        "pool_queued_requests critic": 7,
        "pool_open_samples critic": 40,
        "pool_running_requests critic": 16,
        "pool_tokens_per_second critic": 812.5,
        "pool_answered_samples critic": 100,
        "pool_generated_tokens critic": 5_000,
        "pool_prompt_tokens critic": 900,
        "pool_busy_seconds critic": 12.5,
        "pool_retried_requests critic": 4,
        "pool_lost_replicas critic": 1,
    }
    metrics.pool_stands(replace(STATS, num_queued=0, num_answered=130, num_generated_tokens=5_600), tokens_per_s=600.0)
    assert written.values["pool_queued_requests critic"] == 0
    assert written.values["pool_answered_samples critic"] == 130
    assert written.values["pool_generated_tokens critic"] == 5_600
    assert written.values["pool_prompt_tokens critic"] == 900


def test_a_total_that_fell_for_a_moment_is_not_counted_twice(written: Written) -> None:
    for tokens in (5_000, 4_000, 5_100):
        metrics.pool_stands(replace(STATS, num_generated_tokens=tokens), tokens_per_s=0.0)
    assert written.values["pool_generated_tokens critic"] == 5_100


def test_a_gauge_is_said_again_until_it_is_taken_away() -> None:
    found = Written()
    recorder = Recorder(run="demo", make=found.make)
    recorder.set(metrics.SYNC_PARITY, 3e-7, "rollouts")
    recorder.set(metrics.SYNC_PARITY, 1e-7, "critic")
    recorder.refresh()
    # Not measured any more, or not a number: Ray forgets what nobody says.
    recorder.set(metrics.SYNC_PARITY, None, "rollouts")
    recorder.set(metrics.SYNC_PARITY, float("nan"), "critic")
    recorder.refresh()
    assert found.num_sets == {"weight_sync_parity_nats rollouts": 2, "weight_sync_parity_nats critic": 2}


def test_a_recording_says_its_gauges_again_by_itself_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REFRESH_EVERY_S", 0.01)
    found = Written()
    with recording(run="demo", make=found.make) as recorder:
        recorder.set(loop_metrics.ITERATION, 3)
        assert found.set_again.wait(timeout=10)
    ended_at = dict(found.num_sets)
    assert metrics.current() is None
    assert not [thread for thread in threading.enumerate() if thread.name == "metrics"]
    metrics.pool_stands(STATS, tokens_per_s=1.0)
    assert found.num_sets == ended_at


def test_what_a_tag_stands_for_goes_when_it_is_not_among_the_values() -> None:
    found = Written()
    recorder = Recorder(run="demo", make=found.make)
    recorder.set_only(loop_metrics.TRAINING, {"loss": 0.6, "kl": 0.1})
    recorder.set_only(loop_metrics.TRAINING, {"loss": 0.5})
    recorder.refresh()
    assert found.values == {"training_mean loss": 0.5, "training_mean kl": 0.1}
    assert found.num_sets == {"training_mean loss": 3, "training_mean kl": 1}


def test_without_a_recording_nothing_is_asked_of_ray() -> None:
    assert metrics.current() is None
    metrics.pool_stands(STATS, tokens_per_s=1.0)
    metrics.scaled("critic", before=1, after=2, why="asked for")
    metrics.sync_refused("critic", seconds=1.0)
    loop_metrics.committed(make_row(1))


# -------------------------------------------------------------------------------------------------------- who records


@dataclass(slots=True)
class FakePool:
    """Does at once what is wanted of it."""

    wanted: int = 1

    async def scale(self, num_replicas: int) -> None:
        self.wanted = num_replicas

    def readiness(self) -> Readiness:
        return Readiness(wanted=self.wanted, ready=self.wanted, starting=0, leaving=0, why=None)


def test_scale_events_are_counted_by_direction_and_reason(tmp_path: Path, written: Written) -> None:
    follower = Follower(tmp_path, {"critic": FakePool()}, configured={"critic": 1}, autoscale={})  # type: ignore[dict-item]
    for wanted in (3, 3, 2, None):
        write_wanted(tmp_path, "critic", wanted)
        asyncio.run(follower.step(now=0.0))
    assert written.values == {
        "scale_events critic up asked for": 1,
        "scale_events critic down asked for": 1,
        "scale_events critic down its config": 1,
    }


def test_a_refused_sync_is_counted_and_leaves_no_parity(written: Written) -> None:
    metrics.synced("rollouts", num_quarantined=1, seconds=0.4, max_abs_diff=3e-7)
    assert written.values == {
        "weight_syncs rollouts taken": 1,
        "weight_sync_quarantined_replicas rollouts": 1,
        "weight_sync_seconds rollouts": 0.4,
        "weight_sync_parity_nats rollouts": 3e-7,
    }
    metrics.sync_refused("rollouts", seconds=2.0)
    recorder = metrics.current()
    assert recorder is not None
    written.num_sets.clear()
    recorder.refresh()
    assert written.num_sets == {"weight_sync_seconds rollouts": 1}
    assert written.values["weight_syncs rollouts refused"] == 1


def test_a_committed_iteration_is_recorded_from_its_row(written: Written) -> None:
    loop_metrics.committed(make_row(1).model_copy(update={"sample_ages": {0: 90, 2: 30}, "lost": {"critiques": 2}}))
    # 90 of 100 good answers passed, 95 of 100 bad ones failed; 30 of 120 samples were two versions old.
    expected = {
        "iteration": 1,
        "iteration_seconds": 14.5,
        "stage_seconds responses": 6.0,
        "attack_success_ratio": 0.4,
        "probe_accuracy_ratio": 0.5,
        "critic_balanced_accuracy_ratio": 0.925,
        "critic_false_pass_ratio": 0.05,
        "critic_false_fail_ratio": 0.1,
        "critic_auroc_ratio": 0.97,
        "iteration_parity_nats": 3e-7,
        "sample_age_versions mean": 0.5,
        "sample_age_versions max": 2,
        "training_mean loss": 0.61,
        "attacks": 96,
        "proposals invalid": 3,
        "verdicts": 384,
        "experts_asked": 12,
        "pairs_trained": 60,
        "pairs_dropped all_fail": 11,
        "requests_lost critiques": 2,
    }
    assert {key: written.values[key] for key in expected} == pytest.approx(expected)
    loop_metrics.committed(make_row(2))
    assert written.values["pairs_dropped all_fail"] == 11 + 12
    assert written.values["iteration"] == 2


def test_what_an_iteration_did_not_measure_has_no_gauge(written: Written) -> None:
    loop_metrics.committed(make_row(1).model_copy(update={"sample_ages": {0: 120}}))
    loop_metrics.committed(make_row(2, live=None))
    recorder = metrics.current()
    assert recorder is not None
    written.num_sets.clear()
    recorder.refresh()
    assert "probe_accuracy_ratio" in written.num_sets
    assert not {"attack_success_ratio", "sample_age_versions mean", "sample_age_versions max"} & set(written.num_sets)


def test_a_resumed_run_stands_where_it_stood_and_counts_nothing_again(written: Written) -> None:
    loop_metrics.resumed(make_row(4))
    assert written.values["iteration"] == 4
    assert written.values["probe_accuracy_ratio"] == 0.5
    counters = {series.name.removeprefix("elenchus_") for series in LOOP_SERIES if series.kind is Kind.COUNTER}
    assert counters.isdisjoint(key.split()[0] for key in written.values)


# ------------------------------------------------------------------------------------- declared, documented, displayed


def test_every_series_is_declared_once_with_a_name_a_unit_and_a_meaning() -> None:
    for module, declared in ((metrics, CLUSTER_SERIES), (loop_metrics, LOOP_SERIES)):
        assert {value for value in vars(module).values() if isinstance(value, Series)} == set(declared)
    names = [series.name for series in ALL_SERIES]
    assert len(set(names)) == len(names)
    for series in ALL_SERIES:
        assert re.fullmatch(r"elenchus(_[a-z0-9]+)+", series.name)
        # Ray puts the suffix behind a counter by itself.
        assert not series.name.endswith("_total")
        assert series.unit
        assert series.meaning


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> list[tuple[str, str]]:
    """Return the panels' queries, each with the legend that its tags are put into."""
    return [(target["expr"], target["legendFormat"]) for panel in panels() for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_declared_series_by_their_own_tags() -> None:
    declared = {series.exported: {"run", *series.tags} for series in ALL_SERIES}
    assert len(expressions()) > 20
    for expression, legend in expressions():
        asked = re.findall(r"\b(ray_\w+)\{([^}]*)\}", expression)
        assert [name for name, _ in asked] == re.findall(r"\bray_\w+", expression), (
            f"a series without tags: {expression}"
        )
        shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
        for name, selectors in asked:
            assert name in declared, f"{expression}: no such series"
            assert set(re.findall(r"(\w+)=~?\"", selectors)) <= declared[name], expression
            assert "by (" in expression or shown <= declared[name], f"{legend}: {expression} has no such tag"


def test_the_dashboard_shows_every_series() -> None:
    asked = {name for expression, _ in expressions() for name in re.findall(r"\bray_\w+", expression)}
    assert {series.exported for series in ALL_SERIES} - asked == set()


def test_a_counter_that_is_new_is_shown_as_it_stands_or_by_a_rate() -> None:
    """Prometheus' `increase` misses the first value of a series, and Ray exports no counter before it counts."""
    assert [expression for expression, _ in expressions() if "increase(" in expression] == []


def test_the_dashboards_variables_are_filled_from_declared_series() -> None:
    variables = {v["name"]: v for v in json.loads(DASHBOARD.read_text())["templating"]["list"]}
    assert set(variables) == {"datasource", "run", "pool"}
    for name in ("run", "pool"):
        series, tag = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variables[name]["definition"]).groups()  # type: ignore[union-attr]
        assert tag == name
        assert series == metrics.POOL_REPLICAS.exported
        assert name in {"run", *metrics.POOL_REPLICAS.tags}


def test_the_dashboards_panels_have_places_of_their_own() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    taken: dict[tuple[int, int], str] = {}
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]
        if panel["type"] != "row":
            assert panel["targets"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_the_page_lists_every_series_with_its_tags_and_unit() -> None:
    rows = {}
    for line in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `ray_elenchus_"):
            rows[cells[0].strip("`")] = (cells[1].strip("`").replace("`", ""), cells[2])
    assert rows == {series.exported: (", ".join(series.tags) or "–", series.unit) for series in ALL_SERIES}


# ----------------------------------------------------------------------------------------------------------- real Ray


@pytest.mark.slow
def test_ray_exports_what_a_run_records_and_forgets_its_gauges_when_it_ends(short_tmp_path: Path) -> None:
    folder = short_tmp_path / "metrics"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.metrics_process", str(folder)],
        cwd=ROOT,
        env=environment | {"RAY_metrics_report_interval_ms": "1000"},
        stdout=subprocess.PIPE,
        timeout=200,
        check=True,
    )
    found = json.loads(done.stdout)
    critic = {
        "ray_elenchus_pool_answered_samples_total pool=critic run=r": 10,
        "ray_elenchus_pool_generated_tokens_total pool=critic run=r": 10,
        "ray_elenchus_pool_lost_replicas_total pool=critic run=r": 1,
        "ray_elenchus_pool_open_samples pool=critic run=r": 0,
        "ray_elenchus_pool_queued_requests pool=critic run=r": 0,
        "ray_elenchus_pool_replicas pool=critic run=r state=ready": 3,
        "ray_elenchus_pool_replicas pool=critic run=r state=wanted": 3,
        "ray_elenchus_scale_events_total pool=critic run=r to=up why=asked for": 1,
        "ray_elenchus_weight_sync_quarantined_replicas_total pool=critic run=r": 1,
        "ray_elenchus_weight_syncs_total outcome=refused pool=critic run=r": 1,
        "ray_elenchus_weight_syncs_total outcome=taken pool=critic run=r": 1,
    }
    loop = {
        "ray_elenchus_attack_success_ratio run=r": 0.4,
        "ray_elenchus_critic_balanced_accuracy_ratio run=r": 0.925,
        "ray_elenchus_iteration run=r": 1,
        "ray_elenchus_iteration_parity_nats run=r": 3e-7,
        "ray_elenchus_pairs_dropped_total reason=all_fail run=r": 11,
        "ray_elenchus_sample_age_versions of=max run=r": 2,
        "ray_elenchus_sample_age_versions of=mean run=r": 0.5,
    }
    expected = critic | loop
    assert {key: found["first"].get(key) for key in expected} == pytest.approx(expected)
    assert 0 < found["first"]["ray_elenchus_weight_sync_seconds pool=critic run=r"] < 30
    assert not [key for key in found["first"] if "weight_sync_parity_nats" in key], "the last sync was refused"
    # Nothing was recorded in between: what is there is what was said again.
    assert found["later"] == found["first"]
    assert {key for key in found["afterwards"] if "_total " not in key} == set()
    assert "ray_elenchus_pairs_trained_total run=r" in found["afterwards"]
    exported = {series.exported for series in ALL_SERIES}
    assert {key.split()[0] for key in found["first"]} <= exported
