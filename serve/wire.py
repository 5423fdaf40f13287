"""Owns what crosses between the endpoint's gateway and a learner's replica: what is asked, and the pieces of answers.

Knows neither HTTP nor vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

WeightSpan: TypeAlias = tuple[str, int, int]
"""(version, start, end): tokens [start, end) were sampled by that version's weights."""


class RequestRefused(ValueError):
    """A replica can't run this request, and no other can: it is the caller's."""


class AnswerLost(RuntimeError):
    """A replica can't finish this answer; another one may begin it anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn; every number has been checked."""

    max_tokens: int | None
    """None: what the context leaves."""
    temperature: float = 1.0
    top_p: float = 1.0
    num_samples: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    num_top_logprobs: int | None = None
    """None: no log-probs; 0: those of the sampled tokens; n: and of the n likeliest."""
    json_schema: str | None = None
    """A JSON schema that the answer must meet; "{}" of type object for any object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequest:
    """Prompts to be continued."""

    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    """Token ids; each is continued `sampling.num_samples` times."""
    sampling: Sampling
    version: str | None
    """A pinned version; None for the current one."""
    stream: bool
    """Whether pieces are wanted as they come; else one piece for each choice."""

    @property
    def num_choices(self) -> int:
        """How many answers there will be."""
        return len(self.prompts) * self.sampling.num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One sampled token and how likely it was."""

    token: str
    logprob: float
    """Nats, of the sampling distribution."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens, likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next part of one choice."""

    index: int
    text: str
    num_tokens: int
    """Sampled tokens that this part is made of."""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    """None until the last piece."""
    weight_spans: tuple[WeightSpan, ...] = ()
    """Of the whole choice; with the last piece alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedVersion:
    """A version of the learner that can be asked."""

    version: str
    created: float
    """Unix seconds of its commit."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What can be asked now."""

    current: str
    """The version that `learner` stands for."""
    versions: tuple[ServedVersion, ...]
    refused: dict[str, str] = field(default_factory=dict)
    """Versions that were committed and not promoted, and why."""
