"""Owns how verdicts become preference pairs: chosen passes, rejected fails, the gap in P(good) at least the margin.

What gives no pair is dropped and counted (SCIENCE §3), by reason:
    all_pass, all_fail, no_verdict   queries with nothing to prefer
    unjudged, duplicate, unpaired    responses without a verdict, with a text that is there already, without a partner
    margin, same_text                candidate pairs too close in P(good), or judged both ways
    flaw_in_chosen                   candidate pairs whose chosen begins with the very flaw that its rejected is cut at
    stale                            responses of weights older than the loop allows (loop.max_policy_age)

A rejected response is cut where the critique's first quoted flaw ends: what follows from a flaw is not at fault, and
pushing it down as well teaches a small model to babble. This is the critique's part in learning, after Step-DPO (Lai et
al. 2024, arXiv 2406.18629), which cuts both sides at the first wrong step; here the chosen stays whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    answers count too: they come after, and reject answers that are in no pair yet."""
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
) -> Pairs:
    """Return best-versus-worst pairs, in the order of the queries.

    Args:
        tokens_spanning: how many of the token ids it takes to spell so many characters.
        version: of the weights that the pairs are to train.
        max_age: greatest number of versions that a response's weights may be behind.
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
        good, bad = _sides(by_query[query.query_id], responses)
        if not good or not bad:
            reason = "all_pass" if good else "all_fail" if bad else "no_verdict"
            dropped[reason] += 1
            continue
        dropped["duplicate"] += len(by_query[query.query_id]) - len(good) - len(bad)
        num_matched = min(len(good), len(bad), config.max_pairs_per_query)
        dropped["unpaired"] += len(good) + len(bad) - 2 * num_matched
        for rank, (chosen, rejected) in enumerate(zip(good, bad, strict=False)):
            if rank == num_matched:
                break
            gap = (chosen.score or 0.0) - (rejected.score or 0.0)
            if gap < config.margin:
                dropped["margin"] += 1
            elif responses[chosen.response_id].text == responses[rejected.response_id].text:
                dropped["same_text"] += 1
            else:
                cut = None
                if config.cut_at_flaw and rejected.flaw_end is not None:
                    cut = tokens_spanning(responses[rejected.response_id].token_ids, rejected.flaw_end)
                pair = _pair(query, chosen, rejected, responses, gap=gap, run=run, rank=rank, cut=cut, version=version)
                if cut is not None and pair.chosen_token_ids[:cut] == pair.rejected_token_ids:
                    dropped["flaw_in_chosen"] += 1
                else:
                    pairs.append(pair)
    return Pairs(pairs=tuple(pairs), dropped={reason: num for reason, num in dropped.items() if num})


def _sides(verdicts: Sequence[Verdict], responses: Mapping[str, Response]) -> tuple[list[Verdict], list[Verdict]]:
    """Return the passing verdicts, best first, and the failing ones, worst first, each text once."""
    ordered = sorted(verdicts, key=lambda v: (-(v.score or 0.0), responses[v.response_id].sample_index))
    good = _distinct([v for v in ordered if v.label == PASS], responses)
    bad = _distinct([v for v in reversed(ordered) if v.label == FAIL], responses)
    return good, bad


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
    gap: float,
    run: str,
    rank: int,
    cut: int | None,
    version: int,
) -> PreferencePair:
    good, bad = responses[chosen.response_id], responses[rejected.response_id]
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
