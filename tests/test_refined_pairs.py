"""What is paired of mended answers: whose verdict stands, which answer is rejected, what is left to other pairs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from actors.critic import Critic, CriticConfig
from actors.domains.arithmetic import write_critique
from actors.generation import GenerationRequest
from actors.oversight import Judged
from actors.records import Critique, Issue, RefinedResponse, Verdict, lineage_id
from actors.refiner import RefinementConfig, Refiner
from actors.rubrics import StepMarks
from tests.fake_pool import FakePool
from tests.fake_roles import DOMAIN
from tests.small_records import make_critique, make_query, make_response
from trainers.feedback.preferences import Pairs, PreferenceConfig, build_pairs
from trainers.feedback.refinement import Joined, Refining
from trainers.feedback.selection import agreeing
from trainers.loop_state import Rollouts

RIGHT, WRONG = "7+6+0=13 4+8+1=13 133", "7+6+0=13 4+8+1=13 134"
"""An answer to 47+86, and one whose last digit is wrong."""
LAST = Issue(start=18, end=21, quote="134", severity=3, category="result", explanation="recomputed", fix="133")
NONE = Pairs(pairs=(), dropped={})


class Kept:
    """Stands for a journal."""

    async def add(self, stage: str, rows: Sequence[Any], *, iteration: int) -> None:
        """Take rows."""


def criticise(request: GenerationRequest) -> str:
    query, answer = request.messages[-1].content.split("\n")
    left, right = map(int, query.split("+"))
    return write_critique(left, "+", right, answer)


def refining(kind: Any = "claim_revision", *, min_agreement: float = 0.0) -> tuple[Refining, FakePool]:
    """Return what mends, by corrections alone unless told otherwise, and the pool that its critic asks."""
    pool = FakePool(criticise)
    refiner = Refiner(
        FakePool(lambda request: ""),
        config=RefinementConfig(kind=kind),
        max_tokens=48,
        encode=lambda text: tuple(map(ord, text)),
        run="test",
        seed=1,
    )
    made = Refining(
        refiner=refiner,
        critic=Critic(pool, rubric=StepMarks(DOMAIN), config=CriticConfig(), run="test", seed=1),
        preferences=PreferenceConfig(margin=0.3),
        min_agreement=min_agreement,
        max_age=0,
        tokens_spanning=lambda ids, num_chars: min(num_chars, len(ids)),
        run="test",
        seed=1,
    )
    return made, pool


def critique(name: str, p: float, *, marks: Sequence[float], issues: Sequence[Issue] = (), k: int = 0) -> Critique:
    """Return a critique of P(good) `p` and P(correct) at each mark."""
    logprobs = tuple(math.log(mark) for mark in (*marks, p))
    made = make_critique(f"c{name}/{k}", response_id=name, query_id="q1", score=p)
    return replace(made, issues=tuple(issues), label_logprobs=logprobs)


def answer(
    number: int, text: str, *ps: float, marks: Sequence[float] = (0.9, 0.9, 0.9), issues: Sequence[Issue] = ()
) -> Judged:
    """Return sample `number` of a query, with a critique for each P(good)."""
    name = f"r{number}"
    return Judged(
        query=make_query("q1"),
        response=make_response(name, query_id="q1", text=text, sample_index=number),
        critiques=tuple(critique(name, p, marks=marks, issues=issues, k=k) for k, p in enumerate(ps)),
    )


def failed(number: int = 0) -> Judged:
    """Return the answer that is to be mended to the right one; two of its three marks support it."""
    return answer(number, WRONG, 0.1, marks=(0.9, 0.9, 0.1), issues=[LAST])


def sampled(*items: Judged) -> Rollouts:
    rollouts = Rollouts(iteration=1)
    for item in items:
        rollouts.queries[item.query.query_id] = item.query
        rollouts.responses[item.response.response_id] = item.response
        rollouts.critiques.update({critique.critique_id: critique for critique in item.critiques})
    return rollouts


def by_expert(item: Judged, label: str) -> Verdict:
    score = 1.0 if label == "pass" else 0.0
    return replace(item.critic_verdict, label=label, score=score, confidence=1.0, source="expert")


def joined(made: Refining, rollouts: Rollouts, verdicts: Sequence[Verdict], *, built: Pairs = NONE) -> Joined:
    asyncio.run(made.refine(rollouts, verdicts, journal=Kept(), stop=lambda: None))  # type: ignore[arg-type]
    return made.joined(built, rollouts, verdicts)


def cause_of(found: Joined, made: Refining, item: Judged) -> str | None:
    return found.causes[made.refiner.refinement_id(item)]


# ------------------------------------------------------------------------------------------------- whose verdict stands


@pytest.mark.parametrize("kind", ["claim_revision", "detect_critique_refine"])
def test_a_text_that_nobody_sampled_is_judged_by_the_critic(kind: Any) -> None:
    made, pool = refining(kind)
    item = failed()
    found = joined(made, sampled(item), [item.critic_verdict])
    (pair,) = found.pairs.pairs
    assert (pair.chosen, pair.rejected, pair.source) == (RIGHT, WRONG, "critic")
    assert len(pool.asked) == 1
    assert pair.pair_id == lineage_id("test", iteration=1, stage="pairs", parents=[pair.chosen_id, pair.rejected_id])


@pytest.mark.parametrize("kind", ["claim_revision", "detect_critique_refine"])
@pytest.mark.parametrize(
    ("p", "expert", "cause", "margin", "source"),
    [
        (0.9, "fail", "overruled", None, None),  # the critic would have it preferred to the failed one
        (0.3, "pass", None, 1.0 - 0.1, "expert"),
        (0.8, None, None, 0.8 - 0.1, "critic"),
        (0.3, None, "still_failing", None, None),
    ],
)
def test_a_text_that_was_sampled_too_is_not_judged_again_and_an_expert_s_label_of_it_decides(
    kind: Any, p: float, expert: str | None, cause: str | None, margin: float | None, source: str | None
) -> None:
    made, pool = refining(kind)
    first, other = failed(), answer(1, RIGHT, p)
    said = other.critic_verdict if expert is None else by_expert(other, expert)
    found = joined(made, sampled(first, other), [first.critic_verdict, said])
    assert pool.asked == []
    assert cause_of(found, made, first) == cause
    assert [(pair.chosen, pair.margin, pair.source) for pair in found.pairs.pairs] == (
        [] if margin is None else [(RIGHT, pytest.approx(margin), source)]
    )
    # What is chosen has a verdict of its own, of whoever judged the text, and no expert was asked for it.
    for pair in found.pairs.pairs:
        (own,) = [verdict for verdict in found.verdicts if verdict.response_id == pair.chosen_id]
        assert (own.label, own.source, own.escalated) == ("pass", source, False)


def test_of_equal_answers_judged_both_ways_the_worse_verdict_stands() -> None:
    made, pool = refining()
    items = failed(), answer(1, RIGHT, 0.9), answer(2, RIGHT, 0.4)
    found = joined(made, sampled(*items), [item.critic_verdict for item in items])
    assert cause_of(found, made, items[0]) == "still_failing"
    assert pool.asked == []


def test_a_text_whose_critiques_agreed_too_little_where_it_was_sampled_is_no_better_mended() -> None:
    made, pool = refining(min_agreement=0.7)
    items = failed(), answer(1, RIGHT, 0.9, 0.9, 0.2)  # two of three say what they add up to
    trusted = agreeing(items, [item.critic_verdict for item in items], min_agreement=0.7)
    assert trusted.dropped == {"disagreement": 1}
    found = joined(made, sampled(*items), trusted.verdicts)
    assert cause_of(found, made, items[0]) == "disagreement"
    assert pool.asked == []


def test_a_pair_is_an_expert_s_when_one_failed_what_it_rejects() -> None:
    made, _ = refining()
    item = failed()
    found = joined(made, sampled(item), [by_expert(item, "fail")])
    (pair,) = found.pairs.pairs
    # The critic gives 0.9 to each of its six marks, and P(good) is their product; the expert's 0 is what it grew from.
    assert (pair.source, pair.margin) == ("expert", pytest.approx(0.9**6))


# ----------------------------------------------------------------------------------------------- which one is rejected


def mend(
    made: Refining, rollouts: Rollouts, item: Judged, text: str, p: float, *, marks: Sequence[float]
) -> RefinedResponse:
    """Have an answer mended to a text that the critic has judged."""
    name = made.refiner.refinement_id(item)
    row = RefinedResponse(
        refinement_id=name,
        response_id=item.response.response_id,
        query_id="q1",
        sample_index=item.response.sample_index,
        text=text,
        token_ids=(*map(ord, text), 0),
        policy_version="v0",
        finish_reason="stop",
    )
    rollouts.refined[name] = row
    said = critique(name, p, marks=marks)
    rollouts.refined_critiques[said.critique_id] = said
    return row


def test_a_query_s_best_revision_is_preferred_to_the_worst_answer_as_it_was_sampled() -> None:
    made, _ = refining()
    low = answer(0, "low", 0.1, marks=(0.9, 0.1))  # 1 of 2 claims
    high = answer(1, "high", 0.1, marks=(0.9, 0.9, 0.9, 0.1))  # 3 of 4
    rollouts = sampled(low, high)
    best = mend(made, rollouts, low, "better", 0.9, marks=(0.9, 0.9))
    # Of all four texts this has the least, 1 of 4; it passes, and is no answer that was sampled.
    mend(made, rollouts, high, "worse", 0.8, marks=(0.9, 0.1, 0.1, 0.1))
    verdicts = [low.critic_verdict, high.critic_verdict]
    found = made.joined(NONE, rollouts, verdicts)
    (pair,) = found.pairs.pairs
    assert (pair.chosen_id, pair.rejected_id) == (best.refinement_id, "r0")
    assert (cause_of(found, made, low), cause_of(found, made, high)) == (None, "outdone")


def test_an_answer_that_a_pair_rejects_already_is_left_to_it() -> None:
    good, low = answer(0, "good", 0.9), answer(1, "low", 0.1, marks=(0.9, 0.1))
    high = answer(2, "high", 0.2, marks=(0.9, 0.9, 0.9, 0.1))
    items = good, low, high
    verdicts = [item.critic_verdict for item in items]
    made, _ = refining()
    rollouts = sampled(*items)
    built = build_pairs(
        [good.query],
        rollouts.responses,
        verdicts,
        config=made.preferences,
        run="test",
        tokens_spanning=made.tokens_spanning,
        version=0,
        max_age=0,
    )
    assert [pair.rejected_id for pair in built.pairs] == ["r1"]
    mend(made, rollouts, low, "better", 0.95, marks=(0.9, 0.9))
    found = made.joined(built, rollouts, verdicts)
    # What is left, of the answers that were revised, is nothing.
    assert cause_of(found, made, low) == "paired"
    mend(made, rollouts, high, "worse", 0.2, marks=(0.9, 0.1))
    found = made.joined(built, rollouts, verdicts)
    assert [pair.rejected_id for pair in found.pairs.pairs] == ["r1", "r2"]
    greedy, _ = refining("detect_critique_refine")
    assert cause_of(greedy.joined(built, rollouts, verdicts), greedy, low) == "paired"


def test_texts_that_were_stored_as_both_good_and_bad_make_no_pair() -> None:
    """As a journal has them that was written before verdicts of equal texts were one."""
    made, _ = refining()
    first, second = answer(0, "low", 0.1, marks=(0.9, 0.1)), answer(1, "same", 0.2, marks=(0.9, 0.1, 0.1, 0.1))
    third = answer(2, "same", 0.1, marks=(0.9, 0.9, 0.9, 0.1))
    rollouts = sampled(first, second, third)
    row = mend(made, rollouts, first, "same", 0.9, marks=(0.9,))
    mend(made, rollouts, second, "other", 0.2, marks=(0.9,))
    rollouts.refined_verdicts[row.refinement_id] = replace(
        first.critic_verdict, response_id=row.refinement_id, label="pass", score=0.9
    )
    found = made.joined(NONE, rollouts, [item.critic_verdict for item in (first, second, third)])
    assert cause_of(found, made, first) == "same_text"
    assert found.pairs.pairs == ()


# ------------------------------------------------------------------------------------------------------ what is counted


def test_a_failed_answer_whose_pair_is_left_out_later_says_why() -> None:
    made, _ = refining("detect_critique_refine")
    items = [replace(failed(), query=make_query(f"q{i}")) for i in range(3)]
    rollouts = Rollouts(iteration=1)
    for i, item in enumerate(items):
        response = replace(item.response, response_id=f"r{i}", query_id=f"q{i}")
        said = tuple(replace(one, critique_id=f"c{i}", response_ids=(f"r{i}",)) for one in item.critiques)
        items[i] = replace(item, response=response, critiques=said)
        one = sampled(items[i])
        rollouts.queries |= one.queries
        rollouts.responses |= one.responses
        rollouts.critiques |= one.critiques
    found = joined(made, rollouts, [item.critic_verdict for item in items])
    first, second, third = found.pairs.pairs
    assert found.fates([first, second], [first]) == {"failed": 3, "refined": 1, "over_share": 1, "noisy": 1}
    assert found.fates([first, second, third], [first, second, third]) == {"failed": 3, "refined": 3}
