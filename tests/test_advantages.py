"""Scores become advantages as the papers say, whatever the masks, the missing scores and the cut into parts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainers.advantages import (
    gae,
    group_centred,
    group_relative,
    informative,
    leave_one_out,
    masked_sums,
    overlong_penalties,
    returns_to_go,
    token_rewards,
    whiten,
)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def shown(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def scores(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def groups(*names: int) -> Tensor:
    return torch.tensor(names)


# METHODS' TOY-R: lp - ref = (-1, -2, -0.5) - (-1.2, -1.5, -0.7).
TOY_RATIOS = matrix([0.2, -0.5, 0.2])
TOY_VALUES = matrix([0.1, 0.2, 0.3])
TOY_REWARDS = matrix([-0.01, 0.025, 0.99])
ALL = shown([1, 1, 1])

# ---------------------------------------------------------------------------------------------------- token rewards


def test_the_toy_rewards_are_the_penalty_and_the_score_at_the_end() -> None:
    found = token_rewards(scores(1.0), TOY_RATIOS, ALL, kl_coefficient=0.05)
    torch.testing.assert_close(found, TOY_REWARDS)


def test_the_score_stands_on_the_last_token_of_the_mask() -> None:
    mask = shown([0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0])
    ratios = torch.full((3, 5), math.nan, dtype=torch.float64)
    found = token_rewards(
        scores(2.0, 2.5, 4.0),
        torch.where(mask, 0.0, ratios),
        mask,
        kl_coefficient=0.1,
    )
    assert found.tolist() == [[0, 0, 0, 2.0, 0], [0, 0, 0, 2.5, 0], [0, 0, 0, 0, 0]]


def test_overlong_responses_lose_linearly_up_to_one() -> None:
    # At most 10 tokens, of which the last 4 cost: 6 are free, 8 are half way, 11 count as 10.
    found = overlong_penalties(torch.tensor([3, 6, 7, 8, 10, 11]), max_tokens=10, buffer_tokens=4)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match=r"overlong_buffer_tokens: got 11, wanted 1 to max_tokens \(10\)"):
        overlong_penalties(torch.tensor([1]), max_tokens=10, buffer_tokens=11)


# -------------------------------------------------------------------------------------------------------------- GAE


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [(0.95, [0.831475, 0.7805, 0.69]), (1.0, [0.905, 0.815, 0.69]), (0.0, [0.09, 0.125, 0.69])],
)
def test_gae_of_the_toy(decay: float, wanted: list[float]) -> None:
    found = gae(TOY_REWARDS, TOY_VALUES, ALL, decay=decay)
    assert found.advantages[0].tolist() == pytest.approx(wanted, abs=1e-9)
    if decay == 0.95:
        assert found.returns[0].tolist() == pytest.approx([0.931475, 0.9805, 0.99], abs=1e-9)


def test_with_decay_one_gae_is_the_reward_to_go_minus_the_value() -> None:
    found = gae(TOY_REWARDS, TOY_VALUES, ALL, decay=1.0).advantages
    torch.testing.assert_close(found, returns_to_go(TOY_REWARDS, ALL) - TOY_VALUES)


def test_tokens_outside_the_mask_are_stepped_over() -> None:
    nan = math.nan
    mask = shown([0, 1, 0, 1, 1, 0, 0])
    found = gae(matrix([nan, -0.01, nan, 0.025, 0.99, nan, nan]), matrix([nan, 0.1, nan, 0.2, 0.3, nan, nan]), mask)
    assert found.advantages[0].tolist() == pytest.approx([0, 0.831475, 0, 0.7805, 0.69, 0, 0], abs=1e-9)
    assert found.returns[0].tolist() == pytest.approx([0, 0.931475, 0, 0.9805, 0.99, 0, 0], abs=1e-9)


def test_a_response_that_was_cut_may_expect_something_behind_its_end() -> None:
    # Discount 0.5, decay 0: 0.99 + 0.5 * 2 - 0.3 at the last token, 0.025 + 0.5 * 0.3 - 0.2 before it.
    found = gae(TOY_REWARDS, TOY_VALUES, ALL, discount=0.5, decay=0.0, last_values=scores(2.0)).advantages
    assert found[0].tolist() == pytest.approx([-0.01 + 0.1 - 0.1, -0.025, 1.69])


# -------------------------------------------------------------------------------------------------------- whitening


def ragged(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = 3 + 2 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    return values, torch.rand(6, 7, generator=generator) < 0.6


def test_whitened_tokens_have_mean_zero_and_variance_one_over_all_of_the_mask() -> None:
    values, mask = ragged(0)
    found = whiten(values.masked_fill(~mask, math.nan), mask)
    assert found[mask].mean().item() == pytest.approx(0.0, abs=1e-9)
    assert found[mask].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)
    assert not found[~mask].any()


def test_ranks_that_add_up_their_sums_whiten_as_one_would() -> None:
    values, mask = ragged(1)
    sums = masked_sums(values[:2], mask[:2]).plus(masked_sums(values[2:], mask[2:]))
    parts = [whiten(values[:2], mask[:2], sums=sums), whiten(values[2:], mask[2:], sums=sums)]
    torch.testing.assert_close(torch.cat(parts), whiten(values, mask), atol=1e-12, rtol=0)


def test_whitening_of_nothing_and_of_equal_values_is_zero() -> None:
    values, mask = ragged(2)
    assert not whiten(values, torch.zeros_like(mask)).any()
    assert whiten(torch.full_like(values, 2.5), mask).abs().max() < 1e-6


# ----------------------------------------------------------------------------------------------------------- groups


def test_group_relative_scores_of_the_card() -> None:
    # mean 1/2, std with ddof 1 sqrt(4 * 0.25 / 3) = 0.577350, plus 1e-4.
    found = group_relative(scores(1, 0, 0, 1), groups(7, 7, 7, 7))
    assert found.tolist() == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875], abs=1e-6)
    plain = group_relative(scores(1, 0, 0, 1), groups(7, 7, 7, 7), scale="none")
    assert plain.tolist() == [0.5, -0.5, -0.5, 0.5]


def test_leave_one_out_of_the_card() -> None:
    found = leave_one_out(scores(1, 0, 0, 1), groups(7, 7, 7, 7))
    assert found.tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


def test_groups_know_nothing_of_one_another_nor_of_their_order() -> None:
    names = groups(2, 1, 2, 1, 2)
    found = leave_one_out(scores(1, 10, 2, 30, 6), names)
    # 1 - (2 + 6) / 2, 10 - 30, 2 - (1 + 6) / 2, 30 - 10, 6 - (1 + 2) / 2
    assert found.tolist() == pytest.approx([-3, -20, -1.5, 20, 4.5])
    assert group_centred(scores(1, 10, 2, 30, 6), names).tolist() == pytest.approx([-2, -10, -1, 10, 3])


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3])
def test_equal_scores_a_group_of_one_and_a_missing_score_give_zero(constant: float) -> None:
    names, given_scores = groups(0, 0, 0, 1, 2, 2), scores(constant, constant, constant, 5.0, 1.0, math.nan)
    for found in (
        group_relative(given_scores, names),
        group_relative(given_scores, names, scale="none"),
        leave_one_out(given_scores, names),
    ):
        assert found.tolist() == pytest.approx([0.0] * 6, abs=1e-12)
    assert not informative(given_scores, names).any()


def test_a_missing_score_has_no_part_in_its_groups_mean_and_deviation() -> None:
    found = group_relative(scores(1, math.nan, 0, 0, 1), groups(0, 0, 0, 0, 0))
    assert found.tolist() == pytest.approx([0.865875, 0, -0.865875, -0.865875, 0.865875], abs=1e-6)
    assert leave_one_out(scores(1, math.nan, 0), groups(0, 0, 0)).tolist() == [1, 0, -1]
    assert informative(scores(1, math.nan, 0, 2, 2), groups(0, 0, 0, 1, 1)).tolist() == [
        True,
        False,
        True,
        False,
        False,
    ]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_advantages_of_a_group_add_up_to_zero(values: list[float]) -> None:
    names = torch.zeros(len(values), dtype=torch.int64)
    for found in (group_relative(scores(*values), names), leave_one_out(scores(*values), names)):
        assert found.sum().item() == pytest.approx(0.0, abs=1e-9)
