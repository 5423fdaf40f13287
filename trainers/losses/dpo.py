"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), with an NLL term on the chosen.

L = softplus(-beta * delta) + nll_weight * nll, where delta = h_w - h_l, h = log pi - log ref, on log-probs **summed**
over the response. Ours differs in the optional second term: nll = -(sum of chosen log-probs) / (number of chosen
tokens), both summed over the global batch, so that its weight means the same for short and for long responses; without
it the likelihood of the chosen may fall while the margin grows.

With `length_norm` h is divided by its response's length before the difference (Lambert et al. 2024, "Tulu 3", arXiv
2411.15124, eq. 6): a long response no longer moves the margin by its length alone. beta is then 5, as there, unless it
is set: a log-ratio per token is smaller than one of the whole response.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from cluster import config as settings
from trainers.losses import LossOutput, PairBatch

batch = PairBatch
uses_reference = True

BETA_PER_TOKEN = 5.0
"""beta of log-ratios per token, where none is set (open-instruct's `dpo_norm`)."""


class Config(settings.Config):
    """Settings of DPO."""

    beta: float = Field(default=0.1, gt=0.0)
    """Strength of the pull towards the reference; the implicit reward is beta * h. Where it is not set: 5 with
    length_norm."""
    length_norm: bool = False
    """Whether log-ratios are per response token."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); 0.1 to 1 are usual, 0 is plain DPO."""

    @model_validator(mode="before")
    @classmethod
    def _fill_beta(cls, values: Any) -> Any:
        """Return the values with the beta of log-ratios per token, where those are asked for and no beta is."""
        per_token = isinstance(values, dict) and values.get("length_norm") is True
        return {"beta": BETA_PER_TOKEN} | values if per_token else values


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the DPO loss of pairs, weighted by `batch.weights`.

    Policy -10 and -12, reference -11 and -11.5, beta 0.1: delta = 1.5, loss = softplus(-0.15) = 0.620957.
    """
    from torch.nn.functional import softplus

    chosen, rejected = batch.logratios(length_norm=config.length_norm)
    rewards = config.beta * (chosen - rejected)
    return batch.output(softplus(-rewards), rewards=rewards, nll_weight=config.nll_weight)
