"""A critique is read to the letter: quotes verified, P(good) from the marks, and missing when it can't be read."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.critic import Critic, CriticConfig
from actors.domains import Role
from actors.domains.arithmetic import Arithmetic, Config, write_answer, write_critique, write_flawed_answer
from actors.generation import Completion, GenerationRequest
from actors.oversight import Judged
from actors.records import Critique, Query, Response
from actors.rubrics import FAIL, PASS, StepMarks
from tests.fake_pool import FakePool, spoken
from tests.small_records import make_query, make_response

DOMAIN = Arithmetic(Config())
RUBRIC = StepMarks(DOMAIN)
RIGHT = "7+6+0=13 4+8+1=13 133"
"""The right answer to 47+86; the second part is response[9:17], the result response[18:21]."""
FLAWED = "7+6+0=13 4+8+0=12 123"


def read(text: str, *, answer: str = RIGHT, said: Completion | None = None) -> Critique:
    """Return what the rubric reads when the critic says `text` of an answer to 47+86."""
    completion = said if said is not None else spoken(text, labels=RUBRIC.labels)
    return RUBRIC.parse("c", make_query(text="47+86"), make_response(text=answer), completion, temperature=0.0)


def assert_missing(critique: Critique) -> None:
    assert not critique.parse_ok
    assert critique.verdict is None
    assert critique.score is None


def assert_sound(critique: Critique, *, answer: str) -> None:
    """Check what holds for whatever a critic says."""
    assert critique.parse_ok == (critique.verdict is not None) == (critique.score is not None)
    assert critique.score is None or 0.0 <= critique.score <= 1.0
    assert critique.verdict in (PASS, FAIL, None)
    assert critique.num_dropped_issues >= 0
    for issue in critique.issues:
        assert 0 <= issue.start < issue.end <= len(answer)
        assert answer[issue.start : issue.end] == issue.quote
    if critique.verdict == PASS:
        assert not critique.issues
        assert critique.num_dropped_issues == 0


# ----------------------------------------------------------------------------------------------- what is readable


def test_a_critique_that_quotes_the_whole_answer_and_finds_it_right_passes_it() -> None:
    critique = read("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133yP")
    assert (critique.verdict, critique.parse_ok, critique.issues) == (PASS, True, ())
    assert (critique.mode, critique.response_ids, critique.query_id) == ("pointwise", ("r",), "q")
    # The model gives 0.9 to each of the three marks and to the label.
    assert critique.score == pytest.approx(0.9**4)
    assert critique.label_logprobs == pytest.approx((math.log(0.9),) * 4)
    assert critique.cost_tokens == len(critique.text) + 1


def test_a_critique_that_names_a_flaw_fails_the_answer_and_says_where() -> None:
    text = write_critique(47, "+", 86, FLAWED)
    critique = read(text, answer=FLAWED)
    assert critique.verdict == FAIL
    first = critique.issues[0]
    assert (first.start, first.end, first.quote, first.fix) == (9, 17, "4+8+0=12", "4+8+1=13")
    assert first.category == "step"
    assert critique.num_dropped_issues == 0


def test_a_wrong_result_is_an_issue_of_its_own_kind() -> None:
    answer = "7+6+0=13 4+8+1=13 143"
    critique = read(write_critique(47, "+", 86, answer), answer=answer)
    assert critique.verdict == FAIL
    assert [(i.start, i.end, i.quote, i.fix, i.category) for i in critique.issues] == [(19, 20, "4", "3", "result")]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(DOMAIN.cells()), st.integers(0, 10_000), st.booleans())
def test_the_demonstrated_critic_can_be_read_and_is_right(cell: tuple[str, ...], seed: int, flawed: bool) -> None:
    rng = random.Random(seed)
    (problem,) = DOMAIN.seeds(cell, split="train", num=1, seed=seed)
    op = cell[0]
    left, right = (int(part) for part in problem.text.split(op))
    answer = write_flawed_answer(left, op, right, rng=rng) if flawed else write_answer(left, op, right)
    text = write_critique(left, op, right, answer)
    critique = RUBRIC.parse(
        "c",
        make_query(text=problem.text),
        make_response(text=answer),
        spoken(text, labels=RUBRIC.labels),
        temperature=0.0,
    )
    assert_sound(critique, answer=answer)
    assert critique.parse_ok
    assert critique.verdict == (PASS if answer == write_answer(left, op, right) else FAIL)
    assert bool(critique.issues) == (critique.verdict == FAIL)
    assert critique.num_dropped_issues == 0


def test_every_demonstration_of_the_critic_can_be_read() -> None:
    for row in DOMAIN.demonstrations(Role.CRITIC, rng=random.Random(1), num=200):
        query, answer = row.messages[-1].content.split("\n")
        rubric_sees = RUBRIC.render(make_query(text=query), make_response(text=answer))
        assert rubric_sees == row.messages
        critique = RUBRIC.parse(
            "c",
            make_query(text=query),
            make_response(text=answer),
            spoken(row.response, labels=RUBRIC.labels),
            temperature=0.0,
        )
        assert critique.parse_ok, row


# -------------------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it says nothing"),
        ("P", "a label without a critique"),
        ("F", "a label without a critique"),
        ("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133y", "no label"),
        ("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133yPP", "two labels"),
        ("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133yPF", "two labels that disagree"),
        ("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133yX", "an unknown label"),
        ("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133y P", "something before the label"),
        ("P7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133y", "the label comes first"),
        ("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133yF", "fails what it marked right"),
        ("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13n133?133yP", "passes what it marked wrong"),
        ("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13yP", "a pass that leaves out the result"),
        ("4+8+1=13?4+8+1=13y133?133yP", "a pass that leaves out the first part"),
        ("7+6+0=13?7+6+0=13y133?133yP", "a pass that leaves out a part in the middle"),
        ("7+6+0=13?7+6+0=13y4+8+0=12?4+8+1=13y133?133yP", "a pass that quotes what is not there"),
        ("4+8+1=13?4+8+1=13y7+6+0=13?7+6+0=13y133?133yP", "a pass that quotes out of order"),
        ("7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133y133?133yP", "a pass that quotes a part twice"),
        ("?y?yP", "empty quotes"),
        ("7+6+0=13 4+8+1=13 133P", "no marks"),
    ],
)
def test_an_unreadable_critique_is_missing(text: str, why: str) -> None:
    assert_missing(read(text))


@pytest.mark.parametrize("reason", ["length", "abort", "error"])
def test_a_critique_that_was_cut_off_is_missing_even_when_it_looks_whole(reason: str) -> None:
    text = write_critique(47, "+", 86, RIGHT)
    assert_missing(read(text, said=spoken(text, labels=RUBRIC.labels, finish_reason=reason)))


def test_a_critique_without_the_log_probs_of_a_mark_is_missing() -> None:
    text = write_critique(47, "+", 86, RIGHT)
    said = spoken(text, labels=RUBRIC.labels)
    fewer = replace(said, label_marks=said.label_marks[1:], label_logprobs=said.label_logprobs[1:])
    assert_missing(read(text, said=fewer))


def test_a_missing_critique_is_no_verdict_and_never_a_low_score() -> None:
    missing = read("babble")
    verdict = Judged(query=make_query(), response=make_response(), critiques=(missing,)).critic_verdict
    assert (verdict.label, verdict.score, verdict.confidence) == (None, None, None)


# ----------------------------------------------------------------------------------------------------------- quotes


def test_an_issue_whose_quote_is_not_in_the_answer_is_dropped_and_counted() -> None:
    critique = read("9+9+0=18?7+6+0=13nF")
    assert critique.issues == ()
    assert critique.num_dropped_issues == 1
    assert_sound(critique, answer=RIGHT)


def test_an_issue_that_quotes_an_earlier_part_again_is_dropped_and_counted() -> None:
    critique = read("7+6+0=13?7+6+0=13y4+8+0=12?4+8+1=13n7+6+0=13?7+6+0=14nF", answer=FLAWED)
    assert [issue.quote for issue in critique.issues] == ["4+8+0=12"]
    assert critique.num_dropped_issues == 1


def test_of_two_equal_parts_the_right_one_is_pointed_at() -> None:
    # 55+66 written with both columns alike: the second of them is the flaw.
    answer = "5+6+0=11 5+6+0=11 111"
    critique = read("5+6+0=11?5+6+0=11y5+6+0=11?5+6+1=12nF", answer=answer)
    assert [(issue.start, issue.end) for issue in critique.issues] == [(9, 17)]


def test_offsets_count_characters_whatever_their_bytes() -> None:
    answer = "é=1 日本=2 🙂=3"
    critique = read("é=1?é=1y日本=2?日本=3n🙂=3?🙂=4nF", answer=answer)
    # Characters; in UTF-8 bytes the second part would begin at 5, in UTF-16 units the third would end at 13.
    assert [(i.start, i.end, i.quote, i.fix) for i in critique.issues] == [
        (4, 8, "日本=2", "日本=3"),
        (9, 12, "🙂=3", "🙂=4"),
    ]
    assert (critique.verdict, critique.num_dropped_issues) == (FAIL, 0)
    for issue in critique.issues:
        start, end = (len(answer[:offset].encode()) for offset in (issue.start, issue.end))
        assert answer.encode()[start:end].decode() == issue.quote


# ------------------------------------------------------------------------------------------------------------ scores


def probabilities(text: str, shares: Sequence[float], *, mass: float = 1.0) -> Completion:
    """Return the completion that gives the marks of `text` these P(correct), and `mass` to the two labels together."""
    return spoken(
        text,
        labels=RUBRIC.labels,
        good_logprobs=[(math.log(mass * p), math.log(mass * (1 - p))) for p in shares],
    )


def test_the_score_is_the_product_over_the_marks_and_the_label() -> None:
    text = "7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133yP"
    critique = read(text, said=probabilities(text, [0.9, 0.8, 0.95, 0.5]))
    # 0.9 * 0.8 = 0.72; 0.72 * 0.95 = 0.684; 0.684 * 0.5 = 0.342.
    assert critique.score == pytest.approx(0.342)
    assert critique.label_logprobs == pytest.approx([math.log(p) for p in (0.9, 0.8, 0.95, 0.5)])


def test_what_the_model_gives_to_other_tokens_does_not_count() -> None:
    text = "7+6+0=13?7+6+0=13y4+8+1=13?4+8+1=13y133?133yP"
    whole = read(text, said=probabilities(text, [0.9, 0.8, 0.95, 0.5]))
    half = read(text, said=probabilities(text, [0.9, 0.8, 0.95, 0.5], mass=0.5))
    assert half.score == pytest.approx(whole.score)


def test_a_mark_is_normalised_over_its_two_labels() -> None:
    # METHODS C-GENRM: logits 2.0 and 0.5 give 1 / (1 + e^-1.5) = 0.817574.
    text = "133?133yP"
    said = spoken(text, labels=RUBRIC.labels, good_logprobs=[(2.0, 0.5), (2.0, 0.5)])
    critique = read(text, answer="133", said=said)
    assert critique.score == pytest.approx(0.817574**2, abs=1e-6)


def test_a_bad_mark_counts_by_how_likely_the_good_one_was() -> None:
    text = "133?143nF"
    critique = read(text, answer="133", said=probabilities(text, [0.2, 0.1]))
    assert critique.verdict == FAIL
    assert critique.score == pytest.approx(0.02)


def test_the_labels_that_were_not_sampled_for_a_mark_play_no_part() -> None:
    text = "133?133yP"
    said = probabilities(text, [0.9, 0.8])
    # At the mark "y" the columns of P and F are changed, at the label "P" those of y and n.
    (y, n, _, _), (_, _, good, bad) = said.label_logprobs
    changed = replace(said, label_logprobs=((y, n, -1.0, -3.0), (-3.0, -1.0, good, bad)))
    assert read(text, answer="133", said=changed).score == pytest.approx(0.72)


@pytest.mark.parametrize(
    ("logprobs", "score"), [((0.0, -math.inf), 1.0), ((-math.inf, 0.0), 0.0), ((-800.0, -900.0), 1.0)]
)
def test_certainty_and_tiny_log_probs_give_a_score(logprobs: tuple[float, float], score: float) -> None:
    text = "133?133yP"
    said = spoken(text, labels=RUBRIC.labels, good_logprobs=[logprobs, (0.0, -math.inf)])
    assert read(text, answer="133", said=said).score == pytest.approx(score)


# -------------------------------------------------------------------------------------------------- whatever is said


CRITIC_ALPHABET = "0123456789+-=?ynPF \n"
PART = st.builds(
    lambda quote, mine, mark: f"{quote}?{mine}{mark}",
    st.sampled_from(["7+6+0=13", "4+8+1=13", "133", "", "13", " 133", "x"]),
    st.sampled_from(["7+6+0=13", "133", "", "?"]),
    st.sampled_from(["y", "n", ""]),
)
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(CRITIC_ALPHABET, max_size=60),
    st.builds(lambda parts, label: "".join(parts) + label, st.lists(PART, max_size=5), st.sampled_from("PFX")),
)


@settings(deadline=None, max_examples=400)
@given(TEXTS, st.sampled_from([RIGHT, FLAWED, "", " ", "y?n", "133"]), st.sampled_from(["stop", "length"]))
def test_whatever_is_said_is_read_soundly_or_missing(text: str, answer: str, reason: str) -> None:
    said = spoken(text, labels=RUBRIC.labels, finish_reason=reason)
    assert_sound(read(text, answer=answer, said=said), answer=answer)


def test_ten_thousand_random_strings_are_read_soundly_or_missing() -> None:
    rng = random.Random(0)
    golden = write_critique(47, "+", 86, RIGHT)
    num_readable = 0
    for number in range(10_000):
        if number % 2:
            text = "".join(rng.choices(CRITIC_ALPHABET, k=rng.randrange(80)))
        else:
            # One character of a readable critique is lost, doubled or changed.
            place = rng.randrange(len(golden))
            text = golden[:place] + rng.choice(CRITIC_ALPHABET) * rng.randrange(3) + golden[place + 1 :]
        critique = read(text)
        assert_sound(critique, answer=RIGHT)
        num_readable += critique.parse_ok
    # A changed recomputation, and a character put back by chance, leave a critique readable; few others do.
    assert 0 < num_readable < 5_000


# ---------------------------------------------------------------------------------------------------------- the role


def judge(critic: Critic, items: Sequence[tuple[Query, Response]], *, known: Sequence[str] = ()) -> list[Critique]:
    async def collect() -> list[Critique]:
        return [row async for chunk in critic.judge(items, known=known) for row in chunk]

    return asyncio.run(collect())


def careful(request: GenerationRequest) -> str:
    """Say what the demonstrated critic says."""
    query, answer = request.messages[-1].content.split("\n")
    left, right = (int(part) for part in query.split("+"))
    return write_critique(left, "+", right, answer)


def critic_over(pool: FakePool, **settings: float) -> Critic:
    config = CriticConfig.model_validate(settings)
    return Critic(pool, rubric=RUBRIC, config=config, run="test", seed=1)  # type: ignore[arg-type]


ITEMS = [
    (make_query(text="47+86"), make_response(f"r{i}", text=text, sample_index=i))
    for i, text in enumerate([RIGHT, FLAWED, RIGHT, FLAWED])
]


@pytest.mark.parametrize("arrival_seed", [None, 0, 1])
def test_every_response_gets_its_own_critique_in_any_order_of_arrival(arrival_seed: int | None) -> None:
    critiques = judge(critic_over(FakePool(careful, chunk=3, arrival_seed=arrival_seed)), ITEMS)
    assert {row.response_ids[0]: row.verdict for row in critiques} == {"r0": PASS, "r1": FAIL, "r2": PASS, "r3": FAIL}
    assert len({row.critique_id for row in critiques}) == 4


def test_the_first_critique_is_greedy_and_asks_for_the_label_log_probs() -> None:
    pool = FakePool(careful)
    judge(critic_over(pool), ITEMS)
    assert {(r.temperature, r.seed, r.labels, r.num_samples) for r in pool.asked} == {(0.0, None, RUBRIC.labels, 1)}


def test_further_critiques_are_sampled_each_with_its_own_seed() -> None:
    pool = FakePool(careful)
    critiques = judge(critic_over(pool, num_critiques=3, temperature=0.5), ITEMS)
    assert len(critiques) == len({row.critique_id for row in critiques}) == 12
    sampled = [request for request in pool.asked if request.temperature > 0]
    assert {request.temperature for request in sampled} == {0.5}
    assert len({request.seed for request in sampled}) == len(sampled) == 8


def test_what_is_known_is_not_asked_again() -> None:
    pool = FakePool(careful)
    everything = judge(critic_over(pool), ITEMS)
    known = [row.critique_id for row in everything[:3]]
    again = FakePool(careful)
    rest = judge(critic_over(again), ITEMS, known=known)
    assert [row.critique_id for row in rest] == [everything[3].critique_id]
    assert len(again.asked) == 1
    assert rest[0] == everything[3]
    assert judge(critic_over(again), ITEMS, known=[row.critique_id for row in everything]) == []
