"""REINFORCE++ (Hu 2025, arXiv 2501.03262): REINFORCE with PPO's clip and one normalisation for all; no value model.

Token reward -beta * k1, plus the score at the last token; return-to-go; normalised over *all* tokens of the update to
mean 0 and (population) variance 1. With `baseline` each score first loses its group's mean.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trainers.advantages import Estimates, Samples
from trainers.losses import LossOutput, TokenBatch
from trainers.policy_gradient import TokenMeansConfig, policy_loss

batch = TokenBatch
uses_reference = True


class Config(TokenMeansConfig):
    """Settings of REINFORCE++."""

    kl_in_reward: ClassVar[bool] = True

    baseline: bool = False
    """true: scores are centred within their group first; needs several responses to a prompt."""
    kl_coefficient: float = Field(default=0.01, ge=0.0)
    """Price of a nat of KL to the reference, taken off each token's reward (k1)."""


def advantages(samples: Samples, config: Config) -> Estimates:
    """Return the normalised returns-to-go of the token rewards."""
    from trainers.advantages import group_centred, returns_to_go, token_rewards, whiten

    live = samples.scored()
    mask = samples.mask & live[:, None]
    scores = samples.end_scores(missing_end_penalty=config.missing_end_penalty)
    scores = group_centred(scores, samples.groups) if config.baseline else scores
    rewards = token_rewards(scores, samples.log_ratios(), mask, kl_coefficient=config.kl_coefficient)
    return Estimates(advantages=whiten(returns_to_go(rewards, mask), mask), live=live)


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return the clipped policy loss."""
    return policy_loss(batch, config, reduction=config.reduction, max_tokens=config.max_tokens)
