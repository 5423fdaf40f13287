"""What a batch of tokens carries besides when its responses were sampled and scored, at random."""

from __future__ import annotations

from dataclasses import replace

import torch

from trainers.losses import TokenBatch


def sampled(batch: TokenBatch, *, seed: int = 0) -> TokenBatch:
    """Return the batch with log-probs near its own, advantages of both signs, and a value model's figures."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = batch.logprobs.detach()

    def near(scale: float) -> torch.Tensor:
        return logprobs + scale * torch.randn(logprobs.shape, generator=generator, dtype=logprobs.dtype)

    return replace(
        batch,
        old_logprobs=near(0.2),
        rollout_logprobs=near(0.2),
        reference_logprobs=near(0.5),
        advantages=near(1.0) - logprobs,
        returns=near(1.0),
        values=near(1.0),
        old_values=near(1.0),
    )
