"""A few steps of DPO on ranks that train an adapter, and what they publish."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM

from cluster.weights import iter_tensors
from trainers.losses import dpo
from trainers.training_config import ReferenceWeights
from trainers.training_group import TrainingGroup, TrainingPlan, UpdateReport

IDS = [f"p{i:02d}" for i in range(16)]
PROBE = ((7, 8, 9, 10), (20, 21), (30, 31, 32, 33, 34, 35))
Tensors = dict[str, torch.Tensor]


def pair_table() -> pa.Table:
    generator = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [generator.randrange(6, 100) for _ in range(generator.randrange(least, most))]

    return pa.table(
        {
            "pair_id": IDS,
            "prompt_token_ids": [ids(5, 20) for _ in IDS],
            "chosen_token_ids": [ids(2, 40) for _ in IDS],
            "rejected_token_ids": [ids(2, 40) for _ in IDS],
        }
    )


async def update(
    group: TrainingGroup,
    *,
    start: int = 0,
    num_steps: int = 4,
    reference: ReferenceWeights = "start_of_update",
) -> UpdateReport:
    plan = TrainingPlan.of(IDS, batch_size=8, epochs=4, seed=0)
    part = TrainingPlan(row_ids=plan.row_ids, steps=plan.steps[start : start + num_steps])
    return await group.update(
        pair_table(), loss="dpo", loss_config=dpo.Config(), plan=part, reference_weights=reference
    )


async def adapter(group: TrainingGroup) -> Tensors:
    return {name: tensor.clone() for name, tensor in iter_tensors(await group.publish(version="v1"))}


def difference(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def logprobs_of(model: Path, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return what a model directory's log-prob of each token after the first is, in nats."""
    served = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for token_ids in sequences:
        with torch.no_grad():
            table = served(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        found.append([table[i, token].item() for i, token in enumerate(token_ids[1:])])
    return found
