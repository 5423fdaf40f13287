"""Owns answers that are mended where the critic found fault, span by span: begun again (DCR) or corrected (FenCE).

    failed answer ──► the critic's issues {start, end, fix} ──┬─► text up to the first, its fix ─► the learner goes on
                                                              └─► every quote replaced by its fix, or taken out

The critique that failed the answer is the detection, its quotes and fixes the feedback: nobody is asked a second time.
`detect_critique_refine` has the learner write on from the first flaw (Wadhwa et al. 2024, arXiv 2407.02397; there one
prompt lists all flaws, which takes a model that follows instructions). `claim_revision` asks nobody: what is not borne
out is corrected or deleted, and nothing else is said (Xie et al. 2024, arXiv 2410.18359). Whether either is better is
for the critic to say of the whole text. `actors.refinement` and `actors.claim_revision` do the same by prompts.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from actors.generation import Completion, Generates, GenerationRequest
from actors.oversight import Judged
from actors.records import Critique, Issue, RefinedResponse, draw_seed, lineage_id
from cluster.config import Config

NO_ISSUE, NO_FIX, UNENDED, TOO_LITTLE_LEFT = "no_issue", "no_fix", "unended", "too_little_left"
UNWRITABLE = "unwritable"
"""Why an answer is left as it is: no readable critique quotes a flaw; none says better; it has no end to keep; most of
its claims would go; its vocabulary can't spell a fix without a control token."""


class RefinementConfig(Config):
    """How failed answers are mended, to be preferred to what they were."""

    kind: Literal["detect_critique_refine", "claim_revision"]
    """detect_critique_refine: the learner goes on after the first flaw, its fix in its place; claim_revision: every
    flaw is replaced by its fix, or taken out where there is none, without a call of a model."""
    max_share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Greatest share of an iteration's pairs that prefer a mended answer; which of them is drawn by the run's seed. 1:
    no bound; below it an iteration without other pairs has none of these either."""
    temperature: float = Field(default=0.0, ge=0.0)
    """At which the learner goes on, 0 being greedy; of detect_critique_refine."""
    min_recall: float = Field(default=0.5, ge=0.0, le=1.0)
    """Least share of an answer's claims that its revision keeps, corrected or not; of claim_revision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What is known of a mended answer before any model is asked."""

    text: str
    """How it begins; of claim_revision the whole."""


def first_issue(item: Judged) -> Issue | None:
    """Return the flaw that ends first, of those that each readable critique quotes first (`Verdict.flaw_end`)."""
    firsts = [critique.issues[0] for critique in _surest_first(item) if critique.issues]
    return min(firsts, key=lambda issue: issue.end, default=None)


def all_issues(item: Judged) -> list[Issue]:
    """Return the flaws that readable critiques quote, in the text's order; of two that overlap the surer one's."""
    found: list[Issue] = []
    for critique in _surest_first(item):
        found += [
            issue
            for issue in critique.issues
            if all(issue.end <= other.start or other.end <= issue.start for other in found)
        ]
    return sorted(found, key=lambda issue: issue.start)


def revise_spans(text: str, issues: Sequence[Issue]) -> str:
    """Return a text with each quote replaced by its fix; one without a fix goes, and one of the spaces around it.

    >>> revise_spans("a b c", [Issue(start=2, end=3, quote="b", severity=3, category="", explanation="", fix="")])
    'a c'
    """
    for issue in sorted(issues, key=lambda issue: -issue.start):
        before, after = text[: issue.start], text[issue.end :]
        if not issue.fix and before[-1:] in ("", " "):
            before, after = (before, after[1:]) if after[:1] == " " else (before[:-1] if not after else before, after)
        text = before + issue.fix + after
    return text


def share_supported(item: Judged) -> float | None:
    """Return #supported / #claims over readable critiques: a mark supports where P(correct) is 1/2 or more.

    None where none has a mark.
    """
    marks = item.step_logprobs
    return sum(logprob >= math.log(0.5) for logprob in marks) / len(marks) if marks else None


class Refiner:
    """Mends answers."""

    def __init__(
        self,
        pool: Generates,
        *,
        config: RefinementConfig,
        max_tokens: int,
        encode: Callable[[str], Sequence[int]],
        run: str,
        seed: int,
    ) -> None:
        """Take what it asks.

        Args:
            pool: the learner's rollouts.
            config: how answers are mended.
            max_tokens: longest answer, as the learner is sampled.
            encode: the learner's tokens of a text, without an end; raises ValueError where it takes a control token.
            run: the run's name.
            seed: the run's.
        """
        self.config = config
        self._pool = pool
        self._max_tokens = max_tokens
        self._encode = encode
        self._run = run
        self._seed = seed

    def refinement_id(self, item: Judged) -> str:
        """Return the id of what an answer is mended to."""
        parents = [item.response.response_id]
        return lineage_id(self._run, iteration=item.query.iteration, stage="refinements", parents=parents)

    def begin(self, item: Judged) -> Begun | str:
        """Return how an answer is mended, or why it is left as it is."""
        issue, text = first_issue(item), item.response.text
        if issue is None:
            return NO_ISSUE
        if self.config.kind == "detect_critique_refine":
            usable = issue.fix not in ("", issue.quote)
            return self._begun(text[: issue.start] + issue.fix) if usable else NO_FIX
        issues = all_issues(item)
        if item.response.finish_reason != "stop":
            return UNENDED
        num_claims = max(len(issues), *(len(critique.label_logprobs) - 1 for critique in item.readable))
        num_deleted = sum(not issue.fix for issue in issues)
        revised = revise_spans(text, issues)
        if num_claims - num_deleted < self.config.min_recall * num_claims or not revised.strip():
            return TOO_LITTLE_LEFT
        return NO_FIX if revised == text else self._begun(revised)

    def _begun(self, text: str) -> Begun | str:
        try:
            self._encode(text)
        except ValueError:
            return UNWRITABLE
        return Begun(text=text)

    async def refine(
        self, items: Sequence[Judged], *, known: Iterable[str] = ()
    ) -> AsyncIterator[list[RefinedResponse]]:
        """Yield what answers are mended to, as it is finished; ids in `known` are there already.

        An answer that `begin` leaves as it is has none.
        """
        have = set(known)
        begun: dict[str, tuple[Judged, Begun]] = {}
        for item in items:
            start, name = self.begin(item), self.refinement_id(item)
            if isinstance(start, Begun) and name not in have:
                begun[name] = item, start
        if self.config.kind == "claim_revision":
            if begun:
                yield [self._revised(name, item, start.text) for name, (item, start) in begun.items()]
            return
        requests = [self._request(name, item, start.text) for name, (item, start) in begun.items()]
        async for chunk in self._pool.route(requests) if requests else _nothing():
            yield [self._continued(completion, *begun[completion.request_id]) for completion in chunk]

    def _request(self, name: str, item: Judged, prefix: str) -> GenerationRequest:
        query, greedy = item.query, self.config.temperature == 0.0
        place = query.iteration, query.sample_index, item.response.sample_index
        return GenerationRequest(
            request_id=name,
            messages=query.messages,
            max_tokens=self._max_tokens,
            temperature=self.config.temperature,
            seed=None if greedy else draw_seed(self._seed, "refinements", *place),
            prefix=prefix,
        )

    def _continued(self, completion: Completion, item: Judged, begun: Begun) -> RefinedResponse:
        before = completion.prompt_token_ids[len(item.response.prompt_token_ids) :]
        token_ids = (*before, *completion.token_ids)
        spans = completion.weight_spans
        return _refined(
            completion.request_id,
            item,
            text=begun.text + completion.text,
            token_ids=token_ids,
            policy_version=spans[0][0] if spans else completion.weight_version,
            finish_reason="length" if len(token_ids) > self._max_tokens else completion.finish_reason,
        )

    def _revised(self, name: str, item: Judged, text: str) -> RefinedResponse:
        token_ids = (*self._encode(text), item.response.token_ids[-1])
        return _refined(
            name,
            item,
            text=text,
            token_ids=token_ids,
            policy_version=item.response.policy_version,
            finish_reason="length" if len(token_ids) > self._max_tokens else "stop",
        )


def _refined(
    name: str, item: Judged, *, text: str, token_ids: tuple[int, ...], policy_version: str, finish_reason: str
) -> RefinedResponse:
    return RefinedResponse(
        refinement_id=name,
        response_id=item.response.response_id,
        query_id=item.query.query_id,
        sample_index=item.response.sample_index,
        text=text,
        token_ids=token_ids,
        policy_version=policy_version,
        finish_reason=finish_reason,
    )


def _surest_first(item: Judged) -> list[Critique]:
    """Return the critiques that could be read, the surest of a flaw first, whatever their ids."""
    return sorted(item.readable, key=lambda critique: (critique.score or 0.0, critique.text))


async def _nothing() -> AsyncIterator[list[Completion]]:
    return
    yield
