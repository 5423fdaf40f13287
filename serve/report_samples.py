"""Owns which answers of a run a reader sees: a few dozen from the journal, disagreements first, each with its story."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

JOURNAL_DIR = "journal"
_FILES = ("queries", "responses", "critiques", "verdicts")

OVERRULED = "expert overruled the critic"
UNREADABLE = "critique could not be read"
CONTRAST = "one question, both verdicts"
DOUBTFUL = "least trusted by the critic"
CONFIRMED = "expert agreed with the critic"
ABSTAINED = "expert abstained"
_MOST = {OVERRULED: 12, UNREADABLE: 3, CONTRAST: 12, DOUBTFUL: 6, CONFIRMED: 5, ABSTAINED: 2}
"""How many samples of each kind are shown, in this order; together 40."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer with everything that was said about it."""

    why: str
    """Why it is shown: one of this module's kinds."""
    iteration: int
    cell: str
    query: str
    answer: str
    critique: str
    issues: tuple[str, ...]
    """The flaws that the critique points at, as `quote: explanation`."""
    critic_label: str | None
    """The critic's own verdict before escalation; None when no critique could be read."""
    score: float | None
    """The critic's P(good), the mean over its critiques."""
    label: str | None
    """The verdict that counted."""
    expert_label: str | None
    """The expert's label; None when none was asked or the expert abstained."""
    policy_version: str
    response_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judgement:
    """What the critic and the experts said of one answer, without the texts."""

    directory: Path
    query_id: str
    response_id: str
    label: str | None
    score: float | None
    critic_label: str | None
    expert_label: str | None
    escalated: bool

    @property
    def doubt(self) -> float:
        """0 when the critic is sure, 0.5 when it can't tell."""
        return 0.0 if self.score is None else min(self.score, 1.0 - self.score)


def pick_samples(run_dir: Path) -> list[Sample]:
    """Return about 40 answers, grouped by why they are shown, the newest iterations first.

    Only iterations whose four tables are all there count: the open one has none. Texts are read for the chosen alone.
    """
    chosen: list[tuple[str, _Judgement]] = []
    seen: set[str] = set()
    judgements = [row for directory in _iterations(run_dir) for row in _judgements(directory)]
    for why, most in _MOST.items():
        fresh = (row for row in _candidates(why, judgements) if row.response_id not in seen)
        for row in list(islice(fresh, most)):
            seen.add(row.response_id)
            chosen.append((why, row))
    return _with_texts(chosen)


def _iterations(run_dir: Path) -> list[Path]:
    found = sorted((run_dir / JOURNAL_DIR).glob("iteration=*"), reverse=True)
    return [directory for directory in found if all((directory / f"{name}.parquet").exists() for name in _FILES)]


def _judgements(directory: Path) -> Iterator[_Judgement]:
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for row in _rows(directory, "critiques", columns=["response_ids", "score"]):
        if row["score"] is not None and len(row["response_ids"]) == 1:
            scores[row["response_ids"][0]].append(row["score"])
    columns = ["query_id", "response_id", "label", "source", "escalated"]
    for row in sorted(_rows(directory, "verdicts", columns=columns), key=lambda row: row["response_id"]):
        own = scores.get(row["response_id"])
        score = sum(own) / len(own) if own else None
        yield _Judgement(
            directory=directory,
            query_id=row["query_id"],
            response_id=row["response_id"],
            label=row["label"],
            score=score,
            critic_label=None if score is None else "pass" if score >= 0.5 else "fail",
            expert_label=row["label"] if row["source"] == "expert" else None,
            escalated=row["escalated"],
        )


def _candidates(why: str, judgements: Sequence[_Judgement]) -> Iterable[_Judgement]:
    if why == OVERRULED:
        return (r for r in judgements if r.expert_label and r.critic_label and r.expert_label != r.critic_label)
    if why == UNREADABLE:
        return (r for r in judgements if r.critic_label is None)
    if why == CONTRAST:
        return _contrasts(judgements)
    if why == DOUBTFUL:
        unasked = [r for r in judgements if not r.escalated and r.score is not None]
        return sorted(unasked, key=lambda r: -r.doubt)
    if why == CONFIRMED:
        return (r for r in judgements if r.expert_label and r.expert_label == r.critic_label)
    assert why == ABSTAINED, why
    return (r for r in judgements if r.escalated and r.expert_label is None)


def _contrasts(judgements: Sequence[_Judgement]) -> Iterator[_Judgement]:
    """Yield the best passed and the worst failed answer to each query that has both, by the critic's P(good)."""
    by_query: defaultdict[str, list[_Judgement]] = defaultdict(list)
    for row in judgements:
        if row.score is not None:
            by_query[row.query_id].append(row)
    for rows in by_query.values():
        best, worst = max(rows, key=lambda r: r.score or 0.0), min(rows, key=lambda r: r.score or 0.0)
        if best.label == "pass" and worst.label == "fail":
            yield best
            yield worst


def _with_texts(chosen: Sequence[tuple[str, _Judgement]]) -> list[Sample]:
    texts: dict[str, dict[str, Any]] = {}
    for directory in {row.directory for _, row in chosen}:
        rows = [row for _, row in chosen if row.directory == directory]
        texts |= _texts(directory, {row.query_id for row in rows}, {row.response_id for row in rows})
    return [
        Sample(
            why=why,
            critic_label=row.critic_label,
            score=row.score,
            label=row.label,
            expert_label=row.expert_label,
            response_id=row.response_id,
            **texts[row.response_id],
        )
        for why, row in chosen
    ]


def _texts(directory: Path, query_ids: set[str], response_ids: set[str]) -> dict[str, dict[str, Any]]:
    """Return the texts of the chosen answers by response id, in the fields of a Sample."""
    chosen_queries = pc.field("query_id").isin(sorted(query_ids))
    queries = {
        row["query_id"]: row
        for row in _rows(
            directory, "queries", columns=["query_id", "messages", "facets", "iteration"], rows=chosen_queries
        )
    }
    critiques: dict[str, dict[str, Any]] = {}
    for row in _rows(directory, "critiques", columns=["response_ids", "text", "issues"], rows=chosen_queries):
        for response_id in row["response_ids"]:
            critiques.setdefault(response_id, row)
    columns = ["query_id", "response_id", "text", "policy_version"]
    answers = _rows(directory, "responses", columns=columns, rows=pc.field("response_id").isin(sorted(response_ids)))
    return {
        answer["response_id"]: {
            "iteration": queries[answer["query_id"]]["iteration"],
            "cell": " · ".join(queries[answer["query_id"]]["facets"]),
            "query": "\n".join(message["content"] for message in queries[answer["query_id"]]["messages"]),
            "answer": answer["text"],
            "critique": critiques.get(answer["response_id"], {}).get("text", ""),
            "issues": tuple(
                f"{issue['quote']}: {issue['explanation']}"
                for issue in critiques.get(answer["response_id"], {}).get("issues", [])
            ),
            "policy_version": answer["policy_version"],
        }
        for answer in answers
    }


def _rows(directory: Path, name: str, *, columns: list[str], rows: pc.Expression | None = None) -> list[dict[str, Any]]:
    # `partitioning=None`: the directory's "iteration=000007" is not a column of the record.
    table = pq.read_table(directory / f"{name}.parquet", columns=columns, filters=rows, partitioning=None)
    return table.to_pylist()
