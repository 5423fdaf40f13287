"""Cross-entropy through a known confusion of labels (Patrini et al. 2017, arXiv 1609.03683, theorem 2).

L = -sum_j labels_j * log(sum_i p_i * T_ij), p = softmax(logits) and T_ij the probability that an item of class i is
labelled j. Its minimiser is that of cross-entropy on clean labels. T = identity is cross-entropy.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from cluster import config as settings
from trainers.losses import LabelBatch, LossOutput

batch = LabelBatch
uses_reference = False


class Config(settings.Config):
    """Settings of forward correction."""

    confusion: tuple[tuple[float, ...], ...] = Field(default=((0.9, 0.1), (0.1, 0.9)))
    """T, a row for each true class: the probabilities of its labels, which add up to 1."""

    @model_validator(mode="after")
    def _rows_are_distributions(self) -> Config:
        size = len(self.confusion)
        for row in self.confusion:
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
    import torch

    log_confusion = batch.logits.new_tensor(config.confusion).log()
    if len(log_confusion) != batch.logits.shape[1]:
        raise ValueError(
            f"forward_correction: got confusion of {len(log_confusion)} classes, wanted {batch.logits.shape[1]}"
        )
    predicted = torch.logsumexp(batch.logits.log_softmax(dim=1)[:, :, None] + log_confusion, dim=1)
    # A label that no class is ever given has log-probability -inf, and must not make 0 * -inf of rows without it.
    value = batch.mean(-torch.where(batch.labels > 0, batch.labels * predicted, 0.0).sum(dim=1))
    accuracy = batch.mean((batch.logits.argmax(dim=1) == batch.labels.argmax(dim=1)).to(value.dtype))
    return LossOutput(value, {"nll": value.detach(), "agreement": accuracy})
