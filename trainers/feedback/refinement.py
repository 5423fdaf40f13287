"""Owns pairs that prefer mended answers to failed ones (L-DCR, L-FENCE): whom to mend, who judges, what is paired.

    failed answers ──► refiner ──► mended ──► critic ──► passes, and P(good) grew by the margin? ──► refined ≻ original

An answer that passes is never touched, nor is one in which no readable critique quotes a flaw. A mended answer is no
answer of the learner's: it has records of its own, is never put before experts, and counts neither towards their budget
nor towards the attack's success. A text that was sampled for the query as well is judged already, and nobody is asked
again: an expert's label of it stands (M-MIX), or else the verdict with the least P(good). Every failed answer, each
text once for a query, ends in a pair or is counted:
    no_issue, no_fix, unended,                   left as they are (`actors.refiner`)
    too_little_left, unwritable
    lost, unfinished, unchanged                  no replica answered; the text has no end; it is the original
    unjudged, disagreement, still_failing,       no readable critique; critiques that differ; the critic fails it again;
    overruled                                    it was sampled too, and an expert failed it
    not_better, outdone, paired                  no larger share of claims; another of its query is taken; a pair of two
                                                 answers rejects the original
    margin, same_text, flaw_in_chosen            too close in P(good); judged both ways; the cut loser begins the winner
    known, unpaired, noisy, over_share           another pair is the same, token by token; as many as a query may have;
                                                 noise of 1/2 or more; more than the share of such pairs
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from actors.claim_revision import Candidate, Revision, preferred_revisions
from actors.critic import Critic
from actors.oversight import EXPERT, Judged
from actors.records import Critique, PreferencePair, Query, RefinedResponse, Response, Verdict, draw_seed
from actors.refinement import refined_pair
from actors.refiner import Begun, Refiner, share_supported
from actors.rubrics import FAIL, PASS
from trainers.feedback.preferences import Pairs, PreferenceConfig, age_of
from trainers.feedback.segments import TokensSpanning
from trainers.feedback.selection import agreement_of_critiques
from trainers.journal import Journal
from trainers.loop_state import Rollouts


class _Again(NamedTuple):
    """A mended answer, judged."""

    judged: Judged
    """With the critiques of what it says."""
    verdict: Verdict
    """On what it says, as the mended answer's."""
    sampled: bool
    """The learner gave that very answer too: who judged it there has judged it here."""


class _Mended(NamedTuple):
    """A failed answer and what it was mended to."""

    item: Judged
    verdict: Verdict
    again: _Again

    @property
    def name(self) -> str:
        """Return the id of the mended answer."""
        return self.again.verdict.response_id


class _Preferred(NamedTuple):
    """A mended answer that passes, and the failed one that it is preferred to."""

    chosen: _Mended
    rejected: _Mended

    @property
    def gap(self) -> float:
        """Return by how much P(good) grew."""
        return (self.chosen.again.verdict.score or 0.0) - (self.rejected.verdict.score or 0.0)

    @property
    def source(self) -> str:
        """Return whose preference it is, as `preferences.build_pairs` says it."""
        sources = self.chosen.again.verdict.source, self.rejected.verdict.source
        return EXPERT if EXPERT in sources else sources[0]


class Joined(NamedTuple):
    """An iteration's pairs with the refined ones at their end, before any of them is left out."""

    pairs: Pairs
    verdicts: Sequence[Verdict]
    """Those of the answers and of what is chosen in the refined pairs."""
    causes: Mapping[str, str | None]
    """Why a failed answer made no pair, by the id of what it is mended to; None where it made one."""

    def fates(self, told: Sequence[PreferencePair], kept: Sequence[PreferencePair]) -> Counter[str]:
        """Return what became of the failed answers: `failed`, those `refined`, and the others by cause.

        Args:
            told: the pairs that were left when noise and weight were known.
            kept: the pairs that are trained on.
        """
        left, trained = ({pair.chosen_id for pair in pairs} for pairs in (told, kept))
        counts = Counter(failed=len(self.causes))
        for name, cause in self.causes.items():
            counts["refined" if name in trained else cause or ("over_share" if name in left else "noisy")] += 1
        return +counts


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
        """Have an iteration's failed answers mended and judged, into its records; what is there is not asked again.

        Once their verdicts are stored, or the pairs are, these stand: what was lost before stays so.
        """
        failed = [item for item, _ in self._failed(rollouts, verdicts)]
        if rollouts.refinement_stands:
            self._count_lost(failed, rollouts, verdicts)
            return
        iteration = rollouts.iteration
        with rollouts.counting_lost("refinements"):
            async for rows in self.refiner.refine(failed, known=set(rollouts.refined)):
                stop()
                await journal.add("refinements", rows, iteration=iteration)
                rollouts.refined.update({row.refinement_id: row for row in rows})
        with rollouts.counting_lost("refinement critiques"):
            unread = self._unread(failed, rollouts, verdicts)
            async for critiques in self.critic.judge(unread, known=set(rollouts.refined_critiques)):
                stop()
                await journal.add("refinement_critiques", critiques, iteration=iteration)
                rollouts.refined_critiques.update({row.critique_id: row for row in critiques})
        said = [again.verdict for again in self._mended(failed, rollouts, verdicts)]
        await journal.add("refinement_verdicts", said, iteration=iteration)
        rollouts.refined_verdicts.update({verdict.response_id: verdict for verdict in said})

    def joined(self, built: Pairs, rollouts: Rollouts, verdicts: Sequence[Verdict]) -> Joined:
        """Return an iteration's pairs with those that its mended answers make."""
        causes: dict[str, str | None] = {}
        passing: list[_Mended] = []
        tried: list[_Mended] = []
        known, critiques = self._sampled(rollouts, verdicts), _by_refinement(rollouts)
        for item, verdict in self._failed(rollouts, verdicts):
            name, again = self.refiner.refinement_id(item), self._again(item, rollouts, known, critiques)
            if isinstance(again, str):
                causes[name] = again
                continue
            tried.append(_Mended(item, verdict, again))
            causes[name] = self._failing(again)
            if causes[name] is None:
                passing.append(tried[-1])
        rejected = {(pair.query_id, pair.rejected) for pair in built.pairs}
        if self.refiner.config.kind == "claim_revision":
            preferred = _best_against_worst(passing, tried, causes, rejected)
        else:
            preferred = [_Preferred(one, one) for one in passing]
        made = self._pairs(preferred, built.pairs, causes, rejected)
        return Joined(
            pairs=replace(built, pairs=(*built.pairs, *(pair for _, pair in made))),
            verdicts=[*verdicts, *(one.chosen.again.verdict for one, _ in made)],
            causes=causes,
        )

    def within_share(self, pairs: Pairs, rollouts: Rollouts) -> Pairs:
        """Return pairs of which at most the share are refined; which of these stay is drawn by the run's seed."""
        share = self.refiner.config.max_share
        refined = [pair for pair in pairs.pairs if pair.chosen_id in rollouts.refined]
        if share == 1.0 or not refined:
            return pairs
        num_others = len(pairs.pairs) - len(refined)

        def drawn(pair: PreferencePair) -> int:
            places = rollouts.queries[pair.query_id].sample_index, rollouts.responses[pair.rejected_id].sample_index
            return draw_seed(self.seed, "refined pairs", pair.iteration, *places)

        left_out = sorted(refined, key=drawn)[int(share / (1.0 - share) * num_others + 1e-9) :]
        over = {pair.pair_id for pair in left_out}
        return replace(pairs, pairs=tuple(pair for pair in pairs.pairs if pair.pair_id not in over))

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

    def _sampled(
        self, rollouts: Rollouts, verdicts: Sequence[Verdict]
    ) -> Mapping[tuple[str, str], tuple[Judged, Verdict]]:
        """Return the answers that have been judged with their verdicts, by query and text.

        Of equal ones that which an expert judged, or else that of the least P(good). Those whose critiques agree too
        little are among them, though `verdicts` no longer has theirs.
        """
        by_response = {verdict.response_id: verdict for verdict in verdicts}
        found: dict[tuple[str, str], tuple[Judged, Verdict]] = {}
        for item in rollouts.judged():
            verdict = by_response.get(item.response.response_id)
            if verdict is None and agreement_of_critiques(item) < self.min_agreement:
                verdict = item.critic_verdict
            if verdict is None or verdict.label is None:
                continue
            key = item.query.query_id, item.response.text
            if key not in found or _precedence(verdict) < _precedence(found[key][1]):
                found[key] = item, verdict
        return found

    def _mended(self, failed: Sequence[Judged], rollouts: Rollouts, verdicts: Sequence[Verdict]) -> list[_Again]:
        """Return what there is of failed answers to be judged, with the critiques that are there."""
        known, critiques = self._sampled(rollouts, verdicts), _by_refinement(rollouts)
        found = [self._again(item, rollouts, known, critiques) for item in failed]
        return [again for again in found if isinstance(again, _Again)]

    def _unread(
        self, failed: Sequence[Judged], rollouts: Rollouts, verdicts: Sequence[Verdict]
    ) -> list[tuple[Query, Response]]:
        """Return the mended answers that the critic is to judge: those that were not sampled as well."""
        found = self._mended(failed, rollouts, verdicts)
        return [(again.judged.query, again.judged.response) for again in found if not again.sampled]

    def _count_lost(self, failed: Sequence[Judged], rollouts: Rollouts, verdicts: Sequence[Verdict]) -> None:
        """Count what the sitting that stored the verdicts found no answer to."""
        missing = [item for item in failed if self.refiner.refinement_id(item) not in rollouts.refined]
        unread = self._unread(failed, rollouts, verdicts)
        rollouts.lost["refinements"] += sum(isinstance(self.refiner.begin(item), Begun) for item in missing)
        rollouts.lost["refinement critiques"] += self.critic.num_missing(unread, known=rollouts.refined_critiques)
        rollouts.lost = +rollouts.lost

    def _again(
        self,
        item: Judged,
        rollouts: Rollouts,
        known: Mapping[tuple[str, str], tuple[Judged, Verdict]],
        critiques: Mapping[str, Sequence[Critique]],
    ) -> _Again | str:
        """Return what an answer was mended to and what is said of it, or why there is nothing to be judged."""
        row = rollouts.refined.get(self.refiner.refinement_id(item))
        if row is None:
            begun = self.refiner.begin(item)
            return begun if isinstance(begun, str) else "lost"
        if row.finish_reason != "stop":
            return "unfinished"
        if row.text == item.response.text:
            return "unchanged"
        sampled = known.get((row.query_id, row.text))
        judged = _judged_again(item, row, sampled[0].critiques if sampled else critiques.get(row.refinement_id, ()))
        said = judged.critic_verdict
        if sampled:
            named, said = said, sampled[1]
            said = replace(
                said, verdict_id=named.verdict_id, response_id=named.response_id, escalated=False, drawn=False
            )
        # What was stored is what pairs were made of, whatever has come in since.
        return _Again(judged, rollouts.refined_verdicts.get(row.refinement_id, said), sampled is not None)

    def _failing(self, again: _Again) -> str | None:
        """Return why a mended answer is not preferred to anything; None where it passes."""
        by_expert = again.verdict.source == EXPERT
        if again.verdict.label is None:
            return "unjudged"
        if not by_expert and agreement_of_critiques(again.judged) < self.min_agreement:
            return "disagreement"
        if again.verdict.label == PASS:
            return None
        return "overruled" if by_expert else "still_failing"

    def _pairs(
        self,
        preferred: Sequence[_Preferred],
        others: Sequence[PreferencePair],
        causes: dict[str, str | None],
        rejected: Container[tuple[str, str]],
    ) -> list[tuple[_Preferred, PreferencePair]]:
        """Return the pairs, those of a query by their gap; what makes none, or one that is there already, says why."""
        by_query: defaultdict[str, list[_Preferred]] = defaultdict(list)
        for one in preferred:
            by_query[one.chosen.item.query.query_id].append(one)
        seen = {(pair.query_id, pair.chosen, pair.rejected_token_ids) for pair in others}
        num_of = Counter(pair.query_id for pair in others)
        pairs: list[tuple[_Preferred, PreferencePair]] = []
        for query_id, found in by_query.items():
            for one in sorted(found, key=lambda one: -one.gap):
                pair = self._pair(one)
                cause: str | None = None
                if (query_id, one.rejected.item.response.text) in rejected:
                    cause = "paired"
                elif one.gap < self.preferences.margin:
                    cause = "margin"
                elif isinstance(pair, str):
                    cause = pair
                elif (key := (query_id, pair.chosen, pair.rejected_token_ids)) in seen:
                    cause = "known"
                elif num_of[query_id] >= self.preferences.max_pairs_per_query:
                    cause = "unpaired"
                else:
                    pairs.append((one, pair))
                    seen.add(key)
                    num_of[query_id] += 1
                causes[one.chosen.name] = cause
        return pairs

    def _pair(self, one: _Preferred) -> PreferencePair | str:
        """Return the pair, its rejected answer cut where others are, or why there is none."""
        chosen, rejected = one.chosen.again.judged.response, one.rejected.item.response
        cut, flaw_end = None, one.rejected.verdict.flaw_end
        if self.preferences.cut_at_flaw and flaw_end is not None:
            cut = self.tokens_spanning(rejected.token_ids, flaw_end)
        pair = refined_pair(
            one.chosen.item.query,
            rejected,
            chosen.text,
            token_ids=chosen.token_ids,
            refined_id=chosen.response_id,
            margin=one.gap,
            source=one.source,
            run=self.run,
        )
        if pair is None:
            return "same_text"
        pair = replace(pair, rejected_token_ids=rejected.token_ids[:cut])
        begins = cut is not None and pair.chosen_token_ids[:cut] == pair.rejected_token_ids
        return "flaw_in_chosen" if begins else pair


def _precedence(verdict: Verdict) -> tuple[bool, float]:
    """Return a key by which the verdict that stands for a text comes first: an expert's, then the least P(good)."""
    return verdict.source != EXPERT, verdict.score or 0.0


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


def _best_against_worst(
    passing: Sequence[_Mended],
    tried: Sequence[_Mended],
    causes: dict[str, str | None],
    rejected: Container[tuple[str, str]],
) -> list[_Preferred]:
    """Return each query's best revision that passes against the worst of the answers that were revised (FenCE).

    By the share of claims that the critic supports; of equal revisions the surest is the best. An answer that another
    pair rejects is not rejected again.
    """
    by_id = {one.item.response.response_id: one for one in tried}
    ordered = sorted(passing, key=lambda one: -(one.again.verdict.score or 0.0))
    free = [one for one in tried if (one.item.query.query_id, one.item.response.text) not in rejected]
    found = [
        _Preferred(by_id[best.candidate.candidate_id], by_id[worst.candidate.candidate_id])
        for best, worst in preferred_revisions(
            [_revision(one.item, one.again.judged) for one in ordered],
            against=[_revision(one.item, one.item) for one in free],
        )
    ]
    taken, left = ({one.item.query.query_id for one in some} for some in ([one.chosen for one in found], free))
    for one in passing:
        query_id = one.item.query.query_id
        causes[one.name] = "outdone" if query_id in taken else "not_better" if query_id in left else "paired"
    return found


def _revision(item: Judged, said: Judged) -> Revision:
    """Return an answer's revision, or the answer itself where it is what is said, with its score."""
    before = share_supported(item)
    return Revision(
        candidate=Candidate(candidate_id=item.response.response_id, group=item.query.query_id, text=item.response.text),
        claims=(),
        revised=said.response.text,
        score_before=before,
        score=share_supported(said),
        num_unread=0,
    )
