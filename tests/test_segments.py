"""What critiques praise and fault is worth +-1 on its tokens, whatever the tokens are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.domains.arithmetic import Arithmetic, Config
from actors.oversight import Judged
from actors.records import Verdict
from actors.rubrics import StepMarks
from tests.fake_pool import spoken
from tests.small_records import make_query, make_response, make_verdict
from trainers.feedback.segments import SegmentRewards, Span, rewards_of, segment_rewards
from trainers.losses import relc

TEXT = "good, bad end"
WORDS = ((0, 4), (4, 6), (6, 9), (9, 13), (13, 13))
"""Characters of `good`, `, `, `bad`, ` end` and of an end-of-sequence without text."""


def span(quote: str, *, sign: int, start: int | None = None) -> Span:
    begin = TEXT.index(quote) if start is None else start
    return Span(start=begin, end=begin + len(quote), quote=quote, sign=1 if sign > 0 else -1)


def placed(spans: Sequence[Span], **settings: Any) -> SegmentRewards:
    return segment_rewards(
        TEXT,
        spans,
        num_tokens=len(WORDS),
        tokens_of=lambda start, end: [i for i, (a, b) in enumerate(WORDS) if max(a, start) < min(b, end)],
        **settings,
    )


def test_a_span_pays_on_its_last_token_or_on_all_of_them() -> None:
    spans = [span("good", sign=1), span("bad end", sign=-1)]
    assert placed(spans).rewards.tolist() == [1, 0, 0, -1, 0]
    assert placed(spans, placement="spread").rewards.tolist() == [1, 0, -0.5, -0.5, 0]


def test_a_part_of_a_token_is_enough_and_a_quote_must_match() -> None:
    spans = [span("ood, b", sign=1), span("bad", sign=-1, start=5), span("", sign=-1, start=2), span("end", sign=1)]
    found = placed(spans)
    assert found.rewards.tolist() == [0, 0, 1, 1, 0]
    assert found.num_dropped == 2


def test_a_span_before_the_beginning_is_dropped() -> None:
    found = placed([Span(start=-1, end=4, quote=TEXT[-1:4], sign=1)])
    assert found.rewards.tolist() == [0] * 5
    assert found.num_dropped == 1


def test_overlapping_spans_of_opposite_sign_cancel_in_pairs() -> None:
    spans = [span("good, bad", sign=1), span("bad", sign=-1), span("bad end", sign=-1)]
    found = placed(spans)
    assert found.rewards.tolist() == [0, 0, 0, -1, 0]
    assert found.num_cancelled == 2


def test_many_spans_are_scaled_down_to_the_cap() -> None:
    spans = [span(quote, sign=-1) for quote in ("good", "bad", "end", ",")]
    found = placed(spans, cap=2.0)
    assert found.rewards.tolist() == pytest.approx([-0.5, -0.5, -0.5, -0.5, 0])


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6), st.sampled_from([1, -1])), max_size=8))
def test_the_sum_is_the_good_spans_minus_the_bad_ones_wherever_they_are_placed(
    drawn: list[tuple[int, int, int]],
) -> None:
    spans = [span(TEXT[start : start + length], sign=sign, start=start) for start, length, sign in drawn]
    for placement in ("end", "spread"):
        found = placed(spans, placement=placement)
        assert found.num_dropped == 0
        assert found.rewards.sum() == pytest.approx(sum(one.sign for one in spans))


# ------------------------------------------------------------------------------------------------ a response's own

RUBRIC = StepMarks(Arithmetic(Config()))
ANSWER = "7+6+0=13 4+8+0=12 123"
"""Of 47+86: a right part, a wrong one, a wrong result."""
FIRST, SECOND, RESULT = 7, 16, 20
"""Their last characters."""
FAULTED = "7+6+0=13?7+6+0=13y4+8+0=12?4+8+1=13n123?133nF"


def criticised(*texts: str) -> Judged:
    """Return the answer, of a token a character, with critiques as the loop reads them."""
    response = make_response(text=ANSWER)
    critiques = [
        RUBRIC.parse(
            f"c{number}", make_query(text="47+86"), response, spoken(text, labels=RUBRIC.labels), temperature=0.0
        )
        for number, text in enumerate(texts)
    ]
    return Judged(query=make_query(text="47+86"), response=response, critiques=tuple(critiques))


def rewards(item: Judged, verdict: Verdict | None = None, **settings: Any) -> dict[int, float]:
    """Return the tokens that are paid or charged."""
    found = rewards_of(item, verdict, relc.Config(**settings), lambda ids, num_chars: min(num_chars, len(ids)))
    assert len(found) == len(ANSWER) + 1
    return {place: value for place, value in enumerate(found) if value}


def test_a_step_that_the_critic_marks_right_is_paid_and_one_that_it_marks_wrong_is_charged() -> None:
    item = criticised(FAULTED)
    assert rewards(item) == {FIRST: 1, SECOND: -1, RESULT: -1}
    assert rewards(item, praise=False) == {SECOND: -1, RESULT: -1}
    spread = rewards(item, placement="spread")
    assert [spread[place] for place in (0, FIRST, RESULT)] == pytest.approx([1 / 8, 1 / 8, -1 / 3])
    assert math.fsum(spread.values()) == pytest.approx(-1)


def test_many_steps_are_scaled_down_to_the_cap_and_zero_is_no_cap() -> None:
    item = criticised(FAULTED)
    assert rewards(item, praise=False, segment_cap=1.0) == {SECOND: -0.5, RESULT: -0.5}
    assert rewards(item, praise=False, segment_cap=0.0) == {SECOND: -1, RESULT: -1}


def test_a_response_has_the_mean_of_its_readable_critiques() -> None:
    silent = criticised(FAULTED, "7+6+0=13?7+6+0=13y4+8+0=12?4+8+0=12y123?123yP")
    assert rewards(silent) == {FIRST: 1}
    cut = criticised(FAULTED, FAULTED[:-1])
    assert not cut.critiques[1].parse_ok
    assert rewards(cut) == rewards(criticised(FAULTED))
    assert rewards(criticised(FAULTED[:-1])) == {}


def test_what_an_expert_overrules_pays_nothing_and_what_one_confirms_pays() -> None:
    item = criticised(FAULTED)
    assert item.critic_verdict.label == "fail"
    assert rewards(item, make_verdict("r", 1.0, source="expert")) == {}
    assert rewards(item, make_verdict("r", 0.0, source="expert")) == rewards(item)
    assert rewards(item, make_verdict("r", 0.1)) == rewards(item)
    praised = criticised("7+6+0=13?7+6+0=13y4+8+0=12?4+8+0=12y123?123yP")
    assert rewards(praised, make_verdict("r", 0.0, source="expert")) == {}


def test_a_step_that_is_not_in_the_answer_pays_nothing() -> None:
    assert rewards(criticised(FAULTED.replace("123?", "124?"))) == {FIRST: 1, SECOND: -1}
