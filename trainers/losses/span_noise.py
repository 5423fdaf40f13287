"""Supervised fine-tuning on responses with flawed spans: a critique's spans are not imitated, and may be unlearnt.

L = [sum over m and not flagged of -log p + mu * sum over m and flagged of -log(1 - p)] / number of tokens that count,
over the **global** batch: those not flagged, and with mu > 0 the flagged ones too. The second sum is unlikelihood
(Welleck et al. 2019, arXiv 1908.04319); with mu = 0 the flagged tokens have no part at all, and without spans
this is sft.
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, TokenBatch

batch = TokenBatch
reads_spans = True
uses_reference = False

LEAST_REST = 1e-5
"""Least 1 - p that counts (as in the authors' code): -log(1 - p) and its gradient would be infinite at p = 1."""


class Config(settings.Config):
    """Settings of fine-tuning on responses with flawed spans."""

    unlikelihood: float = Field(default=0.0, ge=0.0)
    """mu, the weight of making flagged tokens unlikely; 0.5 is usual, 0 leaves them alone."""


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return the mean per token that counts; `flagged_share` is that of all response tokens."""
    import torch

    flagged = torch.zeros_like(batch.mask) if batch.flagged is None else batch.flagged & batch.mask
    weights = batch.token_weights()
    logprobs = torch.where(batch.mask, batch.logprobs, 0.0)
    flagged_weights = torch.where(flagged, weights, 0.0)
    likelihood = (torch.where(flagged, 0.0, weights) * -logprobs).sum()
    rest = -torch.expm1(torch.where(flagged, logprobs, -1.0))
    unlikelihood = (flagged_weights * -rest.clamp(min=LEAST_REST).log()).sum()
    all_tokens = batch.num_tokens()
    flagged_tokens = (
        float(flagged_weights.sum()) if batch.global_flagged_tokens is None else batch.global_flagged_tokens
    )
    count = (all_tokens - (0.0 if config.unlikelihood else flagged_tokens)) or 1.0
    value = (likelihood + config.unlikelihood * unlikelihood) / count
    metrics = {
        "nll": likelihood / count,
        "unlikelihood": unlikelihood / count,
        "flagged_share": flagged_weights.sum() / all_tokens,
    }
    return LossOutput(value, {name: metric.detach() for name, metric in metrics.items()})
