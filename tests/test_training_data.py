"""An iteration's records become the rows that a loss takes; what gives none is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.oversight import Judged
from actors.records import Issue, Verdict
from cluster.config import plugin_names
from tests.small_records import make_judged, make_verdict
from trainers.feedback.preferences import PreferenceConfig, build_pairs
from trainers.feedback.segments import SegmentSettings
from trainers.feedback.training_data import (
    Material,
    TrainingData,
    learns_from_equals,
    left_out,
    material_of,
    of_accepted,
    of_groups,
    of_judged,
    of_pairs,
    of_samples,
    reads_prompts,
    reads_spans,
)
from trainers.losses import load_loss, pretraining, relc
from trainers.rows.documents import token_rows
from trainers.rows.groups import group_rows
from trainers.rows.pairs import pair_rows
from trainers.rows.samples import sample_rows
from trainers.rows.unpaired import unpaired_rows

ANSWERS = ((0.9, "a"), (0.9, "a"), (0.1, "b"), (None, "c"))
FRESH: dict[str, Any] = {"version": 0, "max_age": 0, "spans": None}


def a_token_a_character(token_ids: Sequence[int], num_chars: int) -> int:
    return min(num_chars, len(token_ids))


def at(item: Judged, start: int, end: int) -> Judged:
    """The response with a single critique, which points at some of its characters."""
    quote = item.response.text[start:end]
    issue = Issue(start=start, end=end, quote=quote, severity=2, category="step", explanation="", fix="")
    return replace(item, critiques=(replace(item.critiques[0], issues=(issue,)),))


def aged(item: Judged, version: str) -> Judged:
    return replace(item, response=replace(item.response, policy_version=version))


def test_every_loss_is_told_what_it_learns_from_or_that_no_iteration_makes_it() -> None:
    found = {name: material_of(name) for name in plugin_names("trainers.losses")}
    assert {name for name, material in found.items() if material == "samples"} == {
        "ppo", "relc", "grpo", "rloo", "reinforce_pp",
    }  # fmt: skip
    assert {found[name] for name in ("dpo", "cdpo", "rdpo", "ipo", "exo", "rso")} == {"pairs"}
    assert {name for name, material in found.items() if material == "judged"} == {"kto"}
    accepted = ("sft", "pretraining", "token_noise", "span_noise", "gce", "weak_to_strong", "forward_correction")
    assert {found[name] for name in accepted} == {"accepted"}
    assert {name for name, material in found.items() if material == "groups"} == {"pro", "exo_group"}
    assert found["bradley_terry"] is None
    assert [name for name in found if reads_spans(name)] == ["relc", "span_noise"]


def test_samples_are_all_judged_responses_with_their_scores_copies_too() -> None:
    judged = [make_judged(f"r{i}", 0.5, query_id="q0", text="same") for i in range(2)]
    judged += [make_judged("r2", 0.5, query_id="q1", text="other"), make_judged("r3", query_id="q1")]
    judged += [aged(make_judged("r4", 0.5, query_id="q1"), "v-1")]
    scores = [0.9, 0.2, 1.0, None, 0.7]
    verdicts = [make_verdict(f"r{i}", score, query_id=judged[i].query.query_id) for i, score in enumerate(scores)]
    data = of_samples(judged, verdicts, **FRESH)
    assert data.row_ids == data.response_ids == ("r0", "r1", "r2")
    assert data.places == ("0/0", "0/1", "1/2")
    assert data.dropped == {"unjudged": 1, "stale": 1}
    rows = sample_rows(data.table)
    assert rows.scores.tolist() == [0.9, 0.2, 1.0]
    assert rows.groups.tolist() == [0, 0, 1]
    assert rows.ended.all()
    assert rows.segment_rewards is None
    # Three prompt tokens, then "same" and its end.
    assert rows.documents.token_ids[0].tolist() == [1, 2, 3, *map(ord, "same"), 0]
    assert rows.rollout_logprobs is not None
    assert rows.rollout_logprobs[0].tolist() == [0, 0, 0, -0.5, -0.5, -0.5, -0.5, -0.5, *[0] * 1]
    older = of_samples(judged, verdicts, version=0, max_age=1, spans=None)
    assert older.table.column("age").to_pylist() == [0, 0, 0, 1]


def test_a_loss_that_is_paid_by_spans_says_that_it_reads_them_so_that_no_control_takes_it() -> None:
    paid = [name for name in plugin_names("trainers.losses") if isinstance(load_loss(name).Config(), SegmentSettings)]
    assert paid == ["relc"]
    assert all(reads_spans(name) for name in paid)


def test_a_loss_that_is_paid_by_spans_gets_a_reward_for_every_token() -> None:
    item = at(make_judged("r0", 0.1, text="2+2=5!"), 4, 5)
    data = of_samples(
        [item],
        [make_verdict("r0", 0.1)],
        **{**FRESH, "spans": a_token_a_character},
        segments=relc.Config(),
    )
    assert data.table.column("segment_rewards").to_pylist() == [[0, 0, 0, 0, -1, 0, 0]]


def test_accepted_are_the_responses_that_pass_each_text_once_for_a_query() -> None:
    judged = [make_judged("r0", 0.9, text="a"), make_judged("r1", 0.9, text="a"), make_judged("r2", 0.1, text="b")]
    judged += [make_judged("r3", 0.9, query_id="q1", text="a")]
    verdicts = [
        make_verdict(item.response.response_id, score, query_id=item.query.query_id)
        for item, score in zip(judged, (0.9, 0.8, 0.1, 0.9), strict=True)
    ]
    data = of_accepted(judged, verdicts, **FRESH)
    assert data.row_ids == ("r0", "r3")
    assert data.dropped == {"duplicate": 1, "rejected": 1}
    rows = token_rows(data.table)
    assert rows.flags is None
    assert rows.num_targets.tolist() == [2, 2]


def test_pretraining_learns_the_prompt_too_and_no_other_loss_does() -> None:
    assert [name for name in plugin_names("trainers.losses") if reads_prompts(name)] == ["pretraining"]
    # Three prompt tokens, of which nothing predicts the first, then the text and its end.
    judged = [make_judged("r0", 0.9, text="4"), make_judged("r1", 0.9, query_id="q1", text="42")]
    verdicts = [make_verdict("r0", 0.9), make_verdict("r1", 0.9, query_id="q1")]
    whole, plain = (token_rows(of_accepted(judged, verdicts, **FRESH, prompts=p).table) for p in (True, False))
    assert whole.pad([0, 1]).mask.int().tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]
    assert plain.pad([0, 1]).mask.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    # A log-prob of minus its place for each token: 1 + 2 + 3 + 4 and 5 more nats on nine tokens of two documents.
    logprobs = -torch.arange(6.0, dtype=torch.float64).expand(2, 6)
    batch = whole.batch([0, 1], logprobs=logprobs, mask=whole.pad([0, 1]).mask, totals=whole.totals([0, 1]))
    output = pretraining.loss(batch, pretraining.Config())
    assert output.loss.item() == pytest.approx(25 / 9)
    assert output.metrics["document_nll"].item() == pytest.approx(25 / 2)


def test_what_could_have_been_a_row_and_is_none_is_left_out() -> None:
    judged = [make_judged(f"r{i}", score, text=text) for i, (score, text) in enumerate(ANSWERS)]
    verdicts = [make_verdict(f"r{i}", score) for i, (score, _) in enumerate(ANSWERS)]

    def names(data: TrainingData, material: Material) -> list[str]:
        return [row.response_id for row in left_out(judged, verdicts, data, material=material, run="r", iteration=1)]

    accepted = of_accepted(judged, verdicts, **FRESH)
    assert accepted.response_ids == ("r0",)
    assert names(accepted, "accepted") == ["r1"]
    thumbs = of_judged(judged, verdicts, **FRESH)
    assert thumbs.response_ids == ("r0", "r2")
    assert names(thumbs, "judged") == ["r1"]
    groups = of_groups(judged, verdicts, version=0, max_age=0, equals=True)
    assert groups.response_ids == ("r0", "r2")
    assert names(groups, "groups") == ["r1"]
    assert names(of_samples(judged, verdicts, **{**FRESH, "spans": a_token_a_character}), "samples") == []


def test_with_spans_a_response_that_fails_at_a_quoted_flaw_is_learnt_up_to_it() -> None:
    flawed = at(make_judged("r0", 0.1, text="2+2=55, so 56"), 4, 6)
    unquoted = make_judged("r1", 0.1, text="2+2=6")
    passing = make_judged("r2", 0.9, text="4")
    verdicts = [make_verdict("r0", 0.1, flaw_end=6), make_verdict("r1", 0.1), make_verdict("r2", 0.9)]
    data = of_accepted([flawed, unquoted, passing], verdicts, **{**FRESH, "spans": a_token_a_character})
    assert data.row_ids == ("r0", "r2")
    assert data.dropped == {"rejected": 1}
    assert data.table.column("response_token_ids").to_pylist() == [[*map(ord, "2+2=55")], [ord("4"), 0]]
    assert data.table.column("flagged").to_pylist() == [[False] * 4 + [True] * 2, [False] * 2]
    rows = token_rows(data.table)
    assert rows.flags is not None
    assert rows.flags[0].tolist() == [False] * 7 + [True] * 2


def groups_of(*answers: tuple[str, str, float | None], equals: bool, sources: Sequence[str] = ()) -> TrainingData:
    """Group answers of one query each: its id, a text, a score."""
    judged = [make_judged(f"r{i}", 0.5, query_id=query, text=text) for i, (query, text, _) in enumerate(answers)]
    verdicts = [
        make_verdict(f"r{i}", score, query_id=query, source=sources[i] if sources else "critic")
        for i, (query, _, score) in enumerate(answers)
    ]
    return of_groups(judged, verdicts, version=0, max_age=0, equals=equals)


def test_groups_are_queries_with_their_judged_responses_and_scores() -> None:
    data = groups_of(
        ("q0", "a", 0.9), ("q0", "b", 0.2), ("q1", "a", 0.8), ("q0", "c", None), ("q1", "b", 0.1), ("q0", "d", 0.4),
        equals=False,
    )  # fmt: skip
    assert (data.row_ids, data.places) == (("q0", "q1"), ("0", "1"))
    assert data.response_ids == ("r0", "r1", "r5", "r2", "r4")
    assert data.dropped == {"unjudged": 1}
    rows = group_rows(data.table)
    assert rows.sizes.tolist() == [3, 2]
    assert rows.rewards.tolist() == [0.9, 0.2, 0.4, 0.8, 0.1]
    assert rows.documents.token_ids[2].tolist() == [1, 2, 3, ord("d"), 0]
    assert rows.rollout_logprobs is not None
    assert [len(values) for values in rows.rollout_logprobs[1]] == [2, 2]


def test_a_text_is_one_candidate_whose_reward_is_what_its_verdicts_say_on_average() -> None:
    answers = (("q0", "2 + 2 = 4", 0.9), ("q0", " 2 + 2  = 4\n", 0.6), ("q0", "5", 0.1))
    data = groups_of(*answers, equals=False)
    assert data.dropped == {"duplicate": 1}
    assert data.response_ids == ("r0", "r2")
    assert data.table.column("rewards").to_pylist() == [[0.75, 0.1]]
    # Where an expert was asked, the critic's score is left out of it.
    asked = groups_of(*answers, equals=False, sources=("critic", "expert", "critic"))
    assert asked.table.column("rewards").to_pylist() == [[0.6, 0.1]]


def test_queries_that_rank_nothing_are_left_out_unless_equal_scores_teach_something() -> None:
    answers = (
        ("q0", "a", 0.5),
        ("q0", "b", 0.5),
        ("q1", "a", 0.9),
        ("q1", "a", 0.8),
        ("q2", "a", 0.9),
        ("q2", "b", 0.1),
    )
    ranked = groups_of(*answers, equals=learns_from_equals("pro"))
    assert ranked.row_ids == ("q2",)
    assert ranked.dropped == {"duplicate": 1, "lone": 1, "equal_scores": 1}
    held = groups_of(*answers, equals=learns_from_equals("exo_group"))
    assert held.row_ids == ("q0", "q2")
    assert held.dropped == {"duplicate": 1, "lone": 1}


def test_a_groups_age_is_that_of_its_oldest_response() -> None:
    judged = [make_judged("r0", 0.9), aged(make_judged("r1", 0.1), "v-2"), aged(make_judged("r2", 0.4), "v-3")]
    verdicts = [make_verdict("r0", 0.9), make_verdict("r1", 0.1), make_verdict("r2", 0.4)]
    data = of_groups(judged, verdicts, version=0, max_age=2, equals=False)
    assert data.table.column("age").to_pylist() == [2]
    assert data.dropped == {"stale": 1}


def judged_of(*answers: tuple[str, str, float | None], sources: Sequence[str] = ()) -> TrainingData:
    """Judge answers of one query each: its id, a text, a score."""
    judged = [make_judged(f"r{i}", 0.5, query_id=query, text=text) for i, (query, text, _) in enumerate(answers)]
    verdicts = [
        make_verdict(f"r{i}", score, query_id=query, source=sources[i] if sources else "critic")
        for i, (query, _, score) in enumerate(answers)
    ]
    return of_judged(judged, verdicts, **FRESH)


def thumbs_of(data: TrainingData) -> dict[str, bool]:
    return dict(zip(data.row_ids, data.table.column("desirable").to_pylist(), strict=True))


def test_every_judged_answer_has_a_thumb_also_of_queries_that_all_pass_or_all_fail() -> None:
    data = judged_of(
        ("q0", "a", 0.9), ("q0", "b", 0.5), ("q1", "a", 0.1), ("q1", "b", 0.4), ("q2", "a", 0.8), ("q2", "b", 0.2),
        ("q2", "c", None),
    )  # fmt: skip
    assert thumbs_of(data) == {"r0": True, "r1": True, "r2": False, "r3": False, "r4": True, "r5": False}
    assert data.places == ("0/0", "0/1", "1/2", "1/3", "2/4", "2/5")
    assert data.response_ids == data.row_ids
    assert data.dropped == {"unjudged": 1}
    rows = unpaired_rows(data.table)
    assert rows.desirable.tolist() == [True, True, False, False, True, False]
    assert rows.documents.weights.tolist() == [1.0] * 6
    assert rows.documents.token_ids[1].tolist() == [1, 2, 3, ord("b"), 0]
    assert rows.rollout_logprobs is not None
    assert rows.rollout_logprobs[1][0].tolist() == [-0.5, -0.5]


def test_a_texts_thumb_is_what_its_verdicts_say_on_average_or_the_experts() -> None:
    answers = (("q0", "2 + 2 = 4", 0.9), ("q0", " 2 + 2  = 4\n", 0.3), ("q0", "5", 0.1))
    data = judged_of(*answers)
    # (0.9 + 0.3) / 2 = 0.6
    assert (thumbs_of(data), data.dropped) == ({"r0": True, "r2": False}, {"duplicate": 1})
    # The tokens are those of a copy that was judged so itself.
    asked = judged_of(*answers, sources=("critic", "expert", "critic"))
    assert thumbs_of(asked) == {"r1": False, "r2": False}
    # The same text answers another query anew.
    assert thumbs_of(judged_of(("q0", "4", 0.9), ("q1", "4", 0.1))) == {"r0": True, "r1": False}


def test_a_bad_answer_is_learnt_up_to_its_flaw_and_a_good_one_whole() -> None:
    texts = (("r0", "2+2=55, so 56", 6, 0.1), ("r1", "2+2=6", None, 0.1), ("r2", "2+2=4", 5, 0.9))
    judged = [make_judged(name, score, text=text) for name, text, _, score in texts]
    verdicts = [make_verdict(name, score, flaw_end=end) for name, _, end, score in texts]
    cut = of_judged(judged, verdicts, **{**FRESH, "spans": a_token_a_character})
    assert cut.table.column("response_token_ids").to_pylist() == [
        [*map(ord, "2+2=55")],
        [*map(ord, "2+2=6"), 0],
        [*map(ord, "2+2=4"), 0],
    ]
    assert cut.table.column("response_logprobs").to_pylist() == [[-0.5] * 6, [-0.5] * 6, [-0.5] * 6]
    whole = of_judged(judged, verdicts, **FRESH)
    assert whole.table.column("response_token_ids").to_pylist()[0] == [*map(ord, "2+2=55, so 56"), 0]


def test_a_flaw_is_not_learnt_twice_nor_where_a_good_answer_begins_with_it() -> None:
    texts = (("r0", "4, or 5", 1, 0.1), ("r1", "4", None, 0.9), ("r2", "55, so 5", 2, 0.1), ("r3", "55, or 6", 2, 0.1))
    judged = [make_judged(name, score, text=text) for name, text, _, score in texts]
    verdicts = [make_verdict(name, score, flaw_end=end) for name, _, end, score in texts]
    data = of_judged(judged, verdicts, **{**FRESH, "spans": a_token_a_character})
    assert thumbs_of(data) == {"r1": True, "r2": False}
    assert data.dropped == {"flaw_in_passing": 1, "duplicate": 1}


def test_a_thumb_has_the_age_of_its_sample() -> None:
    judged = [make_judged("r0", 0.9), aged(make_judged("r1", 0.1), "v-2"), aged(make_judged("r2", 0.4), "v-3")]
    verdicts = [make_verdict("r0", 0.9), make_verdict("r1", 0.1), make_verdict("r2", 0.4)]
    data = of_judged(judged, verdicts, version=0, max_age=2, spans=None)
    assert data.table.column("age").to_pylist() == [0, 2]
    assert data.dropped == {"stale": 1}


def grouped(judged: Sequence[Judged], verdicts: Sequence[Verdict], **settings: Any) -> TrainingData:
    return of_groups(judged, verdicts, version=settings["version"], max_age=settings["max_age"], equals=True)


@pytest.mark.parametrize("make", [of_samples, of_judged, of_accepted, grouped])
def test_nothing_judged_is_no_data(make: Any) -> None:
    data: TrainingData = make([make_judged("r0")], [make_verdict("r0", None)], **FRESH)
    assert (data.row_ids, data.dropped) == ((), {"unjudged": 1})
    assert data.table.num_rows == 0


def test_pairs_stay_as_they_are() -> None:
    judged = [make_judged("r0", 0.9, text="good"), make_judged("r1", 0.1, text="bad")]
    verdicts: list[Verdict] = [make_verdict("r0", 0.9), make_verdict("r1", 0.1)]
    pairs = build_pairs(
        [judged[0].query],
        {item.response.response_id: item.response for item in judged},
        verdicts,
        config=PreferenceConfig(),
        run="test",
        tokens_spanning=a_token_a_character,
        version=0,
        max_age=0,
    )
    data = of_pairs(pairs, lambda pair: f"{pair.chosen_id}/{pair.rejected_id}")
    assert data.row_ids == (pairs.pairs[0].pair_id,)
    assert data.places == ("r0/r1",)
    assert data.response_ids == ("r0", "r1")
    assert len(pair_rows(data.table).lengths) == 1
