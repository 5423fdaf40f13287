"""Failed answers mended where the critic found fault, and the pairs that prefer them (L-DCR, L-FENCE in the loop)."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.domains.arithmetic import write_answer
from actors.generation import Completion, GenerationRequest
from actors.oversight import Judged
from actors.records import (
    Critique,
    Issue,
    PreferencePair,
    RefinedResponse,
    Response,
    Verdict,
    from_table,
    lineage_id,
    to_table,
)
from actors.refiner import (
    NO_FIX,
    NO_ISSUE,
    TOO_LITTLE_LEFT,
    UNENDED,
    UNWRITABLE,
    Begun,
    RefinementConfig,
    Refiner,
    all_issues,
    first_issue,
    revise_spans,
    share_supported,
)
from cluster.store import read_stage
from tests.fake_pool import FakePool
from tests.fake_roles import (
    RUN,
    FakeCritic,
    FakeRun,
    Settings,
    Weights,
    draw,
    fake_run,
    write_answer_with_skill,
    write_blank_run,
)
from tests.pair_tables import pair_table
from tests.refused_settings import problems_of
from tests.small_records import make_critique, make_query, make_response
from trainers.driver import Stopped
from trainers.feedback.mixed_feedback import MixConfig, error_rates, pair_noise
from trainers.feedback.preferences import PreferenceConfig
from trainers.feedback.selection import SelectionConfig
from trainers.importance import ImportanceConfig
from trainers.loop_state import STAGES
from trainers.plan import cached_base_model
from trainers.progress import StopSignal
from trainers.ranks.update_start import Reference, corrected
from trainers.rows.pairs import pair_rows
from trainers.run_config import load_run_config
from trainers.summary import IterationMetrics, read_metrics

DCR = RefinementConfig(kind="detect_critique_refine")
CLAIMS = RefinementConfig(kind="claim_revision")
MENDING = (("refinement.kind", "claim_revision"), ("loss.kind", "dpo"))
MENDED = ("refinements", "refinement_critiques", "refinement_verdicts")


# -------------------------------------------------------------------------------------------------------- the spans


def issue(text: str, quote: str, fix: str) -> Issue:
    start = text.index(quote)
    return Issue(
        start=start,
        end=start + len(quote),
        quote=quote,
        severity=3,
        category="step",
        explanation="recomputed",
        fix=fix,
    )


def failed(text: str, *critiques: Sequence[Issue], num_marks: int = 4, finish_reason: str = "stop") -> Judged:
    """Return an answer that its critiques fail, the first one surest; a critique without issues can't be read."""
    return Judged(
        query=make_query("q1"),
        response=replace(make_response("r2", query_id="q1", text=text, sample_index=2), finish_reason=finish_reason),
        critiques=tuple(
            replace(
                make_critique(f"c{i}", response_id="r2", query_id="q1", score=0.01 * (i + 1) if issues else None),
                issues=tuple(issues),
                label_logprobs=(math.log(0.9),) * num_marks + (math.log(0.01),),
            )
            for i, issues in enumerate(critiques)
        ),
    )


def refiner(config: RefinementConfig, pool: Any = None, *, max_tokens: int = 48) -> Refiner:
    return Refiner(
        pool, config=config, max_tokens=max_tokens, encode=lambda text: tuple(map(ord, text)), run="test", seed=1
    )


WRONG = "7+6+0=13 4+8+0=12 3+5+1=09 0923"
FIRST, LATER = issue(WRONG, "4+8+0=12", "4+8+1=13"), issue(WRONG, "0923", "0933")


def test_an_answer_is_begun_again_up_to_its_first_flaw_with_the_fix_in_its_place() -> None:
    assert refiner(DCR).begin(failed(WRONG, [FIRST, LATER])) == Begun(text="7+6+0=13 4+8+1=13")
    # Of several critiques the flaw that ends first, which is where the rejected answer is cut.
    item = failed(WRONG, [LATER], [FIRST])
    assert first_issue(item) == FIRST
    assert item.critic_verdict.flaw_end == FIRST.end
    assert refiner(DCR).begin(item) == Begun(text="7+6+0=13 4+8+1=13")


def test_what_is_left_as_it_is_says_why() -> None:
    for config in (DCR, CLAIMS):
        assert refiner(config).begin(failed(WRONG)) == NO_ISSUE
        assert refiner(config).begin(failed(WRONG, [])) == NO_ISSUE
        assert refiner(config).begin(failed(WRONG, [replace(FIRST, fix=FIRST.quote)])) == NO_FIX
    assert refiner(DCR).begin(failed(WRONG, [replace(FIRST, fix="")])) == NO_FIX
    # Nothing of the learner's says how an answer ends that has no end.
    assert refiner(CLAIMS).begin(failed(WRONG, [FIRST], finish_reason="length")) == UNENDED
    assert isinstance(refiner(DCR).begin(failed(WRONG, [FIRST], finish_reason="length")), Begun)


def test_a_revision_replaces_every_quote_or_takes_it_out_and_says_nothing_else() -> None:
    assert refiner(CLAIMS).begin(failed(WRONG, [FIRST, LATER])) == Begun(text="7+6+0=13 4+8+1=13 3+5+1=09 0933")
    text = "It is red. It is old. It is tall."
    assert revise_spans(text, [issue(text, "It is old.", "")]) == "It is red. It is tall."
    assert revise_spans("a b", [issue("a b", "b", "")]) == "a"
    assert revise_spans("a b", [issue("a b", "a", "")]) == "b"
    assert revise_spans("abc", [issue("abc", "b", "")]) == "ac"


def test_of_flaws_that_overlap_the_surer_critique_s_is_mended() -> None:
    inside = issue(WRONG, "0=12", "x")
    assert all_issues(failed(WRONG, [FIRST], [inside, LATER])) == [FIRST, LATER]
    assert all_issues(failed(WRONG, [inside], [FIRST])) == [inside]


@pytest.mark.parametrize("config", [DCR, CLAIMS])
def test_a_fix_that_takes_a_control_token_leaves_the_answer_as_it_is(config: RefinementConfig) -> None:
    def encode(text: str) -> tuple[int, ...]:
        if "<|end|>" in text:
            raise ValueError("text: got <|end|>, wanted none of the vocabulary's control tokens")
        return tuple(map(ord, text))

    pool = GoesOn(lambda request: "")
    made = Refiner(pool, config=config, max_tokens=48, encode=encode, run="test", seed=1)
    item, other = failed(WRONG, [replace(FIRST, fix="<|end|>")]), failed(WRONG, [FIRST])
    assert made.begin(item) == UNWRITABLE
    assert refine(made, item) == []
    assert pool.asked == []
    assert len(refine(made, other)) == 1


def test_a_revision_that_would_lose_most_claims_is_not_made() -> None:
    text = "a b c d"
    gone = [issue(text, word, "") for word in "abc"]
    # 3 of 4 claims go: 1/4 is left, less than half.
    assert refiner(CLAIMS).begin(failed(text, gone, num_marks=4)) == TOO_LITTLE_LEFT
    assert refiner(CLAIMS).begin(failed(text, gone[:2], num_marks=4)) == Begun(text="c d")
    assert refiner(CLAIMS.model_copy(update={"min_recall": 0.25})).begin(failed(text, gone)) == Begun(text="d")
    nothing_left = CLAIMS.model_copy(update={"min_recall": 0.0})
    assert refiner(nothing_left).begin(failed("a", [issue("a", "a", "")], num_marks=1)) == TOO_LITTLE_LEFT


@given(st.lists(st.tuples(st.sampled_from(["stay", "fix", "go"]), st.integers(0, 99)), min_size=1, max_size=8))
def test_a_revision_s_claims_are_of_the_original_or_of_its_corrections(claims: list[tuple[str, int]]) -> None:
    words = [f"c{i}_{number}" for i, (_, number) in enumerate(claims)]
    become = {"stay": "{}", "fix": "f{}", "go": ""}
    fixes = {word: become[fate].format(word) for word, (fate, _) in zip(words, claims, strict=True)}
    text = " ".join(words)
    flaws = [issue(text, word, fix) for word, fix in fixes.items() if fix != word]
    assert revise_spans(text, flaws).split() == [fix for fix in fixes.values() if fix]
    if not any(not fix for fix in fixes.values()):
        assert revise_spans(text, flaws) == " ".join(fixes.values())


def test_the_score_is_the_share_of_marks_that_support() -> None:
    def said(*probabilities: float, readable: bool = True) -> Critique:
        marks = tuple(math.log(p) for p in probabilities)
        return replace(make_critique(score=0.9 if readable else None), label_logprobs=marks)

    def supported(*critiques: Critique) -> float | None:
        return share_supported(replace(failed(WRONG), critiques=critiques))

    # Three marks of which two support; the label at the end, .01, is none.
    assert supported(said(0.9, 0.2, 0.5, 0.01)) == pytest.approx(2 / 3)
    assert supported(said(0.9, 0.2, 0.5, 0.01), said(0.1, 0.99), said(0.9, 0.9, readable=False)) == 0.5
    assert supported(said(0.99)) is None
    assert supported() is None


# ---------------------------------------------------------------------------------------------------- asking a model


def refine(made: Refiner, *items: Judged, known: Sequence[str] = ()) -> list[RefinedResponse]:
    async def all_of() -> list[RefinedResponse]:
        return [row async for rows in made.refine(items, known=known) for row in rows]

    return asyncio.run(all_of())


class GoesOn(FakePool):
    """A pool whose prompts hold the prefix, one token for a character."""

    async def route(self, requests: Sequence[GenerationRequest]) -> Any:
        prefixes = {request.request_id: request.prefix for request in requests}
        async for chunk in super().route(requests):
            yield [self._with_prefix(done, prefixes[done.request_id]) for done in chunk]

    @staticmethod
    def _with_prefix(done: Completion, prefix: str) -> Completion:
        return replace(done, prompt_token_ids=(*done.prompt_token_ids, *map(ord, prefix)))


def test_the_learner_goes_on_after_the_fix_and_what_came_before_is_kept() -> None:
    pool = GoesOn(lambda request: " 3+5+1=09 0933")
    made = refiner(DCR, pool)
    clean = failed("7+6+0=13")
    (row,) = refine(made, failed(WRONG, [FIRST]), clean)
    right = "7+6+0=13 4+8+1=13 3+5+1=09 0933"
    assert (row.text, row.response_id, row.query_id, row.sample_index) == (right, "r2", "q1", 2)
    assert row.token_ids == (*map(ord, right), 0)
    assert row.finish_reason == "stop"
    (asked,) = pool.asked
    assert asked.messages == make_query("q1").messages
    assert (asked.prefix, asked.temperature, asked.seed) == ("7+6+0=13 4+8+1=13", 0.0, None)
    # What is there already is not asked for again.
    assert refine(made, failed(WRONG, [FIRST]), known=[row.refinement_id]) == []
    assert len(pool.asked) == 1


def test_a_sampled_refinement_has_the_seed_of_its_answer_s_place() -> None:
    pool = GoesOn(lambda request: "")
    refine(refiner(DCR.model_copy(update={"temperature": 1.0}), pool), failed(WRONG, [FIRST]))
    refine(refiner(DCR.model_copy(update={"temperature": 1.0}), pool), failed(WRONG, [LATER]))
    first, second = pool.asked
    assert first.seed == second.seed is not None
    assert first.temperature == 1.0


def test_a_refined_answer_that_is_longer_than_any_sampled_one_has_no_end() -> None:
    rest = " 3+5+1=09 0933"
    length = len("7+6+0=13 4+8+1=13" + rest) + 1
    for max_tokens, finish_reason in ((length, "stop"), (length - 1, "length")):
        (row,) = refine(refiner(DCR, GoesOn(lambda request: rest), max_tokens=max_tokens), failed(WRONG, [FIRST]))
        assert row.finish_reason == finish_reason


def test_a_revision_asks_no_model() -> None:
    pool = GoesOn(lambda request: "never")
    (row,) = refine(refiner(CLAIMS, pool), failed(WRONG, [FIRST, LATER]), failed("7+6+0=13"))
    assert pool.asked == []
    assert row.text == "7+6+0=13 4+8+1=13 3+5+1=09 0933"
    assert row.token_ids == (*map(ord, row.text), 0)


# ----------------------------------------------------------------------------------------------------------- the loop


def go_on(request: GenerationRequest, weights: Weights) -> str:
    """Return an answer; after a prefix the rest of the right one, three times in ten with a wrong last digit."""
    if not request.prefix:
        return write_answer_with_skill(request, weights)
    query = request.messages[-1].content
    op = "+" if "+" in query else "-"
    left, right = map(int, query.split(op))
    rest = write_answer(left, op, right)[len(request.prefix) :]
    if draw("go on", query, request.prefix) < 0.7 or not rest:
        return rest
    return rest[:-1] + str((int(rest[-1]) + 1) % 10)


def of_kind(kind: Any, *, max_share: float = 1.0, **changes: Any) -> Settings:
    config = RefinementConfig(kind=kind, max_share=max_share)
    return Settings(answer=go_on, refinement=config, **changes)


class Killed(Exception):
    """The loop ends here."""


class Ending:
    """Breaks the loop off when a point has been reached often enough; what was durable then is."""

    def __init__(self, point: str, *, num: int) -> None:
        self.left = num
        self._point = point

    def __call__(self, point: str, num: int) -> None:
        if point == self._point:
            self.left -= num
            if self.left <= 0:
                raise Killed(point)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blank_run(tmp_path_factory.mktemp("blank") / RUN)


def run_at(path: Path, blank: Path, settings: Settings, **options: Any) -> FakeRun:
    if not path.exists():
        shutil.copytree(blank, path)
    run = fake_run(path, settings, **options)
    run.finish()
    return run


@pytest.fixture(scope="module", params=["detect_critique_refine", "claim_revision"])
def done(request: pytest.FixtureRequest, blank: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, FakeRun]:
    """A finished run of each kind, without a bound on the share."""
    kind = request.param
    return kind, run_at(tmp_path_factory.mktemp(kind) / RUN, blank, of_kind(kind))


def records(run: FakeRun, stage: str, *, iteration: int = 1) -> list[Any]:
    table = read_stage(run.store.path, stage, iteration=iteration)
    return sorted(from_table(table, STAGES[stage][0]), key=str) if table.num_columns else []


def failing(run: FakeRun, *, iteration: int) -> dict[tuple[str, str], tuple[Response, Verdict, Critique]]:
    """Return the distinct failed answers by query and text: with verdict and critique, the first sample of each."""
    verdicts = {row.response_id: row for row in records(run, "verdicts", iteration=iteration)}
    critiques = {row.response_ids[0]: row for row in records(run, "critiques", iteration=iteration)}
    found: dict[tuple[str, str], tuple[Response, Verdict, Critique]] = {}
    for row in sorted(records(run, "responses", iteration=iteration), key=lambda row: row.sample_index):
        verdict = verdicts[row.response_id]
        if verdict.label == "fail":
            found.setdefault((row.query_id, row.text), (row, verdict, critiques[row.response_id]))
    return found


def test_as_many_are_mended_as_failed_with_a_flaw_to_mend_and_no_other_answer_is_touched(
    done: tuple[str, FakeRun],
) -> None:
    kind, run = done
    asked = [event.request_id for event in run.events if (event.what, event.pool) == ("asked", "rollouts")]
    for iteration in (1, 2):
        mendable = {
            response.response_id: (response, critique)
            for response, _, critique in failing(run, iteration=iteration).values()
            if any(issue.fix != issue.quote for issue in critique.issues)
        }
        rows = records(run, "refinements", iteration=iteration)
        assert {row.response_id for row in rows} == set(mendable)
        assert len(rows) == len(mendable) > 5
        calls = [row.refinement_id for row in rows if row.refinement_id in asked]
        assert len(calls) == (len(rows) if kind == "detect_critique_refine" else 0)
        for row in rows:
            response, critique = mendable[row.response_id]
            flaws = critique.issues
            assert row.text.startswith(response.text[: flaws[0].start] + flaws[0].fix)
            if kind == "claim_revision":
                assert row.text == revise_spans(response.text, flaws)
        # Records of their own: the answers are the ones that were asked for.
        answers = {row.response_id for row in records(run, "responses", iteration=iteration)}
        assert len(answers) == 40
        assert not answers & {row.refinement_id for row in rows}
        for pair in records(run, "pairs", iteration=iteration):
            assert pair.rejected_id in answers


def test_a_refined_pair_passes_where_its_answer_failed_and_is_cut_as_others_are(done: tuple[str, FakeRun]) -> None:
    (kind, run), num_pairs = done, 0
    for iteration in (1, 2):
        mended = {row.refinement_id: row for row in records(run, "refinements", iteration=iteration)}
        said = {row.response_id: row for row in records(run, "refinement_verdicts", iteration=iteration)}
        verdicts = {row.response_id: row for row in records(run, "verdicts", iteration=iteration)}
        responses = {row.response_id: row for row in records(run, "responses", iteration=iteration)}
        pairs = [row for row in records(run, "pairs", iteration=iteration) if row.chosen_id in mended]
        num_pairs += len(pairs)
        for pair in pairs:
            row, answer = mended[pair.chosen_id], responses[pair.rejected_id]
            assert (said[pair.chosen_id].label, verdicts[pair.rejected_id].label) == ("pass", "fail")
            assert pair.margin == said[pair.chosen_id].score - verdicts[pair.rejected_id].score >= 0.5
            assert (pair.chosen, pair.chosen_token_ids) == (row.text, row.token_ids)
            expert = "expert" in (said[pair.chosen_id].source, verdicts[pair.rejected_id].source)
            assert (pair.rejected, pair.source) == (answer.text, "expert" if expert else "critic")
            parents = [pair.chosen_id, pair.rejected_id]
            assert pair.pair_id == lineage_id(RUN, iteration=iteration, stage="pairs", parents=parents)
            assert pair.rejected_token_ids == answer.token_ids[: verdicts[pair.rejected_id].flaw_end]
            assert (pair.age, pair.chosen_logprobs, pair.rejected_logprobs) == (None, None, None)
        if kind == "detect_critique_refine":
            assert all(mended[pair.chosen_id].response_id == pair.rejected_id for pair in pairs)
        else:
            assert len({pair.query_id for pair in pairs}) == len(pairs), "a query's best against its worst, once"
    assert num_pairs > 3


def test_every_failed_answer_ends_in_a_pair_or_is_counted(done: tuple[str, FakeRun]) -> None:
    _, run = done
    for row in read_metrics(run.store.path):
        counts = dict(row.refinement)
        assert counts.pop("failed") == len(failing(run, iteration=row.iteration)) == sum(counts.values())
        mended = {row.refinement_id for row in records(run, "refinements", iteration=row.iteration)}
        pairs = records(run, "pairs", iteration=row.iteration)
        assert counts["refined"] == sum(pair.chosen_id in mended for pair in pairs)
        assert counts["no_fix"]
        assert counts["still_failing"]
        # An answer is rejected once, by whatever pair, and no pair is made again.
        assert counts["paired"]
        assert len({(pair.query_id, pair.rejected) for pair in pairs}) == len(pairs)
        assert len({(pair.query_id, pair.chosen, pair.rejected_token_ids) for pair in pairs}) == len(pairs)
        assert row.pairs_trained == len(pairs)


def test_a_query_has_no_more_pairs_of_both_kinds_than_it_may(blank: Path, tmp_path: Path) -> None:
    settings = of_kind("detect_critique_refine", preferences=PreferenceConfig(max_pairs_per_query=2), num_samples=6)
    run = run_at(tmp_path / RUN, blank, settings)
    pairs, mended = records(run, "pairs"), {row.refinement_id for row in records(run, "refinements")}
    num_of = {query_id: Counter(pair.chosen_id in mended for pair in pairs if pair.query_id == query_id)
              for query_id in {pair.query_id for pair in pairs}}  # fmt: skip
    assert max(num.total() for num in num_of.values()) == 2
    # One of each; two of either kind alone would be there without a bound for both.
    assert {True: 1, False: 1} in num_of.values()
    assert read_metrics(run.store.path)[0].refinement["unpaired"] > 0


@pytest.mark.parametrize("kind", ["detect_critique_refine", "claim_revision"])
def test_every_failed_answer_is_counted_where_pairs_are_left_out_as_well(
    kind: str, blank: Path, tmp_path: Path
) -> None:
    """Noise drops pairs, so does small-loss selection; the share is of what is left."""
    preferences = PreferenceConfig(mix=MixConfig(prior_items=0.1, prior_noise=0.4))
    settings = of_kind(
        kind,
        max_share=0.2,
        preferences=preferences,
        selection=SelectionConfig(drop=0.5, ramp_iterations=1),
        critic=FakeCritic(error_rate=0.7),
        calibration=0.5,
        budget=0.2,
        queries_per_iteration=30,
    )
    run = run_at(tmp_path / RUN, blank, settings)
    causes: Counter[str] = Counter()
    for row in read_metrics(run.store.path):
        mended = {record.refinement_id for record in records(run, "refinements", iteration=row.iteration)}
        pairs = records(run, "pairs", iteration=row.iteration)
        num_refined = sum(pair.chosen_id in mended for pair in pairs)
        counts = dict(row.refinement)
        assert counts.pop("failed") == len(failing(run, iteration=row.iteration)) == sum(counts.values())
        assert counts.get("refined", 0) == num_refined <= 0.2 * len(pairs)
        causes.update(counts)
        causes["large_loss"] += row.pairs_dropped.get("large_loss", 0)
    assert min(causes[cause] for cause in ("refined", "over_share", "large_loss")) > 0
    assert causes["noisy"] > 0 or kind == "claim_revision"


def test_mended_answers_are_no_answers_of_the_learner_s(done: tuple[str, FakeRun], blank: Path, tmp_path: Path) -> None:
    """The first iteration's figures, its experts and what its attack learnt are those of a run that mends nothing."""
    _, run = done
    plain = run_at(tmp_path / RUN, blank, Settings(answer=go_on))
    with_it, without = read_metrics(run.store.path)[0], read_metrics(plain.store.path)[0]

    def figures(row: IterationMetrics) -> dict[str, Any]:
        names = {"live_attack_success", "num_attacks", "critic_agreement", "experts_asked", "num_verdicts", "cells"}
        return row.model_dump(include=names)

    assert figures(with_it) == figures(without)
    assert without.refinement == {}
    assert without.pairs_dropped == with_it.pairs_dropped
    for stage in ("queries", "responses", "critiques", "verdicts"):
        assert records(plain, stage) == records(run, stage)
    for stage in MENDED:
        assert records(run, stage)
        assert not records(plain, stage)
    assert sum(with_it.sample_ages.values()) == 2 * with_it.pairs_trained - with_it.refinement["refined"]
    before = [pair.pair_id for pair in records(plain, "pairs")]
    assert [pair.pair_id for pair in records(run, "pairs") if pair.pair_id in before] == before


def test_refined_pairs_are_at_most_their_share_of_all(blank: Path, tmp_path: Path) -> None:
    run = run_at(tmp_path / RUN, blank, of_kind("detect_critique_refine", max_share=0.1))
    for row in read_metrics(run.store.path):
        num_refined = row.refinement.get("refined", 0)
        others = row.pairs_trained - num_refined
        # x of x + n are a tenth when x is n / 9.
        assert num_refined == others // 9
        assert row.refinement["over_share"] > 0


def test_where_every_answer_fails_refined_pairs_are_all_there_is_unless_a_share_is_asked_for(
    blank: Path, tmp_path: Path
) -> None:
    def stumble(request: GenerationRequest, weights: Weights) -> str:
        query = request.messages[-1].content
        op = "+" if "+" in query else "-"
        left, right = map(int, query.split(op))
        whole = write_answer(left, op, right)
        return whole[len(request.prefix) :] if request.prefix else whole[:-1] + str((int(whole[-1]) + 1) % 10)

    for share, refined in ((1.0, True), (0.5, False)):
        settings = of_kind("detect_critique_refine", max_share=share, iterations=1, oversight="single")
        settings = replace(settings, answer=stumble, critic=FakeCritic(error_rate=0.0))
        run = run_at(tmp_path / str(share) / RUN, blank, settings)
        (row,) = read_metrics(run.store.path)
        assert row.pairs_trained == row.refinement.get("refined", 0)
        assert (row.pairs_trained > 0, row.refinement.get("over_share", 0) == 0) == (refined, refined)
    assert RefinementConfig(kind="claim_revision").max_share == 1.0


def test_no_refined_pair_prefers_what_an_expert_has_failed(blank: Path, tmp_path: Path) -> None:
    """The learner's one mistake is where it always goes on to; the critic passes it half the time, no expert does."""

    def slip(request: GenerationRequest, weights: Weights) -> str:
        query = request.messages[-1].content
        op = "+" if "+" in query else "-"
        left, right = map(int, query.split(op))
        if not request.prefix and draw("slip", query, request.seed) < 0.5:
            return write_answer_with_skill(request, (-1.0, *weights[1:]))
        whole = write_answer(left, op, right)
        return (whole[:-1] + str((int(whole[-1]) + 1) % 10))[len(request.prefix) :]

    settings = of_kind("detect_critique_refine", critic=FakeCritic(error_rate=0.5), budget=0.35)
    run = run_at(tmp_path / RUN, blank, replace(settings, answer=slip, queries_per_iteration=20))
    num_overruled = 0
    for row in read_metrics(run.store.path):
        responses = {one.response_id: one for one in records(run, "responses", iteration=row.iteration)}
        judged: dict[tuple[str, str], list[Verdict]] = {}
        for verdict in records(run, "verdicts", iteration=row.iteration):
            judged.setdefault((verdict.query_id, responses[verdict.response_id].text), []).append(verdict)
        said = {one.response_id: one for one in records(run, "refinement_verdicts", iteration=row.iteration)}
        asked = {one.response_ids[0] for one in records(run, "refinement_critiques", iteration=row.iteration)}
        mended = {one.refinement_id: one for one in records(run, "refinements", iteration=row.iteration)}
        for name, verdict in said.items():
            key = verdict.query_id, mended[name].text
            # The fake critic says the same of the same text, so that equal answers have one verdict between them.
            labels = {(one.label, one.source) for one in judged.get(key, ())}
            assert labels in (set(), {(verdict.label, verdict.source)})
            assert (name in asked) == (not labels)
        for pair in records(run, "pairs", iteration=row.iteration):
            verdicts = judged.get((pair.query_id, pair.chosen), ())
            assert not any((one.label, one.source) == ("fail", "expert") for one in verdicts)
        num_overruled += row.refinement.get("overruled", 0)
    assert num_overruled > 0


def test_refined_pairs_state_the_noise_of_their_two_verdicts(blank: Path, tmp_path: Path) -> None:
    preferences = PreferenceConfig(mix=MixConfig(critic_weight=0.5))
    settings = of_kind("detect_critique_refine", iterations=1, preferences=preferences, calibration=0.5, budget=0.2)
    run = run_at(tmp_path / RUN, blank, settings)
    mended = {row.refinement_id for row in records(run, "refinements")}
    pairs = [pair for pair in records(run, "pairs") if pair.chosen_id in mended]
    verdicts = {row.response_id: row for row in records(run, "verdicts")}
    said = {row.response_id: row for row in records(run, "refinement_verdicts")}
    rates = error_rates(run.driver.state.checked, preferences.mix)  # type: ignore[arg-type]
    assert len(pairs) >= 2
    for pair in pairs:
        chosen, rejected = said[pair.chosen_id], verdicts[pair.rejected_id]
        experts = "expert" in (chosen.source, rejected.source)
        assert (pair.weight, pair.noise) == (3.0 if experts else 0.5, pair_noise(rates.of(chosen), rates.of(rejected)))
    assert {pair.weight for pair in pairs} == {0.5, 3.0}


@pytest.mark.parametrize(
    "point", ["responses 1 #30", "refinements 1", "refinement_critiques 1 #6", "refinement_verdicts 1", "pairs 1"]
)
def test_a_run_broken_off_while_it_mends_makes_the_same_pairs(
    done: tuple[str, FakeRun], point: str, blank: Path, tmp_path: Path
) -> None:
    kind, whole = done
    name, _, num = point.partition(" #")
    ending = Ending(name, num=int(num or 1))
    with pytest.raises(Killed):
        run_at(tmp_path / RUN, blank, of_kind(kind, iterations=1), reach=ending)
    resumed = run_at(tmp_path / RUN, blank, of_kind(kind, iterations=1, arrival_seed=5))
    for stage in ("verdicts", *MENDED, "pairs"):
        assert records(resumed, stage) == records(whole, stage) != []
    first = Path("policies") / "v000001" / "policy.json"
    assert (resumed.store.path / first).read_bytes() == (whole.store.path / first).read_bytes()
    assert read_metrics(resumed.store.path)[0].refinement == read_metrics(whole.store.path)[0].refinement
    if point == "refinement_critiques 1 #6":
        # What was there was not asked for again.
        critiques = records(whole, "refinement_critiques")
        asked = {event.request_id for event in resumed.events if event.what == "asked"}
        assert sum(row.critique_id in asked for row in critiques) <= len(critiques) - 6


@pytest.mark.parametrize("point", ["refinement_verdicts 1", "pairs 1"])
def test_what_was_lost_stays_lost_once_the_verdicts_of_the_mended_are_stored(
    point: str, blank: Path, tmp_path: Path
) -> None:
    """The pools that lost some requests answer all of them after the resume."""
    settings = of_kind("detect_critique_refine", queries_per_iteration=30, iterations=1)
    lossy = replace(settings, losing=frozenset({"rollouts", "critic"}))
    whole = run_at(tmp_path / "whole" / RUN, blank, lossy)
    with pytest.raises(Killed):
        run_at(tmp_path / RUN, blank, lossy, reach=Ending(point, num=1))
    resumed = run_at(tmp_path / RUN, blank, settings)
    for stage in (*MENDED, "pairs"):
        assert records(resumed, stage) == records(whole, stage) != []
    found, wanted = (read_metrics(run.store.path)[0] for run in (resumed, whole))
    assert found.refinement == wanted.refinement
    assert found.refinement["refined"] == found.pairs_trained - sum(
        pair.chosen_id in {row.response_id for row in records(resumed, "responses")}
        for pair in records(resumed, "pairs")
    )
    for stage in ("refinements", "refinement critiques"):
        assert found.lost[stage] == wanted.lost[stage] > 0
    mended = {row.refinement_id for row in records(resumed, "refinements")}
    critiques = {row.critique_id for row in records(resumed, "refinement_critiques")}
    asked = {event.request_id for event in resumed.events if event.what == "asked"}
    assert not asked & (mended | critiques)


@pytest.mark.parametrize("point", ["refinements 1", "refinement_critiques 1"])
def test_a_stop_while_answers_are_mended_loses_nothing_of_it(
    done: tuple[str, FakeRun], point: str, blank: Path, tmp_path: Path
) -> None:
    (kind, whole), stop = done, StopSignal()
    with pytest.raises(Stopped):
        run_at(
            tmp_path / RUN,
            blank,
            of_kind(kind, iterations=1),
            reach=lambda reached, num: stop.request() if reached == point else None,
            stop=stop,
        )
    resumed = run_at(tmp_path / RUN, blank, of_kind(kind, iterations=1, arrival_seed=5))
    for stage in (*MENDED, "pairs"):
        assert records(resumed, stage) == records(whole, stage) != []


def test_answers_that_are_too_old_are_not_mended(blank: Path, tmp_path: Path) -> None:
    """With an age of 1 allowed all are young enough; the older ones among them are not where mending is held to 0."""
    settings = of_kind("detect_critique_refine", max_policy_age=1, iterations=3, step_s=0.02)
    run = run_at(tmp_path / "allowed" / RUN, blank, settings)
    rows = read_metrics(run.store.path)
    assert all(1 in row.sample_ages for row in rows[1:])
    for row in rows:
        counts = dict(row.refinement)
        assert counts.pop("failed") == len(failing(run, iteration=row.iteration)) == sum(counts.values())
        assert counts["refined"] > 0
        assert sum(row.sample_ages.values()) == 2 * row.pairs_trained - counts["refined"]
    shutil.copytree(blank, tmp_path / RUN)
    held = fake_run(tmp_path / RUN, settings)
    batches = held.driver._batches
    assert batches.refining is not None
    held.driver._batches = replace(batches, refining=replace(batches.refining, max_age=0))
    held.finish()
    for iteration in (1, 2, 3):
        verdicts = records(held, "verdicts", iteration=iteration)
        fail = {verdict.response_id for verdict in verdicts if verdict.label == "fail"}
        found = [row for row in records(held, "responses", iteration=iteration) if row.response_id in fail]
        young = {row.response_id: row for row in found if row.policy_version == f"v{iteration - 1}"}
        assert read_metrics(held.store.path)[iteration - 1].refinement.get("failed", 0) == len(
            {(row.query_id, row.text) for row in young.values()}
        )
        assert {row.response_id for row in records(held, "refinements", iteration=iteration)} <= young.keys()
        assert iteration == 1 or len(young) < len(found)


def test_requests_that_are_lost_are_missing_and_counted(blank: Path, tmp_path: Path) -> None:
    settings = of_kind("detect_critique_refine", losing=frozenset({"rollouts", "critic"}), queries_per_iteration=30)
    run = run_at(tmp_path / RUN, blank, settings)
    rows = read_metrics(run.store.path)
    assert sum(row.lost.get("refinements", 0) for row in rows) == sum(row.refinement.get("lost", 0) for row in rows) > 0
    lost_critiques = sum(row.lost.get("refinement critiques", 0) for row in rows)
    assert lost_critiques == sum(row.refinement.get("unjudged", 0) for row in rows) > 0


def test_a_critic_that_babbles_fails_nothing_so_that_nothing_is_mended(blank: Path, tmp_path: Path) -> None:
    critic = FakeCritic(error_rate=0.0, babble_rate=1.0)
    settings = of_kind("detect_critique_refine", critic=critic, oversight="single", iterations=1)
    run = run_at(tmp_path / RUN, blank, settings)
    assert read_metrics(run.store.path)[0].refinement == {}
    assert not records(run, "refinements")


# ---------------------------------------------------------------------------------------------------- what trains on it


def test_pairs_that_nobody_sampled_are_left_alone_by_the_correction_of_others() -> None:
    table = pair_table(ages=[1, 1, 0], shift=0.25)
    pairs = from_table(table, PreferencePair)
    pairs[1] = replace(pairs[1], age=None, chosen_logprobs=None, rejected_logprobs=None)
    rows = pair_rows(to_table(pairs, PreferencePair))
    alone = pair_rows(table)
    assert rows.rollout_logprobs is not None
    assert alone.rollout_logprobs is not None
    assert [len(responses) for responses in rows.rollout_logprobs] == [2, 0, 2]
    padded = rows.pad([0, 1, 2])
    logprobs = torch.full(padded.token_ids.shape, -1.0)
    gaps, whole = (some.rollout_gaps([0, 1, 2], logprobs, padded.mask) for some in (rows, alone))
    assert gaps[1].tolist() == [0.0, 0.0]
    assert torch.equal(gaps[[0, 2]], whole[[0, 2]])
    assert bool(whole[1].all())
    sampled = np.array([[c.sum(), r.sum()] for c, r in alone.rollout_logprobs])
    reference = Reference(sums=torch.from_numpy(sampled).float() + torch.tensor([[0.5, 0.0]] * 3), gaps=gaps)
    for applies_to, last in (("stale", 1.0), ("all", math.exp(0.5))):
        found, said = corrected(rows, reference, ImportanceConfig(applies_to=applies_to))  # type: ignore[arg-type]
        assert found.correction == pytest.approx([math.exp(0.5), 1.0, last], rel=1e-5)
    tokens = alone.num_response_tokens
    assert said["rollout_gap"] == pytest.approx(float(gaps[2].sum() / tokens[2]), rel=1e-6)
    assert said["rollout_gap_stale"] == pytest.approx(float(gaps[0].sum() / tokens[0]), rel=1e-6)
    assert pair_rows(to_table([pairs[1]], PreferencePair)).rollout_logprobs is None


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[refinement]\nkind = "claim_revision"\n[loss]\nkind = "sft"\n',
         'a.toml:2: refinement.kind: got "claim_revision" with loss.kind = "sft", wanted a loss of pairs, such as dpo'),
        ('[refinement]\nkind = "claim_revision"\n[loss]\nkind = "kto"\n',
         'a.toml:2: refinement.kind: got "claim_revision" with loss.kind = "kto", wanted a loss of pairs, such as dpo'),
        ('[refinement]\nkind = "detect_critique_refine"\n[oversight]\nkind = "shuffled"\n[loss]\nkind = "dpo"\n',
         'a.toml:2: refinement.kind: got "detect_critique_refine" with oversight.kind = "shuffled", wanted escalation '
         "or single: the fixes are the critic's, so that the control would learn from what the critic wrote"),
        ('[refinement]\nkind = "claim_revision"\n[objectives]\nweights = [0.5, 0.5]\n[loss]\nkind = "modpo"\n'
         "weights = [0.5, 0.5]\n",
         'a.toml:2: refinement.kind: got "claim_revision" with a section [objectives], wanted one of the two: the '
         "objectives score the learner's answers, not mended ones"),
        ('[refinement]\nkind = "claim_revision"\nmax_share = 0\n[loss]\nkind = "dpo"\n',
         "a.toml:3: refinement.max_share: got 0, wanted more than 0"),
        ('[refinement]\nmax_share = 0.5\n', "a.toml:1: refinement.kind: got nothing, wanted a value: it has no "
         "default"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert problems_of(text, tmp_path) == [message]


@pytest.mark.parametrize("oversight", ["experts_only", "majority"])
def test_no_control_learns_from_fixes(oversight: str, tmp_path: Path) -> None:
    text = f'[refinement]\nkind = "claim_revision"\n[oversight]\nkind = "{oversight}"\n[loss]\nkind = "dpo"\n'
    (message,) = problems_of(text, tmp_path)
    assert f'oversight.kind = "{oversight}"' in message


def test_refinement_is_off_unless_asked_for_by_a_flag() -> None:
    assert load_run_config([]).refinement is None
    assert load_run_config([], flags=MENDING).refinement == CLAIMS


def test_a_run_that_mends_begins_with_the_base_model_of_one_that_does_not() -> None:
    plain, mending = load_run_config([]), load_run_config([], flags=MENDING)
    assert cached_base_model(mending) == cached_base_model(plain)
