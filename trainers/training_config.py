"""Owns the settings of a training group, and the learning rate that they give at each optimizer step."""

from __future__ import annotations

import math
from typing import Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from actors.adapter import AdapterConfig
from cluster.config import Config
from cluster.node_labels import checked_labels
from trainers.ranks.lora import LoraConfig
from trainers.ranks.panacea_config import PanaceaConfig

ReferenceWeights: TypeAlias = Literal["start_of_update", "bootstrap"]
"""Which weights the reference's log-probs are of: those at the update's start, or the first that the group had."""


class TrainingConfig(Config):
    """How a role's weights are trained."""

    num_ranks: int = Field(default=2, ge=1)
    """Ranks: processes that share the batch, and from ZeRO 1 on the optimizer's state."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What the ranks split: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; bf16 keeps fp32 master weights and needs zero_stage of 1 or more."""
    batch_size: int = Field(default=64, ge=1)
    """Rows (pairs, documents) per optimizer step, over all ranks."""
    micro_batch_tokens: int = Field(default=4096, ge=1)
    """Greatest number of tokens, padding included, in one forward pass of one rank; a longer row goes alone."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the blocks' matrices (Jordan et al. 2024), AdamW for the rest; zero_stage 0."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: optimizer state, and under zero_stage 3 the weights too, lie in the host's memory and are trained there."""
    shared_prompts: bool = False
    """Compute the prompt of a preference pair once for both responses; the model must take masks of ours (checked).
    Other rows are computed as without it."""
    packing: bool = False
    """Put short sequences of a micro-batch behind one another in rows as long as its longest; the model must tell them
    apart by their positions (checked). Of log-probs: reward models and losses of labels compute padded rows."""
    gradient_checkpointing: bool = False
    """Keep of each block only its input, and compute the rest again for the backward pass: less memory, more time."""
    value_head: bool = False
    """The policy learns also what its responses will score, with a head on its last hidden state; for ppo and relc."""
    lora: LoraConfig | None = None
    """Train an adapter in the place of the weights; without this section all of them are trained."""
    panacea: PanaceaConfig | None = None
    """Train layers that hang on a preference vector in the place of the weights: one learner for all trade-offs."""
    learning_rate: float = Field(default=1e-5, gt=0.0)
    """Greatest learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    epsilon: float = Field(default=1e-8, gt=0.0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled decay of matrices; norms and biases have none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up, down to 0 at total_steps."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises."""
    total_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps until the schedule's end; needed unless the schedule is constant."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Gradients are scaled down to this norm; 0 switches clipping off."""
    seed: int = 0
    """Of dropout."""
    threads_per_rank: int = Field(default=1, ge=1)
    """CPU threads of a rank."""
    cpus_per_rank: float = Field(default=1.0, ge=0.0)
    """Ray CPUs that a rank reserves."""
    gpus_per_rank: float = Field(default=0.0, ge=0.0)
    """Ray GPUs that a rank reserves; without one it computes on the CPU."""
    arrangement: Literal["pack", "spread"] = "pack"
    """How the ranks lie on the nodes: "pack" on as few as can be, so that they talk without a network, or "spread"."""
    node_labels: tuple[str, ...] = ()
    """Labels of the nodes that ranks may be on, as "label=value"; for example "ray.io/node-group=learner"."""
    start_deadline_s: float = Field(default=240.0, gt=0.0)
    """Longest time to place the ranks, import DeepSpeed and load the model."""
    step_deadline_s: float = Field(default=120.0, gt=0.0)
    """Longest time for one optimizer step; of short ones, for a second's worth of them."""
    call_deadline_s: float = Field(default=600.0, gt=0.0)
    """Longest time for any other call: reference log-probs of an update, publish, export, save, load."""

    @field_validator("node_labels")
    @classmethod
    def _labels(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        return checked_labels(labels)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dtype == "bf16" and self.zero_stage == 0:
            raise ValueError('dtype: got "bf16" with zero_stage = 0, which keeps no fp32 weights; set zero_stage = 1')
        if self.optimizer == "muon" and self.zero_stage != 0:
            raise ValueError(f'optimizer: got "muon" with zero_stage = {self.zero_stage}, wanted 0; or use "adamw"')
        if self.packing and self.shared_prompts:
            raise ValueError("packing: got true with shared_prompts = true, wanted one of the two: both arrange rows")
        if self.lora is not None and self.panacea is not None:
            raise ValueError("panacea: got it with lora, wanted one of the two: both take the weights' place")
        if self.panacea is not None and self.value_head:
            raise ValueError(
                "panacea: got it with value_head = true, wanted false: a value is of one trade-off, and knows of none; "
                "take a loss without values, such as grpo"
            )
        if self.optimizer == "muon" and self.adapter is not None:
            name = "lora" if self.panacea is None else "panacea"
            raise ValueError(f'optimizer: got "muon" with {name}, wanted "adamw": it is for whole matrices')
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError(
                'offload: got "cpu" with zero_stage = 0, wanted 1, 2 or 3: what the ranks split is what they put aside'
            )
        if self.schedule != "constant" and self.total_steps is None:
            raise ValueError(f'total_steps: got nothing with schedule = "{self.schedule}", wanted the number of steps')
        if self.total_steps is not None and self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"total_steps: got {self.total_steps}, wanted more than warmup_steps ({self.warmup_steps})"
            )
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, wanted two numbers in [0, 1)")
        return self

    @property
    def adapter(self) -> AdapterConfig | None:
        """What engines are told of an adapter that is trained in the place of the weights; None where they are."""
        if self.lora is not None:
            return self.lora.adapter
        return None if self.panacea is None else self.panacea.adapter


def learning_rate(config: TrainingConfig, *, step: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    >>> [learning_rate(TrainingConfig(learning_rate=1.0, warmup_steps=2), step=i) for i in range(4)]
    [0.5, 1.0, 1.0, 1.0]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    assert config.total_steps is not None, "validated"
    done = min(1.0, (step - config.warmup_steps) / (config.total_steps - config.warmup_steps))
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * left
