"""Efficient exact optimisation on pairs (Ji et al. 2024, arXiv 2402.00856, eq. 16): reverse KL from policy to labels.

L = sum over both responses of p * (log p - log q), where p = softmax(beta * h) over the two, h = log pi - log ref, and
q = (1 - eps, eps) is the label. The gradient flows through both occurrences of p. DPO is the forward direction of the
same divergence: it covers q, this one seeks its mode. Groups of more than two scored responses: exo_group.
"""

from __future__ import annotations

import math

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, PairBatch

batch = PairBatch
uses_reference = True


class Config(settings.Config):
    """Settings of EXO on pairs."""

    beta: float = Field(default=0.5, gt=0.0)
    """Sharpness of the policy's own preference."""
    smoothing: float = Field(default=1e-3, gt=0.0, lt=0.5)
    """eps, what the label gives to the rejected; not 0, for the divergence from a certain label is infinite. The
    authors' code has 4.5e-5."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); not of the paper's."""


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the reverse KL of pairs.

    dpo's example with beta 0.1 (z = 0.15) and eps 0.001: p = (0.53743, 0.46257), loss 2.505517.
    """
    from torch.nn.functional import logsigmoid

    chosen, rejected = batch.logratios()
    rewards = config.beta * (chosen - rejected)
    log_chosen, log_rejected = logsigmoid(rewards), logsigmoid(-rewards)
    losses = log_chosen.exp() * (log_chosen - math.log1p(-config.smoothing)) + log_rejected.exp() * (
        log_rejected - math.log(config.smoothing)
    )
    return batch.output(losses, rewards=rewards, nll_weight=config.nll_weight)
