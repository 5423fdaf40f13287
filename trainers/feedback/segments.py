"""Owns what critiques' spans are worth, token by token (RELC: Cao et al. 2024, arXiv 2401.07382).

critiques of a response ──► spans that they praise or fault ──► +-1 on their tokens, the mean over critiques
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from actors.oversight import EXPERT, Judged
from actors.records import Critique, Response, Verdict
from actors.rubrics import praised_spans

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TokensSpanning: TypeAlias = Callable[[Sequence[int], int], int]
"""How many of the token ids it takes to spell so many characters."""
Placement: TypeAlias = Literal["end", "spread"]


@runtime_checkable
class SegmentSettings(Protocol):
    """What a loss that is paid by spans says of them."""

    praise: bool
    placement: Placement
    segment_cap: float
    """0: no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of a response that a critic points at."""

    start: int
    """Characters of the response, half-open."""
    end: int
    quote: str
    """Must equal response[start:end]."""
    sign: Literal[1, -1]
    """1: this is good, -1: this is bad."""


class SegmentRewards(NamedTuple):
    """What a critique's spans say of each token."""

    rewards: NDArray[np.float64]
    """(tokens,)"""
    num_dropped: int
    """Spans whose quote was another, or that touch no token."""
    num_cancelled: int
    """Spans that an overlapping one of the other sign cancelled, both counted."""


def segment_rewards(
    response: str,
    spans: Sequence[Span],
    *,
    num_tokens: int,
    tokens_of: Callable[[int, int], Sequence[int]],
    placement: Placement = "end",
    cap: float | None = None,
) -> SegmentRewards:
    """Return a response's rewards by token: +-1 for each span.

    Ours differs in that a quote must match, that overlapping spans of opposite sign cancel in pairs, and in `spread`.

    Args:
        response: the text that the spans point into.
        spans: what the critic found.
        num_tokens: of the response.
        tokens_of: which of them spell the characters from one place up to another.
        placement: "end": all of it on the span's last token; "spread": the same share on each of its tokens.
        cap: greatest |sum| of a response; above it all are scaled down. None: no such bound.
    """
    import numpy as np

    rewards = np.zeros(num_tokens)
    kept: list[tuple[Span, Sequence[int]]] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        matches = 0 <= span.start < span.end and response[span.start : span.end] == span.quote
        if matches and (tokens := tokens_of(span.start, span.end)):
            kept.append((span, tokens))
    num_dropped, num_kept = len(spans) - len(kept), len(kept)
    kept = _uncancelled(kept)
    for span, tokens in kept:
        placed = tokens[-1:] if placement == "end" else tokens
        np.add.at(rewards, placed, span.sign / len(placed))
    total = abs(sum(span.sign for span, _ in kept))
    if cap is not None and total > cap:
        rewards *= cap / total
    return SegmentRewards(rewards=rewards, num_dropped=num_dropped, num_cancelled=num_kept - len(kept))


def _uncancelled(spans: list[tuple[Span, Sequence[int]]]) -> list[tuple[Span, Sequence[int]]]:
    """Return the spans without those that cancel: each with the first overlapping one of the other sign."""
    left: list[tuple[Span, Sequence[int]]] = []
    for span, tokens in spans:
        for i, (other, _) in enumerate(left):
            if other.sign != span.sign and max(other.start, span.start) < min(other.end, span.end):
                del left[i]
                break
        else:
            left.append((span, tokens))
    return left


def spans_of(critique: Critique, response: Response, *, praise: bool) -> list[Span]:
    """Return what a critique points at, each stretch once; with `praise` also what it found right."""
    flaws = dict.fromkeys((issue.start, issue.end, issue.quote) for issue in critique.issues)
    found = [Span(start=start, end=end, quote=quote, sign=-1) for start, end, quote in flaws]
    if praise:
        good = praised_spans(critique.text, response.text)
        found += [Span(start=start, end=end, quote=response.text[start:end], sign=1) for start, end in good]
    return found


def rewards_of(
    item: Judged, verdict: Verdict | None, settings: SegmentSettings, tokens_spanning: TokensSpanning
) -> list[float]:
    """Return a response's segment rewards, one for each token: the mean over its readable critiques; 0 without any.

    All are 0 where an expert's verdict is not the critic's: what was wrong about the whole is not to be trusted on its
    parts.
    """
    ids, text = item.response.token_ids, item.response.text

    def tokens_of(start: int, end: int) -> range:
        return range(max(0, tokens_spanning(ids, start + 1) - 1), tokens_spanning(ids, end))

    overruled = verdict is not None and verdict.source == EXPERT and verdict.label != item.critic_verdict.label
    readable = () if overruled else item.readable
    total = [0.0] * len(ids)
    for critique in readable:
        found = segment_rewards(
            text,
            spans_of(critique, item.response, praise=settings.praise),
            num_tokens=len(ids),
            tokens_of=tokens_of,
            placement=settings.placement,
            cap=settings.segment_cap or None,
        )
        total = [sum(pair) for pair in zip(total, found.rewards.tolist(), strict=True)]
    return [value / max(1, len(readable)) for value in total]
