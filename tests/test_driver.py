"""The loop keeps its promises: killed anywhere, it resumes to the very run that it would have been."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from actors.domains import Purpose
from actors.domains.arithmetic import ArithmeticChecker, split_of
from actors.records import PreferencePair, Proposal, Query, Response, Verdict, from_table
from cluster.commits import last_commit
from cluster.store import read_stage
from tests.fake_roles import DOMAIN, RUN, FakeCritic, FakeRun, Settings, fake_run, pass_by, write_blank_run
from trainers.driver import Stopped
from trainers.kl import KlBudget
from trainers.loop_state import STAGES, Rollouts
from trainers.losses import kto
from trainers.progress import Silent, StopSignal
from trainers.summary import read_metrics
from trainers.training_group import TrainingPlan

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_QUERIES, NUM_SAMPLES = Settings().queries_per_iteration, Settings().num_samples
WHOLE = {"reference": [{}]}


def killed_at(*points: str) -> list[dict[str, Any]]:
    """Return sittings killed one after the other, and the last one that finishes; "responses 1 #17" is the 17th row."""
    sittings: list[dict[str, Any]] = []
    for point in points:
        name, _, num = point.partition(" #")
        sittings.append({"kill": name, "num": int(num or 1)})
    return [*sittings, {}]


KILLS = {
    # Before there is a commit.
    "first sync": killed_at("sync 0"),
    "a proposal without its query": killed_at("proposals 0"),
    "attack set": killed_at("queries 0 #3"),
    "evaluations before": killed_at("evaluations 0"),
    "manifest of the first commit": killed_at("commit 0: manifest written"),
    "first commit": killed_at("commit 0: committed"),
    # In an iteration.
    "an accepted proposal without its query": killed_at("proposals 1 #8"),
    "first query": killed_at("queries 1"),
    "fourth query": killed_at("queries 1 #4"),
    "first response": killed_at("responses 1"),
    "half of the responses": killed_at("responses 1 #20"),
    "first critique": killed_at("critiques 1"),
    "most of the critiques": killed_at("critiques 1 #35"),
    "experts answered": killed_at("experts 1"),
    "verdicts": killed_at("verdicts 1"),
    "pairs": killed_at("pairs 1"),
    "first step": killed_at("step 1"),
    "third step": killed_at("step 1 #3"),
    "publish": killed_at("publish 1"),
    "sync": killed_at("sync 1"),
    "agreement with truth": killed_at("evaluations 1"),
    "evaluated": killed_at("evaluations 1 #31"),
    "save": killed_at("save 1"),
    "export": killed_at("export 1"),
    # In the commit.
    "log drained": killed_at("commit 1: log drained"),
    "segment written": killed_at("commit 1: pairs written"),
    "segment renamed": killed_at("commit 1: responses renamed"),
    "manifest written": killed_at("commit 1: manifest written"),
    "committed": killed_at("commit 1: committed"),
    "log retired": killed_at("commit 1: log retired"),
    "last commit": killed_at("commit 2: committed"),
    "last pruning": killed_at("commit 2: checkpoints pruned"),
    # More than once.
    "twice among the critiques": killed_at("critiques 2 #10", "critiques 2 #5"),
    "in training, then as the checkpoint was loaded": killed_at("step 1 #2", "publish 1"),
    "at every stage": killed_at(
        "queries 0 #2", "queries 1 #3", "responses 1 #9", "verdicts 1", "step 1 #3", "commit 1: manifest written"
    ),
}
AHEAD: dict[str, list[dict[str, Any]]] = {
    name: [{**sitting, "max_policy_age": 1, "iterations": 4} for sitting in sittings]
    for name, sittings in {
        "ahead, undisturbed": [{}],
        "ahead: first query of the next": killed_at("queries 2"),
        "ahead: half of the next one's responses": killed_at("responses 2 #20"),
        "ahead: the next one's pairs": killed_at("pairs 2"),
        "ahead: in training": killed_at("step 2 #3"),
        "ahead: in a sync": killed_at("sync 2"),
        "ahead: in a commit": killed_at("commit 2: manifest written"),
        "ahead: after a commit": killed_at("commit 1: committed"),
        "ahead: thrice": killed_at("critiques 2 #9", "step 2 #2", "step 3 #2"),
    }.items()
}
"""With `max_policy_age` 1: an iteration is prepared while the one before it is learnt."""
BROKEN = {"forgets to load": [{"kill": "responses 2"}, {"loads": False}]}


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blank_run(tmp_path_factory.mktemp("blank") / RUN)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Run every case, each in its directory; give where they are and how each sitting ended."""
    runs = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.driver_process", str(runs)],
        input=json.dumps(WHOLE | KILLS | AHEAD | BROKEN),
        capture_output=True,
        text=True,
        timeout=900,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # noqa: T201 - shown by pytest when a case fails
    return runs, json.loads(done.stdout)


def run_once(path: Path, blank: Path, settings: Settings | None = None, **options: Any) -> FakeRun:
    shutil.copytree(blank, path)
    run = fake_run(path, settings or Settings(), **options)
    run.finish()
    return run


def rows(run: Path, stage: str, *, iteration: int) -> list[dict[str, Any]]:
    """Return a stage's committed rows as plain values, in the order of their ids."""
    found: list[dict[str, Any]] = read_stage(run, stage, iteration=iteration).to_pylist()
    return sorted(found, key=lambda row: str(row[STAGES[stage][1]]))


def records(run: Path, stage: str, *, iteration: int) -> list[Any]:
    table = read_stage(run, stage, iteration=iteration)
    return from_table(table, STAGES[stage][0]) if table.num_columns else []


def learner_of(run: Path, *, iteration: int) -> dict[str, Any]:
    path = run / "checkpoints" / f"iteration={iteration:06d}" / "learner.json"
    return dict(json.loads(path.read_text()))


def policy_of(run: Path, *, version: int) -> bytes:
    return (run / "policies" / f"v{version:06d}" / "policy.json").read_bytes()


def planned_slots(run: Path, *, settings: Settings, seed: int = 3) -> list[list[Any]]:
    """Return (row id, epoch, step) of all slots that the committed pairs of a run call for, in their order."""
    slots: list[list[Any]] = []
    for iteration in range(1, settings.iterations + 1):
        rollouts = Rollouts.of(
            {stage: read_stage(run, stage, iteration=iteration) for stage in ("queries", "responses")},
            iteration=iteration,
        )
        pairs = records(run, "pairs", iteration=iteration)
        plan = TrainingPlan.of(
            [pair.pair_id for pair in pairs],
            keys=[rollouts.place(pair) for pair in pairs],
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            seed=seed * 1_000 + iteration,
        )
        slots += [[s.row_id, s.epoch, s.step] for step in range(len(plan.steps)) for s in plan.slots(step)]
    return slots


def measured(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what a clock measured, and without the counts of proposals."""
    found = [row.model_dump(mode="json") for row in read_metrics(run)]
    for row in found:
        del row["seconds"], row["wall_s"], row["tokens_per_s"], row["proposals"]
    return found


# ---------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("case", KILLS)
def test_a_run_killed_anywhere_resumes_to_the_run_that_it_would_have_been(
    case: str, campaign: tuple[Path, dict[str, list[int]]]
) -> None:
    runs, endings = campaign
    assert endings[case] == [-9] * (len(KILLS[case]) - 1) + [0]
    run, reference = runs / case, runs / "reference"
    for iteration in range(3):
        for stage in ("queries", "responses", "critiques", "verdicts", "pairs", "evaluations"):
            assert rows(run, stage, iteration=iteration) == rows(reference, stage, iteration=iteration), stage
        # Of the proposals that came after the last wanted query, a kill may leave some out.
        found, wanted = (
            sorted(records(where, "proposals", iteration=iteration), key=lambda row: row.sample_index)
            for where in (run, reference)
        )
        assert all(a == b for a, b in zip(found, wanted, strict=False))
        assert all(row.outcome != "accepted" for row in [*wanted[len(found) :], *found[len(wanted) :]])
        assert policy_of(run, version=iteration) == policy_of(reference, version=iteration)
    assert measured(run) == measured(reference)
    assert learner_of(run, iteration=2) == learner_of(reference, iteration=2)


@pytest.mark.parametrize("case", [*WHOLE, *KILLS])
def test_every_planned_slot_is_applied_once_in_the_surviving_lineage(
    case: str, campaign: tuple[Path, dict[str, list[int]]]
) -> None:
    run = campaign[0] / case
    slots = learner_of(run, iteration=2)["slots"]
    assert slots == planned_slots(run, settings=Settings())
    assert len({tuple(slot[:2]) for slot in slots}) == len(slots) > 20


@pytest.mark.parametrize("case", [*WHOLE, *KILLS])
def test_nothing_vanishes_and_nothing_is_made_twice(case: str, campaign: tuple[Path, dict[str, list[int]]]) -> None:
    run = campaign[0] / case
    metrics = read_metrics(run)
    assert [row.iteration for row in metrics] == [1, 2]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (run / "journal").glob("*/COMMIT.json")) == ["COMMIT.json"] * 3
    num_asked = 0
    for row in metrics:
        proposals = records(run, "proposals", iteration=row.iteration)
        assert sorted(p.sample_index for p in proposals) == list(range(len(proposals)))
        assert row.proposals == Counter(p.outcome for p in proposals)
        accepted = {p.query_id for p in proposals if p.outcome == "accepted"}
        assert all((p.query_id is None) == (p.outcome != "accepted") for p in proposals)
        queries = records(run, "queries", iteration=row.iteration)
        assert {q.query_id for q in queries} == accepted
        responses = records(run, "responses", iteration=row.iteration)
        assert Counter(r.query_id for r in responses) == dict.fromkeys(accepted, NUM_SAMPLES)
        critiques = records(run, "critiques", iteration=row.iteration)
        verdicts = records(run, "verdicts", iteration=row.iteration)
        answers = {r.response_id for r in responses}
        assert {c.response_ids[0] for c in critiques} == {v.response_id for v in verdicts} == answers
        counts = {"queries": queries, "responses": responses, "critiques": critiques, "verdicts": verdicts}
        assert {name: len(found) for name, found in counts.items()} == {
            "queries": NUM_QUERIES,
            "responses": NUM_QUERIES * NUM_SAMPLES,
            "critiques": NUM_QUERIES * NUM_SAMPLES,
            "verdicts": NUM_QUERIES * NUM_SAMPLES,
        }
        assert (row.num_verdicts, row.experts_asked) == (len(verdicts), sum(v.escalated for v in verdicts))
        num_asked += row.experts_asked
    # 5 % of 80 verdicts.
    assert num_asked == 4
    commit = last_commit(run)
    assert commit is not None
    assert (commit.iteration, commit.superseded, commit.num_stale_records) == (2, {}, 0)
    assert (commit.state["num_verdicts"], commit.state["num_asked"]) == (80, 4)
    num_pairs = sum(len(records(run, "pairs", iteration=row.iteration)) for row in metrics)
    assert num_pairs == sum(row.pairs_trained for row in metrics) > 8
    # An expert's label that was given before the kill was drawn from truth all the same.
    assert commit.state["gold"][Purpose.EXPERT] == 4


@pytest.mark.parametrize("case", AHEAD)
def test_nothing_vanishes_and_nothing_is_made_twice_when_iterations_overlap(
    case: str, campaign: tuple[Path, dict[str, list[int]]]
) -> None:
    runs, endings = campaign
    assert endings[case] == [-9] * (len(AHEAD[case]) - 1) + [0]
    run = runs / case
    metrics = read_metrics(run)
    assert [row.iteration for row in metrics] == [1, 2, 3, 4]
    for row in metrics:
        proposals, queries, responses, critiques, verdicts, pairs = (
            records(run, stage, iteration=row.iteration)
            for stage in ("proposals", "queries", "responses", "critiques", "verdicts", "pairs")
        )
        assert {p.query_id for p in proposals if p.outcome == "accepted"} == {q.query_id for q in queries}
        assert len(queries) == NUM_QUERIES
        assert Counter(r.query_id for r in responses) == {q.query_id: NUM_SAMPLES for q in queries}
        assert {c.response_ids[0] for c in critiques} == {v.response_id for v in verdicts}
        assert len(critiques) == len(verdicts) == NUM_QUERIES * NUM_SAMPLES
        # Which weights a sample came from hangs on the clock; that none is older than allowed does not.
        assert {0, 1} >= {pair.age for pair in pairs}
        assert {0, 1} >= set(row.sample_ages)
        assert sum(row.sample_ages.values()) == 2 * row.pairs_trained == 2 * len(pairs)
        assert "stale" not in row.pairs_dropped
    slots = learner_of(run, iteration=4)["slots"]
    assert slots == planned_slots(run, settings=Settings(iterations=4))
    commit = last_commit(run)
    assert commit is not None
    assert (commit.iteration, commit.superseded, commit.num_stale_records) == (4, {}, 0)
    # 5 % of 160 verdicts; the next iteration's labels are in the next commit.
    assert (commit.state["num_verdicts"], commit.state["num_asked"]) == (160, 8)
    seen = [query.canonical for i in range(1, 5) for query in records(run, "queries", iteration=i)]
    assert len(set(seen)) == len(seen)
    assert sorted(seen) == sorted(commit.state["archive"]["seen"])


def test_iterations_overlap_as_far_as_samples_may_age(blank: Path, tmp_path: Path) -> None:
    path, may_learn = Path(shutil.copytree(blank, tmp_path / RUN)), asyncio.Event()

    def ask(reached: str, num: int) -> None:
        if reached == "responses 2":
            may_learn.set()

    run = fake_run(path, Settings(max_policy_age=1, iterations=2), reach=ask)
    # Iteration 1 is learnt only once iteration 2 has answers: a loop that did not overlap would wait forever.
    run.group.may_learn = may_learn
    run.finish()
    first, second = (set(row.sample_ages) for row in read_metrics(path))
    assert first == {0}
    assert 1 in second


def test_nothing_overlaps_where_samples_may_not_age(campaign: tuple[Path, dict[str, list[int]]]) -> None:
    assert all(set(row.sample_ages) == {0} for row in read_metrics(campaign[0] / "reference"))
    assert all(set(row.sample_ages) <= {0, 1} for row in read_metrics(campaign[0] / "ahead, undisturbed"))


def test_samples_that_are_too_old_are_dropped_and_counted(blank: Path, tmp_path: Path) -> None:
    path, stop = Path(shutil.copytree(blank, tmp_path / RUN)), StopSignal()

    def ask(reached: str, num: int) -> None:
        if reached == "critiques 2":
            stop.request()

    with pytest.raises(Stopped):
        fake_run(path, Settings(max_policy_age=1, iterations=3, step_s=0.02), reach=ask, stop=stop).finish()
    assert (commit := last_commit(path)) is not None
    assert commit.iteration == 1, "what is being learnt is committed before the stop"
    # Whoever goes on without allowing any age finds answers of v0 for an update of v1.
    fake_run(path, Settings(iterations=3)).finish()
    rows = read_metrics(path)
    stale = sum(r.policy_version == "v0" for r in records(path, "responses", iteration=2))
    assert stale > 0
    assert [row.pairs_dropped.get("stale", 0) for row in rows] == [0, stale, 0]
    assert all(set(row.sample_ages) <= {0} for row in rows)


def test_a_resume_that_forgets_the_checkpoint_is_noticed(campaign: tuple[Path, dict[str, list[int]]]) -> None:
    runs, endings = campaign
    assert endings["forgets to load"] == [-9, 0]
    run = runs / "forgets to load"
    assert policy_of(run, version=2) != policy_of(runs / "reference", version=2)
    assert learner_of(run, iteration=2)["slots"] != planned_slots(run, settings=Settings())


@pytest.mark.parametrize(
    "point", ["proposals 0", "responses 1", "critiques 1", "verdicts 1", "step 1", "evaluations 2"]
)
def test_a_run_that_was_asked_to_stop_goes_on_where_it_was(
    point: str, campaign: tuple[Path, dict[str, list[int]]], blank: Path, tmp_path: Path
) -> None:
    path, stop = tmp_path / RUN, StopSignal()
    shutil.copytree(blank, path)

    def ask(reached: str, num: int) -> None:
        if reached == point:
            stop.request()

    run = fake_run(path, Settings(), reach=ask, stop=stop)
    with pytest.raises(Stopped):
        run.finish()
    if point == "step 1":  # A stop in training waits for the commit.
        assert (commit := last_commit(path)) is not None
        assert commit.iteration == 1
    fake_run(path, Settings(arrival_seed=9)).finish()
    reference = campaign[0] / "reference"
    for stage in ("queries", "responses", "critiques", "verdicts", "pairs", "evaluations"):
        assert all(rows(path, stage, iteration=i) == rows(reference, stage, iteration=i) for i in range(3)), stage
    assert policy_of(path, version=2) == policy_of(reference, version=2)
    assert (commit := last_commit(path)) is not None
    assert commit.superseded == {}


def test_a_finished_run_is_resumed_without_a_change(blank: Path, tmp_path: Path) -> None:
    run = run_once(tmp_path / RUN, blank)
    before = measured(tmp_path / RUN)
    again = fake_run(tmp_path / RUN, Settings())
    again.finish()
    assert again.driver.state.iteration == 2
    assert measured(tmp_path / RUN) == before
    assert not any(event.pool != "rollouts" for event in again.events)
    assert run.group.weights == again.group.weights


# ---------------------------------------------------------------------------------------------------------- the loop


def test_the_loop_learns_what_the_critic_and_the_experts_teach(blank: Path, tmp_path: Path) -> None:
    run = run_once(tmp_path / RUN, blank, Settings(iterations=3))
    skills = [float.fromhex(json.loads(policy_of(tmp_path / RUN, version=v))[0]) for v in range(4)]
    assert skills == sorted(skills)
    # Each slot adds 0.05, less the shrinking and the draw.
    assert skills[-1] - skills[0] == pytest.approx(0.05 * len(run.group.slots), rel=0.2)
    sealed = records(tmp_path / RUN, "evaluations", iteration=3)
    assert {row.set_name for row in sealed} == {"sealed", "probe", "out_of_distribution", "attack_set", "agreement"}
    assert {row.set_name for row in records(tmp_path / RUN, "evaluations", iteration=2)} == {"probe", "agreement"}


def test_answers_come_from_the_weights_of_the_iteration_before(blank: Path, tmp_path: Path) -> None:
    run_once(tmp_path / RUN, blank)
    for iteration in (1, 2):
        responses: list[Response] = records(tmp_path / RUN, "responses", iteration=iteration)
        assert {row.policy_version for row in responses} == {f"v{iteration - 1}"}
        pairs: list[PreferencePair] = records(tmp_path / RUN, "pairs", iteration=iteration)
        ids = {row.response_id for row in responses}
        assert all({pair.chosen_id, pair.rejected_id} <= ids for pair in pairs)


def test_a_critique_is_asked_for_before_the_last_response_is_there(blank: Path, tmp_path: Path) -> None:
    run = run_once(tmp_path / RUN, blank, Settings(iterations=1, queries_per_iteration=20))
    places = {(e.what, e.pool, e.request_id): place for place, e in enumerate(run.events)}
    sampled = {row.response_id for row in records(tmp_path / RUN, "responses", iteration=1)}
    answered = [place for (what, _, name), place in places.items() if what == "answered" and name in sampled]
    critiqued = [place for (what, pool, _), place in places.items() if (what, pool) == ("asked", "critic")]
    proposed = [place for (what, pool, _), place in places.items() if (what, pool) == ("answered", "attacker")]
    assert min(critiqued) < max(answered)
    assert min(answered) < max(proposed)
    # A response is judged only when it is there.
    assert min(answered) < min(critiqued)


def test_only_train_problems_are_asked_and_only_probe_problems_are_frozen(blank: Path, tmp_path: Path) -> None:
    run_once(tmp_path / RUN, blank)
    for iteration, split in ((0, "probe"), (1, "train"), (2, "train")):
        queries: list[Query] = records(tmp_path / RUN, "queries", iteration=iteration)
        assert {split_of(query.canonical) for query in queries} == {split}
        assert len({query.canonical for query in queries}) == len(queries)
        proposals: list[Proposal] = records(tmp_path / RUN, "proposals", iteration=iteration)
        # The attacker did write problems of other splits: they were counted and dropped.
        assert Counter(row.outcome for row in proposals)["wrong_split"] > 0
    pairs = records(tmp_path / RUN, "pairs", iteration=1) + records(tmp_path / RUN, "pairs", iteration=2)
    problems = [DOMAIN.parse(pair.prompt[-1].content) for pair in pairs]
    assert all(problem is not None and problem.split == "train" and problem.in_scope for problem in problems)


def test_no_query_is_asked_again_in_a_later_iteration(blank: Path, tmp_path: Path) -> None:
    run_once(tmp_path / RUN, blank, Settings(iterations=3))
    asked = [q.canonical for i in (1, 2, 3) for q in records(tmp_path / RUN, "queries", iteration=i)]
    assert len(set(asked)) == len(asked) == 3 * NUM_QUERIES


# --------------------------------------------------------------------------------------------------------- the truth


class GuardedChecker:
    """Truth that answers evaluation and the simulated expert alone, by who stands on the call stack."""

    allowed = ("Driver._evaluate", "Driver._answer", "SimulatedExpert.label")

    def __init__(self) -> None:
        self.callers: Counter[str] = Counter()
        self._checker = ArithmeticChecker()

    def correct(self, query: str, response: str) -> bool:
        """Answer when it is allowed."""
        self._guard()
        return self._checker.correct(query, response)

    def difficulty(self, query: str) -> float:
        """Answer when it is allowed."""
        self._guard()
        return self._checker.difficulty(query)

    def _guard(self) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_qualname not in self.allowed:
            frame = frame.f_back
        assert frame is not None, "truth was asked for outside of evaluation and of the simulated expert"
        self.callers[frame.f_code.co_qualname] += 1


def test_truth_is_asked_for_by_evaluation_and_the_simulated_expert_alone(blank: Path, tmp_path: Path) -> None:
    checker = GuardedChecker()
    run_once(tmp_path / RUN, blank, checker=checker)
    assert set(checker.callers) == {"Driver._evaluate", "Driver._answer", "SimulatedExpert.label"}
    # 5 % of 80 verdicts.
    assert checker.callers["SimulatedExpert.label"] == 4


def test_the_answers_that_the_critic_was_compared_on_are_kept(blank: Path, tmp_path: Path) -> None:
    run_once(tmp_path / RUN, blank, Settings(critic=FakeCritic(babble_rate=0.2)))
    checker = ArithmeticChecker()
    for row in read_metrics(tmp_path / RUN):
        answers = [
            answer
            for answer in records(tmp_path / RUN, "evaluations", iteration=row.iteration)
            if answer.set_name == "agreement"
        ]
        assert [answer.correct for answer in answers] == [checker.correct(a.query, a.text) for a in answers]
        found = row.critic_agreement
        assert (sum(a.correct for a in answers), len(answers)) == (found.num_good, found.num_good + found.num_bad)
        assert found.num_unjudged == 30 - len(answers) > 0
        # An answer bears the id of the live response, and so leads to its critiques.
        scores = {c.response_ids[0]: c.score for c in records(tmp_path / RUN, "critiques", iteration=row.iteration)}
        live = {r.response_id: r.text for r in records(tmp_path / RUN, "responses", iteration=row.iteration)}
        assert all(live[answer.answer_id] == answer.text for answer in answers)
        passed = [(scores[answer.answer_id] or 0.0) >= 0.5 for answer in answers]
        good_passed = sum(p for p, answer in zip(passed, answers, strict=True) if answer.correct)
        assert found.false_fail == pytest.approx(1 - good_passed / found.num_good)


class Liar:
    """Truth that calls everything wrong."""

    def correct(self, query: str, response: str) -> bool:
        """Say no."""
        return False

    def difficulty(self, query: str) -> float:
        """Say nothing."""
        return 0.0


def test_what_evaluation_finds_feeds_no_decision(blank: Path, tmp_path: Path) -> None:
    settings = Settings(budget=0.0)
    run_once(tmp_path / "true", blank, settings)
    run_once(tmp_path / "false", blank, settings, checker=Liar())
    for stage in ("proposals", "queries", "responses", "critiques", "verdicts", "pairs"):
        for iteration in range(3):
            assert rows(tmp_path / "true", stage, iteration=iteration) == rows(
                tmp_path / "false", stage, iteration=iteration
            )
    assert policy_of(tmp_path / "true", version=2) == policy_of(tmp_path / "false", version=2)
    assert {row.correct for row in records(tmp_path / "false", "evaluations", iteration=2)} == {False}


# ------------------------------------------------------------------------------------------------- unusual iterations


def labels_by_query(verdicts: Sequence[Verdict]) -> dict[str, Counter[str | None]]:
    counts: dict[str, Counter[str | None]] = {}
    for verdict in verdicts:
        counts.setdefault(verdict.query_id, Counter())[verdict.label] += 1
    return counts


def test_shuffled_verdicts_are_the_same_ones_at_other_responses(blank: Path, tmp_path: Path) -> None:
    run_once(tmp_path / "plain", blank, Settings(iterations=1))
    run_once(tmp_path / "shuffled", blank, Settings(iterations=1, oversight="shuffled"))
    plain = records(tmp_path / "plain", "verdicts", iteration=1)
    shuffled = records(tmp_path / "shuffled", "verdicts", iteration=1)
    assert labels_by_query(plain) == labels_by_query(shuffled)
    assert {v.response_id: v.label for v in plain} != {v.response_id: v.label for v in shuffled}
    # The report's figures are the critic's own, before anything was shuffled.
    (a,), (b,) = measured(tmp_path / "plain"), measured(tmp_path / "shuffled")
    assert (a["critic_agreement"], a["cells"], a["experts_asked"]) == (b["critic_agreement"], b["cells"], 2)


@pytest.mark.parametrize("oversight", ["experts_only", "majority"])
def test_a_control_trains_on_its_own_labels_alone(oversight: str, blank: Path, tmp_path: Path) -> None:
    run_once(tmp_path / RUN, blank, Settings(oversight=oversight, budget=0.25))
    source = {"experts_only": "expert", "majority": "majority"}[oversight]
    for iteration in (1, 2):
        judged = [v for v in records(tmp_path / RUN, "verdicts", iteration=iteration) if v.label is not None]
        assert {verdict.source for verdict in judged} == {source}
        pairs = records(tmp_path / RUN, "pairs", iteration=iteration)
        assert {pair.source for pair in pairs} <= {source}
        # What the critic quotes is no label of theirs: rejected answers stay whole.
        responses = {r.response_id: r for r in records(tmp_path / RUN, "responses", iteration=iteration)}
        assert all(pair.rejected_token_ids == responses[pair.rejected_id].token_ids for pair in pairs)
        if oversight == "experts_only":
            # An answer that several samples gave is asked about once, and its label holds for all of them.
            texts = {(v.query_id, responses[v.response_id].text) for v in judged}
            assert len(texts) == sum(v.escalated for v in judged) < len(judged)
    asked = [row.experts_asked for row in read_metrics(tmp_path / RUN)]
    # A quarter of 40 verdicts; what a whole query did not fit into is carried over.
    if oversight == "experts_only":
        assert 6 < asked[0] <= 10
        assert 16 < sum(asked) <= 20
    else:
        assert asked == [0, 0]


def test_a_run_of_no_iteration_evaluates_the_learner_as_it_is(blank: Path, tmp_path: Path) -> None:
    run = run_once(tmp_path / RUN, blank, Settings(iterations=0))
    assert read_metrics(tmp_path / RUN) == []
    assert run.group.slots == []
    commit = last_commit(tmp_path / RUN)
    assert commit is not None
    assert commit.iteration == 0
    answered = Counter(row.set_name for row in records(tmp_path / RUN, "evaluations", iteration=0))
    assert set(answered) == {"sealed", "out_of_distribution", "attack_set", "probe"}


def test_an_iteration_without_a_pair_is_committed(blank: Path, tmp_path: Path) -> None:
    run = run_once(tmp_path / RUN, blank, Settings(critic=FakeCritic(babble_rate=1.0)))
    metrics = read_metrics(tmp_path / RUN)
    assert [(row.pairs_trained, row.training, row.live_attack_success, row.num_attacks) for row in metrics] == [
        (0, {}, None, 0)
    ] * 2
    # Unjudged answers are missing, neither failed nor put before the experts.
    assert [row.pairs_dropped for row in metrics] == [{"unjudged": 40, "no_verdict": 10}] * 2
    assert [row.critic_agreement.num_unjudged for row in metrics] == [30, 30]
    assert {v.label for v in records(tmp_path / RUN, "verdicts", iteration=1)} == {None}
    assert run.group.slots == []
    assert policy_of(tmp_path / RUN, version=2) == policy_of(tmp_path / RUN, version=0)
    assert (commit := last_commit(tmp_path / RUN)) is not None
    assert commit.iteration == 2


@pytest.mark.parametrize("loss", ["exo_group", "pro", "weak_to_strong", "pretraining"])
def test_a_loss_of_groups_labels_or_documents_is_given_them_and_how_far_the_run_is(
    loss: str, blank: Path, tmp_path: Path
) -> None:
    run = run_once(tmp_path / RUN, blank, Settings(loss=loss))
    for iteration, (plan, metrics) in enumerate(zip(run.group.plans, read_metrics(tmp_path / RUN), strict=True), 1):
        judged = [v for v in records(tmp_path / RUN, "verdicts", iteration=iteration) if v.label is not None]
        texts = {r.response_id: (r.query_id, r.text) for r in records(tmp_path / RUN, "responses", iteration=iteration)}
        scores: dict[str, dict[str, list[Verdict]]] = {}
        for verdict in judged:
            scores.setdefault(verdict.query_id, {}).setdefault(texts[verdict.response_id][1], []).append(verdict)
        if loss in ("weak_to_strong", "pretraining"):
            accepted = {texts[v.response_id] for v in judged if v.label == "pass"}
            assert {texts[row] for row in plan.row_ids} == accepted
            assert metrics.material == "accepted"
        else:
            several = {query: texts for query, texts in scores.items() if len(texts) > 1}
            assert metrics.pairs_dropped.get("lone", 0) == len(scores) - len(several)
            dropped = metrics.pairs_dropped.get("equal_scores", 0)
            assert len(plan.row_ids) == len(several) - dropped
            assert set(plan.row_ids) <= set(several)
            assert dropped == 0 or loss == "pro"
            assert metrics.pairs_dropped.get("duplicate", 0) == len(judged) - sum(map(len, scores.values()))
            assert metrics.material == "groups"
        assert metrics.pairs_trained == len(plan.row_ids) > 0
        # The first of two iterations is the first half of the training.
        assert plan.training == ((iteration - 1) / 2, iteration / 2)


def test_kto_is_given_every_judged_answer_once_with_its_thumb(blank: Path, tmp_path: Path) -> None:
    run = run_once(tmp_path / RUN, blank, Settings(loss="kto"))
    for iteration, (plan, metrics) in enumerate(zip(run.group.plans, read_metrics(tmp_path / RUN), strict=True), 1):
        verdicts = records(tmp_path / RUN, "verdicts", iteration=iteration)
        texts = {r.response_id: (r.query_id, r.text) for r in records(tmp_path / RUN, "responses", iteration=iteration)}
        labels: dict[tuple[str, str], set[str]] = {}
        for verdict in verdicts:
            if verdict.label is not None:
                labels.setdefault(texts[verdict.response_id], set()).add(verdict.label)
        by_query: dict[str, set[str]] = {}
        for (query, _), said in labels.items():
            by_query.setdefault(query, set()).update(said)
        # Queries whose answers all pass or all fail are there too, which give no pair.
        assert any(len(said) == 1 for said in by_query.values())
        dropped = metrics.pairs_dropped
        trained = [texts[row] for row in plan.row_ids]
        assert len(set(trained)) == len(trained)
        assert set(trained) <= set(labels)
        num_judged = sum(verdict.label is not None for verdict in verdicts)
        lost = dropped.get("duplicate", 0) + dropped.get("flaw_in_passing", 0)
        assert len(trained) == num_judged - lost == metrics.pairs_trained
        assert metrics.material == "judged"
        left_out = records(tmp_path / RUN, "left_out", iteration=iteration)
        assert len(left_out) == lost
        assert metrics.training["side_ratio"] == pytest.approx(1.0)


@pytest.mark.parametrize("is_told", [False, True])
def test_sides_that_are_weighed_unlike_the_papers_advice_are_told_of_once(
    is_told: bool, blank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda self, text: notes.append(text))
    config = kto.Config(desirable_weight=1.0, undesirable_weight=50.0) if is_told else kto.Config()
    run_once(tmp_path / RUN, blank, Settings(loss="kto", loss_config=config))
    found = [note for note in notes if "the good answers weigh" in note]
    ratio = read_metrics(tmp_path / RUN)[0].training["side_ratio"]
    assert found == (
        [
            f"warning: in iteration 1 the good answers weigh {ratio:.2f} times as much as the bad, wanted 1 to 1.33: "
            "leave out loss.desirable_weight or loss.undesirable_weight to balance them"
        ]
        if is_told
        else []
    )


def test_an_update_that_its_kl_budget_ends_is_told_and_counted(
    blank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda self, text: notes.append(text))
    run_once(tmp_path / RUN, blank, Settings(iterations=1, kl_budget=KlBudget(enabled=True)))
    (row,) = read_metrics(tmp_path / RUN)
    assert row.training["num_steps"] == 1.0
    num_steps = 1 + int(row.training["num_left_out"])
    assert num_steps == -(-row.pairs_trained // Settings().batch_size) * Settings().epochs
    assert (row.training["kl_from_update_start"], row.training["kl_from_run_start"]) == (11.5, 12.0)
    assert [note for note in notes if "KL" in note] == [
        f"stopped by KL budget: iteration 1 ended its update after 1 of {num_steps} steps, 11.50 nats per response "
        "from the update's start, wanted at most 10"
    ]


SPENT = KlBudget(enabled=True, update=20.0, run=11.0)
"""The fake's updates go 11.5 nats from their start, 12 from the run's."""


@pytest.mark.parametrize("max_policy_age", [0, 1])
def test_a_run_whose_kl_budget_is_spent_ends_with_that_iteration(
    max_policy_age: int, blank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda self, text: notes.append(text))
    settings = Settings(iterations=4, kl_budget=SPENT, max_policy_age=max_policy_age)
    run = run_once(tmp_path / RUN, blank, settings)
    assert [row.iteration for row in read_metrics(tmp_path / RUN)] == [1]
    assert (len(run.group.plans), run.driver.state.iteration, run.driver.state.kl_spent) == (1, 1, True)
    assert notes[-1] == (
        "run ended by KL budget: iteration 1 of 4 is the last, 12.00 nats per response from the run's start, wanted at "
        "most 11"
    )
    # The sets that a finished run answers are answered by what it ended with: its summary compares them.
    answered = Counter(row.set_name for row in records(tmp_path / RUN, "evaluations", iteration=1))
    assert answered.keys() == {"agreement", "probe", "sealed", "out_of_distribution", "attack_set"}
    assert (commit := last_commit(tmp_path / RUN)) is not None
    assert commit.iteration == 1
    if max_policy_age == 0:
        # No answer was sampled and judged that nothing would be learnt from.
        judged = [event for event in run.events if event.pool == "critic" and event.what == "asked"]
        assert len(judged) == NUM_QUERIES * NUM_SAMPLES
    # Whoever resumes it finds it finished.
    again = fake_run(tmp_path / RUN, settings)
    again.finish()
    assert (again.group.plans, again.driver.state.iteration) == ([], 1)
    assert [event for event in again.events if event.what == "asked"] == []


def test_a_run_that_is_killed_before_the_commit_of_its_last_update_ends_there_all_the_same(
    blank: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(blank, tmp_path / RUN))

    def die(point: str, num: int) -> None:
        if point == "save 1":
            raise KeyboardInterrupt

    settings = Settings(iterations=3, kl_budget=SPENT)
    with pytest.raises(KeyboardInterrupt):
        fake_run(path, settings, reach=die).finish()
    again = fake_run(path, settings)
    again.finish()
    assert (len(again.group.plans), again.driver.state.iteration, again.driver.state.kl_spent) == (1, 1, True)


def test_an_updates_own_budget_ends_no_run(blank: Path, tmp_path: Path) -> None:
    run = run_once(tmp_path / RUN, blank, Settings(kl_budget=KlBudget(enabled=True, update=11.0, run=12.0)))
    assert [row.iteration for row in read_metrics(tmp_path / RUN)] == [1, 2]
    assert not run.driver.state.kl_spent


def test_two_engines_that_differ_at_equal_weights_raise_the_alarm(
    blank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda self, text: notes.append(text))
    run_once(tmp_path / RUN, blank, Settings(iterations=3, rollout_gaps=(0.05, 0.0625)))
    # In iteration 1 the gap is the greatest that is allowed, in iteration 3 nothing is known of it.
    assert [row.training.get("rollout_gap") for row in read_metrics(tmp_path / RUN)] == [0.05, 0.0625, None]
    assert [note for note in notes if "alarm" in note] == [
        "alarm: in iteration 2 the rollout engine's log-probs differ from the learner's by 0.062 nats per token at "
        "equal weights, wanted at most 0.05: compare dtypes and sampling"
    ]


def test_a_critic_that_is_lost_half_of_the_time_leaves_its_answers_unjudged(blank: Path, tmp_path: Path) -> None:
    run_once(tmp_path / RUN, blank, Settings(critic=FakeCritic(babble_rate=0.5)))
    for row in read_metrics(tmp_path / RUN):
        verdicts = records(tmp_path / RUN, "verdicts", iteration=row.iteration)
        num_missing = sum(verdict.label is None for verdict in verdicts)
        assert 0 < num_missing == row.pairs_dropped["unjudged"] < len(verdicts)
        # The experts' budget is a share of what the critic judged; equal answers may share an expert's label.
        readable = sum(c.parse_ok for c in records(tmp_path / RUN, "critiques", iteration=row.iteration))
        assert row.num_verdicts == readable <= len(verdicts) - num_missing
        judged = sum(cell.num_pass + cell.num_fail for cell in row.cells)
        assert judged == len(verdicts) - num_missing


def test_requests_without_an_answer_are_counted_and_the_loop_goes_on(blank: Path, tmp_path: Path) -> None:
    run_once(tmp_path / RUN, blank, Settings(losing=frozenset({"attacker", "critic"})))
    for row in read_metrics(tmp_path / RUN):
        asked = records(tmp_path / RUN, "proposals", iteration=row.iteration)
        answers = records(tmp_path / RUN, "responses", iteration=row.iteration)
        critiques = records(tmp_path / RUN, "critiques", iteration=row.iteration)
        # Issued = answered + lost, and what is lost is judged neither way.
        assert row.lost == {"critiques": len(answers) - len(critiques)}
        assert 0 < row.lost["critiques"] < len(answers)
        # An expert's label on an equal answer may still judge one.
        assert row.pairs_dropped.get("unjudged", 0) <= row.lost["critiques"]
        assert row.proposals["lost"] == sum(proposal.outcome == "lost" for proposal in asked) > 0
        assert sorted(proposal.sample_index for proposal in asked) == list(range(len(asked)))
        assert row.num_verdicts == len(critiques)


def test_an_answer_that_was_lost_and_comes_after_a_resume_has_no_verdict(blank: Path, tmp_path: Path) -> None:
    class Died(Exception):
        pass

    def dying_at(point: str) -> Callable[[str, int], None]:
        def reach(reached: str, num: int) -> None:
            if reached == point:
                raise Died(point)

        return reach

    path = Path(shutil.copytree(blank, tmp_path / RUN))
    for losing, point in ((frozenset[str](), "queries 1"), (frozenset({"rollouts"}), "pairs 1")):
        with pytest.raises(Died, match=point):
            fake_run(path, Settings(losing=losing), reach=dying_at(point)).finish()
    fake_run(path, Settings()).finish()
    answers, verdicts = (records(path, stage, iteration=1) for stage in ("responses", "verdicts"))
    assert len(verdicts) < len(answers), "the verdicts stood when the lost answers came"


def test_what_breaks_in_one_stream_ends_the_iteration_as_it_is(blank: Path, tmp_path: Path) -> None:
    class DiskFull(OSError):
        pass

    def fail(point: str, num: int) -> None:
        if point == "critiques 1":
            raise DiskFull("no space left")

    shutil.copytree(blank, tmp_path / RUN)
    run = fake_run(tmp_path / RUN, Settings(), reach=fail)
    with pytest.raises(DiskFull, match="no space left"):
        run.finish()
    fake_run(tmp_path / RUN, Settings(), reach=pass_by).finish()
    assert [row.iteration for row in read_metrics(tmp_path / RUN)] == [1, 2]


def test_the_sittings_of_a_run_add_up_their_seconds(blank: Path, tmp_path: Path) -> None:
    shutil.copytree(blank, tmp_path / RUN)
    stop = StopSignal()
    run = fake_run(
        tmp_path / RUN, Settings(), reach=lambda point, num: stop.request() if point == "save 1" else None, stop=stop
    )
    with pytest.raises(Stopped):
        run.finish()
    first = run.driver.state.wall_s
    begin = time.monotonic()
    again = fake_run(tmp_path / RUN, Settings())
    again.finish()
    second = time.monotonic() - begin
    total = again.driver.state.wall_s
    assert set(first) == set(total) == {"bootstrap", "start", "iterations"}
    assert 0 < first["iterations"] < total["iterations"]
    assert 0 < first["start"] < total["start"]
    assert sum(first.values()) < sum(total.values()) <= sum(first.values()) + second
