"""The archive remembers, the attack aims where the learner fails, the attacker admits what is valid and new."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.archive import Archive, CellRecord
from actors.attacker import AttackCollapsed, Attacked, Attacker, AttackerConfig
from actors.attacks import Outcome
from actors.attacks.quality_diversity import Config, QualityDiversity
from actors.domains.arithmetic import Arithmetic
from actors.domains.arithmetic import Config as ArithmeticConfig
from actors.generation import GenerationRequest
from actors.records import Proposal, Query
from tests.fake_pool import FakePool

DOMAIN = Arithmetic(ArithmeticConfig())
CELLS = DOMAIN.cells()
EASY, HARD = CELLS[0], CELLS[-1]


def outcome(cell: tuple[str, ...], *, judged: int, failed: int, name: str = "q") -> Outcome:
    return Outcome(query_id=name, canonical=name, facets=cell, num_judged=judged, num_failed=failed)


# ------------------------------------------------------------------------------------------------------- the archive


def test_an_archive_counts_queries_successes_and_answers() -> None:
    archive = Archive.empty([EASY, HARD])
    archive.record(EASY, num_judged=[8, 8, 0], num_failed=[4, 3, 0], smoothing=0.7)
    # Half of 8 failed is a success, 3 of 8 is none, and a query without a judged answer is none.
    assert archive.cells[EASY] == CellRecord(
        num_queries=3, num_successes=1, num_judged=16, num_failed=7, fail_share=7 / 16
    )
    assert archive.cells[HARD] == CellRecord()
    assert archive.coverage() == 0.5


def test_new_evidence_outweighs_old_by_the_smoothing() -> None:
    archive = Archive.empty([EASY])
    archive.record(EASY, num_judged=[10], num_failed=[8], smoothing=0.7)
    archive.record(EASY, num_judged=[10], num_failed=[2], smoothing=0.7)
    # 0.3 of the old 0.8 and 0.7 of the new 0.2.
    assert archive.cells[EASY].fail_share == pytest.approx(0.3 * 0.8 + 0.7 * 0.2)


def test_unjudged_answers_leave_the_share_of_failures_alone() -> None:
    archive = Archive.empty([EASY])
    archive.record(EASY, num_judged=[0, 0], num_failed=[0, 0], smoothing=0.7)
    assert archive.cells[EASY].fail_share is None
    archive.record(EASY, num_judged=[4], num_failed=[1], smoothing=0.7)
    archive.record(EASY, num_judged=[0], num_failed=[0], smoothing=0.7)
    assert archive.cells[EASY].fail_share == 0.25
    assert archive.cells[EASY].num_queries == 4


@pytest.mark.parametrize(
    ("judged", "failed", "success"),
    [(8, 4, True), (8, 3, False), (1, 1, True), (7, 4, True), (7, 3, False), (0, 0, False)],
)
def test_an_attack_succeeds_when_half_of_the_judged_answers_fail(judged: int, failed: int, success: bool) -> None:
    assert outcome(EASY, judged=judged, failed=failed).success is success
    archive = Archive.empty([EASY])
    archive.record(EASY, num_judged=[judged], num_failed=[failed], smoothing=1.0)
    assert archive.cells[EASY].num_successes == success


ITERATIONS = st.lists(
    st.lists(
        st.tuples(st.sampled_from(CELLS), st.integers(0, 8), st.integers(0, 8)).map(
            lambda row: (row[0], row[1], min(row[1:]))
        ),
        max_size=6,
    ),
    max_size=5,
)


@settings(deadline=None, max_examples=60)
@given(ITERATIONS, st.integers(0, 2**31))
def test_coverage_never_falls_and_a_restart_from_a_snapshot_is_identical(
    iterations: list[list[tuple[tuple[str, ...], int, int]]], seed: int
) -> None:
    attack = QualityDiversity(Config(), domain=DOMAIN)
    archive = Archive.empty(CELLS)
    coverage = [archive.coverage()]
    for rows in iterations:
        attack.observe(archive, [outcome(cell, judged=judged, failed=failed) for cell, judged, failed in rows])
        for number in range(len(rows)):
            archive.remember(f"{len(coverage)}/{number}")
        coverage.append(archive.coverage())
        weights = attack.weights(archive)
        assert sum(weights) == pytest.approx(1.0)
        assert min(weights) >= 0.3 / len(CELLS)
    assert all(before <= after for before, after in pairwise(coverage))
    assert all(row.fail_share is None or 0.0 <= row.fail_share <= 1.0 for row in archive.cells.values())
    # Through JSON, as it lies in COMMIT.json; with an attack that was made anew.
    restored = Archive.restore(json.loads(json.dumps(archive.snapshot())))
    assert restored == archive
    assert list(restored.cells) == list(archive.cells)
    again = QualityDiversity(Config(), domain=DOMAIN)
    assert again.propose(restored, 20, seed=seed) == attack.propose(archive, 20, seed=seed)


def test_every_cell_is_covered_in_the_end() -> None:
    attack = QualityDiversity(Config(), domain=DOMAIN)
    archive = Archive.empty(CELLS)
    for iteration in range(10):
        prompts = attack.propose(archive, 24, seed=iteration)
        attack.observe(archive, [outcome(prompt.target, judged=8, failed=0) for prompt in prompts])
    assert archive.coverage() == 1.0


# -------------------------------------------------------------------------------------------------------- the attack


def test_weights_are_the_upper_confidence_bounds_by_hand() -> None:
    attack = QualityDiversity(Config(uniform_share=0.3, exploration=0.3), domain=DOMAIN)
    archive = Archive.empty([EASY, HARD])
    archive.cells[EASY] = CellRecord(num_queries=3, num_judged=24, num_failed=12, fail_share=0.5)
    # EASY: 0.5 + 0.3 * sqrt(log 4 / 4) = 0.676612; HARD, never asked: 1. Both and 0.001.
    easy, hard = 0.677612, 1.001
    assert attack.weights(archive) == pytest.approx(
        [0.15 + 0.7 * easy / (easy + hard), 0.15 + 0.7 * hard / (easy + hard)], abs=1e-6
    )


def test_an_archive_that_knows_nothing_is_attacked_evenly() -> None:
    attack = QualityDiversity(Config(), domain=DOMAIN)
    assert attack.weights(Archive.empty(CELLS)) == pytest.approx([1 / 12] * 12)


def test_prompts_are_drawn_by_their_weights() -> None:
    attack = QualityDiversity(Config(), domain=DOMAIN)
    archive = Archive.empty([EASY, HARD])
    archive.record(EASY, num_judged=[100], num_failed=[0], smoothing=1.0)
    weight = attack.weights(archive)[0]
    drawn = [prompt.target for prompt in attack.propose(archive, 10_000, seed=3)]
    # Four standard deviations of a share of 10,000.
    assert drawn.count(EASY) / 10_000 == pytest.approx(weight, abs=4 * math.sqrt(weight * (1 - weight) / 10_000))


def test_a_planted_weakness_draws_the_attack() -> None:
    attack = QualityDiversity(Config(), domain=DOMAIN)
    archive = Archive.empty(CELLS)
    for iteration in range(12):
        prompts = attack.propose(archive, 120, seed=iteration)
        attack.observe(
            archive, [outcome(prompt.target, judged=8, failed=8 if prompt.target == HARD else 0) for prompt in prompts]
        )
    weights = dict(zip(CELLS, attack.weights(archive), strict=True))
    others = max(weight for cell, weight in weights.items() if cell != HARD)
    assert weights[HARD] > 5 * others
    # What is asked evenly keeps every other cell alive.
    assert others > 0.3 / 12


def test_a_weakness_that_was_mended_is_left_again() -> None:
    attack = QualityDiversity(Config(), domain=DOMAIN)
    archive = Archive.empty(CELLS)
    for failed in (8, 0, 0, 0):
        for cell in CELLS:
            attack.observe(archive, [outcome(cell, judged=8, failed=failed if cell == HARD else 0)] * 10)
    weights = dict(zip(CELLS, attack.weights(archive), strict=True))
    assert weights[HARD] < 1.2 * weights[EASY]


def test_the_order_of_outcomes_does_not_matter() -> None:
    rows = [outcome(cell, judged=8, failed=i % 9, name=str(i)) for i, cell in enumerate(CELLS * 3)]
    archives = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        archive = Archive.empty(CELLS)
        QualityDiversity(Config(), domain=DOMAIN).observe(archive, shuffled)
        archives.append(archive.snapshot())
    assert archives[0] == archives[1] == archives[2]


# ------------------------------------------------------------------------------------------------------ the attacker


def attacker_over(pool: FakePool, *, seed: int = 1, config: AttackerConfig | None = None) -> Attacker:
    return Attacker(
        pool,  # type: ignore[arg-type]
        attack=QualityDiversity(Config(), domain=DOMAIN),
        attack_name="quality_diversity",
        domain=DOMAIN,
        config=config or AttackerConfig(),
        run="test",
        seed=seed,
    )


def attacked(
    attacker: Attacker, archive: Archive, *, num_queries: int, split: str = "train", start: int = 0, iteration: int = 1
) -> list[Attacked]:
    async def collect() -> list[Attacked]:
        chunks = attacker.attack(
            archive, iteration=iteration, num_queries=num_queries, split=split, version="v0", start=start
        )
        return [chunk async for chunk in chunks]

    return asyncio.run(collect())


def proposals_of(chunks: Sequence[Attacked]) -> list[Proposal]:
    return [row for chunk in chunks for row in chunk.proposals]


def queries_of(chunks: Sequence[Attacked]) -> list[Query]:
    return [query for chunk in chunks for query in chunk.queries]


def scripted(*texts: str) -> Callable[[GenerationRequest], str]:
    """Return a model that says the texts in the order in which it is asked, then junk."""
    lines: Iterator[str] = iter(texts)
    return lambda request: next(lines, "junk")


def fluent(request: GenerationRequest) -> str:
    """Write a problem of the cell that was asked for, of any split; some texts are junk and some too long."""
    assert request.seed is not None
    rng = random.Random(request.seed)
    draw = rng.randrange(35)
    if draw % 5 == 0:
        return "7+"
    if draw % 7 == 0:
        return "1234+4321"
    cell = next(cell for cell in CELLS if DOMAIN.attack_messages(cell) == request.messages)
    split = rng.choice(["train", "train", "train", "probe", "sealed"])
    return DOMAIN.seeds(cell, split=split, num=1, seed=rng.randrange(8))[0].text


def test_each_proposal_has_the_outcome_that_it_deserves() -> None:
    archive = Archive.empty(CELLS)
    archive.remember("13+39")
    script = {
        "junk": "invalid",
        "1234+4321": "out_of_scope",
        "97+70": "wrong_split",  # probe
        "45+18": "wrong_split",  # sealed
        "93+66": "accepted",
        "66+93": "repeated",  # the same problem, its operands exchanged
        "39+13": "repeated",  # asked in an earlier iteration
        "91+53": "accepted",
        "347+586": "surplus",
        "0093+66": "invalid",
    }
    chunks = attacked(attacker_over(FakePool(scripted(*script))), archive, num_queries=2)
    found = proposals_of(chunks)
    assert {row.text: row.outcome for row in found} == script
    assert [query.messages[-1].content for query in queries_of(chunks)] == ["93+66", "91+53"]
    # What was only surplus may be asked another time.
    assert archive.seen == {"13+39", "66+93", "53+91"}


def test_an_admitted_query_says_where_it_is_from() -> None:
    chunks = attacked(attacker_over(FakePool(fluent)), Archive.empty(CELLS), num_queries=5, iteration=3)
    accepted = [row for row in proposals_of(chunks) if row.query_id is not None]
    assert [row.query_id for row in accepted] == [query.query_id for query in queries_of(chunks)]
    for row, query in zip(accepted, queries_of(chunks), strict=True):
        problem = DOMAIN.parse(row.text)
        assert problem is not None
        assert (query.canonical, query.facets, query.split) == (problem.canonical, problem.facets, "train")
        assert (query.messages, query.domain) == (DOMAIN.learner_messages(row.text), "arithmetic")
        assert (query.iteration, query.attacker_version, query.attack) == (3, "v0", "quality_diversity")


@pytest.mark.parametrize("split", ["train", "probe"])
def test_only_new_problems_of_the_split_and_in_scope_are_admitted(split: str) -> None:
    chunks = attacked(attacker_over(FakePool(fluent)), Archive.empty(CELLS), num_queries=40, split=split)
    queries, rows = queries_of(chunks), proposals_of(chunks)
    assert len(queries) == len({query.canonical for query in queries}) == 40
    problems = [DOMAIN.parse(query.messages[-1].content) for query in queries]
    assert all(problem is not None and problem.split == split and problem.in_scope for problem in problems)
    counts = Counter(row.outcome for row in rows)
    assert counts["accepted"] == 40
    assert min(counts["invalid"], counts["out_of_scope"], counts["wrong_split"], counts["repeated"]) > 0
    # Nothing vanishes: every proposal is in the log, once, under its number.
    assert [row.sample_index for row in rows] == list(range(len(rows)))
    assert len({row.proposal_id for row in rows}) == len(rows)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("arrival_seed", [0, 1])
def test_the_order_of_arrival_changes_nothing(chunk: int, arrival_seed: int) -> None:
    straight, shuffled = Archive.empty(CELLS), Archive.empty(CELLS)
    wanted = attacked(attacker_over(FakePool(fluent)), straight, num_queries=30)
    pool = FakePool(fluent, chunk=chunk, arrival_seed=arrival_seed)
    found = attacked(attacker_over(pool), shuffled, num_queries=30)
    assert proposals_of(found) == proposals_of(wanted)
    assert queries_of(found) == queries_of(wanted)
    assert shuffled == straight


def test_of_two_equal_proposals_the_earlier_is_admitted_even_when_it_comes_later() -> None:
    class Backwards(FakePool):
        async def route(self, requests: Sequence[GenerationRequest]):  # type: ignore[no-untyped-def]  # noqa: ANN202
            chunks = [chunk async for chunk in FakePool.route(self, requests)]
            for chunk in reversed(chunks):
                yield chunk

    texts = ["junk", "93+66", "91+53", "junk", "junk", "66+93", "junk", "junk"]
    rows = proposals_of(attacked(attacker_over(Backwards(scripted(*texts))), Archive.empty(CELLS), num_queries=2))
    assert [(row.text, row.outcome) for row in rows[1:6]] == [
        ("93+66", "accepted"),
        ("91+53", "accepted"),
        ("junk", "invalid"),
        ("junk", "invalid"),
        ("66+93", "repeated"),
    ]


def test_another_seed_asks_for_other_queries() -> None:
    texts = [
        [
            row.text
            for row in proposals_of(
                attacked(attacker_over(FakePool(fluent), seed=s), Archive.empty(CELLS), num_queries=10)
            )
        ]
        for s in (1, 2)
    ]
    assert texts[0] != texts[1]


def test_every_request_has_its_own_seed_and_prompt() -> None:
    pool = FakePool(fluent)
    rows = proposals_of(attacked(attacker_over(pool), Archive.empty(CELLS), num_queries=30))
    assert len({request.seed for request in pool.asked}) == len({r.request_id for r in pool.asked}) == len(pool.asked)
    by_id = {request.request_id: request for request in pool.asked}
    assert all(by_id[row.proposal_id].messages == DOMAIN.attack_messages(row.target) for row in rows)


def test_a_babbling_model_collapses_the_attack() -> None:
    pool = FakePool(lambda request: "babble")
    with pytest.raises(AttackCollapsed, match="0 of 464 proposals were usable in iteration 1, wanted 10 queries"):
        attacked(attacker_over(pool), Archive.empty(CELLS), num_queries=10)
    # 40 proposals for each query that was wanted, and 64.
    assert len(pool.asked) == 40 * 10 + 64


def test_a_model_that_repeats_itself_collapses_the_attack_too() -> None:
    pool = FakePool(lambda request: "93+66")
    with pytest.raises(AttackCollapsed, match=r"1 of 464 .* train the attacker longer"):
        attacked(attacker_over(pool), Archive.empty(CELLS), num_queries=10)


def test_an_attack_that_was_cut_off_goes_on_as_if_it_had_not_been() -> None:
    archive = Archive.empty(CELLS)

    async def cut_off() -> list[Attacked]:
        chunks = []
        stream = attacker_over(FakePool(fluent)).attack(
            archive, iteration=1, num_queries=20, split="train", version="v0"
        )
        async for chunk in stream:
            chunks.append(chunk)
            if len(queries_of(chunks)) >= 8:
                break
        return chunks

    before = asyncio.run(cut_off())
    num_have, num_seen = len(queries_of(before)), len(proposals_of(before))
    # As the driver does it: the archive of the last commit, and the logged queries.
    restored = Archive.empty(CELLS)
    for query in queries_of(before):
        restored.remember(query.canonical)
    after = attacked(attacker_over(FakePool(fluent)), restored, num_queries=20 - num_have, start=num_seen)
    everything = [*queries_of(before), *queries_of(after)]
    assert len(everything) == len({query.canonical for query in everything}) == 20
    assert len({query.query_id for query in everything}) == 20
    rows = [*proposals_of(before), *proposals_of(after)]
    assert [row.sample_index for row in rows] == list(range(len(rows)))
    # The very queries that an attack which nobody cut off would have asked.
    assert everything == queries_of(attacked(attacker_over(FakePool(fluent)), Archive.empty(CELLS), num_queries=20))


def test_a_query_can_be_made_again_from_its_logged_proposal() -> None:
    attacker = attacker_over(FakePool(fluent))
    chunks = attacked(attacker, Archive.empty(CELLS), num_queries=5)
    again = [attacker.query_of(row, version="v0") for row in proposals_of(chunks) if row.query_id is not None]
    assert again == queries_of(chunks)


def test_a_restored_archive_is_attacked_as_the_archive_itself() -> None:
    archive = Archive.empty(CELLS)
    attacker = attacker_over(FakePool(fluent))
    attacked(attacker, archive, num_queries=20)
    attacker.observe(archive, [outcome(cell, judged=8, failed=i % 9) for i, cell in enumerate(CELLS)])
    restored = Archive.restore(json.loads(json.dumps(archive.snapshot())))
    wanted = attacked(attacker, archive, num_queries=20, iteration=2)
    found = attacked(attacker_over(FakePool(fluent)), restored, num_queries=20, iteration=2)
    assert proposals_of(found) == proposals_of(wanted)
    assert queries_of(found) == queries_of(wanted)
