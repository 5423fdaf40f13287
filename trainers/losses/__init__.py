"""Owns what a loss provides and takes: one file per loss, a pure function of a batch of log-probs, no I/O.

Shapes: B rows of this micro-batch, T positions. Log-probs in nats. A loss and each of its metrics are this batch's
**share of the global mean**: sums over its rows divided by denominators of the whole optimizer step, which the batch
carries. Shares of all micro-batches and ranks therefore add up to the same loss and gradient, however the step was cut
(METHODS G1). Without denominators the batch is taken as the whole step.

A loss imports torch inside its function: each `Config` is imported to read any config, and torch would take seconds.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from cluster.config import Config, load_plugin, plugin_names

if TYPE_CHECKING:
    from torch import Tensor


class LossOutput(NamedTuple):
    """What a loss returns."""

    loss: Tensor
    """Scalar with gradient: this batch's share of the global loss."""
    metrics: dict[str, Tensor]
    """Scalars, detached: shares too, so that a sum over micro-batches and ranks is the step's figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """Preference pairs; only the policy's log-probs carry gradient."""

    policy_chosen: Tensor
    """(B,) log-prob of the chosen response given its prompt, summed over its tokens."""
    policy_rejected: Tensor
    """(B,)"""
    reference_chosen: Tensor
    """(B,), as are the rest."""
    reference_rejected: Tensor
    chosen_lengths: Tensor
    """Response tokens, end-of-sequence included."""
    rejected_lengths: Tensor
    weights: Tensor | None = None
    """None: every pair weighs 1."""
    noise: Tensor | None = None
    """Assumed probability that the preference is flipped."""
    margins: Tensor | None = None
    """P(good) of the chosen minus that of the rejected."""
    global_weight: float | None = None
    """Sum of the weights over the global batch."""
    global_chosen_tokens: float | None = None
    """Sum of weight x chosen length over the global batch."""

    def live_weights(self) -> Tensor:
        """Return (B,) weights; 0 for a row without any response token (G5)."""
        live = ((self.chosen_lengths + self.rejected_lengths) > 0).to(self.policy_chosen.dtype)
        return live if self.weights is None else live * self.weights

    def mean(self, values: Tensor) -> Tensor:
        """Return the share of the weighted mean over pairs: sum(w * values) / global sum(w)."""
        weights = self.live_weights()
        total = float(weights.sum()) if self.global_weight is None else self.global_weight
        return (weights * values).sum() / (total or 1.0)

    def chosen_token_mean(self, values: Tensor) -> Tensor:
        """Return sum(w * values) / global sum(w * chosen length): `values` are sums over chosen tokens."""
        weights = self.live_weights()
        local = float((weights * self.chosen_lengths).sum())
        total = local if self.global_chosen_tokens is None else self.global_chosen_tokens
        return (weights * values).sum() / (total or 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Tokens with a mask; log-prob and mask at [b, t] belong to the token *at* t, not to its predictor."""

    logprobs: Tensor
    """(B, T); column 0 has no predictor and is never a target."""
    mask: Tensor
    """(B, T) bool: true on the tokens that the loss falls on."""
    weights: Tensor | None = None
    """(B,) or None: every row weighs 1."""
    global_tokens: float | None = None
    """Sum of weight x masked tokens over the global batch."""
    global_rows: float | None = None
    """Sum of the weights of rows with a masked token over the global batch."""

    def token_weights(self) -> Tensor:
        """Return (B, T): the row's weight on masked tokens, 0 elsewhere."""
        mask = self.mask.to(self.logprobs.dtype)
        return mask if self.weights is None else mask * self.weights[:, None]

    def weighted_sum(self) -> Tensor:
        """Return sum(w * m * logprobs); what lies outside the mask has no part in it, were it NaN."""
        import torch

        return (self.token_weights() * torch.where(self.mask, self.logprobs, 0.0)).sum()

    def num_tokens(self) -> float:
        """Return the global weighted token count, 1 when there is none (G5: the loss is then 0)."""
        total = float(self.token_weights().sum()) if self.global_tokens is None else self.global_tokens
        return total or 1.0

    def num_rows(self) -> float:
        """Return the global weighted row count, 1 when there is none."""
        rows = self.token_weights().max(dim=1).values.sum() if self.global_rows is None else self.global_rows
        return float(rows) or 1.0


class Loss(Protocol):
    """What a file of this package provides."""

    Config: type[Config]
    """Its settings."""
    batch: type[PairBatch] | type[TokenBatch]
    """The kind of batch it takes: from this the rank knows which columns to read and how to build it."""
    uses_reference: bool
    """Whether the batch must carry reference log-probs; they cost a forward pass over the data."""

    def loss(self, batch: Any, config: Any) -> LossOutput:
        """Return the loss of a batch."""
        ...


def load_loss(name: str) -> Loss:
    """Return the loss called `name`: the file of this package with that name.

    Raises:
        ValueError: there is no such file; names those that exist, and the nearest.
    """
    names = plugin_names(__name__)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f'loss.kind: got "{name}", wanted one of {", ".join(names)}{hint}')
    return cast(Loss, load_plugin(__name__, name, where="loss.kind"))
