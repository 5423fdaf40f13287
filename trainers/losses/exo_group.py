"""Efficient exact optimisation on groups of scored responses (Ji et al. 2024, arXiv 2402.00856).

L = sum_k p_k * (log p_k - log q_k) over the K responses to a prompt: p = softmax(beta * h), h = log pi - log ref, and
q = softmax(rewards / temperature). The gradient flows through both occurrences of p. `forward` has the other direction,
sum_k q_k * (log q_k - log p_k), whose gradient is that of DPO with rewards (the paper's DPO-rw). Pairs: exo.
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import GroupBatch, LossOutput

batch = GroupBatch
uses_reference = True


class Config(settings.Config):
    """Settings of EXO on groups."""

    beta: float = Field(default=0.5, gt=0.0)
    """Sharpness of the policy's distribution over the group."""
    temperature: float = Field(default=0.5, gt=0.0)
    """Of the rewards' distribution over the group, in units of reward."""
    forward: bool = False
    """Whether the divergence is the forward one, KL(q, p)."""


def loss(batch: GroupBatch, config: Config) -> LossOutput:
    """Return the mean divergence of groups; `agreement` is the share in which both have the same best response.

    h = (1, -0.5, 0.2) and rewards (0.9, 0.1, 0.5): 0.0519806, forward 0.0477652.
    """
    import torch

    # Far below any log-ratio, and yet finite: 0 * -inf would be NaN.
    nowhere = torch.finfo(batch.policy.dtype).min / 4
    logratios = batch.policy - batch.reference.detach()
    log_p = (config.beta * logratios).masked_fill(~batch.live(), nowhere).log_softmax(dim=1)
    log_q = (batch.rewards.detach() / config.temperature).masked_fill(~batch.live(), nowhere).log_softmax(dim=1)
    terms = log_q.exp() * (log_q - log_p) if config.forward else log_p.exp() * (log_p - log_q)
    divergence = batch.mean(torch.where(batch.live(), terms, 0.0).sum(dim=1))
    agreement = batch.mean((log_p.argmax(dim=1) == log_q.argmax(dim=1)).to(log_p.dtype))
    return LossOutput(divergence, {"divergence": divergence.detach(), "agreement": agreement.detach()})
