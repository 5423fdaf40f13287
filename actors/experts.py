"""Owns the expert queue, a durable file that several processes ask and answer, and the expert that simulates a person.

Knows nothing of how items are chosen or of what labels are used for.

    driver ── ask ──► queue.sqlite3 ◄── answer ── a person's program, the simulated expert
    driver ◄── labels_since(watermark) ──┘
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from actors.domains import Checker
from actors.records import ExpertLabel, LabelKind, draw_seed
from cluster.config import Config

logger = logging.getLogger(__name__)

LABELS = {LabelKind.RESPONSE: ("pass", "fail"), LabelKind.PAIR: ("A", "B", "tie")}
"""What an expert may decide, by kind of item; None (an abstention) is admitted for both."""

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS items (
        position INTEGER PRIMARY KEY AUTOINCREMENT,
        item_id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        query TEXT NOT NULL,
        responses TEXT NOT NULL,
        critique TEXT,
        why TEXT NOT NULL,
        time REAL NOT NULL
    )""",
    """CREATE TABLE IF NOT EXISTS labels (
        position INTEGER PRIMARY KEY AUTOINCREMENT,
        item_id TEXT NOT NULL REFERENCES items (item_id),
        kind TEXT NOT NULL,
        label TEXT,
        expert TEXT NOT NULL,
        seconds REAL NOT NULL,
        time REAL NOT NULL,
        comment TEXT NOT NULL,
        superseded INTEGER NOT NULL
    )""",
    "CREATE UNIQUE INDEX IF NOT EXISTS first_answers ON labels (item_id, expert) WHERE superseded = 0",
    """CREATE TRIGGER IF NOT EXISTS labels_are_not_updated BEFORE UPDATE ON labels
        BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END""",
    """CREATE TRIGGER IF NOT EXISTS labels_are_not_deleted BEFORE DELETE ON labels
        BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END""",
)
_BUSY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertItem:
    """One case put to the experts."""

    item_id: str
    kind: str
    """"response" or "pair" (LabelKind)."""
    query: str
    responses: tuple[str, ...]
    """One text for a response, two (A, B) for a pair."""
    critique: str | None
    """What the critic wrote; None when it wrote nothing that could be read."""
    why: str
    """Why it was escalated, e.g. "low confidence 0.52"."""


class NewLabels(NamedTuple):
    """Labels that came after a watermark, in the order in which they were given."""

    labels: tuple[ExpertLabel, ...]
    watermark: int
    """Pass it to the next `labels_since`."""


class QueueCounts(NamedTuple):
    """Where the items of a queue are: asked = decided + abstained + pending."""

    asked: int
    decided: int
    """Items with at least one label."""
    abstained: int
    """Items that were answered by abstentions only."""
    pending: int
    superseded: int
    """Answers that came after the same expert's first on an item; kept, never used."""


class ExpertQueue:
    """A durable queue of items and labels in one SQLite file; safe for several threads and processes of one host.

    What `ask` and `answer` have returned survives a kill and a power failure. Write-ahead logging needs shared memory
    between the processes, so the file belongs on a local disk.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the queue file, e.g. runs/NAME/labels/queue.sqlite3."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        # Autocommit: transactions are begun by hand, and IMMEDIATE, so that two writers wait instead of failing.
        self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        with self._lock:
            _use_write_ahead_log(self._connection)
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
        with self._transaction() as connection:
            for statement in _SCHEMA:
                connection.execute(statement)

    def ask(self, items: Iterable[ExpertItem]) -> int:
        """Put items to the experts and return how many were new; an item that is there already stays as it is.

        Raises:
            ValueError: an unknown kind, or a number of responses that is not the kind's.
        """
        rows = [_item_row(item) for item in items]
        with self._transaction() as connection:
            before = connection.total_changes
            connection.executemany(
                "INSERT INTO items (item_id, kind, query, responses, critique, why, time) VALUES (?, ?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (item_id) DO NOTHING",
                rows,
            )
            return connection.total_changes - before

    def answer(self, label: ExpertLabel) -> bool:
        """Add an expert's label and return True, or False when this expert had answered the item before.

        The first answer counts; a later one is kept as superseded.

        Raises:
            ValueError: the item was never asked, is of another kind, or the label is none of its kind.
        """
        with self._transaction() as connection:
            found = connection.execute("SELECT kind FROM items WHERE item_id = ?", (label.item_id,)).fetchone()
            _refuse_invalid_label(label, asked_kind=None if found is None else found[0])
            earlier = connection.execute(
                "SELECT 1 FROM labels WHERE item_id = ? AND expert = ? AND superseded = 0",
                (label.item_id, label.expert),
            ).fetchone()
            connection.execute(
                "INSERT INTO labels (item_id, kind, label, expert, seconds, time, comment, superseded) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*_label_row(label), int(earlier is not None)),
            )
            return earlier is None

    def pending(self, *, expert: str | None = None, limit: int | None = None) -> list[ExpertItem]:
        """Return the items that wait, oldest first.

        Without an expert: items that nobody has answered. For an expert: items that this expert has not answered and
        nobody has decided, so that one expert's abstention leaves the item to the others.
        """
        answered = "label IS NOT NULL OR expert = ?" if expert is not None else "1"
        parameters: tuple[object, ...] = (expert,) if expert is not None else ()
        rows = self._read(
            "SELECT item_id, kind, query, responses, critique, why FROM items WHERE item_id NOT IN "
            f"(SELECT item_id FROM labels WHERE {answered}) ORDER BY position LIMIT ?",
            (*parameters, -1 if limit is None else limit),
        )
        return [_item(row) for row in rows]

    def labels_since(self, watermark: int = 0) -> NewLabels:
        """Return the first answers that were given after a watermark (0: from the start), abstentions included."""
        rows = self._read(
            "SELECT position, item_id, kind, label, expert, seconds, time, comment FROM labels "
            "WHERE position > ? AND superseded = 0 ORDER BY position",
            (watermark,),
        )
        return NewLabels(tuple(_label(row[1:]) for row in rows), rows[-1][0] if rows else watermark)

    def counts(self) -> QueueCounts:
        """Return where the items are."""
        rows = self._read(
            "SELECT (SELECT COUNT(*) FROM items),"
            " (SELECT COUNT(DISTINCT item_id) FROM labels WHERE label IS NOT NULL),"
            " (SELECT COUNT(DISTINCT item_id) FROM labels),"
            " (SELECT COUNT(*) FROM labels WHERE superseded = 1)"
        )
        asked, decided, answered, superseded = rows[0]
        return QueueCounts(asked, decided, answered - decided, asked - answered, superseded)

    def close(self) -> None:
        """Close the file; what was asked and answered stays."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _read(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(statement, parameters).fetchall()


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # The switch to WAL ignores the busy timeout when another process opens the same new file.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _refuse_invalid_label(label: ExpertLabel, *, asked_kind: str | None) -> None:
    if asked_kind is None:
        raise ValueError(f"expert label: got item {label.item_id}, wanted one that was asked")
    if label.kind != asked_kind:
        raise ValueError(f'expert label of {label.item_id}: got kind "{label.kind}", wanted "{asked_kind}"')
    choices = LABELS[LabelKind(asked_kind)]
    if label.label is not None and label.label not in choices:
        raise ValueError(
            f'expert label of {label.item_id}: got "{label.label}", wanted {", ".join(choices)} or None to abstain'
        )


def _item_row(item: ExpertItem) -> tuple[object, ...]:
    if item.kind not in list(LabelKind):
        raise ValueError(f'expert item {item.item_id}: got kind "{item.kind}", wanted {", ".join(LabelKind)}')
    num_wanted = 1 if item.kind == LabelKind.RESPONSE else 2
    if len(item.responses) != num_wanted:
        raise ValueError(
            f"expert item {item.item_id}: got {len(item.responses)} responses, wanted {num_wanted} for a {item.kind}"
        )
    return (
        item.item_id,
        str(item.kind),
        item.query,
        json.dumps(item.responses),
        item.critique,
        item.why,
        time.time(),
    )


def _item(row: tuple[Any, ...]) -> ExpertItem:
    item_id, kind, query, responses, critique, why = row
    return ExpertItem(
        item_id=item_id, kind=kind, query=query, responses=tuple(json.loads(responses)), critique=critique, why=why
    )


def _label_row(label: ExpertLabel) -> tuple[object, ...]:
    return (label.item_id, str(label.kind), label.label, label.expert, label.seconds, label.time, label.comment)


def _label(row: tuple[Any, ...]) -> ExpertLabel:
    item_id, kind, label, expert, seconds, at, comment = row
    return ExpertLabel(
        item_id=item_id, kind=kind, label=label, expert=expert, seconds=seconds, time=at, comment=comment
    )


class ExpertBudget(Config):
    """How much of the judging experts may be asked to do; every label counts, calibration included."""

    fraction: float = Field(default=0.05, ge=0.0, le=1.0)
    """Greatest share of verdicts put to experts."""

    def allowed(self, num_verdicts: int, *, num_asked: int) -> int:
        """Return how many more items may be asked, given all verdicts so far and all items asked so far.

        >>> ExpertBudget(fraction=0.05).allowed(100, num_asked=3)
        2
        """
        # As a decimal: 0.29 * 100 is 28.999999999999996 in binary.
        return max(0, math.floor(Fraction(str(self.fraction)) * num_verdicts) - num_asked)


class SimulatedExpertConfig(Config):
    """An expert for demos and experiments, as good as the settings say (SCIENCE §4)."""

    error_rate: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of answers that are wrong; which ones depends on the seed and on the texts asked about alone."""
    max_difficulty: float | None = None
    """Greatest difficulty, on the domain's scale, that the expert can judge; above it they abstain. None: no bound."""
    seconds: float = Field(default=0.0, ge=0.0)
    """Seconds that a label is booked with as spent; nobody waits for them."""
    seed: int = 0


class SimulatedExpert:
    """Answers what is pending from computable truth, through the same queue as a person."""

    def __init__(self, checker: Checker, *, config: SimulatedExpertConfig, name: str = "simulated") -> None:
        """Use a checker that was handed out for the purpose of an expert (GoldLedger)."""
        self._checker = checker
        self._config = config
        self.name = name

    def answer_pending(self, queue: ExpertQueue) -> int:
        """Answer every item that waits for this expert; return how many answers counted."""
        items = queue.pending(expert=self.name)
        num_counted = sum(queue.answer(self.label(item)) for item in items)
        logger.info("%s answered %d items", self.name, num_counted)
        return num_counted

    def label(self, item: ExpertItem) -> ExpertLabel:
        """Return this expert's label of an item; the same texts get the same label in every run of the same seed."""
        limit = self._config.max_difficulty
        label = None
        if limit is None or self._checker.difficulty(item.query) <= limit:
            label = self._judge(item)
        return ExpertLabel(
            item_id=item.item_id,
            kind=item.kind,
            label=label,
            expert=self.name,
            seconds=self._config.seconds,
            time=time.time(),
            comment="" if label is not None else f"too hard (above {limit})",
        )

    def _judge(self, item: ExpertItem) -> str:
        right = [self._checker.correct(item.query, text) for text in item.responses]
        if item.kind == LabelKind.RESPONSE:
            truth = "pass" if right[0] else "fail"
        else:
            truth = "tie" if right[0] == right[1] else "A" if right[0] else "B"
        if self._draw(item, "error") >= self._config.error_rate:
            return truth
        wrong = [choice for choice in LABELS[LabelKind(item.kind)] if choice != truth]
        return wrong[int(self._draw(item, "choice") * len(wrong))]

    def _draw(self, item: ExpertItem, what: str) -> float:
        """Return a number in [0, 1) that depends on the seed, on what is asked and on what the number decides."""
        return draw_seed(self._config.seed, what, item.query, *item.responses) / (1 << 48)
