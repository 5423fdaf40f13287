"""Groups of scored responses become batches: whole, ragged, the same loss and gradient however a step is cut."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from trainers.batches import micro_batches
from trainers.importance import ImportanceConfig
from trainers.logprobs import sequence_logprobs, token_logprobs
from trainers.losses import GroupBatch, LossOutput, load_loss
from trainers.ranks.update_start import Reference, corrected, rows_for
from trainers.rows.groups import GroupRows, group_rows

VOCABULARY = 17
LOSSES = pytest.mark.parametrize("name", ["pro", "exo_group"])


def table(**columns: Any) -> pa.Table:
    """Three groups of 3, 1 and 2 responses."""
    given = {
        "row_id": ["q0", "q1", "q2"],
        "prompt_token_ids": [[5], [6, 7], [8, 9, 10]],
        "responses_token_ids": [[[11, 12], [13], [14, 15, 16]], [[12, 13]], [[11], [12, 13, 14, 15]]],
        "rewards": [[0.9, 0.1, 0.5], [0.4], [0.2, 0.7]],
        "weight": [1.0, 0.5, 2.0],
    }
    return pa.table({name: values for name, values in (given | columns).items() if values is not None})


def random_table(num_groups: int, *, seed: int) -> pa.Table:
    generator = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [generator.randrange(VOCABULARY) for _ in range(generator.randrange(least, most))]

    sizes = [generator.randrange(1, 6) for _ in range(num_groups)]
    return pa.table(
        {
            "prompt_token_ids": [ids(1, 6) for _ in sizes],
            "responses_token_ids": [[ids(1, 30) for _ in range(size)] for size in sizes],
            "rewards": [[generator.random() for _ in range(size)] for size in sizes],
            "weight": [0.5 + generator.random() for _ in sizes],
        }
    )


def bigrams(scores: Tensor, token_ids: Tensor) -> Tensor:
    """Return [S, T] log-probs of a model that looks at the token before."""
    return token_logprobs(scores[token_ids], token_ids)


def stepped(
    rows: GroupRows, scores: Tensor, reference: Tensor, *, parts: list[tuple[int, ...]], name: str
) -> LossOutput:
    """Return the sum of a step's shares."""
    loss = load_loss(name)
    totals, outputs = rows.totals(range(len(rows.sizes))), []
    for part in parts:
        padded = rows.pad(part)
        logprobs = bigrams(scores, padded.token_ids)
        sums = reference[list(part)] if part else torch.zeros(1, rows.num_responses)
        batch = rows.batch(part, logprobs=logprobs, mask=padded.mask, totals=totals, reference=sums)
        outputs.append(loss.loss(batch, loss.Config()))
    metrics = {key: torch.stack([output.metrics[key] for output in outputs]).sum() for key in outputs[0].metrics}
    return LossOutput(torch.stack([output.loss for output in outputs]).sum(), metrics)


def batch_of(rows: GroupRows, chosen: list[int], logprobs: Tensor | None = None) -> GroupBatch:
    padded = rows.pad(chosen)
    given = torch.zeros(padded.mask.shape) if logprobs is None else logprobs
    reference = torch.zeros(max(1, len(chosen)), rows.num_responses)
    return rows.batch(chosen, logprobs=given, mask=padded.mask, totals=rows.totals(range(3)), reference=reference)


def test_a_row_is_a_group_and_its_responses_stand_one_after_the_other() -> None:
    rows = group_rows(table())
    assert rows.lengths.tolist() == [4, 4, 7]
    assert rows.num_response_tokens.tolist() == [6, 2, 5]
    padded = rows.pad([2, 0])
    assert padded.token_ids.tolist() == [
        [8, 9, 10, 11, 0, 0, 0],
        [8, 9, 10, 12, 13, 14, 15],
        [5, 11, 12, 0, 0, 0, 0],
        [5, 13, 0, 0, 0, 0, 0],
        [5, 14, 15, 16, 0, 0, 0],
    ]
    assert padded.mask.sum(dim=1).tolist() == [1, 4, 2, 1, 3]
    batch = batch_of(rows, [2, 0], -torch.ones(5, 7))
    assert batch.policy.tolist() == [[-1, -4, 0], [-2, -1, -3]]
    assert batch.lengths.tolist() == [[1, 4, 0], [2, 1, 3]]
    torch.testing.assert_close(batch.rewards, torch.tensor([[0.2, 0.7, 0.0], [0.9, 0.1, 0.5]]))
    assert batch.weights is not None
    assert batch.weights.tolist() == [2.0, 1.0]
    assert batch.global_weight == 3.5


def test_a_dummy_has_no_candidate_and_a_gradient_of_zero() -> None:
    rows = group_rows(table())
    padded = rows.pad([])
    scores = torch.zeros(VOCABULARY, VOCABULARY, requires_grad=True)
    for name in ("pro", "exo_group"):
        loss = load_loss(name)
        output = loss.loss(batch_of(rows, [], bigrams(scores, padded.token_ids)), loss.Config())
        assert output.loss.item() == 0.0
        (gradient,) = torch.autograd.grad(output.loss, scores)
        assert not gradient.any()
    assert padded.num_padded_tokens == 0


@LOSSES
@pytest.mark.parametrize(("num_ranks", "micro_batch_tokens"), [(1, 200), (2, 60), (3, 4096)])
def test_a_step_is_the_same_however_it_is_cut_and_no_group_is_split(
    name: str, num_ranks: int, micro_batch_tokens: int
) -> None:
    rows = group_rows(random_table(9, seed=1))
    scores = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores.requires_grad_()
    reference = -10 * torch.rand(9, rows.num_responses, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = stepped(rows, scores, reference, parts=[tuple(range(9))], name=name)
    (gradient,) = torch.autograd.grad(whole.loss, scores)
    layout = micro_batches(rows, range(9), num_ranks=num_ranks, micro_batch_tokens=micro_batch_tokens)
    parts = [micro.rows for rank in layout for micro in rank]
    assert sorted(row for part in parts for row in part) == list(range(9))
    cut = stepped(rows, scores, reference, parts=parts, name=name)
    (same,) = torch.autograd.grad(cut.loss, scores)
    torch.testing.assert_close(cut.loss, whole.loss)
    torch.testing.assert_close(same, gradient)
    for key, value in whole.metrics.items():
        torch.testing.assert_close(cut.metrics[key], value)
    for part in parts:
        if len(part) > 1:
            # Each group counts with its own size, not with the largest.
            assert rows.sizes[list(part)].sum() * rows.lengths[list(part)].max() <= micro_batch_tokens


def test_ranks_are_given_about_equally_many_tokens_though_groups_differ_in_size() -> None:
    rows = group_rows(random_table(64, seed=4))
    layout = micro_batches(rows, range(64), num_ranks=4, micro_batch_tokens=512)
    loads = [sum(rows.pad(micro.rows).num_real_tokens for micro in rank) for rank in layout]
    assert max(loads) <= 1.05 * sum(loads) / 4
    assert len({len(rank) for rank in layout}) == 1


@LOSSES
def test_the_loss_of_a_step_is_the_mean_of_its_groups_by_hand(name: str) -> None:
    rows = group_rows(table())
    scores = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = torch.tensor([[-3.0, -2.0, -6.0], [-4.0, 0.0, 0.0], [-1.0, -9.0, 0.0]], dtype=torch.float64)
    found = stepped(rows, scores, reference, parts=[(0, 1, 2)], name=name)
    columns = table().to_pydict()
    total = 0.0
    for group, (prompt, responses, rewards, weight) in enumerate(
        zip(*(columns[key] for key in ("prompt_token_ids", "responses_token_ids", "rewards", "weight")), strict=True)
    ):
        sums = []
        for response in responses:
            ids = [*prompt, *response]
            steps = range(len(prompt), len(ids))
            sums.append(sum(float(scores[ids[t - 1]].log_softmax(0)[ids[t]]) for t in steps))
        if name == "exo_group":
            h = torch.tensor(sums) - reference[group, : len(sums)]
            log_p = (0.5 * h.double()).log_softmax(0)
            log_q = (torch.tensor(rewards, dtype=torch.float64) / 0.5).log_softmax(0)
            total += weight * float((log_p.exp() * (log_p - log_q)).sum())
            continue
        order = sorted(range(len(sums)), key=lambda i: -rewards[i])
        for place, best in enumerate(order[:-1]):
            later = order[place + 1 :]
            gaps = [rewards[best] - rewards[i] for i in later]
            mean = {i: sums[i] / len(responses[i]) for i in order}
            terms = [mean[best] * max(gaps), *(mean[i] * gap for i, gap in zip(later, gaps, strict=True))]
            total += weight * float(torch.tensor(terms).logsumexp(0) - terms[0])
        total += weight * 0.05 * (len(sums) - 1) ** 2 * -sums[order[0]]
    assert found.loss.item() == pytest.approx(total / 3.5, abs=1e-6)


def test_a_group_that_is_filled_up_costs_what_it_costs_alone() -> None:
    rows = group_rows(table())
    alone = group_rows(table().slice(2, 1))
    padded = rows.pad([2, 0])
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(padded.mask.shape, generator=generator)
    for name in ("pro", "exo_group"):
        loss = load_loss(name)
        whole = batch_of(rows, [2, 0], logprobs)
        only = replace(whole, **{
            key: getattr(whole, key)[:1] for key in ("policy", "reference", "rewards", "lengths", "weights")
        })  # fmt: skip
        bare = alone.batch(
            [0],
            logprobs=logprobs[:2],
            mask=padded.mask[:2],
            totals=rows.totals(range(3)),
            reference=torch.zeros(1, 2),
        )
        assert bare.policy.shape == (1, 2)
        torch.testing.assert_close(loss.loss(only, loss.Config()).loss, loss.loss(bare, loss.Config()).loss)


def test_values_of_sequences_go_to_their_groups() -> None:
    rows = group_rows(table())
    assert rows.by_row([1, 2], torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 0, 0], [2, 3, 0]]
    assert rows.by_row([], torch.tensor([7.0])).tolist() == [[7.0]]


def test_stale_groups_are_weighed_by_the_ratio_of_all_their_responses() -> None:
    sampled = [[[-1.0, -1.0], [-2.0], [-1.0, -1.0, -1.0]], [[-1.0, -0.5]], [[-2.0], [-0.5] * 4]]
    rows = group_rows(table(responses_logprobs=sampled, age=[0, 1, 1]))
    padded = rows.pad([0, 1, 2])
    logprobs = torch.full(padded.mask.shape, 9.0)
    flat = [response for group in sampled for response in group]
    for row, values in enumerate(flat):
        logprobs[row][padded.mask[row]] = torch.tensor(values) + 0.125
    gaps = rows.rollout_gaps([0, 1, 2], logprobs, padded.mask)
    torch.testing.assert_close(gaps, 0.125 * torch.tensor([[2.0, 1.0, 3.0], [2.0, 0, 0], [1.0, 4.0, 0]]))
    sums = rows.by_row([0, 1, 2], sequence_logprobs(logprobs, padded.mask))
    found, said = corrected(rows, Reference(sums=sums, gaps=gaps), ImportanceConfig(cap=1.5))
    # The third's ratio is exp(5 / 8) = 1.87, above the cap.
    assert found.correction == pytest.approx([1.0, np.exp(0.25), 1.5])
    assert said["rollout_gap"] == pytest.approx(0.125)
    assert said["rollout_gap_stale"] == pytest.approx(0.125)
    assert isinstance(found, GroupRows)
    batch = batch_of(found, [1])
    assert batch.weights is not None
    assert batch.weights.item() == pytest.approx(0.5 * np.exp(0.25))
    assert batch.global_weight == 3.5


def test_long_responses_of_all_groups_go_through_the_model_apart_where_that_saves_padding() -> None:
    given = {
        "prompt_token_ids": [[1]] * 2,
        "responses_token_ids": [[[2] * 99, [3], [4]]] * 2,
        "rewards": [[0.1, 0.2, 0.3]] * 2,
    }
    rows = group_rows(pa.table(given))
    assert rows.num_passes([(0, 1)]) == 2
    padded = rows.pad([0, 1], num_passes=2)
    assert [(sorted(part.sequences.tolist()), part.length) for part in padded.passes] == [
        ([0, 3], 100),
        ([1, 2, 4, 5], 2),
    ]
    assert group_rows(table()).num_passes([(0, 1, 2)]) == 1


@LOSSES
def test_a_loss_of_groups_is_given_the_rows_of_a_table_of_groups(name: str) -> None:
    assert isinstance(rows_for(load_loss(name), table(), name=name), GroupRows)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rewards": None}, "no column 'rewards'"),
        ({"prompt_token_ids": [[5], [], [8]]}, "row 1 has an empty prompt"),
        ({"responses_token_ids": [[[11], [], [12]], [[12]], [[11], [12]]]}, "row 0 has no response, or an empty one"),
        ({"responses_token_ids": [[[11], [12], [13]], [], [[11], [12]]]}, "row 1 has no response, or an empty one"),
        ({"rewards": [[0.9, 0.1], [0.4], [0.2, 0.7]]}, "row 0 has 2 rewards, wanted one for each of 3 responses"),
        ({"rewards": [[0.9, 0.1, None], [0.4], [0.2, 0.7]]}, "row 0 has the rewards .*, wanted finite numbers"),
        ({"rewards": [[0.9, 0.1, 0.3], [float("inf")], [0.2, 0.7]]}, "row 1 has the rewards .*, wanted finite numbers"),
        ({"responses_logprobs": [[[-1.0]] * 3, [[-1.0] * 2], [[-1.0], [-1.0] * 4]]}, "row 0 has responses_logprobs"),
        ({"weight": [1.0, -1.0, 1.0]}, "row 1 .*has a weight of -1.0, wanted a finite number >= 0"),
    ],
)  # fmt: skip
def test_tables_that_are_no_groups_are_refused(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_rows(table(**columns))
