"""From logits to gradients in one process: alignment, padding, prompts, micro-batches, learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.tiny_models import write_llama
from trainers.batches import lay_out
from trainers.logprobs import sequence_logprobs, token_logprobs
from trainers.losses import dpo
from trainers.ranks.model_source import ModelSource, load_model
from trainers.rows.pairs import PairRows, pair_rows
from trainers.training_config import TrainingConfig, learning_rate

PAIRS = {
    "prompt_token_ids": [[7, 8, 9], [10, 11], [12, 13, 14, 15, 16], [7]],
    "chosen_token_ids": [[20, 21], [22, 23, 24, 25, 2], [26, 2], [27, 28, 29, 2]],
    "rejected_token_ids": [[30, 31, 32, 33], [34], [35, 36, 2], [37, 2]],
    "weight": [1.0, 0.5, 2.0, 1.0],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_llama(tmp_path_factory.mktemp("model") / "llama", tied=True)
    return load_model(ModelSource(path=str(path)), dtype=torch.float64)


def gradient(model: Any, rows: PairRows, micros: list[tuple[int, ...]]) -> tuple[Tensor, float]:
    """The flat gradient and loss of all rows, summed over micro-batches, with reference log-probs of 0."""
    model.zero_grad()
    totals, loss = rows.totals([row for micro in micros for row in micro]), 0.0
    for micro in micros:
        padded = rows.pad(micro)
        logprobs = token_logprobs(model(input_ids=padded.token_ids, use_cache=False).logits, padded.token_ids)
        reference = torch.zeros(max(1, len(micro)), 2, dtype=torch.float64)
        batch = rows.batch(micro, logprobs=logprobs, mask=padded.mask, totals=totals, reference=reference)
        part = dpo.loss(batch, dpo.Config(nll_weight=0.3)).loss
        part.backward()
        loss += part.item()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss


def test_a_log_prob_belongs_to_the_token_that_the_position_before_predicts() -> None:
    # Over two tokens: position 0 predicts token 1 with p = 3/4, position 1 predicts token 0 with p = 1/2.
    logits = torch.tensor([[[0.0, math.log(3.0)], [1.0, 1.0], [5.0, -5.0]]])
    values = token_logprobs(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(values, torch.tensor([[0.0, math.log(3 / 4), math.log(1 / 2)]]))


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[[0.0, 2 * math.log(3.0)], [0.0, 0.0]]])
    values = token_logprobs(logits, torch.tensor([[0, 1]]), temperature=2.0)
    assert values[0, 1].item() == pytest.approx(math.log(3 / 4))


def test_half_precision_logits_give_log_probs_in_fp32() -> None:
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = token_logprobs(logits, torch.tensor([[1, 2, 3, 4]]))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, token_logprobs(logits.float(), torch.tensor([[1, 2, 3, 4]])))


def test_a_sequence_log_prob_sums_its_targets_alone() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, -5.0, -6.0]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert sequence_logprobs(logprobs, mask).tolist() == [-3.0, -11.0]


def test_right_padding_without_an_attention_mask_changes_no_log_prob(model: Any) -> None:
    ids = torch.tensor([[7, 8, 9, 20, 21]])
    padded = torch.nn.functional.pad(ids, (0, 6))
    alone = token_logprobs(model(input_ids=ids).logits, ids)
    beside = token_logprobs(model(input_ids=padded).logits, padded)[:, :5]
    torch.testing.assert_close(beside, alone, atol=1e-12, rtol=0)


def test_gradient_does_not_depend_on_micro_batches_dummies_or_ranks(model: Any) -> None:
    rows = pair_rows(pa.table(PAIRS))
    expected, loss = gradient(model, rows, [(0, 1, 2, 3)])
    for micros in ([(0,), (1,), (2,), (3,)], [(2, 0), (), (3, 1)], [(3, 2, 1, 0)]):
        got, value = gradient(model, rows, list(micros))
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
        assert value == pytest.approx(loss, abs=1e-12)
    layout = lay_out(range(4), lengths=rows.lengths, num_ranks=2, micro_batch_tokens=16, sequences_per_row=2)
    summed = sum(gradient_of_rank(model, rows, rank) for rank in layout)
    assert isinstance(summed, Tensor)
    torch.testing.assert_close(summed, expected, atol=1e-10, rtol=0)


def gradient_of_rank(model: Any, rows: PairRows, micros: tuple[tuple[int, ...], ...]) -> Tensor:
    """One rank's gradient: its own micro-batches under the denominators of all four rows."""
    model.zero_grad()
    totals = rows.totals(range(4))
    for micro in micros:
        padded = rows.pad(micro)
        logprobs = token_logprobs(model(input_ids=padded.token_ids).logits, padded.token_ids)
        reference = torch.zeros(max(1, len(micro)), 2, dtype=torch.float64)
        batch = rows.batch(micro, logprobs=logprobs, mask=padded.mask, totals=totals, reference=reference)
        dpo.loss(batch, dpo.Config(nll_weight=0.3)).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_loss_does_not_depend_on_what_stands_at_prompt_labels(model: Any) -> None:
    # The mask is on responses; a prompt's own log-probs (its "labels") may be anything.
    rows = pair_rows(pa.table(PAIRS))
    padded = rows.pad([0, 1, 2, 3])
    logprobs = token_logprobs(model(input_ids=padded.token_ids).logits, padded.token_ids).detach()
    spoilt = torch.where(padded.mask, logprobs, torch.full_like(logprobs, -77.0))
    losses = [
        dpo.loss(
            rows.batch(
                [0, 1, 2, 3],
                logprobs=values,
                mask=padded.mask,
                totals=rows.totals(range(4)),
                reference=torch.zeros(4, 2, dtype=torch.float64),
            ),
            dpo.Config(),
        ).loss
        for values in (logprobs, spoilt)
    ]
    assert torch.equal(losses[0], losses[1])


def test_lengths_of_a_pair_are_those_of_its_longer_sequence() -> None:
    # 3 + 2 against 3 + 4, 2 + 5 against 2 + 1, 5 + 2 against 5 + 3, 1 + 4 against 1 + 2
    assert np.array_equal(pair_rows(pa.table(PAIRS)).lengths, [7, 7, 8, 5])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + 0.25 * math.sqrt(2), 0.5, 0.5 - 0.25 * math.sqrt(2), 0.0]),
    ],
)
def test_the_learning_rate_rises_then_falls_to_zero_at_the_last_step(schedule: Any, expected: list[float]) -> None:
    config = TrainingConfig(learning_rate=1.0, warmup_steps=2, schedule=schedule, total_steps=6)
    assert [learning_rate(config, step=i) for i in range(7)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bf16", "zero_stage": 0}, 'got "bf16" with zero_stage = 0'),
        ({"schedule": "cosine"}, "total_steps: got nothing"),
        ({"total_steps": 5, "warmup_steps": 5}, "wanted more than warmup_steps"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_settings_that_cannot_train_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingConfig(**settings)


def test_a_directory_without_weights_needs_a_seed(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "llama")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        load_model(ModelSource(path=str(path)), dtype=torch.float32)
    first, second = (load_model(ModelSource(path=str(path), init_seed=5), dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(ModelSource(path=str(tmp_path)), dtype=torch.float32)
