"""The base model is an ordinary model directory whose tokenizer keeps every character and every role apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.chat import encode_chat, load_tokenizer
from actors.domains import Role
from actors.domains.arithmetic import Arithmetic, Config
from actors.records import Message
from actors.rubrics import StepMarks
from trainers.base_model import CHARACTERS, END, BaseModelConfig, write_base_model

SHAPE = BaseModelConfig(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, max_positions=64)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base") / "model", SHAPE, seed=3)


def test_every_character_is_one_token_and_comes_back(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer.encode(CHARACTERS, add_special_tokens=False)
    assert len(ids) == len(set(ids)) == len(CHARACTERS) == 96
    assert tokenizer.decode(ids) == CHARACTERS
    # Two blanks, a blank at either end and a line break stay as they are.
    text = "  7+6+0=13\n y P "
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_critics_labels_are_single_tokens(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    labels = StepMarks(Arithmetic(Config())).labels
    assert [len(tokenizer.encode(label, add_special_tokens=False)) for label in labels] == [1] * 4


def test_each_role_is_addressed_by_its_own_control_token(model_dir: Path) -> None:
    tokenizer, domain = load_tokenizer(model_dir), Arithmetic(Config())
    prompts = {
        Role.ATTACKER: domain.attack_messages(("+", "2", "2")),
        Role.LEARNER: domain.learner_messages("47+86"),
        Role.CRITIC: domain.critic_messages("47+86", "7+6+0=13"),
    }
    firsts = {role: tokenizer.decode(encode_chat(tokenizer, prompts[role])[:1]) for role in Role}
    assert firsts == {role: f"<|{role}|>" for role in Role}
    assert tokenizer.decode(encode_chat(tokenizer, prompts[Role.CRITIC])) == (
        "<|critic|><|user|>47+86\n7+6+0=13<|assistant|>"
    )


def test_a_system_message_of_another_kind_is_kept_as_text(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    messages = (Message(role="system", content="be kind"), Message(role="user", content="12+34"))
    assert tokenizer.decode(encode_chat(tokenizer, messages)) == "<|system|>be kind<|end|><|user|>12+34<|assistant|>"


def test_an_answer_in_the_conversation_ends_with_the_end_token(model_dir: Path) -> None:
    tokenizer = load_tokenizer(model_dir)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12+34"}, {"role": "assistant", "content": "46"}], tokenize=False
    )
    assert text == "<|learner|><|user|>12+34<|assistant|>46<|end|>"
    assert tokenizer.eos_token == END


def test_the_same_seed_starts_from_the_same_weights(model_dir: Path, tmp_path: Path) -> None:
    same = write_base_model(tmp_path / "same", SHAPE, seed=3)
    other = write_base_model(tmp_path / "other", SHAPE, seed=4)
    weights = "model.safetensors"
    assert (same / weights).read_bytes() == (model_dir / weights).read_bytes()
    assert (other / weights).read_bytes() != (model_dir / weights).read_bytes()
