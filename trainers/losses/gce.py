"""Generalised cross-entropy per token: robust to wrong labels (Zhang and Sabuncu 2018, arXiv 1805.07836, eq. 6).

L = sum(w * m * (1 - p^q) / q) / sum(w * m), over the **global** batch. q towards 0 is sft's cross-entropy, q = 1 the
mean absolute error 1 - p, which a wrong token can move least. The gradient is sft's, times p^q: unlikely tokens count
less.
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, TokenBatch

batch = TokenBatch
uses_reference = False


class Config(settings.Config):
    """Settings of generalised cross-entropy."""

    q: float = Field(default=0.7, gt=0.0, le=1.0)
    """How robust: towards 0 cross-entropy, 1 absolute error."""


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return the mean loss per masked token.

    p = 0.3: 0.813555 at q = 0.7, 1.203973 = -log p as q goes to 0, 0.7 at q = 1.
    """
    import torch

    logprobs = torch.where(batch.mask, batch.logprobs, 0.0)
    value = (batch.token_weights() * -torch.expm1(config.q * logprobs) / config.q).sum() / batch.num_tokens()
    nll = -batch.weighted_sum() / batch.num_tokens()
    return LossOutput(value, {"gce": value.detach(), "nll": nll.detach()})
