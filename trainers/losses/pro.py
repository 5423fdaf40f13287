"""Preference ranking optimisation: the whole order of a group (Song et al. 2023, arXiv 2306.17492).

Responses sorted by reward, best first; s_k = log pi_k / length_k, the mean log-prob of a token. For each k < K, all
later responses are its negatives: L_k = logsumexp(s_k * g_k, {s_i * g_i for i > k}) - s_k * g_k, with the gaps in
reward g_i = r_k - r_i and g_k = max_i g_i as inverse temperatures. Added is sft_weight * (K - 1)^2 * (-log pi of the
best), the log-prob **summed**, as in the authors' code. With all gaps 1 the sum of L_k is Plackett and Luce's.
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import GroupBatch, LossOutput

batch = GroupBatch
uses_reference = False


class Config(settings.Config):
    """Settings of PRO."""

    sft_weight: float = Field(default=0.05, ge=0.0)
    """Weight of the best response's negative log-likelihood, times (K - 1)^2."""
    unit_gaps: bool = False
    """Whether every gap counts as 1 (Plackett and Luce): only the order of the rewards matters."""


def loss(batch: GroupBatch, config: Config) -> LossOutput:
    """Return the mean ranking loss of groups, plus the best responses' NLL.

    s = (-1, -1.2, -1.5), rewards (0.9, 0.5, 0.1): ranking 1.114304 + 0.634946 = 1.749251.
    """
    import torch

    live = batch.live()
    last_if_dead = batch.rewards.detach().masked_fill(~live, -torch.inf)
    order = last_if_dead.argsort(dim=1, descending=True, stable=True)
    live, rewards = live.gather(1, order), batch.rewards.detach().gather(1, order)
    policy, lengths = batch.policy.gather(1, order), batch.lengths.gather(1, order)
    scores = policy / lengths.clamp(min=1.0)
    size = live.shape[1]
    later = torch.ones(size, size, dtype=torch.bool, device=live.device).triu(1)
    # [P, k, i]: candidate i is a negative of candidate k.
    negative = later & live[:, None, :] & live[:, :, None]
    gaps = torch.where(negative, rewards[:, :, None] - rewards[:, None, :], 0.0)
    if config.unit_gaps:
        gaps = negative.to(scores.dtype)
    own = scores * gaps.amax(dim=2)
    # Not -inf: a row without negatives is left out below, and must not be NaN before.
    others = (scores[:, None, :] * gaps).masked_fill(~negative, torch.finfo(scores.dtype).min)
    terms = torch.cat([own[:, :, None], others], dim=2).logsumexp(dim=2) - own
    ranking = batch.mean(torch.where(negative.any(dim=2), terms, 0.0).sum(dim=1))
    rivals = (live.sum(dim=1) - 1).clamp(min=0).to(scores.dtype)
    nll = batch.mean(-(rivals**2) * torch.where(live[:, 0], policy[:, 0], 0.0))
    metrics = {"ranking_loss": ranking.detach(), "best_nll": nll.detach()}
    return LossOutput(ranking + config.sft_weight * nll, metrics)
