"""Owns documents as rows: token ids, of which some are targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor

from trainers.losses import TokenBatch
from trainers.rows import Padded, Totals
from trainers.rows.columns import Floats, Ids, Lists, concatenated, read_lists, read_numbers, refuse_rows, responses_of
from trainers.rows.padding import column, pad


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """Documents: token ids, which of them are targets, and a weight each."""

    token_ids: tuple[Ids, ...]
    masks: tuple[npt.NDArray[np.bool_], ...]
    weights: Floats
    lengths: Ids
    """Tokens of each row."""
    num_targets: Ids
    flags: tuple[npt.NDArray[np.bool_], ...] | None = None
    """Which of a row's tokens are within a flagged span; None: the table does not say."""
    sequences_per_row: int = 1

    @property
    def num_tokens(self) -> Ids:
        """Return the tokens of each row."""
        return self.lengths

    def totals(self, rows: Sequence[int]) -> Totals:
        """Return the denominators of a step."""
        chosen = list(rows)
        weights = self.weights[chosen]
        return Totals(
            weight=float(weights.sum()),
            tokens=float((weights * self.num_targets[chosen]).sum()),
            flagged_tokens=sum(float(self.weights[row]) * self._num_flagged(row) for row in chosen),
        )

    def _num_flagged(self, row: int) -> int:
        return 0 if self.flags is None else int(np.count_nonzero(self.flags[row] & self.masks[row]))

    def num_passes(self, micros: Sequence[tuple[int, ...]]) -> int:
        """Return 1: the layout has put like lengths together."""
        return 1

    def pad(self, rows: Sequence[int], *, num_passes: int = 1) -> Padded:
        """Return [B, T] token ids and targets; without rows a dummy that has no target."""
        token_ids, masks = [self.token_ids[row] for row in rows], [self.masks[row] for row in rows]
        return pad(token_ids, masks, num_sequences=1, num_passes=num_passes)

    def batch(
        self,
        rows: Sequence[int],
        *,
        logprobs: Tensor,
        mask: Tensor,
        totals: Totals,
        mean_logprobs: Tensor | None = None,
    ) -> TokenBatch:
        """Return what a token loss takes, from the policy's [B, T] log-probs, and their means over the vocabulary."""
        flagged = None
        if self.flags is not None:
            flagged = pad(
                [self.token_ids[row] for row in rows], [self.flags[row] for row in rows], num_sequences=1
            ).mask
        return TokenBatch(
            logprobs=logprobs,
            mask=mask,
            weights=column(self.weights, rows, like=logprobs),
            global_tokens=totals.tokens,
            global_rows=totals.weight,
            flagged=None if flagged is None else flagged.to(logprobs.device),
            global_flagged_tokens=totals.flagged_tokens,
            mean_logprobs=mean_logprobs,
        )


class DocumentRows(Protocol):
    """Rows that are a document each and know something besides: laid out and padded as their documents are."""

    @property
    def documents(self) -> TokenRows:
        """Return the documents, one for each row."""
        ...

    @property
    def lengths(self) -> Ids:
        """Return the tokens of each row."""
        return self.documents.lengths

    @property
    def num_tokens(self) -> Ids:
        """Return the tokens of each row."""
        return self.documents.num_tokens

    @property
    def sequences_per_row(self) -> int:
        """Return 1."""
        return self.documents.sequences_per_row

    def totals(self, rows: Sequence[int]) -> Totals:
        """Return the denominators of a step."""
        return self.documents.totals(rows)

    def num_passes(self, micros: Sequence[tuple[int, ...]]) -> int:
        """Return 1: the layout has put like lengths together."""
        return self.documents.num_passes(micros)

    def pad(self, rows: Sequence[int], *, num_passes: int = 1) -> Padded:
        """Return [B, T] token ids and targets; without rows a dummy that has no target."""
        return self.documents.pad(rows, num_passes=num_passes)


def token_rows(table: pa.Table) -> TokenRows:
    """Return a table's documents: `prompt_token_ids`, `response_token_ids`; `weight`, `loss_mask`, `flagged` if there.

    Targets are the response's tokens, or those where `loss_mask` (one entry per token of prompt + response) is true.
    The first token of all is never one, for nothing predicts it. `flagged` (one entry per token of the response) is
    true within spans that a critique has found fault with.

    Raises:
        ValueError: a column is missing, a row has no target, a mask of another length, or a weight that is no weight.
    """
    prompts, responses = read_lists(table, "prompt_token_ids"), read_lists(table, "response_token_ids")
    joined = concatenated(prompts, responses)
    if "loss_mask" in table.column_names:
        masks = read_lists(table, "loss_mask")
        for row in np.flatnonzero(masks.lengths != joined.lengths):
            raise ValueError(
                f"row {row}: loss_mask has {masks.lengths[row]} entries, wanted one for each of "
                f"{joined.lengths[row]} tokens"
            )
        targets = Lists(values=masks.values.astype(np.bool_), lengths=masks.lengths)
    else:
        targets = responses_of(prompts, responses)
    flags = None
    if "flagged" in table.column_names:
        given = read_lists(table, "flagged")
        refuse_rows(given.lengths != responses.lengths, table, "flagged: wanted one for each token of the response")
        nothing = Lists(values=np.zeros(int(prompts.lengths.sum()), dtype=np.int64), lengths=prompts.lengths)
        flagged = concatenated(nothing, given)
        flags = Lists(values=flagged.values.astype(np.bool_), lengths=flagged.lengths).rows()
    targets.values[targets.starts[targets.lengths > 0]] = False
    mask_rows = targets.rows()
    num_targets = np.array([np.count_nonzero(mask) for mask in mask_rows], dtype=np.int64)
    refuse_rows(num_targets == 0, table, "no token to learn from; drop the row before training")
    return TokenRows(
        token_ids=joined.rows(),
        masks=mask_rows,
        weights=read_numbers(table, "weight", default=1.0),
        lengths=joined.lengths,
        num_targets=num_targets,
        flags=flags,
    )


def sequence_rows(sequences: Iterable[Sequence[int]]) -> TokenRows:
    """Return plain sequences as rows of which every token but the first is a target.

    Raises:
        ValueError: a sequence of fewer than two tokens.
    """
    token_ids = tuple(np.asarray(sequence, dtype=np.int64) for sequence in sequences)
    lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
    if lengths.size and lengths.min() < 2:
        row = int(np.argmin(lengths))
        raise ValueError(f"sequence {row}: got {lengths[row]} tokens, wanted 2 or more: the first has no log-prob")
    return TokenRows(
        token_ids=token_ids,
        masks=tuple(np.arange(len(ids)) > 0 for ids in token_ids),
        weights=np.ones(len(token_ids)),
        lengths=lengths,
        num_targets=lengths - 1,
    )
