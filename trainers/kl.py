"""Owns what is known of the KL divergence from samples: its estimators (L-KL), and the control of its price (L-KLCTL).

With d = log pi_theta(y) - log pi_ref(y) on samples y of pi_theta (Schulman 2020, "Approximating KL divergence"):

    k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

E[k1] = E[k3] = KL(pi || ref); E[k2] is near it while the two are near. As a **reward penalty** (detached) k1 is right.
As a **term of a loss**, through which the gradient flows, they are different objectives on samples of pi_theta:
grad k1 is 0 in expectation, grad k2 is the gradient of KL(pi || ref), grad k3 that of KL(ref || pi). `k3+` has the
value of k3, which is never negative, and the gradient of k2. Of token log-ratios this holds for each state: what a
token does to later states only the reward penalty sees.

Log-ratios in nats. torch is imported inside the functions: settings name estimators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field

from cluster.config import Config

if TYPE_CHECKING:
    from torch import Tensor

Estimator: TypeAlias = Literal["k1", "k2", "k3", "k3+"]

MAX_LOG_RATIO = 10.0
"""Nats: below minus this, exp(-d) would drown all other tokens. Above it nothing overflows, and d is left as it is."""
MAX_CORRECTION = 0.2
"""Greatest relative error of the KL that the controller answers to (Ziegler et al. 2019)."""


def estimate(log_ratios: Tensor, *, estimator: Estimator) -> Tensor:
    """Return the estimator of each log-ratio d (any shape), in nats, with its own gradient.

    d = (0.2, -0.5, 0.2): k1 is d, k2 (0.02, 0.125, 0.02), k3 (0.018731, 0.148721, 0.018731).
    """
    if estimator == "k1":
        return log_ratios
    squared = 0.5 * log_ratios.square()
    if estimator == "k2":
        return squared
    import torch

    bounded = log_ratios.clamp(min=-MAX_LOG_RATIO)
    value = torch.expm1(-bounded) + bounded
    return value if estimator == "k3" else squared + (value - squared).detach()


class KlControl(Config):
    """How the price of the KL changes from one update to the next."""

    adaptive: bool = False
    """false: it stays; true: it rises while the KL is above `target` and falls while it is below."""
    target: float = Field(default=6.0, gt=0.0)
    """KL to be held, in nats per sequence: mean over sequences of the sum of k1 over the response's tokens."""
    horizon: int = Field(default=10_000, ge=1)
    """Samples over which an error of 20 % or more changes the price by about 20 %."""


class KlBudget(Config):
    """How far an update may move the weights, in nats per response (ranks/kl_probe.py); beyond, its steps are left out.

    The defaults are ours.
    """

    enabled: bool = False
    """Whether that is measured, at the cost of a forward pass over `num_sequences` responses each time."""
    update: float = Field(default=10.0, gt=0.0)
    """Greatest KL from the weights at the update's start."""
    run: float = Field(default=30.0, gt=0.0)
    """Greatest KL from the run's first weights; beyond, the iteration is the run's last."""
    num_sequences: int = Field(default=16, ge=1)
    """Responses that it is measured on, of the update's own."""
    every: int = Field(default=4, ge=1)
    """Optimizer steps between two measurements; the update's end is always measured."""


def controlled(coefficient: float, *, kl: float, num_samples: int, control: KlControl) -> float:
    """Return the KL coefficient of the next update (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    K <- K * (1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon), n samples in this update.

    >>> round(controlled(0.2, kl=9.0, num_samples=256, control=KlControl(adaptive=True)), 6)
    0.201024
    """
    if not control.adaptive:
        return coefficient
    error = max(-MAX_CORRECTION, min(MAX_CORRECTION, kl / control.target - 1.0))
    return coefficient * (1.0 + error * num_samples / control.horizon)
