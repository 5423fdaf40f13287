"""The hinge of statistical rejection sampling optimisation (Liu et al. 2023, arXiv 2309.06657, hinge-norm).

L = max(0, 1 - gamma * delta), delta = h_w - h_l, h = log pi - log ref: SLiC's hinge on DPO's log-ratios. A pair whose
margin has come to 1 / gamma nats costs nothing more. The pairs that the paper trains it on come from rejection sampling
(trainers/feedback/rejection_sampling.py); with the other loss that it tries, the sigmoid one, this is dpo.
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, PairBatch

batch = PairBatch
uses_reference = True


class Config(settings.Config):
    """Settings of RSO's hinge."""

    gamma: float = Field(default=0.05, gt=0.0)
    """One over the margin (nats) at which a pair is good enough."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); not of the paper's."""


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the mean hinge of pairs.

    dpo's example (delta 1.5) with gamma 0.1: 0.85.
    """
    chosen, rejected = batch.logratios()
    rewards = config.gamma * (chosen - rejected)
    return batch.output((1 - rewards).clamp(min=0.0), rewards=rewards, nll_weight=config.nll_weight)
