"""Owns the comparison of a way to arrange rows with rows by themselves, on made-up tokens, when a model is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainers.logprobs import token_logprobs
from trainers.rows import Padded

MAX_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Nats by which a token's log-prob may differ between two ways: rounding; positions or masks that are not heeded give
far more with any but constant weights."""


def refuse_gap(
    model: Any,
    together: Callable[[Callable[..., Any], Padded], Tensor],
    *,
    sequences: Sequence[Sequence[int]],
    num_prompt_tokens: int,
    device: torch.device,
    setting: str,
    name: str,
    what: str,
) -> None:
    """Compare the log-probs of made-up sequences, arranged some way, with those of each by itself.

    Args:
        model: a Hugging Face causal language model.
        together: that way: [S, T] log-probs of the targets of padded sequences.
        sequences: S lists of numbers, shorter than any window; tokens are made of them.
        num_prompt_tokens: of each, before its targets.
        device: the model's.
        setting: in `learner.training`, true.
        name: the model's.
        what: whose log-probs are compared, for the message.

    Raises:
        ValueError: they differ.
    """
    num_tokens = model.get_input_embeddings().weight.shape[0]
    width = max(map(len, sequences))
    ids, mask = torch.zeros(len(sequences), width, dtype=torch.int64), torch.zeros(len(sequences), width).bool()
    for row, numbers in enumerate(sequences):
        ids[row, : len(numbers)] = torch.tensor([(7 * number + 3) % num_tokens for number in numbers])
        mask[row, num_prompt_tokens : len(numbers)] = True
    padded = Padded(token_ids=ids, mask=mask, num_real_tokens=sum(map(len, sequences)), passes=())
    training = model.training
    model.eval()
    with torch.no_grad():
        alone = token_logprobs(model(input_ids=ids.to(device), use_cache=False).logits, ids.to(device))
        found = together(model, padded)
    model.train(training)
    gap = float((alone - found)[mask.to(device)].abs().max())
    most = MAX_GAP.get(next(model.parameters()).dtype, MAX_GAP[torch.float32])
    if not gap <= most:
        raise ValueError(
            f"{setting}: got true with {name}, which gives {what} other log-probs, by {gap:.3g} nats, wanted at most "
            f"{most:g}: it does not take positions or masks of ours; set it to false"
        )
