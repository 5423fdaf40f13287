"""Kahneman-Tversky optimisation: thumbs up or down without pairs (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7, 8).

Desirable: lambda_D * (1 - sigmoid(beta * (h - z0))); undesirable: lambda_U * (1 - sigmoid(beta * (z0 - h))), where h =
log pi - log ref. The reference point z0, an estimate of KL(pi, ref), is max(0, mean h) over **mismatched** pairs: each
prompt with the response to another one, by a cyclic shift within the step (`trainers.rows.unpaired.partners`). It is
one number for the whole step and carries no gradient. So a step needs two prompts or more, and a first pass over the
mismatched (see TwoPassLoss); where no row can be mismatched z0 is 0.
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

BEST_RATIO = (1.0, 4 / 3)
"""Bounds of lambda_D * n_D / (lambda_U * n_U) that the paper recommends, n the numbers of good and of bad rows."""


class Config(settings.Config):
    """Settings of KTO."""

    beta: float = Field(default=0.1, gt=0.0)
    """Risk aversion: how soon a response that is better than z0 is good enough."""
    desirable_weight: float | None = Field(default=None, gt=0.0)
    """lambda_D; None: what makes lambda_D * n_D = lambda_U * n_U over the update (`side_weights`)."""
    undesirable_weight: float | None = Field(default=None, gt=0.0)
    """lambda_U; None: likewise."""


def side_weights(config: Config, *, num_desirable: float, num_undesirable: float) -> tuple[float, float]:
    """Return lambda_D and lambda_U: what is given, and what is not so that lambda_D * n_D = lambda_U * n_U.

    Where neither is given the commoner side weighs 1, the rarer one more. Where one side has no row there is nothing to
    balance, and what is not given is 1.

    >>> side_weights(Config(), num_desirable=10, num_undesirable=2)
    (1.0, 5.0)

    Args:
        config: what is given.
        num_desirable: n_D, the sum of the weights of an update's good rows.
        num_undesirable: n_U.
    """
    good, bad = config.desirable_weight, config.undesirable_weight
    if not num_desirable or not num_undesirable:
        return good or 1.0, bad or 1.0
    if good is None:
        good = max(1.0, num_undesirable / num_desirable) if bad is None else bad * num_undesirable / num_desirable
    if bad is None:
        bad = good * num_desirable / num_undesirable
    return good, bad


def first_pass(batch: UnpairedBatch, config: Config) -> Tensor:
    """Return (B, 2): each mismatched pair's log-ratio, times its weight, and the weight."""
    import torch

    assert batch.mismatched_policy is not None, "the first pass is over mismatched pairs"
    assert batch.mismatched_reference is not None, "and over what the reference says of them"
    weights = batch.live_weights()
    logratios = batch.mismatched_policy - batch.mismatched_reference
    return torch.stack([torch.where(weights > 0, weights * logratios, 0.0), weights], dim=1).detach()


def loss(batch: UnpairedBatch, config: Config) -> LossOutput:
    """Return the KTO loss of rows; `reference_point` is z0 (nats), `side_ratio` lambda_D * n_D / (lambda_U * n_U).

    beta 0.1 and z0 0.2: a desirable row with h = 1 costs 0.480011, an undesirable one with h = -0.5 0.482507. An update
    of one side has no ratio.
    """
    import torch

    figures = first_pass(batch, config) if batch.step_figures is None else batch.step_figures
    total, weight = figures.sum(dim=0)
    point = torch.where(weight > 0, total / weight.clamp(min=1e-12), 0.0).clamp(min=0.0)
    logratios = batch.policy - batch.reference.detach()
    gains = torch.where(batch.desirable, logratios - point, point - logratios)
    num_good, num_bad = batch.sides()
    good, bad = side_weights(config, num_desirable=num_good, num_undesirable=num_bad)
    costs = torch.sigmoid(-config.beta * gains)
    value = batch.mean(torch.where(batch.desirable, good * costs, bad * costs))
    metrics = {
        "preference_loss": value,
        "reference_point": batch.mean(point.expand(len(logratios))),
        "desirable_share": batch.mean(batch.desirable.to(logratios.dtype)),
        "reward_accuracy": batch.mean((gains > 0).to(logratios.dtype)),
    }
    if num_good and num_bad:
        ratio = good * num_good / (bad * num_bad)
        metrics["side_ratio"] = batch.mean(torch.full_like(logratios, ratio))
    return LossOutput(value, {name: metric.detach() for name, metric in metrics.items()})


def advice(means: dict[str, float]) -> str | None:
    """Return what an update's figures tell whoever set the weights of the two sides; None: they are as is advised."""
    ratio, (least, most) = means.get("side_ratio"), BEST_RATIO
    # The figure is a mean of fp32 shares.
    if ratio is None or least - 1e-3 <= ratio <= most + 1e-3:
        return None
    return (
        f"the good answers weigh {ratio:.2f} times as much as the bad, wanted {least:g} to {most:.2f}: leave out "
        "loss.desirable_weight or loss.undesirable_weight to balance them"
    )
