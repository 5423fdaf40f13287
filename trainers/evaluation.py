"""Owns what is measured and on which problems: sealed, probe, out-of-distribution, the frozen attack set, agreement.

The one place of the loop that may ask for truth (SCIENCE §1); what it finds on sealed problems feeds no decision.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from actors.attacks import Outcome
from actors.domains import Domain, LedgeredChecker
from actors.records import Query, Response, Split, Verdict
from actors.rollout import Rollout
from actors.rubrics import FAIL, PASS
from cluster.config import Config
from trainers import statistics
from trainers.summary import AgreementMetrics, CellCounts


class EvaluationConfig(Config):
    """Sizes of the evaluation sets."""

    sealed_per_cell: int = Field(default=84, ge=1)
    """Sealed problems per declared cell; 12 cells make 1,008."""
    probe_per_cell: int = Field(default=20, ge=1)
    """Probe problems per declared cell, read after every iteration."""
    out_of_distribution_per_cell: int = Field(default=24, ge=1)
    """Problems per cell of the families that are absent from training."""
    attack_set: int = Field(default=500, ge=1)
    """Size of the frozen attack set."""
    agreement_sample: int = Field(default=600, ge=1)
    """Live answers per iteration on which the critic is compared with truth."""
    seed: int = 20_250_701
    """Fixes the evaluation problems; the same for every run, whatever its own seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetResult:
    """Greedy answers to one evaluation set."""

    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    well_formed: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of the problems whose answer the checker accepts."""
        return sum(self.correct) / len(self.correct)

    @property
    def form(self) -> float:
        """Share of the answers that are well-formed."""
        return sum(self.well_formed) / len(self.well_formed)


def evaluation_sets(domain: Domain, config: EvaluationConfig) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Return the fixed evaluation sets, rows of (query, cell), equally many of every cell."""
    sets = {
        "sealed": (domain.cells(), Split.SEALED, config.sealed_per_cell),
        "probe": (domain.cells(), Split.PROBE, config.probe_per_cell),
        "out_of_distribution": (
            domain.out_of_distribution_cells(),
            Split.SEALED,
            config.out_of_distribution_per_cell,
        ),
    }
    return {
        name: [
            (problem.text, problem.facets)
            for cell in cells
            for problem in domain.seeds(cell, split=split, num=num, seed=config.seed)
        ]
        for name, (cells, split, num) in sets.items()
    }


async def evaluate(
    rollout: Rollout, queries: Sequence[str], *, name: str, domain: Domain, checker: LedgeredChecker
) -> SetResult:
    """Return the learner's greedy answers to queries, judged by truth."""
    prompts = {f"{name}/{i}": domain.learner_messages(query) for i, query in enumerate(queries)}
    answers = await rollout.answer_greedily(prompts)
    texts = [answers[f"{name}/{i}"] for i in range(len(queries))]
    return SetResult(
        texts=tuple(texts),
        correct=tuple(checker.correct(query, text) for query, text in zip(queries, texts, strict=True)),
        well_formed=tuple(domain.well_formed(query, text) for query, text in zip(queries, texts, strict=True)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSample:
    """The critic's verdicts on a uniform sample of live answers, beside truth; used for nothing but the report."""

    response_ids: tuple[str, ...]
    truth: tuple[bool, ...]
    passed: tuple[bool, ...]
    scores: tuple[float, ...]
    items: tuple[tuple[str, str], ...]
    """Query id and text of each: equal answers to one query are judged alike, so they count as one."""
    num_unjudged: int
    """Sampled answers without a readable critique."""


def live_sample(
    queries: Mapping[str, Query],
    responses: Mapping[str, Response],
    critic_verdicts: Sequence[Verdict],
    *,
    size: int,
    seed: int,
    checker: LedgeredChecker,
) -> LiveSample:
    """Return the critic's own verdicts (before escalation) and truth on a uniform sample of an iteration's answers."""
    ordered = sorted(
        critic_verdicts, key=lambda v: (queries[v.query_id].sample_index, responses[v.response_id].sample_index)
    )
    sample = random.Random(f"agreement/{seed}").sample(ordered, min(size, len(ordered)))
    judged = [verdict for verdict in sample if verdict.label is not None]
    return LiveSample(
        response_ids=tuple(v.response_id for v in judged),
        truth=tuple(checker.correct(queries[v.query_id], responses[v.response_id].text) for v in judged),
        passed=tuple(v.label == PASS for v in judged),
        scores=tuple(v.score if v.score is not None else 0.0 for v in judged),
        items=tuple((v.query_id, responses[v.response_id].text) for v in judged),
        num_unjudged=len(sample) - len(judged),
    )


def attack_outcomes(queries: Mapping[str, Query], critic_verdicts: Sequence[Verdict]) -> list[Outcome]:
    """Return how many answers to each query the critic judged and failed, by its own verdicts."""
    judged: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for verdict in critic_verdicts:
        if verdict.label is not None:
            judged[verdict.query_id] += 1
            failed[verdict.query_id] += verdict.label == FAIL
    return [
        Outcome(
            query_id=query_id,
            canonical=query.canonical,
            facets=query.facets,
            num_judged=judged[query_id],
            num_failed=failed[query_id],
        )
        for query_id, query in sorted(queries.items())
    ]


def cell_counts(outcomes: Sequence[Outcome], cells: Sequence[tuple[str, ...]]) -> tuple[CellCounts, ...]:
    """Return the critic's verdicts per declared cell."""
    judged: Counter[tuple[str, ...]] = Counter()
    failed: Counter[tuple[str, ...]] = Counter()
    for outcome in outcomes:
        judged[outcome.facets] += outcome.num_judged
        failed[outcome.facets] += outcome.num_failed
    return tuple(CellCounts(facets=cell, num_pass=judged[cell] - failed[cell], num_fail=failed[cell]) for cell in cells)


def agreement_of(live: LiveSample) -> AgreementMetrics:
    """Return the critic's agreement with truth on a live sample."""
    return AgreementMetrics.of(
        statistics.agreement(live.truth, live.passed, items=live.items),
        auroc=statistics.auroc(live.truth, live.scores),
        num_unjudged=live.num_unjudged,
    )
