"""Oversight puts the least trusted verdicts before experts, within the budget, and lets an expert's label stand."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.domains import GoldLedger, Purpose
from actors.domains.arithmetic import Arithmetic, ArithmeticChecker
from actors.domains.arithmetic import Config as ArithmeticConfig
from actors.expert_desk import ExpertDesk
from actors.experts import ExpertQueue, SimulatedExpert, SimulatedExpertConfig
from actors.oversight import (
    Escalation,
    ExpertsOnly,
    Judged,
    Majority,
    OversightConfig,
    Shuffled,
    Single,
    make_oversight,
)
from actors.records import ExpertLabel, Issue, Verdict
from tests.small_records import make_critique, make_judged

DOMAIN = Arithmetic(ArithmeticConfig())
RIGHT = "7+6+0=13 4+8+1=13 133"
"""The right answer to 47+86."""


def expert_label(response_id: str, label: str | None, *, expert: str = "ada") -> ExpertLabel:
    return ExpertLabel(
        item_id=response_id, kind="response", label=label, expert=expert, seconds=1.0, time=0.0, comment=""
    )


class Experts:
    """Answers with the labels it was given, by response id, and remembers what it was asked."""

    def __init__(self, labels: Mapping[str, str | None] | None = None) -> None:
        self._labels = labels or {}
        self.asked: list[str] = []

    def ask(self, cases: Sequence[Judged]) -> Mapping[str, ExpertLabel]:
        self.asked += [case.response.response_id for case in cases]
        return {name: expert_label(name, self._labels[name]) for name in self.asked if name in self._labels}


def nobody(cases: Sequence[Judged]) -> Mapping[str, ExpertLabel]:
    raise AssertionError("no expert was to be asked")


def by_response(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    assert len({verdict.response_id for verdict in verdicts}) == len(verdicts)
    return {verdict.response_id: verdict for verdict in verdicts}


# ---------------------------------------------------------------------------------------- what the critic alone says


def test_the_critics_verdict_is_the_mean_over_its_readable_critiques() -> None:
    verdict = make_judged("r", 1.0, 0.2, None).critic_verdict
    # (1.0 + 0.2) / 2; the unreadable critique is missing, not 0.
    assert (verdict.label, verdict.score, verdict.confidence) == ("pass", pytest.approx(0.6), pytest.approx(0.6))
    assert (verdict.source, verdict.escalated) == ("critic", False)


@pytest.mark.parametrize(
    ("score", "label", "confidence"),
    [
        (0.0, "fail", 1.0),
        (0.2, "fail", 0.8),
        (0.49, "fail", 0.51),
        (0.5, "pass", 0.5),
        (0.9, "pass", 0.9),
        (1.0, "pass", 1.0),
    ],
)
def test_confidence_is_the_likelier_of_good_and_bad(score: float, label: str, confidence: float) -> None:
    verdict = make_judged("r", score).critic_verdict
    assert (verdict.label, verdict.confidence) == (label, pytest.approx(confidence))


@pytest.mark.parametrize("scores", [(), (None,), (None, None)])
def test_without_a_readable_critique_a_response_is_unjudged(scores: tuple[None, ...]) -> None:
    verdict = make_judged("r", *scores).critic_verdict
    assert (verdict.label, verdict.score, verdict.confidence) == (None, None, None)


def test_single_oversight_asks_no_expert() -> None:
    judged = [make_judged("a", 0.51), make_judged("b", None)]
    verdicts = Single().decide(judged, nobody, num_allowed=10)
    assert [verdict.label for verdict in verdicts] == ["pass", None]


# ------------------------------------------------------------------------------------------------------- escalation


CASES = [
    make_judged("sure-pass", 0.95),
    make_judged("doubtful", 0.51),
    make_judged("sure-fail", 0.1),
    make_judged("likely", 0.6),
]
"""Confidence 0.95, 0.51, 0.9 and 0.6."""


@pytest.mark.parametrize(
    ("num_allowed", "asked"),
    [
        (0, []),
        (1, ["doubtful"]),
        (2, ["doubtful", "likely"]),
        (3, ["doubtful", "likely", "sure-fail"]),
        (9, ["doubtful", "likely", "sure-fail", "sure-pass"]),
    ],
)
def test_the_least_trusted_are_asked_first_and_no_more_than_allowed(num_allowed: int, asked: list[str]) -> None:
    experts = Experts()
    Escalation().decide(CASES, experts.ask if num_allowed else nobody, num_allowed=num_allowed)
    assert experts.asked == asked


def test_an_experts_label_overrides_the_critic() -> None:
    verdicts = by_response(
        Escalation().decide(CASES, Experts({"doubtful": "fail", "likely": "pass"}).ask, num_allowed=2)
    )
    doubtful, likely = verdicts["doubtful"], verdicts["likely"]
    assert (doubtful.label, doubtful.score, doubtful.confidence) == ("fail", 0.0, 1.0)
    assert (likely.label, likely.score, likely.confidence) == ("pass", 1.0, 1.0)
    assert {doubtful.source, likely.source} == {"expert"}
    assert {name for name, verdict in verdicts.items() if verdict.escalated} == {"doubtful", "likely"}
    assert verdicts["sure-fail"] == CASES[2].critic_verdict


def test_an_expert_who_abstains_or_is_silent_leaves_the_critics_verdict() -> None:
    verdicts = by_response(Escalation().decide(CASES, Experts({"doubtful": None}).ask, num_allowed=2))
    for name, case in (("doubtful", CASES[1]), ("likely", CASES[3])):
        alone = case.critic_verdict
        assert verdicts[name].escalated
        assert (verdicts[name].label, verdicts[name].score, verdicts[name].source) == (
            alone.label,
            alone.score,
            "critic",
        )


def test_an_unjudged_response_stays_unjudged_and_costs_no_budget() -> None:
    judged = [make_judged("babble", None), make_judged("silence"), make_judged("doubtful", 0.51)]
    experts = Experts({"babble": "pass", "silence": "pass", "doubtful": "pass"})
    verdicts = by_response(Escalation().decide(judged, experts.ask, num_allowed=3))
    assert experts.asked == ["doubtful"]
    assert verdicts["babble"].label is None
    assert verdicts["silence"].label is None
    assert not verdicts["babble"].escalated


def test_there_is_nobody_to_ask_when_nothing_is_judged() -> None:
    assert Escalation().decide([], nobody, num_allowed=5) == []
    assert Escalation().decide([make_judged("a", None)], nobody, num_allowed=5)[0].label is None


def test_equal_answers_are_one_question_and_share_its_label() -> None:
    judged = [
        make_judged("r0", 0.52, text="twice"),
        make_judged("r1", 0.9, text="once"),
        make_judged("r2", 0.51, text="twice"),
        make_judged("r3", None, text="twice"),  # unreadable this time
        make_judged("other2", 0.6, query_id="q2", text="twice"),  # another query
    ]
    experts = Experts({"r0": "fail", "other2": "pass"})
    verdicts = by_response(Escalation().decide(judged, experts.ask, num_allowed=2))
    assert experts.asked == ["r0", "other2"]
    assert {name: (v.label, v.source, v.escalated) for name, v in verdicts.items()} == {
        "r0": ("fail", "expert", True),
        "r2": ("fail", "expert", False),
        "r3": ("fail", "expert", False),
        "other2": ("pass", "expert", True),
        "r1": ("pass", "critic", False),
    }


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([None, 0.1, 0.4, 0.5, 0.6, 0.9]), max_size=12), st.integers(0, 12), st.integers(0, 99))
def test_who_is_asked_does_not_depend_on_the_order_of_arrival(
    scores: list[float | None], num_allowed: int, seed: int
) -> None:
    judged = [make_judged(f"r{i}", score) for i, score in enumerate(scores)]
    shuffled = random.Random(seed).sample(judged, len(judged))
    experts, again = Experts(), Experts()
    first = Escalation().decide(judged, experts.ask, num_allowed=num_allowed)
    second = Escalation().decide(shuffled, again.ask, num_allowed=num_allowed)
    assert experts.asked == again.asked
    assert len(experts.asked) == min(num_allowed, sum(score is not None for score in scores))
    assert by_response(first) == by_response(second)
    # One verdict for each response, in the order of the responses.
    assert [verdict.response_id for verdict in second] == [item.response.response_id for item in shuffled]


# --------------------------------------------------------------------------------------------------------- shuffled


def judged_queries(num_queries: int, *, num_samples: int = 8) -> list[Judged]:
    rng = random.Random(0)
    return [
        make_judged(f"q{q}/r{i}", rng.choice([None, *(rng.random() for _ in range(6))]), query_id=f"q{q}")
        for q in range(num_queries)
        for i in range(num_samples)
    ]


def said(verdict: Verdict) -> tuple[object, ...]:
    return verdict.label, verdict.score, verdict.confidence, verdict.source, verdict.escalated


def test_shuffled_verdicts_are_permuted_within_their_query_only() -> None:
    judged = judged_queries(20)
    labels = {f"q{q}/r{i}": "pass" for q in range(20) for i in range(8)}
    plain = Escalation().decide(judged, Experts(labels).ask, num_allowed=16)
    shuffled = Shuffled(Escalation()).decide(judged, Experts(labels).ask, num_allowed=16)
    # Ids stay in their places, experts' labels move too (SCIENCE §5 a).
    assert [(v.verdict_id, v.query_id, v.response_id) for v in shuffled] == [
        (v.verdict_id, v.query_id, v.response_id) for v in plain
    ]
    for query in {verdict.query_id for verdict in plain}:
        before = [said(verdict) for verdict in plain if verdict.query_id == query]
        after = [said(verdict) for verdict in shuffled if verdict.query_id == query]
        assert sorted(map(repr, before)) == sorted(map(repr, after))
    moved = sum(said(a) != said(b) for a, b in zip(plain, shuffled, strict=True))
    # A random permutation of 8 leaves one in its place on average.
    assert moved > 0.7 * len(plain)


def test_the_shuffle_tells_nothing_of_the_critics_verdicts() -> None:
    judged = judged_queries(300)
    plain = Escalation().decide(judged, nobody, num_allowed=0)
    shuffled = Shuffled(Escalation()).decide(judged, nobody, num_allowed=0)
    agreeing = expected = 0.0
    for start in range(0, len(plain), 8):
        labels = [verdict.label for verdict in plain[start : start + 8]]
        agreeing += sum(a == b.label for a, b in zip(labels, shuffled[start : start + 8], strict=True))
        expected += sum(labels.count(label) ** 2 / 8 for label in set(labels))
    # Under a uniform permutation a place keeps its label with the label's share; 2,400 places, 5 standard deviations.
    assert agreeing == pytest.approx(expected, abs=5 * 0.5 * 2400**0.5)


def test_the_shuffle_is_the_same_each_time_and_in_any_order_of_queries() -> None:
    judged = judged_queries(10)
    first = Shuffled(Escalation()).decide(judged, nobody, num_allowed=0)
    assert Shuffled(Escalation()).decide(judged, nobody, num_allowed=0) == first
    turned = [item for q in reversed(range(10)) for item in judged[8 * q : 8 * q + 8]]
    assert by_response(Shuffled(Escalation()).decide(turned, nobody, num_allowed=0)) == by_response(first)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("single", Single),
        ("escalation", Escalation),
        ("shuffled", Shuffled),
        ("experts_only", ExpertsOnly),
        ("majority", Majority),
    ],
)
def test_a_config_names_the_oversight(kind: str, wanted: type) -> None:
    assert isinstance(make_oversight(OversightConfig.model_validate({"kind": kind}), domain=DOMAIN, seed=0), wanted)


def test_the_shuffled_control_asks_experts_as_the_main_run_does() -> None:
    plain, shuffled = Experts(), Experts()
    Escalation().decide(CASES, plain.ask, num_allowed=2)
    make_oversight(OversightConfig(kind="shuffled"), domain=DOMAIN, seed=0).decide(CASES, shuffled.ask, num_allowed=2)
    assert shuffled.asked == plain.asked


def test_the_shuffle_moves_a_quoted_flaw_along_with_its_verdict() -> None:
    judged = []
    for i in range(8):
        flaw = Issue(start=0, end=i, quote="", severity=1, category="step", explanation="", fix="")
        critique = replace(make_critique(f"c{i}", response_id=f"r{i}", score=0.01 * i), issues=(flaw,))
        judged.append(replace(make_judged(f"r{i}"), critiques=(critique,)))
    verdicts = Shuffled(Single()).decide(judged, nobody, num_allowed=0)
    assert sorted(v.flaw_end or 0 for v in verdicts) == list(range(8))
    assert [v.flaw_end for v in verdicts] != list(range(8))
    # Score and flaw come from the same critique.
    assert all(v.score == pytest.approx(0.01 * (v.flaw_end or 0)) for v in verdicts)


# ------------------------------------------------------------------------------------------------ the other controls


def test_experts_alone_are_asked_for_whole_queries_within_the_budget() -> None:
    judged = judged_queries(10)  # eight responses each
    everything = Experts({item.response.response_id: "pass" for item in judged})
    verdicts = ExpertsOnly().decide(judged, everything.ask, num_allowed=20)
    # 20 allow two whole queries of eight.
    assert len(everything.asked) == 16
    drawn = {item.query.query_id for item in judged if item.response.response_id in everything.asked}
    assert len(drawn) == 2
    for verdict in verdicts:
        known = verdict.query_id in drawn
        assert (verdict.label, verdict.source, verdict.escalated) == (
            ("pass", "expert", True) if known else (None, "critic", False)
        )
        assert verdict.flaw_end is None
    other = Experts()
    ExpertsOnly(seed=1).decide(judged, other.ask, num_allowed=20)
    assert set(other.asked) != set(everything.asked)
    again = Experts({item.response.response_id: "pass" for item in judged})
    ExpertsOnly().decide(list(reversed(judged)), again.ask, num_allowed=20)
    assert set(again.asked) == set(everything.asked)


def test_experts_alone_leave_all_unjudged_when_no_query_fits_the_budget() -> None:
    verdicts = ExpertsOnly().decide(judged_queries(3), nobody, num_allowed=7)
    assert {verdict.label for verdict in verdicts} == {None}


def majority_labels(*texts: str) -> list[tuple[str | None, float | None]]:
    judged = [make_judged(f"r{i}", 0.9) for i in range(len(texts))]
    answered = [
        replace(item, response=replace(item.response, text=text)) for item, text in zip(judged, texts, strict=True)
    ]
    verdicts = Majority(DOMAIN).decide(answered, nobody, num_allowed=100)
    assert {verdict.source for verdict in verdicts if verdict.label} <= {"majority"}
    return [(verdict.label, verdict.confidence) for verdict in verdicts]


def test_the_majoritys_result_passes_right_or_wrong() -> None:
    columns = "7+6+0=13 4+8+1=13"
    # 47+86: three state 123, which is wrong; one the right 133; one states nothing, and counts against the share.
    found = majority_labels(*[f"{columns} 123"] * 3, f"{columns} 133", "no idea")
    assert [label for label, _ in found] == ["pass", "pass", "pass", "fail", "fail"]
    assert [confidence for _, confidence in found] == [pytest.approx(0.6)] * 5


def test_a_tie_and_silence_judge_nothing() -> None:
    columns = "7+6+0=13 4+8+1=13"
    assert {label for label, _ in majority_labels(f"{columns} 123", f"{columns} 133")} == {None}
    assert {label for label, _ in majority_labels("no", "idea")} == {None}


# -------------------------------------------------------------------------------------------------- the expert desk


@pytest.fixture
def queue(tmp_path: Path) -> ExpertQueue:
    return ExpertQueue(tmp_path / "labels" / "queue.sqlite3")


@pytest.fixture
def simulated() -> Callable[..., SimulatedExpert]:
    def make(**settings: float) -> SimulatedExpert:
        gold = GoldLedger(ArithmeticChecker(), regime="critic_expert")
        return SimulatedExpert(gold.checker_for(Purpose.EXPERT), config=SimulatedExpertConfig.model_validate(settings))

    return make


def test_a_simulated_expert_answers_through_the_queue_at_once(
    queue: ExpertQueue, simulated: Callable[..., SimulatedExpert]
) -> None:
    # The critic holds the right answer to 47+86 for bad; the expert knows better.
    verdicts = Escalation().decide(
        [make_judged("r", 0.45, text=RIGHT)], ExpertDesk(queue, simulated()).ask, num_allowed=1
    )
    assert (verdicts[0].label, verdicts[0].source) == ("pass", "expert")
    assert queue.counts().decided == 1


def test_an_expert_for_whom_a_case_is_too_hard_leaves_it_to_the_critic(
    queue: ExpertQueue, simulated: Callable[..., SimulatedExpert]
) -> None:
    desk = ExpertDesk(queue, simulated(max_difficulty=2.0))  # 47+86: two columns and two carries
    verdicts = Escalation().decide([make_judged("r", 0.45, text=RIGHT)], desk.ask, num_allowed=1)
    assert (verdicts[0].label, verdicts[0].source, verdicts[0].escalated) == ("fail", "critic", True)


def test_people_are_asked_and_not_waited_for(queue: ExpertQueue) -> None:
    desk = ExpertDesk(queue, None)
    case = make_judged("r", 0.45, None)
    assert desk.ask([case]) == {}
    (item,) = queue.pending()
    assert (item.item_id, item.query, item.responses) == ("r", "47+86", (case.response.text,))
    # The mean over the readable critique, and its text.
    assert (item.why, item.critique) == ("P(good) 0.45", case.critiques[0].text)
    queue.answer(expert_label("r", "pass"))
    assert desk.ask([case])["r"].label == "pass"
    assert desk.ask([make_judged("other", 0.5)]) == {}
    assert queue.counts().asked == 2


def test_one_experts_abstention_leaves_the_case_to_another(queue: ExpertQueue) -> None:
    desk = ExpertDesk(queue, None)
    case = make_judged("r", 0.45)
    desk.ask([case])
    queue.answer(expert_label("r", None, expert="ada"))
    assert desk.ask([case])["r"].label is None
    queue.answer(expert_label("r", "pass", expert="bea"))
    queue.answer(expert_label("r", "fail", expert="cy"))
    # The first decision counts.
    assert desk.ask([case])["r"].label == "pass"
