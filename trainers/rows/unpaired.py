"""Owns judged responses as rows: each is good or bad by itself (thumbs up, thumbs down), whatever else was answered.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from trainers.logprobs import sequence_logprobs
from trainers.losses import UnpairedBatch
from trainers.rows import Totals
from trainers.rows.columns import Floats, Ids, ages_of, read_lists, refuse_rows, require_columns
from trainers.rows.documents import DocumentRows, TokenRows, token_rows
from trainers.rows.padding import column, sampling_gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedRows(DocumentRows):
    """Responses with a thumb each."""

    documents: TokenRows
    desirable: npt.NDArray[np.bool_]
    """(rows,): thumbs up."""
    ages: Ids
    """(rows,) versions that each sample is behind the weights to be trained; 0 where the table does not say."""
    rollout_logprobs: tuple[tuple[Floats, ...], ...] | None
    """Each row's log-probs (nats per response token) when it was sampled; () where they are not known, None where no
    row has any."""
    correction: Floats
    """(rows,) factors of the loss (trainers.importance); the denominators of a step know nothing of them."""

    @property
    def num_responses(self) -> int:
        """Return 1."""
        return 1

    @property
    def num_response_tokens(self) -> Ids:
        """Return (rows,) the tokens of each response."""
        return self.documents.num_targets

    @property
    def num_desirable(self) -> float:
        """Return how many rows are good, as the sum of their weights."""
        return float(self.documents.weights[self.desirable].sum())

    @property
    def num_undesirable(self) -> float:
        """Return how many rows are bad, as the sum of their weights."""
        return float(self.documents.weights[~self.desirable].sum())

    def by_row(self, rows: Sequence[int], values: Tensor) -> Tensor:
        """Return [B, 1] of [B] values of the sequences of some rows."""
        return values[:, None]

    def rollout_gaps(self, rows: Sequence[int], logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return [B, 1] sums over response tokens of |log-prob - as sampled| (nats); 0 where that is not known.

        Args:
            rows: B of them.
            logprobs: [B, T].
            mask: [B, T] bool: the responses' tokens.
        """
        if self.rollout_logprobs is None:
            return torch.zeros(len(rows), 1, device=logprobs.device)
        known = [self.rollout_logprobs[row] for row in rows]
        return self.by_row(rows, sampling_gaps(logprobs, mask, [found[0] if found else None for found in known]))

    def batch(
        self, rows: Sequence[int], *, logprobs: Tensor, mask: Tensor, totals: Totals, reference: Tensor
    ) -> UnpairedBatch:
        """Return what an unpaired loss takes, from the policy's [B, T] log-probs and the reference's [B, 1] sums."""

        return UnpairedBatch(
            policy=sequence_logprobs(logprobs, mask),
            reference=reference[:, 0],
            desirable=column(self.desirable, rows, like=logprobs) > 0,
            lengths=column(self.documents.num_targets, rows, like=logprobs),
            weights=column(self.documents.weights * self.correction, rows, like=logprobs),
            global_weight=totals.weight,
            num_desirable=self.num_desirable,
            num_undesirable=self.num_undesirable,
        )

    def mismatched(self, rows: Sequence[int]) -> UnpairedRows:
        """Return, for some rows, each one's prompt with the response to another prompt (see `partners`).

        They are numbered from 0, in the order of `rows`. A sequence longer than any of the table's is cut. A row that
        has no partner weighs nothing.
        """
        documents, chosen, limit = self.documents, list(rows), int(self.lengths.max())
        num_targets = documents.num_targets
        prompts = [documents.token_ids[row][: -num_targets[row]] for row in chosen]
        others = partners([prompt.tobytes() for prompt in prompts])
        responses = [documents.token_ids[chosen[place]][-num_targets[chosen[place]] :] for place in others]
        token_ids = tuple(np.concatenate(both)[:limit] for both in zip(prompts, responses, strict=True))
        masks = tuple(np.arange(len(ids)) >= len(prompt) for ids, prompt in zip(token_ids, prompts, strict=True))
        has_partner = np.array([place != other for place, other in enumerate(others)])
        return replace(
            self,
            documents=TokenRows(
                token_ids=token_ids,
                masks=masks,
                weights=documents.weights[chosen] * has_partner,
                lengths=np.array([len(ids) for ids in token_ids], dtype=np.int64),
                num_targets=np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64),
            ),
            desirable=self.desirable[chosen],
            ages=self.ages[chosen],
            rollout_logprobs=None,
            correction=self.correction[chosen],
        )


def partners(prompts: Sequence[Hashable]) -> list[int]:
    """Return, for each row, another that has another prompt, no row twice; the row itself where none is left for it.

    Rows are put in the order in which their prompts first come, those of one prompt side by side, and shifted by the
    number of rows m of the commonest prompt, cyclically. Of n rows 2m - n are left without a partner where m > n / 2,
    all of that prompt; none otherwise.

    >>> partners(["a", "b", "a", "c"])  # a a b c, shifted by 2: a0-b, a2-c, b-a0, c-a2
    [1, 0, 3, 2]
    >>> partners(["a", "a", "a", "b"])
    [3, 1, 2, 2]
    """
    places: defaultdict[Hashable, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        places[prompt].append(row)
    order = [row for together in places.values() for row in together]
    shift = max(map(len, places.values()))
    found = [0] * len(order)
    for at, row in enumerate(order):
        other = order[(at + shift) % len(order)]
        found[row] = row if prompts[other] == prompts[row] else other
    return found


def unpaired_rows(table: pa.Table) -> UnpairedRows:
    """Return the judged responses of a table.

    Columns: `prompt_token_ids`, `response_token_ids` and `desirable` (bool: thumbs up). If there: `weight`, `age`,
    `response_logprobs` (nats, when they were sampled, one for every token of the response; null: not known).

    Raises:
        ValueError: a column is missing, a prompt or response is empty, a row has no thumb, or log-probs, an age or a
            weight are not what they must be.
    """
    require_columns(table, "desirable")
    thumbs: Any = table.column("desirable")
    if not pa.types.is_boolean(thumbs.type):
        raise ValueError(f"table: column 'desirable' holds {thumbs.type}, wanted bool: true is thumbs up")
    refuse_rows(thumbs.is_null().to_numpy(), table, "no thumb: desirable is null; drop the row before training")
    wanted = ("row_id", "prompt_token_ids", "response_token_ids", "weight")
    documents = token_rows(table.select([name for name in wanted if name in table.column_names]))
    prompts = read_lists(table, "prompt_token_ids")
    refuse_rows(prompts.lengths == 0, table, "an empty prompt; drop the row before training")
    return UnpairedRows(
        documents=documents,
        desirable=thumbs.to_numpy().astype(np.bool_),
        ages=ages_of(table),
        rollout_logprobs=_rollout_logprobs(table, num_tokens=documents.num_targets),
        correction=np.ones(table.num_rows),
    )


def _rollout_logprobs(table: pa.Table, *, num_tokens: Ids) -> tuple[tuple[Floats, ...], ...] | None:
    if "response_logprobs" not in table.column_names:
        return None
    found: list[tuple[Floats, ...]] = [
        () if values is None else (np.array(values, dtype=np.float64),)
        for values in table.column("response_logprobs").to_pylist()
    ]
    wrong = [bool(values) and len(values[0]) != num for values, num in zip(found, num_tokens, strict=True)]
    refuse_rows(np.array(wrong, dtype=np.bool_), table, "response_logprobs: wanted one for each token of the response")
    return tuple(found) if any(found) else None
