"""Owns which trade-off between objectives holds when, where one learner is trained for all of them (M-PANACEA).

    run seed, iteration ──► lambda, uniform on the simplex ──► rollouts, scores, update of that iteration
                            objectives.weights             ──► evaluation, and the policy that is committed

Zhong et al. 2024, arXiv 2402.02030. What a vector does to the weights is trainers/ranks/panacea.py's. Knows no torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from actors.records import draw_seed
from trainers.feedback.objectives import ObjectivesConfig

Preference: TypeAlias = tuple[float, ...]
"""lambda: one weight for each objective, none below 0, that add up to 1."""


def draw_preference(num_objectives: int, *, seed: int, iteration: int) -> Preference:
    """Return an iteration's vector, uniform on the simplex, that hangs on seed and iteration alone.

    It holds for the iteration's rollouts and for its whole update: what one vector sampled another must not be blamed
    for.
    """
    rng = random.Random(draw_seed(seed, "preference", iteration))
    parts = [rng.expovariate(1.0) for _ in range(num_objectives)]
    total = sum(parts)
    return tuple(part / total for part in parts)


class Preferring(Protocol):
    """A group of ranks that answers by a vector."""

    async def set_preference(self, preference: Sequence[float]) -> None:
        """Have everything that follows be of one vector."""
        ...


@dataclass(frozen=True, slots=True)
class TradeOffs:
    """The vectors of a run; nothing is kept, so that a resume finds the same ones. A learner that is of one trade-off
    alone has none: it draws None, and nobody is told anything.
    """

    fixed: Preference | None = None
    """That of evaluations and of committed policies: objectives.weights; None: the learner is of one alone."""
    seed: int = 0
    """The run's."""

    def drawn(self, iteration: int) -> Preference | None:
        """Return that of an iteration's rollouts and update."""
        return None if self.fixed is None else draw_preference(len(self.fixed), seed=self.seed, iteration=iteration)

    async def prefer(self, group: Preferring, drawn: Preference | None = None) -> None:
        """Have the ranks answer by a drawn vector; without one by the fixed one."""
        vector = drawn or self.fixed
        if vector is not None:
            await group.set_preference(vector)

    def weighed(self, objectives: ObjectivesConfig, iteration: int) -> ObjectivesConfig:
        """Return the objectives with an iteration's vector in the place of their weights, where it has one."""
        drawn = self.drawn(iteration)
        return objectives if drawn is None else objectives.model_copy(update={"weights": drawn})


def version_at(version: str, preference: Preference | None) -> str:
    """Return what a policy version is called at a drawn vector; `actors.records.policy_number` reads it.

    >>> version_at("v3", (0.25, 0.75)), version_at("v3", None)
    ('v3@0.2500,0.7500', 'v3')
    """
    return version if preference is None else f"{version}@{','.join(f'{part:.4f}' for part in preference)}"
