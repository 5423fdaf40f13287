"""10,000 preference pairs through the Ray object store, as an Arrow table and as a pickled list of records.

Each side is put by the driver and fetched by a worker process, where it is then what it was: a table, or a list of
records. The driver holds both forms beforehand, for the journal needs the table in any case. Two harder comparisons are
details of the figure: both sides read on into the rows that a training rank pads (`trainers.rows.pairs`), and the
table's making counted to its side.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from actors.records import Message, PreferencePair, lineage_id, to_table
from benchmarks.figure import Figure, in_turns
from trainers.rows.pairs import PairRows, pair_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A reference that a worker fetches itself, as the ranks do."""

    ref: ray.ObjectRef[Any]


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figure; Ray runs."""
    pairs = make_pairs(200 if quick else 10_000)
    table = to_table(pairs, PreferencePair)
    num_tokens = _num_response_tokens(pair_rows(table))
    reader: Any = ray.remote(Reader).options(num_cpus=0.1).remote()

    async def through(read: Any, value: object, *, wanted: int) -> float:
        begin = time.perf_counter()
        got = await read.remote(Held(ref=ray.put(value)))
        seconds = time.perf_counter() - begin
        if got != wanted:
            raise RuntimeError(f"the worker counts {got}, wanted {wanted}")
        return seconds

    num_rounds = 2 if quick else 11
    try:
        fetched = await in_turns(
            lambda: through(reader.fetch, table, wanted=len(pairs)),
            lambda: through(reader.fetch, pairs, wanted=len(pairs)),
            num_rounds=num_rounds,
        )
        read = await in_turns(
            lambda: through(reader.read_table, table, wanted=num_tokens),
            lambda: through(reader.read_records, pairs, wanted=num_tokens),
            num_rounds=num_rounds,
        )
    finally:
        ray.kill(reader)
    making_s = _median_making_s(pairs, num_rounds=num_rounds)
    return [
        Figure.of(
            "preference_table",
            f"{len(pairs):,} pairs through the object store, Arrow table ÷ pickled records",
            fetched.ratios,
            at_most=0.3,
            details={
                **fetched.medians("s"),
                "making_the_table_s": making_s,
                "ratio_with_making": (statistics.median(fetched.ours) + making_s) / statistics.median(fetched.plain),
                "ratio_read_into_rows": statistics.median(read.ratios),
                "table_mb": table.nbytes / 1e6,
            },
        )
    ]


def _median_making_s(pairs: list[PreferencePair], *, num_rounds: int) -> float:
    taken = []
    for _ in range(num_rounds):
        begin = time.perf_counter()
        to_table(pairs, PreferencePair)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def make_pairs(num: int) -> list[PreferencePair]:
    """Return pairs of the demo's size: a prompt of about nine tokens, answers of about 28 and 16."""
    rng = random.Random(0)

    def ids(mean: int) -> tuple[int, ...]:
        return tuple(rng.randrange(10, 107) for _ in range(rng.randrange(mean - 6, mean + 7)))

    def text(token_ids: tuple[int, ...]) -> str:
        return "".join(chr(22 + token) for token in token_ids)

    pairs = []
    for number in range(num):
        chosen, rejected = ids(28), ids(16)
        name = lineage_id("bench", iteration=1, stage="pairs", sample_index=number)
        pairs.append(
            PreferencePair(
                pair_id=name,
                query_id=f"q{name}",
                prompt=(Message(role="user", content=f"{rng.randrange(1000)}+{rng.randrange(1000)}"),),
                chosen=text(chosen),
                rejected=text(rejected),
                prompt_token_ids=ids(9),
                chosen_token_ids=chosen,
                rejected_token_ids=rejected,
                margin=rng.random(),
                weight=1.0,
                noise=0.0,
                source="critic",
                chosen_id=f"c{name}",
                rejected_id=f"r{name}",
                iteration=1,
                age=0,
                chosen_logprobs=tuple(-rng.random() for _ in chosen),
                rejected_logprobs=tuple(-rng.random() for _ in rejected),
                other_margins=None,
            )
        )
    return pairs


class Reader:
    """A worker process that fetches pairs."""

    def fetch(self, held: Held) -> int:
        """Take a table or records out of the object store; return how many."""
        return len(ray.get(held.ref))

    def read_table(self, held: Held) -> int:
        """Read an Arrow table as a rank does; return the response tokens."""
        table: pa.Table = ray.get(held.ref)
        return _num_response_tokens(pair_rows(table))

    def read_records(self, held: Held) -> int:
        """Read records into the same rows; return the response tokens."""
        records: list[PreferencePair] = ray.get(held.ref)
        return _num_response_tokens(rows_of(records))


def rows_of(records: list[PreferencePair]) -> PairRows:
    """Return the rows of records, made the short way."""
    chosen = tuple(np.array(r.prompt_token_ids + r.chosen_token_ids, dtype=np.int64) for r in records)
    rejected = tuple(np.array(r.prompt_token_ids + r.rejected_token_ids, dtype=np.int64) for r in records)
    prompts = [len(r.prompt_token_ids) for r in records]
    chosen_lengths = np.array([len(r.chosen_token_ids) for r in records], dtype=np.int64)
    rejected_lengths = np.array([len(r.rejected_token_ids) for r in records], dtype=np.int64)
    return PairRows(
        chosen=chosen,
        rejected=rejected,
        chosen_masks=tuple(np.arange(len(ids)) >= n for ids, n in zip(chosen, prompts, strict=True)),
        rejected_masks=tuple(np.arange(len(ids)) >= n for ids, n in zip(rejected, prompts, strict=True)),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=np.array([r.weight for r in records]),
        noise=np.array([r.noise for r in records]),
        margins=np.array([r.margin for r in records]),
        lengths=np.array(prompts) + np.maximum(chosen_lengths, rejected_lengths),
        ages=np.array([r.age or 0 for r in records]),
        rollout_logprobs=tuple((np.array(r.chosen_logprobs), np.array(r.rejected_logprobs)) for r in records),
        correction=np.ones(len(records)),
    )


def _num_response_tokens(rows: PairRows) -> int:
    return int(rows.chosen_lengths.sum() + rows.rejected_lengths.sum())
