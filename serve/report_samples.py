"""Owns which rows of a run are in the report's file, with their texts, and how a point of a chart names its rows.

A row's *group* is everything that it can be looked up by (set, iteration, cell, verdicts, ...). Rows come in *units*: a
query with all its answers, one graded answer, or one dropped proposal. The file has room for so many; they are drawn
with a fixed seed so that every group has a row before any has a second, and four times as deep from groups in which
the critic, the experts and truth differ. How many rows a group has in the journal is in the file too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from actors.rubrics import FAIL, PASS
from serve import report_journal
from serve.report_journal import NOT_ASKED, UNREADABLE, DroppedProposal, GradedAnswer, Journal, LiveAnswer

LIVE, PROPOSALS = "live", "proposals"
DIMENSIONS = ("set", "iteration", "cell", "critic", "expert", "truth", "sure", "attack", "fate")
"""What rows can be looked up by; a link names some of them."""
MOST_CHARACTERS = 2_000
"""A longer text is cut in the file."""

Group = tuple[str, ...]
"""One value per dimension; empty where the dimension means nothing for the row."""
Row = LiveAnswer | GradedAnswer | DroppedProposal

_TELLING_DEPTH = 4
_NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much of one kind of rows the file takes."""

    rows: int
    size_bytes: int
    """Of JSON, equal texts counted once."""


ROOM = {
    "live": Room(rows=16_000, size_bytes=2_000_000),
    "graded": Room(rows=6_000, size_bytes=500_000),
    "proposals": Room(rows=1_500, size_bytes=100_000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The rows in the report's file."""

    data: Mapping[str, Any]
    """What serve/report.js reads, plain JSON values."""
    num_shown: Mapping[str, int]
    """Rows in the file, by set."""
    num_rows: Mapping[str, int]
    """Rows in the journal, by set."""
    num_cut: int
    """Texts in the file that are cut."""
    counts: Mapping[Group, int]
    """Rows in the journal, by group."""

    def count(self, **wanted: str | int | Sequence[str | int]) -> int:
        """Return how many rows of the journal the link with the same arguments leads to."""
        places = [(DIMENSIONS.index(name), {str(v) for v in _several(found)}) for name, found in wanted.items()]
        return sum(num for group, num in self.counts.items() if all(group[place] in found for place, found in places))


def link(**wanted: str | int | Sequence[str | int]) -> str:
    """Return the address, within the page, of the rows with these values.

    >>> link(set="live", iteration=3, critic=["pass", "fail"])
    '#samples?set=live&iteration=3&critic=pass&critic=fail'

    Raises:
        ValueError: there is no such dimension.
    """
    unknown = sorted(wanted.keys() - set(DIMENSIONS))
    if unknown:
        raise ValueError(f"link: got {unknown[0]}, wanted one of {', '.join(DIMENSIONS)}")
    return "#samples?" + urlencode([(name, value) for name, found in wanted.items() for value in _several(found)])


def confidence_bin(score: float) -> str:
    """Return the bin of P(good) by which a row is looked up: the bins of `statistics.calibration`.

    >>> confidence_bin(0.97), confidence_bin(1.0)
    ('0.9 to 1.0', '0.9 to 1.0')
    """
    index = min(int(score * _NUM_BINS), _NUM_BINS - 1)
    return f"{index / _NUM_BINS:.1f} to {(index + 1) / _NUM_BINS:.1f}"


def pick_samples(journal: Journal, *, room: Mapping[str, Room] = ROOM) -> Samples:
    """Return the rows for the report's file: some of every group, whole queries, within the file's room."""
    units = {
        "live": _queries(journal.live),
        "graded": [_Unit.of([row], key=f"{row.set_name}/{row.item}") for row in journal.graded],
        "proposals": [_Unit.of([row], key=row.proposal_id) for row in journal.proposals],
    }
    counts = Counter(group for kind in units.values() for unit in kind for group in unit.groups)
    file = _File(counts)
    for kind, found in units.items():
        chosen = _draw(found, most_rows=room[kind].rows)
        file.add(_with_texts(chosen, journal.directories), most_bytes=room[kind].size_bytes)
    return Samples(
        data=file.data(), num_shown=file.num_shown, num_rows=_by_set(counts), num_cut=file.num_cut, counts=counts
    )


def _by_set(counts: Mapping[Group, int]) -> Counter[str]:
    sets: Counter[str] = Counter()
    for group, num in counts.items():
        sets[group[0]] += num
    return sets


def _several(value: str | int | Sequence[str | int]) -> Sequence[str | int]:
    return (value,) if isinstance(value, str | int) else value


# ----------------------------------------------------------------------------------------------------------- the choice


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """Rows that are shown together, all of one iteration and of one kind."""

    key: str
    """What they are about; a problem that was asked at the start and at the end has one key."""
    iteration: int
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    is_telling: bool

    @classmethod
    def of(cls, rows: Sequence[Row], *, key: str) -> _Unit:
        return cls(
            key=key,
            iteration=rows[0].iteration,
            rows=tuple(rows),
            groups=tuple(_group(row) for row in rows),
            is_telling=any(_is_telling(row) for row in rows),
        )


def _queries(answers: Sequence[LiveAnswer]) -> list[_Unit]:
    by_query: defaultdict[str, list[LiveAnswer]] = defaultdict(list)
    for answer in answers:
        by_query[answer.query_id].append(answer)
    return [_Unit.of(rows, key=query_id) for query_id, rows in by_query.items()]


def _group(row: Row) -> Group:
    match row:
        case LiveAnswer():
            sure = confidence_bin(row.score) if row.truth != NOT_ASKED and row.score is not None else ""
            attack = "succeeded" if row.broke else "held off"
            return (LIVE, str(row.iteration), row.cell, row.critic, row.expert, row.truth, sure, attack, row.fate)
        case GradedAnswer():
            return (row.set_name, str(row.iteration), row.cell, "", "", row.truth, "", "", row.change)
        case DroppedProposal():
            return (PROPOSALS, str(row.iteration), row.cell, "", "", "", "", "", row.outcome)


def _is_telling(row: Row) -> bool:
    match row:
        case LiveAnswer():
            mistaken = (row.critic, row.truth) in ((PASS, report_journal.WRONG), (FAIL, report_journal.RIGHT))
            disputed = row.expert not in (report_journal.AGREED, NOT_ASKED)
            return mistaken or disputed or row.critic == UNREADABLE
        case GradedAnswer():
            return row.change == report_journal.WORSENED or not row.well_formed
        case DroppedProposal():
            return False


def _draw(units: Iterable[_Unit], *, most_rows: int) -> list[_Unit]:
    """Return units in the order in which they are drawn, `most_rows` rows at most.

    A unit's rank is the best that a row of it has in the row's group, in an order by hash of what the units are about.
    """
    shuffled = sorted(units, key=lambda unit: hashlib.sha256(f"samples/{unit.key}".encode()).digest())
    seen: Counter[Group] = Counter()
    ranked = []
    for unit in shuffled:
        rank = min(seen[group] for group in unit.groups)
        seen.update(set(unit.groups))
        ranked.append((rank // _TELLING_DEPTH if unit.is_telling else rank, unit))
    drawn, num_rows = [], 0
    for _, unit in sorted(ranked, key=lambda pair: pair[0]):
        num_rows += len(unit.rows)
        if num_rows > most_rows:
            break
        drawn.append(unit)
    return drawn


# ------------------------------------------------------------------------------------------------------------ the texts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """A row with its texts."""

    group: Group
    text: str | None
    """None for a proposal: its text is the query."""
    about: Mapping[str, Any]
    critiques: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shown:
    """A unit with its texts."""

    unit: _Unit
    query: str
    about: Mapping[str, Any]
    answers: tuple[_Answer, ...]


def _with_texts(units: Sequence[_Unit], directories: Mapping[int, Path]) -> list[_Shown]:
    """Return the units, in their order, with the texts of the journal."""
    found: dict[str, _Shown] = {}
    for iteration in sorted({unit.iteration for unit in units}):
        mine = [unit for unit in units if unit.iteration == iteration]
        match mine[0].rows[0]:
            case LiveAnswer():
                shown = _live(mine, directories[iteration])
            case GradedAnswer():
                shown = _graded(mine, directories[iteration])
            case DroppedProposal():
                shown = _dropped(mine, directories[iteration])
        found |= {f"{iteration}/{one.unit.key}": one for one in shown}
    return [found[f"{unit.iteration}/{unit.key}"] for unit in units]


def _live(units: Sequence[_Unit], directory: Path) -> list[_Shown]:
    ids = [unit.key for unit in units]
    queries = report_journal.query_texts(directory, ids)
    texts = report_journal.response_texts(directory, ids)
    critiques = report_journal.critique_texts(directory, ids)
    shown = []
    for unit in units:
        answers = []
        for row, group in zip(unit.rows, unit.groups, strict=True):
            assert isinstance(row, LiveAnswer)
            text = texts[row.response_id]
            about = {"version": text["policy_version"], "counted": row.label or "none", "end": text["finish_reason"]}
            own = tuple(critiques.get(row.response_id, ()))
            answer = _Answer(group=group, text=text["text"], about=about, critiques=own)
            answers.append((text["sample_index"], answer))
        query = queries[unit.key]
        shown.append(
            _Shown(
                unit=unit,
                query=_conversation(query["messages"]),
                about={"attack": query["attack"], "attacker": query["attacker_version"], "split": query["split"]},
                answers=tuple(answer for _, answer in sorted(answers, key=lambda pair: pair[0])),
            )
        )
    return shown


def _graded(units: Sequence[_Unit], directory: Path) -> list[_Shown]:
    rows = [row for unit in units for row in unit.rows if isinstance(row, GradedAnswer)]
    texts = report_journal.graded_texts(directory, [row.answer_id for row in rows])
    shown = []
    for unit, row in zip(units, rows, strict=True):
        text = texts[row.answer_id]
        about = {"version": text["policy_version"], "well_formed": row.well_formed}
        answer = _Answer(group=unit.groups[0], text=text["text"], about=about)
        shown.append(_Shown(unit=unit, query=text["query"], about={}, answers=(answer,)))
    return shown


def _dropped(units: Sequence[_Unit], directory: Path) -> list[_Shown]:
    texts = report_journal.proposal_texts(directory, [unit.key for unit in units])
    return [
        _Shown(
            unit=unit,
            query=texts[unit.key]["text"],
            about={},
            answers=(_Answer(group=unit.groups[0], text=None, about={}),),
        )
        for unit in units
    ]


def _conversation(messages: Sequence[Mapping[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


# ------------------------------------------------------------------------------------------------------------- the file


class _Table:
    """JSON values by position, equal ones once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.size_bytes = 0
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        """Return where a value is, after adding it when it is new."""
        key = json.dumps(value)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
            self.size_bytes += len(key)
        return self._places[key]


class _File:
    """What goes into the page, grown unit by unit."""

    def __init__(self, counts: Mapping[Group, int]) -> None:
        self.num_cut = 0
        self.num_shown: Counter[str] = Counter()
        self._counts = counts
        self._groups = {group: place for place, group in enumerate(counts)}
        self._texts, self._abouts, self._critiques = _Table(), _Table(), _Table()
        self._units: list[tuple[tuple[int, str], list[Any]]] = []

    def add(self, shown: Sequence[_Shown], *, most_bytes: int) -> None:
        """Take units in their order while there is room for them."""
        begin, size_bytes = self._tables_bytes(), 0
        for one in shown:
            if self._tables_bytes() - begin + size_bytes > most_bytes:
                break
            rows = [self._row(answer) for answer in one.answers]
            unit = [self._text(one.query), self._abouts.place(one.about), rows]
            size_bytes += len(json.dumps(unit))
            self._units.append(((-one.unit.iteration, one.unit.key), unit))
            self.num_shown.update(answer.group[0] for answer in one.answers)

    def data(self) -> dict[str, Any]:
        """Return everything as JSON values, the newest iterations first.

        A unit is [text of the query, what is known of it, rows]; a row is [group, text of the answer, what is known of
        it, critiques]; texts, critiques and what is known are positions in their tables.
        """
        columns = [_Table() for _ in DIMENSIONS]
        groups = [
            [*(column.place(value) for column, value in zip(columns, group, strict=True)), num]
            for group, num in self._counts.items()
        ]
        return {
            "dimensions": list(DIMENSIONS),
            "values": [column.values for column in columns],
            "groups": groups,
            "texts": self._texts.values,
            "abouts": self._abouts.values,
            "critiques": self._critiques.values,
            "units": [unit for _, unit in sorted(self._units, key=lambda pair: pair[0])],
        }

    def _row(self, answer: _Answer) -> list[Any]:
        text = None if answer.text is None else self._text(answer.text)
        critiques = [self._critiques.place(self._critique(row)) for row in answer.critiques]
        return [self._groups[answer.group], text, self._abouts.place(answer.about), critiques]

    def _critique(self, row: Mapping[str, Any]) -> dict[str, Any]:
        issues = [
            [issue[name] for name in ("start", "end", "category", "explanation", "fix")] for issue in row["issues"]
        ]
        return {
            "text": self._text(row["text"]),
            "score": None if row["score"] is None else float(f"{row['score']:.3g}"),
            "marks": [round(math.exp(logprob), 3) for logprob in row["label_logprobs"]],
            "issues": issues,
            "version": row["critic_version"],
        }

    def _text(self, text: str) -> int:
        """Return the place of a text; a cut one is stored with the number of characters that are missing."""
        missing = len(text) - MOST_CHARACTERS
        if missing <= 0:
            return self._texts.place(text)
        self.num_cut += 1
        return self._texts.place([text[:MOST_CHARACTERS], missing])

    def _tables_bytes(self) -> int:
        return self._texts.size_bytes + self._abouts.size_bytes + self._critiques.size_bytes
