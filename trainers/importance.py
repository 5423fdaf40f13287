"""Owns the correction for samples that other weights made than those they train (L-TIS): ratios, their bounds, the gap.

The rollout engine's log-probs of a response are those of the weights that sampled it; the training engine's, at the
iteration's start, are those that the update begins from. Their ratio reweighs the response's loss so that its
expectation is that under the weights being trained, truncated or masked to bound the variance (Ionides 2008; Espeholt
et al. 2018, arXiv 1802.01561; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training"). Of a pair, whose two responses were sampled apart, it is the product of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cluster.config import Config

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here, in nats: beyond it nothing is left to tell apart."""


class ImportanceConfig(Config):
    """How samples that older weights made are corrected for."""

    kind: Literal["truncate", "mask", "none"] = "truncate"
    """truncate: ratios above `cap` count as `cap`; mask: samples with such a ratio are left out; none."""
    cap: float = Field(default=3.0, ge=1.0)
    """Greatest ratio of the probabilities, of all tokens of a pair's two responses together."""
    applies_to: Literal["stale", "all"] = "stale"
    """stale: to samples of older versions; all: also to samples of the version that is trained, whose ratio is the
    rounding of two engines (bf16)."""
    alarm: float = Field(default=0.05, gt=0.0)
    """Mean |difference| of the two engines' log-probs per token (nats), at equal weights, above which the run warns."""


def correction(log_ratios: Floats, *, stale: npt.NDArray[np.bool_], config: ImportanceConfig) -> Floats:
    """Return (rows,) factors of the loss, from the log-ratios of the training engine's to the rollout engine's.

    Equal log-probs give exactly 1, and so does a row that is not corrected.
    """
    import numpy as np

    ratios: Floats = np.exp(np.clip(log_ratios, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    bounded = (
        np.minimum(ratios, config.cap) if config.kind == "truncate" else np.where(ratios > config.cap, 0.0, ratios)
    )
    applies = stale if config.applies_to == "stale" else np.ones_like(stale)
    return np.where(applies & (config.kind != "none"), bounded, 1.0)
