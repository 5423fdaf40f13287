"""Owns the tiny random models of the tests: ordinary Hugging Face directories, written in a fraction of a second.

One token per character, control tokens for the chat, a chat template, fp32 weights large enough that a wrong weight
shows in the log-probs. Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

PAD, UNK, END = "<|pad|>", "<|unk|>", "<|end|>"
CONTROL_TOKENS = (PAD, UNK, END, "<|system|>", "<|user|>", "<|assistant|>")
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def char_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable ASCII character and newline, and the control tokens.

    >>> char_tokenizer().decode(char_tokenizer().encode("2+2=4"))
    '2+2=4'
    """
    vocabulary = {token: i for i, token in enumerate([*CONTROL_TOKENS, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[t for t in CONTROL_TOKENS if t not in (PAD, UNK, END)],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def write_llama(
    path: Path,
    *,
    tied: bool = False,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    max_positions: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Write a random Llama directory (head size 32, grouped-query attention) and return its path."""
    config = LlamaConfig(
        **_shared(tied=tied),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=max_positions,
        initializer_range=0.1,
    )
    return _write(path, LlamaForCausalLM, config, seed=seed, chat_template=chat_template)


def write_qwen2(
    path: Path,
    *,
    tied: bool = False,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    max_positions: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Write a random Qwen2 directory (biases on q, k and v) and return its path."""
    config = Qwen2Config(
        **_shared(tied=tied),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=max_positions,
        initializer_range=0.1,
    )
    return _write(path, Qwen2ForCausalLM, config, seed=seed, chat_template=chat_template)


def write_gpt2(
    path: Path,
    *,
    tied: bool = True,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    max_positions: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Write a random GPT-2 directory (learned positions, tied by its nature) and return its path."""
    config = GPT2Config(
        **_shared(tied=tied),
        n_embd=hidden_size,
        n_layer=num_layers,
        n_head=hidden_size // 32,
        n_positions=max_positions,
        initializer_range=0.1,
    )
    return _write(path, GPT2LMHeadModel, config, seed=seed, chat_template=chat_template)


def perturb(model: torch.nn.Module, *, seed: int, scale: float = 0.05) -> None:
    """Add Gaussian noise of standard deviation `scale` to every parameter in place: a new version of the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def _shared(*, tied: bool) -> dict[str, Any]:
    tokenizer = char_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tied,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def _write(path: Path, make: Callable[[Any], Any], config: Any, *, seed: int, chat_template: str | None) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make(config)
    # Norm weights of exactly one and biases of exactly zero would hide an update that skips them.
    perturb(model, seed=seed + 1, scale=0.02)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    char_tokenizer(chat_template=chat_template).save_pretrained(path)
    return path
