"""PPO with a critique's spans as rewards of their tokens (RELC: Cao et al. 2024, arXiv 2401.07382).

R_t = a1 * score at the last token + a2 * rho_t - beta * k1_t, where rho_t is +-1 for each span that the critic found
good or bad, placed by `trainers.feedback.segments`. The rest is PPO; a2 = 0 is PPO exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from trainers.advantages import Estimates, Samples
from trainers.losses import LossOutput, TokenBatch, ppo

batch = TokenBatch
reads_spans = True
uses_reference = True


class Config(ppo.Config):
    """Settings of RELC."""

    score_weight: float = Field(default=1.0, ge=0.0)
    """a1: of the score of the whole response."""
    segment_weight: float = Field(default=0.2, ge=0.0)
    """a2: of a span."""
    praise: bool = True
    """Pay also for the spans that the critic found right, not only charge for those it found wrong."""
    placement: Literal["end", "spread"] = "end"
    """On a span's last token, or the same share on each of its tokens."""
    segment_cap: float = Field(default=5.0, ge=0.0)
    """Greatest |sum of spans| of a response, so that many right trifles don't make up for a wrong answer; ours: at the
    default weight they then weigh as much as the score. 0: no bound."""


def advantages(samples: Samples, config: Config) -> Estimates:
    """Return PPO's estimates from the weighted scores and segment rewards.

    Raises:
        ValueError: there are no segment rewards, or no value model.
    """
    if samples.segment_rewards is None:
        raise ValueError("loss: got relc without segment rewards, wanted a column segment_rewards; or use ppo")
    weighted = replace(
        samples,
        scores=config.score_weight * samples.scores,
        segment_rewards=config.segment_weight * samples.segment_rewards,
    )
    return ppo.advantages(weighted, config)


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return PPO's loss."""
    return ppo.loss(batch, config)
