"""Losses of pairs on a handful of answers, where the optimum has a closed form (METHODS L-DPO, L-IPO, L-ODPO)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trainers.losses import PairBatch, dpo, ipo


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


ACTIONS = vector(0.2, 0.3, 0.5)
"""A reference over three answers to one prompt."""
SCORES = vector(1.0, 0.5, 0.0)
"""What each of them is worth; raters prefer a to b with probability sigmoid of the difference."""
RATES = torch.sigmoid(SCORES[:, None] - SCORES)
"""[a, b]: how often a is preferred to b."""


def of_actions(logits: Tensor, *, weights: Tensor, reference: Tensor = ACTIONS) -> PairBatch:
    """Return all ordered pairs of actions, the first preferred; their weights [A, A] add up to the whole step's."""
    policy, frozen = logits.log_softmax(0), reference.log()
    num = len(logits)
    ones = torch.ones(num * num, dtype=torch.float64)
    return PairBatch(
        policy_chosen=policy.repeat_interleave(num),
        policy_rejected=policy.repeat(num),
        reference_chosen=frozen.repeat_interleave(num),
        reference_rejected=frozen.repeat(num),
        chosen_lengths=ones,
        rejected_lengths=ones,
        weights=weights.flatten(),
        global_weight=1.0,
    )


def test_dpo_is_least_at_the_optimum_of_reward_less_kl() -> None:
    """Descended from the reference, it comes to eq. (3)'s pi*, the reference times exp(r / beta), normalised."""
    beta = 0.5
    logits = ACTIONS.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = dpo.loss(of_actions(logits, weights=RATES / 9), dpo.Config(beta=beta)).loss
        value.backward()
        return value

    optimizer.step(closure)
    # exp(2), exp(1) and 1 times the reference: 1.477811, 0.815485 and 0.5, over 2.793296.
    found = logits.detach().softmax(0)
    assert found.tolist() == pytest.approx([0.529056, 0.291944, 0.179000], abs=1e-6)
    best = found.requires_grad_()
    value = (best * SCORES).sum() - beta * (best * (best / ACTIONS).log()).sum()
    (slope,) = torch.autograd.grad(value, best)
    # At the top of E[r] - beta * KL no answer is worth more than another to shift probability to.
    assert (slope - slope.mean()).abs().max().item() < 1e-6


@pytest.mark.parametrize(
    ("psi", "at_rest", "elsewhere"), [(torch.logit, "dpo", "ipo"), (lambda rates: rates, "ipo", "dpo")]
)
def test_dpo_rests_at_psi_po_of_the_logit_and_ipo_at_that_of_the_identity(
    psi: Callable[[Tensor], Tensor], at_rest: str, elsewhere: str
) -> None:
    """Psi-PO's optimum (Azar et al. 2023, eq. 7): the reference times exp(E[Psi(p(y preferred to y'))] / tau)."""
    tau = 0.5
    # y' is any of the three, as often as the pairs below have it.
    logits = (ACTIONS.log() + psi(RATES).mean(dim=1) / tau).requires_grad_()
    batch = of_actions(logits, weights=RATES / 9)
    slopes = {
        "dpo": torch.autograd.grad(dpo.loss(batch, dpo.Config(beta=tau)).loss, logits, retain_graph=True)[0],
        "ipo": torch.autograd.grad(ipo.loss(batch, ipo.Config(tau=tau)).loss, logits)[0],
    }
    assert slopes[at_rest].abs().max().item() < 1e-12
    assert slopes[elsewhere].abs().max().item() > 1e-3


def online_step(logits: Tensor, *, better: float, reference: Tensor) -> Tensor:
    """Return the exact gradient of online DPO on two answers, drawn from the policy as it is and labelled by a judge.

    Args:
        logits: [2]
        better: how often the judge prefers the first answer.
        reference: [2] its probabilities.
    """
    drawn = logits.detach().softmax(0)
    # Two answers that are the same teach nothing; two that differ come in either order.
    weights = 2 * drawn.prod() * torch.tensor([[0.0, better], [1.0 - better, 0.0]], dtype=torch.float64)
    output = dpo.loss(of_actions(logits, weights=weights, reference=reference), dpo.Config(beta=0.1))
    return torch.autograd.grad(output.loss, logits)[0]


def test_online_dpo_on_two_answers_makes_the_better_one_likelier_with_every_step() -> None:
    reference = vector(0.2, 0.8)
    logits = reference.log().requires_grad_()
    reached = [0.2]
    for _ in range(200):
        logits = (logits - 5.0 * online_step(logits, better=1.0, reference=reference)).detach().requires_grad_()
        reached.append(float(logits.detach().softmax(0)[0]))
    assert all(after > before for before, after in pairwise(reached))
    assert reached[-1] > 0.9


def test_online_dpo_is_moved_nowhere_by_a_judge_who_tosses_a_coin() -> None:
    reference = vector(0.2, 0.8)
    at_reference = reference.log().requires_grad_()
    assert online_step(at_reference, better=0.5, reference=reference).abs().max().item() < 1e-15
    # 2 * 0.16 pairs, of which 0.6 - 0.4 pull by beta / 2 = 0.05: 0.0032 towards the first.
    biased = online_step(at_reference, better=0.6, reference=reference)
    assert biased.tolist() == pytest.approx([-0.0032, 0.0032])
    # Away from the reference it pulls back.
    moved = vector(0.0, 0.0).requires_grad_()
    assert online_step(moved, better=0.5, reference=reference)[0].item() > 1e-3
