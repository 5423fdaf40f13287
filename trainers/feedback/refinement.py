"""Owns pairs that prefer mended answers to failed ones (L-DCR, L-FENCE): whom to mend, who judges, what is paired.

    failed answers ──► refiner ──► mended ──► critic ──► passes, and P(good) grew by the margin? ──► refined ≻ original

An answer that passes is never touched, nor is one in which no readable critique quotes a flaw. A mended answer is no
answer of the learner's: it has records of its own, is never put before experts, and counts neither towards their budget
nor towards the attack's success. Every failed answer, each text once for a query, ends in a pair or is counted:
    no_issue, no_fix, unended, too_little_left   left as they are (`actors.refiner`)
    lost, unfinished, unchanged                  no replica answered; the text has no end; it is the original
    unjudged, disagreement, still_failing        no readable critique; critiques that differ; the critic fails it again
    not_better, outdone, unpaired, margin        no larger share of claims; another of its query is taken; as many as a
                                                 query may have; too close in P(good)
    flaw_in_chosen, known, over_share            the cut loser begins the winner; another pair is the same, token by
                                                 token; more than the share of such pairs
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from actors.claim_revision import Candidate, Revision, preferred_revisions
from actors.critic import Critic
from actors.oversight import Judged
from actors.records import Critique, PreferencePair, RefinedResponse, Response, Verdict, draw_seed
from actors.refinement import refined_pair
from actors.refiner import Refiner, share_supported
from actors.rubrics import FAIL, PASS
from trainers.feedback.preferences import Pairs, PreferenceConfig, age_of
from trainers.feedback.segments import TokensSpanning
from trainers.feedback.selection import agreement_of_critiques
from trainers.journal import Journal
from trainers.loop_state import Rollouts


class _Mended(NamedTuple):
    """A failed answer and what it was mended to, judged."""

    item: Judged
    verdict: Verdict
    again: Judged


class _Preferred(NamedTuple):
    """A mended answer that passes, and the failed one that it is preferred to."""

    chosen: _Mended
    rejected: _Mended

    @property
    def gap(self) -> float:
        """Return by how much P(good) grew."""
        return (self.chosen.again.critic_verdict.score or 0.0) - (self.rejected.verdict.score or 0.0)


class Joined(NamedTuple):
    """An iteration's pairs with the refined ones at their end, and what became of the failed answers."""

    pairs: Pairs
    verdicts: Sequence[Verdict]
    """Those of the answers and of what is chosen in the refined pairs."""
    counts: Counter[str]
    """`failed` answers, `refined` pairs, and the others by cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refining:
    """How a run's failed answers become pairs."""

    refiner: Refiner
    critic: Critic
    preferences: PreferenceConfig
    min_agreement: float
    """Of the critiques of a mended answer, as of any other (`selection.min_agreement`)."""
    max_age: int
    """Greatest number of versions that the weights behind a failed answer may be behind those to be trained."""
    tokens_spanning: TokensSpanning
    run: str
    seed: int

    async def refine(
        self,
        rollouts: Rollouts,
        verdicts: Sequence[Verdict],
        *,
        journal: Journal,
        stop: Callable[[], None],
    ) -> None:
        """Have an iteration's failed answers mended and judged, into its records; what is there is not asked again."""
        failed = [item for item, _ in self._failed(rollouts, verdicts)]
        iteration = rollouts.iteration
        with rollouts.counting_lost("refinements"):
            async for rows in self.refiner.refine(failed, known=set(rollouts.refined)):
                stop()
                await journal.add("refinements", rows, iteration=iteration)
                rollouts.refined.update({row.refinement_id: row for row in rows})
        with rollouts.counting_lost("refinement critiques"):
            items = [(again.query, again.response) for again in self._mended(failed, rollouts)]
            async for critiques in self.critic.judge(items, known=set(rollouts.refined_critiques)):
                stop()
                await journal.add("refinement_critiques", critiques, iteration=iteration)
                rollouts.refined_critiques.update({row.critique_id: row for row in critiques})
        said = [again.critic_verdict for again in self._mended(failed, rollouts)]
        await journal.add("refinement_verdicts", said, iteration=iteration)

    def joined(self, built: Pairs, rollouts: Rollouts, verdicts: Sequence[Verdict]) -> Joined:
        """Return an iteration's pairs with those that its mended answers make, at most the share of all."""
        counts: Counter[str] = Counter()
        passing: list[_Mended] = []
        tried: list[_Mended] = []
        critiques = _by_refinement(rollouts)
        for item, verdict in self._failed(rollouts, verdicts):
            counts["failed"] += 1
            again = self._again(item, rollouts, critiques)
            if isinstance(again, str):
                counts[again] += 1
                continue
            tried.append(_Mended(item, verdict, again))
            if cause := self._failing(again):
                counts[cause] += 1
            else:
                passing.append(tried[-1])
        claims = self.refiner.config.kind == "claim_revision"
        preferred = _best_against_worst(passing, tried, counts) if claims else [_Preferred(one, one) for one in passing]
        pairs = self._pairs(preferred, built.pairs, counts)
        kept = self._share(pairs, num_others=len(built.pairs))
        counts["over_share"] = len(pairs) - len(kept)
        counts["refined"] = len(kept)
        return Joined(
            pairs=replace(built, pairs=(*built.pairs, *(pair for _, pair in kept))),
            verdicts=[*verdicts, *(one.chosen.again.critic_verdict for one, _ in kept)],
            counts=+counts,
        )

    def _failed(self, rollouts: Rollouts, verdicts: Sequence[Verdict]) -> list[tuple[Judged, Verdict]]:
        """Return the answers that fail and are young enough, each text once for a query, as they were sampled."""
        by_response = {verdict.response_id: verdict for verdict in verdicts}
        found: dict[tuple[str, str], tuple[Judged, Verdict]] = {}
        for item in rollouts.judged():
            verdict, response = by_response.get(item.response.response_id), item.response
            if verdict is None or verdict.label != FAIL:
                continue
            if age_of(response, version=rollouts.iteration - 1) <= self.max_age:
                found.setdefault((response.query_id, response.text), (item, verdict))
        return list(found.values())

    def _mended(self, failed: Sequence[Judged], rollouts: Rollouts) -> list[Judged]:
        """Return what there is of failed answers to be judged, with the critiques that are there."""
        critiques = _by_refinement(rollouts)
        found = [self._again(item, rollouts, critiques) for item in failed]
        return [again for again in found if isinstance(again, Judged)]

    def _again(self, item: Judged, rollouts: Rollouts, critiques: Mapping[str, Sequence[Critique]]) -> Judged | str:
        """Return what an answer was mended to with its critiques, or why there is nothing to be judged."""
        begun = self.refiner.begin(item)
        if isinstance(begun, str):
            return begun
        row = rollouts.refined.get(self.refiner.refinement_id(item))
        if row is None:
            return "lost"
        if row.finish_reason != "stop":
            return "unfinished"
        if row.text == item.response.text:
            return "unchanged"
        return _judged_again(item, row, critiques.get(row.refinement_id, ()))

    def _failing(self, again: Judged) -> str | None:
        """Return why a mended answer is not preferred to anything; None where it passes."""
        label = again.critic_verdict.label
        if label is None:
            return "unjudged"
        if agreement_of_critiques(again) < self.min_agreement:
            return "disagreement"
        return None if label == PASS else "still_failing"

    def _pairs(
        self, preferred: Sequence[_Preferred], others: Sequence[PreferencePair], counts: Counter[str]
    ) -> list[tuple[_Preferred, PreferencePair]]:
        """Return the pairs, those of a query by their gap, and count what makes none or one that is there already."""
        by_query: defaultdict[str, list[_Preferred]] = defaultdict(list)
        for one in preferred:
            by_query[one.chosen.item.query.query_id].append(one)
        seen = {(pair.query_id, pair.chosen, pair.rejected_token_ids) for pair in others}
        pairs: list[tuple[_Preferred, PreferencePair]] = []
        for query_id, found in by_query.items():
            num = 0
            for one in sorted(found, key=lambda one: -one.gap):
                pair = self._pair(one)
                if one.gap < self.preferences.margin:
                    counts["margin"] += 1
                elif pair is None:
                    counts["flaw_in_chosen"] += 1
                elif (key := (query_id, pair.chosen, pair.rejected_token_ids)) in seen:
                    counts["known"] += 1
                elif num == self.preferences.max_pairs_per_query:
                    counts["unpaired"] += 1
                else:
                    pairs.append((one, pair))
                    seen.add(key)
                    num += 1
        return pairs

    def _pair(self, one: _Preferred) -> PreferencePair | None:
        """Return the pair, its rejected answer cut where others are; None where that begins the chosen one."""
        chosen, rejected = one.chosen.again.response, one.rejected.item.response
        whole = {chosen.text: chosen.token_ids, rejected.text: rejected.token_ids}
        pair = refined_pair(
            one.chosen.item.query,
            rejected,
            chosen.text,
            margin=one.gap,
            source="critic",
            run=self.run,
            encode=whole.__getitem__,
        )
        if pair is None:
            return None
        cut, flaw_end = None, one.rejected.verdict.flaw_end
        if self.preferences.cut_at_flaw and flaw_end is not None:
            cut = self.tokens_spanning(rejected.token_ids, flaw_end)
        pair = replace(pair, chosen_id=chosen.response_id, rejected_token_ids=rejected.token_ids[:cut])
        begins = cut is not None and pair.chosen_token_ids[:cut] == pair.rejected_token_ids
        return None if begins else pair

    def _share(
        self, pairs: Sequence[tuple[_Preferred, PreferencePair]], *, num_others: int
    ) -> list[tuple[_Preferred, PreferencePair]]:
        """Return as many pairs as may stand beside others, drawn by the seed and in their order."""
        share = self.refiner.config.max_share
        most = len(pairs) if share == 1.0 else int(share / (1.0 - share) * num_others + 1e-9)

        def drawn(place: int) -> int:
            item = pairs[place][0].rejected.item
            coordinates = item.query.iteration, item.query.sample_index, item.response.sample_index
            return draw_seed(self.seed, "refined pairs", *coordinates)

        return [pairs[place] for place in sorted(sorted(range(len(pairs)), key=drawn)[:most])]


def _by_refinement(rollouts: Rollouts) -> Mapping[str, Sequence[Critique]]:
    found: defaultdict[str, list[Critique]] = defaultdict(list)
    for critique in rollouts.refined_critiques.values():
        found[critique.response_ids[0]].append(critique)
    return found


def _judged_again(item: Judged, row: RefinedResponse, critiques: Sequence[Critique]) -> Judged:
    response = Response(
        response_id=row.refinement_id,
        query_id=row.query_id,
        sample_index=row.sample_index,
        text=row.text,
        prompt_token_ids=item.response.prompt_token_ids,
        token_ids=row.token_ids,
        logprobs=(),
        policy_version=row.policy_version,
        finish_reason=row.finish_reason,
    )
    return Judged(
        query=item.query, response=response, critiques=tuple(sorted(critiques, key=lambda one: one.critique_id))
    )


def _best_against_worst(passing: Sequence[_Mended], tried: Sequence[_Mended], counts: Counter[str]) -> list[_Preferred]:
    """Return each query's best revision that passes against the worst of the answers that were revised (FenCE).

    By the share of claims that the critic supports; of equal revisions the surest is the best.
    """
    by_id = {one.item.response.response_id: one for one in tried}
    ordered = sorted(passing, key=lambda one: -(one.again.critic_verdict.score or 0.0))
    revised = [_revision(one.item, one.again) for one in ordered]
    originals = [_revision(one.item, one.item) for one in tried]
    found = [
        _Preferred(by_id[best.candidate.candidate_id], by_id[worst.candidate.candidate_id])
        for best, worst in preferred_revisions([*revised, *originals])
        if best.revised != best.candidate.text
    ]
    queries = {one.chosen.item.query.query_id for one in found}
    for one in passing:
        counts["outdone" if one.item.query.query_id in queries else "not_better"] += 1
    counts["outdone"] -= len(found)
    return found


def _revision(item: Judged, said: Judged) -> Revision:
    """Return an answer's revision, or the answer itself where it is what is said, with its score."""
    before = share_supported(item.critiques)
    return Revision(
        candidate=Candidate(candidate_id=item.response.response_id, group=item.query.query_id, text=item.response.text),
        claims=(),
        revised=said.response.text,
        score_before=before,
        score=share_supported(said.critiques),
        num_unread=0,
    )
