"""Sequences behind one another in rows: the same log-probs, values and gradients as of sequences by themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_shared_prompts import WINDOWS, many, tiny
from tests.tiny_models import write_gpt2, write_llama, write_qwen2
from trainers.logprobs import sequence_logprobs, token_logprobs
from trainers.ranks.packed_rows import check, first_fit, packed
from trainers.rows import Padded
from trainers.rows.pairs import pair_rows
from trainers.training_config import TrainingConfig

CPU = torch.device("cpu")


def packed_logprobs(model: Any, padded: Padded, *, temperature: float = 1.0) -> torch.Tensor:
    rows = packed(padded)
    logits = model(input_ids=rows.token_ids, position_ids=rows.positions, use_cache=False).logits
    return rows.back(token_logprobs(logits, rows.token_ids, temperature=temperature), padded.mask)


def test_short_sequences_share_a_row_and_padding_belongs_to_none() -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 0, 0, 0], [12, 13, 0, 0, 0]])
    mask = torch.tensor([[False, True, True, True, True], [False, True, *[False] * 3], [False, True, *[False] * 3]])
    found = packed(Padded(token_ids=ids, mask=mask, num_real_tokens=9, passes=()))
    assert found.token_ids.tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 0]]
    assert found.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 0]]
    counted = found.counted(Padded(token_ids=ids, mask=mask, num_real_tokens=9, passes=()))
    assert (counted.num_unpadded_tokens, counted.num_padded_tokens) == (9, 10)
    values = torch.arange(10.0).view(2, 5)
    assert found.back(values, mask).tolist() == [[0, 1, 2, 3, 4], [0, 6, 0, 0, 0], [0, 8, 0, 0, 0]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_rows_are_never_overfull_and_all_but_one_are_half_full(lengths: list[int]) -> None:
    places = first_fit(lengths, width=max(lengths))
    filled: dict[int, list[tuple[int, int]]] = {}
    for (row, first), length in zip(places, lengths, strict=True):
        filled.setdefault(row, []).append((first, first + length))
    assert sorted(filled) == list(range(len(filled)))
    for spans in filled.values():
        ordered = sorted(spans)
        assert ordered[0][0] == 0
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ordered))
        assert ordered[-1][1] <= max(lengths)
    assert sum(2 * max(end for _, end in spans) <= max(lengths) for spans in filled.values()) <= 1


@pytest.mark.parametrize("write", [write_llama, write_gpt2, write_qwen2])
def test_log_probs_and_gradients_are_those_of_sequences_by_themselves(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(write(tmp_path / "model"), dtype=torch.float32).eval()
    padded = pair_rows(many(12)).pad(range(12))
    found = []
    for way in ("alone", "packed"):
        if way == "alone":
            logits = model(input_ids=padded.token_ids, use_cache=False).logits
            logprobs = torch.where(padded.mask, token_logprobs(logits, padded.token_ids, temperature=0.7), 0.0)
        else:
            logprobs = packed_logprobs(model, padded, temperature=0.7)
        model.zero_grad()
        sums = sequence_logprobs(logprobs, padded.mask)
        sums[:12].sum().sub(sums[12:].square().mean()).backward()
        found.append((logprobs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (alone, wanted), (together, got) = found
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(got[name], gradient, atol=1e-5 * scale, rtol=0, msg=name)
    rows = packed(padded)
    assert rows.token_ids.shape[1] == int(max(map(len, pair_rows(many(12)).chosen + pair_rows(many(12)).rejected)))
    assert len(rows.token_ids) < len(padded.token_ids)
    check(model, name="model", device=CPU)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma2"])
def test_a_window_stays_the_models_own(kind: str) -> None:
    settings, _ = WINDOWS[kind]
    model = tiny(kind, **{**settings, "sliding_window": 3}).eval()
    padded = pair_rows(many(6)).pad(range(6))
    padded = padded._replace(token_ids=padded.token_ids % 64)
    with torch.no_grad():
        alone = token_logprobs(model(input_ids=padded.token_ids, use_cache=False).logits, padded.token_ids)
        torch.testing.assert_close(
            packed_logprobs(model, padded), torch.where(padded.mask, alone, 0.0), atol=2e-5, rtol=0
        )


def test_chunks_that_are_counted_from_the_rows_first_place_are_refused() -> None:
    settings, _ = WINDOWS["llama4_text"]
    with pytest.raises(ValueError, match=r"packing: got true with model, which has layers of chunked_attention"):
        check(tiny("llama4_text", **settings), name="model", device=CPU)


def test_a_model_that_does_not_tell_sequences_apart_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(write_llama(tmp_path / "model"), dtype=torch.float32)
    heedless = model.forward
    model.forward = lambda *, position_ids=None, **others: heedless(**others)
    with pytest.raises(ValueError, match="packing: got true with model, which gives a sequence that follows another"):
        check(model, name="model", device=CPU)


def test_rows_are_arranged_one_way_or_another() -> None:
    with pytest.raises(ValueError, match="packing: got true with shared_prompts = true, wanted one of the two"):
        TrainingConfig(packing=True, shared_prompts=True)
