"""Owns the optimizer that trains small models from nothing: Muon for the blocks' matrices, AdamW for the rest.

Muon orthogonalises the momentum of each matrix (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982, whose scaling to
AdamW's update size is used, so that one learning rate serves both). Both updates are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):
    """Two of torch's optimizers over one set of parameter groups; a group's `muon` says which one moves it."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Take the matrices of the model's numbered blocks for Muon and everything else for AdamW."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = [p for name, p in named if p.ndim == 2 and any(part.isdigit() for part in name.split("."))]
        chosen = {id(p) for p in inner}
        outer = [p for _, p in named if id(p) not in chosen]
        self._muon = torch.optim.Muon(inner, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(outer, lr=lr, betas=betas, eps=eps, weight_decay=0.0)
        groups = [
            {**self._muon.param_groups[0], "muon": True},
            {**self._adamw.param_groups[0], "muon": False},
        ]
        super().__init__(groups, defaults={"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Make one step of both; state and groups stay those of this optimizer, so that checkpoints hold all."""
        assert closure is None, "no closure is used here"
        for optimizer, is_muon in ((self._muon, True), (self._adamw, False)):
            optimizer.param_groups = [group for group in self.param_groups if group["muon"] is is_muon]
            optimizer.state = self.state
            optimizer.step()
        return None
