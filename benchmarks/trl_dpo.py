"""Owns TRL's side of `benchmarks.against_trl`: runs in an environment that has TRL."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

EPOCHS, BATCH_SIZE = 2, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A preference pair as text; every character is a token."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlSetting:
    """What TRL trains."""

    model: str
    pairs: tuple[Pair, ...]
    learning_rate: float
    max_grad_norm: float
    beta: float
    threads: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What one side's round took and came to."""

    seconds: float
    num_tokens: int
    """Real tokens of the policy's forward passes."""
    first_loss: float


def hold(setting: TrlSetting) -> TrlSetting:
    """Import what `train` needs."""
    import torch
    import trl  # noqa: F401

    torch.set_num_threads(setting.threads)
    return setting


def train(setting: TrlSetting, precompute: bool) -> Trained:
    """Train a fresh copy of the model by TRL's DPOTrainer; what its tokenizer and its loading take is not counted."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Timed(DPOTrainer):  # type: ignore[misc]
        """Notes how long the reference's log-probs take beforehand."""

        reference_s = 0.0

        def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments, **named)
            self.reference_s += time.perf_counter() - begin
            return found

    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    rows = Dataset.from_dict(
        {
            "prompt": [pair.prompt for pair in setting.pairs],
            "chosen": [pair.chosen for pair in setting.pairs],
            "rejected": [pair.rejected for pair in setting.pairs],
        }
    )
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32),
        args=DPOConfig(
            output_dir=setting.output,
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=EPOCHS,
            learning_rate=setting.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=setting.max_grad_norm,
            beta=setting.beta,
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    logged = [entry for entry in trainer.state.log_history if "num_tokens" in entry and "loss" in entry]
    return Trained(
        seconds=seconds + trainer.reference_s,
        num_tokens=int(logged[-1]["num_tokens"]),
        first_loss=float(logged[0]["loss"]),
    )
