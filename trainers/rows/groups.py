"""Owns groups as rows: a prompt with its judged responses, whole in one micro-batch of one rank (METHODS G8).

Shapes: B groups of up to K responses, S sequences (all responses of B groups), T positions. A group with fewer than K
is filled up with responses of length 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from trainers.logprobs import sequence_logprobs
from trainers.losses import GroupBatch
from trainers.rows import Padded, Totals
from trainers.rows.columns import Floats, Ids, ages_of, read_numbers, require_columns
from trainers.rows.documents import TokenRows, token_rows
from trainers.rows.padding import passes_worth, sampling_gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRows:
    """Groups of scored responses."""

    documents: TokenRows
    """One for each response, group after group."""
    sizes: Ids
    """(rows,) responses of each group."""
    rewards: Floats
    """(responses,)"""
    weights: Floats
    """(rows,)"""
    ages: Ids
    """(rows,) versions that a group's oldest sample is behind the weights to be trained."""
    rollout_logprobs: tuple[tuple[Floats, ...], ...] | None
    """Each group's log-probs (nats per response token) when they were sampled; None: not known."""
    correction: Floats
    """(rows,) factors of the loss (trainers.importance); the denominators of a step know nothing of them."""

    @property
    def starts(self) -> Ids:
        """Return where each group's responses begin."""
        return np.cumsum(self.sizes) - self.sizes

    @property
    def lengths(self) -> Ids:
        """Return the tokens of each group's longest sequence."""
        return np.maximum.reduceat(self.documents.lengths, self.starts)

    @property
    def num_tokens(self) -> Ids:
        """Return the tokens of each group's sequences."""
        return np.add.reduceat(self.documents.lengths, self.starts)

    @property
    def sequences_per_row(self) -> Ids:
        """Return the responses of each group."""
        return self.sizes

    @property
    def num_responses(self) -> int:
        """Return K, the size of the largest group."""
        return int(self.sizes.max())

    @property
    def num_response_tokens(self) -> Ids:
        """Return (rows,) the tokens of each group's responses."""
        return np.add.reduceat(self.documents.num_targets, self.starts)

    def totals(self, rows: Sequence[int]) -> Totals:
        """Return the denominators of a step."""
        chosen = list(rows)
        weights = self.weights[chosen]
        return Totals(weight=float(weights.sum()), tokens=float((weights * self.num_response_tokens[chosen]).sum()))

    def num_passes(self, micros: Sequence[tuple[int, ...]]) -> int:
        """Return in how many forward passes each rank computes its micro-batch: a group's responses differ in length.

        As those of pairs do: so the long sequences of all its groups go first, then the short ones.
        """
        return passes_worth([self.documents.lengths[self._responses(micro)] for micro in micros])

    def pad(self, rows: Sequence[int], *, num_passes: int = 1) -> Padded:
        """Return [S, T] token ids and targets, group after group; without rows a dummy that has no target."""
        return self.documents.pad(self._responses(rows), num_passes=num_passes)

    def by_row(self, rows: Sequence[int], values: Tensor) -> Tensor:
        """Return [B, K] of [S] values of the sequences of some rows; 0 where a group has no such response.

        Without rows it is [1, 1], of a dummy's only value.
        """
        if not rows:
            return values[:1, None]
        parts = values.split(self.sizes[list(rows)].tolist())
        return torch.stack([torch.nn.functional.pad(part, (0, self.num_responses - len(part))) for part in parts])

    def rollout_gaps(self, rows: Sequence[int], logprobs: Tensor, mask: Tensor) -> Tensor:
        """Return [B, K] sums over response tokens of |log-prob - as sampled| (nats); 0 where that is not known.

        Args:
            rows: B of them.
            logprobs: [S, T].
            mask: [S, T] bool: the responses' tokens.
        """
        if self.rollout_logprobs is None:
            return torch.zeros(len(rows), self.num_responses, device=logprobs.device)
        sampled = [values for row in rows for values in self.rollout_logprobs[row]]
        return self.by_row(rows, sampling_gaps(logprobs, mask, sampled))

    def batch(
        self, rows: Sequence[int], *, logprobs: Tensor, mask: Tensor, totals: Totals, reference: Tensor
    ) -> GroupBatch:
        """Return what a loss of groups takes, from the policy's [S, T] log-probs and the reference's [B, K] sums."""
        responses = self._responses(rows)
        policy = self.by_row(rows, sequence_logprobs(logprobs, mask))

        def column(values: Any) -> Tensor:
            """Return [B, K] of what each response of the table has; 0 for a dummy."""
            picked = torch.from_numpy(np.asarray(values, dtype=np.float64)[responses]) if rows else torch.zeros(1)
            return self.by_row(rows, picked.to(device=logprobs.device, dtype=logprobs.dtype))

        weights = torch.from_numpy((self.weights * self.correction)[list(rows)]) if rows else torch.zeros(1)
        return GroupBatch(
            policy=policy,
            reference=reference[:, : policy.shape[1]],
            rewards=column(self.rewards),
            lengths=column(self.documents.num_targets),
            weights=weights.to(device=logprobs.device, dtype=logprobs.dtype),
            global_weight=totals.weight,
        )

    def _responses(self, rows: Sequence[int]) -> list[int]:
        """Return the places of some groups' responses among all."""
        starts, sizes = self.starts, self.sizes
        return [int(starts[row]) + i for row in rows for i in range(int(sizes[row]))]


def group_rows(table: pa.Table) -> GroupRows:
    """Return the groups of a table, of which each row is one.

    Columns: `prompt_token_ids` (one list), `responses_token_ids` (a list of lists) and `rewards` (one number for each
    response). If there: `responses_logprobs` (nats per token, when they were sampled), `age`, `weight`.

    Raises:
        ValueError: a column is missing, a prompt, a group or a response is empty, or rewards, log-probs or a weight are
            not what they must be.
    """
    wanted = ("prompt_token_ids", "responses_token_ids", "rewards")
    require_columns(table, *wanted)
    prompts, responses, rewards = (_nested(table, name) for name in wanted)
    sampled = _nested(table, "responses_logprobs") if _known(table, "responses_logprobs") else None
    for row, (prompt, group, scores) in enumerate(zip(prompts, responses, rewards, strict=True)):
        _refuse(not prompt, row, "an empty prompt; drop the group before training")
        _refuse(not group or not all(group), row, "no response, or an empty one; drop it before training")
        _refuse(len(scores) != len(group), row, f"{len(scores)} rewards, wanted one for each of {len(group)} responses")
        finite = all(score is not None and np.isfinite(score) for score in scores)
        _refuse(not finite, row, f"the rewards {scores}, wanted finite numbers; drop what has none before training")
        if sampled is not None:
            same = [len(values) for values in sampled[row]] == [len(response) for response in group]
            _refuse(not same, row, "responses_logprobs: wanted one for each token of each response")
    sizes = np.array([len(group) for group in responses], dtype=np.int64)
    ids = pa.list_(pa.int64())
    spread = [prompt for prompt, group in zip(prompts, responses, strict=True) for _ in group]
    flat = [response for group in responses for response in group]
    documents = {"prompt_token_ids": pa.array(spread, ids), "response_token_ids": pa.array(flat, ids)}
    return GroupRows(
        documents=token_rows(pa.table(documents)),
        sizes=sizes,
        rewards=np.array([score for scores in rewards for score in scores], dtype=np.float64),
        weights=read_numbers(table, "weight", default=1.0),
        ages=ages_of(table),
        rollout_logprobs=None
        if sampled is None
        else tuple(tuple(np.array(values, dtype=np.float64) for values in group) for group in sampled),
        correction=np.ones(table.num_rows),
    )


def _nested(table: pa.Table, name: str) -> list[Any]:
    column: Any = table.column(name)
    if column.null_count:
        raise ValueError(f"table: column {name!r} holds nulls, wanted lists")
    found: list[Any] = column.to_pylist()
    return found


def _known(table: pa.Table, name: str) -> bool:
    return name in table.column_names and not table.column(name).null_count


def _refuse(bad: bool, row: int, what: str) -> None:
    if bad:
        raise ValueError(f"table: row {row} has {what}")
