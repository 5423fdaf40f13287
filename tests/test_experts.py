"""The expert queue keeps what it acknowledged, counts every answer once, and the simulated expert is as asked."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from actors.experts import ExpertBudget, ExpertItem, ExpertQueue, SimulatedExpert, SimulatedExpertConfig
from actors.records import ExpertLabel, LabelKind

REPOSITORY = Path(__file__).resolve().parent.parent


class DoublesChecker:
    """Truth of a world where "n" asks for 2 n, and where n is how hard it is."""

    def correct(self, query: str, response: str) -> bool:
        return int(response) == 2 * int(query)

    def difficulty(self, query: str) -> float:
        return float(query)


def response_item(number: int, *, right: bool = True) -> ExpertItem:
    answer = 2 * number if right else 2 * number + 1
    return ExpertItem(
        item_id=f"item-{number:04d}",
        kind=LabelKind.RESPONSE,
        query=str(number),
        responses=(str(answer),),
        critique="unsure",
        why="low confidence 0.52",
    )


def pair_item(item_id: str, first: str, second: str) -> ExpertItem:
    return ExpertItem(
        item_id=item_id, kind=LabelKind.PAIR, query="4", responses=(first, second), critique=None, why="disagreement"
    )


def label(item_id: str, *, decision: str | None = "pass", expert: str = "ada", kind: str = "response") -> ExpertLabel:
    return ExpertLabel(item_id=item_id, kind=kind, label=decision, expert=expert, seconds=3.5, time=100.0, comment="")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels" / "queue.sqlite3"


@pytest.fixture
def queue(path: Path) -> ExpertQueue:
    return ExpertQueue(path)


def simulated(**settings: float) -> SimulatedExpert:
    return SimulatedExpert(DoublesChecker(), config=SimulatedExpertConfig.model_validate(settings))


# ---------------------------------------------------------------------------------------------------------- queue


def test_asking_again_adds_nothing_and_the_first_text_stays(queue: ExpertQueue) -> None:
    assert queue.ask([response_item(1), response_item(2)]) == 2
    assert queue.ask([replace(response_item(2), responses=("9",)), response_item(3)]) == 1
    assert queue.pending() == [response_item(1), response_item(2), response_item(3)]
    assert queue.pending(limit=1) == [response_item(1)]


def test_the_first_answer_of_an_expert_counts_and_the_next_is_kept_as_superseded(queue: ExpertQueue) -> None:
    queue.ask([response_item(1)])
    assert queue.answer(label("item-0001", decision="fail"))
    assert not queue.answer(label("item-0001", decision="pass"))
    assert queue.answer(label("item-0001", decision="pass", expert="bob"))
    assert [(each.expert, each.label) for each in queue.labels_since().labels] == [("ada", "fail"), ("bob", "pass")]
    counts = queue.counts()
    assert (counts.asked, counts.decided, counts.abstained, counts.pending, counts.superseded) == (1, 1, 0, 0, 1)


def test_an_abstention_leaves_the_item_to_other_experts_only(queue: ExpertQueue) -> None:
    queue.ask([response_item(1), response_item(2)])
    queue.answer(label("item-0001", decision=None))
    assert queue.pending() == [response_item(2)]
    assert queue.pending(expert="ada") == [response_item(2)]
    assert queue.pending(expert="bob") == [response_item(1), response_item(2)]
    queue.answer(label("item-0001", decision="fail", expert="bob"))
    assert queue.pending(expert="eve") == [response_item(2)]
    counts = queue.counts()
    assert (counts.decided, counts.abstained, counts.pending) == (1, 0, 1)


def test_labels_since_gives_each_label_once_in_the_order_given(queue: ExpertQueue) -> None:
    queue.ask([response_item(number) for number in (1, 2, 3)])
    assert queue.labels_since(0) == ((), 0)
    queue.answer(label("item-0003"))
    first = queue.labels_since(0)
    assert [each.item_id for each in first.labels] == ["item-0003"]
    queue.answer(label("item-0003", decision="fail"))  # superseded: never handed out
    queue.answer(label("item-0001", decision=None))
    second = queue.labels_since(first.watermark)
    assert [(each.item_id, each.label) for each in second.labels] == [("item-0001", None)]
    assert queue.labels_since(second.watermark) == ((), second.watermark)


def test_a_label_comes_back_as_it_was_given(queue: ExpertQueue) -> None:
    queue.ask([pair_item("p", "8", "9")])
    given = replace(label("p", decision="tie", kind="pair"), comment="both fine\u202e <b>")
    queue.answer(given)
    assert queue.labels_since().labels == (given,)


def test_wrong_items_and_labels_are_refused_and_named(queue: ExpertQueue) -> None:
    queue.ask([response_item(1)])
    with pytest.raises(ValueError, match="got item nobody, wanted one that was asked"):
        queue.answer(label("nobody"))
    with pytest.raises(ValueError, match='item-0001: got kind "pair", wanted "response"'):
        queue.answer(label("item-0001", kind="pair", decision="A"))
    with pytest.raises(ValueError, match='got "A", wanted pass, fail or None'):
        queue.answer(label("item-0001", decision="A"))
    with pytest.raises(ValueError, match="got 2 responses, wanted 1 for a response"):
        queue.ask([replace(response_item(2), responses=("1", "2"))])
    with pytest.raises(ValueError, match='got kind "essay", wanted response, pair'):
        queue.ask([replace(response_item(2), kind="essay")])
    assert queue.counts().asked == 1
    assert queue.labels_since() == ((), 0)


def test_labels_can_be_neither_changed_nor_removed(queue: ExpertQueue, path: Path) -> None:
    queue.ask([response_item(1)])
    queue.answer(label("item-0001"))
    connection = sqlite3.connect(path)
    for statement in ("UPDATE labels SET label = 'fail'", "DELETE FROM labels"):
        with pytest.raises(sqlite3.IntegrityError, match="labels are append-only"):
            connection.execute(statement)
    connection.close()


def test_a_restart_finds_items_labels_and_the_watermark(queue: ExpertQueue, path: Path) -> None:
    queue.ask([response_item(1), response_item(2)])
    queue.answer(label("item-0001"))
    watermark = queue.labels_since().watermark
    queue.close()
    again = ExpertQueue(path)
    assert again.pending() == [response_item(2)]
    assert again.labels_since(watermark) == ((), watermark)
    again.answer(label("item-0002"))
    assert [each.item_id for each in again.labels_since(watermark).labels] == ["item-0002"]
    again.close()


# ------------------------------------------------------------------------------------------------- two processes

ANSWERING_PROCESS = """
import sys
from pathlib import Path
from actors.experts import ExpertItem, ExpertQueue
from actors.records import ExpertLabel

sys.stdin.readline()  # both begin at once, also with making the file
queue = ExpertQueue(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    name = f"item-{number:04d}"
    queue.ask([ExpertItem(item_id=name, kind="response", query="1", responses=("2",), critique=None, why="")])
    counted = queue.answer(
        ExpertLabel(item_id=name, kind="response", label="pass", expert="ada", seconds=0.0, time=0.0, comment="")
    )
    print(name if counted else "superseded", flush=True)
"""


def start_answering(path: Path, num_items: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ANSWERING_PROCESS, str(path), str(num_items)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_that_ask_and_answer_the_same_items_count_each_once(path: Path) -> None:
    processes = [start_answering(path, 60) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [line for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in processes] == [0, 0]
    names = [f"item-{number:04d}" for number in range(60)]
    assert sorted(line for line in printed if line != "superseded") == names
    queue = ExpertQueue(path)
    assert sorted(each.item_id for each in queue.labels_since().labels) == names
    assert queue.counts() == (60, 60, 0, 0, 60)
    queue.close()


def test_a_killed_process_loses_no_answer_that_it_acknowledged(path: Path) -> None:
    process = start_answering(path, 100_000)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    acknowledged = [process.stdout.readline().strip() for _ in range(25)]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged += process.stdout.read().split()
    process.wait(timeout=30)
    process.stdin.close()
    process.stdout.close()
    queue = ExpertQueue(path)
    kept = [each.item_id for each in queue.labels_since().labels]
    assert kept[: len(acknowledged)] == acknowledged
    assert len(kept) - len(acknowledged) in (0, 1)
    queue.close()


# --------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("fraction", "num_verdicts", "num_asked", "allowed"),
    [
        (0.05, 100, 3, 2),
        (0.05, 19, 0, 0),
        (0.05, 20, 0, 1),
        (0.05, 20, 1, 0),
        (0.05, 100, 9, 0),
        (0.29, 100, 0, 29),  # 28.999999999999996 in binary
        (0.0, 1000, 0, 0),
        (1.0, 7, 0, 7),
    ],
)
def test_the_budget_allows_its_share_of_all_verdicts(
    fraction: float, num_verdicts: int, num_asked: int, allowed: int
) -> None:
    assert ExpertBudget(fraction=fraction).allowed(num_verdicts, num_asked=num_asked) == allowed


def test_asking_what_the_budget_allows_never_exceeds_it() -> None:
    budget = ExpertBudget()
    num_asked = 0
    for num_verdicts in range(0, 5000, 37):
        num_asked += budget.allowed(num_verdicts, num_asked=num_asked)
        assert num_asked * 20 <= num_verdicts < (num_asked + 1) * 20


def test_a_fraction_above_one_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        ExpertBudget(fraction=5.0)


# ----------------------------------------------------------------------------------------------- simulated expert


def test_the_simulated_expert_judges_responses_and_pairs_by_truth(queue: ExpertQueue) -> None:
    queue.ask([response_item(1), response_item(2, right=False)])
    queue.ask([pair_item("a", "8", "9"), pair_item("b", "9", "8"), pair_item("t", "8", "8"), pair_item("u", "7", "9")])
    assert simulated(seconds=12.0).answer_pending(queue) == 6
    labels = queue.labels_since().labels
    assert {each.item_id: each.label for each in labels} == {
        "item-0001": "pass",
        "item-0002": "fail",
        "a": "A",
        "b": "B",
        "t": "tie",
        "u": "tie",
    }
    assert {(each.expert, each.seconds) for each in labels} == {("simulated", 12.0)}
    assert queue.pending() == []
    assert simulated().answer_pending(queue) == 0


def test_the_simulated_expert_abstains_above_its_difficulty(queue: ExpertQueue) -> None:
    queue.ask([response_item(number) for number in (3, 4, 5)])
    simulated(max_difficulty=4.0).answer_pending(queue)
    assert [each.label for each in queue.labels_since().labels] == ["pass", "pass", None]
    counts = queue.counts()
    assert (counts.decided, counts.abstained) == (2, 1)


def test_the_simulated_expert_errs_as_often_as_asked_and_on_the_same_items_each_time() -> None:
    expert, other_seed = simulated(error_rate=0.1, seed=3), simulated(error_rate=0.1, seed=4)
    items = [response_item(number) for number in range(4000)]
    wrong = {item.item_id for item in items if expert.label(item).label == "fail"}
    # Binomial(4000, 0.1): mean 400, standard deviation 19; four of them on either side.
    assert 324 <= len(wrong) <= 476
    assert wrong == {item.item_id for item in reversed(items) if expert.label(item).label == "fail"}
    assert wrong != {item.item_id for item in items if other_seed.label(item).label == "fail"}


def test_an_error_on_a_pair_is_never_the_truth() -> None:
    expert = simulated(error_rate=1.0)
    given = [expert.label(pair_item("pair", "8", f"9{number}")).label for number in range(200)]
    assert set(given) == {"B", "tie"}
