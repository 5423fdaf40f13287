"""Owns what the report reads of a run's journal: first every committed row without its texts, then the texts of a few.

Only what is committed counts: of the open iteration nothing is shown. A run of an older version, or one that was cut
short, lacks some tables; what is not there is left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.rubrics import FAIL, PASS
from trainers.feedback.training_data import Material

AGREEMENT = "agreement"
"""The set of live answers on which the critic is compared with truth."""
UNREADABLE, NOT_ASKED = "unreadable", "not asked"
AGREED, OVERRULED, DECIDED, ABSTAINED = "agreed", "overruled", "decided", "no label"
EXPERT_ANSWERS = (AGREED, OVERRULED, DECIDED, ABSTAINED)
"""What can have come of asking an expert."""
RIGHT, WRONG = "right", "wrong"
IMPROVED, WORSENED = "improved", "worsened"
CHOSEN, REJECTED, UNPAIRED, ALL_PASS, ALL_FAIL, UNJUDGED, TRAINED, LEFT_OUT, FAILS = (
    "chosen",
    "rejected",
    "in no pair",
    "all pass",
    "all fail",
    "unjudged",
    "trained on",
    "left out",
    "fails",
)
TRAINED_FATES: dict[Material, tuple[str, ...]] = {
    "pairs": (CHOSEN, REJECTED),
    "judged": (TRAINED,),
    "samples": (TRAINED,),
    "groups": (TRAINED,),
    "accepted": (TRAINED,),
}
"""What became of the answers that an update was made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveAnswer:
    """What was said about one sampled answer of the loop."""

    iteration: int
    query_id: str
    response_id: str
    cell: str
    score: float | None
    """The critic's P(good), the mean over its critiques; None when none could be read."""
    critic: str
    """The critic's own verdict before escalation: "pass", "fail" or "unreadable"."""
    expert: str
    """"agreed" or "overruled", "decided" where the critic was unreadable, "no label" (abstained, or still to come), or
    "not asked"."""
    truth: str
    """"right" or "wrong" in the agreement sample, else "not asked"."""
    label: str | None
    """The verdict that counted."""
    fate: str
    """What training made of it: "chosen" or "rejected" in a pair, else "trained on" or "left out", or why not."""
    broke: bool
    """Whether its query was a success of the attacker: the critic failed at least half of the judged answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedAnswer:
    """One greedy answer to an evaluation problem, graded by truth."""

    set_name: str
    iteration: int
    item: int
    answer_id: str
    cell: str
    correct: bool
    well_formed: bool
    change: str
    """In a set that is asked at the start and at the end: "improved", "worsened", or right or wrong both times."""

    @property
    def truth(self) -> str:
        """Return the grade in words."""
        return RIGHT if self.correct else WRONG


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedProposal:
    """One text of the attacker that did not become a query."""

    iteration: int
    proposal_id: str
    cell: str
    """The cell that the attack asked for."""
    outcome: str


@dataclass(frozen=True)
class Journal:
    """The committed rows of a run, without their texts."""

    directories: Mapping[int, Path]
    """By iteration."""
    live: tuple[LiveAnswer, ...]
    graded: tuple[GradedAnswer, ...]
    proposals: tuple[DroppedProposal, ...]

    @cached_property
    def sampled(self) -> tuple[LiveAnswer, ...]:
        """Return the judged answers of the agreement sample; none in a run of a version that did not record them."""
        return tuple(answer for answer in self.live if answer.truth != NOT_ASKED and answer.score is not None)

    @cached_property
    def grades(self) -> dict[tuple[str, int], list[GradedAnswer]]:
        """Return the graded answers of each set and iteration, in the order of their items."""
        by_set: defaultdict[tuple[str, int], list[GradedAnswer]] = defaultdict(list)
        for answer in sorted(self.graded, key=lambda answer: answer.item):
            by_set[answer.set_name, answer.iteration].append(answer)
        return dict(by_set)


def read_journal(run_dir: Path, *, material: Material = "pairs") -> Journal:
    """Return what a run's journal holds of its committed iterations, whose updates were made of a material."""
    commits = sorted((run_dir / "journal").glob("iteration=*/COMMIT.json"))
    directories = {int(path.parent.name.removeprefix("iteration=")): path.parent for path in commits}
    live: list[LiveAnswer] = []
    graded: list[GradedAnswer] = []
    proposals: list[DroppedProposal] = []
    for iteration, directory in directories.items():
        columns = ["answer_id", "set_name", "item", "facets", "correct", "well_formed"]
        evaluations = _rows(directory, "evaluations", columns=columns)
        truth = {row["answer_id"]: row["correct"] for row in evaluations if row["set_name"] == AGREEMENT}
        live += _live_answers(directory, iteration, truth, material)
        graded += [_graded(row, iteration) for row in evaluations if row["set_name"] != AGREEMENT]
        proposals += [
            DroppedProposal(
                iteration=iteration,
                proposal_id=row["proposal_id"],
                cell=cell_name(row["target"]),
                outcome=row["outcome"].replace("_", " "),
            )
            for row in _rows(directory, "proposals", columns=["proposal_id", "target", "outcome"])
            if row["outcome"] != "accepted"
        ]
    return Journal(
        directories=directories, live=tuple(live), graded=tuple(_with_changes(graded)), proposals=tuple(proposals)
    )


def cell_name(facets: Sequence[str]) -> str:
    """Return a taxonomy cell as it is written everywhere in the report."""
    return " · ".join(facets)


# --------------------------------------------------------------------------------------------------------- live answers


def _live_answers(directory: Path, iteration: int, truth: Mapping[str, bool], material: Material) -> list[LiveAnswer]:
    columns = ["query_id", "response_id", "label", "source", "escalated"]
    verdicts = sorted(_rows(directory, "verdicts", columns=columns), key=lambda row: row["response_id"])
    cells = {
        row["query_id"]: cell_name(row["facets"]) for row in _rows(directory, "queries", columns=["query_id", "facets"])
    }
    scores = _scores(directory)
    critics = {row["response_id"]: _critic_label(scores.get(row["response_id"])) for row in verdicts}
    if material == "pairs":
        fates = _fates(verdicts, _rows(directory, "pairs", columns=["chosen_id", "rejected_id"]))
    else:
        fates = {row["response_id"]: _fate_alone(row["label"], material) for row in verdicts}
        # A reward model scores also what the critic could not judge.
        fates |= {row["response_id"]: TRAINED for row in _rows(directory, "rewards", columns=["response_id"])}
        unused = _rows(directory, "left_out", columns=["response_id"])
        fates |= {row["response_id"]: LEFT_OUT for row in unused if fates.get(row["response_id"]) == TRAINED}
    broken = _broken(verdicts, critics)
    return [
        LiveAnswer(
            iteration=iteration,
            query_id=row["query_id"],
            response_id=row["response_id"],
            cell=cells[row["query_id"]],
            score=scores.get(row["response_id"]),
            critic=critics[row["response_id"]],
            expert=_expert(row, critic=critics[row["response_id"]]),
            truth={True: RIGHT, False: WRONG, None: NOT_ASKED}[truth.get(row["response_id"])],
            label=row["label"],
            fate=fates[row["response_id"]],
            broke=row["query_id"] in broken,
        )
        for row in verdicts
    ]


def _scores(directory: Path) -> dict[str, float]:
    """Return P(good) by response: the mean over the critiques that could be read."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    rows = _rows(directory, "critiques", columns=["critique_id", "response_ids", "score"])
    for row in sorted(rows, key=lambda row: row["critique_id"]):
        if row["score"] is not None and len(row["response_ids"]) == 1:
            found[row["response_ids"][0]].append(row["score"])
    return {response_id: sum(scores) / len(scores) for response_id, scores in found.items()}


def _critic_label(score: float | None) -> str:
    return UNREADABLE if score is None else PASS if score >= 0.5 else FAIL


def _expert(verdict: Mapping[str, Any], *, critic: str) -> str:
    if not verdict["escalated"]:
        return NOT_ASKED
    if verdict["source"] != "expert":
        return ABSTAINED
    if critic == UNREADABLE:
        return DECIDED
    return AGREED if verdict["label"] == critic else OVERRULED


def _fates(verdicts: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what became of each answer; `trainers.feedback.preferences` says when a query gives no pair."""
    fates = {row["chosen_id"]: CHOSEN for row in pairs} | {row["rejected_id"]: REJECTED for row in pairs}
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for row in verdicts:
        if row["label"] is not None:
            labels[row["query_id"]].add(row["label"])
    for row in verdicts:
        said = labels[row["query_id"]]
        why = UNPAIRED if len(said) == 2 else ALL_PASS if PASS in said else ALL_FAIL
        fates.setdefault(row["response_id"], UNJUDGED if row["label"] is None else why)
    return fates


def _fate_alone(label: str | None, material: Material) -> str:
    """Return what became of an answer that stands for itself (`trainers.feedback.training_data`)."""
    if label is None:
        return UNJUDGED
    return TRAINED if label == PASS or material != "accepted" else FAILS


def _broken(verdicts: Sequence[Mapping[str, Any]], critics: Mapping[str, str]) -> set[str]:
    """Return the queries of which the critic failed at least half of the answers that it judged."""
    judged: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for row in verdicts:
        judged[row["query_id"]] += critics[row["response_id"]] != UNREADABLE
        failed[row["query_id"]] += critics[row["response_id"]] == FAIL
    return {query_id for query_id, num in judged.items() if num and 2 * failed[query_id] >= num}


# ------------------------------------------------------------------------------------------------------- graded answers


def _graded(row: Mapping[str, Any], iteration: int) -> GradedAnswer:
    return GradedAnswer(
        set_name=row["set_name"],
        iteration=iteration,
        item=row["item"],
        answer_id=row["answer_id"],
        cell=cell_name(row["facets"]),
        correct=row["correct"],
        well_formed=row["well_formed"],
        change="",
    )


def _with_changes(graded: Sequence[GradedAnswer]) -> list[GradedAnswer]:
    """Return the answers with what changed, where a set was asked exactly twice: at the start and at the end."""
    iterations: defaultdict[str, set[int]] = defaultdict(set)
    for answer in graded:
        iterations[answer.set_name].add(answer.iteration)
    twice = {name for name, found in iterations.items() if len(found) == 2 and min(found) == 0}
    correct = {(a.set_name, a.item, a.iteration > 0): a.correct for a in graded if a.set_name in twice}

    def change(answer: GradedAnswer) -> str:
        before = correct.get((answer.set_name, answer.item, False))
        after = correct.get((answer.set_name, answer.item, True))
        if before is None or after is None:
            return ""
        if before == after:
            return f"{RIGHT if after else WRONG} both times"
        return IMPROVED if after else WORSENED

    return [replace(answer, change=change(answer)) for answer in graded]


# ---------------------------------------------------------------------------------------------------------------- texts


def query_texts(directory: Path, query_ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return queries by id: `messages`, `attack`, `attacker_version`, `split`."""
    columns = ["query_id", "messages", "attack", "attacker_version", "split"]
    return _by_id(directory, "queries", "query_id", query_ids, columns=columns)


def response_texts(directory: Path, query_ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the answers to queries by id: `text`, `sample_index`, `policy_version`, `finish_reason`."""
    columns = ["response_id", "query_id", "text", "sample_index", "policy_version", "finish_reason"]
    rows = _rows(directory, "responses", columns=columns, only=_among("query_id", query_ids))
    return {row["response_id"]: row for row in rows}


def critique_texts(directory: Path, query_ids: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the critiques of the answers to queries, by response id."""
    columns = ["critique_id", "query_id", "response_ids", "text", "issues", "score", "label_logprobs", "critic_version"]
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    rows = _rows(directory, "critiques", columns=columns, only=_among("query_id", query_ids))
    for row in sorted(rows, key=lambda row: row["critique_id"]):
        for response_id in row["response_ids"]:
            found[response_id].append(row)
    return dict(found)


def graded_texts(directory: Path, answer_ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return evaluation answers by id: `query`, `text`, `policy_version`."""
    columns = ["answer_id", "query", "text", "policy_version"]
    return _by_id(directory, "evaluations", "answer_id", answer_ids, columns=columns)


def proposal_texts(directory: Path, proposal_ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return proposals by id: `text`."""
    return _by_id(directory, "proposals", "proposal_id", proposal_ids, columns=["proposal_id", "text"])


def _by_id(
    directory: Path, name: str, key: str, ids: Collection[str], *, columns: list[str]
) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in _rows(directory, name, columns=columns, only=_among(key, ids))}


def _among(key: str, ids: Collection[str]) -> pc.Expression:
    return pc.field(key).isin(sorted(ids))


def _rows(directory: Path, name: str, *, columns: list[str], only: pc.Expression | None = None) -> list[dict[str, Any]]:
    """Return rows of a committed table; none where the iteration has no such table."""
    path = directory / f"{name}.parquet"
    if not path.exists():
        return []
    # `partitioning=None`: the directory's "iteration=000007" is not a column of the record.
    return pq.read_table(path, columns=columns, filters=only, partitioning=None).to_pylist()
