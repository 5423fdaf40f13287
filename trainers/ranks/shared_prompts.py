"""Owns pairs in one row each: prompt + chosen + rejected, so that a prompt is computed once and not twice.

    chosen    p p p c c      positions 0 1 2 3 4
    rejected  p p p r        positions 0 1 2 3
    joined    p p p c c r    positions 0 1 2 3 4 3;  r sees p and itself, not c

The model is told positions and who sees whom, so it must take both: `check` compares. A mask that it is given stands
for all of its own, a sliding window's too: models with one are refused. Shapes: B pairs, T positions of a sequence, W
of a joined row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainers.logprobs import token_logprobs
from trainers.ranks.made_up_rows import refuse_gap
from trainers.rows import Padded, Pass

Model = Callable[..., Any]
"""What gives logits, as a Hugging Face model does."""

FULL_ATTENTION = "full_attention"
"""What a config's `layer_types` calls a layer in which a token sees all before it."""


class Joined(NamedTuple):
    """Pairs as the model takes them."""

    token_ids: Tensor
    """[B, W] int64"""
    positions: Tensor
    """[B, W] int64"""
    seen: Tensor
    """[B, 1, W, W] bool: whether a token (third axis) sees another (fourth)."""
    predictors: Tensor
    """[B, W] int64: where the prediction of each token stands."""
    places: Tensor
    """[2B, T] int64: where each of a sequence's targets stands in its pair's row."""
    num_shared_tokens: int
    """Tokens of the prompts, each of which stands once for two."""

    @property
    def computed(self) -> tuple[Pass, ...]:
        """Return the forward pass that it takes."""
        return (Pass(sequences=torch.arange(len(self.token_ids)), length=self.token_ids.shape[1]),)

    def counted(self, padded: Padded) -> Padded:
        """Return the sequences that were joined with what is computed of them: each pair's prompt once."""
        return padded._replace(passes=self.computed, num_shared_tokens=self.num_shared_tokens)


def joined(padded: Padded) -> Joined:
    """Return [2B, T] sequences, chosen block then rejected block, as B rows; each has a prompt and a response."""
    ids, mask = padded.token_ids, padded.mask
    num = len(ids) // 2
    prompt = mask.int().argmax(dim=1)[:num]
    lengths = mask.sum(dim=1)
    chosen, rejected = lengths[:num], lengths[num:]
    at = torch.arange(int((prompt + chosen + rejected).max()))[None].expand(num, -1)
    first, second, end = (bound[:, None] for bound in (prompt, prompt + chosen, prompt + chosen + rejected))
    # 0 the prompt, 1 the chosen, 2 the rejected, 3 padding.
    side = (at >= first).long() + (at >= second) + (at >= end)
    positions = torch.where(side < 2, at, at - chosen[:, None])
    both = torch.stack([ids[:num], ids[num:]])
    from_rejected = (side == 2).long()
    row = torch.arange(num)[:, None].expand_as(at)
    inside = positions.clamp(max=ids.shape[1] - 1)
    seen = (positions[:, :, None] >= positions[:, None]) & ((side[:, None] == 0) | (side[:, :, None] == side[:, None]))
    steps = torch.arange(ids.shape[1])[None]
    back = torch.cat([steps.expand(num, -1), steps + chosen[:, None]])
    return Joined(
        token_ids=torch.where(side < 3, both[from_rejected, row, inside], 0),
        positions=inside,
        seen=seen[:, None],
        predictors=torch.where(at == second, first - 1, at - 1).clamp(min=0),
        places=back.clamp(max=at.shape[1] - 1),
        num_shared_tokens=int(prompt.sum()),
    )


def logprobs(model: Model, padded: Padded, pairs: Joined, *, temperature: float, device: torch.device) -> Tensor:
    """Return [2B, T] log-probs of the responses' tokens, 0 elsewhere, as of sequences computed by themselves."""
    ids, predictors = pairs.token_ids.to(device), pairs.predictors.to(device)
    logits = model(
        input_ids=ids,
        position_ids=pairs.positions.to(device),
        attention_mask=pairs.seen.to(device),
        use_cache=False,
    ).logits
    ordered = logits.gather(1, predictors[:, :, None].expand_as(logits))
    # `token_logprobs` looks for a token's prediction one place before it.
    shifted = torch.cat([ordered[:, 1:], ordered[:, :1]], dim=1)
    found = token_logprobs(shifted, ids, temperature=temperature)
    back = found.repeat(2, 1).gather(1, pairs.places.to(device))
    return torch.where(padded.mask.to(device), back, 0.0)


def check(model: Any, *, name: str, device: torch.device) -> None:
    """Compare both ways on a pair of made-up tokens, which is shorter than any window.

    Raises:
        ValueError: the model does not see everything in all of its layers, or gives a response that shares its prompt
            another probability.
    """
    _refuse_windows(model.config.get_text_config(decoder=True), name=name)

    def together(model: Model, padded: Padded) -> Tensor:
        return logprobs(model, padded, joined(padded), temperature=1.0, device=device)

    refuse_gap(
        model,
        together,
        sequences=((*range(5), *range(5, 9)), (*range(5), *range(9, 12))),
        num_prompt_tokens=5,
        device=device,
        setting="shared_prompts",
        name=name,
        what="responses that share a prompt",
    )


def _refuse_windows(config: Any, *, name: str) -> None:
    window = getattr(config, "sliding_window", None)
    has_window = bool(window) and getattr(config, "use_sliding_window", None) is not False
    kinds = {*(getattr(config, "layer_types", None) or ())}
    found = [f"a sliding window of {window} tokens"] if has_window else []
    found += [f"layers of {kind}" for kind in sorted(kinds - {FULL_ATTENTION})]
    if found:
        raise ValueError(
            f"shared_prompts: got true with {name}, which has {' and '.join(found)}, wanted full attention in every "
            "layer: our mask would take the place of the model's own; set it to false"
        )
