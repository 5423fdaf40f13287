"""Kahneman-Tversky optimisation: thumbs up or down without pairs (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7, 8).

Desirable: lambda_D * (1 - sigmoid(beta * (h - z0))); undesirable: lambda_U * (1 - sigmoid(beta * (z0 - h))), where h =
log pi - log ref. The reference point z0, an estimate of KL(pi, ref), is max(0, mean h) over **mismatched** pairs: each
prompt with another row's response, by a cyclic shift within the step. It is one number for the whole step and carries
no gradient. So a step needs two rows or more, and a first pass over the mismatched (see TwoPassLoss).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, UnpairedBatch

if TYPE_CHECKING:
    from torch import Tensor

batch = UnpairedBatch
uses_reference = True


class Config(settings.Config):
    """Settings of KTO."""

    beta: float = Field(default=0.1, gt=0.0)
    """Risk aversion: how soon a response that is better than z0 is good enough."""
    desirable_weight: float = Field(default=1.0, gt=0.0)
    """lambda_D; lambda_D * n_D / (lambda_U * n_U) is best within 1 to 4/3, n the numbers of rows."""
    undesirable_weight: float = Field(default=1.0, gt=0.0)
    """lambda_U."""


def first_pass(batch: UnpairedBatch, config: Config) -> Tensor:
    """Return (B, 2): each mismatched pair's log-ratio, times its weight, and the weight."""
    import torch

    assert batch.mismatched_policy is not None, "the first pass is over mismatched pairs"
    assert batch.mismatched_reference is not None, "and over what the reference says of them"
    weights = batch.live_weights()
    logratios = batch.mismatched_policy - batch.mismatched_reference
    return torch.stack([torch.where(weights > 0, weights * logratios, 0.0), weights], dim=1).detach()


def loss(batch: UnpairedBatch, config: Config) -> LossOutput:
    """Return the KTO loss of rows; `reference_point` is z0 (nats).

    beta 0.1 and z0 0.2: a desirable row with h = 1 costs 0.480011, an undesirable one with h = -0.5 0.482507.
    """
    import torch

    figures = first_pass(batch, config) if batch.step_figures is None else batch.step_figures
    total, weight = figures.sum(dim=0)
    point = torch.where(weight > 0, total / weight.clamp(min=1e-12), 0.0).clamp(min=0.0)
    logratios = batch.policy - batch.reference.detach()
    gains = torch.where(batch.desirable, logratios - point, point - logratios)
    value = batch.mean(
        torch.where(batch.desirable, config.desirable_weight, config.undesirable_weight)
        * torch.sigmoid(-config.beta * gains)
    )
    metrics = {
        "preference_loss": value,
        "reference_point": batch.mean(point.expand(len(logratios))),
        "desirable_share": batch.mean(batch.desirable.to(logratios.dtype)),
        "reward_accuracy": batch.mean((gains > 0).to(logratios.dtype)),
    }
    return LossOutput(value, {name: metric.detach() for name, metric in metrics.items()})
