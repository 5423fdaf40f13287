"""A whole run by TOML of one learner for all trade-offs, killed in its first update, resumed, exported at a vector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import elenchus
from cluster.store import read_stage
from tests.sitting import Sitting, finished
from trainers.feedback.trade_offs import draw_preference, version_at
from trainers.ranks.adapters import LAYERS_DIR, LAYERS_FILE
from trainers.summary import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PANACEA = """
[objectives]
names = ["verdict", "brevity"]
weights = [0.6, 0.4]

[loss]
kind = "grpo"

[learner.training]
learning_rate = 3e-3
batch_size = 16

[learner.training.panacea]
rank = 4
targets = ["q_proj", "down_proj"]

[loop]
epochs = 2

[attacker]
shares = "rollouts"

[critic]
shares = "rollouts"
"""


def test_one_learner_for_all_trade_offs_runs_resumes_and_is_exported(
    home: Path, sit: Callable[..., Sitting], capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "panacea.toml").write_text(PANACEA)
    killed = sit("run", "tiny.toml", "panacea.toml", "--name", "panacea", killed="in-training")
    assert killed.end() == -9, killed.output[-3000:]
    killed.assert_gone(timeout_s=60.0)
    run = home / "runs" / "panacea"
    sitting = sit("resume", "panacea")
    assert sitting.end() == 0, sitting.output[-3000:]
    finished(run)
    rows = read_metrics(run)
    for row in rows:
        drawn = draw_preference(2, seed=0, iteration=row.iteration)
        assert row.preference == drawn
        # What was sampled before the kill and after it is of one vector, and all that was judged is trained on.
        versions = read_stage(run, "responses", iteration=row.iteration).column("policy_version").to_pylist()
        assert set(versions) == {version_at(f"v{row.iteration - 1}", drawn)}
        assert row.pairs_trained == row.num_verdicts
        # The engine that sampled and the ranks agree at that vector.
        assert row.training["rollout_gap"] < 1e-4
        probe = read_stage(run, "evaluations", iteration=row.iteration).to_pylist()
        assert {item["policy_version"] for item in probe if item["set_name"] == "probe"} == {f"v{row.iteration}"}
    first, last = (run / "policies" / name for name in ("v000000", "v000002"))
    before, after = (load_file(policy / "model.safetensors") for policy in (first, last))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
    scales = [tensor for name, tensor in load_file(last / LAYERS_DIR / LAYERS_FILE).items() if name.endswith(".scale")]
    assert all(abs(float(scale[0])) > 0 for scale in scales)
    for name, vector in (("own", ("0.6", "0.4")), ("other", ("1", "0"))):
        out = home / f"exported-{name}"
        words = ["--runs-dir", str(home / "runs"), "--preference", *vector, "--out", str(out)]
        assert elenchus.main(["export", "panacea", *words]) == 0, capsys.readouterr().err
    own, other = (load_file(home / f"exported-{name}" / "model.safetensors") for name in ("own", "other"))
    assert all(own[name].tobytes() == after[name].tobytes() for name in after)
    assert any(other[name].tobytes() != after[name].tobytes() for name in after)
