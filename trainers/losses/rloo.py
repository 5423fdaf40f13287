"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019); no value model.

A_i = r_i - mean of the group's others, where r has already lost beta * (sum of k1 over the response): an unbiased
gradient of E[score] - beta * KL, with the others as baseline. A response is one action: its ratio rho is that of its
whole probability, and the loss is the mean over responses of -min(rho A, clip(rho) A).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainers.advantages import Estimates, Samples
from trainers.losses import LossOutput, TokenBatch
from trainers.policy_gradient import PolicyConfig, policy_loss

batch = TokenBatch
uses_reference = True


class Config(PolicyConfig):
    """Settings of RLOO."""

    kl_in_reward: ClassVar[bool] = True

    kl_coefficient: float = Field(default=0.03, ge=0.0)
    """Price of a nat of KL to the reference, taken off the response's score."""


def advantages(samples: Samples, config: Config) -> Estimates:
    """Return each response's penalised score minus the mean of its group's others, on all its tokens."""
    import torch

    from trainers.advantages import leave_one_out

    live = samples.scored()
    scores = samples.end_scores(missing_end_penalty=config.missing_end_penalty)
    penalised = scores - config.kl_coefficient * samples.log_ratios().sum(dim=1)
    found = leave_one_out(torch.where(live, penalised, torch.nan), samples.groups)
    return Estimates(advantages=torch.where(samples.mask, found[:, None], 0.0), live=live)


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return the mean over responses of the clipped surrogate of the whole response."""
    # All tokens of a response have one value, so that their mean is the response's.
    return policy_loss(batch, config, reduction="seq-mean", level="sequence")
