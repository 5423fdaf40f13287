"""Supervised fine-tuning on responses of which single tokens are wrong: unlikely tokens count less.

L = sum(m * w * c) / sum(m * w), over the **global** batch, c = -log p. w carries no gradient: 1 where
p > min_probability and 0 elsewhere (Kang and Hashimoto 2020, arXiv 2004.14589, drop the costliest share of the data so;
ours drops tokens by their probability), or w = p itself. The sum of the weights hangs on the policy, and so needs a
first pass (see TwoPassLoss).

With label smoothing e (Szegedy et al. 2015, arXiv 1512.00567, section 7) the token counts as right with probability
1 - e and as any one of the V tokens with e: c = -(1 - e) * log p - e * (mean of log p over the vocabulary).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor

batch = TokenBatch
uses_reference = False


class Config(settings.Config):
    """Settings of fine-tuning on noisy tokens."""

    weighting: Literal["threshold", "probability"] = "threshold"
    """threshold: tokens below `min_probability` are left out; probability: a token weighs what the policy gives it."""
    min_probability: float = Field(default=0.01, ge=0.0, lt=1.0)
    """What a token must exceed, under the policy as it is, to count; with 0 all of them do."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target's probability that is spread over the whole vocabulary."""


def reads_means(config: Config) -> bool:
    """Return whether targets are smoothed."""
    return config.label_smoothing > 0


def first_pass(batch: TokenBatch, config: Config) -> Tensor:
    """Return (B, 1): the sum of each row's weights."""
    return _weights(batch, config).sum(dim=1, keepdim=True)


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return the weighted mean cross-entropy (nats) per token; `kept` is the tokens' mean weight.

    Raises:
        ValueError: targets are to be smoothed, and the batch has no means over the vocabulary.
    """
    import torch

    figures = first_pass(batch, config) if batch.step_figures is None else batch.step_figures
    weights = _weights(batch, config)
    logprobs = batch.logprobs
    if reads_means(config):
        if batch.mean_logprobs is None:
            raise ValueError(
                f"token_noise: got no mean_logprobs with label_smoothing = {config.label_smoothing:g}, wanted (B, T)"
            )
        logprobs = torch.lerp(logprobs, batch.mean_logprobs, config.label_smoothing)
    total = -(weights * torch.where(batch.mask, logprobs, 0.0)).sum()
    value = total / (float(figures.sum()) or 1.0)
    nll = -batch.weighted_sum().detach() / batch.num_tokens()
    return LossOutput(value, {"weighted_nll": value.detach(), "nll": nll, "kept": weights.sum() / batch.num_tokens()})


def _weights(batch: TokenBatch, config: Config) -> Tensor:
    """Return (B, T), detached: the row's weight times the token's, 0 outside the mask."""
    import torch

    probabilities = torch.where(batch.mask, batch.logprobs.detach(), 0.0).exp()
    if config.weighting == "threshold":
        probabilities = (probabilities > config.min_probability).to(probabilities.dtype)
    return batch.token_weights() * probabilities
