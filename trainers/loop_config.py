"""Owns the settings of the loop; apart from the driver, so that reading a config imports none of its parts."""

from __future__ import annotations

from pydantic import Field

from cluster.config import Config


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
    parity_bound: float = Field(default=1e-4, gt=0.0)
    """Greatest allowed difference in log-probs (nats) between a replica and the learner; 1e-4 holds in fp32."""
