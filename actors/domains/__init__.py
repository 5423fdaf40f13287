"""Owns what a domain provides: the world that queries live in (`Domain`) and, apart from it, truth (`Checker`).

A domain parses, renders and sorts into cells; it never says what is right. Truth is a separate object behind
`GoldLedger`, which hands it out for a declared purpose only and counts every use.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from actors.records import Message, Query
from cluster.config import Config, load_plugin


class Role(StrEnum):
    """Who speaks."""

    ATTACKER = "attacker"
    LEARNER = "learner"
    CRITIC = "critic"


class Purpose(StrEnum):
    """What truth is asked for; SCIENCE: only the first two exist outside the gold regime."""

    EVALUATION = "evaluation"
    EXPERT = "expert"
    SUPERVISION = "supervision"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One example of a role's behaviour, for the bootstrap; the loss falls on `response` alone."""

    role: Role
    problem: str
    """The query that it is about."""
    messages: tuple[Message, ...]
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A parsed query."""

    text: str
    canonical: str
    facets: tuple[str, ...]
    split: str
    """train, probe or sealed, by the hash of `canonical`."""
    in_scope: bool
    """False for out-of-distribution families, which no role may see in training."""


class Domain(Protocol):
    """Parses, renders and sorts into cells; knows no truth."""

    name: str
    facet_names: tuple[str, ...]

    def cells(self) -> list[tuple[str, ...]]:
        """Return the declared cells in scope, in a fixed order."""
        ...

    def out_of_distribution_cells(self) -> list[tuple[str, ...]]:
        """Return the cells of the families that are absent from training."""
        ...

    def parse(self, text: str) -> Problem | None:
        """Return the problem a text poses, or None when it poses none."""
        ...

    def seeds(self, cell: tuple[str, ...], *, split: str, num: int, seed: int) -> list[Problem]:
        """Return `num` distinct problems of a cell and split, the same for the same seed."""
        ...

    def attack_messages(self, cell: tuple[str, ...]) -> tuple[Message, ...]:
        """Return the prompt that asks the attacker for a query of a cell."""
        ...

    def learner_messages(self, text: str) -> tuple[Message, ...]:
        """Return the prompt that puts a query to the learner."""
        ...

    def critic_messages(self, query: str, response: str) -> tuple[Message, ...]:
        """Return the prompt that puts a query and a response to the critic."""
        ...

    def well_formed(self, query: str, response: str) -> bool:
        """Return whether a response has the form of an answer (not whether it is right)."""
        ...

    def final_answer(self, query: str, response: str) -> str | None:
        """Return the result that a response states (not whether it is right); None when it states none."""
        ...

    def demonstrations(self, role: Role, *, rng: random.Random, num: int, easy: bool = False) -> list[Demonstration]:
        """Return examples of a role's behaviour, from train problems only; `easy` ones are short (a curriculum)."""
        ...


class Checker(Protocol):
    """Truth, where it is computable."""

    def correct(self, query: str, response: str) -> bool:
        """Return whether a response is right."""
        ...

    def solution(self, query: str) -> str:
        """Return a right response."""
        ...

    def difficulty(self, query: str) -> float:
        """Return how hard a query is for a (simulated) expert, on the domain's own scale."""
        ...


class LedgeredChecker:
    """A checker handed out for one purpose; every answer is counted."""

    def __init__(self, checker: Checker, *, purpose: Purpose, counts: Counter[str]) -> None:
        self._checker = checker
        self._purpose = purpose
        self._counts = counts

    def correct(self, query: str | Query, response: str) -> bool:
        """Return whether a response is right, and count the use."""
        self._counts[self._purpose] += 1
        return self._checker.correct(query_text(query), response)

    def solution(self, query: str | Query) -> str:
        """Return a right response, and count the use."""
        self._counts[self._purpose] += 1
        return self._checker.solution(query_text(query))

    def difficulty(self, query: str | Query) -> float:
        """Return how hard a query is."""
        return self._checker.difficulty(query_text(query))


class GoldLedger:
    """Hands out the checker by purpose and counts what it was used for (SCIENCE §1)."""

    def __init__(self, checker: Checker, *, regime: str) -> None:
        self._checker = checker
        self._regime = regime
        self.counts: Counter[str] = Counter()

    def checker_for(self, purpose: Purpose) -> LedgeredChecker:
        """Return the checker for a purpose.

        Raises:
            ValueError: supervision by truth is asked for outside the gold regime.
        """
        if purpose is Purpose.SUPERVISION and self._regime != "gold":
            raise ValueError(
                f'supervision.regime: got "{self._regime}", wanted "gold" for labels from computable truth; '
                "use the critic and the experts, or declare the gold regime"
            )
        return LedgeredChecker(self._checker, purpose=purpose, counts=self.counts)


def query_text(query: str | Query) -> str:
    """Return what a query asks, the content of its last message."""
    return query if isinstance(query, str) else query.messages[-1].content


def domain_called(kind: str, config: Config) -> Domain:
    """Return the domain called `kind`, a file of this package, without its checker.

    Raises:
        ValueError: there is no such domain.
    """
    domain: Domain = load_plugin(__name__, kind, where="domain.kind").make_domain(config)
    return domain


def load_domain(kind: str, config: Config) -> tuple[Domain, Checker]:
    """Return the domain called `kind`, a file of this package, and its checker, apart from it.

    Raises:
        ValueError: there is no such domain.
    """
    module = load_plugin(__name__, kind, where="domain.kind")
    return module.make_domain(config), module.make_checker(config)
