"""Steers the attacker by an archive of weakness cells: where the critic fails the learner, more is asked.

Quality-diversity search after Rainbow Teaming (Samvelyan et al. 2024, arXiv 2402.16822), with the cold start of a
template bandit (METHODS A-QD, A-TMPL): a cell is a template, its upper confidence bound (Auer et al. 2002) on the
share of failed answers is its weight. Ours differs: the cell's answers are judged by the critic's verdicts instead of
a pairwise comparison with an incumbent prompt, since a small attacker writes a fresh query from the cell's name.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence

from pydantic import Field

from actors.archive import Archive
from actors.attacks import AttackPrompt, Outcome
from actors.domains import Domain
from cluster.config import Config as BaseConfig


class Config(BaseConfig):
    """Settings of the quality-diversity attack."""

    uniform_share: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of the queries spread evenly over all cells, so that no cell is forgotten."""
    exploration: float = Field(default=0.3, ge=0.0)
    """Weight of the confidence bonus sqrt(log N / n) of rarely asked cells."""
    smoothing: float = Field(default=0.7, gt=0.0, le=1.0)
    """Weight of the newest iteration in a cell's share of failures."""


class QualityDiversity:
    """Asks for queries in proportion to each cell's upper confidence bound on the share of failures."""

    def __init__(self, config: Config, *, domain: Domain) -> None:
        self._config = config
        self._domain = domain

    def propose(self, archive: Archive, num_queries: int, *, seed: int) -> list[AttackPrompt]:
        """Return prompts for the attacker's model, drawn from the cells by their weight."""
        rng = random.Random(seed)
        cells = list(archive.cells)
        weights = self.weights(archive)
        return [
            AttackPrompt(messages=self._domain.attack_messages(cell), target=cell, parent_id=None)
            for cell in rng.choices(cells, weights=weights, k=num_queries)
        ]

    def observe(self, archive: Archive, outcomes: Sequence[Outcome]) -> None:
        """Add the critic's verdicts of one iteration to the archive."""
        by_cell: defaultdict[tuple[str, ...], list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            by_cell[outcome.facets].append(outcome)
        for cell, rows in sorted(by_cell.items()):
            archive.record(
                cell,
                num_judged=[row.num_judged for row in rows],
                num_failed=[row.num_failed for row in rows],
                smoothing=self._config.smoothing,
            )

    def weights(self, archive: Archive) -> list[float]:
        """Return the probability of each cell, in the archive's order; they sum to 1."""
        total = sum(row.num_queries for row in archive.cells.values())
        bounds = []
        for row in archive.cells.values():
            share = 1.0 if row.fail_share is None else row.fail_share
            bonus = math.sqrt(math.log(total + 1) / (row.num_queries + 1))
            bounds.append(min(1.0, share + self._config.exploration * bonus) + 1e-3)
        uniform = self._config.uniform_share
        scale = sum(bounds)
        return [uniform / len(bounds) + (1 - uniform) * bound / scale for bound in bounds]


def make_attack(config: Config, *, domain: Domain) -> QualityDiversity:
    """Return the attack with its settings."""
    return QualityDiversity(config, domain=domain)
