"""Plans, layouts and padded batches: numbers derived by hand on small tables."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.training_step import made_up_pairs
from trainers.batches import TrainingPlan, lay_out, micro_batches
from trainers.rows.documents import sequence_rows, token_rows
from trainers.rows.pairs import pair_rows

THREE = [([7, 8, 9], [20, 21], [30, 31]), ([10, 11], [22, 23], [34]), ([12], [26, 2], [35])]
"""Pairs: prompt, chosen, rejected."""


def pair_table(pairs: list[tuple[list[int], list[int], list[int]]], **columns: list[float]) -> pa.Table:
    prompts, chosen, rejected = zip(*pairs, strict=True)
    return pa.table(
        {"prompt_token_ids": prompts, "chosen_token_ids": chosen, "rejected_token_ids": rejected, **columns}
    )


# ------------------------------------------------------------------------------------------------------------- plan


def test_every_row_is_in_one_step_of_every_epoch() -> None:
    plan = TrainingPlan.of([f"p{i}" for i in range(10)], batch_size=4, epochs=3, seed=1)
    slots = [slot for step in range(len(plan.steps)) for slot in plan.slots(step)]
    assert len(plan.steps) == 9
    assert Counter((slot.row_id, slot.epoch) for slot in slots) == {
        (f"p{i}", e): 1 for i in range(10) for e in range(3)
    }
    assert [step.epoch for step in plan.steps] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_steps_of_an_epoch_differ_by_one_row_at_most() -> None:
    # 65 rows at 64 would be 64 + 1; they are 32 + 33.
    plan = TrainingPlan.of([f"p{i}" for i in range(65)], batch_size=64, epochs=1, seed=0)
    assert [len(step.rows) for step in plan.steps] == [32, 33]


def test_the_plan_depends_on_the_ids_and_not_on_the_order_of_the_table() -> None:
    ids = [f"p{i}" for i in range(20)]
    plan = TrainingPlan.of(ids, batch_size=8, epochs=2, seed=3)
    turned = TrainingPlan.of(ids[::-1], batch_size=8, epochs=2, seed=3)
    for step in range(len(plan.steps)):
        assert list(plan.slots(step)) == list(turned.slots(step))


def test_epochs_and_seeds_shuffle_differently() -> None:
    ids = [f"p{i}" for i in range(20)]
    plan, other = (TrainingPlan.of(ids, batch_size=20, epochs=2, seed=seed) for seed in (0, 1))
    assert plan.steps[0].rows != plan.steps[1].rows
    assert plan.steps[0].rows != other.steps[0].rows


def test_rows_with_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="two rows have the id 'b'"):
        TrainingPlan.of(["a", "b", "c", "b"], batch_size=2, epochs=1, seed=0)


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 rows"):
        TrainingPlan.of([], batch_size=2, epochs=1, seed=0)


# ----------------------------------------------------------------------------------------------------------- layout


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    num_ranks=st.integers(1, 4),
    limit=st.integers(16, 400),
    sequences=st.sampled_from([1, 2]),
)
def test_a_layout_holds_every_row_once_within_its_bounds(
    lengths: list[int], num_ranks: int, limit: int, sequences: int
) -> None:
    sizes = np.array(lengths)
    layout = lay_out(
        range(len(lengths)),
        lengths=sizes,
        num_ranks=num_ranks,
        micro_batch_tokens=limit,
        sequences_per_row=sequences,
    )
    micros = [micro for rank in layout for micro in rank]
    assert sorted(row for micro in micros for row in micro) == list(range(len(lengths)))
    assert len({len(rank) for rank in layout}) == 1
    for micro in micros:
        assert len(micro) <= 1 or max(sizes[list(micro)]) * len(micro) * sequences <= limit
    loads = [sum(int(sizes[row]) for micro in rank for row in micro) for rank in layout]
    assert max(loads) - min(loads) <= max(lengths)


def test_rows_of_like_length_are_padded_together() -> None:
    # Two long rows and four short ones: one micro-batch of six would compute 600 tokens, two compute 200 + 40.
    layout = lay_out(range(6), lengths=np.array([100, 10, 10, 100, 10, 10]), num_ranks=1, micro_batch_tokens=4096)
    assert layout == (((0, 3), (1, 2, 4, 5)),)


def test_a_rank_without_rows_gets_an_empty_micro_batch() -> None:
    layout = lay_out([0], lengths=np.array([10]), num_ranks=2, micro_batch_tokens=64)
    assert layout == (((0,),), ((),))


def test_typical_batches_compute_at_most_a_tenth_of_padding() -> None:
    generator = random.Random(0)
    lengths = np.array([generator.randrange(20, 120) for _ in range(96)])
    layout = lay_out(range(96), lengths=lengths, num_ranks=2, micro_batch_tokens=4096)
    padded = sum(int(max(lengths[list(micro)])) * len(micro) for rank in layout for micro in rank if micro)
    assert lengths.sum() / padded >= 0.9


# ----------------------------------------------------------------------------------------------------------- passes


def cut_pairs(num: int, *, chosen: int, rejected: int) -> pa.Table:
    """Pairs whose sequences have so many tokens each, the prompt's two included."""
    return pair_table([([1, 2], [3] * (chosen - 2), [4] * (rejected - 2)) for _ in range(num)])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_of_the_demos_mix_have_about_equally_many_tokens(num_ranks: int) -> None:
    rows = pair_rows(made_up_pairs(320, num_tokens=100))
    plan = TrainingPlan.of([str(row) for row in range(320)], batch_size=16, epochs=2, seed=0)
    most = total = 0
    for step in plan.steps:
        ranks = micro_batches(rows, step.rows, num_ranks=num_ranks, micro_batch_tokens=4096)
        tokens = [sum(rows.pad(micro.rows).num_real_tokens for micro in rank) for rank in ranks]
        most, total = most + max(tokens), total + sum(tokens)
    assert 1.0 <= most * num_ranks / total <= 1.05


def test_pairs_with_short_rejected_responses_are_computed_in_two_passes() -> None:
    # Together 8 x 40 = 320 tokens; apart 4 x 40 + 4 x 20 = 240: 80 saved, for one pass that costs 64.
    rows = pair_rows(cut_pairs(4, chosen=40, rejected=20))
    [[micro]] = micro_batches(rows, range(4), num_ranks=1, micro_batch_tokens=4096)
    assert micro.num_passes == 2
    padded = rows.pad(micro.rows, num_passes=2)
    assert [(part.sequences.tolist(), part.length) for part in padded.passes] == [
        ([0, 1, 2, 3], 40),
        ([4, 5, 6, 7], 20),
    ]
    assert padded.num_padded_tokens == padded.num_real_tokens == 240
    assert rows.pad(micro.rows).num_padded_tokens == 320


def test_a_second_pass_that_saves_less_than_it_costs_is_not_made() -> None:
    # 4 x 60 + 4 x 45: 60 saved.
    rows = pair_rows(cut_pairs(4, chosen=60, rejected=45))
    [[micro]] = micro_batches(rows, range(4), num_ranks=1, micro_batch_tokens=4096)
    assert micro.num_passes == 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=24),
    num_ranks=st.integers(1, 3),
    limit=st.integers(64, 2000),
)
def test_ranks_make_equally_many_passes_over_all_sequences(
    lengths: list[tuple[int, int]], num_ranks: int, limit: int
) -> None:
    rows = pair_rows(pair_table([([1], [2] * a, [3] * b) for a, b in lengths]))
    ranks = micro_batches(rows, range(len(lengths)), num_ranks=num_ranks, micro_batch_tokens=limit)
    assert len({tuple(micro.num_passes for micro in rank) for rank in ranks}) == 1
    for micro in (micro for rank in ranks for micro in rank):
        padded = rows.pad(micro.rows, num_passes=micro.num_passes)
        assert len(padded.passes) == micro.num_passes
        taken = [sequence for part in padded.passes for sequence in part.sequences.tolist()]
        assert sorted(taken) == list(range(len(padded.token_ids)))
        for part in padded.passes:
            assert not padded.mask[part.sequences, part.length :].any()
        assert padded.num_real_tokens <= padded.num_padded_tokens <= rows.pad(micro.rows).num_padded_tokens


# ------------------------------------------------------------------------------------------------------------- rows


def test_targets_of_a_pair_are_the_tokens_of_its_responses() -> None:
    rows = pair_rows(pair_table([([1, 2], [3, 4, 5], [6]), ([7], [8], [9, 10])], weight=[1.0, 0.5]))
    padded = rows.pad([0, 1])
    assert padded.token_ids.tolist() == [[1, 2, 3, 4, 5], [7, 8, 0, 0, 0], [1, 2, 6, 0, 0], [7, 9, 10, 0, 0]]
    assert padded.mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert padded.num_real_tokens == 5 + 2 + 3 + 3
    # Weights 1 and 0.5 on 3 and 1 chosen tokens.
    assert rows.totals([0, 1]) == (1.5, 3.5, 0.0)


def test_a_pair_batch_sums_the_log_probs_of_each_response() -> None:
    rows = pair_rows(pair_table([([1], [2, 3], [4]), ([1], [5], [6, 7])], margin=[0.5, 0.25]))
    padded = rows.pad([0, 1])
    logprobs = torch.tensor([[9.0, -1, -2], [9, -3, 9], [9, -4, 9], [9, -5, -6]])
    batch = rows.batch(
        [0, 1], logprobs=logprobs, mask=padded.mask, totals=rows.totals([0, 1]), reference=torch.zeros(2, 2)
    )
    assert batch.policy_chosen.tolist() == [-3.0, -3.0]
    assert batch.policy_rejected.tolist() == [-4.0, -11.0]
    assert batch.chosen_lengths.tolist() == [2.0, 1.0]
    assert batch.margins is not None
    assert batch.margins.tolist() == [0.5, 0.25]


def test_noise_that_no_row_states_is_not_known() -> None:
    def noise(values: list[float]) -> torch.Tensor | None:
        rows = pair_rows(pair_table(THREE, noise=values))
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
        pair_rows(pair_table(THREE, noise=[0.1, 0.5, 0.0]))


def test_targets_of_a_document_are_its_response_or_its_loss_mask() -> None:
    columns = {"prompt_token_ids": [[1, 2], []], "response_token_ids": [[3, 4], [5, 6, 7]]}
    plain = token_rows(pa.table(columns)).pad([0, 1])
    # The first token of all has no predictor.
    assert plain.mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    masked = token_rows(pa.table({**columns, "loss_mask": [[1, 1, 0, 1], [1, 0, 1]]})).pad([0, 1])
    assert masked.mask.int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]


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


def test_the_dummy_of_a_rank_without_rows_weighs_nothing() -> None:
    rows = pair_rows(pair_table([([1], [2], [3])]))
    padded = rows.pad([])
    batch = rows.batch(
        [], logprobs=torch.zeros(2, 2), mask=padded.mask, totals=rows.totals([0]), reference=torch.zeros(1, 2)
    )
    assert padded.token_ids.shape == (2, 2)
    assert padded.num_real_tokens == 0
    assert batch.live_weights().tolist() == [0.0]


def test_slices_of_a_table_are_read_as_what_they_show() -> None:
    table = pair_table([([1], [2], [3]), ([4, 5], [6], [7]), ([8], [9], [10])]).slice(1, 1)
    assert pair_rows(table).pad([0]).token_ids.tolist() == [[4, 5, 6], [4, 5, 7]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pair_table([([1], [2], [3]), ([1], [], [3])]), "row 1 has an empty chosen"),
        (pair_table([([1], [2], [3])], weight=[-1.0]), "a weight of -1.0, wanted a finite number >= 0"),
        (pair_table([([1], [2], [3])]).drop(["rejected_token_ids"]), "no column 'rejected_token_ids'"),
    ],
)
def test_a_table_of_bad_pairs_is_refused(table: pa.Table, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_rows(table)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_token_ids": [[1]], "response_token_ids": [[]]}, "row 0 has no token to learn from"),
        (
            {"prompt_token_ids": [[1]], "response_token_ids": [[2]], "loss_mask": [[1]]},
            "loss_mask has 1 entries, wanted one for each of 2",
        ),
    ],
)
def test_a_table_of_bad_documents_is_refused(columns: dict[str, list[list[int]]], message: str) -> None:
    table = pa.table({name: pa.array(rows, pa.list_(pa.int64())) for name, rows in columns.items()})
    with pytest.raises(ValueError, match=message):
        token_rows(table)


def test_a_sequence_of_one_token_has_no_log_prob() -> None:
    with pytest.raises(ValueError, match="sequence 1: got 1 tokens"):
        sequence_rows([[1, 2], [3]])
