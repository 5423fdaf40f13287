"""Owns a rank's passes through its model: which rows it computes, how, and by which weights.

Every method that computes is a collective: all ranks must be called alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainers.batches import MicroBatch, TrainingPlan
from trainers.batches import micro_batches as cut_into_micro_batches
from trainers.logprobs import mean_logprobs, sequence_logprobs, token_logprobs
from trainers.ranks import packed_rows, shared_prompts
from trainers.ranks.collectives import on_all
from trainers.ranks.first_weights import FirstWeights
from trainers.ranks.kl_probe import distributions as distributions_of
from trainers.ranks.rank_model import RankModel
from trainers.ranks.sequence_scores import sequence_scores
from trainers.ranks.update_start import ComparedRows, Reference, each_row_once
from trainers.ranks.value_head import aligned_values
from trainers.rows import Padded, Rows
from trainers.rows.documents import TokenRows
from trainers.rows.labels import LabelRows, target_logits
from trainers.rows.samples import SampleRows


class Forward(NamedTuple):
    """What a forward pass gives of some rows."""

    logprobs: Tensor
    """[S, T]; of a scored pass the scores, [S, 1]; of a labelled one the logits that predict targets, [S, P, V]."""
    mask: Tensor
    padded: Padded
    values: Tensor | None
    """[S, T]; None without a value head, and where no loss asks for one."""
    mean_logprobs: Tensor | None = None
    """[S, T]: log-probs averaged over the vocabulary; None unless they are asked for."""


class _Tokens(NamedTuple):
    """What the model says of token ids, each [R, W] as they are."""

    logprobs: Tensor
    values: Tensor | None
    means: Tensor | None


class Passes:
    """Passes of one rank."""

    def __init__(self, model: RankModel) -> None:
        self._model = model
        self._by_first = False
        self._asked: FirstWeights | None = None

    @property
    def _computing(self) -> Any:
        """Return what is asked: the engine, or in its place the model as it was first."""
        return self._model.engine if self._asked is None else self._asked

    def micro_batches(self, rows: Rows, chosen: Sequence[int]) -> tuple[MicroBatch, ...]:
        """Return this rank's share of some rows, cut so that each part fits."""
        layout = cut_into_micro_batches(
            rows, chosen, num_ranks=self._model.num_ranks, micro_batch_tokens=self._model.config.micro_batch_tokens
        )
        return layout[self._model.rank]

    def evaluated(
        self, rows: Rows, chosen: Sequence[int], *, temperature: float = 1.0, scored: bool = False
    ) -> Iterator[tuple[tuple[int, ...], Forward]]:
        """Yield this rank's micro-batches with their log-probs, without gradient and without dropout."""
        self._computing.eval()
        with torch.no_grad():
            for micro in self.micro_batches(rows, chosen):
                padded = rows.pad(micro.rows, num_passes=micro.num_passes)
                labelled = isinstance(rows, LabelRows)
                yield micro.rows, self.forward(padded, temperature=temperature, scored=scored, labelled=labelled)

    def forward(
        self,
        padded: Padded,
        *,
        temperature: float = 1.0,
        scored: bool = False,
        labelled: bool = False,
        means: bool = False,
    ) -> Forward:
        """Return what the model says of padded rows: log-probs, scores of whole sequences, or logits at targets.

        With `means` also the log-probs averaged over the vocabulary, of documents alone.
        """
        token_ids, mask = padded.token_ids.to(self._model.device), padded.mask.to(self._model.device)
        if labelled:
            logits = target_logits(self._computing, token_ids, mask)
            return Forward(logprobs=logits, mask=mask, padded=padded, values=None)
        if scored:
            scores = sequence_scores(self._computing, padded, device=self._model.device)
            return Forward(logprobs=scores[:, None], mask=mask, padded=padded, values=None)
        if self._by_first:
            found = self._model.first.cache.find(padded, digest=self._model.first.digest, temperature=temperature)
            if found is not None:
                return Forward(logprobs=found.to(self._model.device), mask=mask, padded=padded, values=None)
        forward = self._computed(token_ids, mask, padded, temperature=temperature, means=means)
        if self._by_first:
            first = self._model.first
            first.cache.keep(padded, forward.logprobs, digest=first.digest, temperature=temperature)
        return forward

    def _computed(self, token_ids: Tensor, mask: Tensor, padded: Padded, *, temperature: float, means: bool) -> Forward:
        if self._model.config.shared_prompts and padded.is_pairs:
            pairs = shared_prompts.joined(padded)
            logprobs = shared_prompts.logprobs(
                self._computing, padded, pairs, temperature=temperature, device=self._model.device
            )
            return Forward(logprobs=logprobs, mask=mask, padded=pairs.counted(padded), values=None)
        if self._model.config.packing:
            packed = packed_rows.packed(padded)
            ids, positions = (part.to(self._model.device) for part in (packed.token_ids, packed.positions))
            found = self._tokens(ids, temperature, means=means, position_ids=positions)
            return Forward(
                logprobs=packed.back(found.logprobs, mask),
                mask=mask,
                padded=packed.counted(padded),
                values=None if found.values is None else packed.back(found.values, mask),
                mean_logprobs=None if found.means is None else packed.back(found.means, mask),
            )
        if len(padded.passes) == 1:
            found = self._tokens(token_ids, temperature, means=means)
            return Forward(
                logprobs=found.logprobs, mask=mask, padded=padded, values=found.values, mean_logprobs=found.means
            )
        width = token_ids.shape[1]
        parts = [
            torch.nn.functional.pad(
                self._tokens(token_ids[sequences, :length], temperature).logprobs, (0, width - length)
            )
            for sequences, length in padded.passes
        ]
        back = torch.argsort(torch.cat([part.sequences for part in padded.passes])).to(self._model.device)
        # Only pairs and groups are computed in two passes, and they have no values.
        return Forward(logprobs=torch.cat(parts)[back], mask=mask, padded=padded, values=None)

    def _tokens(self, token_ids: Tensor, temperature: float, *, means: bool = False, **positions: Tensor) -> _Tokens:
        """Return [S, T] log-probs, and values where the policy has a value head; `position_ids` of packed rows."""
        head = {"output_hidden_states": True} if self._model.config.value_head else {}
        found = self._computing(input_ids=token_ids, use_cache=False, **head, **positions)
        logprobs = token_logprobs(found.logits, token_ids, temperature=temperature)
        return _Tokens(
            logprobs=logprobs,
            values=aligned_values(found["token_values"]) if head else None,
            means=mean_logprobs(found.logits, token_ids, logprobs, temperature=temperature) if means else None,
        )

    def distributions(self, rows: TokenRows, temperature: float) -> Iterator[Tensor]:
        """Yield, for each of this rank's micro-batches, the log-probs of all tokens wherever one is a target."""
        self._computing.eval()
        with torch.no_grad():
            for micro in self.micro_batches(rows, range(len(rows.lengths))):
                padded = rows.pad(micro.rows)
                logits = self._computing(input_ids=padded.token_ids.to(self._model.device), use_cache=False).logits
                yield distributions_of(logits, padded.mask.to(self._model.device), temperature=temperature)

    @contextmanager
    def by_first_weights(self) -> Iterator[None]:
        """Compute by the weights that the group was opened with, or take what they gave before."""
        first = self._model.first
        _ = first.digest  # a collective, which all ranks come to here
        # An adapter's base is here already; under ZeRO 3 one rank alone, whose rows are not cached, can't ask it.
        adapter = self._model.adapter if self._model.config.zero_stage < 3 else None
        self._by_first, self._asked = True, first if adapter is None else None
        try:
            with nullcontext() if adapter is None else adapter.without(self._model.engine.module):
                yield
        finally:
            self._by_first, self._asked = False, None
            first.let_go()
        first.cache.add(on_all([first.cache.new()]))

    def reference(self, rows: Rows, plan: TrainingPlan) -> Reference | None:
        """Return the log-probs by the weights as they are now, each row computed once over all ranks.

        Laid out as the first epoch's steps are, so that the first step's log-ratios are exactly 0.
        """
        if not isinstance(rows, ComparedRows):
            return None
        return self.logprobs_of_rows(rows, each_row_once(plan, num_rows=len(rows.lengths)))

    def logprobs_of_rows(self, rows: ComparedRows, parts: Iterable[Sequence[int]]) -> Reference:
        """Return the log-probs by the weights as they are now, laid out part by part; every row is in one."""
        nothing = Reference.nothing(rows)
        sums, gaps = nothing.sums.to(self._model.device), nothing.gaps.to(self._model.device)
        for chosen in parts:
            for micro, forward in self.evaluated(rows, chosen):
                if micro:
                    sums[list(micro)] = rows.by_row(micro, sequence_logprobs(forward.logprobs, forward.mask))
                    gaps[list(micro)] = rows.rollout_gaps(micro, forward.logprobs, forward.mask)
        dist.all_reduce(sums)  # each row is 0 on all ranks but one: the sum is exact
        dist.all_reduce(gaps)
        return Reference(sums=sums.cpu(), gaps=gaps.cpu())

    def of_samples(self, rows: SampleRows, plan: TrainingPlan, *, temperature: float) -> Tensor:
        """Return [1 or 2, rows, T]: log-probs, and values where there are any; 0 outside the responses."""
        old = torch.zeros(1 + self._model.config.value_head, *rows.shape, device=self._model.device)
        for chosen in each_row_once(plan, num_rows=len(rows.lengths)):
            for micro, forward in self.evaluated(rows, chosen, temperature=temperature):
                if micro:
                    told = (forward.logprobs,) if forward.values is None else (forward.logprobs, forward.values)
                    for kept, own in zip(old, told, strict=False):
                        kept[list(micro), : own.shape[1]] = torch.where(forward.mask, own, 0.0).float()
        dist.all_reduce(old)  # each row is 0 on all ranks but one: the sum is exact
        return old.cpu()
