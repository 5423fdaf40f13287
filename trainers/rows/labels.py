"""Owns response tokens as items to be classified: the class is the token, the labels are those that the data has.

Shapes: S sequences, T positions, P of which predict a target in any sequence, V tokens, N targets of all sequences.

Logits are taken where a target is predicted, and nowhere else: those of prompts and padding never exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trainers.losses import LabelBatch
from trainers.rows import Rows, Totals
from trainers.rows.documents import DocumentRows, TokenRows, token_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRows(DocumentRows):
    """Documents whose targets are labels, each an item of its own."""

    documents: TokenRows

    def batch(
        self, rows: Sequence[int], *, logits: Tensor, token_ids: Tensor, mask: Tensor, totals: Totals
    ) -> LabelBatch:
        """Return what a loss of labels takes: N items, row after row, each row's in the order of its tokens.

        Args:
            rows: of the table; none for a dummy.
            logits: [S, P, V] as `target_logits` gives them.
            token_ids: [S, T] int64.
            mask: [S, T] bool: the targets.
            totals: of the whole step.
        """
        dtype = torch.promote_types(logits.dtype, torch.float32)
        items = logits[mask[:, 1:][:, predictors(mask)]].to(dtype)
        documents = self.documents
        weights = np.repeat(documents.weights[list(rows)], documents.num_targets[list(rows)])
        return LabelBatch(
            logits=items,
            labels=token_ids[mask],
            weights=torch.from_numpy(weights).to(device=items.device, dtype=dtype),
            global_weight=totals.tokens,
        )


def label_rows(table: pa.Table) -> LabelRows:
    """Return a table's documents, as `documents.token_rows` reads them.

    Raises:
        ValueError: as there.
    """
    return LabelRows(documents=token_rows(table))


def predictors(mask: Tensor) -> Tensor:
    """Return [P] the positions that predict a target of any sequence; the first where there is no target at all."""
    found = mask[:, 1:].any(dim=0).nonzero()[:, 0]
    # A dummy's logits must hang on the weights too.
    return found if len(found) else found.new_zeros(1)


def target_logits(model: Any, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Return [S, P, V] a causal language model's logits at `predictors(mask)` alone."""
    logits: Tensor = model(input_ids=token_ids, use_cache=False, logits_to_keep=predictors(mask)).logits
    return logits


def item_places(rows: Rows, chosen: Sequence[int]) -> tuple[dict[int, range], int]:
    """Return where the items of each of a step's rows stand among all of them, and how many there are.

    An item is what a loss's `first_pass` has a line of figures for: a token of a labelled document, else the row.
    """
    counts = (
        [int(rows.documents.num_targets[row]) for row in chosen] if isinstance(rows, LabelRows) else [1] * len(chosen)
    )
    ends = np.cumsum(counts).tolist()
    return {row: range(end - count, end) for row, count, end in zip(chosen, counts, ends, strict=True)}, ends[-1]
