"""LoRA on real ranks and a real engine: what is trained, saved, published as an adapter, and exported merged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from actors.adapter import adapter_shapes
from actors.model_directory import expected_shapes
from tests.adapter_ranks import IDS, PROBE, Tensors, adapter, difference, logprobs_of, pair_table, update
from tests.one_loop import Loop
from tests.test_training_group_rl import Toy
from tests.tiny_models import write_llama
from trainers.losses import bradley_terry, ppo
from trainers.ranks.lora import LoraConfig
from trainers.training_group import (
    CorruptCheckpoint,
    ModelSource,
    TrainingConfig,
    TrainingGroup,
    TrainingPlan,
    UpdateReport,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

LORA = LoraConfig(rank=4, alpha=8.0)


def settings(*, num_ranks: int = 2, zero_stage: Literal[0, 1, 2, 3] = 0, lora: LoraConfig = LORA) -> TrainingConfig:
    return TrainingConfig(
        num_ranks=num_ranks,
        zero_stage=zero_stage,
        batch_size=8,
        micro_batch_tokens=512,
        learning_rate=1e-2,
        epsilon=1e-5,  # A's first gradients are almost 0: AdamW would divide rounding by rounding
        lora=lora,
        cpus_per_rank=0.01,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(path=str(write_llama(tmp_path_factory.mktemp("models") / "base", tied=True)))


@pytest.fixture(scope="module")
def pair(loop: Loop, base: ModelSource) -> Iterator[TrainingGroup]:
    """Two ranks."""
    group = TrainingGroup(config=settings(), source=base, name="lora-pair")
    loop.run(group.start())
    yield group
    loop.run(group.shutdown())


async def trained(group: TrainingGroup, *, config: TrainingConfig, source: ModelSource) -> tuple[UpdateReport, Tensors]:
    await group.reopen(config=config, source=source)
    return await update(group), await adapter(group)


@pytest.fixture(scope="module")
def reference(loop: Loop, pair: TrainingGroup, base: ModelSource) -> tuple[UpdateReport, Tensors]:
    """Four steps on two ranks at ZeRO 0: what all other ways must come to."""
    return loop.run(trained(pair, config=settings(), source=base))


def test_an_adapter_learns_pairs_and_is_all_that_is_published(
    base: ModelSource, reference: tuple[UpdateReport, Tensors]
) -> None:
    report, got = reference
    first, *_, last = report.steps
    assert first.metrics["chosen_logratio"] == 0.0
    assert first.loss == pytest.approx(0.693147, abs=1e-6)
    assert last.loss < 0.5
    assert {name: tuple(tensor.shape) for name, tensor in got.items()} == adapter_shapes(
        expected_shapes(base.path), LORA
    )
    assert all(float(tensor.abs().max()) > 0 for tensor in got.values())


def test_one_rank_trains_the_same_adapter_as_two(
    loop: Loop, base: ModelSource, reference: tuple[UpdateReport, Tensors]
) -> None:
    async def call() -> Tensors:
        single = TrainingGroup(config=settings(num_ranks=1), source=base, name="lora-single")
        await single.start()
        await update(single)
        got = await adapter(single)
        await single.shutdown()
        return got

    assert difference(loop.run(call()), reference[1]) <= 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_the_same_adapter(
    loop: Loop,
    pair: TrainingGroup,
    base: ModelSource,
    reference: tuple[UpdateReport, Tensors],
    stage: Literal[1, 2, 3],
) -> None:
    _, got = loop.run(trained(pair, config=settings(zero_stage=stage), source=base))
    assert difference(got, reference[1]) <= 1e-5


@pytest.mark.parametrize(
    "change",
    [{"gradient_checkpointing": True}, {"zero_stage": 2, "offload": "cpu"}, {"zero_stage": 3, "offload": "cpu"}],
    ids=["computed again", "offload 2", "offload 3"],
)
def test_what_saves_memory_trains_the_same_adapter(
    loop: Loop,
    pair: TrainingGroup,
    base: ModelSource,
    reference: tuple[UpdateReport, Tensors],
    change: dict[str, object],
) -> None:
    config = TrainingConfig.model_validate({**settings().model_dump(), **change})
    _, got = loop.run(trained(pair, config=config, source=base))
    assert difference(got, reference[1]) <= 1e-5


def test_an_adapter_of_a_bf16_base_is_published_in_bf16(
    loop: Loop, pair: TrainingGroup, base: ModelSource, reference: tuple[UpdateReport, Tensors]
) -> None:
    config = TrainingConfig.model_validate({**settings(zero_stage=2).model_dump(), "dtype": "bf16"})
    report, got = loop.run(trained(pair, config=config, source=base))
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    # bf16 has 8 bits of mantissa.
    assert [s.loss for s in report.steps] == pytest.approx([s.loss for s in reference[0].steps], abs=0.1)


def test_a_reward_model_learns_with_an_adapter_and_a_head(loop: Loop, pair: TrainingGroup, base: ModelSource) -> None:
    config = settings().model_copy(update={"value_head": True})
    plan = TrainingPlan.of(IDS, batch_size=8, epochs=4, seed=0)

    async def call() -> tuple[UpdateReport, tuple[float, ...]]:
        await pair.reopen(config=config, source=base)
        report = await pair.update(pair_table(), loss="bradley_terry", loss_config=bradley_terry.Config(), plan=plan)
        return report, await pair.scores(PROBE)

    report, scores = loop.run(call())
    assert report.steps[0].loss == pytest.approx(0.693147, abs=1e-5)
    assert report.steps[-1].loss < 0.3
    assert len(set(scores)) == len(PROBE)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_holds_the_adapter_alone_and_training_goes_on_bit_by_bit(
    loop: Loop, pair: TrainingGroup, base: ModelSource, tmp_path: Path, stage: Literal[0, 1, 2, 3]
) -> None:
    # Dropout: the generators' states are part of what goes on.
    config = settings(zero_stage=stage, lora=LoraConfig(rank=4, alpha=8.0, dropout=0.2))

    async def call() -> tuple[Tensors, Tensors]:
        await pair.reopen(config=config, source=base)
        await update(pair, num_steps=2)
        files = await pair.save(tmp_path / "checkpoint")
        await update(pair, start=2, num_steps=2)
        straight = await adapter(pair)
        await pair.reopen(config=config.model_copy(update={"seed": 5}), source=base)
        await pair.load(tmp_path / "checkpoint", files=files)
        await update(pair, start=2, num_steps=2)
        assert sum(file.size_bytes for file in files) < (Path(base.path) / "model.safetensors").stat().st_size
        return straight, await adapter(pair)

    straight, resumed = loop.run(call())
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_an_adapter_goes_on_with_another_number_of_ranks(
    loop: Loop, pair: TrainingGroup, base: ModelSource, tmp_path: Path, stage: Literal[0, 1, 2, 3]
) -> None:
    single = TrainingGroup(config=settings(num_ranks=1), source=base, name="lora-single")

    async def call(before: TrainingGroup, after: TrainingGroup) -> None:
        path = tmp_path / before.name
        await before.reopen(config=settings(num_ranks=before.config.num_ranks, zero_stage=stage), source=base)
        await update(before, num_steps=2)
        files = await before.save(path)
        await update(before, start=2, num_steps=1)
        straight = await adapter(before)
        await after.reopen(config=settings(num_ranks=after.config.num_ranks, zero_stage=stage), source=base)
        await after.load(path, files=files)
        report = await update(after, start=2, num_steps=1)
        assert report.steps[0].optimizer_step == 2
        assert difference(straight, await adapter(after)) <= 1e-5

    async def both_ways() -> None:
        await single.start()
        try:
            await call(pair, single)
            await call(single, pair)
        finally:
            await single.shutdown()

    loop.run(both_ways())


def test_a_checkpoint_of_another_base_or_another_adapter_is_refused(
    loop: Loop, pair: TrainingGroup, base: ModelSource, tmp_path: Path
) -> None:
    other = ModelSource(path=str(write_llama(tmp_path / "other", tied=True, seed=8)))

    async def call() -> None:
        await pair.reopen(config=settings(), source=base)
        await pair.save(tmp_path / "checkpoint")
        saved = json.loads((tmp_path / "checkpoint" / "training.json").read_text())["lora"]
        assert saved["rank"] == 4
        for config, source in (
            (settings(), other),
            (settings(lora=LoraConfig(rank=2)), base),
            (settings().model_copy(update={"lora": None}), base),
        ):
            await pair.reopen(config=config, source=source)
            with pytest.raises(CorruptCheckpoint, match=saved["base"]):
                await pair.load(tmp_path / "checkpoint")

    loop.run(call())


@pytest.mark.parametrize("stage", [0, 3])
def test_an_export_is_the_base_with_the_adapter_merged(
    loop: Loop, pair: TrainingGroup, base: ModelSource, tmp_path: Path, stage: Literal[0, 3]
) -> None:
    async def call() -> tuple[tuple[tuple[float, ...], ...], Tensors]:
        await pair.reopen(config=settings(zero_stage=stage), source=base)
        await update(pair)
        await pair.export(tmp_path / "policy")
        return await pair.logprobs(PROBE), await adapter(pair)

    said, got = loop.run(call())
    before = load_file(Path(base.path) / "model.safetensors")
    after = load_file(tmp_path / "policy" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in got:
            update_ = 2.0 * got[f"{module}.lora_B.weight"] @ got[f"{module}.lora_A.weight"]
            assert torch.allclose(after[name], tensor + update_, atol=1e-6)
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor), name
    for own, wanted in zip(logprobs_of(tmp_path / "policy", PROBE), said, strict=True):
        assert own == pytest.approx(wanted, abs=1e-4)


def test_the_runs_first_weights_are_the_base_without_its_adapter(
    loop: Loop, pair: TrainingGroup, base: ModelSource
) -> None:
    """What the loss then compares with is the same as a second model of the base would give."""

    async def call(stage: Literal[2, 3]) -> list[float]:
        await pair.reopen(config=settings(zero_stage=stage), source=base)
        await update(pair, num_steps=3)
        report = await update(pair, start=3, num_steps=1, reference="bootstrap")
        assert report.steps[0].metrics["chosen_logratio"] > 0.1
        return [report.steps[0].loss, report.steps[0].metrics["chosen_logratio"]]

    # ZeRO 3 reads the base a second time.
    assert loop.run(call(2)) == pytest.approx(loop.run(call(3)), abs=1e-4)


def test_a_value_head_is_trained_beside_an_adapter_and_goes_into_the_checkpoint(
    loop: Loop, pair: TrainingGroup, base: ModelSource, tmp_path: Path
) -> None:
    config = settings(zero_stage=2).model_copy(update={"value_head": True})
    table = Toy(base.path).sample(seed=1)
    plan = TrainingPlan.of([str(row) for row in table.column("row_id").to_pylist()], batch_size=24, epochs=1, seed=0)

    async def by_ppo() -> list[float]:
        report = await pair.update(table, loss="ppo", loss_config=ppo.Config(), plan=plan)
        return [step.loss for step in report.steps]

    async def call() -> tuple[list[float], list[float]]:
        await pair.reopen(config=config, source=base)
        first = await by_ppo()
        await pair.save(tmp_path / "checkpoint")
        straight = await by_ppo()
        assert straight != first
        await pair.reopen(config=config, source=base)
        await pair.load(tmp_path / "checkpoint")
        assert (await adapter(pair)).keys() == adapter_shapes(expected_shapes(base.path), LORA).keys()
        return straight, await by_ppo()

    # What the head says is in the loss, from the advantages on.
    straight, resumed = loop.run(call())
    assert resumed == straight
