"""Owns the settings of Panacea's layers; apart from them, so that reading a config imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from actors.adapter import ENGINE_RANKS, LINEAR_LAYERS, AdapterConfig, refuse_bad_targets
from cluster.config import Config


class PanaceaConfig(Config):
    """One model for all trade-offs between objectives, trained in the place of the weights, which stay as they are."""

    rank: int = Field(default=8, ge=1, le=ENGINE_RANKS[-1])
    """k: singular values of every adapted layer that all trade-offs share."""
    num_objectives: int = Field(default=2, ge=0)
    """m: entries of the preference vector, as many as objectives.names; 0 makes it LoRA with singular values."""
    initial_deviation: float = Field(default=0.02, gt=0.0)
    """Standard deviation of U and V at first; sigma and s are 0, so that the model begins as its base exactly."""
    targets: tuple[str, ...] = LINEAR_LAYERS
    """Names of the linear layers that are adapted, in every block alike."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_bad_targets(self.targets)
        if self.width > ENGINE_RANKS[-1]:
            raise ValueError(
                f"rank: got {self.rank} with {self.num_objectives} objectives, wanted at most "
                f"{ENGINE_RANKS[-1] - self.num_objectives}: engines take adapters of rank {ENGINE_RANKS[-1]} at most"
            )
        return self

    @property
    def width(self) -> int:
        """k + m: the rank of an exported adapter."""
        return self.rank + self.num_objectives

    @property
    def adapter(self) -> AdapterConfig:
        """What an engine is told of it: an adapter of rank k + m, which counts once."""
        return AdapterConfig(rank=self.width, alpha=float(self.width), targets=self.targets)
