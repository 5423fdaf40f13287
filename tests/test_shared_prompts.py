"""Pairs whose prompt is computed once: the same log-probs and gradients as of sequences by themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from benchmarks import packing
from tests.fake_roles import step_report
from tests.tiny_models import write_gpt2, write_llama, write_qwen2
from trainers.logprobs import sequence_logprobs, token_logprobs
from trainers.ranks.shared_prompts import check, joined, logprobs
from trainers.rows.pairs import pair_rows
from trainers.training_group import UpdateReport

CPU = torch.device("cpu")


def test_a_pair_is_one_row_in_which_the_responses_do_not_see_each_other() -> None:
    table = pa.table({"prompt_token_ids": [[5, 6]], "chosen_token_ids": [[7, 8]], "rejected_token_ids": [[9]]})
    found = joined(pair_rows(table).pad((0,)))
    assert found.token_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert found.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert found.seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    # The prompt's last token predicts both responses' first.
    assert found.predictors.tolist() == [[0, 0, 1, 2, 1]]
    assert found.computed[0].length == 5


def test_a_prompt_that_is_computed_once_counts_once_among_what_is_computed() -> None:
    table = pa.table(
        {
            "prompt_token_ids": [[5, 6, 7, 8, 9, 10], [5, 6]],
            "chosen_token_ids": [[7, 8], [7]],
            "rejected_token_ids": [[9], [9]],
        }
    )
    padded = pair_rows(table).pad((0, 1))
    found = joined(padded).counted(padded)
    # Sequences of 8, 3, 7, 3 tokens in four rows of 8; joined, rows of 6 + 2 + 1 and 2 + 1 + 1 in two of 9.
    assert (padded.num_real_tokens, padded.num_unpadded_tokens, padded.num_padded_tokens) == (21, 21, 32)
    assert (found.num_real_tokens, found.num_unpadded_tokens, found.num_padded_tokens) == (21, 13, 18)
    dummy = pair_rows(table).pad(())
    found = joined(dummy).counted(dummy)
    assert (found.num_real_tokens, found.num_unpadded_tokens, found.num_padded_tokens) == (0, 0, 0)


def test_an_update_is_as_efficient_as_what_it_computes_and_as_fast_as_what_it_learns_from() -> None:
    step = replace(
        step_report(), num_tokens=21, num_padded_tokens=18, num_unpadded_tokens=13, most_tokens=21, seconds=1.0
    )
    report = UpdateReport(slots=(), steps=(step, step), wall_s=2.0, reference_s=0.0)
    assert report.padding_efficiency == report.means["padding_efficiency"] == 26 / 36
    assert report.tokens_per_s == 21.0


def many(num: int) -> pa.Table:
    rng = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(6, 100) for _ in range(rng.randint(least, most))]

    return pa.table(
        {
            "prompt_token_ids": [ids(1, 9) for _ in range(num)],
            "chosen_token_ids": [ids(1, 12) for _ in range(num)],
            "rejected_token_ids": [ids(1, 12) for _ in range(num)],
        }
    )


@pytest.mark.parametrize("write", [write_llama, write_gpt2, write_qwen2])
def test_log_probs_and_gradients_are_those_of_sequences_by_themselves(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(write(tmp_path / "model"), dtype=torch.float32).eval()
    rows = pair_rows(many(12))
    padded = rows.pad(range(12))
    alone = token_logprobs(model(input_ids=padded.token_ids, use_cache=False).logits, padded.token_ids, temperature=0.7)
    sums = sequence_logprobs(alone, padded.mask)
    sums[:12].sum().sub(sums[12:].square().mean()).backward()
    wanted = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    pairs = joined(padded)
    together = logprobs(model, padded, pairs, temperature=0.7, device=CPU)
    torch.testing.assert_close(together, torch.where(padded.mask, alone, 0.0), atol=2e-5, rtol=0)
    assert not together[~padded.mask].any()
    sums = sequence_logprobs(together, padded.mask)
    sums[:12].sum().sub(sums[12:].square().mean()).backward()
    for name, parameter in model.named_parameters():
        scale = max(1.0, float(wanted[name].abs().max()))
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5 * scale, rtol=0, msg=name)
    # A prompt is computed once.
    num_prompt_tokens = sum(map(len, many(12)["prompt_token_ids"].to_pylist()))
    assert padded.num_real_tokens - int((pairs.token_ids > 0).sum()) == num_prompt_tokens
    check(model, name="model", device=CPU)


def test_the_ways_that_the_benchmark_compares_give_the_same_log_probs(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(write_llama(tmp_path / "model"), dtype=torch.float32)
    rows, chosen = pair_rows(many(6)), (4, 1, 3, 5)
    wanted = packing.response_logprobs("padded", model, rows, chosen)
    for way in ("packed", "shared"):
        torch.testing.assert_close(packing.response_logprobs(way, model, rows, chosen), wanted, atol=1e-4, rtol=0)


def test_a_model_that_heeds_no_mask_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(write_llama(tmp_path / "model"), dtype=torch.float32)
    heedless = model.forward
    model.forward = lambda *, attention_mask=None, **others: heedless(**others)
    with pytest.raises(ValueError, match="shared_prompts: got true with model, which gives responses that share a "):
        check(model, name="model", device=CPU)


WINDOWS: dict[str, tuple[dict[str, Any], str]] = {
    "mistral": ({"sliding_window": 16}, "a sliding window of 16 tokens"),
    "qwen2": (
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "a sliding window of 16 tokens and layers of sliding_attention",
    ),
    "gemma2": ({"sliding_window": 16}, "a sliding window of 16 tokens and layers of sliding_attention"),
    "llama4_text": (
        {"attention_chunk_size": 16, "num_local_experts": 1, "intermediate_size_mlp": 32, "pad_token_id": 0},
        "layers of chunked_attention",
    ),
}


def tiny(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **sizes, intermediate_size=32, num_key_value_heads=2, **settings)
        )


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_model_that_looks_through_a_window_is_refused_whose_place_our_mask_would_take(kind: str) -> None:
    settings, has = WINDOWS[kind]
    with pytest.raises(ValueError, match="shared_prompts") as error:
        check(tiny(kind, **settings), name="model", device=CPU)
    assert str(error.value) == (
        f"shared_prompts: got true with model, which has {has}, wanted full attention in every layer: our mask would "
        "take the place of the model's own; set it to false"
    )


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("mistral", {"sliding_window": None}), ("qwen2", {"use_sliding_window": False, "sliding_window": 16})],
)
def test_a_window_that_is_switched_off_is_none(kind: str, settings: dict[str, Any]) -> None:
    check(tiny(kind, **settings), name="model", device=CPU)
