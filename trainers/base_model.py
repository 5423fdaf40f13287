"""Owns the tiny base model that is trained from nothing: its tokenizer, chat template and random start.

Written as an ordinary Hugging Face directory, so that every later step takes the path of a downloaded model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from actors.domains import Role
from cluster.config import Config
from trainers.training_config import TrainingConfig

PAD, END, ASSISTANT, USER, SYSTEM = "<|pad|>", "<|end|>", "<|assistant|>", "<|user|>", "<|system|>"
ROLE_TOKENS = tuple(f"<|{role}|>" for role in Role)
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' and messages[0]['content'] in ('attacker', 'learner', 'critic') -%}"
    "{{- '<|' + messages[0]['content'] + '|>' -}}"
    "{%- elif messages[0]['role'] == 'system' -%}{{- '<|system|>' + messages[0]['content'] + '<|end|>' -}}"
    "{%- else -%}{{- '<|learner|>' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<|user|>' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] + '<|end|>' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""A system message that names a role becomes that role's control token; without one the learner speaks."""


CACHE_FORMAT = 2
"""Raise it when the data or the training of the bootstrap changes in a way that its config does not show."""


class BaseModelConfig(Config):
    """Shape of the base model, a Llama with tied embeddings."""

    hidden_size: int = Field(default=128, gt=0)
    """Width."""
    intermediate_size: int = Field(default=256, gt=0)
    """Width of the feed-forward layer."""
    num_layers: int = Field(default=2, gt=0)
    """Transformer blocks."""
    num_heads: int = Field(default=4, gt=0)
    """Attention heads; the head size is hidden_size / num_heads."""
    max_positions: int = Field(default=256, gt=0)
    """Longest sequence, in tokens."""


class BootstrapConfig(Config):
    """How the base model is trained."""

    steps: int = Field(default=2400, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=40, ge=1)
    """Demonstrations per optimizer step."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Muon learns this in about half the tokens that AdamW takes."""
    learning_rate: float = Field(default=3e-3, gt=0.0)
    """Peak learning rate; cosine schedule."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay of matrices."""
    easy_first_share: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of the steps whose critic demonstrations are the shortest problems only: a curriculum."""
    attacker_share: float = Field(default=0.05, ge=0.0, le=1.0)
    """Share of demonstrations of the attacker's role."""
    learner_share: float = Field(default=0.12, ge=0.0, le=1.0)
    """Share of demonstrations of the learner's role; the critic's role has the rest."""
    num_chunks: int = Field(default=20, ge=1)
    """The data is made and handed over in this many pieces; one tick of the progress bar each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        shares = self.attacker_share + self.learner_share
        if shares > 1.0:
            raise ValueError(
                f"learner_share: got {self.learner_share:g} beside attacker_share = {self.attacker_share:g}, wanted "
                f"together 1 at most, not {shares:g}: the critic's role has the rest"
            )
        if self.steps < self.num_chunks:
            raise ValueError(
                f"num_chunks: got {self.num_chunks}, wanted at most steps = {self.steps}: a piece has a step or more"
            )
        return self


TRAINING_KEYS = {"num_ranks", "zero_stage", "dtype", "micro_batch_tokens", "betas", "epsilon", "max_grad_norm"}
"""What the bootstrap takes over from the learner's training that its weights depend on; the rest is its own."""


def cache_key(
    config: BootstrapConfig, *, base_model: BaseModelConfig, domain: Config, training: TrainingConfig, seed: int
) -> str:
    """Return the name of the cached result: a hash of all that the result depends on."""
    sections = [section.model_dump(mode="json") for section in (config, base_model, domain)]
    parts = [CACHE_FORMAT, *sections, training.model_dump(mode="json", include=TRAINING_KEYS), seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_base_model(path: Path, config: BaseModelConfig, *, seed: int) -> Path:
    """Write the randomly initialised base model with its tokenizer and return its path."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    control = [PAD, END, SYSTEM, USER, ASSISTANT, *ROLE_TOKENS, "<|unknown|>"]
    vocabulary = {token: i for i, token in enumerate([*control, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token="<|unknown|>",
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, *ROLE_TOKENS],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                max_position_embeddings=config.max_positions,
                tie_word_embeddings=True,
                pad_token_id=vocabulary[PAD],
                eos_token_id=vocabulary[END],
                bos_token_id=None,
            )
        )
    path.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    # Not model.save_pretrained: it imports DeepSpeed, which takes seconds and belongs to the ranks alone.
    save_file(dict(model.named_parameters()), path / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(path)
    return path
