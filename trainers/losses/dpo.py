"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), with an NLL term on the chosen.

L = softplus(-beta * delta) + nll_weight * nll, where delta = h_w - h_l, h = log pi - log ref, on log-probs **summed**
over the response. Ours differs in the optional second term: nll = -(sum of chosen log-probs) / (number of chosen
tokens), both summed over the global batch, so that its weight means the same for short and for long responses; without
it the likelihood of the chosen may fall while the margin grows.

With `length_norm` h is divided by its response's length before the difference (Lambert et al. 2024, "Tulu 3", arXiv
2411.15124, eq. 6): a long response no longer moves the margin by its length alone. beta is then larger, 5 there.
"""

from __future__ import annotations

from pydantic import Field

from cluster import config as settings
from trainers.losses import LossOutput, PairBatch

batch = PairBatch
uses_reference = True


class Config(settings.Config):
    """Settings of DPO."""

    beta: float = Field(default=0.1, gt=0.0)
    """Strength of the pull towards the reference; the implicit reward is beta * h. With length_norm 5 is usual."""
    length_norm: bool = False
    """Whether log-ratios are per response token."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); 0.1 to 1 are usual, 0 is plain DPO."""


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the DPO loss of pairs, weighted by `batch.weights`.

    Policy -10 and -12, reference -11 and -11.5, beta 0.1: delta = 1.5, loss = softplus(-0.15) = 0.620957.
    """
    from torch.nn.functional import softplus

    chosen, rejected = batch.logratios(length_norm=config.length_norm)
    rewards = config.beta * (chosen - rejected)
    return batch.output(softplus(-rewards), rewards=rewards, nll_weight=config.nll_weight)
