"""A hand-written pool for the fast tests: answers with texts from a function, in any order of arrival, without Ray.

    pool = FakePool(lambda request: "12+34", chunk=3, arrival_seed=1)

Its model speaks in characters: every character is a token, and the end of the sequence is one more.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence

from actors.generation import Completion, GenerationRequest

SURE = (math.log(0.9), math.log(0.1))
"""Log-probs of the sampled label and of the one it is paired with, unless a test says otherwise."""


def spoken(
    text: str,
    *,
    request_id: str = "request",
    labels: Sequence[str] = (),
    good_logprobs: Sequence[tuple[float, float]] | None = None,
    finish_reason: str = "stop",
    sample_index: int = 0,
    weight_version: str = "v0",
) -> Completion:
    """Return the completion that says `text`; `labels` come in pairs (good, bad).

    `good_logprobs` are, mark by mark, the log-probs (nats) of the good and of the bad label of the mark's pair; without
    them the model gives 0.9 to what it sampled.
    """
    marks = [(position, character) for position, character in enumerate(text) if character in labels]
    rows = []
    for i, (_, label) in enumerate(marks):
        pair = list(labels).index(label) // 2
        good = SURE if label == labels[2 * pair] else SURE[::-1]
        row = [-20.0] * len(labels)
        row[2 * pair : 2 * pair + 2] = good if good_logprobs is None else good_logprobs[i]
        rows.append(tuple(row))
    ended = finish_reason == "stop"
    token_ids = (*(ord(character) for character in text), *([0] if ended else []))
    return Completion(
        request_id=request_id,
        sample_index=sample_index,
        text=text,
        prompt_token_ids=(1, 2, 3),
        token_ids=token_ids,
        logprobs=(-0.5,) * len(token_ids),
        label_marks=tuple(marks),
        label_logprobs=tuple(rows),
        weight_version=weight_version,
        weight_spans=((weight_version, 0, len(token_ids)),),
        finish_reason=finish_reason,
    )


class FakePool:
    """Answers requests in chunks; `arrival_seed` shuffles the order of arrival, None keeps the order of asking."""

    def __init__(
        self, answer: Callable[[GenerationRequest], str], *, chunk: int = 4, arrival_seed: int | None = None
    ) -> None:
        self._answer = answer
        self._chunk = chunk
        self._rng = None if arrival_seed is None else random.Random(arrival_seed)
        self.asked: list[GenerationRequest] = []

    async def route(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Completion]]:
        """Yield one completion for each request, chunk by chunk."""
        self.asked.extend(requests)
        # Answered in the order of asking whatever the order of arrival, so that scripted texts keep their requests.
        done = [
            spoken(self._answer(request), request_id=request.request_id, labels=request.labels) for request in requests
        ]
        if self._rng is not None:
            self._rng.shuffle(done)
        for start in range(0, len(done), self._chunk):
            await asyncio.sleep(0)
            yield done[start : start + self._chunk]
