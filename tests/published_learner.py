"""A learner in the test's own process, and whether a pool of engines answers with what it has published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.generation import Completion, GenerationRequest
from actors.records import Message
from cluster.pool import Pool
from cluster.weights import ParityProbe

BOUND = 1e-4
SEQUENCES = ((1, 5, 9, 12, 7, 3), (1, 20, 11, 6))


class PublishedLearner:
    """A model whose weights are published; what every replica must agree with."""

    def __init__(self, path: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(path)

    def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Return the log-prob of each token after the first, in nats."""
        with torch.no_grad():
            table = self.model(torch.tensor([list(token_ids)])).logits[0].log_softmax(-1)
        return tuple(table[i, token].item() for i, token in enumerate(token_ids[1:]))

    def probe(self) -> ParityProbe:
        """Return its own log-probs of the probe sequences, by the weights as they are now."""
        return ParityProbe(token_ids=SEQUENCES, logprobs=tuple(map(self.logprobs, SEQUENCES)), bound=BOUND)


async def answers(
    pool: Pool[GenerationRequest, Completion], *, num: int, of_base: Sequence[int] = ()
) -> list[Completion]:
    """Return the pool's answers to some questions; those numbered in `of_base` are put to the base model."""
    requests = [
        GenerationRequest(
            request_id=f"r{i}",
            messages=(Message(role="user", content=f"{i}+1"),),
            max_tokens=12,
            of_base=i in of_base,
        )
        for i in range(num)
    ]
    return [done async for chunk in pool.route(requests) for done in chunk]


def assert_made_by(done: Sequence[Completion], learner: PublishedLearner, *, version: str) -> None:
    """Check that every answer names the version, and that its log-probs are the learner's."""
    assert {completion.weight_version for completion in done} == {version}
    for completion in done:
        first = len(completion.prompt_token_ids)
        wanted = learner.logprobs([*completion.prompt_token_ids, *completion.token_ids])[first - 1 :]
        assert list(completion.logprobs) == pytest.approx(wanted, abs=BOUND)
