"""Supervised fine-tuning: maximum likelihood of the response given the prompt (Bahdanau et al. 2014, arXiv 1409.0473).

L = -sum(w * m * log p) / sum(w * m) over the **global** batch. A mean per micro-batch, then over micro-batches, would
favour the tokens of short batches. The end-of-sequence token is a target like any other.
"""

from __future__ import annotations

from cluster import config as settings
from trainers.losses import LossOutput, TokenBatch

batch = TokenBatch
uses_reference = False


class Config(settings.Config):
    """Settings of supervised fine-tuning: none."""


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return the mean negative log-prob (nats) per masked token."""
    value = -batch.weighted_sum() / batch.num_tokens()
    return LossOutput(value, {"nll": value.detach()})
