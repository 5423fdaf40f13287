"""The policy-gradient losses against numbers derived by hand, and on bandits whose optimum or gradient is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.sampled_tokens import sampled
from trainers.advantages import Samples
from trainers.feedback.segments import Span, segment_rewards
from trainers.importance import Correction, token_factors
from trainers.kl import KlControl, controlled
from trainers.losses import TokenBatch, grpo, load_loss, ppo, reinforce_pp, relc, rloo
from trainers.policy_gradient import PolicyLoss, clipped_surrogate

NAMES = ["ppo", "relc", "grpo", "rloo", "reinforce_pp"]
NAN = math.nan


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_batch(*, seed: int, rows: int = 5) -> TokenBatch:
    """Rows of 1 to 4 tokens, the first after two of the prompt."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(rows, 7, generator=generator, dtype=torch.float64)
    positions, lengths = torch.arange(7), torch.arange(rows) % 4 + 1
    mask = (positions >= 2) & (positions < 2 + lengths[:, None])
    weights = torch.rand(rows, generator=generator, dtype=torch.float64)
    return sampled(TokenBatch(logprobs=logprobs, mask=mask, weights=weights), seed=seed)


def samples_of(scores: list[float], *, mask: Tensor | None = None, **given: Any) -> Samples:
    """Responses of one group and, unless it is said otherwise, of one token each, by a policy that is the reference."""
    shown = torch.ones(len(scores), 1, dtype=torch.bool) if mask is None else mask
    zeros = torch.zeros(shown.shape, dtype=torch.float64)
    fields: dict[str, Any] = {
        "mask": shown,
        "scores": torch.tensor(scores, dtype=torch.float64),
        "groups": torch.zeros(len(scores), dtype=torch.int64),
        "ended": torch.ones(len(scores), dtype=torch.bool),
        "old_logprobs": zeros,
        "reference_logprobs": zeros,
    }
    return Samples(**(fields | given))


# -------------------------------------------------------------------------------------------------------- surrogate


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "dual_clip", "wanted", "slope"),
    [
        (0.3, 1.0, None, -1.2, 0.0),
        (0.3, -1.0, None, 1.349859, 1.349859),
        (math.log(5.0), -1.0, 3.0, 3.0, 0.0),
        (math.log(5.0), -1.0, None, 5.0, 5.0),
        (-0.5, 1.0, None, -0.606531, -0.606531),
        (-0.5, -1.0, None, 0.8, 0.0),
        (0.0, 2.0, 3.0, -2.0, -2.0),
    ],
)
def test_the_clipped_surrogate_and_its_slope(
    log_ratio: float, advantage: float, dual_clip: float | None, wanted: float, slope: float
) -> None:
    ratio = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    found = clipped_surrogate(ratio, advantages, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip)
    assert found.values.item() == pytest.approx(wanted, abs=1e-6)
    assert torch.autograd.grad(found.values.sum(), ratio)[0].item() == pytest.approx(slope, abs=1e-6)
    assert found.clipped.item() == (slope == 0.0)


def test_the_four_reductions() -> None:
    # Rows of two tokens and of one, weights 1 and 3; at ratio 1 a token's loss is minus its advantage.
    mask = torch.tensor([[True, True], [True, False]])
    batch = TokenBatch(
        logprobs=matrix([-1.0, -1.0], [-1.0, NAN]),
        mask=mask,
        weights=torch.tensor([1.0, 3.0], dtype=torch.float64),
        advantages=matrix([-2.0, -4.0], [-5.0, NAN]),
    )

    def of(**values: Any) -> float:
        return reinforce_pp.loss(batch, reinforce_pp.Config(**values)).loss.item()

    assert of(reduction="tok-mean") == pytest.approx((2 + 4 + 3 * 5) / (2 + 3))
    assert of(reduction="seq-mean") == pytest.approx((3 + 3 * 5) / 4)
    assert of(reduction="seq-sum") == pytest.approx((6 + 3 * 5) / 4)
    assert of(reduction="const", max_tokens=10) == pytest.approx((6 + 3 * 5) / 40)


# ------------------------------------------------------------------------------------------------------------ L-PPO


def test_the_value_loss_takes_the_worse_of_plain_and_clipped() -> None:
    # V 1.0, V_old 0.5, G 0: plain 1, clipped (0.5 + 0.2)^2: half of 1. V 1.0, G 1.5: plain 0.25, clipped 0.8^2.
    batch = TokenBatch(
        logprobs=matrix([-1.0, -1.0]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        advantages=matrix([0.0, 0.0]),
        values=matrix([1.0, 1.0]).requires_grad_(),
        old_values=matrix([0.5, 0.5]),
        returns=matrix([0.0, 1.5]),
    )
    output = ppo.loss(batch, ppo.Config(value_coefficient=0.1))
    assert output.metrics["value_loss"].item() == pytest.approx((0.5 * 1.0 + 0.5 * 0.64) / 2)
    assert output.loss.item() == pytest.approx(0.1 * 0.41)
    assert batch.values is not None
    # V - G where it was the worse, over two tokens, times 0.1; behind the clip no gradient.
    assert torch.autograd.grad(output.loss, batch.values)[0].tolist() == [pytest.approx([0.05, 0.0])]


def test_ppo_makes_the_toys_advantages_and_returns() -> None:
    toy = samples_of(
        [1.0],
        mask=torch.ones(1, 3, dtype=torch.bool),
        old_logprobs=matrix([-1.0, -2.0, -0.5]),
        reference_logprobs=matrix([-1.2, -1.5, -0.7]),
        values=matrix([0.1, 0.2, 0.3]),
    )
    found = ppo.advantages(toy, ppo.Config(whiten=False))
    assert found.advantages[0].tolist() == pytest.approx([0.831475, 0.7805, 0.69], abs=1e-9)
    assert found.returns is not None
    assert found.returns[0].tolist() == pytest.approx([0.931475, 0.9805, 0.99], abs=1e-9)
    # Whitened they have mean 0 and variance 1, and the returns are as before.
    white = ppo.advantages(toy, ppo.Config())
    mean, deviation = 0.767325, math.sqrt((0.06415**2 + 0.013175**2 + 0.077325**2) / 3)
    assert white.advantages[0].tolist() == pytest.approx(
        [(a - mean) / deviation for a in (0.831475, 0.7805, 0.69)], abs=1e-4
    )
    assert white.returns is not None
    torch.testing.assert_close(white.returns, found.returns)


def test_ppo_takes_the_penalty_of_a_missing_end_off_the_last_tokens_reward() -> None:
    """A cut response of two tokens and one that ended; no KL, no value expected: lambda 0.5 halves what comes later."""
    mask = torch.tensor([[True, True], [True, False]])
    given = samples_of([0.75, 1.0], mask=mask, values=torch.zeros(2, 2), ended=torch.tensor([False, True]))
    settings = {"kl_coefficient": 0.0, "gae_decay": 0.5, "whiten": False}
    # The cut one's last reward: 0.75 - 0.25 = 0.5.
    found = ppo.advantages(given, ppo.Config(missing_end_penalty=0.25, **settings))
    assert found.advantages.tolist() == [[0.25, 0.5], [1.0, 0.0]]
    assert found.returns is not None
    assert found.returns.tolist() == [[0.25, 0.5], [1.0, 0.0]]
    # Without one it counts as a response that ended, with the score that it was given.
    assert ppo.advantages(given, ppo.Config(**settings)).advantages.tolist() == [[0.375, 0.75], [1.0, 0.0]]


def test_ppo_without_values_says_what_else_there_is() -> None:
    with pytest.raises(ValueError, match="wanted value_head = true; or use grpo, rloo, reinforce_pp"):
        ppo.advantages(samples_of([1.0]), ppo.Config())


def bandit_update(logits: Tensor, *, kl_coefficient: float, rate: float) -> float:
    """Make two steps of PPO on two answers with rewards (1, 0) and reference (1/2, 1/2); return the KL before them.

    The expectation is exact: each answer weighs as much as it is sampled.
    """
    config = ppo.Config(kl_coefficient=kl_coefficient, whiten=False, value_coefficient=0.0)
    reference = torch.full((2, 1), math.log(0.5), dtype=torch.float64)
    old = logits.log_softmax(0)[:, None].detach()
    rewards = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    values = (old.exp() * (rewards - kl_coefficient * (old - reference))).sum().expand(2, 1)
    given = samples_of([1.0, 0.0], old_logprobs=old, reference_logprobs=reference, values=values)
    found = ppo.advantages(given, config)
    for _ in range(2):  # epochs on the same samples
        batch = TokenBatch(
            logprobs=logits.log_softmax(0)[:, None],
            mask=given.mask,
            weights=old.exp()[:, 0],
            old_logprobs=old,
            advantages=found.advantages,
            returns=found.returns,
            values=values,
            old_values=values,
        )
        (gradient,) = torch.autograd.grad(ppo.loss(batch, config).loss, logits)
        with torch.no_grad():
            logits -= rate * gradient
    return float((old.exp() * (old - reference)).sum())


def test_ppo_on_the_bandit_comes_to_the_closed_form_optimum() -> None:
    """Beta 0.5: pi* = softmax(r / beta) = (0.880797, 0.119203)."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(60):
        bandit_update(logits, kl_coefficient=0.5, rate=4.0)
    policy = logits.softmax(0).detach()
    assert policy.tolist() == pytest.approx([0.880797, 0.119203], abs=1e-6)
    objective = policy[0] - 0.5 * (policy * (policy / 0.5).log()).sum()
    assert objective.item() == pytest.approx(0.716890, abs=1e-6)


def test_the_adaptive_price_holds_the_kl_at_its_target() -> None:
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    control = KlControl(adaptive=True, target=0.1, horizon=1_000)
    price, kl = 0.2, 0.0
    for _ in range(300):
        kl = bandit_update(logits, kl_coefficient=price, rate=0.5)
        price = controlled(price, kl=kl, num_samples=256, control=control)
    assert kl == pytest.approx(0.1, abs=1e-4)
    # There pi* = softmax(r / price): the one price whose optimum has that KL.
    best = torch.sigmoid(torch.tensor(1 / price, dtype=torch.float64))
    assert (best * (2 * best).log() + (1 - best) * (2 * (1 - best)).log()).item() == pytest.approx(0.1, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------ L-TIS

LOG_RATIOS = matrix([math.log(2.0), math.log(2.5), NAN], [math.log(0.5), math.log(0.4), math.log(4.0)])
SHOWN = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    ("kind", "cap", "floor", "wanted"),
    [
        ("none", 3.0, 0.0, [[1.0, 1.0], [1.0, 1.0, 1.0]]),
        ("token-truncate", 2.0, 0.0, [[2.0, 2.0], [0.5, 0.4, 2.0]]),
        ("token-mask", 3.0, 0.45, [[2.0, 2.5], [0.5, 0.0, 0.0]]),
        # The rows' ratios are 2 * 2.5 = 5 and 0.5 * 0.4 * 4 = 0.8.
        ("sequence-truncate", 3.0, 0.0, [[3.0, 3.0], [0.8, 0.8, 0.8]]),
        ("sequence-mask", 3.0, 0.0, [[0.0, 0.0], [0.8, 0.8, 0.8]]),
        ("sequence-mask", math.inf, 0.9, [[5.0, 5.0], [0.0, 0.0, 0.0]]),
    ],
)
def test_factors_by_token_or_sequence_are_truncated_or_masked(
    kind: Any, cap: float, floor: float, wanted: list[list[float]]
) -> None:
    found = token_factors(LOG_RATIOS, SHOWN, kind=kind, cap=cap, floor=floor)
    assert [row[mask].tolist() for row, mask in zip(found, SHOWN, strict=True)] == [pytest.approx(w) for w in wanted]


@pytest.mark.parametrize("kind", ["token-truncate", "token-mask", "sequence-truncate", "sequence-mask"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_engines_leave_loss_and_gradient_exactly_as_they_are(name: str, kind: str) -> None:
    loss = load_loss(name)
    batch = random_batch(seed=0)
    outputs = []
    for rollout, how in ((batch.old_logprobs, kind), (batch.rollout_logprobs, "none")):
        leaf = batch.logprobs.clone().requires_grad_()
        output = loss.loss(replace(batch, logprobs=leaf, rollout_logprobs=rollout), loss.Config(importance=how))
        outputs.append((output.loss, torch.autograd.grad(output.loss, leaf)[0]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_factors_multiply_the_policys_loss_alone() -> None:
    # Every sample is out of bounds: what is left is the value loss of PPO, and the KL of GRPO.
    batch = random_batch(seed=1)
    assert batch.old_logprobs is not None
    far = replace(batch, rollout_logprobs=batch.old_logprobs - 5.0)
    output = ppo.loss(far, ppo.Config(value_coefficient=0.5))
    assert output.metrics["policy_loss"].item() == 0.0
    assert output.loss.item() == pytest.approx(0.5 * output.metrics["value_loss"].item())
    with_kl = grpo.loss(far, grpo.Config(reduction="tok-mean"))
    assert with_kl.loss.item() == pytest.approx(0.04 * with_kl.metrics["reference_kl"].item())
    assert with_kl.loss.item() > 0


@pytest.mark.parametrize("name", NAMES)
def test_single_tokens_are_truncated_at_two_and_everything_else_at_three_unless_a_cap_is_set(name: str) -> None:
    kind = load_loss(name).Config
    caps = {how: kind(importance=how).importance_cap for how in get_args(Correction)}
    assert caps.pop("token-truncate") == 2.0
    assert set(caps.values()) == {3.0}
    assert kind(importance="token-truncate", importance_cap=4.0).importance_cap == 4.0


def test_by_sequence_without_a_cap_the_gradient_is_unbiased_and_uncorrected_it_is_not() -> None:
    """Answers of two tokens out of two; another policy sampled them. All four, each as often as it was sampled."""
    answers = torch.tensor(list(itertools.product((0, 1), repeat=2)))
    rewards = torch.tensor([0.0, 1.0, 0.3, -0.5], dtype=torch.float64)
    first = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    second = matrix([0.2, 0.9], [-0.6, 0.1]).requires_grad_()

    def logprobs(first: Tensor, second: Tensor) -> Tensor:
        ahead, then = first.log_softmax(0)[answers[:, 0]], second.log_softmax(1)[answers[:, 0], answers[:, 1]]
        return torch.stack([ahead, then], dim=1)

    rollout = logprobs(torch.tensor([-0.5, 0.5], dtype=torch.float64), matrix([1.0, -1.0], [0.5, 0.5]))
    policy = logprobs(first, second)
    true = torch.autograd.grad(-(policy.sum(dim=1).exp() * rewards).sum(), [first, second], retain_graph=True)

    def difference(kind: str) -> float:
        batch = TokenBatch(
            logprobs=policy,
            mask=torch.ones(4, 2, dtype=torch.bool),
            weights=rollout.sum(dim=1).exp(),
            rollout_logprobs=rollout,
            advantages=rewards[:, None].expand(4, 2),
        )
        config = grpo.Config(kl_coefficient=0.0, reduction="seq-sum", importance=kind, importance_cap=math.inf)
        found = torch.autograd.grad(grpo.loss(batch, config).loss, [first, second], retain_graph=True)
        return max(float((a - b).abs().max()) for a, b in zip(found, true, strict=True))

    assert difference("sequence-truncate") < 1e-9
    assert difference("sequence-mask") < 1e-9
    assert difference("none") > 0.01
    assert difference("token-truncate") > 0.01


# ----------------------------------------------------------------------------------------------------------- L-GRPO


def group_batch(advantages: Tensor, mask: Tensor, **given: Tensor) -> TokenBatch:
    logprobs = -torch.arange(1, mask.numel() + 1, dtype=torch.float64).view(mask.shape) / 10
    return TokenBatch(logprobs=logprobs.requires_grad_(), mask=mask, advantages=advantages, **given)


RAGGED = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)


def test_the_first_step_of_grpo_is_reinforce_with_the_groups_mean_as_baseline() -> None:
    found = grpo.advantages(samples_of([1.0, 0.0, 0.0, 1.0], mask=RAGGED), grpo.Config())
    a = 0.865875
    assert found.advantages[:, 0].tolist() == pytest.approx([a, -a, -a, a], abs=1e-6)
    assert not found.advantages[~RAGGED].any()
    assert found.live.all()
    batch = group_batch(found.advantages, RAGGED)
    output = grpo.loss(batch, grpo.Config(kl_coefficient=0.0))
    assert output.loss.item() == pytest.approx(0.0, abs=1e-12)  # minus the mean advantage
    gradient = torch.autograd.grad(output.loss, batch.logprobs)[0]
    # -A / (rows * the row's tokens) for each token's log-prob.
    wanted = [[-a / 4, 0, 0], [a / 12] * 3, [a / 8, a / 8, 0], [-a / 12] * 3]
    torch.testing.assert_close(gradient, torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)


def test_dr_grpo_divides_by_neither_deviation_nor_length() -> None:
    config = grpo.Config(form="dr_grpo", max_tokens=8)
    found = grpo.advantages(samples_of([1.0, 0.0, 0.0, 1.0], mask=RAGGED), config)
    assert found.advantages[:, 0].tolist() == [0.5, -0.5, -0.5, 0.5]
    batch = group_batch(found.advantages, RAGGED)
    gradient = torch.autograd.grad(grpo.loss(batch, config).loss, batch.logprobs)[0]
    wanted = torch.where(RAGGED, -found.advantages / (4 * 8), 0.0)
    torch.testing.assert_close(gradient, wanted)


def test_dapo_clips_higher_drops_equal_groups_and_shapes_what_is_overlong() -> None:
    config = grpo.Config(form="dapo", max_tokens=3, overlong_buffer_tokens=2)
    assert (config.reduction, config.clip_low, config.clip_high, config.kl_coefficient) == ("tok-mean", 0.2, 0.28, 0.0)
    # Lengths 1, 3, 2, 3: penalties 0, -1, -1/2, -1 on equal scores make a group that differs.
    found = grpo.advantages(samples_of([1.0] * 4, mask=RAGGED), config)
    deviation = math.sqrt((0.625**2 + 0.375**2 + 0.125**2 + 0.375**2) / 3) + 1e-4
    wanted = [0.625 / deviation, -0.375 / deviation, 0.125 / deviation, -0.375 / deviation]
    assert found.advantages[:, 0].tolist() == pytest.approx(wanted)
    plain = grpo.Config(form="dapo")
    names = torch.tensor([0, 0, 1, 1])
    equal = grpo.advantages(samples_of([1.0, 1.0, 0.0, 1.0], mask=RAGGED, groups=names), plain)
    assert equal.live.tolist() == [False, False, True, True]
    assert grpo.advantages(samples_of([1.0, 1.0, 0.0, 1.0], mask=RAGGED, groups=names), grpo.Config()).live.all()
    # A ratio of 1.25 is within 1.28 and beyond 1.2.
    one = torch.ones(1, 1, dtype=torch.bool)
    batch = group_batch(matrix([1.0]), one, old_logprobs=matrix([-0.1 - math.log(1.25)]))
    assert grpo.loss(batch, plain).loss.item() == pytest.approx(-1.25)
    assert grpo.loss(batch, grpo.Config(kl_coefficient=0.0)).loss.item() == pytest.approx(-1.2)


def test_gspo_clips_the_geometric_mean_of_a_responses_ratios() -> None:
    config = grpo.Config(form="gspo", clip_low=0.2, clip_high=0.2)
    assert grpo.Config(form="gspo").clip_high == 4e-4
    mask = torch.ones(1, 2, dtype=torch.bool)
    # Log-ratios 0.5 and -0.3, mean 0.1: e^0.1; by token the first would be clipped at 1.2.
    batch = group_batch(matrix([1.0, 1.0]), mask, old_logprobs=matrix([-0.6, 0.1]))
    output = grpo.loss(batch, config)
    assert output.loss.item() == pytest.approx(-math.exp(0.1))
    gradient = torch.autograd.grad(output.loss, batch.logprobs)[0]
    assert gradient[0].tolist() == pytest.approx([-math.exp(0.1) / 2] * 2)
    by_token = grpo.loss(batch, grpo.Config(kl_coefficient=0.0)).loss.item()
    assert by_token == pytest.approx(-(1.2 + math.exp(-0.3)) / 2)


def test_unscored_responses_are_left_out_of_everything() -> None:
    scores = [1.0, NAN, 0.0, 0.0, 1.0]
    mask = torch.ones(5, 2, dtype=torch.bool)
    zeros = torch.zeros(5, 2, dtype=torch.float64)
    for name in NAMES:
        loss = load_loss(name)
        assert isinstance(loss, PolicyLoss)
        found = loss.advantages(samples_of(scores, mask=mask, values=zeros, segment_rewards=zeros), loss.Config())
        assert found.live.tolist() == [True, False, True, True, True]
        assert not found.advantages[1].any()
        rest = torch.tensor([0, 2, 3, 4])
        alone = loss.advantages(
            samples_of([1.0, 0.0, 0.0, 1.0], mask=mask[:4], values=zeros[:4], segment_rewards=zeros[:4]), loss.Config()
        )
        torch.testing.assert_close(found.advantages[rest], alone.advantages)


def test_a_form_fills_what_is_not_set_and_shows_in_the_settings() -> None:
    assert grpo.Config(form="dapo", clip_high=0.25).clip_high == 0.25
    assert grpo.Config.model_validate(grpo.Config(form="gspo").model_dump()) == grpo.Config(form="gspo")
    with pytest.raises(ValidationError, match=r"wanted at most max_tokens \(3\)"):
        grpo.Config(form="dapo", overlong_buffer_tokens=4, max_tokens=3)
    # DAPO's buffer is 4,096 of 20,480 tokens.
    assert grpo.Config(form="dapo", max_tokens=20_480).overlong == 4_096
    assert grpo.Config(form="dapo", max_tokens=20_480, overlong_buffer_tokens=0).overlong == 0
    assert grpo.Config(form="gspo", max_tokens=20_480).overlong == 0


def test_what_needs_the_greatest_length_says_so() -> None:
    batch = random_batch(seed=0)
    with pytest.raises(ValueError, match='max_tokens: got nothing with reduction = "const"'):
        batch.reduce(batch.logprobs, reduction="const")
    with pytest.raises(ValueError, match="max_tokens: got nothing with overlong_buffer_tokens"):
        grpo.advantages(samples_of([1.0, 0.0]), grpo.Config(overlong_buffer_tokens=4))


# ----------------------------------------------------------------------------------------------------------- L-RLOO


def test_rloo_is_unbiased_on_a_bandit_with_a_price_on_the_kl() -> None:
    """All groups of three answers out of three, each as often as it is sampled: the gradient of E[r] - beta * KL."""
    rewards, beta = torch.tensor([1.0, 0.2, -0.4], dtype=torch.float64), 0.3
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    policy = logits.log_softmax(0)
    objective = (policy.exp() * (rewards - beta * (policy - reference))).sum()
    (true,) = torch.autograd.grad(-objective, logits, retain_graph=True)

    drawn = torch.tensor(list(itertools.product(range(3), repeat=3)))  # 27 groups
    chance = policy.detach()[drawn].sum(dim=1).exp()
    answers, names = drawn.flatten(), torch.arange(27).repeat_interleave(3)
    given = samples_of(
        rewards[answers].tolist(),
        groups=names,
        old_logprobs=policy.detach()[answers][:, None],
        reference_logprobs=reference[answers][:, None],
    )

    def gradient(loss: Any, config: Any) -> Tensor:
        batch = TokenBatch(
            logprobs=policy[answers][:, None],
            mask=given.mask,
            weights=chance.repeat_interleave(3),
            old_logprobs=given.old_logprobs,
            advantages=loss.advantages(given, config).advantages,
        )
        return torch.autograd.grad(loss.loss(batch, config).loss, logits, retain_graph=True)[0]

    torch.testing.assert_close(gradient(rloo, rloo.Config(kl_coefficient=beta)), true, atol=1e-9, rtol=0)
    # Dr.GRPO's mean contains the response itself: two thirds of the gradient, here without the KL.
    (plain,) = torch.autograd.grad(-(policy.exp() * rewards).sum(), logits, retain_graph=True)
    dr_grpo = gradient(grpo, grpo.Config(form="dr_grpo", max_tokens=1))
    torch.testing.assert_close(dr_grpo, plain * 2 / 3, atol=1e-9, rtol=0)


def test_rloo_takes_the_price_of_the_kl_off_the_score_first() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    given = samples_of([1.0, 1.0], mask=mask, old_logprobs=matrix([-1.0, -1.0], [-1.0, NAN]))
    given = replace(given, reference_logprobs=matrix([-2.0, -4.0], [-1.0, NAN]))
    # 1 - 0.1 * (1 + 3) = 0.6 and 1: each minus the other.
    found = rloo.advantages(given, rloo.Config(kl_coefficient=0.1))
    torch.testing.assert_close(found.advantages, matrix([-0.4, -0.4], [0.4, 0.0]))


def test_rloo_takes_a_response_as_one_action() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    batch = group_batch(matrix([1.0, 1.0]), mask, old_logprobs=matrix([-0.2, -0.25]))
    # Log-ratios 0.1 and 0.05: e^0.15, with that slope for either token.
    output = rloo.loss(batch, rloo.Config())
    assert output.loss.item() == pytest.approx(-math.exp(0.15))
    gradient = torch.autograd.grad(output.loss, batch.logprobs)[0]
    assert gradient[0].tolist() == pytest.approx([-math.exp(0.15)] * 2)


# ------------------------------------------------------------------------------------------------------------ L-RPP


def test_reinforce_pp_normalises_over_all_tokens_and_without_a_price_every_token_of_a_response_is_alike() -> None:
    given = samples_of([1.0, 0.0, 0.0, 2.0], mask=RAGGED)
    found = reinforce_pp.advantages(given, reinforce_pp.Config(kl_coefficient=0.0)).advantages
    # Returns 1, 0 0 0, 0 0, 2 2 2: mean 7/9, mean square 13/9.
    mean, deviation = 7 / 9, math.sqrt(13 / 9 - (7 / 9) ** 2)
    wanted = [(score - mean) / deviation for score in (1.0, 0.0, 0.0, 2.0)]
    for row, mask, value in zip(found, RAGGED, wanted, strict=True):
        assert row[mask].tolist() == pytest.approx([value] * int(mask.sum()), abs=1e-6)
        assert not row[~mask].any()
    assert found[RAGGED].mean().item() == pytest.approx(0.0, abs=1e-9)
    assert found[RAGGED].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)


def test_reinforce_pp_pays_for_the_kl_of_this_and_later_tokens() -> None:
    given = samples_of(
        [1.0],
        mask=torch.ones(1, 3, dtype=torch.bool),
        old_logprobs=matrix([-1.0, -2.0, -0.5]),
        reference_logprobs=matrix([-1.2, -1.5, -0.7]),
    )
    found = reinforce_pp.advantages(given, reinforce_pp.Config(kl_coefficient=0.05)).advantages[0]
    # Returns-to-go of (-0.01, 0.025, 0.99).
    returns = torch.tensor([1.005, 1.015, 0.99], dtype=torch.float64)
    wanted = (returns - returns.mean()) / returns.std(unbiased=False)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)


def test_the_baseline_of_reinforce_pp_is_the_groups_mean() -> None:
    names = torch.tensor([0, 0, 1, 1])
    config = reinforce_pp.Config(kl_coefficient=0.0, baseline=True)
    found = reinforce_pp.advantages(samples_of([1.0, 0.0, 11.0, 10.0], groups=names), config).advantages
    assert found[:, 0].tolist() == pytest.approx([1, -1, 1, -1], abs=1e-6)


# ----------------------------------------------------------------------------------------------------- a missing end


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    # Scores 1, 1 - 1 and 0.5, of which the second was cut; a third, unscored, plays no part.
    [
        # Minus the mean of the others: 1 - 0.25, 0 - 0.75, 0.5 - 0.5.
        ("rloo", {}, [0.75, -0.75, 0.0, 0.0]),
        ("grpo", {"scale": "none"}, [0.5, -0.5, 0.0, 0.0]),
        # One token each: 0.5, -0.5 and 0 over the deviation sqrt((0.25 + 0.25) / 3), by group or over all alike.
        ("reinforce_pp", {}, [math.sqrt(1.5), -math.sqrt(1.5), 0.0, 0.0]),
        ("reinforce_pp", {"baseline": True}, [math.sqrt(1.5), -math.sqrt(1.5), 0.0, 0.0]),
    ],
)
def test_without_a_value_model_a_missing_end_comes_off_the_score_too(
    name: str, settings: dict[str, Any], wanted: list[float]
) -> None:
    loss = load_loss(name)
    assert isinstance(loss, PolicyLoss)
    given = samples_of([1.0, 1.0, 0.5, NAN], ended=torch.tensor([True, False, True, False]))
    config = loss.Config.model_validate({"kl_coefficient": 0.0, "missing_end_penalty": 1.0, **settings})
    found = loss.advantages(given, config)
    assert found.advantages[:, 0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert found.live.tolist() == [True, True, True, False]


def test_a_missing_end_and_an_overlong_answer_cost_grpo_both() -> None:
    # Lengths 1, 3 (cut) and 2 of at most 3 with a buffer of 2: scores 1 - 0, 1 - 1 - 1 and 1 - 1/2, whose mean is 1/6.
    given = samples_of([1.0] * 3, mask=RAGGED[:3], ended=torch.tensor([True, False, True]))
    config = grpo.Config(scale="none", max_tokens=3, overlong_buffer_tokens=2, missing_end_penalty=1.0)
    assert grpo.advantages(given, config).advantages[:, 0].tolist() == pytest.approx([5 / 6, -7 / 6, 1 / 3])


# ----------------------------------------------------------------------------------------------------------- L-RELC


def test_relc_adds_the_weighted_spans_to_the_score() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    given = samples_of([2.0], mask=mask, values=torch.zeros(1, 3), segment_rewards=matrix([1.0, 0.0, -1.0]))
    config = relc.Config(score_weight=0.5, segment_weight=0.2, kl_coefficient=0.0, gae_decay=1.0, whiten=False)
    # Token rewards 0.2, 0, 0.5 * 2 - 0.2: their sums from each token on.
    assert relc.advantages(given, config).advantages[0].tolist() == pytest.approx([1.0, 0.8, 0.8])
    with pytest.raises(ValueError, match="without segment rewards"):
        relc.advantages(replace(given, segment_rewards=None), config)


def test_relc_without_weight_on_the_spans_is_ppo_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    given = samples_of(
        [1.0, 0.0, 0.5, NAN],
        mask=RAGGED,
        old_logprobs=torch.randn(4, 3, generator=generator, dtype=torch.float64),
        values=torch.randn(4, 3, generator=generator, dtype=torch.float64),
        segment_rewards=torch.randn(4, 3, generator=generator, dtype=torch.float64),
    )
    ours, plain = relc.advantages(given, relc.Config(segment_weight=0.0)), replace(given, segment_rewards=None)
    wanted = ppo.advantages(plain, ppo.Config())
    assert torch.equal(ours.advantages, wanted.advantages)
    assert ours.returns is not None
    assert wanted.returns is not None
    assert torch.equal(ours.returns, wanted.returns)
    batch = random_batch(seed=2)
    assert torch.equal(relc.loss(batch, relc.Config()).loss, ppo.loss(batch, ppo.Config()).loss)


def steps_to_learn(loss: Any, config: Any, *, seed: int) -> int:
    """Return the updates after which 9 of 10 answers of eight letters out of `abcx` have no `x`, the one bad letter."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(8, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(16, 8, dtype=torch.bool)
    for step in range(400):
        logprobs = logits.log_softmax(1)
        if (1 - logprobs[:, 3].detach().exp()).prod().item() > 0.9:
            return step
        drawn = torch.multinomial(logprobs.detach().exp(), 16, replacement=True, generator=generator).T
        texts = ["".join("abcx"[i] for i in row) for row in drawn.tolist()]
        spans = [
            [Span(start=i, end=i + 1, quote="x", sign=-1) for i, c in enumerate(text) if c == "x"] for text in texts
        ]
        placed = [
            segment_rewards(text, found, num_tokens=8, tokens_of=range).rewards.tolist()
            for text, found in zip(texts, spans, strict=True)
        ]
        picked = logprobs[torch.arange(8), drawn]
        given = samples_of(
            [float("x" not in text) for text in texts],
            mask=mask,
            old_logprobs=picked.detach(),
            reference_logprobs=picked.detach(),
            values=torch.zeros(16, 8, dtype=torch.float64),
            segment_rewards=matrix(*placed) if loss is relc else None,
        )
        found = loss.advantages(given, config)
        batch = TokenBatch(
            logprobs=picked,
            mask=mask,
            advantages=found.advantages,
            returns=found.returns,
            values=given.values,
            old_values=given.values,
        )
        (gradient,) = torch.autograd.grad(loss.loss(batch, config).loss, logits)
        with torch.no_grad():
            logits -= 8.0 * gradient
    return 400


def test_relc_learns_which_letter_is_bad_in_fewer_steps_than_the_score_alone() -> None:
    settings = {"kl_coefficient": 0.0, "gae_decay": 1.0, "value_coefficient": 0.0}
    for seed in range(3):
        dense = steps_to_learn(relc, relc.Config(**settings), seed=seed)
        sparse = steps_to_learn(ppo, ppo.Config(**settings), seed=seed)
        assert dense < sparse


# ------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_outside_the_mask_plays_no_part_in_loss_or_gradient(name: str) -> None:
    loss = load_loss(name)
    batch = random_batch(seed=3)
    fields = ("logprobs", "old_logprobs", "rollout_logprobs", "reference_logprobs", "advantages", "returns", "values")
    held = {field: getattr(batch, field) for field in (*fields, "old_values")}
    spoilt = replace(batch, **{field: values.masked_fill(~batch.mask, NAN) for field, values in held.items()})
    pad = torch.nn.functional.pad
    wider = replace(
        batch,
        mask=pad(batch.mask, (0, 3)),
        **{field: pad(values, (0, 3), value=-99.0) for field, values in held.items()},
    )
    results = []
    for one in (batch, spoilt, wider):
        leaf = one.logprobs.clone().requires_grad_()
        output = loss.loss(replace(one, logprobs=leaf), loss.Config())
        results.append((output, torch.autograd.grad(output.loss, leaf)[0][:, : batch.mask.shape[1]]))
    for output, gradient in results[1:]:
        torch.testing.assert_close(output.loss, results[0][0].loss)
        torch.testing.assert_close(gradient, results[0][1])
        for metric, value in results[0][0].metrics.items():
            torch.testing.assert_close(output.metrics[metric], value)


@pytest.mark.parametrize("reduction", ["tok-mean", "seq-mean", "seq-sum", "const"])
@pytest.mark.parametrize("kind", ["token-truncate", "sequence-mask"])
def test_gradients_by_policy_and_value_are_finite_differences(reduction: str, kind: str) -> None:
    batch = random_batch(seed=4)
    values = batch.values
    assert values is not None
    config = ppo.Config(reduction=reduction, max_tokens=9, importance=kind, dual_clip=3.0)

    def of(logprobs: Tensor, values: Tensor) -> Tensor:
        return ppo.loss(replace(batch, logprobs=logprobs, values=values), config).loss

    assert torch.autograd.gradcheck(of, [batch.logprobs.requires_grad_(), values.requires_grad_()], atol=1e-8)


@pytest.mark.parametrize("form", ["grpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradients_of_every_form_are_finite_differences(form: str, estimator: str) -> None:
    batch = random_batch(seed=5)
    config = grpo.Config(form=form, max_tokens=9, kl_coefficient=0.1, kl_estimator=estimator, clip_low=0.2)
    assert torch.autograd.gradcheck(
        lambda logprobs: grpo.loss(replace(batch, logprobs=logprobs), config).loss,
        [batch.logprobs.requires_grad_()],
        atol=1e-8,
    )


@pytest.mark.parametrize("form", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_every_form_adds_up_however_a_step_is_cut(form: str) -> None:
    batch = random_batch(seed=6)
    assert batch.weights is not None
    config = grpo.Config(form=form, max_tokens=9, kl_coefficient=0.1)
    told = replace(
        batch,
        global_tokens=float((batch.weights[:, None] * batch.mask).sum()),
        global_rows=float(batch.weights.sum()),
    )

    def part(start: int, end: int) -> Tensor:
        fields = {name: getattr(told, name) for name in told.__dataclass_fields__}
        cut = replace(told, **{name: v[start:end] for name, v in fields.items() if isinstance(v, Tensor)})
        return grpo.loss(cut, config).loss

    total = part(0, 2) + part(2, 3) + part(3, 5)
    torch.testing.assert_close(total, grpo.loss(batch, config).loss, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_documents_is_refused_with_what_it_lacks(name: str) -> None:
    loss = load_loss(name)
    bare = TokenBatch(logprobs=matrix([-1.0]), mask=torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="batch: got no advantages"):
        loss.loss(bare, loss.Config())
