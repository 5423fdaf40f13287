"""A pair needs a passing and a failing response, a gap in P(good) and different texts; what gives none is counted."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.records import Response, Verdict
from tests.small_records import make_query, make_response, make_verdict
from trainers.feedback.preferences import Pairs, PreferenceConfig, build_pairs

Scored = tuple[float | None, str]
"""P(good) and text of a response."""


def paired(*queries: Sequence[Scored], margin: float = 0.5, max_pairs: int = 2, shuffle: int | None = None) -> Pairs:
    """Return the pairs of queries q0, q1, …, each given as its responses r0, r1, …."""
    responses: dict[str, Response] = {}
    verdicts: list[Verdict] = []
    for q, rows in enumerate(queries):
        for i, (score, text) in enumerate(rows):
            name = f"q{q}r{i}"
            responses[name] = make_response(name, query_id=f"q{q}", text=text, sample_index=i)
            verdicts.append(make_verdict(name, score, query_id=f"q{q}"))
    asked = [make_query(f"q{q}") for q in range(len(queries))]
    if shuffle is not None:
        random.Random(shuffle).shuffle(asked)
        random.Random(shuffle + 1).shuffle(verdicts)
    return build_pairs(
        asked,
        responses,
        verdicts,
        config=PreferenceConfig(margin=margin, max_pairs_per_query=max_pairs),
        run="test",
        version=0,
        max_age=0,
        tokens_spanning=a_token_a_character,
    )


def a_token_a_character(token_ids: Sequence[int], num_chars: int) -> int:
    return min(num_chars, len(token_ids))


def ids(pairs: Pairs) -> list[tuple[str, str]]:
    return [(pair.chosen_id, pair.rejected_id) for pair in pairs.pairs]


def test_the_best_is_paired_with_the_worst_and_the_second_best_with_the_second_worst() -> None:
    rows = [(0.8, "a"), (0.1, "b"), (0.95, "c"), (0.3, "d"), (0.6, "e")]
    found = paired(rows)
    assert ids(found) == [("q0r2", "q0r1"), ("q0r0", "q0r3")]
    assert [pair.margin for pair in found.pairs] == pytest.approx([0.95 - 0.1, 0.8 - 0.3])
    assert ids(paired(rows, max_pairs=1)) == [("q0r2", "q0r1")]
    assert found.dropped == {"unpaired": 1}


def test_a_pair_carries_its_responses_tokens_and_origin() -> None:
    (pair,) = paired([(0.9, "good"), (0.1, "bad")]).pairs
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    assert pair.prompt == make_query("q0").messages
    assert pair.prompt_token_ids == (1, 2, 3)
    assert pair.chosen_token_ids == (*map(ord, "good"), 0)
    assert pair.rejected_token_ids == (*map(ord, "bad"), 0)
    assert (pair.query_id, pair.iteration, pair.weight, pair.noise, pair.source) == ("q0", 1, 1.0, 0.0, "critic")


def test_what_gives_no_pair_is_counted_by_its_reason() -> None:
    found = paired(
        [(0.9, "a"), (0.8, "b")],  # all pass
        [(0.2, "a"), (0.1, "b")],  # all fail
        [(None, "a"), (None, "b")],  # nothing judged
        [(0.7, "a"), (0.3, "b")],  # a gap of 0.4
        [(0.9, "a"), (0.1, "a")],  # the same text, judged both ways
    )
    assert found.pairs == ()
    assert found.dropped == {"all_pass": 1, "all_fail": 1, "unjudged": 2, "no_verdict": 1, "margin": 1, "same_text": 1}


def test_an_unjudged_response_is_never_rejected_for_it() -> None:
    found = paired([(0.9, "a"), (None, "b"), (0.1, "c")])
    assert ids(found) == [("q0r0", "q0r2")]
    assert found.dropped == {"unjudged": 1}


@pytest.mark.parametrize(("margin", "num"), [(0.0, 1), (0.5, 1), (0.51, 0)])
def test_a_gap_as_large_as_the_margin_is_enough(margin: float, num: int) -> None:
    assert len(paired([(0.75, "a"), (0.25, "b")], margin=margin).pairs) == num


def test_equal_texts_count_once_on_each_side() -> None:
    found = paired([(0.9, "a"), (0.9, "a"), (0.8, "b"), (0.1, "c"), (0.1, "c"), (0.2, "d")])
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("a", "c"), ("b", "d")]
    assert found.dropped == {"duplicate": 2}


def test_an_expert_on_either_side_makes_the_pair_an_experts() -> None:
    responses = {name: make_response(name, text=name, sample_index=i) for i, name in enumerate("ab")}
    verdicts = [make_verdict("a", 1.0, source="expert"), make_verdict("b", 0.2)]
    (pair,) = build_pairs(
        [make_query("q")],
        responses,
        verdicts,
        config=PreferenceConfig(),
        run="test",
        version=0,
        max_age=0,
        tokens_spanning=a_token_a_character,
    ).pairs
    assert (pair.source, pair.margin) == ("expert", pytest.approx(0.8))


@pytest.mark.parametrize(
    ("flaw_end", "cut_at_flaw", "kept"),
    [(3, True, "wro"), (None, True, "wrong\0"), (3, False, "wrong\0"), (99, True, "wrong\0")],
    ids=["cut at the flaw", "no flaw quoted", "not asked for", "a flaw past the end"],
)
def test_a_rejected_response_ends_with_its_first_quoted_flaw(
    flaw_end: int | None, cut_at_flaw: bool, kept: str
) -> None:
    responses = {"a": make_response("a", text="right"), "b": make_response("b", text="wrong", sample_index=1)}
    # The chosen response stays whole, whatever its own critique quotes.
    verdicts = [make_verdict("a", 1.0, flaw_end=2), make_verdict("b", 0.0, flaw_end=flaw_end)]
    (pair,) = build_pairs(
        [make_query("q")],
        responses,
        verdicts,
        config=PreferenceConfig(cut_at_flaw=cut_at_flaw),
        run="test",
        version=0,
        max_age=0,
        tokens_spanning=a_token_a_character,
    ).pairs
    assert "".join(map(chr, pair.rejected_token_ids)) == kept
    assert "".join(map(chr, pair.chosen_token_ids)) == "right\0"
    assert (pair.chosen, pair.rejected) == ("right", "wrong")


def test_a_flaw_that_the_chosen_response_shares_makes_no_pair() -> None:
    responses = {"a": make_response("a", text="wring"), "b": make_response("b", text="wrong", sample_index=1)}
    for flaw_end, num in ((2, 0), (3, 1)):
        found = build_pairs(
            [make_query("q")],
            responses,
            [make_verdict("a", 1.0), make_verdict("b", 0.0, flaw_end=flaw_end)],
            config=PreferenceConfig(),
            run="test",
            version=0,
            max_age=0,
            tokens_spanning=a_token_a_character,
        )
        assert (len(found.pairs), dict(found.dropped)) == (num, {} if num else {"flaw_in_chosen": 1})


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([None, 0.0, 0.2, 0.49, 0.5, 0.8, 1.0]), st.sampled_from("abcde")), max_size=8
        ),
        max_size=4,
    ),
    st.sampled_from([0.0, 0.5]),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_pairs_keep_their_promises_in_any_order_of_arrival(
    queries: list[list[Scored]], margin: float, max_pairs: int, seed: int
) -> None:
    found = paired(*queries, margin=margin, max_pairs=max_pairs)
    assert paired(*queries, margin=margin, max_pairs=max_pairs, shuffle=seed) == found
    assert len({pair.pair_id for pair in found.pairs}) == len(found.pairs)
    scores = {f"q{q}r{i}": row[0] for q, rows in enumerate(queries) for i, row in enumerate(rows)}
    for pair in found.pairs:
        chosen, rejected = scores[pair.chosen_id], scores[pair.rejected_id]
        assert chosen is not None
        assert rejected is not None
        assert chosen >= 0.5 > rejected
        assert pair.margin == chosen - rejected >= margin
        assert pair.chosen != pair.rejected
        assert pair.chosen_id.startswith(pair.query_id)
        assert pair.rejected_id.startswith(pair.query_id)
    for q in range(len(queries)):
        mine = [pair for pair in found.pairs if pair.query_id == f"q{q}"]
        assert len(mine) <= max_pairs
        used = [name for pair in mine for name in (pair.chosen_id, pair.rejected_id)]
        assert len(used) == len(set(used))
    assert found.dropped.get("unjudged", 0) == sum(score is None for score in scores.values())
