"""Owns a way for weights that needs no GPU, in place of vLLM's "ipc": the same classes, the tensors in the messages.

All but the wire is real: vLLM's factories and base classes on both sides, DeepSpeed's ranks, the engine, Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferInitInfo

from actors.engine import EngineActor, make_vllm_engine
from actors.engine_config import EngineConfig
from trainers.ranks.deepspeed_worker import DeepSpeedRank


@dataclass
class InlineUpdate(WeightTransferUpdateInfo):
    """One tensor."""

    name: str
    values: np.ndarray


class InlineEngine(WeightTransferEngine[IPCWeightTransferInitInfo, InlineUpdate]):
    """The worker's side."""

    init_info_cls = IPCWeightTransferInitInfo
    update_info_cls = InlineUpdate

    def init_transfer_engine(self, init_info: IPCWeightTransferInitInfo) -> None:
        assert init_info.packed, "as the sender asked for"

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: InlineUpdate) -> None:
        self.model.load_weights([(update_info.name, torch.from_numpy(update_info.values.copy()))])

    def finish_weight_update(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        pass


class InlineTrainer(TrainerWeightTransferEngine[IPCTrainerInitInfo]):
    """The ranks' side."""

    init_info_cls = IPCTrainerInitInfo

    @classmethod
    def trainer_init(
        cls, init_info: IPCTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> InlineTrainer:
        if init_info.is_sender:
            client.init_weight_transfer_engine({"packed": init_info.packed})
        return cls(client=client, source=source, is_sender=init_info.is_sender)

    def send_weights(self) -> None:
        assert self.source is not None
        declared = [(meta.name, meta.dtype, meta.shape) for meta in self.source.metadata()]
        if self.is_sender:
            self.client.start_weight_update()
        # All ranks go through all parameters: gathering them is a collective. Kept, as a packing sender keeps them.
        held = [(name, tensor) for name, tensor in self.source]
        assert [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in held] == declared
        if self.is_sender:
            for name, tensor in held:
                self.client.update_weights({"name": name, "values": tensor.numpy().copy()})
            self.client.finish_weight_update()


class InlineReplica(EngineActor):
    """A replica whose vLLM knows the inline way as "ipc"."""

    def __init__(self, config: EngineConfig, *, replica_id: int, log_path: str | None = None) -> None:
        super().__init__(config, replica_id=replica_id, log_path=log_path, make_engine=make_inline_engine)
        self._methods: list[str] = []

    async def apply_weights(self, manifest: Any, probe_token_ids: Sequence[Sequence[int]]) -> Any:
        self._methods.append(f"{manifest.version} by the store")
        return await super().apply_weights(manifest, probe_token_ids)

    async def prove_weights(self, version: str, probe_token_ids: Sequence[Sequence[int]]) -> Any:
        self._methods.append(f"{version} from the ranks")
        return await super().prove_weights(version, probe_token_ids)

    async def methods(self) -> list[str]:
        """Return how each version came."""
        return self._methods


def make_inline_engine(config: EngineConfig, seed: int) -> Any:
    """Start vLLM, with the inline way under the name of CUDA IPC."""
    engine = make_vllm_engine(config, seed)
    WeightTransferEngineFactory._registry["ipc"] = lambda: InlineEngine
    return engine


class InlineRank(DeepSpeedRank):
    """A rank that sends the inline way."""

    def send_weights(self, *args: Any, **kwargs: Any) -> None:
        WeightTransferTrainerFactory._registry["ipc"] = lambda: InlineTrainer
        super().send_weights(*args, **kwargs)
