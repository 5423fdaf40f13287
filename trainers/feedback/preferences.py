"""Owns how verdicts become preference pairs: chosen passes, rejected fails, the gap in P(good) at least the margin.

Which answers are compared is a `Drawing`: best against worst, or a loss's own (trainers.feedback.rejection_pairs).
What gives no pair is dropped and counted (SCIENCE §3), by reason:
    all_pass, all_fail, no_verdict   queries with nothing to prefer
    unjudged, duplicate, unpaired    responses without a verdict, with a text that is there already, without a partner
    margin, same_text                candidate pairs too close in P(good), or judged both ways
    flaw_in_chosen                   candidate pairs whose chosen begins with the very flaw that its rejected is cut at
    over_limit                       pairs beyond preferences.max_pairs_per_query, where a loss draws its own candidates
    stale                            responses of weights older than the loop allows (loop.max_policy_age)

A rejected response is cut where the critique's first quoted flaw ends: what follows from a flaw is not at fault, and
pushing it down as well teaches a small model to babble. This is the critique's part in learning, after Step-DPO (Lai et
al. 2024, arXiv 2406.18629), which cuts both sides at the first wrong step; here the chosen stays whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from pydantic import Field

from actors.oversight import EXPERT
from actors.records import PreferencePair, Query, Response, Verdict, lineage_id, policy_number
from actors.rubrics import FAIL, PASS
from cluster.config import Config
from trainers.feedback.mixed_feedback import MixConfig


class PreferenceConfig(Config):
    """How pairs are chosen."""

    margin: float = Field(default=0.5, ge=0.0, le=1.0)
    """Least gap in P(good) between chosen and rejected."""
    max_pairs_per_query: int = Field(default=3, ge=1)
    """Best against worst, second best against second worst, and so on, each response once. A query's pairs of mended
    answers count too: they come after, and reject answers that are in no pair yet. Of the pairs that rso draws the
    first ones that stand are kept."""
    cut_at_flaw: bool = True
    """Train against a rejected response, or a bad one that is in no pair (kto), only up to the end of the first flaw
    that the critique quotes."""
    mix: MixConfig | None = None
    """How pairs of critic and experts are weighed against each other; None: alike, whoever judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The pairs of one iteration, and how many queries or candidates gave none, by reason."""

    pairs: tuple[PreferencePair, ...]
    dropped: Mapping[str, int]


class Candidates(NamedTuple):
    """Which of a query's answers are to be compared."""

    pairs: Sequence[tuple[Verdict, Verdict]]
    """Of one that passes and one that fails, in the order in which they are taken."""
    dropped: Mapping[str, int]
    """What is in none of them, by reason."""


Drawing: TypeAlias = Callable[[Query, Sequence[Verdict], Mapping[str, Response]], Candidates]
"""Gives a query's candidate pairs. Its verdicts, in any order, all have a label, and both labels are there."""


def build_pairs(
    queries: Sequence[Query],
    responses: Mapping[str, Response],
    verdicts: Sequence[Verdict],
    *,
    config: PreferenceConfig,
    run: str,
    tokens_spanning: Callable[[Sequence[int], int], int],
    version: int,
    max_age: int,
    drawing: Drawing | None = None,
) -> Pairs:
    """Return pairs in the order of the queries.

    Args:
        tokens_spanning: how many of the token ids it takes to spell so many characters.
        version: of the weights that the pairs are to train.
        max_age: greatest number of versions that a response's weights may be behind.
        drawing: which answers are compared; None: best against worst.
    """
    by_query: defaultdict[str, list[Verdict]] = defaultdict(list)
    dropped: Counter[str] = Counter()
    for verdict in verdicts:
        if age_of(responses[verdict.response_id], version=version) > max_age:
            dropped["stale"] += 1
        elif verdict.label is None:
            dropped["unjudged"] += 1
        else:
            by_query[verdict.query_id].append(verdict)
    pairs: list[PreferencePair] = []
    for query in sorted(queries, key=lambda q: (q.iteration, q.sample_index, q.query_id)):
        judged = by_query[query.query_id]
        labels = {verdict.label for verdict in judged}
        if not labels >= {PASS, FAIL}:
            dropped["all_pass" if PASS in labels else "all_fail" if FAIL in labels else "no_verdict"] += 1
            continue
        if drawing is None:
            candidates = _best_against_worst(judged, responses, most=config.max_pairs_per_query)
        else:
            candidates = drawing(query, judged, responses)
        dropped.update(candidates.dropped)
        num_before = len(pairs)
        for rank, (chosen, rejected) in enumerate(candidates.pairs):
            pair = _pair(
                query,
                chosen,
                rejected,
                responses,
                config=config,
                run=run,
                rank=rank,
                tokens_spanning=tokens_spanning,
                version=version,
            )
            if isinstance(pair, str):
                dropped[pair] += 1
            elif len(pairs) - num_before == config.max_pairs_per_query:
                dropped["over_limit"] += 1
            else:
                pairs.append(pair)
    return Pairs(pairs=tuple(pairs), dropped={reason: num for reason, num in dropped.items() if num})


def _best_against_worst(verdicts: Sequence[Verdict], responses: Mapping[str, Response], *, most: int) -> Candidates:
    """Return best against worst, second best against second worst, and so on, each text once on its side."""
    ordered = sorted(verdicts, key=lambda v: (-(v.score or 0.0), responses[v.response_id].sample_index))
    good = _distinct([v for v in ordered if v.label == PASS], responses)
    bad = _distinct([v for v in reversed(ordered) if v.label == FAIL], responses)
    pairs = list(zip(good, bad, strict=False))[:most]
    num_distinct = len(good) + len(bad)
    return Candidates(pairs, {"duplicate": len(verdicts) - num_distinct, "unpaired": num_distinct - 2 * len(pairs)})


def _distinct(verdicts: Sequence[Verdict], responses: Mapping[str, Response]) -> list[Verdict]:
    seen: dict[str, Verdict] = {}
    for verdict in verdicts:
        seen.setdefault(responses[verdict.response_id].text, verdict)
    return list(seen.values())


def _pair(
    query: Query,
    chosen: Verdict,
    rejected: Verdict,
    responses: Mapping[str, Response],
    *,
    config: PreferenceConfig,
    run: str,
    rank: int,
    tokens_spanning: Callable[[Sequence[int], int], int],
    version: int,
) -> PreferencePair | str:
    """Return the pair, or why there is none."""
    good, bad = responses[chosen.response_id], responses[rejected.response_id]
    gap = (chosen.score or 0.0) - (rejected.score or 0.0)
    if gap < config.margin:
        return "margin"
    if good.text == bad.text:
        return "same_text"
    cut = None
    if config.cut_at_flaw and rejected.flaw_end is not None:
        cut = tokens_spanning(bad.token_ids, rejected.flaw_end)
        if good.token_ids[:cut] == bad.token_ids[:cut]:
            return "flaw_in_chosen"
    return PreferencePair(
        pair_id=lineage_id(
            run,
            iteration=query.iteration,
            stage="pairs",
            parents=[good.response_id, bad.response_id],
            sample_index=rank,
        ),
        query_id=query.query_id,
        prompt=query.messages,
        chosen=good.text,
        rejected=bad.text,
        prompt_token_ids=good.prompt_token_ids,
        chosen_token_ids=good.token_ids,
        rejected_token_ids=bad.token_ids[:cut],
        margin=gap,
        weight=1.0,
        noise=0.0,
        source=EXPERT if EXPERT in (chosen.source, rejected.source) else chosen.source,
        chosen_id=good.response_id,
        rejected_id=bad.response_id,
        iteration=query.iteration,
        age=max(age_of(good, version=version), age_of(bad, version=version)),
        chosen_logprobs=good.logprobs,
        rejected_logprobs=bad.logprobs[:cut],
        other_margins=None,
    )


def age_of(response: Response, *, version: int) -> int:
    """Return how many versions a response's weights are behind those to be trained; they are named v0, v1, …"""
    return version - policy_number(response.policy_version)
