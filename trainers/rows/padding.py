"""Owns the way from rows to tensors: sequences padded together, in one forward pass or in two.

Padding is on the right and needs no attention mask: a causal model's position t sees positions <= t only, so what lies
behind a row's last token can't reach it, and what the model computes at the padding itself is masked in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainers.rows import Padded, Pass
from trainers.rows.columns import Floats, Ids

MICRO_BATCH_COST_TOKENS = 64
"""What one more forward pass costs, in tokens' worth of time: more of them mean less padding, but more calls."""


def pad(token_ids: list[Ids], masks: list[npt.NDArray[np.bool_]], *, num_sequences: int, num_passes: int = 1) -> Padded:
    """Return sequences and targets padded on the right to the longest; of none a dummy of `num_sequences`."""
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


def aligned(
    values: Sequence[npt.NDArray[Any]], masks: Sequence[npt.NDArray[np.bool_]], *, shape: tuple[int, int]
) -> Tensor:
    """Return [rows, T] fp32: each row's values, one after the other, where its mask is true; 0 elsewhere."""
    out = np.zeros(shape, dtype=np.float32)
    for row, (mine, mask) in enumerate(zip(values, masks, strict=True)):
        out[row, : len(mask)][mask] = mine
    return torch.from_numpy(out)


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
