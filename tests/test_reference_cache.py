"""The reference's log-probs, kept by what they depend on."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from tests.tiny_models import write_llama
from trainers.kl import KlControl
from trainers.losses import dpo, grpo
from trainers.ranks.reference_cache import ReferenceCache, weights_digest
from trainers.ranks.update_start import at_price, next_price
from trainers.rows import Padded
from trainers.rows.pairs import pair_rows


def pairs(*, prompt: list[int]) -> Padded:
    table = pa.table({"prompt_token_ids": [prompt], "chosen_token_ids": [[7, 8, 0]], "rejected_token_ids": [[9]]})
    return pair_rows(table).pad((0,))


LOGPROBS = -torch.arange(1.0, 11.0).view(2, 5)
"""[2, 5]: what some model says of two sequences of 5 and of 3 tokens."""


def filled(padded: Padded, *, digest: str = "weights", temperature: float = 1.0) -> ReferenceCache:
    cache = ReferenceCache()
    assert cache.find(padded, digest=digest, temperature=temperature) is None
    cache.keep(padded, LOGPROBS, digest=digest, temperature=temperature)
    cache.add([cache.new()])
    return cache


def test_what_was_computed_is_found_bit_by_bit() -> None:
    padded = pairs(prompt=[1, 2])
    cache = filled(padded)
    found = cache.find(padded, digest="weights", temperature=1.0)
    assert found is not None
    assert torch.equal(found[padded.mask], LOGPROBS[padded.mask])
    assert cache.counts() == (4, 2)
    assert cache.counts() == (0, 0)


def test_padding_has_no_part_in_it() -> None:
    cache = filled(pairs(prompt=[1, 2]))
    longer = pair_rows(
        pa.table(
            {"prompt_token_ids": [[1, 2]], "chosen_token_ids": [[9]], "rejected_token_ids": [[7, 8, 0]]}  # swapped
        )
    ).pad((0,))
    found = cache.find(longer, digest="weights", temperature=1.0)
    assert found is not None
    assert torch.equal(found[1], LOGPROBS[0])
    assert torch.equal(found[0, :3], LOGPROBS[1, :3])


@pytest.mark.parametrize(
    ("prompt", "digest", "temperature"),
    [([1, 3], "weights", 1.0), ([1, 2], "other weights", 1.0), ([1, 2], "weights", 0.9), ([2], "weights", 1.0)],
    ids=["another template or tokenizer", "another reference", "another temperature", "a shorter prompt"],
)
def test_what_depends_on_something_else_is_not_found(prompt: list[int], digest: str, temperature: float) -> None:
    cache = filled(pairs(prompt=[1, 2]))
    assert cache.find(pairs(prompt=prompt), digest=digest, temperature=temperature) is None


def test_a_micro_batch_that_is_known_in_part_is_not_found() -> None:
    cache = filled(pairs(prompt=[1, 2]))
    mixed = pair_rows(
        pa.table(
            {"prompt_token_ids": [[1, 2]], "chosen_token_ids": [[7, 8, 0]], "rejected_token_ids": [[10]]}  # one is new
        )
    ).pad((0,))
    assert cache.find(mixed, digest="weights", temperature=1.0) is None


def test_a_dummy_is_known_without_having_been_computed() -> None:
    dummy = pair_rows(
        pa.table({"prompt_token_ids": [[1]], "chosen_token_ids": [[2]], "rejected_token_ids": [[3]]})
    ).pad(())
    cache = ReferenceCache()
    found = cache.find(dummy, digest="weights", temperature=1.0)
    assert found is not None
    assert not found.any()
    assert cache.counts() == (0, 0)


def test_a_state_gives_the_same_cache() -> None:
    padded = pairs(prompt=[1, 2])
    again = ReferenceCache()
    again.restore(filled(padded).state())
    found = again.find(padded, digest="weights", temperature=1.0)
    assert found is not None
    assert torch.equal(found[padded.mask], LOGPROBS[padded.mask])
    again.restore(ReferenceCache().state())
    assert len(again) == 0


def test_the_oldest_sequences_go_first() -> None:
    cache = ReferenceCache(max_values=5)
    cache.add([{b"a" * 16: torch.zeros(2), b"b" * 16: torch.zeros(2)}, {b"a" * 16: torch.ones(2)}])
    cache.add([{b"c" * 16: torch.zeros(2)}])
    assert cache.state()["keys"][:, 0].tolist() == [ord("b"), ord("c")]


def test_a_digest_is_of_weights_config_and_seed(tmp_path: Path) -> None:
    first, other = write_llama(tmp_path / "first", tied=True), write_llama(tmp_path / "other", tied=True, seed=8)
    found = {weights_digest(first, init_seed=None), weights_digest(other, init_seed=None)}
    found |= {weights_digest(first, init_seed=seed) for seed in (0, 1)}
    assert len(found) == 4
    assert weights_digest(first, init_seed=None) in found
    config = first / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps"', '"rms_norm_epsilon"'))
    assert weights_digest(first, init_seed=None) not in found


# ------------------------------------------------------------------------------------------------- the KL's price


def test_the_price_of_the_kl_follows_what_was_measured() -> None:
    config = grpo.Config(kl_control=KlControl(adaptive=True), kl_coefficient=0.2)
    price, told = next_price(config, {"reference_kl_per_response": 9.0}, num_samples=256)
    assert told == {"kl_coefficient": 0.2}
    assert price == pytest.approx(0.2 * 1.00512)
    later = at_price(config, price)
    again, told = next_price(later, {"reference_kl_per_response": 6.0}, num_samples=256)
    assert told == {"kl_coefficient": price}
    assert again == price
    assert config.kl_coefficient == 0.2


def test_a_fixed_price_stays_and_is_not_told() -> None:
    for config in (grpo.Config(kl_coefficient=0.2), dpo.Config()):
        assert next_price(config, {"reference_kl_per_response": 9.0}, num_samples=256) == (None, {})
        assert at_price(config, 0.7) == config
