"""Learning from a weaker labeller, with confidence of one's own (Burns et al. 2023, arXiv 2312.09390).

L = CE(f, (1 - alpha) * weak + alpha * y): the labeller's probabilities, mixed with the student's own hardened
prediction y, detached. Of two classes y is class 0 where p_0 >= t, t the quantile of p_0 over the **whole step** at the
labeller's mean P(class 1): so the student's balance of classes is the labeller's. Of more classes, as a language
model's tokens, y is the likeliest class where its probability is above t, the median of such probabilities over the
whole step; an item below it keeps the labeller's view whole. That is ours: the paper has two classes. Either t needs a
first pass (see TwoPassLoss). alpha grows linearly to its greatest over a first share of training, for at first the
student's own prediction means nothing; `ramp = "released"` has the jump of the authors' code instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

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


class Hardened(NamedTuple):
    """What the student makes of its own predictions, detached."""

    classes: Tensor
    """(B,) int64."""
    own: Tensor
    """(B,) bool: it is sure enough to have a say."""


def first_pass(batch: LabelBatch, config: Config) -> Tensor:
    """Return (B, 3) figures: of two classes the student's P(class 0) and the labeller's P(class 1), of more the
    student's greatest probability and 0; and whether the item counts.
    """
    import torch

    probabilities = batch.logits.detach().softmax(dim=1)
    live = (batch.live_weights() > 0).to(probabilities.dtype)
    if probabilities.shape[1] == 2:
        return torch.stack([probabilities[:, 0], batch.probability(1), live], dim=1)
    return torch.stack([probabilities.amax(dim=1), torch.zeros_like(live), live], dim=1)


def loss(batch: LabelBatch, config: Config) -> LossOutput:
    """Return the mean cross-entropy with the mixed labels; `agreement` is how often both have the same likeliest class.

    Logits [[2, 0], [.5, 0], [0, 1], [0, 3]], weak [[.9, .1], [.4, .6], [.6, .4], [.2, .8]]: y is class 0 for the first
    two rows; alpha 0 costs 0.665714, 0.5 0.453214, 1 0.240714. `alpha` is the mean weight of y.
    """
    hardened = _hardened(batch, config)
    alpha = _alpha(batch.progress, config) * hardened.own.to(batch.logits.dtype)
    logprobs = batch.logits.log_softmax(dim=1)
    own = logprobs.gather(1, hardened.classes[:, None])[:, 0]
    value = batch.mean(-(1 - alpha) * batch.expected(logprobs) - alpha * own)
    agreement = batch.mean((hardened.classes == batch.classes()).to(value.dtype))
    return LossOutput(value, {"nll": value.detach(), "agreement": agreement, "alpha": batch.mean(alpha)})


def _alpha(progress: float, config: Config) -> float:
    if config.ramp == "linear":
        return config.max_alpha * min(1.0, progress / config.ramp_share)
    return config.max_alpha * (1.0 if progress > config.ramp_share else progress)


def _hardened(batch: LabelBatch, config: Config) -> Hardened:
    import torch

    figures = first_pass(batch, config) if batch.step_figures is None else batch.step_figures
    told, weak_second, live = figures.unbind(dim=1)
    probabilities = batch.logits.detach().softmax(dim=1)
    greatest, likeliest = probabilities.max(dim=1)
    if not bool((live > 0).any()):
        return Hardened(classes=batch.classes(), own=torch.zeros_like(likeliest, dtype=torch.bool))
    if probabilities.shape[1] > 2:
        return Hardened(classes=likeliest, own=greatest > torch.quantile(told[live > 0], 0.5))
    threshold = torch.quantile(told[live > 0], weak_second[live > 0].mean())
    is_second = (probabilities[:, 0] < threshold).long()
    return Hardened(classes=is_second, own=torch.ones_like(is_second, dtype=torch.bool))
