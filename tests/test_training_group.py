"""The training group on real DeepSpeed: one rank or two, ZeRO 0 to 3, checkpoints, exports, publishing, failures.

Processes are started three times in all; `reopen` gives each test a fresh engine in them.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

import psutil
import pyarrow as pa
import pytest
import torch

from cluster.weights import iter_tensors
from tests.one_loop import Loop
from tests.tiny_models import write_gpt2, write_llama, write_qwen2
from trainers.kl import KlBudget
from trainers.logprobs import token_logprobs
from trainers.losses import dpo, sft
from trainers.training_config import ReferenceWeights
from trainers.training_group import (
    CorruptCheckpoint,
    ModelSource,
    StepReport,
    TrainingConfig,
    TrainingDiverged,
    TrainingGroup,
    TrainingGroupError,
    TrainingPlan,
    UpdateReport,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

T = TypeVar("T")
NUM_PAIRS = 16
IDS = [f"p{i:02d}" for i in range(NUM_PAIRS)]
PROBE = ((7, 8, 9, 10), (20, 21), (30, 31, 32, 33, 34, 35))


def settings(
    *,
    num_ranks: int = 2,
    zero_stage: Literal[0, 1, 2, 3] = 0,
    dtype: Literal["fp32", "bf16"] = "fp32",
    micro_batch_tokens: int = 512,
    learning_rate: float = 1e-3,
) -> TrainingConfig:
    return TrainingConfig(
        num_ranks=num_ranks,
        zero_stage=zero_stage,
        dtype=dtype,
        batch_size=8,
        micro_batch_tokens=micro_batch_tokens,
        learning_rate=learning_rate,
        warmup_steps=2,
        weight_decay=0.01,
        cpus_per_rank=0.01,
    )


def pair_table(order: list[int] | None = None) -> pa.Table:
    generator = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [generator.randrange(6, 100) for _ in range(generator.randrange(least, most))]

    table = pa.table(
        {
            "pair_id": IDS,
            "prompt_token_ids": [ids(5, 20) for _ in IDS],
            "chosen_token_ids": [ids(2, 40) for _ in IDS],
            "rejected_token_ids": [ids(2, 40) for _ in IDS],
            "weight": [0.5 + generator.random() for _ in IDS],
        }
    )
    return table if order is None else table.take(pa.array(order))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    root = tmp_path_factory.mktemp("models")
    return {
        "tied": ModelSource(path=str(write_llama(root / "tied", tied=True))),
        "other": ModelSource(path=str(write_llama(root / "other", tied=True, seed=8))),
        "untied": ModelSource(path=str(write_llama(root / "untied", seed=3))),
        "gpt2": ModelSource(path=str(write_gpt2(root / "gpt2"))),
        "qwen2": ModelSource(path=str(write_qwen2(root / "qwen2"))),
    }


@pytest.fixture(scope="module")
def pair(loop: Loop, models: dict[str, ModelSource]) -> Iterator[TrainingGroup]:
    """Two ranks."""
    group = TrainingGroup(config=settings(), source=models["tied"], name="pair")
    loop.run(group.start())
    yield group
    loop.run(group.shutdown())


@pytest.fixture(scope="module")
def single(loop: Loop, models: dict[str, ModelSource]) -> Iterator[TrainingGroup]:
    """One rank."""
    group = TrainingGroup(config=settings(num_ranks=1), source=models["tied"], name="single")
    loop.run(group.start())
    yield group
    loop.run(group.shutdown())


async def weights(group: TrainingGroup) -> dict[str, torch.Tensor]:
    manifest = await group.publish(version="v1")
    return {name: tensor.clone() for name, tensor in iter_tensors(manifest)}


async def train(
    group: TrainingGroup,
    *,
    config: TrainingConfig,
    source: ModelSource,
    num_steps: int = 3,
    order: list[int] | None = None,
) -> tuple[UpdateReport, dict[str, torch.Tensor]]:
    """DPO from the source's weights over the first steps of two epochs; the report and the weights after it."""
    await group.reopen(config=config, source=source)
    report = await update(group, num_steps=num_steps, order=order)
    return report, await weights(group)


async def update(
    group: TrainingGroup,
    *,
    start: int = 0,
    num_steps: int = 3,
    order: list[int] | None = None,
    reference_weights: ReferenceWeights = "start_of_update",
    kl_budget: KlBudget | None = None,
) -> UpdateReport:
    ids = IDS if order is None else [IDS[row] for row in order]
    plan = TrainingPlan.of(ids, batch_size=8, epochs=2, seed=0)
    part = TrainingPlan(row_ids=plan.row_ids, steps=plan.steps[start : start + num_steps])
    return await group.update(
        pair_table(order),
        loss="dpo",
        loss_config=dpo.Config(nll_weight=0.1),
        plan=part,
        reference_weights=reference_weights,
        kl_budget=kl_budget,
    )


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


@pytest.fixture(scope="module")
def reference(
    loop: Loop, pair: TrainingGroup, models: dict[str, ModelSource]
) -> tuple[UpdateReport, dict[str, torch.Tensor]]:
    """Three steps on two ranks at ZeRO 0: what all other ways must come to."""
    return loop.run(train(pair, config=settings(), source=models["tied"]))


# --------------------------------------------------------------------------------------------------------- updates


def test_the_first_step_has_log_ratios_of_exactly_zero(
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    first, *later = reference[0].steps
    assert first.metrics["chosen_logratio"] == 0.0
    assert first.metrics["rejected_logratio"] == 0.0
    assert first.metrics["preference_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert all(step.metrics["chosen_logratio"] != 0.0 for step in later)


def test_a_report_names_every_applied_slot_and_its_tokens(
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    report = reference[0]
    assert sorted(slot.row_id for slot in report.slots if slot.epoch == 0) == IDS
    assert [step.optimizer_step for step in report.steps] == [0, 1, 2]
    # Warm-up over two steps to 1e-3.
    assert [step.learning_rate for step in report.steps] == pytest.approx([5e-4, 1e-3, 1e-3])
    table = pair_table()
    assert 1.0 <= report.rank_balance == report.means["rank_balance"] < 1.2
    lengths = [
        2 * len(prompt) + len(chosen) + len(rejected)
        for prompt, chosen, rejected in zip(
            *(table[f"{name}_token_ids"].to_pylist() for name in ("prompt", "chosen", "rejected")), strict=True
        )
    ]
    assert sum(step.num_tokens for step in report.steps[:2]) == sum(lengths)


def test_one_rank_trains_the_same_weights_as_two(
    loop: Loop,
    single: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    report, got = loop.run(train(single, config=settings(num_ranks=1), source=models["tied"]))
    assert difference(got, reference[1]) <= 1e-5
    assert [s.loss for s in report.steps] == pytest.approx([s.loss for s in reference[0].steps], abs=1e-5)


def test_a_batch_of_eight_trains_the_same_weights_as_eight_times_one_accumulated(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    # One token fits no row, so every row goes alone.
    report, got = loop.run(train(pair, config=settings(micro_batch_tokens=1), source=models["tied"]))
    # Pairs are still padded to their longer response, so computed tokens are not quite the real ones.
    assert report.padding_efficiency > reference[0].padding_efficiency
    assert difference(got, reference[1]) <= 1e-5


def test_the_tables_row_order_changes_nothing(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    order = random.Random(1).sample(range(NUM_PAIRS), NUM_PAIRS)
    report, got = loop.run(train(pair, config=settings(), source=models["tied"], order=order))
    assert difference(got, reference[1]) == 0.0
    assert report.slots == reference[0].slots


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_the_same_weights(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
    stage: Literal[1, 2, 3],
) -> None:
    report, got = loop.run(
        train(pair, config=settings(zero_stage=stage, micro_batch_tokens=256), source=models["tied"])
    )
    assert difference(got, reference[1]) <= 1e-5
    wanted = [step.grad_norm for step in reference[0].steps]
    assert [step.grad_norm for step in report.steps] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_what_lies_in_the_hosts_memory_trains_the_same_weights(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
    stage: Literal[2, 3],
) -> None:
    config = settings(zero_stage=stage).model_copy(update={"offload": "cpu"})
    _, got = loop.run(train(pair, config=config, source=models["tied"]))
    assert difference(got, reference[1]) <= 1e-5


def test_pairs_whose_prompts_are_computed_once_train_the_same_weights(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    config = settings().model_copy(update={"shared_prompts": True})
    report, got = loop.run(train(pair, config=config, source=models["tied"]))
    assert difference(got, reference[1]) <= 1e-5
    assert report.steps[0].metrics["chosen_logratio"] == 0.0
    whole = sum(step.num_padded_tokens for step in reference[0].steps)
    assert sum(step.num_padded_tokens for step in report.steps) < 0.95 * whole
    # A prompt is learnt from twice and computed once.
    assert [step.num_tokens for step in report.steps] == [step.num_tokens for step in reference[0].steps]
    assert all(s.num_unpadded_tokens < min(s.num_tokens, s.num_padded_tokens + 1) for s in report.steps)
    assert all(step.num_unpadded_tokens == step.num_tokens for step in reference[0].steps)
    assert report.padding_efficiency <= 1.0


@pytest.mark.parametrize("stage", [0, 3])
def test_sequences_behind_one_another_train_the_same_weights(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
    stage: Literal[0, 3],
) -> None:
    config = settings(zero_stage=stage).model_copy(update={"packing": True})
    report, got = loop.run(train(pair, config=config, source=models["tied"]))
    assert difference(got, reference[1]) <= 1e-5
    assert report.steps[0].metrics["chosen_logratio"] == 0.0
    whole = sum(step.num_padded_tokens for step in reference[0].steps)
    assert sum(step.num_padded_tokens for step in report.steps) < whole
    assert [step.num_tokens for step in report.steps] == [step.num_tokens for step in reference[0].steps]
    assert report.padding_efficiency > reference[0].padding_efficiency


def test_gradients_of_what_is_computed_again_are_the_same(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    config = settings().model_copy(update={"gradient_checkpointing": True})
    report, got = loop.run(train(pair, config=config, source=models["tied"]))
    assert difference(got, reference[1]) <= 1e-6
    wanted = [step.grad_norm for step in reference[0].steps]
    assert [step.grad_norm for step in report.steps] == pytest.approx(wanted, rel=1e-6)


def test_a_kl_budget_measures_what_it_says_and_ends_the_update(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    plenty = KlBudget(enabled=True, every=2, num_sequences=2 * NUM_PAIRS)
    little = KlBudget(enabled=True, every=1, update=1e-9)
    run_spent = KlBudget(enabled=True, run=1e-9)

    async def call() -> tuple[UpdateReport, UpdateReport, UpdateReport]:
        await pair.reopen(config=settings(), source=models["tied"])
        measured = await update(pair, kl_budget=plenty)
        # To measure changes nothing.
        assert difference(await weights(pair), reference[1]) == 0.0
        before = await weights(pair)
        frozen = await update(pair, num_steps=4, kl_budget=run_spent)
        assert difference(await weights(pair), before) == 0.0
        await pair.reopen(config=settings(), source=models["tied"])
        cut = await update(pair, num_steps=4, kl_budget=little)
        ended = await weights(pair)
        await pair.reopen(config=settings(), source=models["tied"])
        await update(pair, num_steps=1)
        assert difference(await weights(pair), ended) == 0.0
        return measured, frozen, cut

    measured, frozen, cut = loop.run(call())
    assert [step.kl is None for step in measured.steps] == [True, False, False]
    assert measured.kl is not None
    assert measured.kl.update == measured.kl.run == pytest.approx(kl_by_hand(models["tied"], reference[1]), rel=1e-4)
    assert (measured.stopped_by, measured.num_left_out) == (None, 0)
    assert measured.staleness["kl_at_start"] == 0.0
    # The run's budget was spent before this update: not a step of it.
    assert (frozen.steps, frozen.slots, frozen.stopped_by, frozen.num_left_out) == ((), (), "run", 4)
    assert frozen.kl is not None
    assert frozen.kl.run > 1e-9
    assert (len(cut.steps), cut.stopped_by, cut.num_left_out) == (1, "update", 3)
    assert {slot.step for slot in cut.slots} == {0}
    assert cut.means["num_left_out"] == 3.0


def test_all_of_it_goes_together_under_zero_3(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    """Every pass over the split weights is a collective; the first weights' are none."""
    extras = {"shared_prompts": True, "gradient_checkpointing": True, "offload": "cpu"}
    budget = KlBudget(enabled=True, every=1, num_sequences=5)  # unevenly dealt

    async def call() -> tuple[UpdateReport, UpdateReport]:
        await pair.reopen(config=settings(zero_stage=3).model_copy(update=extras), source=models["tied"])
        first = await update(pair, reference_weights="bootstrap", kl_budget=budget)
        assert difference(await weights(pair), reference[1]) <= 1e-5
        return first, await update(pair, reference_weights="bootstrap", kl_budget=budget)

    first, second = loop.run(call())
    assert first.kl is not None
    assert first.kl.update == first.kl.run > 0.0
    assert second.kl is not None
    assert second.kl.update != second.kl.run
    assert second.staleness["kl_at_start"] == pytest.approx(first.kl.run, rel=1e-4)
    assert second.staleness["reference_cached_share"] == 1.0


def kl_by_hand(source: ModelSource, now: dict[str, torch.Tensor]) -> float:
    """Return KL(now || source) in nats, summed over a response's tokens: mean over all responses of the table."""
    from transformers import AutoModelForCausalLM

    then = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    moved = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    moved.load_state_dict(now, strict=False)
    total, num = 0.0, 0
    for row in pair_table().to_pylist():
        for side in ("chosen_token_ids", "rejected_token_ids"):
            prompt, ids = row["prompt_token_ids"], torch.tensor([row["prompt_token_ids"] + row[side]])
            with torch.no_grad():
                p, q = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (moved, then))
            total += float((p.exp() * (p - q)).sum())
            num += 1
    return total / num


def test_the_runs_first_weights_are_a_reference_whose_log_probs_are_kept(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    async def call() -> tuple[list[UpdateReport], list[dict[str, torch.Tensor]]]:
        reports, after = [], []

        async def first(reference_weights: ReferenceWeights) -> None:
            await pair.reopen(config=settings(), source=models["tied"])
            reports.append(await update(pair, reference_weights=reference_weights))
            assert difference(await weights(pair), reference[1]) == 0.0  # the update's start is the run's

        async def second() -> None:
            reports.append(await update(pair, reference_weights="bootstrap"))
            after.append(await weights(pair))

        await first("bootstrap")
        await pair.save(tmp_path / "checkpoint")
        await second()  # every pair is known
        await first("start_of_update")
        await second()  # none is
        await pair.reopen(config=settings(), source=models["tied"])
        await pair.load(tmp_path / "checkpoint")
        await second()  # every pair is known from the checkpoint
        await pair.reopen(config=settings(), source=models["other"])
        await pair.load(tmp_path / "checkpoint")
        await second()  # another reference: none is
        return reports, after

    (fresh, kept, plain, computed, loaded, other), after = loop.run(call())
    shares = [
        report.staleness.get("reference_cached_share") for report in (fresh, kept, plain, computed, loaded, other)
    ]
    assert shares == [0.0, 1.0, None, 0.0, 1.0, 0.0]
    assert fresh.staleness["reference_sequences"] == 2 * NUM_PAIRS
    # By the first weights, not by those of the update's start.
    assert kept.steps[0].metrics["chosen_logratio"] != 0.0
    same = [[(s.loss, s.grad_norm, s.metrics) for s in report.steps] for report in (kept, computed, loaded)]
    assert same[0] == same[1] == same[2]
    assert difference(after[0], after[1]) == difference(after[0], after[2]) == 0.0
    assert difference(after[0], after[3]) > 0.0


def test_bf16_trains_at_zero_2_and_publishes_bf16(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    reference: tuple[UpdateReport, dict[str, torch.Tensor]],
) -> None:
    report, got = loop.run(train(pair, config=settings(zero_stage=2, dtype="bf16"), source=models["tied"]))
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    # bf16 has 8 bits of mantissa: losses of about 1 agree to some hundredths.
    assert [s.loss for s in report.steps] == pytest.approx([s.loss for s in reference[0].steps], abs=0.05)


def test_sft_starts_at_the_cross_entropy_of_the_whole_batch(
    loop: Loop, pair: TrainingGroup, models: dict[str, ModelSource]
) -> None:
    """Token counts per rank and micro-batch differ, and still the loss is the mean over all tokens at once."""
    from transformers import AutoModelForCausalLM

    generator = random.Random(5)
    prompts = [[generator.randrange(6, 100) for _ in range(3)] for _ in range(5)]
    responses = [[generator.randrange(6, 100) for _ in range(n)] for n in (2, 30, 4, 9, 17)]
    table = pa.table({"prompt_token_ids": prompts, "response_token_ids": responses})
    plan = TrainingPlan.of([str(i) for i in range(5)], batch_size=5, epochs=1, seed=0)

    async def call() -> UpdateReport:
        await pair.reopen(config=settings(micro_batch_tokens=32), source=models["untied"])
        return await pair.update(table, loss="sft", loss_config=sft.Config(), plan=plan)

    report = loop.run(call())
    model = AutoModelForCausalLM.from_pretrained(models["untied"].path, dtype=torch.float32)
    total, num_tokens = 0.0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response])
        total -= token_logprobs(model(input_ids=ids).logits, ids)[0, len(prompt) :].sum().item()
        num_tokens += len(response)
    assert report.steps[0].loss == pytest.approx(total / num_tokens, abs=1e-5)


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on_from_a_checkpoint_bit_by_bit(
    loop: Loop, pair: TrainingGroup, models: dict[str, ModelSource], tmp_path: Path, stage: Literal[0, 1, 2, 3]
) -> None:
    config = settings(zero_stage=stage)

    async def call() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        await pair.reopen(config=config, source=models["tied"])
        await update(pair, num_steps=2)
        files = await pair.save(tmp_path / "checkpoint")
        await update(pair, start=2, num_steps=2)
        straight = await weights(pair)
        if stage == 2:  # once in other processes, once in the same ones
            other = TrainingGroup(config=config, source=models["other"], name="other")
            await other.start()
        else:
            other = pair
            await pair.reopen(config=config, source=models["other"])
        await other.load(tmp_path / "checkpoint", files=files)
        report = await update(other, start=2, num_steps=2)
        assert [step.optimizer_step for step in report.steps] == [2, 3]
        resumed = await weights(other)
        if other is not pair:
            await other.shutdown()
        return straight, resumed

    straight, resumed = loop.run(call())
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_on_with_another_number_of_ranks(
    loop: Loop,
    pair: TrainingGroup,
    single: TrainingGroup,
    models: dict[str, ModelSource],
    tmp_path: Path,
    stage: Literal[0, 1, 2, 3],
) -> None:
    async def call(before: TrainingGroup, after: TrainingGroup) -> None:
        path = tmp_path / before.name
        await before.reopen(config=settings(num_ranks=before.config.num_ranks, zero_stage=stage), source=models["tied"])
        await update(before, num_steps=2)
        files = await before.save(path)
        await update(before, start=2, num_steps=1)
        straight = await weights(before)
        await after.reopen(config=settings(num_ranks=after.config.num_ranks, zero_stage=stage), source=models["other"])
        await after.load(path, files=files)
        report = await update(after, start=2, num_steps=1)
        assert report.steps[0].optimizer_step == 2
        resumed = await weights(after)
        assert difference(straight, resumed) <= 1e-5
        # It saves and loads as any other.
        await after.save(path)
        await update(after, num_steps=1)
        await after.load(path)
        assert difference(await weights(after), resumed) == 0.0
        assert [child.name for child in tmp_path.iterdir() if child.name.startswith(".")] == []

    loop.run(call(pair, single))
    loop.run(call(single, pair))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_in_bf16_goes_on_with_another_number_of_ranks(
    loop: Loop,
    pair: TrainingGroup,
    single: TrainingGroup,
    models: dict[str, ModelSource],
    tmp_path: Path,
    stage: Literal[1, 2, 3],
) -> None:
    def told(num_ranks: int) -> TrainingConfig:
        return settings(num_ranks=num_ranks, zero_stage=stage).model_copy(update={"dtype": "bf16"})

    async def call(before: TrainingGroup, after: TrainingGroup) -> None:
        path = tmp_path / before.name
        await before.reopen(config=told(before.config.num_ranks), source=models["tied"])
        await update(before, num_steps=2)
        files = await before.save(path)
        saved = await weights(before)
        await update(before, start=2, num_steps=1)
        straight = await weights(before)
        await after.reopen(config=told(after.config.num_ranks), source=models["other"])
        await after.load(path, files=files)
        assert difference(await weights(after), saved) == 0.0
        await update(after, start=2, num_steps=1)
        # A step is smaller than what bf16 can tell apart: masters and moments went along, or it would differ by more.
        assert difference(await weights(after), straight) <= 2e-3

    loop.run(call(pair, single))
    loop.run(call(single, pair))


def test_a_damaged_checkpoint_is_refused_before_it_is_read_and_the_group_lives_on(
    loop: Loop, pair: TrainingGroup, models: dict[str, ModelSource], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"

    async def call() -> None:
        await pair.reopen(config=settings(), source=models["tied"])
        files = await pair.save(path)
        assert {file.path for file in files} >= {"state/mp_rank_00_model_states.pt", "random-00001.pt", "training.json"}
        before = await weights(pair)
        state = path / "state/mp_rank_00_model_states.pt"
        sound = state.read_bytes()
        state.write_bytes(sound[:1000] + bytes([sound[1000] ^ 1]) + sound[1001:])
        with pytest.raises(CorruptCheckpoint, match=r"mp_rank_00_model_states\.pt has SHA-256"):
            await pair.load(path)
        state.write_bytes(sound)
        (path / "state/zero_pp_rank_7_mp_rank_00_optim_states.pt").write_bytes(b"payload")
        with pytest.raises(CorruptCheckpoint, match="is not in the manifest"):
            await pair.load(path)
        (path / "state/zero_pp_rank_7_mp_rank_00_optim_states.pt").unlink()
        await pair.reopen(config=settings(zero_stage=2), source=models["tied"])
        with pytest.raises(CorruptCheckpoint, match="'zero_stage': 0"):
            await pair.load(path)
        assert difference(await weights(pair), before) == 0.0

    loop.run(call())


# --------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("name", "stage"), [("tied", 3), ("untied", 3), ("gpt2", 0), ("qwen2", 0)])
def test_an_export_loads_in_transformers_with_the_groups_log_probs(
    loop: Loop,
    pair: TrainingGroup,
    models: dict[str, ModelSource],
    tmp_path: Path,
    name: str,
    stage: Literal[0, 3],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "export"

    async def call() -> tuple[tuple[tuple[float, ...], ...], dict[str, torch.Tensor]]:
        await pair.reopen(config=settings(zero_stage=stage), source=models[name])
        await update(pair, num_steps=1)
        await pair.export(path)
        await pair.export(path)  # again: the first is replaced
        return await pair.logprobs(PROBE), await weights(pair)

    logprobs, published = loop.run(call())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    for ids, values in zip(PROBE, logprobs, strict=True):
        expected = token_logprobs(model(input_ids=torch.tensor([ids])).logits, torch.tensor([ids]))[0, 1:]
        assert list(values) == pytest.approx(expected.tolist(), abs=1e-5)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == published.keys()
    assert difference({key: value.detach() for key, value in parameters.items()}, published) == 0.0
    assert ("lm_head.weight" in published) == (name in ("untied", "qwen2"))
    source = AutoTokenizer.from_pretrained(models[name].path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template == source.chat_template
    assert tokenizer("2+2=4").input_ids == source("2+2=4").input_ids
    assert [child.name for child in tmp_path.iterdir()] == ["export"]


# -------------------------------------------------------------------------------------------------------- failures


def test_what_does_not_fit_is_refused_and_the_group_lives_on(
    loop: Loop, pair: TrainingGroup, models: dict[str, ModelSource]
) -> None:
    plan = TrainingPlan.of(IDS, batch_size=8, epochs=1, seed=0)

    async def call() -> None:
        await pair.reopen(config=settings(), source=models["tied"])
        with pytest.raises(ValueError, match=r'got "dpq".*did you mean dpo'):
            await pair.update(pair_table(), loss="dpq", loss_config=dpo.Config(), plan=plan)
        with pytest.raises(ValueError, match="no column 'response_token_ids'"):
            await pair.update(pair_table(), loss="sft", loss_config=sft.Config(), plan=plan)
        with pytest.raises(ValueError, match="the table has 15 rows, the plan 16"):
            await pair.update(pair_table().slice(0, 15), loss="dpo", loss_config=dpo.Config(), plan=plan)
        with pytest.raises(ValueError, match="wanted at most 512"):
            await pair.logprobs([[7] * 513])
        assert len(await pair.logprobs([[7, 8, 9]])) == 1

    loop.run(call())


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    loop: Loop, pair: TrainingGroup, models: dict[str, ModelSource], stage: Literal[0, 2]
) -> None:
    async def call() -> tuple[UpdateReport, dict[str, torch.Tensor]]:
        # The first step throws the weights to 1e30; what is computed with them is not finite.
        await pair.reopen(config=settings(zero_stage=stage, learning_rate=1e30), source=models["tied"])
        report = await update(pair, num_steps=3)
        return report, await weights(pair)

    report, got = loop.run(call())
    assert [step.applied for step in report.steps] == [True, False, False]
    assert report.num_skipped == 2
    assert {slot.step for slot in report.slots} == {0}
    # Nothing that is not finite reached the weights.
    assert all(bool(torch.isfinite(tensor).all()) for tensor in got.values())


def test_a_rank_that_hangs_misses_the_deadline_and_is_killed(loop: Loop, models: dict[str, ModelSource]) -> None:
    config = settings(num_ranks=1).model_copy(update={"call_deadline_s": 2.0})
    group = TrainingGroup(config=config, source=models["tied"], name="hanging")

    async def call() -> None:
        await group.start()
        (pid,) = group.pids
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TrainingGroupError, match=r"rank\(s\) 0: no answer within 2 s"):
            await group.logprobs(PROBE)
        for _ in range(200):
            if not psutil.pid_exists(pid):
                return
            await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the stopped rank outlived its group")

    try:
        loop.run(call())
    finally:
        loop.run(group.shutdown())


# The last two: each ends its group.


def test_three_steps_in_a_row_that_are_not_finite_end_the_group(
    loop: Loop, single: TrainingGroup, models: dict[str, ModelSource]
) -> None:
    async def call() -> None:
        await single.reopen(config=settings(num_ranks=1, learning_rate=1e30), source=models["tied"])
        with pytest.raises(TrainingDiverged, match="3 steps in a row up to optimizer step 3"):
            await update(single, num_steps=4)
        with pytest.raises(TrainingGroupError, match="the group is not running"):
            await single.logprobs(PROBE)

    loop.run(call())


def test_a_ranks_death_ends_the_group_and_says_which_rank_died(
    loop: Loop, pair: TrainingGroup, models: dict[str, ModelSource]
) -> None:
    def kill(report: StepReport) -> None:
        if report.step == 2:
            os.kill(pair.pids[1], signal.SIGKILL)

    async def call() -> None:
        await pair.reopen(config=settings(), source=models["tied"])
        plan = TrainingPlan.of(IDS, batch_size=1, epochs=50, seed=0)
        with pytest.raises(TrainingGroupError, match="rank 1 died"):
            await pair.update(pair_table(), loss="dpo", loss_config=dpo.Config(), plan=plan, on_step=kill)
        with pytest.raises(TrainingGroupError, match="the group is not running"):
            await pair.logprobs(PROBE)

    loop.run(call())
