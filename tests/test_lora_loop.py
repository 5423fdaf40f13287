"""A whole run by TOML on one engine: the learner's adapter on it, its base for attacker and critic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from cluster.store import read_stage
from tests.sitting import Sitting, finished
from trainers.summary import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LORA = """
[learner.training]
learning_rate = 3e-4

[learner.training.lora]
rank = 4
targets = ["q_proj", "down_proj"]

[attacker]
shares = "rollouts"

[critic]
shares = "rollouts"
"""


def test_three_roles_on_one_base_and_the_learner_learns(
    home: Path, sit: Callable[..., Sitting], ray_session: str
) -> None:
    (home / "lora.toml").write_text(LORA)
    sitting = sit("run", "tiny.toml", "lora.toml", "--name", "lora")
    assert sitting.end() == 0, sitting.output[-3000:]
    run = home / "runs" / "lora"
    finished(run)
    assert all(row.tokens_per_s.keys() == {"rollouts"} for row in read_metrics(run))
    for iteration in (1, 2):
        versions = {
            stage: set(read_stage(run, stage, iteration=iteration).column(f"{who}_version").to_pylist())
            for stage, who in (("queries", "attacker"), ("responses", "policy"), ("critiques", "critic"))
        }
        # The critic stays what it was, on engines that the learner's versions go through.
        assert versions == {"queries": {"v0"}, "responses": {f"v{iteration - 1}"}, "critiques": {"v0"}}
    first, last = (load_file(run / "policies" / name / "model.safetensors") for name in ("v000000", "v000002"))
    changed = {name for name in first if first[name].tobytes() != last[name].tobytes()}
    assert changed == {name for name in first if "q_proj" in name or "down_proj" in name}
    (state,) = (run / "checkpoints").glob("*2/state/mp_rank_00_model_states.pt")
    assert state.stat().st_size < (run / "policies" / "v000002" / "model.safetensors").stat().st_size / 2
