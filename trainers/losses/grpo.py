"""Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300, eq 3) and its descendants; no value model.

A = (r - mean of the group) / (its std + 1e-4), the same for all tokens of a response; the clipped surrogate, plus
beta * KL to the reference in the loss. Each `form` is a set of defaults, and every one can be set apart:

    grpo     seq-mean, clip 0.2, std, beta 0.04 with k3
    dapo     tok-mean, clip 0.2 / 0.28, groups of equal scores dropped, beta 0, the last fifth of max_tokens overlong
             (Yu et al. 2025, arXiv 2503.14476: 4,096 of 20,480)
    dr_grpo  const, no std, beta 0 (Liu et al. 2025, arXiv 2503.20783)
    gspo     rho = exp(mean log-ratio) of the whole response, clip 3e-4 / 4e-4, seq-mean, beta 0 (Zheng et al. 2025,
             arXiv 2507.18071)
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from trainers.advantages import Estimates, Samples
from trainers.kl import estimate
from trainers.losses import LossOutput, Reduction, TokenBatch
from trainers.policy_gradient import TokenMeansConfig, policy_loss

batch = TokenBatch
uses_reference = True

FORMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dapo": {"reduction": "tok-mean", "clip_high": 0.28, "drop_equal": True, "kl_coefficient": 0.0},
    "dr_grpo": {"reduction": "const", "scale": "none", "kl_coefficient": 0.0},
    "gspo": {"ratio": "sequence-mean", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coefficient": 0.0},
}


class Config(TokenMeansConfig):
    """Settings of GRPO."""

    form: Literal["grpo", "dapo", "dr_grpo", "gspo"] = "grpo"
    """Whose defaults the keys below have that are not set."""
    reduction: Reduction = "seq-mean"
    """How tokens are averaged: "tok-mean", "seq-mean", "seq-sum" or "const"."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Greatest length of a response (tokens); "const" and the overlong penalty need it. Unset:
    rollouts.sampling.max_tokens."""
    scale: Literal["std", "none"] = "std"
    """What a group's centred scores are divided by."""
    ratio: Literal["token", "sequence-mean"] = "token"
    """Ratio of new to old probability: each token's own, or the geometric mean of the response's."""
    drop_equal: bool = False
    """true: responses of a group whose scores are all the same are left out; false: their advantage is 0."""
    overlong_buffer_tokens: int | None = Field(default=None, ge=0)
    """Over the last so many tokens before max_tokens a score loses up to 1; 0: no such penalty. Unset: of dapo a fifth
    of max_tokens, of the others 0."""
    kl_coefficient: float = Field(default=0.04, ge=0.0)
    """Weight of the KL to the reference in the loss."""
    kl_estimator: Literal["k2", "k3", "k3+"] = "k3"
    """k3 is the published one, with the gradient of KL(reference || policy); k2, k3+ have KL(policy || reference)'s."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """Return the values laid over the form's own."""
        return FORMS.get(str(values.get("form", "grpo")), {}) | values if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_tokens is not None and (self.overlong_buffer_tokens or 0) > self.max_tokens:
            raise ValueError(
                f"overlong_buffer_tokens: got {self.overlong_buffer_tokens}, "
                f"wanted at most max_tokens ({self.max_tokens})"
            )
        return self

    @property
    def overlong(self) -> int:
        """Return the tokens of the overlong penalty."""
        if self.overlong_buffer_tokens is not None:
            return self.overlong_buffer_tokens
        return (self.max_tokens or 0) // 5 if self.form == "dapo" else 0


def advantages(samples: Samples, config: Config) -> Estimates:
    """Return each response's score relative to its group, on all its tokens.

    Raises:
        ValueError: an overlong penalty without the greatest length of a response.
    """
    import torch

    from trainers.advantages import group_relative, informative, overlong_penalties

    given = samples.end_scores(missing_end_penalty=config.missing_end_penalty)
    scores = torch.where(samples.mask.any(dim=1), given, torch.nan)
    if config.overlong:
        if config.max_tokens is None:
            raise ValueError(
                "max_tokens: got nothing with overlong_buffer_tokens, wanted the greatest length in tokens"
            )
        lengths = samples.mask.sum(dim=1)
        scores = scores + overlong_penalties(lengths, max_tokens=config.max_tokens, buffer_tokens=config.overlong)
    found = group_relative(scores, samples.groups, scale=config.scale)
    live = informative(scores, samples.groups) if config.drop_equal else samples.scored()
    return Estimates(advantages=torch.where(samples.mask, found[:, None], 0.0), live=live)


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return the clipped policy loss plus beta times the KL to the reference."""
    policy = policy_loss(batch, config, reduction=config.reduction, level=config.ratio, max_tokens=config.max_tokens)
    if config.kl_coefficient == 0.0:
        return policy
    logprobs = batch.inside(batch.logprobs, name="logprobs")
    reference = batch.inside(batch.reference_logprobs, name="reference_logprobs").detach()
    divergence = estimate(logprobs - reference, estimator=config.kl_estimator)
    penalty = batch.reduce(divergence, reduction=config.reduction, max_tokens=config.max_tokens)
    figures = {"reference_kl": batch.reduce(divergence, reduction="tok-mean").detach()}
    return LossOutput(policy.loss + config.kl_coefficient * penalty, policy.metrics | figures)
