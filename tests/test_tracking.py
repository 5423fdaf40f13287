"""What a run says about itself survives kills and resumes: metrics.jsonl, summary.json, TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.synthetic_run import make_row, make_summary
from trainers.summary import (
    CountedBeforeAfter,
    append_metrics,
    read_metrics,
    read_summary,
    rewind_metrics,
    summarise_agreement,
    summarise_experts,
    summarise_pairs,
    write_summary,
)
from trainers.tracking import TENSORBOARD_DIR, TensorBoardTracker, scalars


def test_metrics_are_read_back_as_written(tmp_path: Path) -> None:
    rows = [make_row(1), make_row(2, live=None)]
    for row in rows:
        append_metrics(tmp_path, row)
    assert read_metrics(tmp_path) == rows


def test_a_line_cut_short_by_a_crash_is_ignored_and_then_overwritten(tmp_path: Path) -> None:
    append_metrics(tmp_path, make_row(1))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in (1, 40, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert read_metrics(tmp_path) == [make_row(1)]
    append_metrics(tmp_path, make_row(2))
    assert read_metrics(tmp_path) == [make_row(1), make_row(2)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    append_metrics(tmp_path, make_row(1))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n' + path.read_bytes())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        read_metrics(tmp_path)


def test_the_last_row_of_an_iteration_wins_and_rewinding_drops_what_was_not_committed(tmp_path: Path) -> None:
    for row in (make_row(1), make_row(2), make_row(3), make_row(2, probe_accuracy=0.75)):
        append_metrics(tmp_path, row)
    assert [row.probe_accuracy for row in read_metrics(tmp_path)] == [0.5, 0.75, 0.5]
    rewind_metrics(tmp_path, last_iteration=2)
    assert [row.iteration for row in read_metrics(tmp_path)] == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 2


def test_summary_is_read_back_as_written_and_absent_before(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None
    summary = make_summary([make_row(1), make_row(2)])
    path = write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    on_disk = json.loads(path.read_text())
    # 35 items went from wrong to right and 5 from right to wrong.
    assert on_disk["sealed_accuracy"]["gain"] == pytest.approx(0.3)
    assert on_disk["sealed_accuracy"]["ci_low"] > 0.17
    assert on_disk["live_attack_success"] == {"1": 0.4, "2": 0.4}
    assert set(on_disk["gold"]) == {"learner_bootstrap", "critic_bootstrap", "expert", "calibration", "canaries"}
    assert set(on_disk["wall_s"]) == {"bootstrap", "start", "iterations", "total"}


def test_a_file_that_is_no_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_summary_refuses_a_share_above_one() -> None:
    with pytest.raises(ValidationError):
        CountedBeforeAfter(before=0.5, after=1.2, n=10)


def test_the_lowest_iterations_agreement_counts_with_its_own_error_rates() -> None:
    # Good answers passed: 90, 80, 96 of 100; bad ones failed: 95 of 100.
    rows = [make_row(1), make_row(2, good_passed=80), make_row(3, good_passed=96)]
    found = summarise_agreement(rows)
    assert found.lowest == pytest.approx((0.80 + 0.95) / 2)
    assert found.false_fail == pytest.approx(0.20)
    assert found.false_pass == pytest.approx(0.05)
    assert found.by_iteration[3] == pytest.approx((0.96 + 0.95) / 2)


def test_experts_and_pairs_add_up_over_iterations() -> None:
    rows = [make_row(1), make_row(2)]
    experts = summarise_experts(rows)
    assert (experts.asked, experts.verdicts, experts.fraction) == (24, 768, 24 / 768)
    pairs = summarise_pairs(rows)
    assert pairs.trained == 120
    assert pairs.dropped == {"all_pass": 40, "all_fail": 11 + 12, "margin": 12}


def test_what_was_not_measured_has_no_point() -> None:
    tags = dict(scalars(make_row(1, live=None)))
    assert "attack/live_success" not in tags
    assert tags["cell_fail_share/plus_sign_3_2"] == 0.25
    assert "cell_fail_share/-_3_1" not in tags
    assert tags["experts/fraction"] == 12 / 384
    assert tags["training/grad_norm"] == 1.2


def _points(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / TENSORBOARD_DIR))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(tag)]


def test_a_logged_iteration_is_on_disk_before_the_tracker_is_closed(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    try:
        tracker.log(make_row(1, probe_accuracy=0.4))
        assert _points(tmp_path, "probe/accuracy") == [(1, 0.4)]
    finally:
        tracker.close()


def test_a_resumed_run_hides_what_was_logged_after_its_last_commit(tmp_path: Path) -> None:
    with TensorBoardTracker(tmp_path) as first:
        for iteration in (1, 2, 3):
            first.log(make_row(iteration, probe_accuracy=0.1 * iteration))
    # TensorBoard reads event files in the order of their names, which hold the second of their making.
    (made,) = (tmp_path / TENSORBOARD_DIR).iterdir()
    made.rename(made.with_name(made.name.replace("tfevents.", "tfevents.0", 1)))
    with TensorBoardTracker(tmp_path, last_iteration=2) as second:
        second.log(make_row(3, probe_accuracy=0.9))
    assert _points(tmp_path, "probe/accuracy") == [(1, 0.1), (2, 0.2), (3, 0.9)]
