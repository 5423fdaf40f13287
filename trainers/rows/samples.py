"""Owns sampled and scored responses as rows, and what an update knows of their tokens: advantages, returns, values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from trainers.advantages import Estimates, Samples
from trainers.losses import TokenBatch
from trainers.rows import Totals
from trainers.rows.columns import Floats, Ids, Lists, ages_of, read_lists, refuse_rows, require_columns, responses_of
from trainers.rows.documents import DocumentRows, TokenRows, token_rows
from trainers.rows.padding import aligned


class Signals(NamedTuple):
    """What an update knows of its samples' tokens from its start on; each [rows, T] fp32, 0 outside the responses."""

    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    returns: Tensor | None
    old_values: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRows(DocumentRows):
    """Responses that were sampled and scored: documents, and what becomes of their scores."""

    documents: TokenRows
    scores: Floats
    """(rows,); NaN where there is none."""
    groups: Ids
    """(rows,): responses to one query have one number."""
    ended: npt.NDArray[np.bool_]
    """(rows,): false where a response was cut at its greatest length."""
    ages: Ids
    """Versions that each row's samples are behind the weights to be trained; 0 where the table does not say."""
    rollout_logprobs: Tensor | None
    """[rows, T] fp32: nats, when they were sampled; None: not known."""
    reference_logprobs: Tensor | None
    """[rows, T] fp32; None: the reference are the weights at the update's start."""
    segment_rewards: Tensor | None
    """[rows, T] fp32 (trainers.advantages); None: no critic gave any."""
    signals: Signals | None = None
    """None until `with_signals`."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of rows and of tokens of the longest."""
        return len(self.lengths), int(self.lengths.max(initial=1))

    def samples(self, old_logprobs: Tensor, *, values: Tensor | None = None) -> Samples:
        """Return all rows as a method makes advantages of them.

        Args:
            old_logprobs: [rows, T] by the weights at the update's start.
            values: [rows, T] by the same, of a policy with a value head.
        """
        reference = old_logprobs if self.reference_logprobs is None else self.reference_logprobs
        shown = [np.ones(count) for count in self.documents.num_targets]
        return Samples(
            mask=aligned(shown, self.documents.masks, shape=self.shape).bool(),
            scores=torch.from_numpy(self.scores),
            groups=torch.from_numpy(self.groups),
            ended=torch.from_numpy(self.ended),
            old_logprobs=old_logprobs,
            reference_logprobs=reference,
            values=values,
            segment_rewards=self.segment_rewards,
        )

    def with_signals(self, samples: Samples, estimates: Estimates) -> SampleRows:
        """Return the rows with what a method made of them; those that it leaves out weigh nothing."""
        signals = Signals(
            old_logprobs=samples.old_logprobs,
            reference_logprobs=samples.reference_logprobs,
            advantages=estimates.advantages.float(),
            returns=None if estimates.returns is None else estimates.returns.float(),
            old_values=samples.values,
        )
        weights = self.documents.weights * estimates.live.numpy()
        return replace(self, signals=signals, documents=replace(self.documents, weights=weights))

    def batch(
        self, rows: Sequence[int], *, logprobs: Tensor, mask: Tensor, totals: Totals, values: Tensor | None = None
    ) -> TokenBatch:
        """Return what a policy-gradient loss takes, from the policy's [B, T] log-probs and its value head's values."""
        assert self.signals is not None, "with_signals comes first"
        num_tokens = logprobs.shape[1]

        def cut(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            picked = values[list(rows), :num_tokens] if rows else torch.zeros_like(logprobs, device="cpu")
            return picked.to(device=logprobs.device, dtype=logprobs.dtype)

        return replace(
            self.documents.batch(rows, logprobs=logprobs, mask=mask, totals=totals),
            old_logprobs=cut(self.signals.old_logprobs),
            rollout_logprobs=cut(self.rollout_logprobs),
            reference_logprobs=cut(self.signals.reference_logprobs),
            advantages=cut(self.signals.advantages),
            returns=cut(self.signals.returns),
            values=values,
            old_values=cut(self.signals.old_values),
        )


def sample_rows(table: pa.Table) -> SampleRows:
    """Return the scored responses of a table.

    Columns: `prompt_token_ids`, `response_token_ids`, `query_id` (its responses are a group, which must be whole) and
    `score` (null or NaN: there is none). If there: `response_logprobs` (nats, when they were sampled),
    `reference_logprobs` and `segment_rewards`, each one number for every token of the response; `finish_reason`
    ("stop": the response has its end; without the column all have), `age`, `weight`, `loss_mask` (see `token_rows`).

    Raises:
        ValueError: a column is missing, a prompt or response is empty, a score is infinite, or a list has another
            length than its response.
    """
    prompts, responses = read_lists(table, "prompt_token_ids"), read_lists(table, "response_token_ids")
    for name, lists in (("prompt", prompts), ("response", responses)):
        refuse_rows(lists.lengths == 0, table, f"an empty {name}; drop it before training")
    documents = token_rows(table)
    require_columns(table, "score", "query_id")
    column: Any = table.column("score")
    scores: Floats = column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    refuse_rows(np.isinf(scores), table, "an infinite score")
    _, groups = np.unique(np.array(table.column("query_id").to_pylist(), dtype=np.str_), return_inverse=True)
    given = {
        name: _response_numbers(table, name, prompts, responses)
        for name in ("response_logprobs", "reference_logprobs", "segment_rewards")
    }
    reasons = table.column("finish_reason").to_pylist() if "finish_reason" in table.column_names else None
    return SampleRows(
        documents=documents,
        scores=scores,
        groups=groups.astype(np.int64),
        ended=np.array([True] * table.num_rows if reasons is None else [reason == "stop" for reason in reasons]),
        ages=ages_of(table),
        rollout_logprobs=given["response_logprobs"],
        reference_logprobs=given["reference_logprobs"],
        segment_rewards=given["segment_rewards"],
    )


def _response_numbers(table: pa.Table, name: str, prompts: Lists, responses: Lists) -> Tensor | None:
    """Return [rows, T] numbers on the tokens of each response; None where a table has none, or not of every row."""
    if name not in table.column_names or table.column(name).null_count:
        return None
    found = read_lists(table, name)
    refuse_rows(found.lengths != responses.lengths, table, f"{name}: wanted one for each token of the response")
    shape = table.num_rows, int((prompts.lengths + responses.lengths).max(initial=1))
    return aligned(found.rows(), responses_of(prompts, responses).rows(), shape=shape)
