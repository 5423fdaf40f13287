"""Pairs as unpaired responses: which rows they become, what is mismatched with what, and flagged spans of documents."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from trainers.batches import pair_rows, token_rows

PAIRS = {
    "prompt_token_ids": [[7, 8, 9], [10, 11], [12]],
    "chosen_token_ids": [[20, 21], [22, 23, 24], [26, 2]],
    "rejected_token_ids": [[30, 31, 32, 33], [34], [35, 36, 2]],
    "weight": [1.0, 0.5, 2.0],
}


def test_a_pair_is_a_desirable_and_an_undesirable_row_of_its_weight() -> None:
    rows = pair_rows(pa.table(PAIRS))
    padded = rows.pad([0, 2])
    logprobs = -torch.arange(1.0, 1.0 + padded.mask.numel(), dtype=torch.float64).view(padded.mask.shape)
    reference = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], dtype=torch.float64)
    batch = rows.unpaired_batch(
        [0, 2], logprobs=logprobs, mask=padded.mask, totals=rows.totals([0, 1, 2]), reference=reference
    )
    assert batch.desirable.tolist() == [True, True, False, False]
    assert batch.weights is not None
    assert batch.weights.tolist() == [1.0, 2.0, 1.0, 2.0]
    assert batch.lengths.tolist() == [2.0, 2.0, 4.0, 3.0]
    # Chosen of rows 0 and 2, then their rejected.
    assert batch.reference.tolist() == [-1.0, -3.0, -2.0, -4.0]
    assert padded.token_ids[1].tolist()[:3] == [12, 26, 2]
    # Row 1 of a table 7 wide: positions 8 to 14, of which the second and third are its response.
    assert batch.policy[1].item() == -(9 + 10)
    # Each pair of the step counts twice: 2 * (1 + 0.5 + 2).
    assert batch.global_weight == 7.0


def test_mismatched_rows_have_the_next_rows_responses_in_the_steps_order() -> None:
    rows = pair_rows(pa.table(PAIRS))
    mismatched = rows.mismatched([2, 0, 1])
    assert [ids.tolist() for ids in mismatched.chosen] == [[12, 20, 21], [7, 8, 9, 22, 23, 24], [10, 11, 26, 2]]
    # The first prompt's sequence would have 5 tokens, the greatest length is 7: nothing is cut.
    assert [ids.tolist() for ids in mismatched.rejected] == [[12, 30, 31, 32, 33], [7, 8, 9, 34], [10, 11, 35, 36, 2]]
    assert mismatched.chosen_masks[0].tolist() == [False, True, True]
    assert mismatched.weights.tolist() == [2.0, 1.0, 0.5]
    assert mismatched.rejected_lengths.tolist() == [4, 1, 3]
    assert mismatched.lengths.tolist() == [5, 6, 5]


def test_a_mismatched_sequence_is_no_longer_than_the_tables_longest() -> None:
    table = {
        "prompt_token_ids": [[7] * 6, [8]],
        "chosen_token_ids": [[20], [21] * 4],
        "rejected_token_ids": [[22], [23]],
    }
    mismatched = pair_rows(pa.table(table)).mismatched([0, 1])
    assert mismatched.chosen[0].tolist() == [7] * 6 + [21]
    assert mismatched.chosen_lengths.tolist() == [1, 1]


def test_a_lone_row_has_nothing_to_be_mismatched_with() -> None:
    assert pair_rows(pa.table(PAIRS)).mismatched([1]).weights.tolist() == [0.0]


def test_noise_that_no_row_states_is_not_known() -> None:
    def noise(values: list[float]) -> torch.Tensor | None:
        rows = pair_rows(pa.table({**PAIRS, "noise": values}))
        padded = rows.pad([0, 1, 2])
        return rows.batch(
            [0, 1, 2],
            logprobs=torch.zeros(padded.mask.shape),
            mask=padded.mask,
            totals=rows.totals([0, 1, 2]),
            reference=torch.zeros(3, 2),
        ).noise

    assert noise([0.0, 0.0, 0.0]) is None
    found = noise([0.0, 0.25, 0.0])
    assert found is not None
    assert found.tolist() == [0.0, 0.25, 0.0]


def test_a_label_that_tells_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1 has a noise of 0\.5 or more"):
        pair_rows(pa.table({**PAIRS, "noise": [0.1, 0.5, 0.0]}))


def test_flagged_tokens_reach_the_batch_with_their_count_over_the_step() -> None:
    table = pa.table(
        {
            "prompt_token_ids": [[1, 2], [3]],
            "response_token_ids": [[4, 5, 6], [7, 8]],
            "flagged": [[False, True, True], [True, False]],
            "weight": [2.0, 1.0],
        }
    )
    rows = token_rows(table)
    padded = rows.pad([1, 0])
    totals = rows.totals([0, 1])
    batch = rows.batch([1, 0], logprobs=torch.zeros(padded.mask.shape), mask=padded.mask, totals=totals)
    assert batch.flagged is not None
    assert batch.flagged.tolist() == [[False, True, False, False, False], [False, False, False, True, True]]
    assert batch.global_flagged_tokens == totals.flagged_tokens == 2 * 2 + 1
    without = token_rows(table.drop_columns(["flagged"]))
    assert without.batch([0], logprobs=torch.zeros(1, 5), mask=padded.mask[1:], totals=totals).flagged is None
    with pytest.raises(ValueError, match="flagged: wanted one for each token of the response"):
        token_rows(table.set_column(2, "flagged", pa.array([[True], [True, False]])))
