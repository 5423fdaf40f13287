"""Owns what a rank does with an adapter, whichever it is: LoRA's or Panacea's layers, by one set of calls.

Of DeepSpeed it knows nothing: a whole tensor under ZeRO 3 is what the caller's `whole` gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trainers.ranks import lora, panacea
from trainers.ranks.lora import LoraConfig
from trainers.ranks.model_source import ModelSource, load_model
from trainers.ranks.panacea import Whole
from trainers.ranks.panacea_config import PanaceaConfig
from trainers.ranks.value_head import NAME as VALUE_HEAD
from trainers.training_config import TrainingConfig

LAYERS_DIR = "panacea"
"""Where a policy's directory has Panacea's layers: below it, for engines read every weight file that lies in it."""
LAYERS_FILE = "layers.safetensors"
SETTINGS_FILE = "panacea.json"


class Adapter(Protocol):
    """What is trained in the place of a model's weights, which stay as they are."""

    def add(self, model: Any, *, seed: int) -> None:
        """Freeze a model and put the adapter into it; until it is trained it changes nothing."""
        ...

    def published(self, model: Any, *, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that a rollout engine is given, whole, by the names that it knows them by."""
        ...

    def merged(self, model: Any, *, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        """Yield the base model's parameters as they are with the adapter in them."""
        ...

    def without(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context in which the model answers as its base does."""
        ...

    def write(self, model: Any, policy: Path | None, *, whole: Whole, base: str) -> None:
        """Write into a policy's directory what its merged weights do not tell; all ranks call, one has a directory."""
        ...


class Lora:
    """LoRA's A and B, put in by peft."""

    def __init__(self, config: LoraConfig) -> None:
        self._config = config

    def add(self, model: Any, *, seed: int) -> None:
        """See `Adapter`."""
        lora.add_adapter(model, self._config, seed=seed)

    def published(self, model: Any, *, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        """See `Adapter`."""
        for name, parameter in lora.adapter_parameters(model):
            with whole(parameter):
                yield name, parameter.detach()

    def merged(self, model: Any, *, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        """See `Adapter`."""
        return lora.merged_parameters(model, whole=whole, leave_out=VALUE_HEAD)

    def without(self, model: Any) -> AbstractContextManager[Any]:
        """See `Adapter`."""
        return lora.without_adapter(model)

    def write(self, model: Any, policy: Path | None, *, whole: Whole, base: str) -> None:
        """See `Adapter`: merged weights tell all that there is."""


class Panacea:
    """Panacea's layers, at the preference vector that is set."""

    def __init__(self, config: PanaceaConfig) -> None:
        self._config = config

    def add(self, model: Any, *, seed: int) -> None:
        """See `Adapter`."""
        panacea.add_panacea(model, self._config, seed=seed)

    def published(self, model: Any, *, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        """See `Adapter`."""
        return panacea.adapter_parameters(model, whole=whole)

    def merged(self, model: Any, *, whole: Whole) -> Iterator[tuple[str, Tensor]]:
        """See `Adapter`."""
        return panacea.merged_parameters(model, whole=whole, leave_out=VALUE_HEAD)

    def without(self, model: Any) -> AbstractContextManager[Any]:
        """See `Adapter`."""
        return panacea.without_panacea(model)

    def write(self, model: Any, policy: Path | None, *, whole: Whole, base: str) -> None:
        """See `Adapter`: U, V, sigma and s, from which the weights of every other vector are made."""
        from safetensors.torch import save_file

        learnt = dict(panacea.learnt_parameters(model, whole=whole))
        if policy is None:
            return
        folder = policy / LAYERS_DIR
        folder.mkdir()
        save_file(learnt, folder / LAYERS_FILE, metadata={"format": "pt"})
        settings = {**self._config.model_dump(mode="json"), "base": base}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def adapter_in(config: TrainingConfig) -> Adapter | None:
    """Return what is trained in the place of the weights; None where they are trained themselves."""
    if config.lora is not None:
        return Lora(config.lora)
    return None if config.panacea is None else Panacea(config.panacea)


def adapter_topology(config: TrainingConfig, *, base: str) -> dict[str, Any]:
    """Return what a checkpoint of an adapter must agree on with the ranks that load it: settings and base."""
    sections = {"lora": config.lora, "panacea": config.panacea}
    return {
        name: None if section is None else {**section.model_dump(mode="json"), "base": base}
        for name, section in sections.items()
    }


def with_layers(policy: Path, *, base: Path) -> tuple[Any, PanaceaConfig]:
    """Return the base model with the layers that `Panacea.write` put beside a policy, ready for any vector.

    Raises:
        ValueError: the policy has no such layers, or they are of another base.
    """
    from safetensors.torch import load_file

    folder = policy / LAYERS_DIR
    if not (folder / SETTINGS_FILE).is_file():
        raise ValueError(f"{policy}: got no {LAYERS_DIR}/{SETTINGS_FILE}, wanted a policy of learner.training.panacea")
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    wanted = settings.pop("base")
    config = PanaceaConfig.model_validate(settings)
    learnt = load_file(folder / LAYERS_FILE)
    model = load_model(ModelSource(path=str(base)), dtype=next(iter(learnt.values())).dtype)
    found = lora.base_checksum(model)
    if found != wanted:
        raise ValueError(f"{base}: got a model of checksum {found}, wanted {wanted}, the base of {policy}")
    panacea.add_panacea(model, config, seed=0)
    for name, layer in panacea.layers_of(model):
        for attribute, parameter in panacea.learnt_of(layer).items():
            parameter.data.copy_(learnt[f"{name}.{attribute}"])
    return model.eval(), config
