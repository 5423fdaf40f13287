"""TRL's side of the comparison does the work that it is said to do. Needs TRL: `make test-parity`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.against_trl import demo_texts, num_pair_tokens, pair_table
from benchmarks.trl_dpo import EPOCHS, TrlSetting, hold, train
from trainers.base_model import BaseModelConfig, write_base_model

pytest.importorskip("trl", reason="not installed: make test-parity")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("precompute", [False, True])
def test_trl_trains_the_same_tokens_and_starts_from_the_same_loss(
    precompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model = write_base_model(tmp_path / "model", BaseModelConfig(), seed=0)
    pairs = demo_texts(32)
    setting = TrlSetting(
        model=str(model),
        pairs=tuple(pairs),
        learning_rate=3e-5,
        max_grad_norm=1.0,
        beta=0.1,
        threads=1,
        output=str(tmp_path / "trl"),
    )
    found = train(hold(setting), precompute)
    assert found.num_tokens == EPOCHS * num_pair_tokens(pair_table(pairs, model))
    assert found.first_loss == pytest.approx(math.log(2.0), abs=1e-3)
    assert found.seconds > 0.0
