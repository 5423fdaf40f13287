"""Owns how a judging prompt is written and how its answer is read: text in, Critique out.

A critique that can't be read is missing (`parse_ok` False, no verdict), never a low score.
"""

from __future__ import annotations

import math
import re
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
        parts, end = [], 0
        for match in _PART.finditer(text):
            if match.start() != end:
                break
            parts.append((match[1], match[2], match[3]))
            end = match.end()
        label = {"P": PASS, "F": FAIL}.get(text[end:])
        issues, num_dropped, cursor, verified = [], 0, 0, True
        for quote, recomputed, mark in parts:
            start = response.text.find(quote, cursor) if quote else -1
            if start < 0 or response.text[cursor:start].strip(" ") != "":
                verified = False
                num_dropped += mark == "n"
                continue
            cursor = start + len(quote)
            if mark == "n":
                issues.append(
                    Issue(
                        start=start,
                        end=cursor,
                        quote=quote,
                        severity=3,
                        category="step" if len(quote) > 1 else "result",
                        explanation=f"recomputed from the query: {recomputed}",
                        fix=recomputed,
                    )
                )
        marked_bad = any(mark == "n" for _, _, mark in parts)
        whole = verified and cursor == len(response.text)
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
            num_dropped_issues=num_dropped,
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
