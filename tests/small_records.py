"""Records with everything filled in, for tests that care about a field or two."""

from __future__ import annotations

from actors.oversight import Judged
from actors.records import Critique, Message, Query, Response, Verdict


def make_query(query_id: str = "q", *, text: str = "47+86", facets: tuple[str, ...] = ("+", "2", "2")) -> Query:
    """Return a query; the digits at the end of its id are its place among others."""
    return Query(
        query_id=query_id,
        sample_index=_number(query_id),
        messages=(Message(role="user", content=text),),
        domain="arithmetic",
        facets=facets,
        canonical=text,
        attack="quality_diversity",
        parent_id=None,
        iteration=1,
        attacker_version="v0",
        split="train",
    )


def make_response(
    response_id: str = "r", *, query_id: str = "q", text: str = "7+6+0=13 4+8+1=13 133", sample_index: int = 0
) -> Response:
    return Response(
        response_id=response_id,
        query_id=query_id,
        sample_index=sample_index,
        text=text,
        prompt_token_ids=(1, 2, 3),
        token_ids=(*(ord(character) for character in text), 0),
        logprobs=(-0.5,) * (len(text) + 1),
        policy_version="v0",
        finish_reason="stop",
    )


def make_critique(
    critique_id: str = "c", *, response_id: str = "r", query_id: str = "q", score: float | None
) -> Critique:
    """Return a critique with a P(good); None makes it unreadable."""
    return Critique(
        critique_id=critique_id,
        query_id=query_id,
        response_ids=(response_id,),
        mode="pointwise",
        text="133?133yP",
        issues=(),
        verdict=None if score is None else "pass" if score >= 0.5 else "fail",
        score=score,
        label_logprobs=(),
        order="AB",
        critic_version="v0",
        parse_ok=score is not None,
        num_dropped_issues=0,
        cost_tokens=10,
    )


def make_judged(response_id: str, *scores: float | None, query_id: str = "q", text: str | None = None) -> Judged:
    """Return a response with one critique for each P(good); without a text it has one of its own."""
    text = f"the answer {response_id}" if text is None else text
    return Judged(
        query=make_query(query_id),
        response=make_response(response_id, query_id=query_id, text=text, sample_index=_number(response_id)),
        critiques=tuple(
            make_critique(f"{response_id}/{k}", response_id=response_id, query_id=query_id, score=score)
            for k, score in enumerate(scores)
        ),
    )


def make_verdict(
    response_id: str,
    score: float | None,
    *,
    query_id: str = "q",
    source: str = "critic",
    flaw_end: int | None = None,
) -> Verdict:
    """Return a verdict of P(good) `score`; None makes it unjudged."""
    return Verdict(
        verdict_id=f"verdict/{response_id}",
        query_id=query_id,
        response_id=response_id,
        label=None if score is None else "pass" if score >= 0.5 else "fail",
        score=score,
        confidence=None if score is None else max(score, 1.0 - score),
        source=source,
        escalated=source == "expert",
        drawn=False,
        flaw_end=flaw_end,
    )


def _number(name: str) -> int:
    digits = name[len(name.rstrip("0123456789")) :]
    return int(digits) if digits else 0
