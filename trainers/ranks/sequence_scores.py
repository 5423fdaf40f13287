"""Owns what a reward model says of a whole sequence: one number, its value head's at the last target.

    [S, T] token ids ──► last hidden states ──► value head ──► [S] scores, at each sequence's last target

No log-prob is computed: the logits, of which a vocabulary makes the largest tensor of all, are those of one position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainers.rows import Padded
from trainers.training_config import TrainingConfig


def refuse_headless(config: TrainingConfig) -> None:
    """Check that there is something to read scores off.

    Raises:
        ValueError: the model has no value head.
    """
    if not config.value_head:
        raise ValueError("scores: got a group with value_head = false, wanted true: the head's value is the score")


def sequence_scores(model: Any, padded: Padded, *, device: torch.device) -> Tensor:
    """Return [S] fp32 scores of padded sequences by a model with a value head (trainers.ranks.value_head).

    Args:
        model: an engine or a module.
        padded: S sequences, in one or two forward passes.
        device: the model's.
    """
    token_ids, last = padded.token_ids.to(device), last_targets(padded.mask).to(device)
    parts = [_scores(model, token_ids[sequences, :length], last[sequences]) for sequences, length in padded.passes]
    back = torch.argsort(torch.cat([part.sequences for part in padded.passes])).to(device)
    return torch.cat(parts)[back]


def last_targets(mask: Tensor) -> Tensor:
    """Return [S] positions of each sequence's last target; 0 for a dummy, which has none.

    >>> last_targets(torch.tensor([[False, True, True, False], [False, False, False, True]])).tolist()
    [2, 3]
    """
    return (mask * torch.arange(mask.shape[1], device=mask.device)).max(dim=1).values


def _scores(model: Any, token_ids: Tensor, last: Tensor) -> Tensor:
    found = model(input_ids=token_ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    scores = found["token_values"].gather(1, last[:, None])[:, 0]
    # The weights that predict tokens take no part; ZeRO wants a gradient of all weights: theirs is 0.
    return scores.float() + 0.0 * found.logits.float().sum()
