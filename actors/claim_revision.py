"""Owns claim-wise revision of documents outside the loop, which it lends `preferred_revisions` (FenCE).

Every claim is held against evidence, and mended or deleted without it:

    candidates ──► claims ──► evidence ──► evaluator {supported | unsupported, why} ──► reviser ──► revisions, scored
                                                                                                 └─► preference pairs

Xie et al. 2024, "Improving model factuality with fine-grained critique-based evaluator", arXiv 2410.18359. A revision
adds nothing: an unsupported claim is deleted, or corrected by words that the evidence bears out, which the evaluator is
asked about again. The score is the share of supported claims; preference goes by it. A candidate can't win by saying
less than a given share of what it said at first (recall), which deletion alone would reward.

An evaluation that can't be read leaves its claim out of the score, and as it is; it is counted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from actors.generation import GenerationRequest
from actors.records import Message
from actors.refinement import Generate, sentences

Evidence: TypeAlias = Callable[[str], Awaitable[Sequence[str]]]
"""Passages about a claim, from whatever tool finds them; none is an answer too."""

SUPPORTED, UNSUPPORTED, DELETE = "supported", "unsupported", "DELETE"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimPrompts:
    """What evaluator and reviser are told; filled with `str.format`."""

    evaluate: str = (
        "Evidence:\n{evidence}\n\nClaim:\n{claim}\n\nSay in one line why the evidence does or does not support the "
        "claim, and on the next line supported or unsupported."
    )
    revise: str = (
        "Evidence:\n{evidence}\n\nClaim:\n{claim}\n\nIt is not supported: {critique}\nAnswer with the claim corrected "
        "by the evidence alone, without any other fact, or with DELETE."
    )
    max_tokens: int = 256
    """Of an evaluation, and of a revised claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One response to a prompt, to be revised."""

    candidate_id: str
    group: str
    """The prompt; candidates of one group are compared."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim and what was found."""

    text: str
    supported: bool | None
    """None: the evaluation could not be read."""
    critique: str
    revised: str
    """The claim itself where it is supported or unread; "" where it was deleted."""
    revision_supported: bool | None
    """Whether what it became is supported; None of a deleted or unread one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """What became of a candidate."""

    candidate: Candidate
    claims: tuple[Claim, ...]
    revised: str
    score_before: float | None
    """Share of the claims that are supported; None where none could be read."""
    score: float | None
    """The same of the revised claims."""
    num_unread: int


async def revise_claims(
    candidates: Sequence[Candidate],
    *,
    evidence: Evidence,
    evaluator: Generate,
    reviser: Generate,
    prompts: ClaimPrompts | None = None,
    min_recall: float = 0.5,
    split: Callable[[str], Sequence[str]] = sentences,
) -> list[Revision]:
    """Return the revision of each candidate, in their order. Greedy throughout.

    Args:
        candidates: with ids of their own.
        evidence: asked once for every claim.
        evaluator: asked about every claim, and about every corrected one again.
        reviser: asked about the unsupported claims.
        prompts: None: those of `ClaimPrompts`.
        min_recall: least share of a candidate's claims that its revision keeps, corrected or not; where it would keep
            fewer, the candidate stays as it is.
        split: a response's claims.
    """
    told = prompts or ClaimPrompts()
    claims = {
        f"{candidate.candidate_id}/{i}": text
        for candidate in candidates
        for i, text in enumerate(split(candidate.text))
    }
    passages = {key: "\n".join(await evidence(text)) for key, text in claims.items()}
    found = await _evaluated(claims, passages, evaluator, told, stage="evaluate")
    wrong = {key: claims[key] for key, (supported, _) in found.items() if supported is False}
    answers = await reviser(
        [
            _request(
                f"{key}/revise", told.revise.format(evidence=passages[key], claim=text, critique=found[key][1]), told
            )
            for key, text in wrong.items()
        ]
    )
    said = {key: answers[f"{key}/revise"].text.strip() for key in wrong if f"{key}/revise" in answers}
    corrected = {key: text for key, text in said.items() if text and text != DELETE and text != claims[key]}
    again = await _evaluated(corrected, passages, evaluator, told, stage="check")
    results = []
    for candidate in candidates:
        keys = [key for key in claims if key.rpartition("/")[0] == candidate.candidate_id]
        rows = []
        for key in keys:
            supported, critique = found.get(key, (None, ""))
            revised, revision_supported = claims[key], supported
            if supported is False:
                # A correction counts only where the evidence bears it out; else the claim goes.
                held = again.get(key, (None, ""))[0] is True
                revised, revision_supported = (corrected[key], True) if held else ("", None)
            rows.append(
                Claim(
                    text=claims[key],
                    supported=supported,
                    critique=critique,
                    revised=revised,
                    revision_supported=revision_supported,
                )
            )
        results.append(_revision(candidate, rows, min_recall=min_recall))
    return results


async def _evaluated(
    claims: Mapping[str, str], passages: Mapping[str, str], evaluator: Generate, told: ClaimPrompts, *, stage: str
) -> dict[str, tuple[bool | None, str]]:
    """Return, for each claim, whether it is supported (None: unread) and why."""
    answers = await evaluator(
        [
            _request(f"{key}/{stage}", told.evaluate.format(evidence=passages[key], claim=text), told)
            for key, text in claims.items()
        ]
    )
    found: dict[str, tuple[bool | None, str]] = {}
    for key in claims:
        completion = answers.get(f"{key}/{stage}")
        lines = [] if completion is None else completion.text.strip().splitlines()
        label = lines[-1].strip().lower().rstrip(".") if lines else ""
        supported = True if label == SUPPORTED else False if label == UNSUPPORTED else None
        found[key] = supported, " ".join(lines[:-1])
    return found


def _request(request_id: str, text: str, told: ClaimPrompts) -> GenerationRequest:
    messages = (Message(role="user", content=text),)
    return GenerationRequest(request_id=request_id, messages=messages, max_tokens=told.max_tokens, temperature=0.0)


def _revision(candidate: Candidate, claims: Sequence[Claim], *, min_recall: float) -> Revision:
    kept = [claim for claim in claims if claim.revised]
    before = _score([claim.supported for claim in claims])
    unchanged = all(claim.revised == claim.text for claim in claims)
    if unchanged or len(kept) < min_recall * len(claims) or not kept:
        revised, score = candidate.text, before
    else:
        revised, score = " ".join(c.revised for c in kept), _score([c.revision_supported for c in kept])
    return Revision(
        candidate=candidate,
        claims=tuple(claims),
        revised=revised,
        score_before=before,
        score=score,
        num_unread=sum(claim.supported is None for claim in claims),
    )


def _score(supported: Sequence[bool | None]) -> float | None:
    """Return #supported / #claims that could be read.

    >>> _score([True, False, None, True])
    0.6666666666666666
    """
    read = [value for value in supported if value is not None]
    return sum(read) / len(read) if read else None


def preferred_revisions(
    revisions: Sequence[Revision], *, margin: float = 0.0, against: Sequence[Revision] | None = None
) -> list[tuple[Revision, Revision]]:
    """Return (better, worse) of each group: its best and worst revised texts, where their scores differ by more.

    Candidates without a score have no part. The texts may be equal, with different scores: no pair is made of these
    (`actors.refinement.pair_of_texts`).

    Args:
        revisions: of any number of groups.
        margin: what the scores must differ by more than.
        against: what the worst is looked for in, such as the texts before they were revised; None: the revisions.
    """
    best_of, worst_of = _by_group(revisions), _by_group(revisions if against is None else against)
    pairs = []
    for group in [group for group in best_of if group in worst_of]:
        best, worst = best_of[group][0], worst_of[group][-1]
        if (best.score or 0.0) - (worst.score or 0.0) > margin:
            pairs.append((best, worst))
    return pairs


def _by_group(revisions: Sequence[Revision]) -> dict[str, list[Revision]]:
    """Return the revisions with a score, those of a group from the best to the worst."""
    groups: dict[str, list[Revision]] = {}
    for revision in revisions:
        if revision.score is not None:
            groups.setdefault(revision.candidate.group, []).append(revision)
    return {group: sorted(members, key=lambda one: -(one.score or 0.0)) for group, members in groups.items()}
