"""Owns what is asked of a model and what it answers: generation requests and completions.

Knows nothing of engines, so that a driver, a judge or a test can speak of them without one.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from actors.compact import pickled_fast
from actors.records import Message

MAX_LABELS = 128
"""vLLM's limit of `logprob_token_ids`."""


@pickled_fast
@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A conversation to be continued `num_samples` times."""

    request_id: str
    messages: tuple[Message, ...]
    max_tokens: int
    """Greatest number of sampled tokens per sample; also bounded by what the model's length leaves after the prompt."""
    temperature: float = 1.0
    """0 is greedy."""
    num_samples: int = 1
    seed: int | None = None
    """The same seed gives the same samples, whichever replica answers; None samples from the replica's own stream."""
    top_p: float = 1.0
    labels: tuple[str, ...] = ()
    """Single tokens; wherever one of them is sampled, the log-probs of all are reported."""
    of_base: bool = False
    """Answered by the model that the engine's adapter is one of, whatever has been published of that."""
    prefix: str = ""
    """Text that the assistant's turn begins with: it is part of the prompt, and the samples go on after it."""


@pickled_fast
@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished sample of a request."""

    request_id: str
    sample_index: int
    text: str
    """Without control tokens."""
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Sampled tokens, the end-of-sequence token included."""
    logprobs: tuple[float, ...]
    """Nats per sampled token, of the sampling distribution (after temperature and top-p)."""
    label_marks: tuple[tuple[int, str], ...]
    """(index into `token_ids`, label) wherever the sampled token is one of the request's labels."""
    label_logprobs: tuple[tuple[float, ...], ...]
    """For each mark the log-probs of all labels, in the request's order; nats, of the sampling distribution."""
    weight_version: str
    """Version of the weights that sampled the last token."""
    weight_spans: tuple[tuple[str, int, int], ...]
    """(version, start, end): tokens [start, end) were sampled by that version's weights."""
    finish_reason: str
    """"stop", "length", "error" or "abort"."""


class Generates(Protocol):
    """What a role asks: a pool of engines."""

    def route(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Completion]]:
        """Yield the samples of all requests in chunks, in the order in which they finish."""


class OfBase:
    """A pool whose engines answer as their base does: what a role asks that shares them with the learner."""

    def __init__(self, pool: Generates) -> None:
        """Take a pool whose engines have an adapter and keep the base beside it."""
        self._pool = pool

    def route(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Completion]]:
        """See `Generates`."""
        return self._pool.route([replace(request, of_base=True) for request in requests])


def check_request(request: GenerationRequest) -> None:
    """Check the numbers of a request.

    Raises:
        ValueError: one of them is out of range; names the request and the field.
    """
    wanted = {
        "max_tokens": (request.max_tokens, request.max_tokens >= 1, "at least 1"),
        "num_samples": (request.num_samples, request.num_samples >= 1, "at least 1"),
        "temperature": (request.temperature, 0 <= request.temperature < float("inf"), "0 (greedy) or more"),
        "top_p": (request.top_p, 0 < request.top_p <= 1, "more than 0 and at most 1"),
        "labels": (request.labels, len(request.labels) <= MAX_LABELS, f"at most {MAX_LABELS}"),
    }
    for name, (got, right, want) in wanted.items():
        if not right:
            raise ValueError(f"request {request.request_id}: {name}: got {got}, wanted {want}")
    if len(set(request.labels)) < len(request.labels):
        raise ValueError(f"request {request.request_id}: labels: got {request.labels}, wanted each label once")


def sample_seed(seed: int | None, *, sample_index: int) -> int | None:
    """Return the seed of one sample of a request: 63 bits, another for each sample; None stays None.

    >>> sample_seed(1, sample_index=0) == sample_seed(1, sample_index=1)
    False
    """
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample_index}".encode()).digest()[:8], "big") >> 1
