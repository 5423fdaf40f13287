"""Response tokens become items to be classified: which logits, which labels, and the same step however it is cut."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from trainers.batches import micro_batches
from trainers.losses import LabelBatch, LossOutput, TwoPassLoss, load_loss
from trainers.ranks.update_start import rows_for
from trainers.rows.documents import token_rows
from trainers.rows.labels import LabelRows, item_places, label_rows, predictors, target_logits
from trainers.rows.samples import sample_rows
from trainers.training_group import TrainingPlan

VOCABULARY = 17
CASES = pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("weak_to_strong", {}),
        ("weak_to_strong", {"max_alpha": 0.0}),
        ("forward_correction", {"noise": 0.2}),
        ("forward_correction", {"noise": 0.0}),
    ],
)


class Bigrams:
    """A model that looks at the token before, and knows where it was asked."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.asked: list[int] = []

    def __call__(self, *, input_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> Any:
        self.asked = logits_to_keep.tolist()
        return SimpleNamespace(logits=self.scores[input_ids][:, logits_to_keep])


def random_table(num_rows: int, *, seed: int) -> pa.Table:
    generator = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [generator.randrange(VOCABULARY) for _ in range(generator.randrange(least, most))]

    return pa.table(
        {
            "prompt_token_ids": [ids(1, 6) for _ in range(num_rows)],
            "response_token_ids": [ids(1, 20) for _ in range(num_rows)],
            "weight": [0.5 + generator.random() for _ in range(num_rows)],
        }
    )


def batch_of(rows: LabelRows, chosen: tuple[int, ...], model: Bigrams, *, of: tuple[int, ...]) -> LabelBatch:
    padded = rows.pad(chosen)
    logits = target_logits(model, padded.token_ids, padded.mask)
    totals = rows.totals(of)
    return replace(
        rows.batch(chosen, logits=logits, token_ids=padded.token_ids, mask=padded.mask, totals=totals), progress=0.1
    )


def stepped(
    rows: LabelRows, model: Bigrams, *, parts: list[tuple[int, ...]], name: str, settings: dict[str, Any]
) -> LossOutput:
    """Return the sum of a step's shares, with figures of all items as a rank gathers them."""
    loss, every = load_loss(name), tuple(range(len(rows.lengths)))
    config = loss.Config.model_validate(settings)
    batches = [batch_of(rows, part, model, of=every) for part in parts]
    if isinstance(loss, TwoPassLoss):
        place_of, num_items = item_places(rows, every)
        figures = torch.zeros(num_items, 3, dtype=torch.float64)
        for part, batch in zip(parts, batches, strict=True):
            figures[[place for row in part for place in place_of[row]]] = loss.first_pass(batch, config)
        batches = [replace(batch, step_figures=figures) for batch in batches]
    outputs = [loss.loss(batch, config) for batch in batches]
    metrics = {key: torch.stack([output.metrics[key] for output in outputs]).sum() for key in outputs[0].metrics}
    return LossOutput(torch.stack([output.loss for output in outputs]).sum(), metrics)


def test_items_are_the_responses_tokens_with_the_logits_that_predict_them() -> None:
    given = {
        "prompt_token_ids": [[3, 4, 5], [6, 7]],
        "response_token_ids": [[8, 9], [10, 11]],
        "weight": [1.0, 0.5],
    }
    rows = label_rows(pa.table(given))
    padded = rows.pad([1, 0])
    model = Bigrams(torch.arange(VOCABULARY * 5.0).view(VOCABULARY, 5))
    # The responses' tokens are at 2 and 3, and at 3 and 4: positions 1 to 3 predict any of them, 0 and 4 none.
    logits = target_logits(model, padded.token_ids, padded.mask)
    assert model.asked == [1, 2, 3]
    totals = rows.totals([0, 1])
    batch = rows.batch([1, 0], logits=logits, token_ids=padded.token_ids, mask=padded.mask, totals=totals)
    assert batch.labels.tolist() == [10, 11, 8, 9]
    assert batch.logits.tolist() == model.scores[[7, 10, 5, 8]].tolist()
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert batch.global_weight == 3.0


def test_tokens_that_a_mask_leaves_out_are_no_items() -> None:
    given = {
        "prompt_token_ids": [[3], [4]],
        "response_token_ids": [[8, 9, 10], [11]],
        "loss_mask": [[False, True, False, True], [False, True]],
    }
    rows = label_rows(pa.table(given))
    padded = rows.pad([0, 1])
    assert predictors(padded.mask).tolist() == [0, 2]
    logits = target_logits(Bigrams(torch.eye(VOCABULARY)), padded.token_ids, padded.mask)
    totals = rows.totals([0, 1])
    batch = rows.batch([0, 1], logits=logits, token_ids=padded.token_ids, mask=padded.mask, totals=totals)
    assert batch.labels.tolist() == [8, 10, 11]
    assert batch.logits.argmax(dim=1).tolist() == [3, 9, 4]


def test_half_precision_logits_are_classified_in_fp32() -> None:
    rows = label_rows(random_table(2, seed=0))
    model = Bigrams(torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.bfloat16))
    batch = batch_of(rows, (0, 1), model, of=(0, 1))
    assert batch.logits.dtype == torch.float32


@CASES
def test_a_dummy_costs_nothing_and_has_a_gradient_of_zero(name: str, settings: dict[str, Any]) -> None:
    rows = label_rows(random_table(3, seed=0))
    model = Bigrams(torch.zeros(VOCABULARY, VOCABULARY, requires_grad=True))
    loss = load_loss(name)
    batch = batch_of(rows, (), model, of=(0, 1, 2))
    if isinstance(loss, TwoPassLoss):
        assert loss.first_pass(batch, loss.Config()).shape == (0, 3)
    for figures in (None, torch.tensor([[0.5, 0.0, 1.0]])):
        given = replace(batch, step_figures=figures)
        output = loss.loss(given, loss.Config.model_validate(settings))
        assert output.loss.item() == 0.0
        (gradient,) = torch.autograd.grad(output.loss, model.scores, retain_graph=True)
        assert not gradient.any()


@CASES
@pytest.mark.parametrize(("num_ranks", "micro_batch_tokens"), [(1, 60), (2, 60), (3, 4096)])
def test_a_step_is_the_same_however_it_is_cut(
    name: str, settings: dict[str, Any], num_ranks: int, micro_batch_tokens: int
) -> None:
    rows = label_rows(random_table(8, seed=2))
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator).requires_grad_()
    model = Bigrams(scores)
    whole = stepped(rows, model, parts=[tuple(range(8))], name=name, settings=settings)
    (gradient,) = torch.autograd.grad(whole.loss, scores)
    layout = micro_batches(rows, range(8), num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens)
    parts = [micro.rows for rank in layout for micro in rank]
    assert len(parts) > 1
    cut = stepped(rows, model, parts=[*parts, ()], name=name, settings=settings)
    (same,) = torch.autograd.grad(cut.loss, scores)
    torch.testing.assert_close(cut.loss, whole.loss)
    torch.testing.assert_close(same, gradient)
    for key, value in whole.metrics.items():
        torch.testing.assert_close(cut.metrics[key], value)


def test_without_noise_and_confidence_the_step_is_cross_entropy_over_all_response_tokens() -> None:
    table = random_table(6, seed=3)
    rows, model = label_rows(table), Bigrams(torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64))
    columns = table.to_pydict()
    total = num_tokens = 0.0
    for prompt, response, weight in zip(*(columns[key] for key in columns), strict=True):
        ids = [*prompt, *response]
        steps = range(len(prompt), len(ids))
        total -= weight * sum(float(model.scores[ids[t - 1]].log_softmax(0)[ids[t]]) for t in steps)
        num_tokens += weight * len(response)
    for name, settings in (("weak_to_strong", {"max_alpha": 0.0}), ("forward_correction", {"noise": 0.0})):
        found = stepped(rows, model, parts=[(0, 1, 2), (3, 4, 5)], name=name, settings=settings)
        assert found.loss.item() == pytest.approx(total / num_tokens)


def test_the_quantile_is_of_the_whole_step_and_not_of_each_part() -> None:
    """Rows of which the student is sure and unsure: the median over both lets the sure ones speak, all of them."""
    probabilities = [[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.5, 0.3, 0.2]]
    scores = torch.tensor(probabilities, dtype=torch.float64).log()
    given = {"prompt_token_ids": [[0], [1], [2], [3]], "response_token_ids": [[1], [2], [2], [1]]}
    rows = label_rows(pa.table(given))
    settings = {"max_alpha": 0.5, "ramp_share": 0.1}
    found = stepped(rows, Bigrams(scores), parts=[(0, 1), (2, 3)], name="weak_to_strong", settings=settings)
    # The median of 0.9, 0.8, 0.4, 0.5 is 0.65.
    costs = [-math.log(0.05), -math.log(0.1), -math.log(0.3), -math.log(0.3)]
    mixed = [(costs[0] - math.log(0.9)) / 2, (costs[1] - math.log(0.8)) / 2, costs[2], costs[3]]
    assert found.loss.item() == pytest.approx(sum(mixed) / 4)
    assert found.metrics["alpha"].item() == pytest.approx(0.25)


def test_items_stand_row_after_row_where_rows_are_documents_of_labels() -> None:
    given = {"prompt_token_ids": [[1]] * 3, "response_token_ids": [[2], [3, 4, 5], [6, 7]]}
    rows = label_rows(pa.table(given))
    assert item_places(rows, [2, 0, 1]) == ({2: range(2), 0: range(2, 3), 1: range(3, 6)}, 6)
    assert item_places(token_rows(pa.table(given)), [2, 0]) == ({2: range(1), 0: range(1, 2)}, 2)
    scored = pa.table({**given, "score": [1.0] * 3, "query_id": ["q"] * 3})
    assert item_places(sample_rows(scored), [1]) == ({1: range(1)}, 1)


@pytest.mark.parametrize("name", ["weak_to_strong", "forward_correction"])
def test_a_loss_of_labels_is_given_the_tokens_of_a_tables_responses(name: str) -> None:
    assert isinstance(rows_for(load_loss(name), random_table(2, seed=0), name=name), LabelRows)


def test_a_loss_of_a_batch_of_its_own_is_refused() -> None:
    stranger: Any = SimpleNamespace(batch=dict, uses_reference=False)
    with pytest.raises(ValueError, match='got loss "stranger", which takes a dict: a table holds no such rows'):
        rows_for(stranger, random_table(2, seed=0), name="stranger")


def test_a_plan_knows_how_far_the_run_is_before_each_of_its_steps() -> None:
    plan = TrainingPlan.of(list("abcd"), batch_size=2, epochs=2, seed=0)
    assert [plan.progress(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]
    # The second of four iterations.
    second = replace(plan, training=(0.25, 0.5))
    assert [second.progress(step) for step in range(4)] == [0.25, 0.3125, 0.375, 0.4375]
