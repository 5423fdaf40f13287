"""Owns the correction for samples that other weights made than those they train (L-TIS): ratios, their bounds, the gap.

The rollout engine's log-probs of a response are those of the weights that sampled it; the training engine's, at the
iteration's start, are those that the update begins from. Their ratio reweighs the response's loss so that its
expectation is that under the weights being trained, truncated or masked to bound the variance (Ionides 2008; Espeholt
et al. 2018, arXiv 1802.01561; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training"). Of a pair, whose two responses were sampled apart, it is the product of both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer

from cluster.config import Config

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    Floats = npt.NDArray[np.float64]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped here, in nats: beyond it nothing is left to tell apart."""


Cap: TypeAlias = Annotated[
    float,
    Field(ge=1.0, allow_inf_nan=True),
    BeforeValidator(lambda value: math.inf if value == "inf" else value),
    PlainSerializer(lambda value: "inf" if value == math.inf else value, return_type=Any, when_used="json"),
]
"""A greatest ratio; inf: there is none. In JSON, which has no such number, "inf"."""


class ImportanceConfig(Config):
    """How samples that older weights made are corrected for."""

    kind: Literal["truncate", "mask", "none"] = "truncate"
    """truncate: ratios above `cap` count as `cap`; mask: samples with such a ratio are left out; none."""
    cap: Cap = 3.0
    """Greatest ratio of the probabilities, of all tokens of a row's responses together; inf: there is none."""
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


Correction: TypeAlias = Literal["none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]
"""How a policy loss is reweighed. By token: each token by its own ratio; by sequence: all tokens of a response by the
ratio of the whole. truncate: min(ratio, cap); mask: 0 where the ratio is outside [floor, cap]."""


def token_factors(log_ratios: Tensor, mask: Tensor, *, kind: Correction, cap: float, floor: float = 0.0) -> Tensor:
    """Return (B, T) detached factors of a policy loss (L-TIS); equal log-probs give exactly 1.

    By sequence and without bounds the expectation of the reweighed loss is that under the training engine's weights;
    by token it is that of each token, as if what came before it had been sampled from them.

    Args:
        log_ratios: (B, T) training engine's log-probs at the update's start minus the rollout engine's.
        mask: (B, T) bool: the sampled tokens.
        kind: by token or by sequence, truncated or masked.
        cap: greatest ratio; inf: unbounded.
        floor: least ratio, for masks.
    """
    import torch

    logs = torch.where(mask, log_ratios, 0.0).detach()
    if kind == "none":
        return torch.ones_like(logs)
    if kind in ("sequence-truncate", "sequence-mask"):
        logs = logs.sum(dim=1, keepdim=True).expand_as(logs)
    ratios = logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if kind in ("token-truncate", "sequence-truncate"):
        return ratios.clamp(max=cap)
    return torch.where((ratios > cap) | (ratios < floor), 0.0, ratios)
