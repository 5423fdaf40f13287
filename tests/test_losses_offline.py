"""Offline losses against numbers derived by hand (METHODS §1, §2, §4), and what their optima are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.loss_batches import random_batch, rows_of, told_of_its_step
from trainers.logprobs import mean_logprobs, token_logprobs
from trainers.losses import (
    GroupBatch,
    LabelBatch,
    Loss,
    PairBatch,
    ScoreBatch,
    TokenBatch,
    UnpairedBatch,
    bradley_terry,
    cdpo,
    dpo,
    exo,
    exo_group,
    forward_correction,
    gce,
    ipo,
    kto,
    modpo,
    pro,
    rdpo,
    rso,
    sft,
    span_noise,
    token_noise,
    weak_to_strong,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def pair(*, delta: float | None = None) -> PairBatch:
    """METHODS' TOY-P (h_w = 1, h_l = -0.5, so delta = 1.5, on 5 and 4 tokens), or a pair with a delta of its own."""
    policy_chosen = vector(-10.0) if delta is None else vector(-11.5 + delta)
    return PairBatch(
        policy_chosen=policy_chosen.requires_grad_(),
        policy_rejected=vector(-12.0).requires_grad_(),
        reference_chosen=vector(-11.0),
        reference_rejected=vector(-11.5),
        chosen_lengths=vector(5.0),
        rejected_lengths=vector(4.0),
    )


def swapped(batch: PairBatch) -> PairBatch:
    return replace(
        batch,
        policy_chosen=batch.policy_rejected,
        policy_rejected=batch.policy_chosen,
        reference_chosen=batch.reference_rejected,
        reference_rejected=batch.reference_chosen,
        chosen_lengths=batch.rejected_lengths,
        rejected_lengths=batch.chosen_lengths,
    )


# ---------------------------------------------------------------------------------------------------------- pairs


def test_dpo_per_token_divides_each_log_ratio_by_its_own_length() -> None:
    # 1 / 5 + 0.5 / 4 = 0.325, times 5.
    config = dpo.Config(beta=5.0, length_norm=True)
    assert dpo.loss(pair(), config).loss.item() == pytest.approx(softplus(-1.625))


def test_beta_is_larger_per_token_unless_it_is_set() -> None:
    assert dpo.Config().beta == dpo.Config(length_norm=False).beta == 0.1
    assert dpo.Config(length_norm=True).beta == 5.0
    assert dpo.Config(length_norm=True, beta=0.1).beta == 0.1
    # 5 * 0.325, as above.
    assert dpo.loss(pair(), dpo.Config(length_norm=True)).loss.item() == pytest.approx(softplus(-1.625))


def test_cdpo_of_the_toy_pair() -> None:
    output = cdpo.loss(pair(), cdpo.Config(beta=0.1, noise=0.1))
    assert output.loss.item() == pytest.approx(0.635957, abs=1e-6)


def test_cdpo_rests_where_the_margin_is_the_logit_of_the_noise() -> None:
    # log(9) / 0.1 = 21.9722.
    batch = pair(delta=21.972246)
    cdpo.loss(batch, cdpo.Config(beta=0.1, noise=0.1)).loss.backward()
    assert batch.policy_chosen.grad is not None
    assert batch.policy_chosen.grad.item() == pytest.approx(0.0, abs=1e-9)


def test_rdpo_of_the_toy_pair() -> None:
    output = rdpo.loss(pair(), rdpo.Config(beta=0.1, noise=0.1))
    assert output.loss.item() == pytest.approx(0.602207, abs=1e-6)


@pytest.mark.parametrize("delta", [-150.0, -3.0, 1.5, 40.0, 150.0])
def test_rdpo_is_dpo_on_average_over_flips(delta: float) -> None:
    """Exact where |z| is within its bound of 10, that is |delta| <= 100; beyond it is DPO at the bound."""
    config = rdpo.Config(beta=0.1, noise=0.2)
    batch = pair(delta=delta)
    mean = 0.8 * rdpo.loss(batch, config).loss + 0.2 * rdpo.loss(swapped(batch), config).loss
    assert mean.item() == pytest.approx(softplus(-0.1 * max(-100.0, min(100.0, delta))), abs=1e-12)


def test_rdpo_leaves_a_pair_alone_whose_margin_is_beyond_the_bound() -> None:
    batch = pair(delta=101.0)
    rdpo.loss(batch, rdpo.Config(beta=0.1, noise=0.3)).loss.backward()
    assert batch.policy_chosen.grad is not None
    assert batch.policy_chosen.grad.item() == 0.0


@pytest.mark.parametrize("loss", [cdpo, rdpo])
def test_a_pairs_own_noise_comes_before_the_configs(loss: object) -> None:
    module = cdpo if loss is cdpo else rdpo
    batch = random_batch(PairBatch, seed=0)
    assert isinstance(batch, PairBatch)
    assert batch.noise is not None
    rows = [replace(rows_of(batch, i, i + 1), noise=None, weights=None) for i in range(5)]
    apart = [
        module.loss(row, module.Config(noise=float(noise))).loss for row, noise in zip(rows, batch.noise, strict=True)
    ]
    together = module.loss(replace(batch, weights=None), module.Config(noise=0.3)).loss
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_without_noise_both_are_dpo() -> None:
    batch = random_batch(PairBatch, seed=0)
    assert isinstance(batch, PairBatch)
    clean = replace(batch, noise=torch.zeros(5, dtype=torch.float64))
    expected = dpo.loss(batch, dpo.Config()).loss
    torch.testing.assert_close(cdpo.loss(clean, cdpo.Config()).loss, expected)
    torch.testing.assert_close(rdpo.loss(clean, rdpo.Config()).loss, expected)


def test_a_label_that_tells_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rdpo: got a pair with noise 0\.5, wanted under 0\.5"):
        rdpo.loss(replace(pair(), noise=vector(0.5)), rdpo.Config())


def test_exo_of_the_toy_pair_and_of_the_reference_itself() -> None:
    config = exo.Config(beta=0.1, smoothing=1e-3)
    assert exo.loss(pair(), config).loss.item() == pytest.approx(2.505517, abs=1e-6)
    assert exo.loss(pair(delta=0.0), config).loss.item() == pytest.approx(2.761231, abs=1e-6)


def test_exo_of_a_pair_is_that_of_a_group_of_two() -> None:
    # softmax(r / 1) = (1 - eps, eps) where the rewards' gap is logit(1 - eps).
    group = GroupBatch(
        policy=torch.tensor([[-10.0, -12.0]], dtype=torch.float64),
        reference=torch.tensor([[-11.0, -11.5]], dtype=torch.float64),
        rewards=torch.tensor([[math.log(0.98 / 0.02), 0.0]], dtype=torch.float64),
        lengths=torch.tensor([[5.0, 4.0]], dtype=torch.float64),
    )
    expected = exo.loss(pair(), exo.Config(beta=0.3, smoothing=0.02)).loss
    got = exo_group.loss(group, exo_group.Config(beta=0.3, temperature=1.0)).loss
    torch.testing.assert_close(got, expected)


def test_ipo_of_the_toy_pair_under_both_conventions() -> None:
    assert ipo.loss(pair(), ipo.Config(tau=0.1)).loss.item() == pytest.approx(12.25)
    assert ipo.loss(pair(), ipo.Config(tau=0.1, length_norm=True)).loss.item() == pytest.approx(21.855625)


def test_ipo_rests_at_the_preference_rate_less_a_half_over_tau() -> None:
    """Four of five raters prefer the chosen: (0.8 - 0.5) / 0.1 = 3."""
    batch = pair(delta=3.0)
    config = ipo.Config(tau=0.1)
    (0.8 * ipo.loss(batch, config).loss + 0.2 * ipo.loss(swapped(batch), config).loss).backward()
    assert batch.policy_chosen.grad is not None
    assert batch.policy_chosen.grad.item() == pytest.approx(0.0, abs=1e-9)


def test_the_hinge_of_the_toy_pair_and_of_one_that_is_good_enough() -> None:
    assert rso.loss(pair(), rso.Config(gamma=0.1)).loss.item() == pytest.approx(0.85)
    assert rso.loss(pair(delta=10.5), rso.Config(gamma=0.1)).loss.item() == 0.0


def test_the_sigmoid_form_of_rso_is_dpo_with_gamma_for_its_beta() -> None:
    # log(1 + e^-0.15), and at a margin beyond 1 / gamma it still costs: log(1 + e^-1.05).
    config = rso.Config(gamma=0.1, form="sigmoid")
    assert rso.loss(pair(), config).loss.item() == pytest.approx(0.620957, abs=1e-6)
    assert rso.loss(pair(delta=10.5), config).loss.item() == pytest.approx(0.300058, abs=1e-6)
    assert rso.loss(pair(), config).loss.item() == dpo.loss(pair(), dpo.Config(beta=0.1)).loss.item()


def test_modpo_of_the_toy_pair() -> None:
    batch = replace(pair(), margins=vector(0.3 - 0.1))
    output = modpo.loss(batch, modpo.Config(beta=0.1, weights=(0.5, 0.5)))
    # (0.15 - 0.5 * 0.2) / 0.5 = 0.1
    assert output.loss.item() == pytest.approx(0.644397, abs=1e-6)
    alone = modpo.loss(batch, modpo.Config(beta=0.1, weights=(1.0, 0.0)))
    assert alone.loss.item() == pytest.approx(0.620957, abs=1e-6)


def test_modpo_takes_a_column_of_margins_for_each_other_objective() -> None:
    batch = replace(pair(), margins=torch.tensor([[0.2, -0.4]], dtype=torch.float64))
    output = modpo.loss(batch, modpo.Config(beta=0.1, weights=(0.5, 0.25, 0.25)))
    # (0.15 - 0.25 * 0.2 + 0.25 * 0.4) / 0.5 = 0.4
    assert output.loss.item() == pytest.approx(softplus(-0.4))
    with pytest.raises(ValueError, match="modpo: got 2 margins of a pair for 1 weights after the first"):
        modpo.loss(batch, modpo.Config(weights=(0.5, 0.5)))


def test_modpo_without_weights_takes_all_objectives_alike() -> None:
    for margins, weights in (((0.2,), (0.5, 0.5)), ((0.2, -0.4), (1 / 3, 1 / 3, 1 / 3))):
        batch = replace(pair(), margins=torch.tensor([margins], dtype=torch.float64))
        alike = modpo.loss(batch, modpo.Config(weights=weights)).loss
        torch.testing.assert_close(modpo.loss(batch, modpo.Config()).loss, alike)
    # No margins count as 0: 2 * 0.15.
    assert modpo.loss(pair(), modpo.Config()).loss.item() == pytest.approx(softplus(-0.3))


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0,), (0.5, 0.6), (1.5, -0.5)])
def test_weights_of_modpo_outside_the_simplex_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="wanted two or more that add up to 1"):
        modpo.Config(weights=weights)


# ---------------------------------------------------------------------------------------------------------- groups


def group() -> GroupBatch:
    """METHODS' group of three: h = (1, -0.5, 0.2), rewards (0.9, 0.1, 0.5)."""
    return GroupBatch(
        policy=torch.tensor([[-9.0, -10.5, -9.8]], dtype=torch.float64),
        reference=torch.full((1, 3), -10.0, dtype=torch.float64),
        rewards=torch.tensor([[0.9, 0.1, 0.5]], dtype=torch.float64),
        lengths=torch.ones(1, 3, dtype=torch.float64),
    )


def test_exo_of_a_group_in_both_directions() -> None:
    assert exo_group.loss(group(), exo_group.Config()).loss.item() == pytest.approx(0.0519806, abs=1e-7)
    forward = exo_group.loss(group(), exo_group.Config(forward=True))
    assert forward.loss.item() == pytest.approx(0.0477652, abs=1e-7)
    assert forward.metrics["agreement"].item() == 1.0


def ranked(scores: list[float], rewards: list[float], *, length: float = 2.0) -> GroupBatch:
    """One group of responses of one length, with these mean log-probs per token."""
    return GroupBatch(
        policy=length * torch.tensor([scores], dtype=torch.float64),
        reference=torch.zeros(1, len(scores), dtype=torch.float64),
        rewards=torch.tensor([rewards], dtype=torch.float64),
        lengths=torch.full((1, len(scores)), length, dtype=torch.float64),
    )


def test_pro_of_a_group_of_three_in_any_order() -> None:
    config = pro.Config(sft_weight=0.0)
    # Best against the others, temperatures 0.8, 0.4, 0.8: 1.114304; second against third, gap 0.4: 0.634946.
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        batch = ranked([(-1.0, -1.2, -1.5)[i] for i in order], [(0.9, 0.5, 0.1)[i] for i in order])
        assert pro.loss(batch, config).loss.item() == pytest.approx(1.749251, abs=1e-6)


def test_pro_with_unit_gaps_is_plackett_and_luces() -> None:
    batch = ranked([-1.0, -1.2, -1.5], [0.9, 0.5, 0.1])
    output = pro.loss(batch, pro.Config(sft_weight=0.0, unit_gaps=True))
    assert output.loss.item() == pytest.approx(1.440295, abs=1e-6)


def test_pro_of_two_with_a_gap_of_one_is_bradley_and_terrys() -> None:
    output = pro.loss(ranked([-1.0, -1.2], [1.0, 0.0]), pro.Config(sft_weight=0.0))
    assert output.loss.item() == pytest.approx(0.598139, abs=1e-6)


def test_pro_adds_the_summed_log_prob_of_the_best_times_its_rivals_squared() -> None:
    batch = ranked([-1.2, -1.0, -1.5], [0.5, 0.9, 0.1], length=3.0)
    output = pro.loss(batch, pro.Config(sft_weight=0.05))
    # Best: -1 per token, 3 tokens, (3 - 1)^2 = 4.
    assert output.loss.item() == pytest.approx(1.749251 + 0.05 * 4 * 3, abs=1e-6)


def test_an_empty_place_in_a_group_plays_no_part() -> None:
    full = ranked([-1.0, -1.2, -1.5], [0.9, 0.5, 0.1])
    wide = GroupBatch(
        policy=torch.nn.functional.pad(full.policy, (1, 1), value=-3.0),
        reference=torch.nn.functional.pad(full.reference, (1, 1), value=-1.0),
        rewards=torch.nn.functional.pad(full.rewards, (1, 1), value=5.0),
        lengths=torch.nn.functional.pad(full.lengths, (1, 1)),
    )
    torch.testing.assert_close(pro.loss(wide, pro.Config()).loss, pro.loss(full, pro.Config()).loss)
    torch.testing.assert_close(
        exo_group.loss(wide, exo_group.Config()).loss, exo_group.loss(full, exo_group.Config()).loss
    )


# -------------------------------------------------------------------------------------------------------- unpaired


def unpaired(*, logratios: list[float], desirable: list[bool], mismatched: list[float]) -> UnpairedBatch:
    size = len(logratios)
    return UnpairedBatch(
        policy=torch.tensor(logratios, dtype=torch.float64).requires_grad_(),
        reference=torch.zeros(size, dtype=torch.float64),
        desirable=torch.tensor(desirable),
        lengths=torch.ones(size, dtype=torch.float64),
        mismatched_policy=torch.tensor(mismatched, dtype=torch.float64).requires_grad_(),
        mismatched_reference=torch.zeros(size, dtype=torch.float64),
    )


def test_kto_of_a_good_and_a_bad_row() -> None:
    # The mismatched log-ratios 0.5 and -0.1 have the mean 0.2.
    batch = unpaired(logratios=[1.0, -0.5], desirable=[True, False], mismatched=[0.5, -0.1])
    output = kto.loss(batch, kto.Config())
    assert output.loss.item() == pytest.approx((0.480011 + 0.482507) / 2, abs=1e-6)
    assert output.metrics["reference_point"].item() == pytest.approx(0.2)
    good = kto.loss(batch, kto.Config(desirable_weight=2.0, undesirable_weight=1.0))
    assert good.loss.item() == pytest.approx((2 * 0.480011 + 0.482507) / 2, abs=1e-6)


def test_kto_at_its_reference_point_is_a_half_and_the_point_has_no_gradient() -> None:
    batch = unpaired(logratios=[0.2, 0.2], desirable=[True, False], mismatched=[0.5, -0.1])
    output = kto.loss(batch, kto.Config())
    assert output.loss.item() == pytest.approx(0.5)
    assert batch.mismatched_policy is not None
    gradients = torch.autograd.grad(output.loss, [batch.policy, batch.mismatched_policy], allow_unused=True)
    # A slope of beta / 4 each way, halved by the mean.
    assert gradients[0].tolist() == pytest.approx([-0.0125, 0.0125])
    assert gradients[1] is None


def test_ktos_reference_point_is_not_below_zero() -> None:
    batch = unpaired(logratios=[0.0, 0.0], desirable=[True, False], mismatched=[-3.0, -1.0])
    assert kto.loss(batch, kto.Config()).metrics["reference_point"].item() == 0.0


def test_a_part_of_one_class_alone_has_ktos_step_wide_reference_point() -> None:
    batch = told_of_its_step(random_batch(UnpairedBatch, seed=3), kto, kto.Config())
    assert isinstance(batch, UnpairedBatch)
    good = rows_of(batch, 2, 4)
    assert good.desirable.tolist() == [True, True]
    whole, part = kto.loss(batch, kto.Config()), kto.loss(replace(good, global_weight=None), kto.Config())
    torch.testing.assert_close(part.metrics["reference_point"], whole.metrics["reference_point"])


# ---------------------------------------------------------------------------------------------------------- scores


def test_bradley_terry_of_one_pair_of_scores() -> None:
    batch = ScoreBatch(chosen=vector(1.2), rejected=vector(0.4))
    assert bradley_terry.loss(batch, bradley_terry.Config()).loss.item() == pytest.approx(0.371101, abs=1e-6)
    margin = replace(batch, margins=vector(1 / 3))
    assert bradley_terry.loss(margin, bradley_terry.Config()).loss.item() == pytest.approx(0.486793, abs=1e-6)
    centred = bradley_terry.loss(batch, bradley_terry.Config(centring=0.01))
    assert centred.loss.item() == pytest.approx(0.396701, abs=1e-6)


def test_bradley_terry_with_a_soft_label_is_least_at_its_logit() -> None:
    def at(gap: float) -> float:
        batch = ScoreBatch(chosen=vector(0.4 + gap), rejected=vector(0.4), targets=vector(0.7))
        return bradley_terry.loss(batch, bradley_terry.Config()).loss.item()

    assert at(0.8) == pytest.approx(0.611101, abs=1e-6)
    best = math.log(7 / 3)
    assert best == pytest.approx(0.847298, abs=1e-6)
    assert at(best) == pytest.approx(0.610864, abs=1e-6)
    assert at(best) < min(at(best - 0.01), at(best + 0.01))


# ---------------------------------------------------------------------------------------------------------- labels


def labelled() -> LabelBatch:
    """METHODS' four items; the weak labeller's mean P(class 1) is 0.475."""
    return LabelBatch(
        logits=torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 1.0], [0.0, 3.0]], dtype=torch.float64),
        labels=torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64),
    )


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 0.665714), (0.5, 0.453214), (1.0, 0.240714)])
def test_weak_to_strong_mixes_the_labellers_view_with_the_students_own(alpha: float, expected: float) -> None:
    output = weak_to_strong.loss(labelled(), weak_to_strong.Config(max_alpha=alpha))
    assert output.loss.item() == pytest.approx(expected, abs=1e-6)
    assert output.metrics["alpha"].item() == pytest.approx(alpha)
    # The student's own classes are 0, 0, 1, 1; the labeller's 0, 1, 0, 1.
    assert output.metrics["agreement"].item() == pytest.approx(0.5)


def test_without_confidence_weak_to_strong_is_cross_entropy() -> None:
    expected = torch.nn.functional.cross_entropy(labelled().logits, labelled().labels)
    got = weak_to_strong.loss(labelled(), weak_to_strong.Config(max_alpha=0.0)).loss
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("ramp", "share", "progress", "alpha"),
    [
        ("linear", 0.2, 0.0, 0.0),
        ("linear", 0.2, 0.1, 0.25),
        ("linear", 0.2, 0.2, 0.5),
        ("linear", 0.2, 0.9, 0.5),
        ("released", 0.1, 0.08, 0.04),
        ("released", 0.1, 0.11, 0.5),
    ],
)
def test_confidence_grows_over_a_first_share_of_the_training(
    ramp: str, share: float, progress: float, alpha: float
) -> None:
    config = weak_to_strong.Config.model_validate({"ramp": ramp, "ramp_share": share})
    output = weak_to_strong.loss(replace(labelled(), progress=progress), config)
    assert output.metrics["alpha"].item() == pytest.approx(alpha)


@pytest.mark.parametrize("hard", [False, True])
def test_of_more_than_two_classes_the_student_believes_in_the_likeliest_above_the_median(hard: bool) -> None:
    # Greatest probabilities 0.5, 0.8, 0.6 and 0.9, of which the median is 0.7: the second and the fourth have a say.
    rows = [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.05, 0.05, 0.9]]
    classes = torch.tensor([0, 0, 1, 2])
    labels = classes if hard else torch.nn.functional.one_hot(classes, 3).double()
    batch = LabelBatch(logits=torch.tensor(rows, dtype=torch.float64).log(), labels=labels)
    output = weak_to_strong.loss(batch, weak_to_strong.Config(max_alpha=0.75))
    mixed = -0.25 * math.log(0.1) - 0.75 * math.log(0.8)
    expected = (-math.log(0.5) + mixed - math.log(0.2) - math.log(0.9)) / 4
    assert output.loss.item() == pytest.approx(expected)
    assert output.metrics["alpha"].item() == pytest.approx(0.75 * 2 / 4)
    assert output.metrics["agreement"].item() == pytest.approx(2 / 4)


def test_forward_correction_looks_through_the_confusion() -> None:
    batch = LabelBatch(logits=vector(0.7, 0.3).log()[None], labels=vector(1.0, 0.0)[None])
    config = forward_correction.Config(confusion=((0.9, 0.1), (0.2, 0.8)))
    # 0.7 * 0.9 + 0.3 * 0.2 = 0.69
    assert forward_correction.loss(batch, config).loss.item() == pytest.approx(0.371064, abs=1e-6)
    clean = forward_correction.Config(confusion=((1.0, 0.0), (0.0, 1.0)))
    assert forward_correction.loss(batch, clean).loss.item() == pytest.approx(-math.log(0.7))


def test_a_confusion_whose_rows_are_no_distributions_is_refused() -> None:
    for confusion in (((0.9, 0.2), (0.2, 0.8)), ((1.0,), (1.0,)), ((1.1, -0.1), (0.0, 1.0))):
        with pytest.raises(ValueError, match="a row and a column for each class"):
            forward_correction.Config(confusion=confusion)
    three = LabelBatch(logits=torch.zeros(1, 3), labels=torch.ones(1, 3) / 3)
    with pytest.raises(ValueError, match="got confusion of 2 classes, wanted 3"):
        forward_correction.loss(three, forward_correction.Config(confusion=((0.9, 0.1), (0.1, 0.9))))


def test_noise_is_a_confusion_with_every_other_class_alike() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, -0.5]], dtype=torch.float64)
    classes = torch.tensor([2, 0])
    batch = LabelBatch(logits=logits, labels=torch.nn.functional.one_hot(classes, 3).double())
    matrix = ((0.7, 0.15, 0.15), (0.15, 0.7, 0.15), (0.15, 0.15, 0.7))
    spelt_out = forward_correction.loss(batch, forward_correction.Config(confusion=matrix)).loss
    for labels in (batch.labels, classes):
        got = forward_correction.loss(replace(batch, labels=labels), forward_correction.Config(noise=0.3)).loss
        assert got.item() == pytest.approx(spelt_out.item())
    clean = forward_correction.loss(batch, forward_correction.Config(noise=0.0)).loss
    torch.testing.assert_close(clean, torch.nn.functional.cross_entropy(logits, classes))
    two = replace(batch, logits=logits[:, :2], labels=batch.labels[:, :2])
    default, old = (forward_correction.loss(two, config).loss for config in (
        forward_correction.Config(), forward_correction.Config(confusion=((0.9, 0.1), (0.1, 0.9)))
    ))  # fmt: skip
    torch.testing.assert_close(default, old)


# ---------------------------------------------------------------------------------------------------------- tokens


def tokens(*probabilities: float) -> TokenBatch:
    """One row of which every position but the first is a target with this probability."""
    logprobs = vector(1.0, *probabilities).log()[None]
    return TokenBatch(logprobs=logprobs.requires_grad_(), mask=torch.arange(logprobs.shape[1])[None] > 0)


@pytest.mark.parametrize(("q", "expected"), [(0.7, 0.813555), (1e-9, 1.203973), (1.0, 0.7)])
def test_generalised_cross_entropy_of_one_token(q: float, expected: float) -> None:
    assert gce.loss(tokens(0.3), gce.Config(q=q)).loss.item() == pytest.approx(expected, abs=1e-6)


def test_unlikely_tokens_have_no_part_below_the_threshold() -> None:
    batch = tokens(0.5, 0.009, 0.2)
    output = token_noise.loss(batch, token_noise.Config(min_probability=0.01))
    assert output.loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2)
    assert output.metrics["kept"].item() == pytest.approx(2 / 3)
    output.loss.backward()
    assert batch.logprobs.grad is not None
    assert batch.logprobs.grad[0].tolist() == pytest.approx([0.0, -0.5, 0.0, -0.5])


def test_tokens_weigh_what_the_policy_gives_them_and_that_has_no_gradient() -> None:
    batch = tokens(0.5, 0.25)
    output = token_noise.loss(batch, token_noise.Config(weighting="probability"))
    assert output.loss.item() == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(4)) / 0.75)
    output.loss.backward()
    assert batch.logprobs.grad is not None
    assert batch.logprobs.grad[0].tolist() == pytest.approx([0.0, -2 / 3, -1 / 3])


def of_logits(logits: Tensor, token_ids: Tensor, mask: Tensor) -> TokenBatch:
    logprobs = token_logprobs(logits, token_ids)
    return TokenBatch(logprobs=logprobs, mask=mask, mean_logprobs=mean_logprobs(logits, token_ids, logprobs))


def random_documents() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [3, 5, 7], token ids and targets of three documents."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    return logits.requires_grad_(), torch.randint(0, 7, (3, 5), generator=generator), mask


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_labels_are_those_of_torchs_cross_entropy(smoothing: float) -> None:
    logits, token_ids, mask = random_documents()
    config = token_noise.Config(min_probability=0.0, label_smoothing=smoothing)
    output = token_noise.loss(of_logits(logits, token_ids, mask), config)
    labels = token_ids.masked_fill(~mask, -100)[:, 1:].reshape(-1)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 7), labels, ignore_index=-100, label_smoothing=smoothing
    )
    assert output.loss.item() == pytest.approx(wanted.item(), abs=1e-12)
    got, expected = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (output.loss, wanted))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_the_gradient_of_smoothed_labels_by_all_logits_is_the_finite_difference() -> None:
    logits, token_ids, mask = random_documents()
    # Three of seven targets have a probability above 0.08, none is within 0.02 of it.
    config = token_noise.Config(min_probability=0.08, label_smoothing=0.2)
    assert 0 < token_noise.loss(of_logits(logits, token_ids, mask), config).metrics["kept"] < 1

    def value(logits: Tensor) -> Tensor:
        return token_noise.loss(of_logits(logits, token_ids, mask), config).loss

    assert torch.autograd.gradcheck(value, [logits], eps=1e-6, atol=1e-8)


def test_a_token_that_is_left_out_for_its_probability_is_not_smoothed_either() -> None:
    batch = replace(tokens(0.5, 0.009), mean_logprobs=vector(0.0, -2.0, -5.0)[None].requires_grad_())
    output = token_noise.loss(batch, token_noise.Config(min_probability=0.01, label_smoothing=0.25))
    # 0.75 * log(2) + 0.25 * 2
    assert output.loss.item() == pytest.approx(0.75 * math.log(2) + 0.5)
    assert batch.mean_logprobs is not None
    assert torch.autograd.grad(output.loss, batch.mean_logprobs)[0].tolist() == [[0.0, -0.25, 0.0]]
    with pytest.raises(ValueError, match=r"got no mean_logprobs with label_smoothing = 0\.25"):
        token_noise.loss(tokens(0.5), token_noise.Config(label_smoothing=0.25))


def test_without_flagged_spans_it_is_supervised_fine_tuning_exactly() -> None:
    batch = random_batch(TokenBatch, seed=0)
    assert isinstance(batch, TokenBatch)
    expected = sft.loss(batch, sft.Config()).loss
    for unlikelihood in (0.0, 0.5):
        config = span_noise.Config(unlikelihood=unlikelihood)
        none = span_noise.loss(replace(batch, flagged=None), config).loss
        nowhere = span_noise.loss(replace(batch, flagged=torch.zeros_like(batch.mask)), config).loss
        torch.testing.assert_close(none, expected, atol=1e-15, rtol=0)
        torch.testing.assert_close(nowhere, expected, atol=1e-15, rtol=0)


def test_a_flagged_span_is_not_imitated() -> None:
    batch = replace(tokens(0.5, 0.3, 0.2), flagged=torch.tensor([[False, False, True, False]]))
    output = span_noise.loss(batch, span_noise.Config())
    assert output.loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2)
    (gradient,) = torch.autograd.grad(output.loss, batch.logprobs)
    assert gradient[0].tolist() == pytest.approx([0.0, -0.5, 0.0, -0.5])
    assert gradient[0, 2].item() == 0.0


def test_a_flagged_span_is_unlearnt_where_that_is_asked_for() -> None:
    batch = replace(tokens(0.5, 0.3, 0.2), flagged=torch.tensor([[False, False, True, False]]))
    output = span_noise.loss(batch, span_noise.Config(unlikelihood=0.5))
    assert output.loss.item() == pytest.approx(-(math.log(0.5) + math.log(0.2) + 0.5 * math.log(0.7)) / 3)
    (gradient,) = torch.autograd.grad(output.loss, batch.logprobs)
    # mu * p / (1 - p) / 3: less of it makes the loss smaller.
    assert gradient[0, 2].item() == pytest.approx(0.5 * 0.3 / 0.7 / 3)


def test_a_flagged_token_of_which_the_policy_is_certain_gives_finite_numbers() -> None:
    batch = replace(tokens(1.0, 0.5), flagged=torch.tensor([[False, True, False]]))
    output = span_noise.loss(batch, span_noise.Config(unlikelihood=0.5))
    (gradient,) = torch.autograd.grad(output.loss, batch.logprobs)
    assert torch.isfinite(output.loss)
    assert torch.isfinite(gradient).all()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: threads would spend their time on waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_robust_losses_learn_more_from_flipped_labels_than_cross_entropy() -> None:
    """A linear classifier on 100 separable items, 30 % of whose labels are flipped; accuracy on clean ones, 3 seeds."""
    accuracies = [
        [accuracy_after_flips(loss, seed=seed) for seed in range(3)] for loss in (sft, gce, forward_correction)
    ]
    cross_entropy, generalised, corrected = (sum(values) / 3 for values in accuracies)
    assert 0.85 < cross_entropy < generalised - 0.01
    assert cross_entropy < corrected - 0.01


def accuracy_after_flips(loss: Loss, *, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(5, generator=generator, dtype=torch.float64), dim=0)

    def items(count: int) -> Tensor:
        drawn = torch.randn(count, 5, generator=generator, dtype=torch.float64)
        return drawn + torch.sign(drawn @ truth)[:, None] * truth  # nothing nearer than 1 to the border

    seen, fresh = items(100), items(2000)
    labels = (seen @ truth > 0) ^ (torch.rand(100, generator=generator) < 0.3)
    weights = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    for _ in range(60):
        scores = seen @ weights
        batch: LabelBatch | TokenBatch
        if loss.batch is LabelBatch:
            sides, one_hot = torch.stack([-scores / 2, scores / 2], dim=1), torch.stack([~labels, labels], dim=1)
            batch, config = LabelBatch(logits=sides, labels=one_hot.double()), {"confusion": [[0.7, 0.3], [0.3, 0.7]]}
        else:
            own = torch.nn.functional.logsigmoid(torch.where(labels, scores, -scores))
            batch, config = TokenBatch(logprobs=own[:, None], mask=torch.ones(100, 1, dtype=torch.bool)), {}
        (gradient,) = torch.autograd.grad(loss.loss(batch, loss.Config.model_validate(config)).loss, weights)
        weights = (weights - 2 * gradient).detach().requires_grad_()
    return ((fresh @ weights > 0) == (fresh @ truth > 0)).double().mean().item()
