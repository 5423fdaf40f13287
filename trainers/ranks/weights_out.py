"""Owns a rank's weights on their way out: to rollout replicas, and to a Hugging Face directory.

Every method is a collective: under ZeRO 3 a whole parameter takes all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.engine import make_sender
from actors.receiving import Opened, ReplicaClient
from cluster.weight_transfer import Backend
from cluster.weights import WeightManifest, put_weights
from trainers.ranks.checkpoint_files import copy_tokenizer, fresh_beside, publish_directory
from trainers.ranks.rank_model import RankModel
from trainers.ranks.value_head import policy_parameters


class WeightsOut:
    """Ways out of one rank."""

    def __init__(self, model: RankModel) -> None:
        self._model = model
        self._senders: dict[int, Any] = {}

    def close(self) -> None:
        """End what vLLM's own transfer has opened."""
        for sender in self._senders.values():
            sender.shutdown()
        self._senders = {}

    def publish(self, *, version: str) -> WeightManifest | None:
        """Put the weights into the object store; the manifest on rank 0, None on the others."""
        if self._model.rank == 0:
            return put_weights(self._sent(), version=version)
        for _ in self._gathered():
            pass
        return None

    def send_weights(
        self, actor: Any, *, backend: Backend, opened: Opened, host: str, port: int, deadline_s: float
    ) -> None:
        """Send the weights as they are to one replica: `DeepSpeedRank.send_weights`."""
        sender = self._senders.get(opened.replica_id)
        if sender is None:
            sender = self._senders[opened.replica_id] = make_sender(
                backend,
                rank=self._model.rank,
                parameters=self._parameters(),
                weights=self._sent,
                client=ReplicaClient(actor, backend=backend, deadline_s=deadline_s),
                num_workers=opened.num_workers,
                rendezvous=(host, port),
            )
        sender.send_weights()

    def export(self, path: str) -> None:
        """Write an ordinary Hugging Face directory, which appears whole or not at all."""
        weights = {}
        for name, parameter in self._exported():
            if self._model.rank == 0:
                weights[name] = parameter.detach().cpu().clone()
        target = Path(path)
        beside = fresh_beside(target) if self._model.rank == 0 else None
        if beside is not None:
            self._model.engine.module.save_pretrained(beside, state_dict=weights)
            copy_tokenizer(Path(self._model.source.path), beside)
        if self._model.adapter is not None:
            self._model.adapter.write(self._model.engine.module, beside, whole=self._model.whole, base=self._model.base)
        if beside is not None:
            publish_directory(beside, target)
        dist.barrier()

    def _parameters(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return name, dtype and whole shape of what `_gathered` gives, without gathering."""
        named = policy_parameters(self._model.engine.module)  # an adapter never goes this way
        # Under ZeRO 3 a parameter's own shape is that of what this rank holds, or of nothing.
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named]

    def _sent(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole parameters as a sender may keep them: those that ZeRO 3 gathers are copied."""
        for name, parameter in self._gathered():
            yield name, parameter.clone() if self._model.config.zero_stage == 3 else parameter

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the rollout pool is given, whole: the policy's parameters, or its adapter's alone.

        A tied head has no entry of its own.
        """
        if self._model.adapter is not None:
            yield from self._model.adapter.published(self._model.engine.module, whole=self._model.whole)
            return
        for name, parameter in policy_parameters(self._model.engine.module):
            with self._model.whole(parameter):
                yield name, parameter.detach()

    def _exported(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole policy, an adapter merged into its base."""
        if self._model.adapter is None:
            return self._gathered()
        return self._model.adapter.merged(self._model.engine.module, whole=self._model.whole)
