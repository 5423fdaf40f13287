"""Owns what an attack provides: which prompts to give the attacker's model next, from what the archive knows.

An attack proposes and scores; it never trains and never asks for truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.archive import Archive
from actors.domains import Domain
from actors.records import Message
from cluster.config import Config, load_plugin


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackPrompt:
    """A prompt for the attacker's model and the cell it aims at."""

    messages: tuple[Message, ...]
    target: tuple[str, ...]
    parent_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one query: how many of its sampled answers the critic failed."""

    query_id: str
    canonical: str
    facets: tuple[str, ...]
    num_judged: int
    num_failed: int

    @property
    def success(self) -> bool:
        """Whether the critic failed at least half of the judged answers (SCIENCE §3, live attack success)."""
        return self.num_judged > 0 and 2 * self.num_failed >= self.num_judged


class Attack(Protocol):
    """Chooses where to attack next."""

    def propose(self, archive: Archive, num_queries: int, *, seed: int) -> list[AttackPrompt]:
        """Return prompts for the attacker's model; the same archive and seed give the same list."""
        ...

    def observe(self, archive: Archive, outcomes: Sequence[Outcome]) -> None:
        """Take in how the last queries fared, by the critic's verdicts."""
        ...


def load_attack(kind: str, config: Config, *, domain: Domain) -> Attack:
    """Return the attack called `kind`, a file of this package, over a domain.

    Raises:
        ValueError: there is no such attack.
    """
    attack: Attack = load_plugin(__name__, kind, where="attack.kind").make_attack(config, domain=domain)
    return attack
