"""Judged responses as rows: what each becomes, what is mismatched with what, and how the two sides are weighed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.importance import ImportanceConfig
from trainers.losses import kto
from trainers.ranks.update_start import Reference, corrected, rows_for
from trainers.rows.unpaired import UnpairedRows, partners, unpaired_rows

THUMBS: dict[str, Any] = {
    "prompt_token_ids": [[7, 8, 9], [10, 11], [7, 8, 9], [12]],
    "response_token_ids": [[20, 21], [34], [30, 31, 32, 33], [26, 2]],
    "desirable": [True, False, False, True],
    "weight": [1.0, 0.5, 2.0, 4.0],
}


def batch_of(rows: UnpairedRows, chosen: list[int], *, gap: float = 0.0) -> Any:
    """Return some rows as a step, whose policy is the reference plus a gap for each response token."""
    padded = rows.pad(chosen)
    reference = torch.zeros(max(len(chosen), 1), 1, dtype=torch.float64)
    logprobs = torch.full(padded.mask.shape, gap, dtype=torch.float64)
    return rows.batch(chosen, logprobs=logprobs, mask=padded.mask, totals=rows.totals(chosen), reference=reference)


def test_a_judged_response_is_one_row_with_its_thumb() -> None:
    rows = unpaired_rows(pa.table(THUMBS))
    padded = rows.pad([2, 0])
    assert padded.token_ids.tolist() == [[7, 8, 9, 30, 31, 32, 33], [7, 8, 9, 20, 21, 0, 0]]
    logprobs = -torch.arange(1.0, 15.0, dtype=torch.float64).view(2, 7)
    reference = torch.tensor([[-1.0], [-2.0]], dtype=torch.float64)
    totals = rows.totals([0, 1, 2, 3])
    batch = rows.batch([2, 0], logprobs=logprobs, mask=padded.mask, totals=totals, reference=reference)
    # Positions 4 to 7 of the first row, 11 and 12 of the second.
    assert batch.policy.tolist() == [-(4 + 5 + 6 + 7), -(11 + 12)]
    assert batch.reference.tolist() == [-1.0, -2.0]
    assert batch.desirable.tolist() == [False, True]
    assert batch.lengths.tolist() == [4.0, 2.0]
    assert batch.weights is not None
    assert batch.weights.tolist() == [2.0, 1.0]
    assert batch.global_weight == 7.5
    # Of the whole table, whatever the step: 1 + 4 up, 0.5 + 2 down.
    assert batch.sides() == (5.0, 2.5)


def test_the_dummy_of_a_rank_without_rows_weighs_nothing() -> None:
    batch = batch_of(unpaired_rows(pa.table(THUMBS)), [])
    assert batch.live_weights().tolist() == [0.0]
    assert batch.sides() == (5.0, 2.5)
    output = kto.loss(batch_with_point(batch, 0.0), kto.Config())
    assert output.loss.item() == 0.0


def batch_with_point(batch: Any, point: float) -> Any:
    """Return the batch of a step whose reference point is known."""
    return replace(batch, step_figures=torch.tensor([[point, 1.0]], dtype=torch.float64))


@given(st.lists(st.integers(min_value=0, max_value=5), min_size=1, max_size=30))
def test_no_row_is_matched_within_its_prompt_and_as_many_as_can_be_are_matched(prompts: list[int]) -> None:
    found = partners(prompts)
    matched = [(row, other) for row, other in enumerate(found) if other != row]
    assert all(prompts[row] != prompts[other] for row, other in matched)
    assert len({other for _, other in matched}) == len(matched)
    # A prompt's m rows need m responses of the n - m others.
    most = max(Counter(prompts).values())
    assert len(prompts) - len(matched) == max(0, 2 * most - len(prompts))


def test_a_shift_by_one_would_match_two_answers_to_one_prompt() -> None:
    """A control: what the shift by the greatest multiplicity is for."""
    prompts = ["a", "a", "b", "c"]
    assert any(prompts[row] == prompts[(row + 1) % 4] for row in range(4))
    assert partners(prompts) == [2, 3, 0, 1]


def test_mismatched_rows_have_the_responses_to_other_prompts_in_the_steps_order() -> None:
    # Rows 3, 2, 0, 1 of prompts c, a, a, b: by prompt 3 | 2 0 | 1, shifted by two: 3-0, 2-1, 0-3, 1-2.
    mismatched = unpaired_rows(pa.table(THUMBS)).mismatched([3, 2, 0, 1])
    assert [ids.tolist() for ids in mismatched.documents.token_ids] == [
        [12, 20, 21],
        [7, 8, 9, 34],
        [7, 8, 9, 26, 2],
        [10, 11, 30, 31, 32, 33],
    ]
    assert mismatched.documents.masks[1].tolist() == [False, False, False, True]
    assert mismatched.documents.weights.tolist() == [4.0, 2.0, 1.0, 0.5]
    assert mismatched.documents.num_targets.tolist() == [2, 1, 2, 4]
    assert mismatched.lengths.tolist() == [3, 4, 5, 6]
    assert mismatched.desirable.tolist() == [True, False, True, False]


def test_what_can_not_be_mismatched_weighs_nothing() -> None:
    rows = unpaired_rows(pa.table(THUMBS))
    assert rows.mismatched([1]).documents.weights.tolist() == [0.0]
    assert rows.mismatched([0, 2]).documents.weights.tolist() == [0.0, 0.0]
    # Two of one prompt and a third: 2 * 2 - 3 = 1 has no partner, 0 | 2 | 3 shifted by two: 0-3, 2-0, 3-2.
    assert rows.mismatched([0, 2, 3]).documents.weights.tolist() == [1.0, 0.0, 4.0]


def test_a_step_without_anything_to_mismatch_has_a_reference_point_of_zero() -> None:
    rows = unpaired_rows(pa.table(THUMBS))
    figures = kto.first_pass(mismatched_batch(rows.mismatched([0, 2])), kto.Config())
    assert figures[:, 1].tolist() == [0.0, 0.0]
    output = kto.loss(replace(batch_of(rows, [0, 2]), step_figures=figures), kto.Config())
    assert output.metrics["reference_point"].item() == 0.0
    assert math.isfinite(output.loss.item())


def mismatched_batch(rows: UnpairedRows) -> Any:
    batch = batch_of(rows, list(range(len(rows.lengths))), gap=0.5)
    return replace(batch, mismatched_policy=batch.policy, mismatched_reference=batch.reference)


def test_a_mismatched_sequence_is_no_longer_than_the_tables_longest() -> None:
    table = {"prompt_token_ids": [[7] * 6, [8]], "response_token_ids": [[20], [21] * 4], "desirable": [True, False]}
    mismatched = unpaired_rows(pa.table(table)).mismatched([0, 1])
    assert mismatched.documents.token_ids[0].tolist() == [7] * 6 + [21]
    assert mismatched.documents.num_targets.tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------------- two sides


def many(num_good: int, num_bad: int) -> UnpairedRows:
    num = num_good + num_bad
    return unpaired_rows(
        pa.table(
            {
                "prompt_token_ids": [[row + 1] for row in range(num)],
                "response_token_ids": [[20, 21]] * num,
                "desirable": [True] * num_good + [False] * num_bad,
            }
        )
    )


def test_ten_thumbs_up_and_two_down_are_balanced() -> None:
    """By hand: lambda_U = 10 / 2 = 5, lambda_D = 1. h = 2 * 0.5 = 1 of all, z0 = 0.2.

    A good row costs 0.480011 (the card's), a bad one 1 - sigmoid(0.1 * (0.2 - 1)) = 0.519989.
    """
    rows = many(10, 2)
    output = kto.loss(batch_with_point(batch_of(rows, list(range(12)), gap=0.5), 0.2), kto.Config())
    bad = 1 / (1 + math.exp(0.1 * (0.2 - 1)))
    assert bad == pytest.approx(0.519989, abs=1e-6)
    assert output.loss.item() == pytest.approx((10 * 0.480011 + 2 * 5 * 0.519989) / 12, abs=1e-6)
    assert output.metrics["side_ratio"].item() == pytest.approx(1.0)
    assert output.metrics["desirable_share"].item() == pytest.approx(10 / 12)
    even = kto.Config(desirable_weight=1.0, undesirable_weight=1.0)
    unbalanced = kto.loss(batch_with_point(batch_of(rows, list(range(12)), gap=0.5), 0.2), even)
    assert unbalanced.loss.item() == pytest.approx((10 * 0.480011 + 2 * 0.519989) / 12, abs=1e-6)
    assert unbalanced.metrics["side_ratio"].item() == pytest.approx(5.0)


def test_a_step_is_weighed_as_its_update_is_whatever_its_own_shares() -> None:
    """Steps of 6 up, and of 4 up and 2 down, come to the update's mean; at z0 = h = 0 each row costs a half."""
    rows = many(10, 2)
    first, second = (
        kto.loss(batch_with_point(batch_of(rows, chosen), 0.0), kto.Config()).loss.item()
        for chosen in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])
    )
    assert first == pytest.approx(0.5)
    assert second == pytest.approx((4 * 0.5 + 2 * 5 * 0.5) / 6)


@pytest.mark.parametrize("num_good", [0, 3])
def test_an_update_of_one_side_is_not_weighed_and_has_no_ratio(num_good: int) -> None:
    rows = many(num_good, 3 - num_good)
    output = kto.loss(batch_with_point(batch_of(rows, [0, 1, 2]), 0.0), kto.Config())
    assert output.loss.item() == pytest.approx(0.5)
    assert "side_ratio" not in output.metrics


@pytest.mark.parametrize(
    ("settings", "num_good", "num_bad", "weights"),
    [
        ({}, 10, 2, (1.0, 5.0)),
        ({}, 2, 10, (5.0, 1.0)),
        ({}, 4, 4, (1.0, 1.0)),
        ({}, 4, 0, (1.0, 1.0)),
        ({"desirable_weight": 2.0}, 10, 2, (2.0, 10.0)),
        ({"undesirable_weight": 2.0}, 10, 2, (0.4, 2.0)),
        ({"desirable_weight": 2.0}, 0, 2, (2.0, 1.0)),
        ({"desirable_weight": 1.3, "undesirable_weight": 0.7}, 10, 2, (1.3, 0.7)),
    ],
)
def test_what_is_given_is_taken_and_what_is_not_balances(
    settings: dict[str, float], num_good: int, num_bad: int, weights: tuple[float, float]
) -> None:
    found = kto.side_weights(kto.Config.model_validate(settings), num_desirable=num_good, num_undesirable=num_bad)
    assert found == pytest.approx(weights)


# -------------------------------------------------------------------------------------------------------- old samples


def test_the_factors_of_old_samples_reach_the_loss_and_not_its_denominators() -> None:
    sampled = [[-1.0, -2.0], [-0.5], None, [-1.0, -1.0]]
    table = pa.table({**THUMBS, "age": [0, 1, 1, 2], "response_logprobs": sampled})
    rows = unpaired_rows(table)
    sums = torch.tensor([[-3.0], [0.0], [-9.0], [3.0]])
    gaps = torch.tensor([[0.0], [0.5], [0.0], [5.0]])
    found, said = corrected(rows, Reference(sums=sums, gaps=gaps), ImportanceConfig())
    # Fresh; e^0.5; not known; e^5, cut off at 3.
    assert found.correction == pytest.approx([1.0, math.exp(0.5), 1.0, 3.0])
    assert found.totals([0, 1, 2, 3]) == rows.totals([0, 1, 2, 3])
    assert said["rollout_gap"] == 0.0
    assert said["rollout_gap_stale"] == pytest.approx(5.5 / 3)
    assert isinstance(found, UnpairedRows)
    assert batch_of(found, [1, 3]).weights.tolist() == pytest.approx([0.5 * math.exp(0.5), 4.0 * 3.0])


def test_gaps_are_sums_over_the_response_tokens_alone() -> None:
    table = pa.table({**THUMBS, "response_logprobs": [[-1.0, -2.0], [-0.5], None, [-1.0, -1.0]]})
    rows = unpaired_rows(table)
    padded = rows.pad([0, 2])
    logprobs = torch.full(padded.mask.shape, 7.0)
    logprobs[0][padded.mask[0]] = torch.tensor([-1.25, -1.5])
    assert rows.rollout_gaps([0, 2], logprobs, padded.mask).tolist() == [[0.75], [0.0]]
    unknown = unpaired_rows(pa.table(THUMBS))
    assert unknown.rollout_logprobs is None
    assert unknown.rollout_gaps([0, 2], logprobs, padded.mask).tolist() == [[0.0], [0.0]]


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"desirable": [1, 0, 0, 1]}, "column 'desirable' holds int64, wanted bool"),
        ({"desirable": [True, None, False, None]}, r"row 1 has no thumb.*\(2 such rows of 4\)"),
        ({"prompt_token_ids": [[1], [2], [], [3]]}, "row 2 has an empty prompt"),
        ({"response_token_ids": [[1], [2], [3], []]}, "row 3 has no token to learn from"),
        ({"age": [0, 0, -1, 0]}, "row 2 has an age below 0"),
        ({"weight": [1.0, -1.0, 1.0, 1.0]}, "row 1 has a weight of -1.0, wanted a finite number >= 0"),
        (
            {"response_logprobs": [[-1.0, -1.0], [-1.0], [-1.0], [-1.0, -1.0]]},
            "row 2 has response_logprobs: wanted one",
        ),
    ],
)
def test_a_table_of_bad_rows_is_refused(columns: dict[str, Any], message: str) -> None:
    table = pa.table({**THUMBS, **columns})
    for name in ("prompt_token_ids", "response_token_ids"):
        table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.list_(pa.int64())))
    with pytest.raises(ValueError, match=message):
        unpaired_rows(table)


def test_a_table_of_pairs_is_refused() -> None:
    pairs = {"prompt_token_ids": [[1]], "chosen_token_ids": [[2]], "rejected_token_ids": [[3]]}
    with pytest.raises(ValueError, match="no column 'desirable', have prompt_token_ids, chosen_token_ids"):
        rows_for(kto, pa.table(pairs), name="kto")


def test_a_table_of_no_row_has_none() -> None:
    rows = unpaired_rows(pa.table({name: pa.array(values)[:0] for name, values in THUMBS.items()}))
    assert np.array_equal(rows.lengths, [])
    assert (rows.num_desirable, rows.num_undesirable) == (0.0, 0.0)
