"""Learning from a weaker labeller, with confidence of one's own (Burns et al. 2023, arXiv 2312.09390).

L = CE(f, (1 - alpha) * weak + alpha * y): the labeller's probabilities, mixed with the student's own hardened
prediction y, detached. Of two classes y is class 0 where p_0 >= t, t the quantile of p_0 over the **whole step** at the
labeller's mean P(class 1): so the student's balance of classes is the labeller's. The quantile needs a first pass (see
TwoPassLoss). Of more classes y is the likeliest. alpha grows linearly to its greatest over a first share of training,
for at first the student's own prediction means nothing; `ramp = "released"` has the jump of the authors' code instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluster import config as settings
from trainers.losses import LabelBatch, LossOutput

if TYPE_CHECKING:
    from torch import Tensor

batch = LabelBatch
uses_reference = False


class Config(settings.Config):
    """Settings of weak-to-strong learning."""

    max_alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """Greatest weight of the student's own prediction; 0.75 for the largest students, 0 is plain cross-entropy."""
    ramp: Literal["linear", "released"] = "linear"
    """linear: alpha grows up to its greatest until `ramp_share`; released: it is max_alpha times the share of training
    done until then, and jumps to max_alpha."""
    ramp_share: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the training after which alpha is at its greatest; 0.1 in the released code."""


def first_pass(batch: LabelBatch, config: Config) -> Tensor:
    """Return (B, 3): the student's P(class 0), the labeller's P(class 1), and whether the row counts."""
    import torch

    live = (batch.live_weights() > 0).to(batch.logits.dtype)
    return torch.stack([batch.logits.softmax(dim=1)[:, 0], batch.labels[:, 1], live], dim=1).detach()


def loss(batch: LabelBatch, config: Config) -> LossOutput:
    """Return the mean cross-entropy with the mixed labels; `agreement` is how often both have the same likeliest class.

    Logits [[2, 0], [.5, 0], [0, 1], [0, 3]], weak [[.9, .1], [.4, .6], [.6, .4], [.2, .8]]: y is class 0 for the first
    two rows; alpha 0 costs 0.665714, 0.5 0.453214, 1 0.240714.
    """
    alpha = _alpha(batch.progress, config)
    hard = _hardened(batch, config)
    labels = (1 - alpha) * batch.labels + alpha * hard
    value = batch.mean(-(labels * batch.logits.log_softmax(dim=1)).sum(dim=1))
    agreement = batch.mean((hard.argmax(dim=1) == batch.labels.argmax(dim=1)).to(value.dtype))
    own_share = batch.mean(hard.new_full((len(hard),), alpha))
    return LossOutput(value, {"nll": value.detach(), "agreement": agreement, "alpha": own_share})


def _alpha(progress: float, config: Config) -> float:
    if config.ramp == "linear":
        return config.max_alpha * min(1.0, progress / config.ramp_share)
    return config.max_alpha * (1.0 if progress > config.ramp_share else progress)


def _hardened(batch: LabelBatch, config: Config) -> Tensor:
    """Return (B, C) one-hot predictions of the student, detached."""
    import torch
    from torch.nn.functional import one_hot

    logits = batch.logits.detach()
    if logits.shape[1] > 2:
        return one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)
    figures = first_pass(batch, config) if batch.step_figures is None else batch.step_figures
    first, weak_second, live = figures.unbind(dim=1)
    if not bool(live.any()):
        return batch.labels
    threshold = torch.quantile(first[live > 0], weak_second[live > 0].mean())
    is_first = logits.softmax(dim=1)[:, 0] >= threshold
    return torch.stack([is_first, ~is_first], dim=1).to(logits.dtype)
