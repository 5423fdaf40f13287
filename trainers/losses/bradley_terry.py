"""Reward modelling after Bradley and Terry (Ouyang et al. 2022, arXiv 2203.02155, eq. 1), with margins and soft labels.

L = p * softplus(-(r_w - r_l - mu)) + (1 - p) * softplus(r_w - r_l + mu) + centring * (r_w + r_l)^2

mu is a pair's margin (Touvron et al. 2023, "Llama 2", arXiv 2307.09288, eq. 2), p the probability that the chosen is
the better one: both come with the batch, and are 0 and 1 by default. The last term keeps scores near 0 (Eisenstein et
al. 2023, arXiv 2312.09244), for the others know scores up to a shift per prompt only. One epoch: a second one overfits.
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, ScoreBatch

batch = ScoreBatch
uses_reference = False


class Config(settings.Config):
    """Settings of reward modelling."""

    centring: float = Field(default=0.0, ge=0.0)
    """Weight of the squared sum of a pair's two scores; 0.01 is usual, 0 leaves it out."""


def loss(batch: ScoreBatch, config: Config) -> LossOutput:
    """Return the loss of pairs of scores.

    Scores 1.2 and 0.4: 0.371101; with margin 1/3 0.486793; with centring 0.01 0.396701; with p = 0.7 0.611101.
    """
    import torch
    from torch.nn.functional import softplus

    gaps = batch.chosen - batch.rejected
    margins = torch.zeros_like(gaps) if batch.margins is None else batch.margins
    targets = torch.ones_like(gaps) if batch.targets is None else batch.targets
    ranking = batch.mean(targets * softplus(margins - gaps) + (1 - targets) * softplus(gaps + margins))
    centring = batch.mean((batch.chosen + batch.rejected) ** 2)
    metrics = {
        "ranking_loss": ranking,
        "score_gap": batch.mean(gaps),
        "squared_sum": centring,
        "accuracy": batch.mean((gaps > 0).to(gaps.dtype)),
    }
    return LossOutput(ranking + config.centring * centring, {name: value.detach() for name, value in metrics.items()})
