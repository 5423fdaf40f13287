"""Losses against numbers derived by hand, and the invariants that every loss must hold (METHODS G1-G6)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cluster.config import plugin_names
from trainers.losses import Loss, PairBatch, TokenBatch, dpo, load_loss, pretraining, sft

NAMES = plugin_names("trainers.losses")


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


def random_batch(kind: type[PairBatch] | type[TokenBatch], *, seed: int, rows: int = 5) -> PairBatch | TokenBatch:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    if kind is TokenBatch:
        lengths = torch.arange(rows) % 4 + 1
        mask = torch.arange(1, 7)[None, :] <= lengths[:, None]
        return TokenBatch(logprobs=-3 * uniform(rows, 6), mask=mask, weights=uniform(rows))
    return PairBatch(
        policy_chosen=-10 * uniform(rows),
        policy_rejected=-10 * uniform(rows),
        reference_chosen=-10 * uniform(rows),
        reference_rejected=-10 * uniform(rows),
        chosen_lengths=torch.arange(1, rows + 1).double(),
        rejected_lengths=torch.arange(2, rows + 2).double(),
        weights=uniform(rows),
        noise=0.4 * uniform(rows),
        margins=uniform(rows),
    )


def with_totals(batch: PairBatch | TokenBatch) -> PairBatch | TokenBatch:
    """The batch with the denominators that it has by itself, written out."""
    if isinstance(batch, TokenBatch):
        assert batch.weights is not None
        tokens = float((batch.weights[:, None] * batch.mask).sum())
        return replace(batch, global_tokens=tokens, global_rows=float(batch.weights.sum()))
    assert batch.weights is not None
    return replace(
        batch,
        global_weight=float(batch.weights.sum()),
        global_chosen_tokens=float((batch.weights * batch.chosen_lengths).sum()),
    )


def rows_of(batch: PairBatch | TokenBatch, start: int, end: int) -> PairBatch | TokenBatch:
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return replace(batch, **{name: v[start:end] for name, v in fields.items() if isinstance(v, Tensor)})


def variables(batch: PairBatch | TokenBatch) -> list[Tensor]:
    return [batch.logprobs] if isinstance(batch, TokenBatch) else [batch.policy_chosen, batch.policy_rejected]


def config_of(loss: Loss) -> object:
    return dpo.Config(beta=0.3, nll_weight=0.5) if loss is load_loss("dpo") else loss.Config()


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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [(0, 5), (0, 1, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)])
def test_loss_gradient_and_metrics_do_not_depend_on_how_a_step_is_cut(name: str, cuts: tuple[int, ...]) -> None:
    loss = load_loss(name)
    whole = with_totals(random_batch(loss.batch, seed=1))
    leaves = [v.requires_grad_() for v in variables(whole)]
    expected = loss.loss(whole, config_of(loss))
    gradients = torch.autograd.grad(expected.loss, leaves)
    parts = [loss.loss(rows_of(whole, a, b), config_of(loss)) for a, b in pairwise(cuts)]
    total = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(total, expected.loss, atol=1e-12, rtol=0)
    for got, wanted in zip(torch.autograd.grad(total, leaves), gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    for metric, value in expected.metrics.items():
        torch.testing.assert_close(torch.stack([part.metrics[metric] for part in parts]).sum(), value)


@pytest.mark.parametrize("name", NAMES)
def test_denominators_written_out_are_those_a_whole_batch_has_by_itself(name: str) -> None:
    loss = load_loss(name)
    batch = random_batch(loss.batch, seed=2)
    alone, told = loss.loss(batch, config_of(loss)), loss.loss(with_totals(batch), config_of(loss))
    torch.testing.assert_close(alone.loss, told.loss)
    assert alone.metrics.keys() == told.metrics.keys()
    for metric in alone.metrics:
        torch.testing.assert_close(alone.metrics[metric], told.metrics[metric])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_finite_difference(name: str) -> None:
    loss = load_loss(name)
    batch = random_batch(loss.batch, seed=3)
    names = ["logprobs"] if isinstance(batch, TokenBatch) else ["policy_chosen", "policy_rejected"]

    def value(*leaves: Tensor) -> Tensor:
        return loss.loss(replace(batch, **dict(zip(names, leaves, strict=True))), config_of(loss)).loss

    assert torch.autograd.gradcheck(value, [v.requires_grad_() for v in variables(batch)], eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_weight_zero_change_nothing(name: str) -> None:
    loss = load_loss(name)
    batch = random_batch(loss.batch, seed=4)
    assert batch.weights is not None
    masked = replace(batch, weights=batch.weights * torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(
        loss.loss(masked, config_of(loss)).loss, loss.loss(rows_of(batch, 0, 3), config_of(loss)).loss
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_any_target_costs_nothing_and_has_zero_gradient(name: str) -> None:
    loss = load_loss(name)
    batch = random_batch(loss.batch, seed=5)
    if isinstance(batch, TokenBatch):
        batch = replace(batch, mask=torch.zeros_like(batch.mask))
    else:
        batch = replace(
            batch,
            chosen_lengths=torch.zeros_like(batch.chosen_lengths),
            rejected_lengths=torch.zeros_like(batch.rejected_lengths),
        )
    leaves = [v.requires_grad_() for v in variables(batch)]
    output = loss.loss(batch, config_of(loss))
    assert output.loss.item() == 0.0
    assert all(value.item() == 0.0 for value in output.metrics.values())
    assert all(not gradient.any() for gradient in torch.autograd.grad(output.loss, leaves))


@pytest.mark.parametrize("name", ["sft", "pretraining"])
def test_what_stands_outside_the_mask_plays_no_part_even_when_it_is_not_a_number(name: str) -> None:
    loss = load_loss(name)
    batch = random_batch(TokenBatch, seed=6)
    assert isinstance(batch, TokenBatch)
    spoilt = replace(batch, logprobs=batch.logprobs.masked_fill(~batch.mask, math.nan))
    wider = replace(
        batch,
        logprobs=torch.nn.functional.pad(batch.logprobs, (0, 3), value=-99.0),
        mask=torch.nn.functional.pad(batch.mask, (0, 3)),
    )
    expected = loss.loss(batch, loss.Config()).loss
    torch.testing.assert_close(loss.loss(spoilt, loss.Config()).loss, expected, atol=0, rtol=0)
    torch.testing.assert_close(loss.loss(wider, loss.Config()).loss, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_batch_gives_the_same_numbers_and_metrics_carry_no_gradient(name: str) -> None:
    loss = load_loss(name)
    outputs = []
    for _ in range(2):
        batch = random_batch(loss.batch, seed=7)
        for variable in variables(batch):
            variable.requires_grad_()
        outputs.append(loss.loss(batch, config_of(loss)))
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert outputs[0].loss.shape == ()
    assert not any(value.requires_grad for value in outputs[0].metrics.values())


# --------------------------------------------------------------------------------------------------------- plug-ins


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_provides_what_the_protocol_asks(name: str) -> None:
    loss = load_loss(name)
    assert loss.batch in (PairBatch, TokenBatch)
    assert isinstance(loss.uses_reference, bool)
    assert loss.__doc__
    loss.Config()


def test_an_unknown_loss_is_answered_with_those_that_exist_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'got "dop", wanted one of dpo, pretraining, sft; did you mean dpo\?'):
        load_loss("dop")
