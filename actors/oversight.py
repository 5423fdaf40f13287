"""Owns how critiques become verdicts, and which few cases go to experts.

The critic decides; the least trusted verdicts are put before experts, within their budget; an expert's label
overrides the critic's. Equal answers to a query are one question: it is asked once, costs once, and the label holds for
all of them. Truth is not known here. The controls of the loop (SCIENCE §5) are other oversights: verdicts
permuted, experts alone, the majority of the answers.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

from pydantic import Field

from actors.domains import Domain
from actors.records import Critique, ExpertLabel, Query, Response, Verdict, draw_seed, lineage_id
from actors.rubrics import FAIL, PASS
from cluster.config import Config

AskExperts = Callable[[Sequence["Judged"]], Mapping[str, ExpertLabel]]
"""Puts cases before the experts; returns the labels that are there now, by response id."""


EXPERT = "expert"
"""`Verdict.source` of what an expert decided, and `PreferencePair.source` where one decided a side at least."""
CONTROLS = ("shuffled", "experts_only", "majority")
"""Kinds of oversight that are controls of SCIENCE §5: nothing may learn there from what the critic wrote."""


class OversightConfig(Config):
    """How critiques become verdicts."""

    kind: Literal["escalation", "single", "shuffled", "experts_only", "majority"] = "escalation"
    """escalation: the least trusted go to experts; single: the critic alone. Controls: shuffled, escalation's final
    verdicts permuted within each query; experts_only, the budget spent on whole queries drawn at random, no verdict of
    the critic's; majority, an answer passes when most answers to its query state the same result."""
    budget: float = Field(default=0.05, ge=0.0, le=1.0)
    """Greatest share of the critic's verdicts that experts are asked about; an answer that many gave is asked once."""
    calibration: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of that budget, rounded up, that goes to answers drawn at random: they tell how often the critic errs,
    which the least trusted ones can't. Of escalation and shuffled alone."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A response with its critiques."""

    query: Query
    response: Response
    critiques: tuple[Critique, ...]

    @cached_property
    def readable(self) -> tuple[Critique, ...]:
        """The critiques that can be read."""
        return tuple(critique for critique in self.critiques if critique.parse_ok)

    @property
    def step_logprobs(self) -> list[float]:
        """Log P(correct) of every step, over the readable critiques; the label at the end, of the whole, is no step."""
        return [logprob for critique in self.readable for logprob in critique.label_logprobs[:-1]]

    @cached_property
    def critic_verdict(self) -> Verdict:
        """What the critiques add up to: the mean of P(good) over the readable ones.

        No readable critique means no verdict: the label is None.
        """
        scores = [critique.score for critique in self.critiques if critique.score is not None]
        if not scores:
            return _verdict(self)
        score = math.fsum(scores) / len(scores)
        quoted = [critique.issues[0].end for critique in self.readable if critique.issues]
        return _verdict(
            self,
            label=PASS if score >= 0.5 else FAIL,
            score=score,
            confidence=max(score, 1.0 - score),
            flaw_end=min(quoted, default=None),
        )


class Oversight(Protocol):
    """Turns critiques into verdicts."""

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return one verdict per judged response; at most `num_allowed` are put before experts."""
        ...


class Single:
    """The critic alone decides."""

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return the critic's verdicts."""
        return [item.critic_verdict for item in judged]


class Escalation:
    """The critic decides; the least confident verdicts are put before experts, and some that are drawn at random."""

    def __init__(self, *, calibration: float = 0.0, seed: int = 0) -> None:
        self._calibration = calibration
        self._seed = seed

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return the critic's verdicts, with the experts' labels in the place of the least trusted ones."""
        verdicts = [item.critic_verdict for item in judged]
        doubts: list[tuple[float, list[int]]] = []
        for places in _copies(judged, range(len(judged))):
            confidences = [verdicts[i].confidence for i in places]
            known = [confidence for confidence in confidences if confidence is not None]
            if known:
                doubts.append((min(known), places))
        num_drawn = min(len(doubts), math.ceil(self._calibration * num_allowed - 1e-9))
        by_chance = sorted(doubts, key=lambda doubt: draw_seed(self._seed, "calibration", *_place(judged[doubt[1][0]])))
        drawn = [places for _, places in by_chance[:num_drawn]]
        taken = {places[0] for places in drawn}
        left = [doubt for doubt in doubts if doubt[1][0] not in taken]
        # Stable: equals stay in the order of their queries and samples.
        left.sort(key=lambda doubt: doubt[0])
        asked = [*drawn, *(places for _, places in left[: num_allowed - num_drawn])]
        decided = _with_experts(verdicts, judged, asked, ask)
        for places in drawn:
            decided[places[0]] = replace(decided[places[0]], drawn=True)
        return decided


class ExpertsOnly:
    """A control: experts alone decide, on all responses of queries drawn at random while the budget lasts."""

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return the experts' verdicts; what they were not asked is unjudged."""
        queries = sorted(
            _places_by_query(judged).values(),
            key=lambda places: draw_seed(self._seed, "experts_only", *_place(judged[places[0]])[:2]),
        )
        drawn: list[list[int]] = []
        for places in queries:
            copies = _copies(judged, places)
            if len(drawn) + len(copies) > num_allowed:
                break
            drawn += copies
        return _with_experts([_verdict(item) for item in judged], judged, drawn, ask)


class Majority:
    """A control: the result that most answers to a query state is taken for right; a tie judges none of them.

    Self-consistency as a label (Wang et al. 2022, arXiv 2203.11171; Huang et al. 2022, arXiv 2210.11610).
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return the majority's verdicts; a response that states no result fails, and has no vote."""
        verdicts = [_verdict(item) for item in judged]
        for places in _places_by_query(judged).values():
            results = {i: self._result(judged[i]) for i in places}
            votes = Counter(result for result in results.values() if result is not None)
            first, second = (*(num for _, num in votes.most_common(2)), 0, 0)[:2]
            if first == second:
                continue
            ((winner, _),) = votes.most_common(1)
            share = first / len(places)
            for i in places:
                passed = results[i] == winner
                verdicts[i] = replace(
                    verdicts[i],
                    label=PASS if passed else FAIL,
                    score=1.0 if passed else 0.0,
                    confidence=max(share, 1.0 - share),
                    source="majority",
                )
        return verdicts

    def _result(self, item: Judged) -> str | None:
        return self._domain.final_answer(item.query.messages[-1].content, item.response.text)


class Shuffled:
    """A control: verdicts of another oversight, permuted within each query, the flaws they quote along with them."""

    def __init__(self, inner: Oversight, *, seed: int = 0) -> None:
        self._inner = inner
        self._seed = seed

    def decide(self, judged: Sequence[Judged], ask: AskExperts, *, num_allowed: int) -> list[Verdict]:
        """Return the inner verdicts with all that they say permuted within each query."""
        verdicts = self._inner.decide(judged, ask, num_allowed=num_allowed)
        shuffled = list(verdicts)
        for places in _places_by_query(judged).values():
            sources = list(places)
            random.Random(draw_seed(self._seed, "shuffled", *_place(judged[places[0]])[:2])).shuffle(sources)
            for place, source in zip(places, sources, strict=True):
                taken = verdicts[source]
                shuffled[place] = replace(
                    verdicts[place],
                    label=taken.label,
                    score=taken.score,
                    confidence=taken.confidence,
                    source=taken.source,
                    escalated=taken.escalated,
                    # At another answer a label checks nothing of the critic's.
                    drawn=False,
                    flaw_end=taken.flaw_end,
                )
        return shuffled


def make_oversight(config: OversightConfig, *, domain: Domain, seed: int) -> Oversight:
    """Return the oversight that a config names; the domain says what result an answer states, never which is right."""
    match config.kind:
        case "escalation":
            return Escalation(calibration=config.calibration, seed=seed)
        case "single":
            return Single()
        case "shuffled":
            return Shuffled(Escalation(calibration=config.calibration, seed=seed), seed=seed)
        case "experts_only":
            return ExpertsOnly(seed=seed)
        case "majority":
            return Majority(domain)


def _verdict(
    item: Judged,
    *,
    label: str | None = None,
    score: float | None = None,
    confidence: float | None = None,
    flaw_end: int | None = None,
) -> Verdict:
    return Verdict(
        verdict_id=lineage_id(
            "", iteration=item.query.iteration, stage="verdicts", parents=[item.response.response_id]
        ),
        query_id=item.query.query_id,
        response_id=item.response.response_id,
        label=label,
        score=score,
        confidence=confidence,
        source="critic",
        escalated=False,
        drawn=False,
        flaw_end=flaw_end,
    )


def _place(item: Judged) -> tuple[int, int, int]:
    """Return where a response stands in the run, whatever the run's name and the order of arrival."""
    return item.query.iteration, item.query.sample_index, item.response.sample_index


def _places_by_query(judged: Sequence[Judged]) -> dict[str, list[int]]:
    """Return the positions of each query's responses, queries and responses in the order in which they were sampled."""
    places: defaultdict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(judged)), key=lambda i: _place(judged[i])):
        places[judged[i].query.query_id].append(i)
    return dict(places)


def _copies(judged: Sequence[Judged], among: Iterable[int]) -> list[list[int]]:
    """Return the positions of equal answers to one query, together; the first of each stands for the others."""
    copies: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for i in sorted(among, key=lambda i: _place(judged[i])):
        copies[judged[i].query.query_id, judged[i].response.text].append(i)
    return list(copies.values())


def _with_experts(
    verdicts: Sequence[Verdict], judged: Sequence[Judged], asked: Sequence[Sequence[int]], ask: AskExperts
) -> list[Verdict]:
    """Return verdicts with the experts' labels in their places; of equal answers the first is asked about."""
    decided = list(verdicts)
    labels = ask([judged[places[0]] for places in asked]) if asked else {}
    for places in asked:
        label = labels.get(judged[places[0]].response.response_id)
        decided[places[0]] = replace(decided[places[0]], escalated=True)
        if label is not None and label.label is not None:
            for i in places:
                decided[i] = replace(
                    decided[i],
                    label=label.label,
                    score=1.0 if label.label == PASS else 0.0,
                    confidence=1.0,
                    source=EXPERT,
                )
    return decided
