"""Multi-objective DPO (Zhou et al. 2023, arXiv 2310.03708): one preference, other objectives as margins.

L = softplus(-(1 / w_0) * (beta * delta - sum_m w_m * (r^m_w - r^m_l))), delta = h_w - h_l. The pairs are preferences of
objective 0; r^m are the other objectives' rewards, known beforehand (`batch.margins` holds their differences, chosen
minus rejected), without gradient. Its optimum is the policy for the weighted sum of all rewards. One training for each
weighting; with w = (1, 0) it is dpo.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from cluster import config as settings
from trainers.losses import LossOutput, PairBatch

batch = PairBatch
uses_reference = True


class Config(settings.Config):
    """Settings of multi-objective DPO."""

    beta: float = Field(default=0.1, gt=0.0)
    """Strength of the pull towards the reference."""
    weights: tuple[float, ...] | None = None
    """w_0 of the pairs' own objective, above 0, then those of the margins' columns; they add up to 1. Where they are
    not set: in a run objectives.weights; by itself the same for each."""
    nll_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the chosen responses' negative log-likelihood per token (nats); not of the paper's."""

    @model_validator(mode="after")
    def _in_the_simplex(self) -> Config:
        weights = self.weights
        if weights is None:
            return self
        if len(weights) < 2 or weights[0] <= 0 or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
            raise ValueError(
                f"weights: got {list(weights)}, wanted two or more that add up to 1, the first above 0 and none below 0"
            )
        return self


def loss(batch: PairBatch, config: Config) -> LossOutput:
    """Return the loss of pairs under their other objectives' margins; no margins count as 0.

    dpo's example (z = 0.15) with w = (0.5, 0.5) and a margin of 0.3 - 0.1: 2 * (0.15 - 0.1) = 0.1, loss 0.644397.

    Raises:
        ValueError: the margins have more or fewer columns than the weights say.
    """
    from torch.nn.functional import softplus

    chosen, rejected = batch.logratios()
    rewards = config.beta * (chosen - rejected)
    margins = rewards.new_zeros(len(rewards), len(config.weights or (1, 1)) - 1)
    if batch.margins is not None:
        margins = batch.margins.detach().view(len(rewards), -1)
    num_objectives = 1 + margins.shape[1]
    own, *others = config.weights or [1.0 / num_objectives] * num_objectives
    if margins.shape[1] != len(others):
        raise ValueError(f"modpo: got {margins.shape[1]} margins of a pair for {len(others)} weights after the first")
    logits = (rewards - margins @ rewards.new_tensor(others)) / own
    return batch.output(softplus(-logits), rewards=rewards, nll_weight=config.nll_weight)
