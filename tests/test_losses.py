"""Losses against numbers derived by hand, and the invariants that every loss must hold (METHODS G1-G6)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from cluster.config import Config, plugin_names
from tests.loss_batches import VARIABLES, random_batch, rows_of, told_of_its_step, variables, without_targets
from trainers.losses import (
    Batch,
    LabelBatch,
    Loss,
    PairBatch,
    TokenBatch,
    TwoPassLoss,
    UnpairedBatch,
    dpo,
    load_loss,
    pretraining,
    sft,
)
from trainers.run_config import load_run_config

NAMES = plugin_names("trainers.losses")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("dpo", {"beta": 0.3, "nll_weight": 0.5}),
    ("dpo", {"beta": 5.0, "length_norm": True}),
    ("ipo", {"length_norm": True}),
    ("exo", {"nll_weight": 0.1}),
    ("exo_group", {"forward": True}),
    ("pro", {"unit_gaps": True}),
    ("modpo", {"weights": [0.7, 0.3]}),
    ("kto", {"desirable_weight": 1.5}),
    ("kto", {"desirable_weight": 1.0, "undesirable_weight": 1.0}),
    ("bradley_terry", {"centring": 0.01}),
    ("weak_to_strong", {"ramp": "released", "max_alpha": 1.0}),
    ("token_noise", {"weighting": "probability"}),
    ("token_noise", {"min_probability": 0.4}),
    ("token_noise", {"label_smoothing": 0.1}),
    ("span_noise", {"unlikelihood": 0.5}),
]
"""Losses with settings that their invariants must hold under."""
EACH_CASE = pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{name}-{s}" for name, s in CASES])


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def toy_pair() -> PairBatch:
    """METHODS' TOY-P: h_w = -10 + 11 = 1, h_l = -12 + 11.5 = -0.5, delta 1.5."""
    return PairBatch(
        policy_chosen=vector(-10.0).requires_grad_(),
        policy_rejected=vector(-12.0).requires_grad_(),
        reference_chosen=vector(-11.0),
        reference_rejected=vector(-11.5),
        chosen_lengths=vector(5.0),
        rejected_lengths=vector(4.0),
    )


def config_of(loss: Loss, settings: dict[str, Any]) -> Config:
    return loss.Config.model_validate(settings)


# ---------------------------------------------------------------------------------------------------------- oracles


def test_dpo_of_the_toy_pair_is_softplus_of_minus_fifteen_hundredths() -> None:
    batch = toy_pair()
    output = dpo.loss(batch, dpo.Config(beta=0.1))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0.620957, abs=1e-6)
    # -beta * sigmoid(-0.15) and its opposite
    assert batch.policy_chosen.grad is not None
    assert batch.policy_rejected.grad is not None
    assert batch.policy_chosen.grad.item() == pytest.approx(-0.0462570, abs=1e-6)
    assert batch.policy_rejected.grad.item() == pytest.approx(0.0462570, abs=1e-6)


def test_dpo_reports_log_ratios_margin_and_accuracy_of_the_toy_pair() -> None:
    metrics = dpo.loss(toy_pair(), dpo.Config(beta=0.1)).metrics
    assert metrics["chosen_logratio"].item() == pytest.approx(1.0)
    assert metrics["rejected_logratio"].item() == pytest.approx(-0.5)
    assert metrics["reward_margin"].item() == pytest.approx(0.15)
    assert metrics["reward_accuracy"].item() == 1.0
    assert metrics["chosen_nll"].item() == pytest.approx(10 / 5)


def test_dpo_is_log_two_where_policy_is_the_reference() -> None:
    batch = toy_pair()
    same = replace(batch, policy_chosen=batch.reference_chosen, policy_rejected=batch.reference_rejected)
    assert dpo.loss(same, dpo.Config()).loss.item() == pytest.approx(math.log(2))


def test_dpo_is_least_where_the_margin_is_the_logit_of_the_preference_rate() -> None:
    """Of four judges three prefer A: the minimiser has beta * delta = log(3), so the loss at both sides is greater."""

    def at(margin: float) -> float:
        delta = vector(margin, margin, margin, -margin) / 0.1
        zero = torch.zeros(4, dtype=torch.float64)
        ones = torch.ones(4, dtype=torch.float64)
        batch = PairBatch(
            policy_chosen=delta,
            policy_rejected=zero,
            reference_chosen=zero,
            reference_rejected=zero,
            chosen_lengths=ones,
            rejected_lengths=ones,
        )
        return dpo.loss(batch, dpo.Config(beta=0.1)).loss.item()

    best = math.log(3)
    assert at(best) < min(at(best - 0.01), at(best + 0.01))


def test_the_chosen_nll_term_is_a_mean_over_the_tokens_of_all_pairs() -> None:
    # Chosen sums -10 over 5 tokens and -2 over 1: (10 + 2) / 6 = 2 per token, not (2 + 2) / 2 pairs by accident alone:
    # weights 1 and 3 make it (10 + 6) / (5 + 3) = 2 as well, weights 3 and 1 with sums -10 and -8: (30 + 8) / 16.
    batch = PairBatch(
        policy_chosen=vector(-10.0, -8.0),
        policy_rejected=vector(-1.0, -1.0),
        reference_chosen=vector(-10.0, -8.0),
        reference_rejected=vector(-1.0, -1.0),
        chosen_lengths=vector(5.0, 1.0),
        rejected_lengths=vector(1.0, 1.0),
        weights=vector(3.0, 1.0),
    )
    output = dpo.loss(batch, dpo.Config(nll_weight=0.5))
    assert output.metrics["chosen_nll"].item() == pytest.approx(38 / 16)
    assert output.loss.item() == pytest.approx(math.log(2) + 0.5 * 38 / 16)


def test_sft_equals_cross_entropy_that_ignores_masked_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 5), generator=generator)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 7), labels.masked_fill(~mask, -100).reshape(-1), ignore_index=-100
    )
    logprobs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    output = sft.loss(TokenBatch(logprobs=logprobs, mask=mask), sft.Config())
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_pretraining_on_uniform_logits_costs_log_of_the_vocabulary_per_token() -> None:
    logprobs = torch.full((2, 4), -math.log(50), dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)
    output = pretraining.loss(TokenBatch(logprobs=logprobs, mask=mask), pretraining.Config())
    assert output.loss.item() == pytest.approx(math.log(50))
    # Four tokens in two documents: two per document.
    assert output.metrics["document_nll"].item() == pytest.approx(2 * math.log(50))


# ------------------------------------------------------------------------------------------------------- invariants


@EACH_CASE
@pytest.mark.parametrize("cuts", [(0, 5), (0, 1, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)])
def test_loss_gradient_and_metrics_do_not_depend_on_how_a_step_is_cut(
    name: str, settings: dict[str, Any], cuts: tuple[int, ...]
) -> None:
    loss = load_loss(name)
    config = config_of(loss, settings)
    whole = told_of_its_step(random_batch(loss.batch, seed=1), loss, config)
    leaves = variables(whole)
    expected = loss.loss(whole, config)
    gradients = torch.autograd.grad(expected.loss, leaves)
    parts = [loss.loss(rows_of(whole, a, b), config) for a, b in pairwise(cuts)]
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(total, expected.loss, atol=1e-12, rtol=0)
    for got, wanted in zip(torch.autograd.grad(total, leaves), gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    for metric, value in expected.metrics.items():
        torch.testing.assert_close(torch.stack([part.metrics[metric] for part in parts]).sum(), value)


@EACH_CASE
def test_denominators_written_out_are_those_a_whole_batch_has_by_itself(name: str, settings: dict[str, Any]) -> None:
    loss = load_loss(name)
    config = config_of(loss, settings)
    batch = random_batch(loss.batch, seed=2)
    alone, told = loss.loss(batch, config), loss.loss(told_of_its_step(batch, loss, config), config)
    torch.testing.assert_close(alone.loss, told.loss)
    assert alone.metrics.keys() == told.metrics.keys()
    for metric in alone.metrics:
        torch.testing.assert_close(alone.metrics[metric], told.metrics[metric])


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(load_loss(name), TwoPassLoss)])
def test_a_first_pass_gives_each_row_its_figures_however_the_step_is_cut(name: str) -> None:
    loss = load_loss(name)
    assert isinstance(loss, TwoPassLoss)
    batch = random_batch(loss.batch, seed=1)
    variables(batch)
    figures = loss.first_pass(batch, loss.Config())
    assert figures.shape[0] == 5
    assert figures.ndim == 2
    assert not figures.requires_grad
    parts = [loss.first_pass(rows_of(batch, a, b), loss.Config()) for a, b in ((0, 2), (2, 5))]
    assert torch.equal(torch.cat(parts), figures)


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(load_loss(name), TwoPassLoss)])
def test_what_part_of_a_step_costs_hangs_on_the_rest_of_it(name: str) -> None:
    loss = load_loss(name)
    changed = 0
    for seed in range(10):
        told = rows_of(told_of_its_step(random_batch(loss.batch, seed=seed), loss, loss.Config()), 2, 5)
        assert isinstance(told, TokenBatch | UnpairedBatch | LabelBatch)
        alone = replace(told, step_figures=None)
        changed += loss.loss(told, loss.Config()).loss.item() != loss.loss(alone, loss.Config()).loss.item()
    assert changed >= 1


@pytest.mark.parametrize(
    ("name", "settings"),
    # Weights that are the policy's own probabilities are no constants to a finite difference; they have their own test.
    [case for case in CASES if case != ("token_noise", {"weighting": "probability"})],
)
def test_gradient_is_the_finite_difference(name: str, settings: dict[str, Any]) -> None:
    loss = load_loss(name)
    config = config_of(loss, settings)
    batch = told_of_its_step(random_batch(loss.batch, seed=3), loss, config)

    def value(*leaves: Tensor) -> Tensor:
        return loss.loss(replace(batch, **dict(zip(VARIABLES[loss.batch], leaves, strict=True))), config).loss

    assert torch.autograd.gradcheck(value, variables(batch), eps=1e-6, atol=1e-8)


@EACH_CASE
def test_rows_of_weight_zero_change_nothing(name: str, settings: dict[str, Any]) -> None:
    loss = load_loss(name)
    config = config_of(loss, settings)
    batch = random_batch(loss.batch, seed=4)
    assert batch.weights is not None
    masked = replace(batch, weights=batch.weights * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(loss.loss(masked, config).loss, loss.loss(rows_of(batch, 0, 3), config).loss)


@EACH_CASE
def test_a_batch_without_any_target_costs_nothing_and_has_zero_gradient(name: str, settings: dict[str, Any]) -> None:
    loss = load_loss(name)
    batch = without_targets(random_batch(loss.batch, seed=5))
    leaves = variables(batch)
    output = loss.loss(batch, config_of(loss, settings))
    assert output.loss.item() == 0.0
    assert all(value.item() == 0.0 for value in output.metrics.values())
    assert all(not gradient.any() for gradient in torch.autograd.grad(output.loss, leaves))


@pytest.mark.parametrize(
    ("name", "settings"), [(name, settings) for name, settings in CASES if load_loss(name).batch is TokenBatch]
)
def test_what_stands_outside_the_mask_plays_no_part_even_when_it_is_not_a_number(
    name: str, settings: dict[str, Any]
) -> None:
    loss = load_loss(name)
    config = config_of(loss, settings)
    batch = random_batch(TokenBatch, seed=6)
    assert isinstance(batch, TokenBatch)
    spoilt = replace(batch, logprobs=batch.logprobs.masked_fill(~batch.mask, math.nan))
    wide = {
        field: torch.nn.functional.pad(values, (0, 3), value=-99.0 if values.is_floating_point() else 0)
        for field in batch.__dataclass_fields__
        if isinstance(values := getattr(batch, field), Tensor) and values.ndim == 2
    }
    expected = loss.loss(batch, config).loss
    torch.testing.assert_close(loss.loss(spoilt, config).loss, expected, atol=0, rtol=0)
    torch.testing.assert_close(loss.loss(replace(batch, **wide), config).loss, expected)
    leaves = variables(spoilt)
    (gradient,) = torch.autograd.grad(loss.loss(spoilt, config).loss, leaves)
    assert torch.isfinite(gradient).all()


@EACH_CASE
def test_the_same_batch_gives_the_same_numbers_and_metrics_carry_no_gradient(
    name: str, settings: dict[str, Any]
) -> None:
    loss = load_loss(name)
    outputs = []
    for _ in range(2):
        batch = random_batch(loss.batch, seed=7)
        variables(batch)
        outputs.append(loss.loss(batch, config_of(loss, settings)))
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert outputs[0].loss.shape == ()
    assert not any(value.requires_grad for value in outputs[0].metrics.values())


# --------------------------------------------------------------------------------------------------------- plug-ins


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_provides_what_the_protocol_asks(name: str) -> None:
    loss = load_loss(name)
    assert loss.batch in get_args(Batch)
    assert isinstance(loss.uses_reference, bool)
    assert loss.__doc__
    loss.Config()


def test_an_unknown_loss_is_answered_with_those_that_exist_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'got "dop", wanted one of bradley_terry, .*; did you mean dpo\?'):
        load_loss("dop")


@pytest.mark.parametrize("name", [name for name in NAMES if load_loss(name).batch in (PairBatch, UnpairedBatch)])
def test_a_run_takes_every_loss_that_learns_from_pairs_or_thumbs(name: str) -> None:
    objectives = [("objectives.weights", "[0.5, 0.5]")] if name == "modpo" else []  # it trades the pairs' for others
    assert load_run_config([], flags=[("loss.kind", name), *objectives]).loss.kind == name
