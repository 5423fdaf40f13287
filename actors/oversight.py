"""Owns how critiques become verdicts, and which few cases go to experts.

The critic decides; the least trusted verdicts are put before experts, within their budget; an expert's label
overrides the critic's. Truth is not known here.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from pydantic import Field

from actors.records import Critique, ExpertLabel, Query, Response, Verdict, lineage_id
from actors.rubrics import FAIL, PASS
from cluster.config import Config

AskExperts = Callable[[Sequence["Judged"]], Mapping[str, ExpertLabel]]
"""Puts cases before the experts; returns the labels that are there now, by response id."""


class OversightConfig(Config):
    """How critiques become verdicts."""

    kind: Literal["escalation", "single", "shuffled"] = "escalation"
    """escalation: the least trusted go to experts; single: the critic alone; shuffled: escalation, then the final
    verdicts are permuted within each query (a control: nothing should be learnt)."""
    budget: float = Field(default=0.05, ge=0.0, le=1.0)
    """Greatest share of verdicts that experts are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A response with its critiques."""

    query: Query
    response: Response
    critiques: tuple[Critique, ...]


class Oversight(Protocol):
    """Turns critiques into verdicts."""

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return one verdict per judged response; at most `num_allowed` are put before experts."""
        ...


class Single:
    """The critic alone decides."""

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return the critic's verdicts."""
        return [critic_verdict(item) for item in judged]


class Escalation:
    """The critic decides; the least confident verdicts are put before experts."""

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return the critic's verdicts, with the experts' labels in the place of the least trusted ones."""
        verdicts = [critic_verdict(item) for item in judged]
        trusted = sorted(
            (i for i, verdict in enumerate(verdicts) if verdict.label is not None),
            key=lambda i: (verdicts[i].confidence or 0.0, verdicts[i].verdict_id),
        )
        asked = trusted[:num_allowed]
        labels = ask([judged[i] for i in asked]) if asked else {}
        for i in asked:
            label = labels.get(judged[i].response.response_id)
            verdicts[i] = _with_expert(verdicts[i], label)
        return verdicts


class Shuffled:
    """A control: verdicts of another oversight, permuted within each query."""

    def __init__(self, inner: Oversight) -> None:
        self._inner = inner

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return the inner verdicts with label, score and confidence permuted within each query."""
        verdicts = self._inner.decide(judged, ask, num_allowed=num_allowed)
        by_query: defaultdict[str, list[int]] = defaultdict(list)
        for i, verdict in enumerate(verdicts):
            by_query[verdict.query_id].append(i)
        shuffled = list(verdicts)
        for query_id, places in by_query.items():
            sources = list(places)
            random.Random(f"shuffled/{query_id}").shuffle(sources)
            for place, source in zip(places, sources, strict=True):
                taken = verdicts[source]
                shuffled[place] = replace(
                    verdicts[place],
                    label=taken.label,
                    score=taken.score,
                    confidence=taken.confidence,
                    source=taken.source,
                    escalated=taken.escalated,
                )
        return shuffled


def make_oversight(config: OversightConfig) -> Oversight:
    """Return the oversight that a config names."""
    if config.kind == "single":
        return Single()
    return Shuffled(Escalation()) if config.kind == "shuffled" else Escalation()


def critic_verdict(item: Judged) -> Verdict:
    """Return what the critiques of one response add up to: the mean of P(good) over the readable ones.

    No readable critique means no verdict: the label is None.
    """
    scores = [critique.score for critique in item.critiques if critique.score is not None]
    score = sum(scores) / len(scores) if scores else None
    label = None if score is None else PASS if score >= 0.5 else FAIL
    return Verdict(
        verdict_id=lineage_id(
            "", iteration=item.query.iteration, stage="verdicts", parents=[item.response.response_id]
        ),
        query_id=item.query.query_id,
        response_id=item.response.response_id,
        label=label,
        score=score,
        confidence=None if score is None else max(score, 1.0 - score),
        source="critic",
        escalated=False,
    )


def _with_expert(verdict: Verdict, label: ExpertLabel | None) -> Verdict:
    if label is None or label.label is None:
        return replace(verdict, escalated=True)
    return replace(
        verdict,
        label=label.label,
        score=1.0 if label.label == PASS else 0.0,
        confidence=1.0,
        source="expert",
        escalated=True,
    )
