"""Owns the settings of the loop; apart from the driver, so that reading a config imports none of its parts."""

from __future__ import annotations

from pydantic import Field

from cluster.config import Config
from trainers.importance import ImportanceConfig
from trainers.kl import KlBudget


class LoopConfig(Config):
    """How long the loop runs, and on what terms."""

    iterations: int = Field(default=6, ge=0)
    """Iterations of the loop; 0 evaluates the learner as it is."""
    queries_per_iteration: int = Field(default=96, ge=1)
    """Admitted queries per iteration."""
    epochs: int = Field(default=2, ge=1)
    """Passes over an iteration's pairs."""
    sync_deadline_s: float = Field(default=120.0, gt=0.0)
    """Longest time that a replica may take to load new weights and answer the parity probe."""
    max_policy_age: int = Field(default=0, ge=0)
    """Greatest number of policy versions that a sample's weights may be behind those it trains. 0: every iteration is
    sampled from the newest weights, and nothing overlaps. n: up to n iterations are sampled and judged while earlier
    ones are learnt; older samples are dropped and counted."""
    importance: ImportanceConfig = ImportanceConfig()
    """How samples of older weights are corrected for."""
    kl_budget: KlBudget = KlBudget()
    """How far one update, and the whole run, may move the learner's weights; a run beyond its own ends."""
    parity_bound: float = Field(default=1e-4, gt=0.0)
    """Greatest allowed difference in log-probs (nats) between a replica and the learner; 1e-4 holds in fp32."""
