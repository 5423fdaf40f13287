"""Owns preference pairs as rows: prompt + chosen and prompt + rejected, both in one micro-batch of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from trainers.logprobs import sequence_logprobs
from trainers.losses import PairBatch, ScoreBatch
from trainers.rows import Padded, Totals
from trainers.rows.columns import (
    Floats,
    Ids,
    Lists,
    ages_of,
    concatenated,
    read_lists,
    read_numbers,
    refuse_rows,
    responses_of,
)
from trainers.rows.padding import column, pad, passes_worth, sampling_gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """Preference pairs: prompt + chosen and prompt + rejected, targets on the responses."""

    chosen: tuple[Ids, ...]
    rejected: tuple[Ids, ...]
    chosen_masks: tuple[npt.NDArray[np.bool_], ...]
    rejected_masks: tuple[npt.NDArray[np.bool_], ...]
    chosen_lengths: Ids
    """Response tokens."""
    rejected_lengths: Ids
    weights: Floats
    noise: Floats | None
    """None: no row says how likely its preference is flipped."""
    margins: Floats
    lengths: Ids
    """Tokens of each row's longer sequence."""
    ages: Ids
    """Versions that each row's samples are behind the weights to be trained; 0 where the table does not say."""
    rollout_logprobs: tuple[tuple[Floats, ...], ...] | None
    """Each row's log-probs (nats per response token, chosen and rejected) when they were sampled; () of a row that no
    policy has sampled as it is, None where no row has any."""
    correction: Floats
    """(rows,) factors of the loss (trainers.importance); the denominators of a step know nothing of them."""
    other_margins: Floats | None = None
    """(rows, M): of each other objective, in the place of `margins`; None: the table has none."""
    sequences_per_row: int = 2

    @property
    def num_tokens(self) -> Ids:
        """Return the tokens of each row's two sequences."""
        longer = np.maximum(self.chosen_lengths, self.rejected_lengths)
        return 2 * (self.lengths - longer) + self.chosen_lengths + self.rejected_lengths

    def totals(self, rows: Sequence[int]) -> Totals:
        """Return the denominators of a step."""
        chosen = list(rows)
        return Totals(
            weight=float(self.weights[chosen].sum()),
            tokens=float((self.weights[chosen] * self.chosen_lengths[chosen]).sum()),
        )

    def num_passes(self, micros: Sequence[tuple[int, ...]]) -> int:
        """Return in how many forward passes each rank computes its micro-batch: 2 where the padding saved is worth it.

        A pair's responses differ in length, the more so where the rejected one is cut at its flaw, and both must be in
        one micro-batch: so the long sequences of all its pairs go first, then the short ones.
        """
        return passes_worth([np.array([len(ids) for ids in self._sequences(micro)[0]]) for micro in micros])

    def pad(self, rows: Sequence[int], *, num_passes: int = 1) -> Padded:
        """Return [2B, T] token ids and targets, chosen block then rejected block; without rows a dummy."""
        token_ids, masks = self._sequences(rows)
        return pad(token_ids, masks, num_sequences=2, num_passes=num_passes)._replace(is_pairs=bool(rows))

    def _sequences(self, rows: Sequence[int]) -> tuple[list[Ids], list[npt.NDArray[np.bool_]]]:
        token_ids = [self.chosen[row] for row in rows] + [self.rejected[row] for row in rows]
        masks = [self.chosen_masks[row] for row in rows] + [self.rejected_masks[row] for row in rows]
        return token_ids, masks

    def rollout_gaps(self, rows: Sequence[int], logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return [B, 2] sums over response tokens of |log-prob - as sampled| (nats); 0 where that is not known.

        Args:
            rows: B of them.
            logprobs: [2B, T], chosen block then rejected block.
            mask: [2B, T] bool: the responses' tokens.
        """
        if self.rollout_logprobs is None:
            return torch.zeros(len(rows), 2, device=logprobs.device)
        known = [self.rollout_logprobs[row] for row in rows]
        sampled = [responses[side] if responses else None for side in range(2) for responses in known]
        return self.by_row(rows, sampling_gaps(logprobs, mask, sampled))

    def by_row(self, rows: Sequence[int], values: Tensor) -> Tensor:
        """Return [B, 2], chosen and rejected, of [2B] values of the sequences of some rows."""
        return values.view(2, len(rows)).T

    @property
    def num_response_tokens(self) -> Ids:
        """Return (rows,) the tokens of both responses."""
        return self.chosen_lengths + self.rejected_lengths

    @property
    def num_responses(self) -> int:
        """Return 2."""
        return 2

    def batch(
        self, rows: Sequence[int], *, logprobs: Tensor, mask: Tensor, totals: Totals, reference: Tensor
    ) -> PairBatch:
        """Return what a pair loss takes, from the policy's [2B, T] log-probs and the reference's [B, 2] sums."""
        policy_chosen, policy_rejected = sequence_logprobs(logprobs, mask).chunk(2)
        return PairBatch(
            policy_chosen=policy_chosen,
            policy_rejected=policy_rejected,
            reference_chosen=reference[:, 0],
            reference_rejected=reference[:, 1],
            chosen_lengths=column(self.chosen_lengths, rows, like=logprobs),
            rejected_lengths=column(self.rejected_lengths, rows, like=logprobs),
            weights=column(self.weights * self.correction, rows, like=logprobs),
            noise=None if self.noise is None else column(self.noise, rows, like=logprobs),
            margins=column(self.margins if self.other_margins is None else self.other_margins, rows, like=logprobs),
            global_weight=totals.weight,
            global_chosen_tokens=totals.tokens,
        )

    def score_batch(self, rows: Sequence[int], *, scores: Tensor, totals: Totals) -> ScoreBatch:
        """Return what a loss of scores takes, from a reward model's [2B] scores, chosen block then rejected block.

        The target is 1 - noise: noise is the probability that the pair is labelled the wrong way round.
        """
        chosen, rejected = scores.chunk(2)
        return ScoreBatch(
            chosen=chosen,
            rejected=rejected,
            margins=column(self.margins, rows, like=scores),
            targets=None if self.noise is None else 1.0 - column(self.noise, rows, like=scores),
            weights=column(self.weights * self.correction, rows, like=scores),
            global_weight=totals.weight,
        )


def pair_rows(table: pa.Table) -> PairRows:
    """Return the pairs of a table of `PreferencePair` rows.

    Raises:
        ValueError: a column is missing, a prompt or response is empty, or a weight is no weight.
    """
    prompts = read_lists(table, "prompt_token_ids")
    chosen, rejected = read_lists(table, "chosen_token_ids"), read_lists(table, "rejected_token_ids")
    for name, lists in (("prompt", prompts), ("chosen", chosen), ("rejected", rejected)):
        refuse_rows(lists.lengths == 0, table, f"an empty {name}; drop the pair before training")
    noise = read_numbers(table, "noise", default=0.0)
    refuse_rows(noise >= 0.5, table, "a noise of 0.5 or more: its label tells nothing, or the opposite; drop the pair")
    return PairRows(
        chosen=concatenated(prompts, chosen).rows(),
        rejected=concatenated(prompts, rejected).rows(),
        chosen_masks=responses_of(prompts, chosen).rows(),
        rejected_masks=responses_of(prompts, rejected).rows(),
        chosen_lengths=chosen.lengths,
        rejected_lengths=rejected.lengths,
        weights=read_numbers(table, "weight", default=1.0),
        # A table of zeros is one whose maker does not estimate noise: the loss's own setting holds for it.
        noise=noise if noise.any() else None,
        margins=read_numbers(table, "margin", default=0.0, least=-1.0),
        lengths=prompts.lengths + np.maximum(chosen.lengths, rejected.lengths),
        ages=ages_of(table),
        rollout_logprobs=_rollout_logprobs(table, chosen=chosen, rejected=rejected),
        correction=np.ones(len(prompts.lengths)),
        other_margins=_other_margins(table),
    )


def _rollout_logprobs(table: pa.Table, *, chosen: Lists, rejected: Lists) -> tuple[tuple[Floats, ...], ...] | None:
    """Return each pair's log-probs as sampled, () where a response has none; None where no pair has any."""
    names = ("chosen_logprobs", "rejected_logprobs")
    if any(name not in table.column_names for name in names):
        return None
    missing = np.logical_or.reduce([table.column(name).is_null().to_numpy() for name in names])
    if missing.all() and table.num_rows:
        return None
    sampled = table.filter(pa.array(~missing)) if missing.any() else table
    columns = []
    for name, responses in zip(names, (chosen, rejected), strict=True):
        found = read_lists(sampled, name)
        wrong = found.lengths != responses.lengths[~missing]
        refuse_rows(wrong, sampled, f"{name}: wanted one for each token of the response")
        columns.append([values.astype(np.float64) for values in found.rows()])
    rows = zip(*columns, strict=True)
    return tuple(() if unknown else next(rows) for unknown in missing.tolist())


def _other_margins(table: pa.Table) -> Floats | None:
    """Return (rows, M) margins of other objectives than the pairs' own; None where a table has none, or not of all."""
    if "other_margins" not in table.column_names or table.column("other_margins").null_count or not table.num_rows:
        return None
    found = read_lists(table, "other_margins")
    num = int(found.lengths[0])
    refuse_rows(found.lengths != num, table, f"other_margins: wanted {num}, as many as the first row")
    values: Floats = found.values.astype(np.float64).reshape(table.num_rows, num)
    refuse_rows(~np.isfinite(values).all(axis=1).reshape(-1), table, "other_margins that are not finite")
    return values
