"""Samples of older weights count as much as the weights being trained would have made them, within bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.pair_tables import pair_table
from trainers.importance import ImportanceConfig, correction
from trainers.ranks.update_start import Reference, corrected
from trainers.rows.pairs import pair_rows

LOG_RATIOS = np.array([0.0, math.log(2.0), math.log(5.0), -1.0, 0.0])
STALE = np.array([True, True, True, True, False])


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (ImportanceConfig(), [1.0, 2.0, 3.0, math.exp(-1.0), 1.0]),
        (ImportanceConfig(kind="mask"), [1.0, 2.0, 0.0, math.exp(-1.0), 1.0]),
        (ImportanceConfig(kind="none"), [1.0] * 5),
        (ImportanceConfig(cap=10.0), [1.0, 2.0, 5.0, math.exp(-1.0), 1.0]),
    ],
)
def test_ratios_are_truncated_masked_or_left(config: ImportanceConfig, wanted: list[float]) -> None:
    assert correction(LOG_RATIOS, stale=STALE, config=config) == pytest.approx(wanted)


def test_fresh_samples_are_corrected_only_where_that_is_asked_for() -> None:
    found = correction(np.array([0.5, 0.5]), stale=np.array([True, False]), config=ImportanceConfig())
    assert found == pytest.approx([math.exp(0.5), 1.0])
    both = correction(np.array([0.5, 0.5]), stale=np.array([True, False]), config=ImportanceConfig(applies_to="all"))
    assert both == pytest.approx([math.exp(0.5)] * 2)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.sampled_from(["truncate", "mask", "none"]))
def test_equal_engines_leave_the_loss_exactly_as_it_is(stale: list[bool], kind: str) -> None:
    config = ImportanceConfig.model_validate({"kind": kind, "applies_to": "all"})
    assert (correction(np.zeros(len(stale)), stale=np.array(stale), config=config) == 1.0).all()


def test_the_corrected_gradient_of_a_bandit_is_unbiased_and_the_uncorrected_one_is_not() -> None:
    # Four arms; old weights sampled, new ones are trained: E_new[r grad log pi] from samples of old (METHODS L-TIS).
    old, rewards = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.0, 1.0, 0.2, 0.7])
    logits = torch.tensor([0.1, -0.3, 0.4, 0.9], requires_grad=True)

    def gradient(weights: torch.Tensor) -> torch.Tensor:
        objective = (weights * rewards * torch.log_softmax(logits, 0)).sum()
        return torch.autograd.grad(objective, logits)[0]

    new = torch.softmax(logits, 0).detach()
    true = gradient(new)
    log_ratios = (new / old).log().double().numpy()
    stale = np.ones(4, dtype=np.bool_)
    unbounded = correction(log_ratios, stale=stale, config=ImportanceConfig(cap=1e6))
    assert torch.allclose(gradient(old * torch.from_numpy(unbounded).float()), true, atol=1e-6)
    assert not torch.allclose(gradient(old), true, atol=1e-2)
    bounded = correction(log_ratios, stale=stale, config=ImportanceConfig(cap=1.5))
    assert not torch.allclose(gradient(old * torch.from_numpy(bounded).float()), true, atol=1e-2)


def test_the_factors_reach_the_loss_and_not_its_denominators() -> None:
    rows = pair_rows(pair_table(ages=[0, 1, 1], shift=0.25))
    sampled = np.array([[c.sum(), r.sum()] for c, r in rows.rollout_logprobs or ()])
    reference = Reference(
        sums=torch.from_numpy(sampled).float() + torch.tensor([[0.0, 0.0], [0.5, 0.0], [4.0, 4.0]]),
        gaps=torch.tensor([[0.0, 0.0], [0.5, 0.0], [4.0, 4.0]]),
    )
    found, said = corrected(rows, reference, ImportanceConfig())
    assert found.correction == pytest.approx([1.0, math.exp(0.5), 3.0], rel=1e-5)
    assert found.totals([0, 1, 2]) == rows.totals([0, 1, 2])
    num_tokens = rows.chosen_lengths + rows.rejected_lengths
    assert said["rollout_gap"] == 0.0
    assert said["rollout_gap_stale"] == pytest.approx(8.5 / num_tokens[1:].sum())
    assert said["stale_share"] == pytest.approx(2 / 3)
    assert said["importance_mean"] == pytest.approx((1.0 + math.exp(0.5) + 3.0) / 3, rel=1e-5)


def test_gaps_are_sums_over_the_response_tokens_alone() -> None:
    rows = pair_rows(pair_table(ages=[0, 0], shift=0.0))
    padded = rows.pad([1, 0])
    logprobs = torch.full(padded.token_ids.shape, 7.0)
    for i, row in enumerate([1, 0]):
        for side, sampled in enumerate((rows.rollout_logprobs or ())[row]):
            logprobs[i + 2 * side][padded.mask[i + 2 * side]] = torch.from_numpy(sampled).float() - 0.125
    gaps = rows.rollout_gaps([1, 0], logprobs, padded.mask)
    wanted = [[0.125 * rows.chosen_lengths[row], 0.125 * rows.rejected_lengths[row]] for row in (1, 0)]
    assert gaps.numpy() == pytest.approx(np.array(wanted), rel=1e-5)
