"""Owns the way from Arrow tables to padded tensors: which rows make a step, and which rank takes which together.

    table ──► rows (NumPy) ──► TrainingPlan: rows of each step ──► micro_batches: rank, micro-batch ──► pad ──► tensors

Knows neither models nor DeepSpeed. Shapes: B rows, S sequences (B, or 2B for pairs), T positions. A row is one document
or one preference pair.

Padding is on the right and needs no attention mask: a causal model's position t sees positions <= t only, so what lies
behind a row's last token can't reach it, and what the model computes at the padding itself is masked in the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from trainers.advantages import Estimates, Samples
from trainers.logprobs import sequence_logprobs
from trainers.losses import PairBatch, ScoreBatch, TokenBatch

Ids: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

MICRO_BATCH_COST_TOKENS = 64
"""What one more forward pass costs, in tokens' worth of time: more of them mean less padding, but more calls."""


# ------------------------------------------------------------------------------------------------------------ plan


class Slot(NamedTuple):
    """One row's part in an update."""

    row_id: str
    epoch: int
    step: int
    """Counted from 0 within the update, over its epochs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """The rows of one optimizer step."""

    epoch: int
    rows: tuple[int, ...]
    """Positions in `TrainingPlan.row_ids`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Which row goes into which step of an update; every row goes into one step of every epoch."""

    row_ids: tuple[str, ...]
    """One for each row of the table, in the table's order."""
    steps: tuple[PlannedStep, ...]
    training: tuple[float, float] = (0.0, 1.0)
    """Shares of the run's training that are done before the first step and after the last."""

    @classmethod
    def of(
        cls, row_ids: Sequence[str], *, batch_size: int, epochs: int, seed: int, keys: Sequence[str] | None = None
    ) -> TrainingPlan:
        """Return a plan that depends on the set of keys, the batch size, the epochs and the seed alone.

        The keys, one for each row, are the row ids unless they are given: ids that hold a run's name would shuffle two
        runs of one seed differently.

        An epoch has ceil(rows / batch_size) steps whose sizes differ by one at most, so that no step of a few rows
        moves the weights as far as a full one.

        Raises:
            ValueError: no row, two rows with one id or one key, or a count below 1.
        """
        if not row_ids or batch_size < 1 or epochs < 1:
            raise ValueError(
                f"training plan: got {len(row_ids)} rows, batch_size {batch_size}, epochs {epochs}; wanted at least 1"
            )
        if len(set(row_ids)) != len(row_ids):
            twice = next(row_id for i, row_id in enumerate(sorted(row_ids)) if row_id == sorted(row_ids)[i - 1])
            raise ValueError(f"training plan: two rows have the id {twice!r}; ids must be unique")
        keys = row_ids if keys is None else keys
        if len(set(keys)) != len(row_ids):
            raise ValueError(f"training plan: got {len(set(keys))} keys for {len(row_ids)} rows, wanted one for each")
        num_steps = -(-len(row_ids) // batch_size)
        steps = []
        for epoch in range(epochs):
            order = sorted(range(len(row_ids)), key=lambda row: shuffle_key(keys[row], epoch=epoch, seed=seed))
            bounds = [len(order) * i // num_steps for i in range(num_steps + 1)]
            steps += [PlannedStep(epoch=epoch, rows=tuple(order[bounds[i] : bounds[i + 1]])) for i in range(num_steps)]
        return cls(row_ids=tuple(row_ids), steps=tuple(steps))

    def progress(self, step: int) -> float:
        """Return the share of the run's training that is done before a step."""
        begin, end = self.training
        return begin + (end - begin) * step / len(self.steps)

    def slots(self, step: int) -> Iterator[Slot]:
        """Yield the slots of a step."""
        planned = self.steps[step]
        return (Slot(row_id=self.row_ids[row], epoch=planned.epoch, step=step) for row in planned.rows)


def shuffle_key(key: str, *, epoch: int, seed: int) -> bytes:
    """Return what orders rows: their order is a shuffle that hangs on these three alone."""
    return hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16).digest()


# ---------------------------------------------------------------------------------------------------------- layout

MicroBatches: TypeAlias = tuple[tuple[int, ...], ...]
"""The rows of each micro-batch of one rank; an empty one is padding that weighs nothing."""


def lay_out(
    rows: Sequence[int],
    *,
    lengths: Ids,
    num_ranks: int,
    micro_batch_tokens: int,
    sequences_per_row: int | Ids = 1,
    num_tokens: Ids | None = None,
) -> tuple[MicroBatches, ...]:
    """Return each rank's micro-batches: like lengths together, about equal tokens per rank, equally many per rank.

    The ranks must make the same number of forward passes, for under ZeRO 2 and 3 each is a collective; what a rank
    lacks is made up by halving its largest micro-batches, or by empty ones. Rows of one length keep the order of `rows`
    (a plan's), so that the table's order has no part in it.

    Args:
        rows: row numbers, which `lengths` is indexed by.
        lengths: tokens of each row's longest sequence.
        num_ranks: ranks to deal to.
        micro_batch_tokens: greatest padded size; a longer row goes alone.
        sequences_per_row: 2 for pairs, whose chosen and rejected responses are padded alike; indexed by row numbers
            where rows differ in it.
        num_tokens: real tokens of each row, by which rows are dealt; None: those of its longest sequence for each.
    """
    if isinstance(sequences_per_row, int):
        limit, counts = micro_batch_tokens // sequences_per_row, np.ones_like(lengths)
    else:
        limit, counts = micro_batch_tokens, sequences_per_row
    sizes = lengths * counts if num_tokens is None else num_tokens
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for row in sorted(rows, key=lambda row: -int(sizes[row])):
        rank = loads.index(min(loads))
        dealt[rank].append(row)
        loads[rank] += int(sizes[row])
    by_length = (sorted(mine, key=lambda row: -int(lengths[row])) for mine in dealt)
    cut = [_cut(mine, lengths=lengths, counts=counts, limit=limit) for mine in by_length]
    most = max(1, *(len(micros) for micros in cut))
    return tuple(_filled_up(micros, most) for micros in cut)


class MicroBatch(NamedTuple):
    """What one rank computes before one backward pass."""

    rows: tuple[int, ...]
    """None: padding that weighs nothing."""
    num_passes: int
    """Forward passes that its sequences are computed in, the long ones first; the same on every rank."""


def micro_batches(
    rows: Rows, chosen: Sequence[int], *, num_ranks: int, micro_batch_tokens: int
) -> tuple[tuple[MicroBatch, ...], ...]:
    """Return each rank's micro-batches of some rows: `lay_out`, and in how many forward passes each is computed."""
    layout = lay_out(
        chosen,
        lengths=rows.lengths,
        num_ranks=num_ranks,
        micro_batch_tokens=micro_batch_tokens,
        sequences_per_row=rows.sequences_per_row,
        num_tokens=rows.num_tokens,
    )
    num_passes = [rows.num_passes(micros) for micros in zip(*layout, strict=True)]
    return tuple(tuple(map(MicroBatch, micros, num_passes)) for micros in layout)


def _cut(rows: list[int], *, lengths: Ids, counts: Ids, limit: int) -> list[tuple[int, ...]]:
    """Cut rows, longest first, into runs whose padded tokens and per-run cost are least (dynamic programming)."""
    sizes: list[int] = lengths[rows].tolist()
    before: list[int] = [0, *np.cumsum(counts[rows]).tolist()]
    best, start = [0], [0]
    first = 0
    for end in range(1, len(rows) + 1):
        while first < end - 1 and sizes[first] * (before[end] - before[first]) > limit:
            first += 1
        # Plain numbers: a micro-batch has tens of rows, and NumPy would take longer to be called than to compute.
        costs = [best[begin] + sizes[begin] * (before[end] - before[begin]) for begin in range(first, end)]
        least = min(costs)
        best.append(least + MICRO_BATCH_COST_TOKENS)
        start.append(first + costs.index(least))
    runs = []
    end = len(rows)
    while end:
        runs.append(tuple(rows[start[end] : end]))
        end = start[end]
    return runs[::-1]


def _filled_up(micros: list[tuple[int, ...]], count: int) -> MicroBatches:
    parts = list(micros)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda i: len(parts[i]), default=None)
        if largest is None or len(parts[largest]) < 2:
            parts.append(())
            continue
        half = len(parts[largest]) // 2
        parts[largest : largest + 1] = [parts[largest][:half], parts[largest][half:]]
    return tuple(parts)


# ------------------------------------------------------------------------------------------------------------ rows


class Pass(NamedTuple):
    """Sequences of like length that go through the model together."""

    sequences: Tensor
    """[P] int64: positions in the micro-batch."""
    length: int
    """Tokens of the longest."""


class Padded(NamedTuple):
    """Sequences padded on the right."""

    token_ids: Tensor
    """[S, T] int64; padding is token 0, which no result depends on."""
    mask: Tensor
    """[S, T] bool: true on targets."""
    num_real_tokens: int
    passes: tuple[Pass, ...]
    """Every sequence is in one of them."""
    is_pairs: bool = False
    """Sequence b has its prompt in common with sequence b + S / 2."""
    num_shared_tokens: int = 0
    """Of the real tokens, those that no pass computes: another sequence's are the same (ranks/shared_prompts.py)."""

    @property
    def num_unpadded_tokens(self) -> int:
        """Return the real tokens that are computed."""
        return self.num_real_tokens - self.num_shared_tokens

    @property
    def num_padded_tokens(self) -> int:
        """Return the tokens that are computed, padding included; none for a dummy."""
        return sum(len(part.sequences) * part.length for part in self.passes) if self.num_real_tokens else 0


class Totals(NamedTuple):
    """Denominators over the rows of a whole step (METHODS G1)."""

    weight: float
    """Sum of the rows' weights."""
    tokens: float
    """Sum of weight x target tokens; for pairs, the chosen response's."""
    flagged_tokens: float = 0.0
    """Sum of weight x target tokens within flagged spans."""


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
        return _pad(token_ids, masks, num_sequences=1, num_passes=num_passes)

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
            flagged = _pad(
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
        return _pad(token_ids, masks, num_sequences=2, num_passes=num_passes)._replace(is_pairs=bool(rows))

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
            mask=_aligned(shown, self.documents.masks, shape=self.shape).bool(),
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


class Rows(Protocol):
    """The rows of a table, ready to be padded."""

    @property
    def lengths(self) -> Ids:
        """Return the tokens of each row's longest sequence."""
        ...

    @property
    def sequences_per_row(self) -> int | Ids:
        """Return how many sequences a row has; of each row where they differ."""
        ...

    @property
    def num_tokens(self) -> Ids:
        """Return the real tokens of each row, over its sequences."""
        ...

    def totals(self, rows: Sequence[int]) -> Totals:
        """Return the denominators of a step."""
        ...

    def num_passes(self, micros: Sequence[tuple[int, ...]]) -> int:
        """Return in how many forward passes each rank computes its micro-batch."""
        ...

    def pad(self, rows: Sequence[int], *, num_passes: int = 1) -> Padded:
        """Return the sequences of some rows; without rows a dummy that has no target."""
        ...


def token_rows(table: pa.Table) -> TokenRows:
    """Return a table's documents: `prompt_token_ids`, `response_token_ids`; `weight`, `loss_mask`, `flagged` if there.

    Targets are the response's tokens, or those where `loss_mask` (one entry per token of prompt + response) is true.
    The first token of all is never one, for nothing predicts it. `flagged` (one entry per token of the response) is
    true within spans that a critique has found fault with.

    Raises:
        ValueError: a column is missing, a row has no target, a mask of another length, or a weight that is no weight.
    """
    prompts, responses = _lists(table, "prompt_token_ids"), _lists(table, "response_token_ids")
    joined = _joined(prompts, responses)
    if "loss_mask" in table.column_names:
        masks = _lists(table, "loss_mask")
        for row in np.flatnonzero(masks.lengths != joined.lengths):
            raise ValueError(
                f"row {row}: loss_mask has {masks.lengths[row]} entries, wanted one for each of "
                f"{joined.lengths[row]} tokens"
            )
        targets = _Lists(values=masks.values.astype(np.bool_), lengths=masks.lengths)
    else:
        targets = _responses_of(prompts, responses)
    flags = None
    if "flagged" in table.column_names:
        given = _lists(table, "flagged")
        refuse_rows(given.lengths != responses.lengths, table, "flagged: wanted one for each token of the response")
        nothing = _Lists(values=np.zeros(int(prompts.lengths.sum()), dtype=np.int64), lengths=prompts.lengths)
        flagged = _joined(nothing, given)
        flags = _Lists(values=flagged.values.astype(np.bool_), lengths=flagged.lengths).rows()
    targets.values[targets.starts[targets.lengths > 0]] = False
    mask_rows = targets.rows()
    num_targets = np.array([np.count_nonzero(mask) for mask in mask_rows], dtype=np.int64)
    refuse_rows(num_targets == 0, table, "no token to learn from; drop the row before training")
    return TokenRows(
        token_ids=joined.rows(),
        masks=mask_rows,
        weights=_numbers(table, "weight", default=1.0),
        lengths=joined.lengths,
        num_targets=num_targets,
        flags=flags,
    )


def pair_rows(table: pa.Table) -> PairRows:
    """Return the pairs of a table of `PreferencePair` rows.

    Raises:
        ValueError: a column is missing, a prompt or response is empty, or a weight is no weight.
    """
    prompts = _lists(table, "prompt_token_ids")
    chosen, rejected = _lists(table, "chosen_token_ids"), _lists(table, "rejected_token_ids")
    for name, lists in (("prompt", prompts), ("chosen", chosen), ("rejected", rejected)):
        refuse_rows(lists.lengths == 0, table, f"an empty {name}; drop the pair before training")
    noise = _numbers(table, "noise", default=0.0)
    refuse_rows(noise >= 0.5, table, "a noise of 0.5 or more: its label tells nothing, or the opposite; drop the pair")
    return PairRows(
        chosen=_joined(prompts, chosen).rows(),
        rejected=_joined(prompts, rejected).rows(),
        chosen_masks=_responses_of(prompts, chosen).rows(),
        rejected_masks=_responses_of(prompts, rejected).rows(),
        chosen_lengths=chosen.lengths,
        rejected_lengths=rejected.lengths,
        weights=_numbers(table, "weight", default=1.0),
        # A table of zeros is one whose maker does not estimate noise: the loss's own setting holds for it.
        noise=noise if noise.any() else None,
        margins=_numbers(table, "margin", default=0.0, least=-1.0),
        lengths=prompts.lengths + np.maximum(chosen.lengths, rejected.lengths),
        ages=ages_of(table),
        rollout_logprobs=_rollout_logprobs(table, chosen=chosen, rejected=rejected),
        correction=np.ones(len(prompts.lengths)),
        other_margins=_other_margins(table),
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
    prompts, responses = _lists(table, "prompt_token_ids"), _lists(table, "response_token_ids")
    for name, lists in (("prompt", prompts), ("response", responses)):
        refuse_rows(lists.lengths == 0, table, f"an empty {name}; drop it before training")
    documents = token_rows(table)
    columns: Any = {name: table.column(name) for name in ("score", "query_id") if name in table.column_names}
    for name in {"score", "query_id"} - columns.keys():
        raise ValueError(f"table: no column {name!r}, have {', '.join(table.column_names)}")
    scores: Floats = columns["score"].cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    refuse_rows(np.isinf(scores), table, "an infinite score")
    _, groups = np.unique(np.array(columns["query_id"].to_pylist(), dtype=np.str_), return_inverse=True)
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


def _response_numbers(table: pa.Table, name: str, prompts: _Lists, responses: _Lists) -> Tensor | None:
    """Return [rows, T] numbers on the tokens of each response; None where a table has none, or not of every row."""
    if name not in table.column_names or table.column(name).null_count:
        return None
    found = _lists(table, name)
    refuse_rows(found.lengths != responses.lengths, table, f"{name}: wanted one for each token of the response")
    shape = table.num_rows, int((prompts.lengths + responses.lengths).max(initial=1))
    return _aligned(found.rows(), _responses_of(prompts, responses).rows(), shape=shape)


def _aligned(
    values: Sequence[npt.NDArray[Any]], masks: Sequence[npt.NDArray[np.bool_]], *, shape: tuple[int, int]
) -> Tensor:
    """Return [rows, T] fp32: each row's values, one after the other, where its mask is true; 0 elsewhere."""
    out = np.zeros(shape, dtype=np.float32)
    for row, (mine, mask) in enumerate(zip(values, masks, strict=True)):
        out[row, : len(mask)][mask] = mine
    return torch.from_numpy(out)


def ages_of(table: pa.Table) -> Ids:
    """Return (rows,) how many versions each row's samples are behind the weights to be trained; 0 where none is said.

    Raises:
        ValueError: an age below 0.
    """
    if "age" not in table.column_names:
        return np.zeros(table.num_rows, dtype=np.int64)
    column: Any = table.column("age")
    ages: Ids = column.fill_null(0).to_numpy().astype(np.int64)
    refuse_rows(ages < 0, table, "an age below 0: its samples are newer than the weights that it is to train")
    return ages


def _rollout_logprobs(table: pa.Table, *, chosen: _Lists, rejected: _Lists) -> tuple[tuple[Floats, ...], ...] | None:
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
        found = _lists(sampled, name)
        wrong = found.lengths != responses.lengths[~missing]
        refuse_rows(wrong, sampled, f"{name}: wanted one for each token of the response")
        columns.append([values.astype(np.float64) for values in found.rows()])
    rows = zip(*columns, strict=True)
    return tuple(() if unknown else next(rows) for unknown in missing.tolist())


def sampling_gaps(logprobs: Tensor, mask: Tensor, sampled: Sequence[Floats | None]) -> Tensor:
    """Return [S] sums over targets of |log-prob - as sampled| (nats), which `sampled` has one list of per sequence.

    Of a sequence that no policy has sampled it has None, whose sum is 0.
    """
    gaps = torch.zeros(len(sampled), device=logprobs.device)
    for i, values in enumerate(sampled):
        if values is None:
            continue
        own = logprobs[i][mask[i]]
        gaps[i] = (own.double() - torch.from_numpy(values).to(own.device)).abs().sum()
    return gaps


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


def _pad(
    token_ids: list[Ids], masks: list[npt.NDArray[np.bool_]], *, num_sequences: int, num_passes: int = 1
) -> Padded:
    # A dummy has two positions, so that its log-probs hang on the weights and its (zero) gradient reaches all of them.
    shape = (len(token_ids) or num_sequences, max((len(ids) for ids in token_ids), default=2))
    padded, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    for row, (ids, targets) in enumerate(zip(token_ids, masks, strict=True)):
        padded[row, : len(ids)] = ids
        mask[row, : len(ids)] = targets
    lengths = np.array([len(ids) for ids in token_ids] or [shape[1]] * num_sequences)
    return Padded(
        token_ids=torch.from_numpy(padded),
        mask=torch.from_numpy(mask),
        num_real_tokens=sum(map(len, token_ids)),
        passes=_passes(lengths, num_passes),
    )


def _passes(lengths: Ids, num_passes: int) -> tuple[Pass, ...]:
    """Return all sequences in one pass, or the long ones and the short ones in two."""
    if num_passes == 1:
        return (Pass(sequences=torch.arange(len(lengths)), length=int(lengths.max())),)
    assert num_passes == 2, "a third pass saves little"
    order = np.argsort(-lengths, kind="stable")
    cut, _ = _best_cut(lengths[order])
    return tuple(
        Pass(sequences=torch.from_numpy(part), length=int(lengths[part[0]])) for part in (order[:cut], order[cut:])
    )


def passes_worth(lengths: Sequence[Ids]) -> int:
    """Return in how many forward passes each rank computes its micro-batch: 2 where the padding saved is worth it.

    Args:
        lengths: tokens of the sequences of each rank's micro-batch.
    """
    saved = sum(_best_cut(np.sort(mine)[::-1].astype(np.int64))[1] for mine in lengths)
    return 2 if saved > MICRO_BATCH_COST_TOKENS * len(lengths) else 1


def _best_cut(lengths: Ids) -> tuple[int, int]:
    """Return where to cut sequences, longest first, in two, and how many padded tokens that saves."""
    if len(lengths) < 2:
        return len(lengths), 0
    cuts = np.arange(1, len(lengths))
    saved = (lengths[0] - lengths[cuts]) * (len(lengths) - cuts)
    best = int(np.argmax(saved))
    return int(cuts[best]), int(saved[best])


def column(values: npt.NDArray[Any], rows: Sequence[int], *, like: Tensor) -> Tensor:
    """Return [B] (or [B, M]) values of some rows; for a dummy (no row) a single 0."""
    picked = values[list(rows)] if rows else np.zeros((1, *values.shape[1:]))
    return torch.from_numpy(np.asarray(picked, dtype=np.float64)).to(device=like.device, dtype=like.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lists:
    """Lists of numbers, one behind the other in a single array."""

    values: npt.NDArray[Any]
    lengths: Ids

    @property
    def starts(self) -> Ids:
        """Return where each list begins."""
        return np.cumsum(self.lengths) - self.lengths

    def rows(self) -> tuple[npt.NDArray[Any], ...]:
        """Return each list as a view."""
        ends = np.cumsum(self.lengths).tolist()
        return tuple(self.values[start:end] for start, end in zip([0, *ends], ends, strict=False))


def _joined(first: _Lists, second: _Lists) -> _Lists:
    """Return each list of the one followed by the other's."""
    lengths = first.lengths + second.lengths
    values = np.empty(int(lengths.sum()), dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    values[_positions(starts, first.lengths)] = first.values
    values[_positions(starts + first.lengths, second.lengths)] = second.values
    return _Lists(values=values, lengths=lengths)


def _responses_of(prompts: _Lists, responses: _Lists) -> _Lists:
    """Return, for each prompt followed by its response, which tokens are the response's."""
    lengths = prompts.lengths + responses.lengths
    values = np.zeros(int(lengths.sum()), dtype=np.bool_)
    values[_positions(np.cumsum(lengths) - responses.lengths, responses.lengths)] = True
    return _Lists(values=values, lengths=lengths)


def _positions(starts: Ids, lengths: Ids) -> Ids:
    """Return start, start + 1, … of every list, one behind the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def _lists(table: pa.Table, name: str) -> _Lists:
    if name not in table.column_names:
        raise ValueError(f"table: no column {name!r}, have {', '.join(table.column_names)}")
    column: Any = table.column(name).combine_chunks()
    if column.null_count or column.flatten().null_count:
        raise ValueError(f"table: column {name!r} holds nulls, wanted lists of numbers")
    return _Lists(
        values=column.flatten().to_numpy(zero_copy_only=False),
        lengths=column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64),
    )


def _numbers(table: pa.Table, name: str, *, default: float, least: float = 0.0) -> Floats:
    """Return a column of finite numbers, none below `least`; the default where the table lacks it."""
    if name not in table.column_names:
        return np.full(table.num_rows, default)
    values = table.column(name).to_numpy().astype(np.float64)
    bad = ~(np.isfinite(values) & (values >= least))
    refuse_rows(bad, table, f"a {name} that is not a finite number >= {least:g}")
    return values


def _other_margins(table: pa.Table) -> Floats | None:
    """Return (rows, M) margins of other objectives than the pairs' own; None where a table has none, or not of all."""
    if "other_margins" not in table.column_names or table.column("other_margins").null_count or not table.num_rows:
        return None
    found = _lists(table, "other_margins")
    num = int(found.lengths[0])
    refuse_rows(found.lengths != num, table, f"other_margins: wanted {num}, as many as the first row")
    values: Floats = found.values.astype(np.float64).reshape(table.num_rows, num)
    refuse_rows(~np.isfinite(values).all(axis=1).reshape(-1), table, "other_margins that are not finite")
    return values


def refuse_rows(bad: npt.NDArray[np.bool_], table: pa.Table, what: str) -> None:
    """Check that no row is bad.

    Raises:
        ValueError: one is; names the first, what it has, and how many there are.
    """
    if bad.any():
        row = int(np.argmax(bad))
        ids = [name for name in ("pair_id", "row_id") if name in table.column_names]
        which = f"row {row}" + (f" ({table.column(ids[0])[row]})" if ids else "")
        raise ValueError(f"table: {which} has {what} ({int(bad.sum())} such rows of {table.num_rows})")
