"""Owns sequences behind one another in rows as long as the longest of them, so that short ones leave no padding.

    sequences   a a a a a     positions 0 1 2 3 4
                b b           positions 0 1
                c c c         positions 0 1 2
    packed      a a a a a     positions 0 1 2 3 4
                b b c c c     positions 0 1 0 1 2;  a position that does not follow on begins another sequence

Sequences fill the rows first-fit decreasing (Johnson 1973), whole: none is cut. Who sees whom is told by the positions
alone, as Hugging Face's models take it where no mask is given, a sliding window included; `check` compares. What lies
behind a sequence's last target is left out: nothing hangs on it. Shapes: S sequences, T positions, R rows of W
positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainers.logprobs import token_logprobs
from trainers.ranks.made_up_rows import refuse_gap
from trainers.rows import Padded, Pass

BY_POSITIONS = frozenset({"full_attention", "sliding_attention"})
"""What a config's `layer_types` calls layers in which positions tell the sequences of a row apart. The chunks of
`chunked_attention` are counted from the row's first place."""


class Packed(NamedTuple):
    """Sequences as the model takes them."""

    token_ids: Tensor
    """[R, W] int64"""
    positions: Tensor
    """[R, W] int64; 0 in padding, each token of which is a sequence of its own."""
    places: Tensor
    """[S, T] int64: where each token stands in the rows' [R * W]; 0 of what is left out."""

    def counted(self, padded: Padded) -> Padded:
        """Return the sequences with what is computed of them."""
        num_rows, width = self.token_ids.shape
        return padded._replace(passes=(Pass(sequences=torch.arange(num_rows), length=width),))

    def back(self, values: Tensor, mask: Tensor) -> Tensor:
        """Return [S, T] of [R, W] values, by sequence; 0 but where `mask` [S, T] is true."""
        return torch.where(mask, values.reshape(-1)[self.places.to(values.device)], 0.0)


def first_fit(lengths: Sequence[int], *, width: int) -> list[tuple[int, int]]:
    """Return each sequence's row and its first place there; rows hold `width` tokens.

    >>> first_fit([2, 5, 3], width=5)
    [(1, 3), (0, 0), (1, 0)]
    """
    free: list[int] = []
    found = [(0, 0)] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        row = next((row for row, left in enumerate(free) if left >= length), len(free))
        if row == len(free):
            free.append(width)
        found[number] = row, width - free[row]
        free[row] -= length
    return found


def packed(padded: Padded) -> Packed:
    """Return sequences [S, T] in as few rows as first-fit finds."""
    ids, mask = padded.token_ids, padded.mask
    at = torch.arange(ids.shape[1])
    # A sequence without a target still has two tokens, so that its (zero) gradient reaches all weights.
    lengths = torch.where(mask, at + 1, 0).max(dim=1).values.clamp(min=min(2, ids.shape[1]))
    width = int(lengths.max())
    starts = first_fit(lengths.tolist(), width=width)
    num_rows = 1 + max(row for row, _ in starts)
    inside = at[None] < lengths[:, None]
    places = torch.where(inside, torch.tensor([row * width + first for row, first in starts])[:, None] + at, 0)
    token_ids, positions = torch.zeros(2, num_rows * width, dtype=torch.int64)
    token_ids[places[inside]] = ids[inside]
    positions[places[inside]] = at.expand_as(ids)[inside]
    return Packed(token_ids=token_ids.view(num_rows, width), positions=positions.view(num_rows, width), places=places)


def check(model: Any, *, name: str, device: torch.device) -> None:
    """Compare both ways on three made-up sequences, two of which share a row.

    Raises:
        ValueError: the model has layers that count places in a row, or it gives a sequence that follows another in its
            row other probabilities.
    """
    kinds = {*(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())}
    if unheard := sorted(kinds - BY_POSITIONS):
        raise ValueError(
            f"packing: got true with {name}, which has layers of {' and '.join(unheard)}, wanted "
            f"{' or '.join(sorted(BY_POSITIONS))} in every layer: only there do positions tell sequences apart; set it "
            "to false"
        )

    def together(model: Callable[..., Any], padded: Padded) -> Tensor:
        rows = packed(padded)
        ids, positions = rows.token_ids.to(device), rows.positions.to(device)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return rows.back(token_logprobs(logits, ids), padded.mask.to(device))

    refuse_gap(
        model,
        together,
        sequences=(range(9), range(9, 14), range(14, 18)),
        num_prompt_tokens=2,
        device=device,
        setting="packing",
        name=name,
        what="a sequence that follows another in its row",
    )
