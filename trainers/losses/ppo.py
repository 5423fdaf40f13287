"""Proximal policy optimisation with a value model (Schulman et al. 2017, arXiv 1707.06347; Ziegler et al. 2019,
arXiv 1909.08593): maximise E[r] - beta * KL(pi || reference), whose optimum is reference * exp(r / beta), normalised.

Token rewards -beta * k1 plus the score at the last token; GAE; advantages whitened over all tokens; then

    L = reduce(w * -min(rho A, clip(rho) A)) + c_v * reduce(max((V - G)^2, (V_old + clip(V - V_old) - G)^2) / 2)

Ours differs from the paper's eq 9 in having no entropy bonus; the KL to the reference keeps the policy from collapsing.
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
    """Settings of PPO."""

    needs_values: ClassVar[bool] = True
    kl_in_reward: ClassVar[bool] = True

    kl_coefficient: float = Field(default=0.05, ge=0.0)
    """Price of a nat of KL to the reference, taken off each token's reward (k1)."""
    discount: float = Field(default=1.0, gt=0.0, le=1.0)
    """Gamma: worth of the next token's reward."""
    gae_decay: float = Field(default=0.95, ge=0.0, le=1.0)
    """Lambda of GAE: 1 trusts the rewards, 0 the value model."""
    whiten: bool = True
    """Advantages have mean 0 and variance 1 over all tokens of the update."""
    dual_clip: float | None = Field(default=None, gt=1.0)
    """Tokens with a negative advantage cost at most this times it."""
    value_clip: float = Field(default=0.2, gt=0.0)
    """The value model earns nothing by moving further than this from what it expected at the update's start."""
    value_coefficient: float = Field(default=0.1, ge=0.0)
    """Weight of the value model's loss."""


def advantages(samples: Samples, config: Config) -> Estimates:
    """Return GAE over the token rewards, whitened, and the returns before whitening.

    Raises:
        ValueError: the policy has no value head.
    """
    from trainers.advantages import gae, token_rewards, whiten

    if samples.values is None:
        raise ValueError(
            'loss: got "ppo" or "relc" without values, wanted value_head = true; or use grpo, rloo, reinforce_pp'
        )
    live = samples.scored()
    mask = samples.mask & live[:, None]
    scores = samples.end_scores(missing_end_penalty=config.missing_end_penalty)
    rewards = token_rewards(scores, samples.log_ratios(), mask, kl_coefficient=config.kl_coefficient)
    if samples.segment_rewards is not None:
        rewards = rewards + samples.segment_rewards
    found = gae(rewards, samples.values, mask, discount=config.discount, decay=config.gae_decay)
    scaled = whiten(found.advantages, mask) if config.whiten else found.advantages
    return Estimates(advantages=scaled, live=live, returns=found.returns)


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return the clipped policy loss plus the weighted, clipped value loss."""
    import torch

    policy = policy_loss(
        batch, config, reduction=config.reduction, max_tokens=config.max_tokens, dual_clip=config.dual_clip
    )
    values = batch.inside(batch.values, name="values")
    old = batch.inside(batch.old_values, name="old_values").detach()
    returns = batch.inside(batch.returns, name="returns").detach()
    near = old + (values - old).clamp(-config.value_clip, config.value_clip)
    errors = 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
    value_loss = batch.reduce(errors, reduction=config.reduction, max_tokens=config.max_tokens)
    figures = {"value_loss": value_loss, "value": batch.reduce(values, reduction="tok-mean")}
    metrics = policy.metrics | {name: figure.detach() for name, figure in figures.items()}
    return LossOutput(policy.loss + config.value_coefficient * value_loss, metrics)
