"""Cross-entropy through a known confusion of labels (Patrini et al. 2017, arXiv 1609.03683, theorem 2).

L = -sum_j labels_j * log(sum_i p_i * T_ij), p = softmax(logits) and T_ij the probability that an item of class i is
labelled j. Its minimiser is that of cross-entropy on clean labels. T = identity is cross-entropy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from cluster import config as settings
from trainers.losses import LabelBatch, LossOutput

if TYPE_CHECKING:
    from torch import Tensor

batch = LabelBatch
uses_reference = False


class Config(settings.Config):
    """Settings of forward correction."""

    noise: float = Field(default=0.1, ge=0.0, lt=0.5)
    """Probability that a label is not the true class, all others being as likely: T where `confusion` is not given."""
    confusion: tuple[tuple[float, ...], ...] | None = None
    """T, a row for each true class: the probabilities of its labels, which add up to 1; not for tokens."""

    @model_validator(mode="after")
    def _rows_are_distributions(self) -> Config:
        size = len(self.confusion or ())
        for row in self.confusion or ():
            if len(row) != size or min(row) < 0 or abs(sum(row) - 1) > 1e-6:
                raise ValueError(
                    f"confusion: got the row {list(row)}, wanted {size} probabilities that add up to 1: "
                    "a row and a column for each class"
                )
        return self


def loss(batch: LabelBatch, config: Config) -> LossOutput:
    """Return the mean cross-entropy of the labels under the confused prediction.

    T = [[.9, .1], [.2, .8]], p = (0.7, 0.3), label 0: -log(0.63 + 0.06) = 0.371064.

    Raises:
        ValueError: T has not as many classes as the logits.
    """
    # A label that no class is ever given has log-probability -inf; rows without it have no part in that.
    value = batch.mean(-batch.expected(_confused(batch.logits.log_softmax(dim=1), config)))
    accuracy = batch.mean((batch.logits.argmax(dim=1) == batch.classes()).to(value.dtype))
    return LossOutput(value, {"nll": value.detach(), "agreement": accuracy})


def _confused(logprobs: Tensor, config: Config) -> Tensor:
    """Return (B, C) log-probs of labels, from those of classes."""
    import torch

    num_classes = logprobs.shape[1]
    if config.confusion is None:
        # sum_i p_i T_ij = (1 - noise) p_j + other * (1 - p_j), without a (C, C) matrix.
        other = config.noise / (num_classes - 1)
        right = logprobs + math.log(1.0 - config.noise - other)
        return right if other == 0.0 else torch.logaddexp(right, torch.full_like(right, math.log(other)))
    log_confusion = logprobs.new_tensor(config.confusion).log()
    if len(log_confusion) != num_classes:
        raise ValueError(f"forward_correction: got confusion of {len(log_confusion)} classes, wanted {num_classes}")
    return torch.logsumexp(logprobs[:, :, None] + log_confusion, dim=1)
