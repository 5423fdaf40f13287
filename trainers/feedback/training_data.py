"""Owns what an update trains on: an iteration's records as the rows that its loss takes.

    a loss of …                       takes
    pairs                             the preference pairs (trainers.feedback.preferences)
    unpaired responses                every response with a verdict, each text once per query, good or bad by that
    scored samples (policy gradient)  every response with a score, its verdict's or a reward model's, copies too: they
                                      are the policy's
    groups                            each query with its judged responses, each text once, and their verdicts' scores
    tokens (sft, …), labels           the responses that pass, each text once per query: rejection-sampling fine-tuning;
                                      a loss of labels takes their tokens for the labels of a weak or noisy labeller

A loss that reads spans is also told where in a response the critiques found fault; one that reads prompts has their
tokens as targets too.

What gives no row is dropped and counted (SCIENCE §3), by reason: `stale` and `unjudged` as for pairs; of tokens also
`rejected` and `duplicate`; of unpaired responses `duplicate`, and bad ones that are cut at a flaw with which a good one
begins (`flaw_in_passing`); of groups `duplicate` responses, and queries that are left with one response (`lone`) or
whose scores are all equal, where that teaches nothing (`equal_scores`). Knows no DeepSpeed and no torch: a rank makes
tensors of the table (trainers.rows).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import pyarrow as pa

from actors.oversight import EXPERT, Judged
from actors.records import LeftOut, PreferencePair, Response, Verdict, lineage_id, to_table
from actors.rubrics import PASS
from trainers.feedback.preferences import Pairs, age_of
from trainers.feedback.segments import SegmentSettings, TokensSpanning, rewards_of
from trainers.losses import (
    DocumentLoss,
    GroupBatch,
    LabelBatch,
    PairBatch,
    SpanLoss,
    TokenBatch,
    UnpairedBatch,
    load_loss,
)
from trainers.policy_gradient import PolicyLoss

Known = TypeVar("Known")
Material: TypeAlias = Literal["pairs", "judged", "samples", "groups", "accepted"]


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


CORRECTED: frozenset[Material] = frozenset({"pairs", "judged", "groups"})
"""What a rank corrects for its age by `loop.importance`; of samples the policy-gradient losses see to it themselves."""


def material_of(loss: str) -> Material | None:
    """Return what a loss trains a policy on; None where it takes what the loop does not make.

    Raises:
        ValueError: there is no such loss.
    """
    module = load_loss(loss)
    if module.batch is PairBatch:
        return "pairs"
    if module.batch is UnpairedBatch:
        return "judged"
    if isinstance(module, PolicyLoss):
        return "samples"
    if module.batch is GroupBatch:
        return "groups"
    return "accepted" if module.batch in (TokenBatch, LabelBatch) else None


def learns_from_equals(loss: str) -> bool:
    """Return whether equal scores teach a loss of groups anything.

    One with a reference is told to stay as near to it for every response; one without would make one of them likelier,
    and none is better.
    """
    return load_loss(loss).uses_reference


def reads_spans(loss: str) -> bool:
    """Return whether a loss looks at where critiques found fault."""
    module = load_loss(loss)
    return isinstance(module, SpanLoss) and module.reads_spans


def reads_prompts(loss: str) -> bool:
    """Return whether a loss learns the prompt's tokens like the response's."""
    module = load_loss(loss)
    return isinstance(module, DocumentLoss) and module.reads_prompts


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
    judged: Sequence[Judged],
    verdicts: Sequence[Verdict],
    *,
    version: int,
    max_age: int,
    spans: TokensSpanning,
    segments: SegmentSettings | None = None,
    scores: Mapping[str, float] | None = None,
) -> TrainingData:
    """Return every response that has a score, with that, its group (the query) and its log-probs as sampled.

    Args:
        judged: all responses, in the order in which they were sampled.
        verdicts: of some of them.
        version: of the weights that are to be trained.
        max_age: greatest number of versions that a response's weights may be behind.
        spans: how many tokens it takes to spell some characters.
        segments: reward also the tokens that critiques praise and fault, in this way.
        scores: by response id, in the place of the verdicts'; None: a response's score is its verdict's.
    """
    labelled = _with_label(verdicts)
    known: Mapping[str, float | None] = (
        {name: verdict.score for name, verdict in labelled.items()} if scores is None else scores
    )
    chosen, dropped = _fresh(judged, known, version=version, max_age=max_age)
    responses = [item.response for item, _ in chosen]
    columns = {
        **_tokens(responses),
        "response_logprobs": pa.array([list(row.logprobs) for row in responses], pa.list_(pa.float64())),
        "query_id": pa.array([row.query_id for row in responses], pa.string()),
        "score": pa.array([score for _, score in chosen], pa.float64()),
        "finish_reason": pa.array([row.finish_reason for row in responses], pa.string()),
        "age": pa.array([age_of(row, version=version) for row in responses], pa.int64()),
    }
    if segments is not None:
        rewards = [rewards_of(item, labelled.get(item.response.response_id), segments, spans) for item, _ in chosen]
        columns["segment_rewards"] = pa.array(rewards, pa.list_(pa.float64()))
    return _data(pa.table(columns), [item for item, _ in chosen], dropped)


def of_groups(
    judged: Sequence[Judged], verdicts: Sequence[Verdict], *, version: int, max_age: int, equals: bool
) -> TrainingData:
    """Return each query with its judged responses, as `trainers.rows.groups` reads them.

    Responses that differ in white space alone are one. Its reward is the mean score of their verdicts, of experts'
    alone where there are any; its tokens are those of the first.

    Args:
        judged: all responses, in the order in which they were sampled.
        verdicts: of some of them.
        version: of the weights that are to be trained.
        max_age: greatest number of versions that a response's weights may be behind.
        equals: keep also the queries whose responses all have one reward.
    """
    chosen, dropped = _fresh(judged, _with_label(verdicts), version=version, max_age=max_age)
    groups: list[list[Judged]] = []
    rewards: list[list[float]] = []
    for texts in _by_text(chosen):
        scores = [_reward([verdict for _, verdict in copies]) for copies in texts]
        dropped["duplicate"] += sum(len(copies) - 1 for copies in texts)
        if len(texts) < 2:
            dropped["lone"] += 1
        elif len(set(scores)) == 1 and not equals:
            dropped["equal_scores"] += 1
        else:
            groups.append([copies[0][0] for copies in texts])
            rewards.append(scores)
    ids = pa.list_(pa.int64())
    responses = [[item.response for item in group] for group in groups]
    columns = {
        "row_id": pa.array([group[0].query.query_id for group in groups], pa.string()),
        "prompt_token_ids": pa.array([list(group[0].prompt_token_ids) for group in responses], ids),
        "responses_token_ids": pa.array([[list(row.token_ids) for row in group] for group in responses], pa.list_(ids)),
        "rewards": pa.array(rewards, pa.list_(pa.float64())),
        "responses_logprobs": pa.array(
            [[list(row.logprobs) for row in group] for group in responses], pa.list_(pa.list_(pa.float64()))
        ),
        "age": pa.array([max(age_of(row, version=version) for row in group) for group in responses], pa.int64()),
    }
    return TrainingData(
        table=pa.table(columns),
        row_ids=tuple(group[0].query.query_id for group in groups),
        places=tuple(str(group[0].query.sample_index) for group in groups),
        response_ids=tuple(row.response_id for group in responses for row in group),
        dropped={reason: num for reason, num in dropped.items() if num},
    )


def of_judged(
    judged: Sequence[Judged], verdicts: Sequence[Verdict], *, version: int, max_age: int, spans: TokensSpanning | None
) -> TrainingData:
    """Return the responses that have a verdict, each text once for a query, with what it says: good or bad.

    Responses that differ in white space alone are one. It is good where the mean score of their verdicts, of experts'
    alone where there are any, is 1/2 or more; its tokens are those of the first whose own verdict says the same. The
    arguments are those of `of_samples`; with `spans` a bad one is cut where the first flaw that the critique quotes
    ends, as the rejected response of a pair is (trainers.feedback.preferences).
    """
    chosen, dropped = _fresh(judged, _with_label(verdicts), version=version, max_age=max_age)
    kept: list[tuple[Judged, bool, int]] = []
    for texts in _by_text(chosen):
        dropped["duplicate"] += sum(len(copies) - 1 for copies in texts)
        thumbs = [_thumb(copies, spans) for copies in texts]
        good = [item.response.token_ids for item, is_good, _ in thumbs if is_good]
        bad: set[tuple[int, ...]] = set()
        for item, is_good, num_tokens in thumbs:
            token_ids = item.response.token_ids[:num_tokens]
            if not is_good and num_tokens < len(item.response.token_ids):
                if any(other[:num_tokens] == token_ids for other in good):
                    dropped["flaw_in_passing"] += 1
                    continue
                if token_ids in bad:
                    dropped["duplicate"] += 1
                    continue
                bad.add(token_ids)
            kept.append((item, is_good, num_tokens))
    cut = [
        replace(item.response, token_ids=item.response.token_ids[:num], logprobs=item.response.logprobs[:num])
        for item, _, num in kept
    ]
    columns = {
        **_tokens(cut),
        "desirable": pa.array([is_good for _, is_good, _ in kept], pa.bool_()),
        "weight": pa.array([1.0] * len(kept), pa.float64()),
        "age": pa.array([age_of(row, version=version) for row in cut], pa.int64()),
        "response_logprobs": pa.array([list(row.logprobs) for row in cut], pa.list_(pa.float64())),
    }
    return _data(pa.table(columns), [item for item, _, _ in kept], dropped)


def of_accepted(
    judged: Sequence[Judged],
    verdicts: Sequence[Verdict],
    *,
    version: int,
    max_age: int,
    spans: TokensSpanning | None,
    prompts: bool = False,
) -> TrainingData:
    """Return the responses that pass, each text once for a query; the arguments are those of `of_samples`.

    With `prompts` the query's tokens are targets too. With `spans` also the responses that fail at a flaw which the
    critique quotes, up to its end, the flaw flagged: what comes before it is not at fault, and what follows from it
    teaches nothing.
    """
    chosen, dropped = _fresh(judged, _with_label(verdicts), version=version, max_age=max_age)
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
    if prompts:
        every = [[True] * (len(row.prompt_token_ids) + len(row.token_ids)) for row in cut]
        columns["loss_mask"] = pa.array(every, pa.list_(pa.bool_()))
    return _data(pa.table(columns), items, dropped)


def left_out(
    judged: Sequence[Judged],
    verdicts: Sequence[Verdict],
    data: TrainingData,
    *,
    material: Material,
    run: str,
    iteration: int,
) -> list[LeftOut]:
    """Return the responses that could have been rows and are none: too old, equal to another, not to be trusted.

    Of accepted responses those that fail are not meant to be rows.
    """
    used = set(data.response_ids)
    labels = {name: verdict.label for name, verdict in _with_label(verdicts).items()}
    known = {name for name, label in labels.items() if label == PASS or material != "accepted"}
    return [
        LeftOut(
            left_out_id=lineage_id(run, iteration=iteration, stage="left_out", parents=[name]),
            query_id=item.query.query_id,
            response_id=name,
            iteration=iteration,
        )
        for item in judged
        if (name := item.response.response_id) in known and name not in used
    ]


def _by_text(chosen: Sequence[tuple[Judged, Verdict]]) -> list[list[list[tuple[Judged, Verdict]]]]:
    """Return, for each query, its texts, and of each its copies: responses that differ in white space alone."""
    queries: defaultdict[str, dict[str, list[tuple[Judged, Verdict]]]] = defaultdict(dict)
    for item, verdict in chosen:
        texts = queries[item.query.query_id]
        texts.setdefault(" ".join(item.response.text.split()), []).append((item, verdict))
    return [list(texts.values()) for texts in queries.values()]


def _thumb(copies: Sequence[tuple[Judged, Verdict]], spans: TokensSpanning | None) -> tuple[Judged, bool, int]:
    """Return which of one text's copies stands for it, whether it is good, and how many of its tokens are learnt."""
    is_good = _reward([verdict for _, verdict in copies]) >= 0.5
    deciding = [copy for copy in copies if copy[1].source == EXPERT] or copies
    item, verdict = next((copy for copy in deciding if (copy[1].label == PASS) == is_good), deciding[0])
    token_ids = item.response.token_ids
    if is_good or spans is None or verdict.flaw_end is None:
        return item, is_good, len(token_ids)
    return item, is_good, spans(token_ids, verdict.flaw_end)


def _reward(verdicts: Sequence[Verdict]) -> float:
    """Return the mean score of one text's verdicts: of experts', where they were asked about it."""
    asked = [verdict for verdict in verdicts if verdict.source == EXPERT]
    scores = [verdict.score for verdict in asked or verdicts]
    assert all(score is not None for score in scores), "a verdict with a label has a score"
    return math.fsum(score for score in scores if score is not None) / len(scores)


def _flags_to_the_flaw(item: Judged, verdict: Verdict, spans: TokensSpanning) -> list[bool]:
    """Return, for each token up to the end of the first quoted flaw, whether it is the flaw's; [] without a quote."""
    starts = [issue.start for critique in item.critiques for issue in critique.issues if issue.end == verdict.flaw_end]
    if verdict.flaw_end is None or not starts:
        return []
    num_tokens = spans(item.response.token_ids, verdict.flaw_end)
    first = spans(item.response.token_ids, min(starts) + 1) - 1
    return [token >= first for token in range(num_tokens)]


def _fresh(
    judged: Sequence[Judged], known: Mapping[str, Known], *, version: int, max_age: int
) -> tuple[list[tuple[Judged, Known]], Counter[str]]:
    """Return the responses that are young enough and of which something is known, by response id, and what was not."""
    dropped: Counter[str] = Counter()
    chosen: list[tuple[Judged, Known]] = []
    for item in judged:
        if age_of(item.response, version=version) > max_age:
            dropped["stale"] += 1
        elif item.response.response_id not in known:
            dropped["unjudged"] += 1
        else:
            chosen.append((item, known[item.response.response_id]))
    return chosen, dropped


def _with_label(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    return {verdict.response_id: verdict for verdict in verdicts if verdict.label is not None}


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
