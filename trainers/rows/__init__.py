"""What a table becomes for a rank: rows of one kind each, which step, micro-batch and padding treat alike.

    documents.py   a document each, of which some tokens are targets
    labels.py      documents whose targets are items to be classified
    unpaired.py    responses with a thumb each
    samples.py     responses that were sampled and scored
    pairs.py       a chosen and a rejected response each
    groups.py      a prompt with its judged responses each

Shapes: B rows, S sequences (B, or 2B for pairs), T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from trainers.rows.columns import Ids


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
