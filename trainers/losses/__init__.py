"""Owns what a loss provides and takes: one file per loss, a pure function of a batch of log-probs, no I/O.

Shapes: B rows of this micro-batch, N rows of its whole step, T positions, P groups of K candidates, C classes.
Log-probs in nats. A loss and each of its metrics are this batch's **share of the global mean**: sums over its rows
divided by denominators of the whole optimizer step, which the batch carries. Shares of all micro-batches and ranks
therefore add up to the same loss and gradient, however the step was cut (METHODS G1). Without denominators the batch is
taken as the whole step.

Some losses need a figure of the whole step that no table holds, for it hangs on the weights: a quantile, a sum of
weights that are probabilities. Such a loss is a `TwoPassLoss`: before the step's real pass the rank asks it, without
gradient, for a few figures of each row, and hands those of all rows back in every batch, as `step_figures`.

A loss imports torch inside its function: each `Config` is imported to read any config, and torch would take seconds.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

from cluster.config import Config, load_plugin, plugin_names

if TYPE_CHECKING:
    from torch import Tensor

Reduction: TypeAlias = Literal["tok-mean", "seq-mean", "seq-sum", "const"]
"""How (B, T) values become one number, each a weighted mean over the **global** batch. tok-mean: over tokens; seq-mean:
over rows, of each row's mean over its tokens; seq-sum: over rows, of each row's sum; const: seq-sum / max_tokens."""


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
    """Assumed probability that the preference is flipped, below 1/2; None: not known, the loss's own setting holds."""
    margins: Tensor | None = None
    """P(good) of the chosen minus that of the rejected; for modpo also (B, M), one column for each other objective."""
    global_weight: float | None = None
    """Sum of the weights over the global batch."""
    global_chosen_tokens: float | None = None
    """Sum of weight x chosen length over the global batch."""

    def logratios(self, *, length_norm: bool = False) -> tuple[Tensor, Tensor]:
        """Return (B,) h = log pi - log ref of chosen and of rejected; with `length_norm` per response token."""
        chosen = self.policy_chosen - self.reference_chosen.detach()
        rejected = self.policy_rejected - self.reference_rejected.detach()
        if not length_norm:
            return chosen, rejected
        return chosen / self.chosen_lengths.clamp(min=1.0), rejected / self.rejected_lengths.clamp(min=1.0)

    def output(self, losses: Tensor, *, rewards: Tensor, nll_weight: float) -> LossOutput:
        """Return the mean of the pairs' losses plus the chosen responses' NLL, and what every pair loss reports.

        Args:
            losses: (B,) with gradient.
            rewards: (B,) implicit reward of the chosen minus that of the rejected; right where above 0.
            nll_weight: of the negative log-likelihood per chosen token, summed over the global batch and divided by its
                tokens, so that the weight means the same for short and for long responses.
        """
        import torch

        preference, nll = self.mean(losses), self.chosen_token_mean(-self.policy_chosen)
        with torch.no_grad():
            told = {
                "chosen_logratio": self.policy_chosen - self.reference_chosen,
                "rejected_logratio": self.policy_rejected - self.reference_rejected,
                "reward_margin": rewards,
                "reward_accuracy": (rewards > 0).to(rewards.dtype),
            }
            # One sum for all of them: a small model's step is short enough for four to be felt.
            shares = _share(torch.stack(list(told.values())), weights=self.live_weights(), total=self.global_weight)
        metrics = {"preference_loss": preference.detach(), "chosen_nll": nll.detach()}
        metrics |= dict(zip(told, shares, strict=True))
        return LossOutput(preference + nll_weight * nll, metrics)

    def live_weights(self) -> Tensor:
        """Return (B,) weights; 0 for a row without any response token (G5)."""
        live = ((self.chosen_lengths + self.rejected_lengths) > 0).to(self.policy_chosen.dtype)
        return live if self.weights is None else live * self.weights

    def mean(self, values: Tensor) -> Tensor:
        """Return the share of the weighted mean over pairs: sum(w * values) / global sum(w)."""
        return _share(values, weights=self.live_weights(), total=self.global_weight)

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
    flagged: Tensor | None = None
    """(B, T) bool or None: tokens within a span that a critique has found fault with."""
    global_flagged_tokens: float | None = None
    """Sum of weight x masked and flagged tokens over the global batch."""
    mean_logprobs: Tensor | None = None
    """(B, T), with gradient: log-prob averaged over the vocabulary, where `logprobs` has that of the token itself; None
    unless the loss asks for it (`SmoothedLoss`)."""
    step_figures: Tensor | None = None
    """(N, F): what the loss's `first_pass` gave for all rows of the step; None: this batch is the step."""
    old_logprobs: Tensor | None = None
    """(B, T) detached, as are the rest but `values`: those of the weights at the update's start."""
    rollout_logprobs: Tensor | None = None
    """(B, T) or None: those of the engine that sampled; None where it does not say."""
    reference_logprobs: Tensor | None = None
    """(B, T)"""
    advantages: Tensor | None = None
    """(B, T)"""
    returns: Tensor | None = None
    """(B, T): what the value model is to learn."""
    values: Tensor | None = None
    """(B, T), with gradient: what the value model expects."""
    old_values: Tensor | None = None
    """(B, T): what it expected at the update's start."""

    def inside(self, values: Tensor | None, *, name: str) -> Tensor:
        """Return (B, T) values where the mask is true, 0 elsewhere, whatever stood there, were it NaN.

        Raises:
            ValueError: the batch has no such values.
        """
        import torch

        if values is None:
            raise ValueError(f"batch: got no {name}, wanted (B, T): this loss needs a table of scored samples")
        return torch.where(self.mask, values, 0.0)

    def reduce(self, values: Tensor, *, reduction: Reduction, max_tokens: int | None = None) -> Tensor:
        """Return the share of a global mean of (B, T) values, of which those outside the mask are 0.

        Args:
            values: (B, T).
            reduction: which mean (`Reduction`).
            max_tokens: what "const" divides a row by: the greatest length of a response.
        """
        weighted = self.token_weights() * values
        if reduction == "tok-mean":
            return weighted.sum() / self.num_tokens()
        if reduction == "seq-mean":
            lengths = self.mask.sum(dim=1, keepdim=True).clamp(min=1)
            return (weighted / lengths).sum() / self.num_rows()
        if reduction == "const":
            if max_tokens is None:
                raise ValueError(
                    'max_tokens: got nothing with reduction = "const", wanted the greatest length in tokens'
                )
            return weighted.sum() / (self.num_rows() * max_tokens)
        return weighted.sum() / self.num_rows()

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


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedBatch:
    """Responses that are each good or bad by themselves; only `policy` carries gradient."""

    policy: Tensor
    """(B,) log-prob of the response given its prompt, summed over its tokens; in the first pass, which looks at the
    mismatched alone, whatever is at hand."""
    reference: Tensor
    """(B,)"""
    desirable: Tensor
    """(B,) bool: thumbs up."""
    lengths: Tensor
    """(B,) response tokens."""
    mismatched_policy: Tensor | None = None
    """(B,) log-prob of the response to **another** prompt of the step given this row's prompt, no gradient; None where
    the step's figures are known already."""
    mismatched_reference: Tensor | None = None
    """(B,)"""
    weights: Tensor | None = None
    """None: every row weighs 1."""
    global_weight: float | None = None
    """Sum of the weights over the global batch."""
    num_desirable: float | None = None
    """Sum of the weights of the whole **update's** good rows; None: this batch is the update."""
    num_undesirable: float | None = None
    """The same of its bad rows; both are told, or neither."""
    step_figures: Tensor | None = None
    """(N, F): what the loss's `first_pass` gave for all rows of the step; None: this batch is the step."""

    def live_weights(self) -> Tensor:
        """Return (B,) weights; 0 for a row without any response token (G5)."""
        live = (self.lengths > 0).to(self.policy.dtype)
        return live if self.weights is None else live * self.weights

    def sides(self) -> tuple[float, float]:
        """Return how many of the update's rows are good and how many are bad, each a sum of weights."""
        if self.num_desirable is not None and self.num_undesirable is not None:
            return self.num_desirable, self.num_undesirable
        weights = self.live_weights()
        return float(weights[self.desirable].sum()), float(weights[~self.desirable].sum())

    def mean(self, values: Tensor) -> Tensor:
        """Return the share of the weighted mean over rows."""
        return _share(values, weights=self.live_weights(), total=self.global_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBatch:
    """Several scored responses to each prompt; only `policy` carries gradient. A group is never split (G8)."""

    policy: Tensor
    """(P, K) log-probs summed over the response's tokens."""
    reference: Tensor
    """(P, K)"""
    rewards: Tensor
    """(P, K), finite."""
    lengths: Tensor
    """(P, K) response tokens; 0 fills up a group that has fewer candidates."""
    weights: Tensor | None = None
    """(P,) or None: every group weighs 1."""
    global_weight: float | None = None
    """Sum of the weights over the global batch."""

    def live(self) -> Tensor:
        """Return (P, K) bool: there is such a candidate."""
        return self.lengths > 0

    def live_weights(self) -> Tensor:
        """Return (P,) weights; 0 for a group without candidates (G5)."""
        live = self.live().any(dim=1).to(self.policy.dtype)
        return live if self.weights is None else live * self.weights

    def mean(self, values: Tensor) -> Tensor:
        """Return the share of the weighted mean over groups."""
        return _share(values, weights=self.live_weights(), total=self.global_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBatch:
    """A reward model's scores of preference pairs; both carry gradient."""

    chosen: Tensor
    """(B,) score of the chosen response."""
    rejected: Tensor
    """(B,)"""
    margins: Tensor | None = None
    """(B,) least wanted gap: 1, 2/3, 1/3, 0 for a strong to a negligible preference; None: 0."""
    targets: Tensor | None = None
    """(B,) probability that the chosen is the better one; None: 1."""
    weights: Tensor | None = None
    """(B,) or None: every pair weighs 1."""
    global_weight: float | None = None
    """Sum of the weights over the global batch."""

    def mean(self, values: Tensor) -> Tensor:
        """Return the share of the weighted mean over pairs."""
        import torch

        weights = torch.ones_like(self.chosen) if self.weights is None else self.weights
        return _share(values, weights=weights, total=self.global_weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelBatch:
    """Items to be classified, with the labels that a weaker or noisy labeller gave; only `logits` carry gradient."""

    logits: Tensor
    """(B, C)"""
    labels: Tensor
    """(B, C) the labeller's probabilities; or (B,) int64, the classes of hard labels: of tokens, whose classes are the
    vocabulary, a second (B, C) would be as large as the logits."""
    weights: Tensor | None = None
    """(B,) or None: every item weighs 1."""
    progress: float = 1.0
    """Share of the training that is done, 0 to 1."""
    global_weight: float | None = None
    """Sum of the weights over the global batch."""
    step_figures: Tensor | None = None
    """(N, F): what the loss's `first_pass` gave for all items of the step; None: this batch is the step."""

    def live_weights(self) -> Tensor:
        """Return (B,) weights."""
        return self.logits.new_ones(len(self.logits)) if self.weights is None else self.weights

    def expected(self, values: Tensor) -> Tensor:
        """Return (B,) the labeller's mean of (B, C) values of the classes: sum_c labels_c * values_c.

        A class without probability has no part in it, were its value infinite.
        """
        import torch

        if self.labels.ndim == 1:
            return values.gather(1, self.labels[:, None])[:, 0]
        return torch.where(self.labels > 0, self.labels * values, 0.0).sum(dim=1)

    def classes(self) -> Tensor:
        """Return (B,) int64, the likeliest class by the labeller."""
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(dim=1)

    def probability(self, label: int) -> Tensor:
        """Return (B,) the labeller's probability of a class."""
        hard = self.labels.ndim == 1
        return (self.labels == label).to(self.logits.dtype) if hard else self.labels[:, label]

    def mean(self, values: Tensor) -> Tensor:
        """Return the share of the weighted mean over items."""
        return _share(values, weights=self.live_weights(), total=self.global_weight)


Batch: TypeAlias = PairBatch | TokenBatch | UnpairedBatch | GroupBatch | ScoreBatch | LabelBatch
"""What a loss may take."""


def _share(values: Tensor, *, weights: Tensor, total: float | None) -> Tensor:
    """Return sum(w * values) over the last axis / the global sum(w), which is the batch's own where it is not known."""
    return (weights * values).sum(dim=-1) / ((float(weights.sum()) if total is None else total) or 1.0)


class Loss(Protocol):
    """What a file of this package provides."""

    Config: type[Config]
    """Its settings."""
    batch: type[Batch]
    """The kind of batch it takes: from this the rank knows which columns to read and how to build it."""
    uses_reference: bool
    """Whether the batch must carry reference log-probs; they cost a forward pass over the data."""

    def loss(self, batch: Any, config: Any) -> LossOutput:
        """Return the loss of a batch."""
        ...


@runtime_checkable
class TwoPassLoss(Loss, Protocol):
    """A loss that must see the whole step before it can say what a part of it costs.

    The rank calls `first_pass` under no_grad, with the weights that the step starts from, on each of its batches; puts
    the rows of all ranks together in the plan's order (a row is 0 on all ranks but one, so that a sum over them is
    exact); and sets `step_figures` of every batch of the real pass to that (N, F) tensor. All batches of a step must
    get the same one, or their losses do not add up to the step's (G1). Without it a batch is taken as the whole step.
    """

    def first_pass(self, batch: Any, config: Any) -> Tensor:
        """Return (B, F) figures of a batch's rows, detached; a row of weight 0 must change nothing."""
        ...


@runtime_checkable
class SpanLoss(Loss, Protocol):
    """A loss that looks at where in a response a critique found fault: `TokenBatch.flagged`, or segment rewards."""

    reads_spans: bool


@runtime_checkable
class AdvisingLoss(Loss, Protocol):
    """A loss whose figures show when it is set otherwise than is advised."""

    def advice(self, means: dict[str, float]) -> str | None:
        """Return what the figures of an update (means over its steps) tell; None: nothing."""
        ...


@runtime_checkable
class SmoothedLoss(Loss, Protocol):
    """A loss that may look at every token that could have stood where a target does: `TokenBatch.mean_logprobs`."""

    def reads_means(self, config: Any) -> bool:
        """Return whether it does, by its settings; it costs a mean over the logits."""
        ...


@runtime_checkable
class DocumentLoss(Loss, Protocol):
    """A loss to which the loop gives every token of a document as a target, the prompt's too, by a `loss_mask`."""

    reads_prompts: bool


def load_loss(name: str) -> Loss:
    """Return the loss called `name`: the file of this package with that name.

    Raises:
        ValueError: there is no such file (names those that exist, and the nearest), or it looks twice at a step of what
            can't carry a step's figures.
    """
    names = plugin_names(__name__)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f'loss.kind: got "{name}", wanted one of {", ".join(names)}{hint}')
    loss = cast(Loss, load_plugin(__name__, name, where="loss.kind"))
    if isinstance(loss, TwoPassLoss) and not hasattr(loss.batch, "step_figures"):
        raise ValueError(
            f'loss.kind: got "{name}", whose first_pass looks at a step of {loss.batch.__name__}, wanted one of '
            "documents, thumbs or labels: no other batch carries step_figures"
        )
    return loss
