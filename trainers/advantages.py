"""Owns the way from scores of sampled responses to advantages of their tokens; what comes out carries no gradient.

    scores (N,), log-ratios (N, T) ──► token rewards ──► GAE, or returns ──► whitening          PPO, REINFORCE++
    scores (N,), groups (N,)       ──► group-relative, or leave-one-out ──► every token alike   GRPO, RLOO

Shapes: N responses (of a whole update, so that no group and no normalisation is cut: METHODS G8), T positions; values
at [n, t] belong to the token *at* t, masks are true on the responses' tokens, which need not be adjacent. Rewards in
the score's unit, log-probs in nats. A score that is NaN is missing (G7): it has no part in any mean, and its response
gets advantage 0.

torch is imported inside the functions, as losses do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Floats = npt.NDArray[np.float64]

GROUP_EPSILON = 1e-4
"""Added to a group's standard deviation (GRPO)."""
WHITEN_EPSILON = 1e-8
"""Added to the variance of all tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """All responses of an update, with what the weights at its start say of them."""

    mask: Tensor
    """(N, T) bool: the tokens that were sampled, end-of-sequence included."""
    scores: Tensor
    """(N,); NaN: there is none."""
    groups: Tensor
    """(N,) int64: responses to one prompt have one number."""
    ended: Tensor
    """(N,) bool: the response has its end-of-sequence; false where it was cut at the greatest length."""
    old_logprobs: Tensor
    """(N, T)"""
    reference_logprobs: Tensor
    """(N, T)"""
    values: Tensor | None = None
    """(N, T): what the value model expects from before each token on; None where there is no such model."""
    segment_rewards: Tensor | None = None
    """(N, T): see trainers/feedback/segments.py; None where no critic gave any."""

    def scored(self) -> Tensor:
        """Return (N,) bool: which responses have a score and a token."""
        import torch

        found: Tensor = torch.isfinite(self.scores) & self.mask.any(dim=1)
        return found

    def end_scores(self, *, missing_end_penalty: float) -> Tensor:
        """Return (N,) scores, less a penalty where a response was cut before its end; a missing one stays missing."""
        return self.scores - missing_end_penalty * (~self.ended).to(self.scores.dtype)

    def log_ratios(self) -> Tensor:
        """Return (N, T): log-probs at the update's start minus the reference's (k1), 0 outside the mask."""
        import torch

        return torch.where(self.mask, self.old_logprobs - self.reference_logprobs, 0.0)


class Estimates(NamedTuple):
    """What a method makes of samples; detached."""

    advantages: Tensor
    """(N, T); 0 outside the mask."""
    live: Tensor
    """(N,) bool: responses to learn from; the others weigh nothing."""
    returns: Tensor | None = None
    """(N, T): what the value model is to learn; None without one."""


# ---------------------------------------------------------------------------------------------------- token rewards


def token_rewards(
    scores: Tensor,
    log_ratios: Tensor,
    mask: Tensor,
    *,
    kl_coefficient: float,
) -> Tensor:
    """Return (N, T) rewards: -kl_coefficient * k1 on each token, and the score on the last one (Stiennon et al. 2020).

    Args:
        scores: (N,), NaN counts as 0: leave such rows out by the mask.
        log_ratios: (N, T) policy minus reference, of the sampled tokens (k1).
        mask: (N, T) bool.
        kl_coefficient: price of a nat.
    """
    import torch

    rewards = torch.where(mask, -kl_coefficient * log_ratios, 0.0).detach()
    whole = torch.nan_to_num(scores, nan=0.0).to(rewards.dtype)
    return rewards + torch.where(last_tokens(mask), whole[:, None], 0.0).detach()


def last_tokens(mask: Tensor) -> Tensor:
    """Return (N, T) bool: true on the last token of each row's mask; nowhere in a row without any."""
    later = mask.flip(1).cumsum(1).flip(1)
    return mask & (later == 1)


def overlong_penalties(lengths: Tensor, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """Return (N,) penalties in [-1, 0] of responses that come near the greatest length (DAPO, arXiv 2503.14476, eq 13).

    0 up to max_tokens - buffer_tokens, from there on linear down to -1 at max_tokens.

    Raises:
        ValueError: the buffer is not within the greatest length.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"overlong_buffer_tokens: got {buffer_tokens}, wanted 1 to max_tokens ({max_tokens})")
    return ((max_tokens - buffer_tokens - lengths) / buffer_tokens).clamp(-1.0, 0.0)


# ------------------------------------------------------------------------------------------------- over a response


class GaeOutput(NamedTuple):
    """Both (N, T), 0 outside the mask."""

    advantages: Tensor
    returns: Tensor
    """Advantages + values, before any whitening."""


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    discount: float = 1.0,
    decay: float = 0.95,
    last_values: Tensor | None = None,
) -> GaeOutput:
    """Return generalised advantage estimates (Schulman et al. 2015, arXiv 1506.02438, eq 16), from the last token back.

    delta_t = R_t + discount * V_{t+1} - V_t; A_t = delta_t + discount * decay * A_{t+1}, where t + 1 is the *next token
    of the mask*. Behind the last one V is 0, or `last_values`.

    Args:
        rewards: (N, T).
        values: (N, T); what stands outside the mask plays no part.
        mask: (N, T) bool.
        discount: gamma; 1 for text.
        decay: lambda; 1: reward-to-go minus value, 0: one-step errors.
        last_values: (N,) expected from behind the last token on, of responses that were cut; None: 0.
    """
    import torch

    advantages = torch.zeros_like(rewards)
    ahead = torch.zeros_like(rewards[:, 0])
    value_ahead = torch.zeros_like(ahead) if last_values is None else last_values.to(ahead.dtype)
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        errors = rewards[:, t] + discount * value_ahead - values[:, t]
        ahead = torch.where(here, errors + discount * decay * ahead, ahead)
        value_ahead = torch.where(here, values[:, t], value_ahead)
        advantages[:, t] = torch.where(here, ahead, 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    return GaeOutput(advantages=advantages.detach(), returns=returns.detach())


def returns_to_go(rewards: Tensor, mask: Tensor, *, discount: float = 1.0) -> Tensor:
    """Return (N, T): the sum of the rewards from each token of the mask on; 0 outside it."""
    import torch

    return gae(rewards, torch.zeros_like(rewards), mask, discount=discount, decay=1.0).returns


# -------------------------------------------------------------------------------------------------------- whitening


class MaskedSums(NamedTuple):
    """What mean and variance hang on; each is a scalar (fp64) that ranks add up."""

    num_tokens: Tensor
    total: Tensor
    squares: Tensor

    def plus(self, other: MaskedSums) -> MaskedSums:
        """Return the sums of both parts together."""
        return MaskedSums(*(a + b for a, b in zip(self, other, strict=True)))


def masked_sums(values: Tensor, mask: Tensor) -> MaskedSums:
    """Return number, sum and sum of squares of the values that the mask shows."""
    shown = values[mask].double()
    return MaskedSums(num_tokens=mask.sum().double(), total=shown.sum(), squares=shown.square().sum())


def whiten(values: Tensor, mask: Tensor, *, sums: MaskedSums | None = None) -> Tensor:
    """Return (N, T) values with mean 0 and (population) variance 1 over all masked tokens; 0 outside the mask.

    Args:
        values: (N, T).
        mask: (N, T) bool.
        sums: those of the whole global batch, where these rows are a part of it; None: these rows are all.
    """
    import torch

    found = masked_sums(values, mask) if sums is None else sums
    num_tokens = found.num_tokens.clamp(min=1.0)
    mean = found.total / num_tokens
    variance = (found.squares / num_tokens - mean.square()).clamp(min=0.0)
    scaled = (values.double() - mean) * torch.rsqrt(variance + WHITEN_EPSILON)
    return torch.where(mask, scaled.to(values.dtype), 0.0).detach()


# ------------------------------------------------------------------------------------------------- within a group


class _Groups(NamedTuple):
    """Figures of each response's group, over the responses that have a score; each (N,)."""

    counts: Tensor
    means: Tensor
    deviations: Tensor
    """With ddof 1; 0 in a group of one."""
    alike: Tensor
    """bool: all scores of the group are the same."""


def _groups(scores: Tensor, groups: Tensor) -> _Groups:
    import torch

    known = torch.isfinite(scores)
    names, index = torch.unique(groups, return_inverse=True)
    given = torch.where(known, scores, 0.0)

    def summed(values: Tensor) -> Tensor:
        return given.new_zeros(len(names)).index_add(0, index, values.to(given.dtype))[index]

    def outermost(which: Literal["amax", "amin"], fill: float) -> Tensor:
        values = torch.where(known, scores, fill)
        return torch.full_like(given[: len(names)], fill).scatter_reduce(0, index, values, which)[index]

    counts = summed(known)
    means = summed(given) / counts.clamp(min=1.0)
    squares = summed(torch.where(known, (given - means).square(), 0.0))
    alike = outermost("amax", -torch.inf) <= outermost("amin", torch.inf)
    deviations = torch.where(alike, 0.0, (squares / (counts - 1).clamp(min=1.0)).sqrt())
    return _Groups(counts=counts, means=means, deviations=deviations, alike=alike)


def group_relative(scores: Tensor, groups: Tensor, *, scale: Literal["std", "none"] = "std") -> Tensor:
    """Return (N,) scores relative to their group: (r - mean) / (std + 1e-4), std with ddof 1 (arXiv 2402.03300, 4.1.2).

    Scores (1, 0, 0, 1) of one group: +-0.865875; with scale "none" (Dr.GRPO, arXiv 2503.20783) +-0.5. A missing score,
    a group of one and a group whose scores are all the same give 0.
    """
    import torch

    found = _groups(scores, groups)
    centred = scores - found.means
    scaled = centred / (found.deviations + GROUP_EPSILON) if scale == "std" else centred
    return torch.where(torch.isfinite(scores) & ~found.alike, scaled, 0.0).detach()


def group_centred(scores: Tensor, groups: Tensor) -> Tensor:
    """Return (N,) scores minus the mean of their group; a missing score stays missing."""
    return (scores - _groups(scores, groups).means).detach()


def informative(scores: Tensor, groups: Tensor) -> Tensor:
    """Return (N,) bool: the response has a score, and its group has two that differ (DAPO, arXiv 2503.14476)."""
    import torch

    found: Tensor = torch.isfinite(scores) & ~_groups(scores, groups).alike
    return found


def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """Return (N,): each score minus the mean of its group's *others* (RLOO, arXiv 2402.14740).

    G / (G - 1) * (r - mean). Scores (1, 0, 0, 1): +-2/3. A missing score and a group of one give 0.
    """
    import torch

    found = _groups(scores, groups)
    factors = found.counts / (found.counts - 1).clamp(min=1.0)
    return torch.where(torch.isfinite(scores) & (found.counts > 1), factors * (scores - found.means), 0.0).detach()
