"""Owns the attacker: prompts its model where the attack aims, and admits what is valid, in the split and new.

Validity needs no truth: a query is valid when the domain can parse it and it is in scope.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from pydantic import Field

from actors.archive import Archive
from actors.attacks import Attack, AttackPrompt, Outcome
from actors.domains import Domain, Problem
from actors.generation import Generates, GenerationRequest
from actors.records import Proposal, Query, draw_seed, lineage_id
from cluster.config import Config
from cluster.pool_errors import PoolExhausted

logger = logging.getLogger(__name__)


class AttackerConfig(Config):
    """How the attacker's model is sampled."""

    temperature: float = Field(default=1.0, gt=0.0)
    """Sampling temperature."""
    max_tokens: int = Field(default=16, gt=0)
    """Longest proposal, in tokens."""
    max_proposals_per_query: float = Field(default=40.0, ge=1.0)
    """The attack gives up after this many proposals for each query that was wanted."""


class AttackCollapsed(RuntimeError):
    """The attacker's model hardly writes a usable query any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """Some proposals in their order, and the queries among them that were admitted."""

    proposals: tuple[Proposal, ...]
    queries: tuple[Query, ...]


class Attacker:
    """Writes queries with a model."""

    def __init__(
        self,
        pool: Generates,
        *,
        attack: Attack,
        attack_name: str,
        domain: Domain,
        config: AttackerConfig,
        run: str,
        seed: int,
    ) -> None:
        self._pool = pool
        self._attack = attack
        self._attack_name = attack_name
        self._domain = domain
        self._config = config
        self._run = run
        self._seed = seed

    async def attack(
        self, archive: Archive, *, iteration: int, num_queries: int, split: str, version: str, start: int = 0
    ) -> AsyncIterator[Attacked]:
        """Yield admitted queries as they are written, `num_queries` in all; the archive remembers each.

        Proposals are admitted in the order of their index, not of their arrival, so that the same model and seed
        admit the same queries. `start` is the index of the first proposal (a resumed iteration goes on from there).

        Raises:
            AttackCollapsed: too many proposals were unusable.
        """
        admitted, index = 0, start
        limit = math.ceil(self._config.max_proposals_per_query * num_queries) + 64
        share = 0.7
        while admitted < num_queries:
            if index - start >= limit:
                raise AttackCollapsed(
                    f"attacker: {admitted} of {index - start} proposals were usable in iteration {iteration}, wanted "
                    f"{num_queries} queries; train the attacker longer, or raise attacker.max_proposals_per_query"
                )
            size = min(max(16, math.ceil((num_queries - admitted) / max(share, 0.05))), limit - (index - start))
            prompts = self._prompts(archive, iteration=iteration, first=index, num=size)
            async for chunk in self._write(prompts, iteration=iteration, first=index):
                rows, queries = [], []
                for position, text in chunk:
                    row = self._admit(
                        archive,
                        text=text,
                        target=prompts[position - index].target,
                        position=position,
                        iteration=iteration,
                        split=split,
                        surplus=admitted >= num_queries,
                    )
                    rows.append(row)
                    if row.query_id is not None:
                        archive.remember(self._parsed(row.text).canonical)
                        queries.append(self.query_of(row, version=version))
                        admitted += 1
                yield Attacked(proposals=tuple(rows), queries=tuple(queries))
            index += size
            share = max(admitted, 1) / (index - start)

    def _prompts(self, archive: Archive, *, iteration: int, first: int, num: int) -> list[AttackPrompt]:
        """Return the prompts of proposals first, first + 1, …; each depends on its own number alone.

        So an iteration that a kill cut off asks for the very proposals that it would have asked for.
        """
        return [
            prompt
            for position in range(first, first + num)
            for prompt in self._attack.propose(archive, 1, seed=draw_seed(self._seed, "targets", iteration, position))
        ]

    async def _write(
        self, prompts: Sequence[AttackPrompt], *, iteration: int, first: int
    ) -> AsyncIterator[list[tuple[int, str | None]]]:
        """Yield (index, text) in the order of the indices, as soon as every earlier one is there; None: it is lost."""
        requests = [
            GenerationRequest(
                request_id=lineage_id(self._run, iteration=iteration, stage="proposals", sample_index=first + i),
                messages=prompt.messages,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                seed=draw_seed(self._seed, "proposals", iteration, first + i),
            )
            for i, prompt in enumerate(prompts)
        ]
        position = {request.request_id: first + i for i, request in enumerate(requests)}
        waiting: dict[int, str] = {}
        due = first
        try:
            async for chunk in self._pool.route(requests):
                for completion in chunk:
                    waiting[position[completion.request_id]] = completion.text
                ready: list[tuple[int, str | None]] = []
                while due in waiting:
                    ready.append((due, waiting.pop(due)))
                    due += 1
                if ready:
                    yield ready
        except PoolExhausted as error:
            logger.warning("attacker: %s", error)
            yield [(i, waiting.get(i)) for i in range(due, first + len(requests))]

    def query_of(self, proposal: Proposal, *, version: str) -> Query:
        """Return the query that an accepted proposal is; the same each time, so a log of proposals is enough."""
        problem = self._parsed(proposal.text)
        assert proposal.query_id is not None, "only an accepted proposal is a query"
        return Query(
            query_id=proposal.query_id,
            sample_index=proposal.sample_index,
            messages=self._domain.learner_messages(problem.text),
            domain=self._domain.name,
            facets=problem.facets,
            canonical=problem.canonical,
            attack=self._attack_name,
            parent_id=None,
            iteration=proposal.iteration,
            attacker_version=version,
            split=problem.split,
        )

    def observe(self, archive: Archive, outcomes: Sequence[Outcome]) -> None:
        """Hand the critic's verdicts on an iteration's queries to the attack."""
        self._attack.observe(archive, outcomes)

    def _parsed(self, text: str) -> Problem:
        problem = self._domain.parse(text)
        assert problem is not None, f"an accepted proposal can be parsed, got {text!r}"
        return problem

    def _admit(
        self,
        archive: Archive,
        *,
        text: str | None,
        target: tuple[str, ...],
        position: int,
        iteration: int,
        split: str,
        surplus: bool,
    ) -> Proposal:
        proposal_id = lineage_id(self._run, iteration=iteration, stage="proposals", sample_index=position)
        problem = None if text is None else self._domain.parse(text)
        if text is None:
            outcome = "lost"
        elif problem is None:
            outcome = "invalid"
        elif not problem.in_scope:
            outcome = "out_of_scope"
        elif problem.split != split:
            outcome = "wrong_split"
        elif not archive.is_novel(problem.canonical):
            outcome = "repeated"
        else:
            outcome = "surplus" if surplus else "accepted"
        query_id = lineage_id(self._run, iteration=iteration, stage="queries", parents=[proposal_id])
        return Proposal(
            proposal_id=proposal_id,
            iteration=iteration,
            sample_index=position,
            text=text or "",
            target=target,
            outcome=outcome,
            query_id=query_id if outcome == "accepted" else None,
        )
