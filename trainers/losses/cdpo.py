"""Conservative DPO: labels that are flipped with a known probability.

It is from "A note on DPO with noisy preferences & relationship to IPO" (Mitchell 2023).

L = (1 - eps) * softplus(-z) + eps * softplus(z), z = beta * delta as in dpo: label smoothing. eps is each pair's own
(`batch.noise`: how often its source errs) or the config's. Unlike DPO it does not want the margin to grow without end:
it rests at z = log((1 - eps) / eps).
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, PairBatch

batch = PairBatch
uses_reference = True


class Config(settings.Config):
    """Settings of conservative DPO."""

    beta: float = Field(default=0.1, gt=0.0)
    """Strength of the pull towards the reference."""
    noise: float = Field(default=0.1, ge=0.0, lt=0.5)
    """Probability that a preference is flipped, where the pairs do not say it themselves; 0 is DPO."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); not of the paper's."""


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the expected DPO loss over what the true label may be.

    dpo's example (z = 0.15) with eps 0.1: 0.9 * 0.620957 + 0.1 * 0.770957 = 0.635957.
    """
    from torch.nn.functional import softplus

    chosen, rejected = batch.logratios()
    rewards = config.beta * (chosen - rejected)
    noise = config.noise if batch.noise is None else batch.noise
    losses = (1 - noise) * softplus(-rewards) + noise * softplus(rewards)
    return batch.output(losses, rewards=rewards, nll_weight=config.nll_weight)
