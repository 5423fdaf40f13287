"""Panacea on real ranks and a real engine: what is trained, saved, published at a vector, and exported merged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.adapter import adapter_shapes
from actors.engine import EngineConfig, start_engine_replica
from actors.engine_config import with_adapter
from actors.generation import Completion, GenerationRequest
from actors.model_directory import expected_shapes
from cluster.pool import Pool
from cluster.replica import Replica
from cluster.weight_sync import sync_weights
from cluster.weights import ParityProbe
from tests.adapter_ranks import PROBE, Tensors, adapter, difference, logprobs_of, update
from tests.one_loop import Loop
from tests.published_learner import BOUND
from tests.tiny_models import write_llama
from trainers.ranks.adapters import LAYERS_DIR, LAYERS_FILE, SETTINGS_FILE
from trainers.ranks.panacea import PanaceaLinear, add_panacea, layers_of, merged_parameters, set_preference
from trainers.ranks.panacea_config import PanaceaConfig
from trainers.training_group import CorruptCheckpoint, ModelSource, TrainingConfig, TrainingGroup, UpdateReport

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

PANACEA = PanaceaConfig(rank=3, num_objectives=2)
FIRST, SECOND = (0.3, 0.7), (0.9, 0.1)


def settings(*, num_ranks: int = 2, zero_stage: Literal[0, 1, 2, 3] = 0) -> TrainingConfig:
    return TrainingConfig(
        num_ranks=num_ranks,
        zero_stage=zero_stage,
        batch_size=8,
        micro_batch_tokens=512,
        learning_rate=3e-2,
        epsilon=1e-5,  # the first gradients of U and V are 0: AdamW would divide rounding by rounding
        panacea=PANACEA,
        cpus_per_rank=0.01,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(path=str(write_llama(tmp_path_factory.mktemp("models") / "base", tied=True)))


@pytest.fixture(scope="module")
def pair(loop: Loop, base: ModelSource) -> Iterator[TrainingGroup]:
    """Two ranks."""
    group = TrainingGroup(config=settings(), source=base, name="panacea-pair")
    loop.run(group.start())
    yield group
    loop.run(group.shutdown())


async def twice(group: TrainingGroup) -> UpdateReport:
    """Train two steps at one vector and two at another, as two iterations do."""
    await group.set_preference(FIRST)
    await update(group, num_steps=2)
    await group.set_preference(SECOND)
    return await update(group, start=2, num_steps=2)


async def trained(group: TrainingGroup, *, config: TrainingConfig, source: ModelSource) -> Tensors:
    await group.reopen(config=config, source=source)
    await twice(group)
    return await adapter(group)


@pytest.fixture(scope="module")
def reference(loop: Loop, pair: TrainingGroup, base: ModelSource) -> Tensors:
    """Four steps on two ranks at ZeRO 0: what all other ways must come to."""
    return loop.run(trained(pair, config=settings(), source=base))


def test_an_adapter_of_one_vector_is_all_that_is_published(
    loop: Loop, pair: TrainingGroup, base: ModelSource, reference: Tensors
) -> None:
    shapes = adapter_shapes(expected_shapes(base.path), PANACEA.adapter)
    assert {name: tuple(tensor.shape) for name, tensor in reference.items()} == shapes
    assert all(float(tensor.abs().max()) > 0 for tensor in reference.values())

    async def call() -> tuple[Tensors, Tensors]:
        await trained(pair, config=settings(), source=base)
        await pair.set_preference(FIRST)
        first = await adapter(pair)
        await pair.set_preference(SECOND)
        return first, await adapter(pair)

    first, second = loop.run(call())
    # U is of all vectors, the diagonal of one.
    assert difference(second, reference) == 0.0
    assert all(torch.equal(first[name], second[name]) == ("lora_B" in name) for name in first)


def test_one_rank_trains_the_same_as_two(loop: Loop, base: ModelSource, reference: Tensors) -> None:
    async def call() -> Tensors:
        single = TrainingGroup(config=settings(num_ranks=1), source=base, name="panacea-single")
        await single.start()
        await twice(single)
        got = await adapter(single)
        await single.shutdown()
        return got

    assert difference(loop.run(call()), reference) <= 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_the_same(
    loop: Loop, pair: TrainingGroup, base: ModelSource, reference: Tensors, stage: Literal[1, 2, 3]
) -> None:
    assert difference(loop.run(trained(pair, config=settings(zero_stage=stage), source=base)), reference) <= 1e-5


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_holds_the_layers_alone_and_training_goes_on_bit_by_bit(
    loop: Loop, pair: TrainingGroup, base: ModelSource, tmp_path: Path, stage: Literal[0, 2, 3]
) -> None:
    config = settings(zero_stage=stage)

    async def call() -> tuple[Tensors, Tensors]:
        await pair.reopen(config=config, source=base)
        await pair.set_preference(FIRST)
        await update(pair, num_steps=2)
        files = await pair.save(tmp_path / "checkpoint")
        await pair.set_preference(SECOND)
        await update(pair, start=2, num_steps=2)
        straight = await adapter(pair)
        await pair.reopen(config=config.model_copy(update={"seed": 5}), source=base)
        await pair.load(tmp_path / "checkpoint", files=files)
        await pair.set_preference(SECOND)
        await update(pair, start=2, num_steps=2)
        assert sum(file.size_bytes for file in files) < (Path(base.path) / "model.safetensors").stat().st_size
        resumed = await adapter(pair)
        other = config.model_copy(update={"panacea": PanaceaConfig(rank=2)})
        await pair.reopen(config=other, source=base)
        with pytest.raises(CorruptCheckpoint, match="saved with"):
            await pair.load(tmp_path / "checkpoint")
        return straight, resumed

    straight, resumed = loop.run(call())
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_training_goes_on_with_another_number_of_ranks(
    loop: Loop, pair: TrainingGroup, base: ModelSource, reference: Tensors, tmp_path: Path
) -> None:
    async def call() -> Tensors:
        await pair.reopen(config=settings(zero_stage=2), source=base)
        await pair.set_preference(FIRST)
        await update(pair, num_steps=2)
        files = await pair.save(tmp_path / "checkpoint")
        single = TrainingGroup(config=settings(num_ranks=1, zero_stage=2), source=base, name="panacea-single")
        await single.start()
        try:
            await single.load(tmp_path / "checkpoint", files=files)
            await single.set_preference(SECOND)
            await update(single, start=2, num_steps=2)
            return await adapter(single)
        finally:
            await single.shutdown()

    assert difference(loop.run(call()), reference) <= 1e-5


@pytest.mark.parametrize("stage", [0, 3])
def test_an_export_is_the_base_with_one_vectors_update_and_keeps_what_makes_the_others(
    loop: Loop, pair: TrainingGroup, base: ModelSource, tmp_path: Path, stage: Literal[0, 3]
) -> None:
    async def call() -> tuple[tuple[float, ...], ...]:
        await trained(pair, config=settings(zero_stage=stage), source=base)
        await pair.set_preference(FIRST)
        await pair.export(tmp_path / "policy")
        return await pair.logprobs(PROBE)

    said = loop.run(call())
    before, after = (load_file(path / "model.safetensors") for path in (Path(base.path), tmp_path / "policy"))
    learnt = load_file(tmp_path / "policy" / LAYERS_DIR / LAYERS_FILE)
    # Made anew from the base: to the bit what the ranks exported, so that their base is still what it was.
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    add_panacea(model, PANACEA, seed=0)
    fill(model, learnt)
    set_preference(model, FIRST)
    made = dict(merged_parameters(model))
    assert all(torch.equal(made[name], tensor) for name, tensor in after.items())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name, _ in layers_of(model)}
    saved = json.loads((tmp_path / "policy" / LAYERS_DIR / SETTINGS_FILE).read_text())
    assert (saved["rank"], saved["num_objectives"]) == (3, 2)
    for own, wanted in zip(logprobs_of(tmp_path / "policy", PROBE), said, strict=True):
        assert own == pytest.approx(wanted, abs=1e-4)


def fill(model: object, learnt: Tensors) -> None:
    layers: dict[str, PanaceaLinear] = dict(layers_of(model))
    with torch.no_grad():
        for name, tensor in learnt.items():
            layer, _, attribute = name.rpartition(".")
            getattr(layers[layer], attribute).copy_(tensor)


def test_the_runs_first_weights_are_the_base_whatever_the_vector(
    loop: Loop, pair: TrainingGroup, base: ModelSource
) -> None:
    async def call(stage: Literal[2, 3]) -> list[float]:
        await trained(pair, config=settings(zero_stage=stage), source=base)
        report = await update(pair, start=3, num_steps=1, reference="bootstrap")
        assert report.steps[0].metrics["chosen_logratio"] != pytest.approx(0.0, abs=0.01)
        return [report.steps[0].loss, report.steps[0].metrics["chosen_logratio"]]

    # ZeRO 3 reads the base a second time.
    assert loop.run(call(2)) == pytest.approx(loop.run(call(3)), abs=1e-4)


def test_a_group_without_the_layers_refuses_a_vector(loop: Loop, pair: TrainingGroup, base: ModelSource) -> None:
    async def call() -> None:
        await pair.reopen(config=settings(), source=base)
        with pytest.raises(ValueError, match="wanted 2 numbers, none below 0, that add up to 1"):
            await pair.set_preference((0.5, 0.6))
        await pair.reopen(config=settings().model_copy(update={"panacea": None}), source=base)
        with pytest.raises(ValueError, match="got a model without its layers"):
            await pair.set_preference(FIRST)

    loop.run(call())


def test_an_engine_answers_as_the_ranks_do_at_each_vector(loop: Loop, pair: TrainingGroup, base: ModelSource) -> None:
    engine = with_adapter(EngineConfig(model=base.path, kv_cache_gb=0.05, max_num_seqs=16), PANACEA.adapter)

    def start(replica_id: int) -> Replica:
        return start_engine_replica(engine, replica_id=replica_id, num_cpus=0.2)

    async def call() -> list[float]:
        await trained(pair, config=settings(), source=base)
        pool: Pool[GenerationRequest, Completion] = Pool(name="rollouts", start_replica=start, num_replicas=1)
        await pool.start()
        gaps = []
        try:
            probes = []
            for version, vector in (("v1", FIRST), ("v1@0.9000,0.1000", SECOND)):
                await pair.set_preference(vector)
                manifest = await pair.publish(version=version)
                probe = ParityProbe(token_ids=PROBE, logprobs=await pair.logprobs(PROBE), bound=BOUND)
                report = await sync_weights(pool, manifest, probe=probe, deadline_s=240.0)
                assert (report.quarantined, report.version) == ({}, version)
                gaps.append(report.max_abs_diff)
                probes.append(probe.logprobs)
            assert max(abs(a - b) for x, y in zip(*probes, strict=True) for a, b in zip(x, y, strict=True)) > 10 * BOUND
        finally:
            await asyncio.wait_for(pool.shutdown(), 60)
        return gaps

    assert max(loop.run(call())) < BOUND
