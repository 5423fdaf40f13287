"""Packed and prompt-sharing forward passes against the padded ones that the ranks make; no rank, one thread.

The demo's model and its lengths of pairs; of a step's pairs on one rank a forward pass, the log-probs of all responses,
and a backward pass:

    padded   as the ranks compute them: [2B, T], in one or two passes (trainers.batches)
    packed   all sequences behind one another in one row, attention within each of them alone: no padding
    shared   of each pair prompt + chosen + rejected in one row; the rejected sees the prompt, not the chosen

Packed and shared passes need masks of their own, so attention is computed over all of a row. Seconds are
processor seconds, so other processes count less; the three take turns. Their log-probs must agree.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.chat import load_tokenizer
from benchmarks.training_step import demo_pairs
from trainers.base_model import BaseModelConfig, write_base_model
from trainers.batches import PairRows, TrainingPlan, micro_batches, pair_rows
from trainers.logprobs import sequence_logprobs, token_logprobs
from trainers.ranks.shared_prompts import joined, logprobs

TOLERANCE = 1e-3
"""Nats, between two ways to compute a response's log-prob in fp32."""


def padded(model: Any, rows: PairRows, chosen: Sequence[int]) -> Tensor:
    """Return [2B] log-probs of the responses, chosen block then rejected block, as a rank computes them."""
    sums = torch.zeros(2 * len(chosen))
    place = {row: i for i, row in enumerate(chosen)}
    (layout,) = micro_batches(rows, chosen, num_ranks=1, micro_batch_tokens=4096)
    for micro in layout:
        found = rows.pad(micro.rows, num_passes=micro.num_passes)
        at = torch.tensor([place[row] for row in micro.rows])
        at = torch.cat([at, at + len(chosen)])
        for sequences, length in found.passes:
            ids = found.token_ids[sequences, :length]
            logprobs = token_logprobs(model(input_ids=ids, use_cache=False).logits, ids)
            sums = sums.index_put((at[sequences],), sequence_logprobs(logprobs, found.mask[sequences, :length]))
    return sums


def packed(model: Any, rows: PairRows, chosen: Sequence[int]) -> Tensor:
    """Return the same of one row in which every sequence follows another."""
    sequences = [rows.chosen[row] for row in chosen] + [rows.rejected[row] for row in chosen]
    masks = [rows.chosen_masks[row] for row in chosen] + [rows.rejected_masks[row] for row in chosen]
    lengths = [len(ids) for ids in sequences]
    segment = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    seen = (segment[:, None] == segment[None]) & (position[:, None] >= position[None])
    logprobs = _by_predictor(model, np.concatenate(sequences), position, seen, torch.arange(len(segment)) - 1)
    shown = torch.from_numpy(np.concatenate(masks))
    return torch.zeros(len(lengths)).index_add(0, segment[shown], logprobs[shown])


def shared(model: Any, rows: PairRows, chosen: Sequence[int]) -> Tensor:
    """Return the same of one row for each pair, in which its prompt stands once (trainers.ranks.shared_prompts)."""
    both = rows.pad(chosen)
    found = logprobs(model, both, joined(both), temperature=1.0, device=torch.device("cpu"))
    return sequence_logprobs(found, both.mask)


def _by_predictor(model: Any, ids: Any, position: Tensor, seen: Tensor, predictor: Tensor) -> Tensor:
    """Return [N] log-probs of each token of a row by the position that predicts it."""
    row = torch.from_numpy(ids)[None]
    found = model(input_ids=row, position_ids=position[None], attention_mask=seen[None, None], use_cache=False)
    logits = found.logits[0][predictor.clamp(min=0)]
    return -torch.nn.functional.cross_entropy(logits, row[0], reduction="none")


def main() -> None:
    """Print one line for each way and size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    ways: dict[str, Callable[[Any, PairRows, Sequence[int]], Tensor]] = {
        "padded": padded,
        "packed": packed,
        "shared": shared,
    }
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        path = write_base_model(Path(folder) / "model", BaseModelConfig(), seed=0)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        rows = pair_rows(demo_pairs(320, num_tokens=len(load_tokenizer(path))))
    for num_pairs in (8, 32):
        plan = TrainingPlan.of([str(row) for row in range(320)], batch_size=num_pairs, epochs=1, seed=0)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number, step in enumerate(plan.steps[: min(arguments.rounds, len(plan.steps))]):
            wanted = None
            for name, way in ways.items():
                model.zero_grad()
                begin = time.process_time()
                sums = way(model, rows, step.rows)
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
                f"{num_pairs} pairs, {name}: {1000 * statistics.median(found):.1f} ms, {statistics.median(ratios):.2f} "
                f"of padded ({low:.2f} to {high:.2f}), n = {len(found)}; padded {1000 * base:.1f} ms"
            )


if __name__ == "__main__":
    main()
