"""Owns what the policy-gradient losses share: their settings, the clipped surrogate, its correction, its figures.

Of B rows and T positions: with rho = exp(log pi - log pi_old), advantage A and the factor w of L-TIS,

    loss = reduce(w * -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A))

(Schulman et al. 2017, arXiv 1707.06347, eq 7). pi_old are the weights at the update's start *in the training engine*; w
alone knows of the engine that sampled.

torch is imported inside the functions: settings are read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from pydantic import Field, model_validator

from cluster import config as settings
from trainers.advantages import Estimates, Samples
from trainers.importance import Cap, Correction, token_factors
from trainers.kl import KlControl, estimate
from trainers.losses import LossOutput, Reduction, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios of new to old are clamped here, in nats."""

TOKEN_CAP = 2.0
"""Greatest ratio of a single token where it is truncated and no cap is set (Yao et al. 2025)."""

Level: TypeAlias = Literal["token", "sequence", "sequence-mean"]
"""Whose ratio rho is: each token's own, the response's (sum of log-ratios), or its geometric mean (GSPO)."""


class PolicyConfig(settings.Config):
    """What all policy-gradient losses can be set to."""

    needs_values: ClassVar[bool] = False
    """Whether the policy must have a value head."""
    kl_in_reward: ClassVar[bool] = False
    """Whether the KL to the reference is a price on the reward: to the weights at the update's start it is 0."""

    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The ratio of new to old probability earns nothing below 1 minus this."""
    clip_high: float = Field(default=0.2, gt=0.0)
    """Nor above 1 plus this."""
    importance: Correction = "sequence-mask"
    """How the rollout engine's log-probs, where the table has them, reweigh the loss: "none", or by token or sequence,
    cut at the cap (truncate) or left out (mask)."""
    importance_cap: Cap = 3.0
    """Greatest such ratio of training engine to rollout engine; inf: there is none. Where it is not set: 2 of
    "token-truncate"."""
    importance_floor: float = Field(default=0.0, ge=0.0, le=1.0)
    """Least such ratio, of the two masks."""
    missing_end_penalty: float = Field(default=0.0, ge=0.0)
    """Taken off the score of a response that was cut before its end, in the score's unit; 0: it counts as one that
    ended, with the score that it was given."""
    temperature: float | None = Field(default=None, gt=0.0)
    """That of the sampling: log-probs are taken at it. Unset: rollouts.sampling.temperature; outside a run 1."""
    kl_control: KlControl = KlControl()
    """How kl_coefficient changes from one update to the next."""

    @model_validator(mode="before")
    @classmethod
    def _fill_cap(cls, values: Any) -> Any:
        """Return the values with the cap that goes with tokens truncated, where those are asked for and none is."""
        by_token = isinstance(values, dict) and values.get("importance") == "token-truncate"
        return {"importance_cap": TOKEN_CAP} | values if by_token else values


class TokenMeansConfig(PolicyConfig):
    """What the losses can be set to besides that average over tokens in a way of one's choice."""

    reduction: Reduction = "tok-mean"
    """How tokens are averaged: "tok-mean", "seq-mean", "seq-sum" or "const"."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Greatest length of a response (tokens); what "const" divides by. Unset: rollouts.sampling.max_tokens."""


@runtime_checkable
class PolicyLoss(Protocol):
    """What a loss provides besides `Loss` when it learns from scored samples: how their scores become advantages."""

    Config: type[PolicyConfig]

    def advantages(self, samples: Samples, config: Any) -> Estimates:
        """Return what the method makes of all samples of an update, at its start."""
        ...

    def loss(self, batch: TokenBatch, config: Any) -> LossOutput:
        """Return the loss of a batch."""
        ...


def kl_price(config: PolicyConfig) -> float:
    """Return what a nat of KL to the reference costs."""
    price: float = config.model_dump()["kl_coefficient"]
    return price


def as_sampled(config: settings.Config, *, temperature: float, max_tokens: int) -> settings.Config:
    """Return a loss's settings with what they leave to the sampling; those of other losses as they are.

    Args:
        temperature: that of the sampling.
        max_tokens: greatest length of a response.
    """
    if not isinstance(config, PolicyConfig):
        return config
    told: dict[str, float] = {} if config.temperature is not None else {"temperature": temperature}
    if isinstance(config, TokenMeansConfig) and config.max_tokens is None:
        told["max_tokens"] = max_tokens
    return config.model_copy(update=told)


class Surrogate(NamedTuple):
    """Both (B, T), or as `log_ratios`."""

    values: Tensor
    clipped: Tensor
    """bool: the clip took the gradient away."""


def clipped_surrogate(
    log_ratios: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Surrogate:
    """Return -min(rho * A, clip(rho) * A); for A < 0 at most -dual_clip * A (Ye et al. 2019, arXiv 1912.09729).

    rho = e^0.3 at A = 1 gives -1.2 without gradient, at A = -1 1.349859; rho = 5 at A = -1 with dual_clip 3 gives 3.
    """
    import torch

    ratios = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain, bounded = -ratios * advantages, -ratios.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    values, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip is not None:
        most = -dual_clip * advantages
        beyond = (advantages < 0) & (values > most)
        values, clipped = torch.where(beyond, most, values), clipped | beyond
    return Surrogate(values=values, clipped=clipped)


def policy_loss(
    batch: TokenBatch,
    config: PolicyConfig,
    *,
    reduction: Reduction,
    level: Level = "token",
    max_tokens: int | None = None,
    dual_clip: float | None = None,
) -> LossOutput:
    """Return the reweighed, clipped surrogate of a batch, and its figures per token.

    Without `old_logprobs` the policy's own are taken: the first step on fresh samples, where rho is 1.

    Raises:
        ValueError: the batch has no advantages.
    """
    logprobs, advantages = (
        batch.inside(batch.logprobs, name="logprobs"),
        batch.inside(batch.advantages, name="advantages"),
    )
    given = batch.logprobs if batch.old_logprobs is None else batch.old_logprobs
    old = batch.inside(given, name="old_logprobs").detach()
    ratios = _at_level(logprobs - old, batch.mask, level)
    clips = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    found = clipped_surrogate(ratios, advantages.detach(), **clips, dual_clip=dual_clip)
    factors = _factors(batch, old, config)
    values = batch.inside(factors * found.values, name="surrogate")
    loss = batch.reduce(values, reduction=reduction, max_tokens=max_tokens)
    figures = {
        "old_kl": estimate(old - logprobs, estimator="k3"),
        "clip_share": found.clipped.to(values.dtype),
        "importance": factors,
        "advantage": advantages,
    }
    metrics = {name: batch.reduce(figure, reduction="tok-mean").detach() for name, figure in figures.items()}
    return LossOutput(loss, {"policy_loss": loss.detach(), **metrics})


def _at_level(log_ratios: Tensor, mask: Tensor, level: Level) -> Tensor:
    if level == "token":
        return log_ratios
    sums = log_ratios.sum(dim=1, keepdim=True)
    if level == "sequence-mean":
        sums = sums / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return sums.expand_as(log_ratios)


def _factors(batch: TokenBatch, old: Tensor, config: PolicyConfig) -> Tensor:
    import torch

    if batch.rollout_logprobs is None:
        return torch.ones_like(old)
    gaps = old - batch.inside(batch.rollout_logprobs, name="rollout_logprobs")
    return token_factors(
        gaps, batch.mask, kind=config.importance, cap=config.importance_cap, floor=config.importance_floor
    )
