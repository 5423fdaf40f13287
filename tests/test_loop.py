"""One whole run on the real engines, by the command line: Ray, three vLLM pools, two DeepSpeed ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sitting import NUM_ITERATIONS, Sitting, finished


@pytest.mark.timeout(600)
def test_a_whole_run_ends_in_a_summary_and_a_report(home: Path, sit: Callable[..., Sitting]) -> None:
    sitting = sit("run", "tiny.toml", "--name", "whole")
    assert sitting.end() == 0, sitting.output[-3000:]
    run = home / "runs" / "whole"
    finished(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["policy_version"] == f"v{NUM_ITERATIONS}"
    assert summary["regime"] == "critic_expert"
    assert summary["gold"]["critic_bootstrap"] > 0
    assert summary["experts"]["asked"] <= 0.05 * summary["experts"]["verdicts"]
    # 5 two-digit cells, 3 sealed problems each.
    assert summary["sealed_accuracy"]["n"] == 15
    assert all(rate > 0 for rate in summary["tokens_per_s"].values())
    assert (run / "report.html").stat().st_size > 100_000
    assert any((run / "tensorboard").iterdir())
    # A finished run has nothing left to do.
    resumed = sit("resume", "whole")
    assert resumed.end() == 0, resumed.output[-3000:]
