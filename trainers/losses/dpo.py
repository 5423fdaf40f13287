"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7), with an NLL term on the chosen.

L = softplus(-beta * delta) + nll_weight * nll, where delta = h_w - h_l, h = log pi - log ref, on log-probs **summed**
over the response. Ours differs in the optional second term: nll = -(sum of chosen log-probs) / (number of chosen
tokens), both summed over the global batch, so that its weight means the same for short and for long responses; without
it the likelihood of the chosen may fall while the margin grows.
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
    """Strength of the pull towards the reference; the implicit reward is beta * h."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); 0.1 to 1 are usual, 0 is plain DPO."""


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the DPO loss of pairs, weighted by `batch.weights`.

    Policy -10 and -12, reference -11 and -11.5, beta 0.1: delta = 1.5, loss = softplus(-0.15) = 0.620957.
    """
    from torch.nn.functional import softplus

    chosen = batch.policy_chosen - batch.reference_chosen.detach()
    rejected = batch.policy_rejected - batch.reference_rejected.detach()
    rewards = config.beta * (chosen - rejected)
    preference = batch.mean(softplus(-rewards))
    nll = batch.chosen_token_mean(-batch.policy_chosen)
    metrics = {
        "preference_loss": preference,
        "chosen_nll": nll,
        "chosen_logratio": batch.mean(chosen),
        "rejected_logratio": batch.mean(rejected),
        "reward_margin": batch.mean(rewards),
        "reward_accuracy": batch.mean((rewards > 0).to(rewards.dtype)),
    }
    return LossOutput(preference + config.nll_weight * nll, {name: value.detach() for name, value in metrics.items()})
