"""What the comparison with TRL's online trainer asks of transformers is what an engine would say. TRL is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.chat import encode_chat, load_tokenizer
from actors.records import Message
from benchmarks.loop_against_trl import seconds_to
from benchmarks.trl_online import BATCH, Generator, left_padded
from tests.synthetic_run import make_row
from trainers.base_model import BaseModelConfig, write_base_model

SHAPE = BaseModelConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base") / "model", SHAPE, seed=0)


def test_padding_stands_at_the_left() -> None:
    token_ids, mask = left_padded([(5, 6, 7), (8,)], 0)
    assert token_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_continuation_is_the_greedy_one_whoever_stands_beside_it(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    generator = Generator(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), tokenizer)
    texts = ["12+34", "9-1", "123+45", "7"] * (BATCH // 4 + 1)
    conversations = [(Message(role="user", content=text),) for text in texts]
    found = generator.continue_all(conversations, max_tokens=12)
    assert len(found) == len(texts) > BATCH
    assert found[:4] == found[4:8], "the same question has the same answer, in another batch too"
    rows = generator.logprobs(conversations[:4], found[:4])
    for tokens, logprobs in zip(found, rows, strict=False):
        assert logprobs.shape == (len(tokens), len(tokenizer))
        assert logprobs.argmax(dim=1).tolist() == list(tokens)
        assert torch.allclose(logprobs.exp().sum(dim=1), torch.ones(len(tokens)), atol=1e-5)
    # Alone, without any padding.
    prompt = torch.tensor([encode_chat(tokenizer, conversations[0])])
    with torch.inference_mode():
        alone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(prompt).logits[0, -1]
    assert torch.allclose(rows[0][0], alone.log_softmax(dim=-1), atol=1e-5)


def test_the_time_to_an_accuracy_ends_with_the_first_iteration_that_has_it_and_knows_no_evaluations() -> None:
    rows = [
        make_row(number, probe_accuracy=accuracy).model_copy(
            update={"wall_s": 10.0, "seconds": {"update": 8.0, "evaluate": 1.5}}
        )
        for number, accuracy in enumerate((0.4, 0.96, 0.9, 0.97), start=1)
    ]
    assert seconds_to(rows, 0.95) == 17.0
    assert seconds_to(rows, 0.98) is None
