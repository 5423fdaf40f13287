"""Owns what ranks tell one another beside gradients: lists of all, sums over all. Every call is a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def on_all(items: list[Any]) -> list[Any]:
    """Return the items of all ranks, in the ranks' order."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def all_sum(sums: dict[str, float], *, device: torch.device) -> Callable[[], dict[str, float]]:
    """Begin to add up over all ranks; what is returned waits for the sums."""
    values = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64, device=device)
    work = dist.all_reduce(values, async_op=True)

    def result() -> dict[str, float]:
        work.wait()
        return dict(zip(sorted(sums), values.tolist(), strict=True))

    return result
