"""Owns how a judging prompt is written and how its answer is read: text in, Critique out.

A critique that can't be read is missing (`parse_ok` False, no verdict), never a low score.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

from actors.domains import Domain
from actors.generation import Completion
from actors.records import Critique, Issue, Message, Query, Response

PASS, FAIL = "pass", "fail"


class Rubric(Protocol):
    """Writes the critic's prompt and reads its answer."""

    labels: tuple[str, ...]
    """Label tokens whose log-probs the engine must report, in pairs (good, bad)."""

    def render(self, query: Query, response: Response) -> tuple[Message, ...]:
        """Return the critic's prompt."""
        ...

    def parse(
        self, critique_id: str, query: Query, response: Response, completion: Completion, *, temperature: float
    ) -> Critique:
        """Return the critique that a completion says, which was sampled at a temperature (0: greedy)."""
        ...


_PART = re.compile(r"([^?yn]*)\?([^?yn]*)([yn])")
"""A quoted part, the same recomputed, its mark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedPart:
    """A part of an answer as a critique in step marks quotes it."""

    start: int | None
    """Where it is in the answer, from where the one before it ends, blanks apart; None: it is not there."""
    quote: str
    recomputed: str
    mark: str
    """"y" or "n"."""


def _marked_parts(text: str, response: str) -> tuple[list[MarkedPart], int, int]:
    """Return a critique's marked parts, the characters that they take of it, and of the answer."""
    parts: list[MarkedPart] = []
    end = cursor = 0
    for match in _PART.finditer(text):
        if match.start() != end:
            break
        end = match.end()
        quote, recomputed, mark = match.groups()
        start = response.find(quote, cursor) if quote else -1
        there = start >= 0 and response[cursor:start].strip(" ") == ""
        parts.append(MarkedPart(start=start if there else None, quote=quote, recomputed=recomputed, mark=mark))
        if there:
            cursor = start + len(quote)
    return parts, end, cursor


def praised_spans(text: str, response: str) -> tuple[tuple[int, int], ...]:
    """Return (start, end) of the answer's parts that a critique in step marks quotes and found right, half-open."""
    parts, _, _ = _marked_parts(text, response)
    right = [part for part in parts if part.mark == "y"]
    return tuple((part.start, part.start + len(part.quote)) for part in right if part.start is not None)


def recomputed_parts(text: str) -> tuple[str, ...]:
    """Return what a critique in step marks recomputed, part by part: the answer that the critic would have given."""
    return tuple(match[2] for match in _PART.finditer(text))


class StepMarks:
    """Quote each part of the answer, recompute it beside the quote, mark it; then the label.

    `quote?recomputed` then `y` or `n`, and a final `P` or `F`. P(good) is the product of P(correct) over the marks and
    the final label, each normalised over its two labels (after GenRM, Zhang et al. 2024, arXiv 2408.15240, eq. for
    direct verification; ours differs in that every step mark counts, since the final label alone, after its own
    reasoning, is nearly always 0 or 1).
    """

    labels: tuple[str, ...] = ("y", "n", "P", "F")

    def __init__(self, domain: Domain, *, version: str = "v0") -> None:
        self._domain = domain
        self._version = version

    def render(self, query: Query, response: Response) -> tuple[Message, ...]:
        """Return the critic's prompt for one response."""
        return self._domain.critic_messages(query.messages[-1].content, response.text)

    def parse(
        self, critique_id: str, query: Query, response: Response, completion: Completion, *, temperature: float
    ) -> Critique:
        """Return the critique that a completion says; a quote that is not in the response drops its issue."""
        text = completion.text
        parts, end, cursor = _marked_parts(text, response.text)
        label = {"P": PASS, "F": FAIL}.get(text[end:])
        faulted = [part for part in parts if part.mark == "n"]
        issues = [
            Issue(
                start=part.start,
                end=part.start + len(part.quote),
                quote=part.quote,
                severity=3,
                category="step" if len(part.quote) > 1 else "result",
                explanation=f"recomputed from the query: {part.recomputed}",
                fix=part.recomputed,
            )
            for part in faulted
            if part.start is not None
        ]
        marked_bad = bool(faulted)
        whole = all(part.start is not None for part in parts) and cursor == len(response.text)
        consistent = label is not None and bool(parts) and (whole if label == PASS else True)
        consistent = consistent and marked_bad == (label == FAIL)
        scores = self._good_logprobs(completion, temperature=temperature)
        readable = consistent and len(scores) == len(parts) + 1 and completion.finish_reason == "stop"
        return Critique(
            critique_id=critique_id,
            query_id=query.query_id,
            response_ids=(response.response_id,),
            mode="pointwise",
            text=text,
            issues=tuple(issues),
            verdict=label if readable else None,
            score=math.exp(sum(scores)) if readable else None,
            label_logprobs=scores,
            order="AB",
            critic_version=completion.weight_version,
            parse_ok=readable,
            num_dropped_issues=len(faulted) - len(issues),
            cost_tokens=len(completion.token_ids),
        )

    def _good_logprobs(self, completion: Completion, *, temperature: float) -> tuple[float, ...]:
        """Return log P(correct) in nats at each mark, normalised over the mark's two labels.

        Log-probs come from the sampling distribution: sampled at a temperature they are the model's own divided by it,
        up to a constant, which the normalisation takes away.
        """
        scale = temperature or 1.0
        scores = []
        for (_, label), logprobs in zip(completion.label_marks, completion.label_logprobs, strict=True):
            pair = self.labels.index(label) // 2 * 2
            good, bad = scale * logprobs[pair], scale * logprobs[pair + 1]
            top = max(good, bad)
            scores.append(good - top - math.log(math.exp(good - top) + math.exp(bad - top)))
        return tuple(scores)
