"""What the loop carries comes back from COMMIT.json and from the journal as it was."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

from actors.archive import Archive
from actors.records import Critique, Proposal, Query, Response, to_table
from tests.small_records import make_critique, make_query, make_response
from trainers.loop_state import STAGES, LoopState, Rollouts, StageClock


def proposal(index: int) -> Proposal:
    return Proposal(
        proposal_id=f"p{index}",
        iteration=1,
        sample_index=index,
        text="47+86",
        target=("+", "2", "2"),
        outcome="invalid",
        query_id=None,
    )


def test_the_state_comes_back_from_json_as_it_was() -> None:
    archive = Archive.empty([("+", "2", "0"), ("-", "3", "1")])
    archive.record(("-", "3", "1"), num_judged=[8, 3], num_failed=[1, 3], smoothing=0.7)
    archive.remember("47+86")
    state = LoopState(
        iteration=7,
        archive=archive,
        num_verdicts=100,
        num_asked=5,
        gold=Counter(evaluation=9),
        parity_max_abs_diff=1e-5,
        wall_s={"start": 3.0, "iterations": 12.5},
    )
    restored = LoopState.restore(json.loads(json.dumps(state.snapshot())))
    assert restored == state
    assert restored.policy_version == "v7"
    restored.gold["evaluation"] += 1
    assert state.gold["evaluation"] == 9


def test_every_stage_has_a_record_with_its_own_key() -> None:
    for stage, (kind, key) in STAGES.items():
        assert key in kind.__dataclass_fields__, stage


def test_the_journal_gives_back_the_records_of_an_open_iteration() -> None:
    query, response = make_query("q"), make_response("r")
    critique = make_critique("c", response_id="r", score=0.7)
    logged = {
        "proposals": to_table([proposal(0), proposal(3)], Proposal),
        "queries": to_table([query], Query),
        "responses": to_table([response], Response),
        "critiques": to_table([critique], Critique),
    }
    found = Rollouts.of(logged, iteration=1)
    assert found.queries == {"q": query}
    assert found.responses == {"r": response}
    assert found.critiques == {"c": critique}
    # Behind the highest index that is there, whatever is missing below it.
    assert found.next_proposal == 4


def test_an_empty_journal_begins_with_the_first_proposal() -> None:
    assert Rollouts.of({}, iteration=1).next_proposal == 0
    assert Rollouts.of({}, iteration=1).judged() == []


def test_judging_goes_by_the_ids_alone() -> None:
    rows = [make_response(f"r{i}", sample_index=i) for i in range(3)]
    critiques = [make_critique(f"c{k}", response_id="r1", score=0.1 * k) for k in range(3)]

    def rollouts(order: int) -> Rollouts:
        return Rollouts(
            iteration=1,
            queries={"q": make_query("q")},
            responses={row.response_id: row for row in rows[::order]},
            critiques={critique.critique_id: critique for critique in critiques[::order]},
        )

    judged = rollouts(1).judged()
    assert rollouts(-1).judged() == judged
    assert [item.response.response_id for item in judged] == ["r0", "r1", "r2"]
    assert [len(item.critiques) for item in judged] == [0, 3, 0]
    assert [critique.critique_id for critique in judged[1].critiques] == ["c0", "c1", "c2"]


def test_a_response_of_another_query_keeps_its_own() -> None:
    rows = [make_response("a", query_id="q1"), make_response("b", query_id="q0")]
    rollouts = Rollouts(
        iteration=1,
        queries={name: replace(make_query(name), canonical=name) for name in ("q0", "q1")},
        responses={row.response_id: row for row in rows},
    )
    assert [(item.response.response_id, item.query.query_id) for item in rollouts.judged()] == [
        ("b", "q0"),
        ("a", "q1"),
    ]


def test_stages_add_up() -> None:
    clock = StageClock()
    for _ in range(2):
        with clock.stage("judge"):
            pass
    with clock.stage("pair"):
        pass
    assert list(clock.seconds()) == ["judge", "pair"]
    assert all(seconds >= 0.0 for seconds in clock.seconds().values())
