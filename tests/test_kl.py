"""Each estimator of the KL has the value, and as a loss the gradient, claimed for it (METHODS L-KL, L-KLCTL)."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from trainers.kl import MAX_LOG_RATIO, Estimator, KlControl, controlled, estimate

P, Q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
TOY = torch.tensor([0.2, -0.5, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "wanted"),
    [
        ("k1", [0.2, -0.5, 0.2]),
        ("k2", [0.02, 0.125, 0.02]),
        ("k3", [0.018731, 0.148721, 0.018731]),
        ("k3+", [0.018731, 0.148721, 0.018731]),
    ],
)
def test_estimators_of_the_toy_log_ratios(estimator: Estimator, wanted: list[float]) -> None:
    found = estimate(TOY, estimator=estimator)
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert found.sum().item() == pytest.approx({"k1": -0.1, "k2": 0.165}.get(estimator, 0.186183), abs=1e-6)


def test_k1_and_k3_are_unbiased_and_k2_is_near() -> None:
    def mean(estimator: Estimator) -> float:
        return float((P * estimate((P / Q).log(), estimator=estimator)).sum())

    assert mean("k1") == pytest.approx(0.0252672, abs=1e-7)
    assert mean("k3") == pytest.approx(0.0252672, abs=1e-7)
    assert mean("k2") == pytest.approx(0.0248624, abs=1e-7)


def gradient_as_a_loss(estimator: Estimator) -> Tensor:
    """E over samples of the policy, which is not differentiated, of the estimator's gradient: by enumeration."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    expectation = (logprobs.exp().detach() * estimate(logprobs - Q.log(), estimator=estimator)).sum()
    return torch.autograd.grad(expectation, logits)[0]


def gradient_of_kl(*, forward: bool) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    ahead = (Q * (Q.log() - logprobs)).sum()
    reverse = (logprobs.exp() * (logprobs - Q.log())).sum()
    return torch.autograd.grad(ahead if forward else reverse, logits)[0]


def test_as_a_loss_k1_has_no_gradient_at_all() -> None:
    torch.testing.assert_close(gradient_as_a_loss("k1"), torch.zeros_like(LOGITS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", ["k2", "k3+"])
def test_as_a_loss_k2_and_k3_plus_have_the_gradient_of_the_kl_to_the_reference(estimator: Estimator) -> None:
    torch.testing.assert_close(gradient_as_a_loss(estimator), gradient_of_kl(forward=False), atol=1e-6, rtol=0)


def test_as_a_loss_k3_has_the_gradient_of_the_other_kl() -> None:
    torch.testing.assert_close(gradient_as_a_loss("k3"), gradient_of_kl(forward=True), atol=1e-6, rtol=0)
    assert (gradient_of_kl(forward=True) - gradient_of_kl(forward=False)).abs().max() > 0.05


def test_as_a_detached_penalty_k1_is_right_and_k3_is_not() -> None:
    def score_gradient(estimator: Estimator) -> Tensor:
        logits = LOGITS.clone().requires_grad_()
        logprobs = logits.log_softmax(0)
        penalty = estimate(logprobs - Q.log(), estimator=estimator).detach()
        return torch.autograd.grad((logprobs.exp().detach() * penalty * logprobs).sum(), logits)[0]

    torch.testing.assert_close(score_gradient("k1"), gradient_of_kl(forward=False), atol=1e-6, rtol=0)
    assert (score_gradient("k3") - gradient_of_kl(forward=False)).abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_are_finite_differences(estimator: Estimator) -> None:
    assert torch.autograd.gradcheck(lambda d: estimate(d, estimator=estimator), [TOY.clone().requires_grad_()])


@pytest.mark.parametrize("estimator", get_args(Estimator))
def test_a_wild_log_ratio_overflows_nothing(estimator: Estimator) -> None:
    wild = torch.tensor([-1e3, -200.0, 0.0, 200.0, 1e3], requires_grad=True)
    found = estimate(wild, estimator=estimator)
    assert torch.isfinite(found).all()
    assert torch.isfinite(torch.autograd.grad(found.sum(), wild)[0]).all()
    if estimator == "k3":
        assert found[0].item() == pytest.approx(math.exp(MAX_LOG_RATIO) - 1 - MAX_LOG_RATIO, rel=1e-5)


def test_the_controller_follows_ziegler() -> None:
    adaptive = KlControl(adaptive=True, target=6.0, horizon=10_000)
    # 9 / 6 - 1 = 0.5, cut at 0.2: 1 + 0.2 * 256 / 10000.
    assert controlled(0.2, kl=9.0, num_samples=256, control=adaptive) == pytest.approx(0.2 * 1.00512)
    assert controlled(0.2, kl=6.0, num_samples=256, control=adaptive) == 0.2
    # 5.4 / 6 - 1 = -0.1
    assert controlled(0.2, kl=5.4, num_samples=100, control=adaptive) == pytest.approx(0.2 * 0.999)
    assert controlled(0.2, kl=0.0, num_samples=256, control=adaptive) == pytest.approx(0.2 * (1 - 0.00512))
    assert controlled(0.2, kl=9.0, num_samples=256, control=KlControl()) == 0.2
