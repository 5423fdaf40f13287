"""How far an update moves the weights (H-KLB): the divergence, what it is measured on, and when it is too much."""

from __future__ import annotations

import weakref

import pyarrow as pa
import pytest
import ray
import torch
from torch import Tensor

from trainers.batches import TrainingPlan
from trainers.kl import KlBudget
from trainers.losses import dpo, load_loss
from trainers.ranks.deepspeed_worker import DeepSpeedRank, TableRef, _Update
from trainers.ranks.kl_probe import KlProbe, KlReached, distributions, divergence, exceeded, probe_rows
from trainers.rows.documents import token_rows
from trainers.rows.pairs import pair_rows
from trainers.rows.samples import sample_rows

P, Q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
PAIRS = pa.table(
    {
        "prompt_token_ids": [[1, 2], [3], [4, 5, 6]],
        "chosen_token_ids": [[7, 8], [9], [10, 0]],
        "rejected_token_ids": [[11], [12, 13, 14], [15]],
    }
)
"""The second pair's longer response makes the other one's padding; a response may end in token 0."""


def test_the_divergence_is_that_of_categorical_distributions() -> None:
    """METHODS H-KLB: identical 0; analytic categorical KL. L-KL's p and q: 0.0252672."""
    found = divergence(torch.stack([P, P]).log(), torch.stack([Q, P]).log())
    assert found.tolist() == pytest.approx([0.0252672, 0.0], abs=1e-7)
    assert found[1] == 0.0


def test_the_divergence_is_finite_where_a_token_is_impossible_under_both() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    # 0.5 log 2 + 0.5 log(2 / 3)
    assert divergence(p, q).item() == pytest.approx(0.5 * 0.6931472 - 0.5 * 0.4054651, abs=1e-6)
    assert divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()).item() == torch.inf


def test_the_divergence_of_logits_has_a_closed_form() -> None:
    """Logits (a, 0) and (b, 0): KL = sigma(a)(a - b) - log(1 + e^a) + log(1 + e^b)."""
    a, b = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    wanted = torch.sigmoid(a) * (a - b) - torch.log1p(a.exp()) + torch.log1p(b.exp())
    p, q = (torch.stack([x, x * 0]).log_softmax(0)[None] for x in (a, b))
    assert divergence(p, q).item() == pytest.approx(wanted.item(), abs=1e-12)


def test_distributions_are_those_that_predict_the_targets() -> None:
    """Logits at t are of the token at t + 1."""
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[False, False, True, True], [False, True, False, False]])
    found = distributions(logits, mask, temperature=2.0)
    wanted = torch.stack([logits[0, 1], logits[0, 2], logits[1, 0]])
    torch.testing.assert_close(found, (wanted / 2.0).log_softmax(-1))


def test_probe_rows_are_the_first_responses_of_the_shuffled_plan() -> None:
    plan = TrainingPlan.of(["a", "b", "c"], batch_size=1, epochs=2, seed=0)
    first, second, _ = (step.rows[0] for step in plan.steps[:3])
    rows = pair_rows(PAIRS)
    found = probe_rows(rows, plan, num_sequences=3)  # whole pairs: four
    assert [ids.tolist() for ids in found.token_ids] == [
        side[row].tolist() for row in (first, second) for side in (rows.chosen, rows.rejected)
    ]
    assert found.num_targets.tolist() == [
        lengths[row] for row in (first, second) for lengths in (rows.chosen_lengths, rows.rejected_lengths)
    ]
    # No more than there are, and no row twice for two epochs.
    assert len(probe_rows(rows, plan, num_sequences=100).lengths) == 6


def test_probe_rows_take_samples_and_documents_too() -> None:
    table = pa.table(
        {
            "prompt_token_ids": [[1, 2], [3]],
            "response_token_ids": [[7, 8], [9]],
            "query_id": ["q", "q"],
            "score": [1.0, 0.0],
        }
    )
    plan = TrainingPlan.of(["a", "b"], batch_size=2, epochs=1, seed=0)
    wanted = sorted([[1, 2, 7, 8], [3, 9]])
    for rows in (sample_rows(table), token_rows(table)):
        assert sorted(ids.tolist() for ids in probe_rows(rows, plan, num_sequences=9).token_ids) == wanted


def of(probabilities: Tensor) -> list[Tensor]:
    return [probabilities.log()[None]]


def test_a_probe_sums_over_a_responses_tokens_and_averages_over_responses() -> None:
    rows = token_rows(pa.table({"prompt_token_ids": [[1], [2]], "response_token_ids": [[3], [4]]}))
    probe = KlProbe(KlBudget(enabled=True), rows, start=of(P), first=of(Q))
    assert probe.note(probe.sums(of(P))) == pytest.approx((0.0, 0.0252672 / 2), abs=1e-7)
    # Two ranks have a response each; their sums are added.
    assert probe.note(probe.sums(of(P)) + probe.sums(of(P))).run == pytest.approx(0.0252672, abs=1e-7)
    fresh = KlProbe(KlBudget(enabled=True), rows, start=of(Q), first=None)
    assert fresh.note(fresh.sums(of(P))) == pytest.approx((0.0252672 / 2,) * 2, abs=1e-7)
    # A rank without a response of its own.
    assert KlProbe(KlBudget(), rows, start=[], first=None).sums([]).tolist() == [0.0, 0.0]


def test_a_budget_is_spent_beyond_it_and_says_which() -> None:
    budget = KlBudget(enabled=True, update=1.0, run=2.0)
    assert exceeded(KlReached(update=1.0, run=2.0), budget) is None
    assert exceeded(KlReached(update=1.1, run=2.1), budget) == "update"
    assert exceeded(KlReached(update=0.5, run=2.1), budget) == "run"
    assert exceeded(KlReached(update=float("nan"), run=0.0), budget) == "update"
    assert exceeded(KlReached(update=0.0, run=float("inf")), budget) == "run"


def test_it_is_measured_every_so_many_steps_and_at_the_end() -> None:
    rows = token_rows(pa.table({"prompt_token_ids": [[1]], "response_token_ids": [[3]]}))
    probe = KlProbe(KlBudget(enabled=True, every=3), rows, start=of(P), first=None)
    assert [probe.is_due(step, is_last=step == 7) for step in range(8)] == [step in (2, 5, 7) for step in range(8)]


def test_the_defaults_are_those_of_the_method() -> None:
    assert (KlBudget().update, KlBudget().run, KlBudget().enabled) == (10.0, 30.0, False)


def test_an_update_that_was_ended_early_is_let_go_before_the_next_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = TrainingPlan.of(["a", "b", "c"], batch_size=1, epochs=1, seed=0)
    rows = pair_rows(PAIRS)
    probe = KlProbe(KlBudget(enabled=True), probe_rows(rows, plan, num_sequences=2), start=of(P), first=None)
    held = weakref.ref(probe)
    rank = DeepSpeedRank(rank=0, num_ranks=1, threads=torch.get_num_threads())
    rank._update = _Update(
        plan=plan, loss=load_loss("dpo"), loss_config=dpo.Config(), rows=rows, reference=None, probe=probe
    )
    del probe
    seen: list[KlProbe | None] = []

    def fetched(_: object) -> pa.Table:
        seen.append(held())
        return PAIRS.slice(1)

    monkeypatch.setattr(ray, "get", fetched)
    with pytest.raises(ValueError, match="rows"):  # the plan's are three
        rank.begin_update(TableRef(ref=None), plan=plan, loss="dpo", loss_config=dpo.Config())  # type: ignore[arg-type]
    assert seen == [None]
