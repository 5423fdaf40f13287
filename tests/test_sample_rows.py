"""Scored responses become batches for the policy-gradient losses: what stands where, and who is left out."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
import torch

from trainers.losses import TokenBatch, grpo, load_loss, ppo, relc, rloo
from trainers.policy_gradient import PolicyLoss
from trainers.ranks.update_start import each_row_once, estimated
from trainers.rows.samples import SampleRows, sample_rows
from trainers.training_group import TrainingPlan


def table(**columns: Any) -> pa.Table:
    """Four responses to two queries: 2, 1, 3 and 1 tokens behind a prompt of 1 or 2."""
    given = {
        "query_id": ["q1", "q0", "q1", "q0"],
        "prompt_token_ids": [[5], [6, 7], [5], [6, 7]],
        "response_token_ids": [[8, 9], [8], [8, 8, 9], [9]],
        "score": [1.0, 0.0, 0.0, 1.0],
    }
    return pa.table({name: values for name, values in (given | columns).items() if values is not None})


OLD = torch.tensor([[0, -1.0, -2.0, 0], [0, 0, -0.5, 0], [0, -1.0, -1.5, -0.1], [0, 0, -0.7, 0]], dtype=torch.float32)
"""Log-probs at an update's start."""


def batch_of(rows: SampleRows, chosen: list[int]) -> TokenBatch:
    padded = rows.pad(chosen)
    return rows.batch(chosen, logprobs=torch.zeros(padded.mask.shape), mask=padded.mask, totals=rows.totals(range(4)))


def test_columns_of_numbers_stand_on_the_responses_tokens() -> None:
    rows = sample_rows(
        table(
            response_logprobs=[[-1.1, -2.1], [-0.6], [-1.1, -1.6, -0.2], [-0.8]],
            reference_logprobs=[[-1.0, -1.0], [-1.0], [-2.0, -2.0, -2.0], [-3.0]],
            segment_rewards=[[0.0, 1.0], [0.0], [0.0, -1.0, 0.0], [0.0]],
            finish_reason=["stop", "stop", "length", "stop"],
            age=[0, 1, 2, 0],
        )
    )
    assert rows.rollout_logprobs is not None
    assert rows.segment_rewards is not None
    wanted = torch.tensor([[0, -1.1, -2.1, 0], [0, 0, -0.6, 0], [0, -1.1, -1.6, -0.2], [0, 0, -0.8, 0]])
    torch.testing.assert_close(rows.rollout_logprobs, wanted)
    assert rows.segment_rewards[2].tolist() == [0, 0, -1, 0]
    samples = rows.samples(OLD)
    assert samples.mask.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]
    assert samples.groups[0] == samples.groups[2] != samples.groups[1] == samples.groups[3]
    assert samples.ended.tolist() == [True, True, False, True]
    torch.testing.assert_close(samples.log_ratios()[2], torch.tensor([0, 1.0, 0.5, 1.9]))


def test_advantages_and_log_probs_go_to_their_rows_cut_to_the_micro_batch() -> None:
    rows, said = estimated(sample_rows(table()), OLD, loss=policy("rloo"), config=rloo.Config())
    assert said == {
        "score": 0.5,
        "unscored_share": 0.0,
        "left_out_share": 0.0,
        "equal_scores_share": 0.0,
        "reference_kl_per_response": 0.0,
    }
    batch = batch_of(rows, [3, 0])
    assert batch.advantages is not None
    assert batch.old_logprobs is not None
    # Groups of two: each score minus the other's. Both rows have three tokens.
    assert batch.advantages.tolist() == [[0, 0, 1], [0, 1, 1]]
    torch.testing.assert_close(batch.old_logprobs, OLD[[3, 0], :3])
    assert batch.rollout_logprobs is None
    assert batch.returns is None
    assert (batch.global_tokens, batch.global_rows) == (7.0, 4.0)
    empty = batch_of(rows, [])
    assert empty.advantages is not None
    assert empty.advantages.tolist() == [[0, 0]]
    assert not empty.mask.any()


def policy(name: str) -> PolicyLoss:
    loss = load_loss(name)
    assert isinstance(loss, PolicyLoss)
    return loss


@pytest.mark.parametrize("missing", [None, math.nan])
def test_responses_without_a_score_weigh_nothing_and_are_counted(missing: float | None) -> None:
    given = sample_rows(table(score=[1.0, 0.0, 0.0, missing], weight=[2.0, 1.0, 1.0, 5.0]))
    rows, said = estimated(given, OLD, loss=policy("grpo"), config=grpo.Config())
    assert said["unscored_share"] == 0.25
    assert said["score"] == pytest.approx(1 / 3)
    assert said["left_out_share"] == 0.25
    assert said["equal_scores_share"] == 0.25  # the one whose group has no other score
    assert rows.totals(range(4)).weight == 4.0
    batch = batch_of(rows, [3])
    assert batch.weights is not None
    assert batch.weights.tolist() == [0.0]
    # DAPO leaves out the whole group, for one score has nothing to differ from.
    _, dapo = estimated(given, OLD, loss=policy("grpo"), config=grpo.Config(form="dapo"))
    assert dapo["left_out_share"] == 0.5


def test_the_gap_to_the_rollout_engine_is_told_for_fresh_and_stale_samples_apart() -> None:
    given = sample_rows(table(response_logprobs=[[-1.1, -2.3], [-0.6], [-1.0, -1.5, -0.1], [-0.7]], age=[0, 3, 0, 0]))
    _, said = estimated(given, OLD, loss=policy("rloo"), config=rloo.Config())
    assert said["stale_share"] == 0.25
    assert said["rollout_gap"] == pytest.approx(0.4 / 6)
    assert said["rollout_gap_stale"] == pytest.approx(0.1)


def test_methods_that_need_what_a_table_lacks_say_so() -> None:
    with pytest.raises(ValueError, match="without segment rewards"):
        estimated(sample_rows(table()), OLD, loss=policy("relc"), config=relc.Config())
    with pytest.raises(ValueError, match="wanted value_head = true"):
        estimated(sample_rows(table()), OLD, loss=policy("ppo"), config=ppo.Config())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"score": None}, "no column 'score'"),
        ({"query_id": None}, "no column 'query_id'"),
        ({"score": [1.0, 0.0, math.inf, 0.0]}, r"row 2 has an infinite score"),
        (
            {"response_logprobs": [[-1.0], [-1.0], [-1.0] * 3, [-1.0]]},
            "row 0 has response_logprobs: wanted one for each",
        ),
        ({"response_token_ids": [[8], [], [8], [8]]}, "row 1 has an empty response"),
    ],
)
def test_tables_that_are_no_scored_samples_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_rows(table(**columns))


def test_every_row_is_evaluated_once_and_as_the_first_epoch_has_it() -> None:
    plan = TrainingPlan.of(list("abcdefg"), batch_size=3, epochs=2, seed=0)
    assert list(each_row_once(plan, num_rows=7)) == [step.rows for step in plan.steps[:3]]
    second = TrainingPlan(row_ids=plan.row_ids, steps=(plan.steps[0], *plan.steps[3:]))
    first, rest = each_row_once(second, num_rows=7)
    assert first == plan.steps[0].rows
    assert sorted(first + rest) == list(range(7))
