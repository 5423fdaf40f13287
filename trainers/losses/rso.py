"""Statistical rejection sampling optimisation (Liu et al. 2023, arXiv 2309.06657): its losses, and how pairs are drawn.

hinge-norm:   L = max(0, 1 - gamma * delta)
sigmoid-norm: L = -log sigmoid(gamma * delta), which is dpo's with gamma for its beta

delta = h_w - h_l, h = log pi - log ref: of the hinge, SLiC's on DPO's log-ratios, a pair whose margin has come to
1 / gamma nats costs nothing more. In the loop the pairs are of answers that rejection sampling accepts
(trainers.feedback.rejection_pairs, which says where ours differ); a table's pairs are taken as they are.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, PairBatch

batch = PairBatch
uses_reference = True


class Config(settings.Config):
    """Settings of RSO."""

    form: Literal["hinge", "sigmoid"] = "hinge"
    """hinge: a pair with a margin of 1 / gamma is good enough; sigmoid: none ever is."""
    gamma: float = Field(default=0.05, gt=0.0)
    """One over the margin (nats) at which a pair is good enough; the implicit reward is gamma * h."""
    num_accepted: int | None = Field(default=None, ge=2)
    """How many of a query's judged answers are accepted, all where there are fewer; None: half, at least two. The
    paper accepts 8 of 64: of the 8 that an iteration samples that share is one, and makes no pair."""
    beta: float = Field(default=0.5, gt=0.0)
    """Of the acceptance, exp((r - r_max) / beta), r = P(good): towards 0 the best are accepted."""
    pairing: Literal["first_round", "tournament"] = "first_round"
    """The accepted answers two by two in random order; or then the winners again, until one is left."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); not of the paper's."""


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the mean loss of pairs.

    dpo's example (delta 1.5) with gamma 0.1: hinge 0.85, sigmoid softplus(-0.15) = 0.620957.
    """
    from torch.nn.functional import softplus

    chosen, rejected = batch.logratios()
    rewards = config.gamma * (chosen - rejected)
    losses = (1 - rewards).clamp(min=0.0) if config.form == "hinge" else softplus(-rewards)
    return batch.output(losses, rewards=rewards, nll_weight=config.nll_weight)
