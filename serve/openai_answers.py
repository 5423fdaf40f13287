"""Owns the bodies that go out: OpenAI's chat completions, completions, stream events, models and errors.

Each names the weight version that made it, from the engine's own spans: `weight_spans` of a choice say which of its
tokens came from which version, `weight_version` and OpenAI's `system_fingerprint` are that of the last token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.wire import Catalog, Piece, TokenLogprob, WeightSpan

LEARNER = "learner"
"""The model that stands for the current version; `learner@v7` is a pinned one."""


@dataclass(slots=True)
class Choice:
    """One answer as far as it has come."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None
    weight_spans: tuple[WeightSpan, ...] = ()

    def add(self, piece: Piece) -> None:
        """Take the next part."""
        self.text += piece.text
        self.logprobs += piece.logprobs
        self.num_tokens += piece.num_tokens
        self.finish_reason = piece.finish_reason
        self.weight_spans = piece.weight_spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What all bodies of one answer have in common."""

    answer_id: str
    created: int
    model: str
    is_chat: bool
    num_prompt_tokens: int
    wants_logprobs: bool
    include_usage: bool = False

    def answer(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return a whole answer."""
        return {
            **self._head("chat.completion" if self.is_chat else "text_completion"),
            **_fingerprint(choices),
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self._usage(choices),
        }

    def opening(self, num_choices: int) -> Iterable[bytes]:
        """Yield the events that begin a chat stream, one role for each choice."""
        if self.is_chat:
            for index in range(num_choices):
                yield self._event([self._delta(index, {"role": "assistant", "content": ""}, None, ())])

    def part(self, piece: Piece, choice: Choice) -> bytes:
        """Return the event of one piece; the last of a choice has its weight version and spans."""
        delta = {"content": piece.text} if self.is_chat else piece.text
        body = self._delta(piece.index, delta, piece.finish_reason, piece.logprobs)
        if piece.finish_reason is None:
            return self._event([body])
        return self._event([{**body, "weight_spans": _spans(piece.weight_spans)}], **_fingerprint([choice]))

    def closing(self, choices: Sequence[Choice]) -> Iterable[bytes]:
        """Yield the events that end a stream well."""
        if self.include_usage:
            yield self._event([], usage=self._usage(choices), **_fingerprint(choices))
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.answer_id, "object": kind, "created": self.created, "model": self.model}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        return event({**head, **more, "choices": choices})

    def _delta(
        self, index: int, delta: Any, finish_reason: str | None, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta" if self.is_chat else "text": delta,
            "logprobs": self._logprobs(logprobs) if self.wants_logprobs and logprobs else None,
            "finish_reason": finish_reason,
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": choice.text}} if self.is_chat else {"text": choice.text}
        return {
            "index": index,
            **said,
            "logprobs": self._logprobs(choice.logprobs) if self.wants_logprobs else None,
            "finish_reason": choice.finish_reason,
            "weight_spans": _spans(choice.weight_spans),
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self.is_chat:
            return {
                "content": [
                    {**_scored(t.token, t.logprob), "top_logprobs": [_scored(*other) for other in t.top]}
                    for t in tokens
                ],
                "refusal": None,
            }
        return {
            "tokens": [t.token for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [dict(t.top) for t in tokens],
        }

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        made = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.num_prompt_tokens + made,
        }


def event(body: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_body(catalog: Catalog, name: str) -> dict[str, Any] | None:
    """Return what there is to say of a model; None when there is no such model."""
    pinned = name.removeprefix(f"{LEARNER}@") if name.startswith(f"{LEARNER}@") else None
    version = catalog.current if name == LEARNER else pinned
    found = next((known for known in catalog.versions if known.version == version), None)
    if found is None:
        return None
    return {
        "id": name,
        "object": "model",
        "created": int(found.created),
        "owned_by": "elenchus",
        "weight_version": found.version,
        "metrics": found.metrics,
    }


def models_body(catalog: Catalog) -> dict[str, Any]:
    """Return all models: the current version, then every kept one, newest first."""
    names = [LEARNER, *(f"{LEARNER}@{version.version}" for version in reversed(catalog.versions))]
    listed = [body for name in names if (body := model_body(catalog, name)) is not None]
    return {"object": "list", "data": listed, "refused": catalog.refused}


def _scored(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _spans(spans: Sequence[WeightSpan]) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in spans]


def _fingerprint(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the version of the last token; of several choices that end differently, all of theirs, joined by +."""
    versions = sorted({choice.weight_spans[-1][0] for choice in choices if choice.weight_spans})
    version = "+".join(versions) or None
    return {"weight_version": version, "system_fingerprint": version}
