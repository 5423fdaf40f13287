"""Owns what an update trains on: an iteration's records as the rows that its loss takes.

    a loss of …                       takes
    pairs, unpaired responses         the preference pairs (trainers.preferences)
    scored samples (policy gradient)  every judged response with its verdict's score, copies too: they are the policy's
    tokens (sft, …)                   the responses that pass, each text once per query: rejection-sampling fine-tuning

A loss that reads spans is also told where in a response the critiques found fault.

What gives no row is dropped and counted (SCIENCE §3), by reason: `stale` and `unjudged` as for pairs; of tokens also
`rejected` and `duplicate`. Knows no DeepSpeed and no torch: a rank makes tensors of the table (trainers.batches).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from actors.oversight import Judged
from actors.records import PreferencePair, Response, Verdict, to_table
from actors.rubrics import PASS
from trainers.losses import PairBatch, SpanLoss, TokenBatch, UnpairedBatch, load_loss
from trainers.policy_gradient import PolicyLoss
from trainers.preferences import Pairs, age_of

Material: TypeAlias = Literal["pairs", "samples", "accepted"]
TokensSpanning: TypeAlias = Callable[[Sequence[int], int], int]
"""How many of the token ids it takes to spell so many characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The rows of one iteration's update."""

    table: pa.Table
    row_ids: tuple[str, ...]
    """One for each row of the table, in its order."""
    places: tuple[str, ...]
    """Where each row stands in its iteration, whatever the run's name: its query and its samples."""
    response_ids: tuple[str, ...]
    """The samples that the rows are made of; a pair has two."""
    dropped: Mapping[str, int]
    """What gave no row, by reason."""


def material_of(loss: str) -> Material | None:
    """Return what a loss trains a policy on; None where it takes what the loop does not make.

    Raises:
        ValueError: there is no such loss.
    """
    module = load_loss(loss)
    if module.batch in (PairBatch, UnpairedBatch):
        return "pairs"
    if isinstance(module, PolicyLoss):
        return "samples"
    return "accepted" if module.batch is TokenBatch else None


def reads_spans(loss: str) -> bool:
    """Return whether a loss looks at where critiques found fault."""
    module = load_loss(loss)
    return isinstance(module, SpanLoss) and module.reads_spans


def of_pairs(pairs: Pairs, place: Callable[[PreferencePair], str]) -> TrainingData:
    """Return pairs as they are.

    Args:
        place: of a pair, as in `TrainingData.places`.
    """
    return TrainingData(
        table=to_table(pairs.pairs, PreferencePair),
        row_ids=tuple(pair.pair_id for pair in pairs.pairs),
        places=tuple(map(place, pairs.pairs)),
        response_ids=tuple(response_id for pair in pairs.pairs for response_id in (pair.chosen_id, pair.rejected_id)),
        dropped=pairs.dropped,
    )


def of_samples(
    judged: Sequence[Judged], verdicts: Sequence[Verdict], *, version: int, max_age: int, spans: TokensSpanning | None
) -> TrainingData:
    """Return every response that has a verdict, with its score, its group (the query) and its log-probs as sampled.

    Args:
        judged: all responses, in the order in which they were sampled.
        verdicts: of some of them.
        version: of the weights that are to be trained.
        max_age: greatest number of versions that a response's weights may be behind.
        spans: reward also the tokens at which critiques found fault; how many tokens it takes to spell some characters.
    """
    chosen, dropped = _fresh(judged, verdicts, version=version, max_age=max_age)
    responses = [item.response for item, _ in chosen]
    columns = {
        **_tokens(responses),
        "response_logprobs": pa.array([list(row.logprobs) for row in responses], pa.list_(pa.float64())),
        "query_id": pa.array([row.query_id for row in responses], pa.string()),
        "score": pa.array([verdict.score for _, verdict in chosen], pa.float64()),
        "finish_reason": pa.array([row.finish_reason for row in responses], pa.string()),
        "age": pa.array([age_of(row, version=version) for row in responses], pa.int64()),
    }
    if spans is not None:
        rewards = [_segment_rewards(item, spans) for item, _ in chosen]
        columns["segment_rewards"] = pa.array(rewards, pa.list_(pa.float64()))
    return _data(pa.table(columns), [item for item, _ in chosen], dropped)


def of_accepted(
    judged: Sequence[Judged], verdicts: Sequence[Verdict], *, version: int, max_age: int, spans: TokensSpanning | None
) -> TrainingData:
    """Return the responses that pass, each text once for a query; the arguments are those of `of_samples`.

    With `spans` also the responses that fail at a flaw which the critique quotes, up to its end, the flaw flagged: what
    comes before it is not at fault, and what follows from it teaches nothing.
    """
    chosen, dropped = _fresh(judged, verdicts, version=version, max_age=max_age)
    kept: dict[tuple[str, str], tuple[Judged, list[bool]]] = {}
    for item, verdict in chosen:
        key = item.response.query_id, item.response.text
        flags = [False] * len(item.response.token_ids)
        if verdict.label != PASS:
            flags = [] if spans is None else _flags_to_the_flaw(item, verdict, spans)
        if not flags:
            dropped["rejected"] += 1
        elif key in kept:
            dropped["duplicate"] += 1
        else:
            kept[key] = item, flags
    items = [item for item, _ in kept.values()]
    cut = [replace(item.response, token_ids=item.response.token_ids[: len(flags)]) for item, flags in kept.values()]
    columns = _tokens(cut)
    if spans is not None:
        columns["flagged"] = pa.array([flags for _, flags in kept.values()], pa.list_(pa.bool_()))
    return _data(pa.table(columns), items, dropped)


def _segment_rewards(item: Judged, spans: TokensSpanning) -> list[float]:
    """Return -1 on the last token of each stretch that a critique points at, shared by the response's critiques."""
    rewards = [0.0] * len(item.response.token_ids)
    for critique in item.critiques:
        for end in {issue.end for issue in critique.issues}:
            if last := spans(item.response.token_ids, end):
                rewards[last - 1] -= 1.0 / len(item.critiques)
    return rewards


def _flags_to_the_flaw(item: Judged, verdict: Verdict, spans: TokensSpanning) -> list[bool]:
    """Return, for each token up to the end of the first quoted flaw, whether it is the flaw's; [] without a quote."""
    starts = [issue.start for critique in item.critiques for issue in critique.issues if issue.end == verdict.flaw_end]
    if verdict.flaw_end is None or not starts:
        return []
    num_tokens = spans(item.response.token_ids, verdict.flaw_end)
    first = spans(item.response.token_ids, min(starts) + 1) - 1
    return [token >= first for token in range(num_tokens)]


def _fresh(
    judged: Sequence[Judged], verdicts: Sequence[Verdict], *, version: int, max_age: int
) -> tuple[list[tuple[Judged, Verdict]], Counter[str]]:
    """Return the responses that have a verdict and are young enough, and how many are not."""
    verdict_of = {verdict.response_id: verdict for verdict in verdicts}
    dropped: Counter[str] = Counter()
    chosen = []
    for item in judged:
        verdict = verdict_of.get(item.response.response_id)
        if age_of(item.response, version=version) > max_age:
            dropped["stale"] += 1
        elif verdict is None or verdict.label is None:
            dropped["unjudged"] += 1
        else:
            chosen.append((item, verdict))
    return chosen, dropped


def _tokens(responses: Sequence[Response]) -> dict[str, Any]:
    ids = pa.list_(pa.int64())
    return {
        "row_id": pa.array([row.response_id for row in responses], pa.string()),
        "prompt_token_ids": pa.array([list(row.prompt_token_ids) for row in responses], ids),
        "response_token_ids": pa.array([list(row.token_ids) for row in responses], ids),
    }


def _data(table: pa.Table, items: Sequence[Judged], dropped: Mapping[str, int]) -> TrainingData:
    row_ids = tuple(item.response.response_id for item in items)
    return TrainingData(
        table=table,
        row_ids=row_ids,
        places=tuple(f"{item.query.sample_index}/{item.response.sample_index}" for item in items),
        response_ids=row_ids,
        dropped={reason: num for reason, num in dropped.items() if num},
    )
