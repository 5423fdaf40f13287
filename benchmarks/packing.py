"""Packed and prompt-sharing forward passes against the padded ones that the ranks make; no rank, one thread.

The demo's model and its lengths of pairs; of a step's pairs on one rank a forward pass, the log-probs of all responses,
and a backward pass:

    padded   as the ranks compute them: [2B, T], in one or two passes (trainers.rows.pairs)
    packed   behind one another in rows as long as the longest (trainers.ranks.packed_rows)
    shared   of each pair prompt + chosen + rejected in one row; the rejected sees the prompt, not the chosen

Packed and shared passes need masks of their own. Each way has the demo's lengths, and lengths that differ. Seconds are
processor seconds, so other processes count less; the three take turns. Their log-probs must agree.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.chat import load_tokenizer
from benchmarks.training_step import DEMO_LENGTHS, made_up_pairs
from trainers.base_model import BaseModelConfig, write_base_model
from trainers.batches import TrainingPlan, micro_batches
from trainers.logprobs import sequence_logprobs, token_logprobs
from trainers.ranks import packed_rows
from trainers.ranks.shared_prompts import joined, logprobs
from trainers.rows import Padded
from trainers.rows.pairs import PairRows, pair_rows

LENGTHS: Mapping[str, Sequence[tuple[int, int]]] = {
    "the demo's lengths": DEMO_LENGTHS,
    "mixed lengths": ((10, 60), (10, 240), (10, 240)),
}
LIMIT = 4096
"""Greatest padded size of a micro-batch, in tokens."""
TOLERANCE = 1e-3
"""Nats, between two ways to compute a response's log-prob in fp32."""


def padded(model: Any, found: Padded) -> Tensor:
    """Return [S, T] log-probs of sequences as a rank computes them."""
    whole = torch.zeros(found.token_ids.shape)
    for sequences, length in found.passes:
        ids = found.token_ids[sequences, :length]
        logprobs = token_logprobs(model(input_ids=ids, use_cache=False).logits, ids)
        whole = whole.index_put((sequences[:, None], torch.arange(length)), logprobs)
    return whole


def packed(model: Any, found: Padded) -> Tensor:
    """Return the same of rows in which short sequences follow one another."""
    rows = packed_rows.packed(found)
    logits = model(input_ids=rows.token_ids, position_ids=rows.positions, use_cache=False).logits
    return rows.back(token_logprobs(logits, rows.token_ids), found.mask)


def shared(model: Any, found: Padded) -> Tensor:
    """Return the same of one row for each pair, in which its prompt stands once (trainers.ranks.shared_prompts)."""
    return logprobs(model, found, joined(found), temperature=1.0, device=torch.device("cpu"))


WAYS: Mapping[str, Callable[[Any, Padded], Tensor]] = {"padded": padded, "packed": packed, "shared": shared}


def response_logprobs(way: str, model: Any, rows: PairRows, chosen: Sequence[int]) -> Tensor:
    """Return [2B] log-probs of the responses, chosen block then rejected block, of a rank's micro-batches."""
    sums = torch.zeros(2 * len(chosen))
    place = {row: i for i, row in enumerate(chosen)}
    (layout,) = micro_batches(rows, chosen, num_ranks=1, micro_batch_tokens=LIMIT)
    for micro in layout:
        found = rows.pad(micro.rows, num_passes=micro.num_passes)
        at = torch.tensor([place[row] for row in micro.rows])
        at = torch.cat([at, at + len(chosen)])
        sums = sums.index_put((at,), sequence_logprobs(WAYS[way](model, found), found.mask))
    return sums


def main() -> None:
    """Print one line for each way, size and kind of lengths."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        path = write_base_model(Path(folder) / "model", BaseModelConfig(), seed=0)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        num_tokens = len(load_tokenizer(path))
    for kind, lengths in LENGTHS.items():
        rows = pair_rows(made_up_pairs(320, num_tokens=num_tokens, lengths=lengths))
        for num_pairs in (8, 32):
            compare(model, rows, title=f"{kind}, {num_pairs} pairs", num_pairs=num_pairs, rounds=arguments.rounds)


def compare(model: Any, rows: PairRows, *, title: str, num_pairs: int, rounds: int) -> None:
    """Print how long each way takes over steps of so many pairs, by the first way's time.

    Raises:
        RuntimeError: two ways differ in their log-probs.
    """
    plan = TrainingPlan.of([str(row) for row in range(320)], batch_size=num_pairs, epochs=1, seed=0)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number, step in enumerate(plan.steps[: min(rounds, len(plan.steps))]):
        wanted = None
        for name in WAYS:
            model.zero_grad()
            begin = time.process_time()
            sums = response_logprobs(name, model, rows, step.rows)
            sums.sum().backward()
            if number:  # the first is warm-up
                seconds[name].append(time.process_time() - begin)
            wanted = sums.detach() if wanted is None else wanted
            gap = float((sums.detach() - wanted).abs().max())
            if gap > TOLERANCE:
                raise RuntimeError(f"{name}: differs from padded by {gap:g} nats, wanted at most {TOLERANCE:g}")
    base = statistics.median(seconds["padded"])
    for name, found in seconds.items():
        ratios = [own / first for own, first in zip(found, seconds["padded"], strict=True)]
        low, high = np.quantile(ratios, [0.25, 0.75])
        print(
            f"{title}, {name}: {1000 * statistics.median(found):.1f} ms, {statistics.median(ratios):.2f} "
            f"of padded ({low:.2f} to {high:.2f}), n = {len(found)}; padded {1000 * base:.1f} ms"
        )


if __name__ == "__main__":
    main()
