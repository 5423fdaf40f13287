"""What a rank asks its model for: log-probs alone, or with their means over the vocabulary."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.tiny_models import write_llama
from trainers.ranks.passes import Passes
from trainers.rows.documents import token_rows
from trainers.training_config import TrainingConfig

DOCUMENTS = pa.table(
    {"prompt_token_ids": [[7, 8], [9], [10, 11, 12]], "response_token_ids": [[20, 21, 22, 2], [23, 2], [24, 25, 2]]}
)


def passes_of(model: Any, *, packing: bool) -> Passes:
    config = TrainingConfig(packing=packing)
    return Passes(SimpleNamespace(config=config, engine=model, device=torch.device("cpu")))  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", [False, True])
def test_means_over_the_vocabulary_come_with_the_log_probs_where_they_are_asked_for(
    packing: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(write_llama(tmp_path / "llama"), dtype=torch.float32).eval()
    rows = token_rows(DOCUMENTS)
    padded = rows.pad(range(3))
    passes = passes_of(model, packing=packing)
    found = passes.forward(padded, temperature=0.7, means=True)
    assert found.mean_logprobs is not None
    for row, (ids, mask) in enumerate(zip(rows.token_ids, rows.masks, strict=True)):
        predicted = (model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1] / 0.7).log_softmax(dim=1)
        targets = torch.from_numpy(mask)[1:]
        own = predicted.gather(1, torch.from_numpy(ids)[1:, None])[:, 0][targets]
        torch.testing.assert_close(found.logprobs[row][found.mask[row]], own, atol=2e-5, rtol=0)
        means = predicted.mean(dim=1)[targets]
        torch.testing.assert_close(found.mean_logprobs[row][found.mask[row]], means, atol=2e-5, rtol=0)
    assert passes.forward(padded).mean_logprobs is None
