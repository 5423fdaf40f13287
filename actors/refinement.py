"""Owns detect-critique-refine of documents outside the loop, which it lends `refined_pair` (DCR).

Sentences that a source does not bear out are found, criticised and mended:

    source, response ──► sentences ──► detector ──► flagged ones ──► critic {span, reason, fix} ──► refiner ──► refined

Wadhwa et al. 2024, "Learning to refine with fine-grained natural language feedback", arXiv 2407.02397: a feedback for
each flagged sentence, one refinement with all of them, and a response without a flagged sentence stays as it is, byte
for byte. Detector, critic and refiner are whatever answers generation requests: a pool, or a test's function.

An answer that can't be read is missing: a sentence whose detection is unread is not flagged, a critique that can't be
read or quotes what is not there is dropped, and both are counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from actors.generation import Completion, GenerationRequest
from actors.records import Message, PreferencePair, Query, Response, lineage_id

if TYPE_CHECKING:
    from cluster.pool import Pool

Generate: TypeAlias = Callable[[Sequence[GenerationRequest]], Coroutine[Any, Any, Mapping[str, Completion]]]
"""Answers requests of one sample each; returns completions by request id, of those that were answered."""

MIN_WORDS = 3
"""Sentences of fewer words pass unasked, as in the authors' code: headings, greetings, "Yes."."""
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What the three are told; each template is filled with `str.format`."""

    detect: str = (
        "Source:\n{source}\n\nSentence:\n{sentence}\n\nDoes the source bear out all that the sentence says? "
        "Answer yes or no."
    )
    critique: str = (
        "Source:\n{source}\n\nResponse:\n{response}\n\nThis sentence of the response is not borne out by the source:\n"
        '{sentence}\n\nAnswer with one JSON object: {{"span": the wrong words, copied from the sentence, "reason": why '
        'they are wrong, "fix": what to write instead}}'
    )
    refine: str = (
        "Source:\n{source}\n\nResponse:\n{response}\n\nMend these errors, and leave everything else as it is:\n"
        "{critiques}\n\nAnswer with the mended response alone."
    )
    max_tokens: int = 512
    """Of a critique; a refinement may have these and four times the response's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A response and what it must be borne out by."""

    document_id: str
    source: str
    response: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanCritique:
    """What is wrong with one sentence."""

    sentence: int
    """Its number, from 0."""
    span: str
    """Words of the sentence, verbatim."""
    reason: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """What became of a response."""

    document: Document
    refined: str
    """The response itself where nothing was flagged, or the refiner said nothing."""
    flagged: tuple[int, ...]
    """Sentences, from 0, that the detector found fault with."""
    critiques: tuple[SpanCritique, ...]
    num_unread: int
    """Sentences whose detection could not be read."""
    num_dropped: int
    """Critiques that could not be read, or whose span is not in the sentence."""


def answered_by(pool: Pool[GenerationRequest, Completion]) -> Generate:
    """Return a pool as something that answers requests."""

    async def generate(requests: Sequence[GenerationRequest]) -> Mapping[str, Completion]:
        found: dict[str, Completion] = {}
        if requests:
            async for chunk in pool.route(requests):
                found.update({completion.request_id: completion for completion in chunk})
        return found

    return generate


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, without the white space between them.

    >>> sentences('It rained. "Did it?" Yes!\\nIt did')
    ['It rained.', '"Did it?"', 'Yes!', 'It did']
    """
    return [part for part in _split(text) if part]


def _split(text: str) -> list[str]:
    parts, begin = [], 0
    for match in _SENTENCE_END.finditer(text):
        closing = len(match.group()) - len(match.group().lstrip("\"')]"))
        parts.append(text[begin : match.start() + closing].strip())
        begin = match.end()
    return [*parts, text[begin:].strip()]


async def detect_critique_refine(
    documents: Sequence[Document],
    *,
    detector: Generate,
    critic: Generate,
    refiner: Generate,
    prompts: Prompts | None = None,
) -> list[Refinement]:
    """Return every document's refinement, in their order; each of the three answers all documents at once.

    Greedy throughout. The critic is asked once for each flagged sentence, the refiner once for each document with a
    critique that can be read.
    """
    told = prompts or Prompts()
    parts = {document.document_id: sentences(document.response) for document in documents}
    assert len(parts) == len(documents), "document ids are unique"
    detections = await detector(
        [
            _request(
                f"{document.document_id}/detect/{i}",
                told.detect.format(source=document.source, sentence=sentence),
                max_tokens=8,
            )
            for document in documents
            for i, sentence in enumerate(parts[document.document_id])
            if len(sentence.split()) >= MIN_WORDS
        ]
    )
    verdicts = {request_id: _borne_out(completion.text) for request_id, completion in detections.items()}
    flagged = {
        document.document_id: tuple(
            i
            for i in range(len(parts[document.document_id]))
            if verdicts.get(f"{document.document_id}/detect/{i}") is False
        )
        for document in documents
    }
    written = await critic(
        [
            _request(
                f"{document.document_id}/critique/{i}",
                told.critique.format(
                    source=document.source, response=document.response, sentence=parts[document.document_id][i]
                ),
                max_tokens=told.max_tokens,
            )
            for document in documents
            for i in flagged[document.document_id]
        ]
    )
    critiques = {
        document.document_id: tuple(
            found
            for i in flagged[document.document_id]
            if (completion := written.get(f"{document.document_id}/critique/{i}")) is not None
            and (found := _critique(completion.text, number=i, sentence=parts[document.document_id][i])) is not None
        )
        for document in documents
    }
    mended = await refiner(
        [
            _request(
                f"{document.document_id}/refine",
                told.refine.format(
                    source=document.source,
                    response=document.response,
                    critiques=_numbered(critiques[document.document_id]),
                ),
                max_tokens=told.max_tokens + 4 * len(document.response.split()),
            )
            for document in documents
            if critiques[document.document_id]
        ]
    )
    results = []
    for document in documents:
        name = document.document_id
        asked = [i for i, sentence in enumerate(parts[name]) if len(sentence.split()) >= MIN_WORDS]
        completion = mended.get(f"{name}/refine")
        refined = completion.text.strip() if completion is not None and completion.finish_reason == "stop" else ""
        results.append(
            Refinement(
                document=document,
                refined=refined or document.response,
                flagged=flagged[name],
                critiques=critiques[name],
                num_unread=sum(verdicts.get(f"{name}/detect/{i}") is None for i in asked),
                num_dropped=len(flagged[name]) - len(critiques[name]),
            )
        )
    return results


def _request(request_id: str, text: str, *, max_tokens: int) -> GenerationRequest:
    messages = (Message(role="user", content=text),)
    return GenerationRequest(request_id=request_id, messages=messages, max_tokens=max_tokens, temperature=0.0)


def _borne_out(text: str) -> bool | None:
    word = text.strip().lower()
    return True if word.startswith("yes") else False if word.startswith("no") else None


def _critique(text: str, *, number: int, sentence: str) -> SpanCritique | None:
    """Return the critique that a completion says; None where it can't be read or its span is not in the sentence."""
    try:
        said = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    span, reason, fix = (said.get(name) for name in ("span", "reason", "fix"))
    if not isinstance(span, str) or not isinstance(reason, str) or not isinstance(fix, str):
        return None
    return SpanCritique(sentence=number, span=span, reason=reason, fix=fix) if span and span in sentence else None


def _numbered(critiques: Sequence[SpanCritique]) -> str:
    return "\n".join(
        f'{number}. "{critique.span}": {critique.reason} Write: {critique.fix}'
        for number, critique in enumerate(critiques, start=1)
    )


# --------------------------------------------------------------------------------------------------------------- pairs


def refined_pair(
    query: Query,
    response: Response,
    refined: str,
    *,
    token_ids: Sequence[int],
    refined_id: str,
    margin: float,
    source: str,
    run: str,
) -> PreferencePair | None:
    """Return the pair that prefers a refined response to the original; None where they say the same.

    That a refinement is better is a claim to be judged like any other: `margin` is the refined one's P(good) minus the
    original's, by whom `source` says, and the caller leaves out pairs whose margin is too small.

    Args:
        query: what was asked.
        response: the original, as it was sampled.
        refined: its refinement.
        token_ids: the learner's tokens of the refinement, its end-of-sequence included.
        refined_id: what the refinement is called.
        margin: in P(good).
        source: "critic" or "expert".
        run: the run's name.
    """
    return pair_of_texts(
        query,
        refined,
        response.text,
        prompt_token_ids=response.prompt_token_ids,
        token_ids=(token_ids, response.token_ids),
        ids=(refined_id, response.response_id),
        margin=margin,
        source=source,
        run=run,
    )


def pair_of_texts(
    query: Query,
    chosen: str,
    rejected: str,
    *,
    prompt_token_ids: Sequence[int],
    token_ids: tuple[Sequence[int], Sequence[int]],
    ids: tuple[str, str],
    margin: float,
    source: str,
    run: str,
) -> PreferencePair | None:
    """Return the pair of two texts of which one at least is no policy's as it is; None where they say the same.

    Nothing of it is stale, and there are no log-probs to reweigh it by. The arguments are those of `refined_pair`;
    `token_ids` and `ids` are the chosen's and the rejected's.
    """
    if chosen == rejected:
        return None
    return PreferencePair(
        pair_id=lineage_id(run, iteration=query.iteration, stage="pairs", parents=ids),
        query_id=query.query_id,
        prompt=query.messages,
        chosen=chosen,
        rejected=rejected,
        prompt_token_ids=tuple(prompt_token_ids),
        chosen_token_ids=tuple(token_ids[0]),
        rejected_token_ids=tuple(token_ids[1]),
        margin=margin,
        weight=1.0,
        noise=0.0,
        source=source,
        chosen_id=ids[0],
        rejected_id=ids[1],
        iteration=query.iteration,
        age=None,
        chosen_logprobs=None,
        rejected_logprobs=None,
        other_margins=None,
    )
