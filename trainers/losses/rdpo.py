"""Robust DPO: an unbiased estimate of the DPO loss from flipped labels (Chowdhury et al. 2024, arXiv 2403.00409).

L = [(1 - eps) * softplus(-z) - eps * softplus(z)] / (1 - 2 * eps), z = beta * delta as in dpo, eps each pair's own
(`batch.noise`) or the config's. Its mean over flips at rate eps is DPO's loss of the true label, exactly.

Ours differs in a bound on |z|, beyond which a pair has no gradient: the loss falls without end as z grows, so that an
eps which is too large drives margins to infinity. Both sides are bounded alike, for else the estimate would be biased.
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, PairBatch

batch = PairBatch
uses_reference = True


class Config(settings.Config):
    """Settings of robust DPO."""

    beta: float = Field(default=0.1, gt=0.0)
    """Strength of the pull towards the reference."""
    noise: float = Field(default=0.1, ge=0.0, lt=0.5)
    """Probability that a preference is flipped, where the pairs do not say it themselves; 0 is DPO."""
    max_margin: float = Field(default=10.0, gt=0.0)
    """Bound on |z|, the difference in implicit reward: at 10 a preference is certain to five digits."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); not of the paper's."""


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the unbiased estimate of the DPO loss.

    dpo's example (z = 0.15) with eps 0.1: (0.9 * 0.620957 - 0.1 * 0.770957) / 0.8 = 0.602207.

    Raises:
        ValueError: a pair's noise is 1/2 or more: its label says nothing, or the opposite.
    """
    from torch.nn.functional import softplus

    chosen, rejected = batch.logratios()
    rewards = config.beta * (chosen - rejected)
    noise = rewards.new_tensor(config.noise) if batch.noise is None else batch.noise
    if bool((noise >= 0.5).any()):
        raise ValueError(
            f"rdpo: got a pair with noise {float(noise.max()):g}, wanted under 0.5: drop it, its label tells nothing"
        )
    z = rewards.clamp(min=-config.max_margin, max=config.max_margin)
    losses = ((1 - noise) * softplus(-z) - noise * softplus(z)) / (1 - 2 * noise)
    return batch.output(losses, rewards=rewards, nll_weight=config.nll_weight)
