"""Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17): a margin to reach, not to exceed.

L = (delta - 1 / (2 * tau))^2, delta = h_w - h_l, h = log pi - log ref. Where p of the raters prefer one response, the
optimum is delta = (p - 1/2) / tau: finite even at p = 1, where DPO's is infinite.

Two conventions exist, with other scales of loss and other optima. The paper's formula has log-probs summed over the
response. With `length_norm` each h is divided by its response's length; the authors have confirmed to the maintainers
of TRL that the paper's own results came from that.
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, PairBatch

batch = PairBatch
uses_reference = True


class Config(settings.Config):
    """Settings of IPO."""

    tau: float = Field(default=0.1, gt=0.0)
    """Strength of the pull towards the reference: the wanted margin is 1 / (2 * tau) nats."""
    length_norm: bool = False
    """Whether log-ratios are per response token."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); not of the paper's."""


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the mean squared distance from the wanted margin (nats^2); `reward_margin` is tau * delta.

    dpo's example (delta 1.5, tau 0.1): (1.5 - 5)^2 = 12.25; per token h = 1/5 and -0.5/4, (0.325 - 5)^2 = 21.855625.
    """
    chosen, rejected = batch.logratios(length_norm=config.length_norm)
    delta = chosen - rejected
    losses = (delta - 1 / (2 * config.tau)) ** 2
    return batch.output(losses, rewards=config.tau * delta, nll_weight=config.nll_weight)
