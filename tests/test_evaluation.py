"""Evaluation asks truth about greedy answers and a uniform sample, and counts what the critic said of each cell."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from actors.attacks import Outcome
from actors.domains import GoldLedger, Purpose
from actors.domains.arithmetic import Arithmetic, ArithmeticChecker, Config, write_answer
from actors.generation import GenerationRequest
from actors.records import Query, Response
from actors.rollout import Rollout, RolloutConfig
from tests.fake_pool import FakePool
from tests.small_records import make_query, make_response, make_verdict
from trainers.evaluation import (
    EvaluationConfig,
    LiveSample,
    SetResult,
    agreement_of,
    attack_outcomes,
    cell_counts,
    evaluate,
    evaluation_sets,
    live_sample,
)

DOMAIN = Arithmetic(Config())


def ledger() -> GoldLedger:
    return GoldLedger(ArithmeticChecker(), regime="critic_expert")


def right_or_wrong(request: GenerationRequest) -> str:
    """Answer additions rightly and well, subtractions with the bare right number, 11+11 wrongly."""
    query = request.messages[-1].content
    if query == "11+11":
        return "1+1+0=02 1+1+0=02 023"
    if "+" in query:
        left, right = map(int, query.split("+"))
        return write_answer(left, "+", right)
    left, right = map(int, query.split("-"))
    return str(left - right)


@pytest.mark.parametrize("arrival_seed", [None, 0])
def test_greedy_answers_are_judged_in_the_order_of_their_queries(arrival_seed: int | None) -> None:
    gold = ledger()
    pool = FakePool(right_or_wrong, chunk=2, arrival_seed=arrival_seed)
    rollout = Rollout(pool, config=RolloutConfig(), run="test", seed=1)  # type: ignore[arg-type]
    queries = ["47+86", "11+11", "52-19", "12+34"]
    found = asyncio.run(
        evaluate(rollout, queries, name="probe", domain=DOMAIN, checker=gold.checker_for(Purpose.EVALUATION))
    )
    assert found.correct == (True, False, True, True)
    assert found.well_formed == (True, True, False, True)
    assert found.texts == ("7+6+0=13 4+8+1=13 133", "1+1+0=02 1+1+0=02 023", "33", "2+4+0=06 1+3+0=04 046")
    assert (found.accuracy, found.form) == (0.75, 0.75)
    assert {(request.temperature, request.num_samples) for request in pool.asked} == {(0.0, 1)}
    assert gold.counts == Counter({"evaluation": 4})


def test_shares_are_of_all_problems() -> None:
    found = SetResult(texts=("",) * 8, correct=(True,) * 3 + (False,) * 5, well_formed=(True,) * 8)
    assert (found.accuracy, found.form) == (3 / 8, 1.0)


def test_sets_are_the_same_for_every_run_and_differ_by_their_seed() -> None:
    small = EvaluationConfig(sealed_per_cell=2, probe_per_cell=1, out_of_distribution_per_cell=1)
    sets = evaluation_sets(DOMAIN, small)
    assert {name: len(rows) for name, rows in sets.items()} == {"sealed": 24, "probe": 12, "out_of_distribution": 9}
    assert evaluation_sets(Arithmetic(Config()), small) == sets
    assert evaluation_sets(DOMAIN, small.model_copy(update={"seed": 1})) != sets


# -------------------------------------------------------------------------------------------------- the live sample


def live_world(num: int) -> tuple[dict[str, Query], dict[str, Response]]:
    """Return one query, and responses of which every second is right."""
    texts = ["7+6+0=13 4+8+1=13 133", "7+6+0=13 4+8+0=12 123"]
    rows = [make_response(f"r{i:04d}", text=texts[i % 2], sample_index=i) for i in range(num)]
    return {"q": make_query("q")}, {row.response_id: row for row in rows}


def test_a_live_sample_holds_the_critic_beside_truth() -> None:
    queries, responses = live_world(4)
    scores = {"r0000": 0.9, "r0001": 0.8, "r0002": 0.3, "r0003": None}
    verdicts = [make_verdict(name, score) for name, score in scores.items()]
    gold = ledger()
    found = live_sample(queries, responses, verdicts, size=10, seed=0, checker=gold.checker_for(Purpose.EVALUATION))
    assert sorted(zip(found.response_ids, found.truth, found.passed, found.scores, strict=True)) == [
        ("r0000", True, True, 0.9),
        ("r0001", False, True, 0.8),
        ("r0002", True, False, 0.3),
    ]
    # The unreadable one is missing, and truth is not asked about it.
    assert found.num_unjudged == 1
    assert gold.counts["evaluation"] == 3


def test_a_live_sample_is_uniform_fixed_by_its_seed_and_blind_to_arrival() -> None:
    queries, responses = live_world(200)
    verdicts = [make_verdict(name, i / 200) for i, name in enumerate(responses)]

    def sample(seed: int, *, turned: bool = False) -> LiveSample:
        rows = verdicts[::-1] if turned else verdicts
        checker = ledger().checker_for(Purpose.EVALUATION)
        return live_sample(queries, responses, rows, size=60, seed=seed, checker=checker)

    assert sample(1) == sample(1, turned=True)
    assert sample(1) != sample(2)
    assert len(sample(1).scores) == len(set(sample(1).scores)) == 60
    # Every answer is as likely as another: over 300 samples of 60 in 200 the mean of the scores is 0.4975.
    means = [sum(sample(seed).scores) / 60 for seed in range(300)]
    assert sum(means) / 300 == pytest.approx(0.4975, abs=4 * 0.29 / (60 * 300) ** 0.5)


def test_agreement_is_balanced_accuracy_by_hand() -> None:
    live = LiveSample(
        response_ids=tuple("abcdef"),
        # Good: 3 of 4 passed. Bad: 1 of 2 failed.
        truth=(True, True, True, True, False, False),
        passed=(True, True, True, False, False, True),
        scores=(0.9, 0.8, 0.7, 0.2, 0.1, 0.6),
        items=tuple(("q", text) for text in "abcdef"),
        num_unjudged=3,
    )
    found = agreement_of(live)
    assert found.balanced_accuracy == pytest.approx((0.75 + 0.5) / 2)
    assert (found.false_pass, found.false_fail) == (0.5, 0.25)
    # Of the 8 pairs of a good and a bad answer 7 are in order: 0.2 is below 0.6.
    assert found.auroc == pytest.approx(7 / 8)
    assert (found.num_good, found.num_bad, found.num_unjudged) == (4, 2, 3)


# ------------------------------------------------------------------------------------------- outcomes of the attack


def test_outcomes_count_what_the_critic_judged_and_failed() -> None:
    queries = {name: make_query(name, facets=("+", "2", name)) for name in ("b", "a", "c")}
    verdicts = [
        *(make_verdict(f"a{i}", score, query_id="a") for i, score in enumerate([0.9, 0.1, 0.2, None])),
        *(make_verdict(f"b{i}", score, query_id="b") for i, score in enumerate([0.9, 0.8, 0.2])),
        *(make_verdict(f"c{i}", None, query_id="c") for i in range(2)),
    ]
    found = attack_outcomes(queries, verdicts)
    assert [(o.query_id, o.num_judged, o.num_failed, o.success) for o in found] == [
        ("a", 3, 2, True),
        ("b", 3, 1, False),
        ("c", 0, 0, False),
    ]
    assert [outcome.facets for outcome in found] == [queries[outcome.query_id].facets for outcome in found]


def test_cells_count_passes_and_failures_in_their_declared_order() -> None:
    cells = [("+", "2", "0"), ("+", "2", "1"), ("-", "2", "0")]
    outcomes = [
        Outcome(query_id=name, canonical=name, facets=cell, num_judged=judged, num_failed=failed)
        for name, cell, judged, failed in [("a", cells[1], 8, 3), ("b", cells[1], 4, 4), ("c", cells[0], 8, 0)]
    ]
    found = cell_counts(outcomes, cells)
    assert [(row.facets, row.num_pass, row.num_fail) for row in found] == [
        (cells[0], 8, 0),
        (cells[1], 5, 7),
        (cells[2], 0, 0),
    ]
