"""Owns log-probs of tokens and of sequences, from logits. Shapes: B sequences, T positions, V tokens; nats, fp32.

Everything is aligned with the *target*: value [b, t] belongs to the token at t, which the logits at t - 1 predict.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return [B, T]: log p(token at t | tokens before t); column 0, which nothing predicts, is 0.

    Computed in fp32 for half-precision logits (fp64 stays fp64).

    Args:
        logits: [B, T, V].
        token_ids: [B, T] int64.
        temperature: that of the sampling, for on-policy methods; 1 for offline losses.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    num_tokens = logits.shape[-1]
    predictors = logits[:, :-1].to(dtype)
    if temperature != 1.0:
        predictors = predictors / temperature
    # cross_entropy fuses log-softmax and gather: it never holds a second [B, T, V] of log-probs.
    negative = cross_entropy(predictors.reshape(-1, num_tokens), token_ids[:, 1:].reshape(-1), reduction="none")
    first = negative.new_zeros(token_ids.shape[0], 1)
    return torch.cat([first, -negative.view(token_ids.shape[0], -1)], dim=1)


def mean_logprobs(logits: Tensor, token_ids: Tensor, logprobs: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return [B, T]: log p at t, averaged over all V tokens instead of taken of the one at t; column 0 is 0.

    Args:
        logits: [B, T, V].
        token_ids: [B, T] int64.
        logprobs: [B, T]: what `token_logprobs` makes of them.
        temperature: as there.
    """
    predictors = logits[:, :-1]
    # A token's log-prob is its logit less the normaliser, which is thus known without another look at all logits.
    own = predictors.gather(2, token_ids[:, 1:, None])[..., 0].to(logprobs.dtype)
    gaps = (predictors.mean(dim=2, dtype=logprobs.dtype) - own) / temperature
    return torch.cat([torch.zeros_like(logprobs[:, :1]), logprobs[:, 1:] + gaps], dim=1)


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return [B]: the sum of `logprobs` [B, T] where `mask` [B, T] bool is true; what lies outside plays no part."""
    return torch.where(mask, logprobs, 0.0).sum(dim=1)
