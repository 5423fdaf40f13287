"""Owns a rank's model: the DeepSpeed engine over it, its adapter, and the weights that it was opened with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.ranks import packed_rows, shared_prompts
from trainers.ranks.adapters import adapter_in
from trainers.ranks.collectives import on_all
from trainers.ranks.deepspeed_engine import build_engine, whole_parameter
from trainers.ranks.first_weights import FirstWeights
from trainers.ranks.lora import base_checksum
from trainers.ranks.model_source import ModelSource, load_model, max_positions
from trainers.ranks.random_states import seed_all
from trainers.ranks.reference_cache import weights_digest
from trainers.ranks.value_head import add_value_head
from trainers.rows import Rows
from trainers.training_config import TrainingConfig


class RankModel:
    """What a rank trains; its engine is another after `build`, so ask for it here and don't keep it."""

    def __init__(
        self, *, rank: int, num_ranks: int, device: torch.device, config: TrainingConfig, source: ModelSource
    ) -> None:
        """Build the engine: model and optimizer.

        Raises:
            ValueError: the directory is no model, or has no weights and no `init_seed` was given.
        """
        self.rank, self.num_ranks, self.device = rank, num_ranks, device
        self.config, self.source = config, source
        self.adapter = adapter_in(config)
        self.first = FirstWeights(load=self._load_first, digest=self._digest_first)
        self.engine: Any = None
        self.build(universal=False)

    def build(self, *, universal: bool) -> None:
        """Make model and engine anew; a universal one reads checkpoints of any number of ranks, and no others."""
        config = self.config
        self.close()
        self.universal = universal
        seed_all(config.seed * 100_003 + self.rank)
        model = self._load()
        self.base = "" if self.adapter is None else base_checksum(model)  # what an adapter is on
        if self.adapter is not None:
            self.adapter.add(model, seed=config.seed)
        if config.value_head:
            add_value_head(model)
        if config.shared_prompts:
            shared_prompts.check(model.to(self.device), name=self.source.path, device=self.device)
        if config.packing:
            packed_rows.check(model.to(self.device), name=self.source.path, device=self.device)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.engine = build_engine(model.to(self.device), config=config, num_ranks=self.num_ranks, universal=universal)
        self._max_positions = max_positions(model.config)

    def close(self) -> None:
        """Take the engine down, if there is one."""
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None

    def whole(self, parameter: Tensor) -> AbstractContextManager[Any]:
        """Return a context in which a parameter is whole on every rank."""
        return whole_parameter(parameter) if self.config.zero_stage == 3 else nullcontext()

    def refuse_long(self, rows: Rows) -> None:
        """Refuse rows that the model has no positions for.

        Raises:
            ValueError: there is one.
        """
        if self._max_positions is not None and len(rows.lengths) and rows.lengths.max() > self._max_positions:
            row = int(np.argmax(rows.lengths))
            raise ValueError(
                f"row {row}: got {rows.lengths[row]} tokens, wanted at most {self._max_positions} "
                f"(max_position_embeddings of {self.source.path}); drop or cut it before training"
            )

    def _load(self) -> Any:
        return load_model(self.source, dtype=torch.bfloat16 if self.config.dtype == "bf16" else torch.float32)

    def _load_first(self) -> Any:
        model = self._load()
        if self.config.value_head:
            add_value_head(model)  # at 0: nobody reads it
        return model.to(self.device)

    def _digest_first(self) -> str:
        source = self.source
        mine = [weights_digest(Path(source.path), init_seed=source.init_seed)] if self.rank == 0 else []
        return f"{on_all(mine)[0]}/{self.config.dtype}"
