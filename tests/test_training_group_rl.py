"""Reinforcement learning on real DeepSpeed, two ranks: scored samples in, a policy that scores higher out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pytest
import torch
from safetensors import safe_open

from cluster.config import Config
from cluster.weights import iter_tensors
from tests.one_loop import Loop
from tests.tiny_models import write_llama
from trainers.kl import KlControl
from trainers.logprobs import token_logprobs
from trainers.losses import grpo, ppo, reinforce_pp, relc, rloo
from trainers.training_config import ReferenceWeights
from trainers.training_group import ModelSource, TrainingConfig, TrainingGroup, TrainingPlan, UpdateReport

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

T = TypeVar("T")
PROMPTS = ((7, 8, 9), (20, 21), (30, 31, 32, 33))
GROUP = 16
LENGTHS = (3, 5, 4)
"""Tokens of each prompt's responses."""


def settings(num_ranks: int, *, value_head: bool = False, zero_stage: Literal[0, 1, 2, 3] = 0) -> TrainingConfig:
    # Under AdamW's epsilon of 1e-8 a gradient that is 0 but for rounding would still move weights by the learning rate.
    return TrainingConfig(
        num_ranks=num_ranks,
        batch_size=24,
        micro_batch_tokens=64,
        learning_rate=3e-3,
        epsilon=1e-5,
        cpus_per_rank=0.01,
        value_head=value_head,
        zero_stage=zero_stage,
    )


class Toy:
    """A bandit: a response's score is the share of its tokens that are even numbers."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM

        self.source = ModelSource(path=path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.fresh = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    async def take(self, group: TrainingGroup) -> dict[str, torch.Tensor]:
        """Sample from the group's weights from now on; return them."""
        manifest = await group.publish(version="v1")
        weights = {name: tensor.clone() for name, tensor in iter_tensors(manifest)}
        self.model.load_state_dict(weights, strict=False)
        return weights

    def reset(self) -> None:
        self.model.load_state_dict(self.fresh)

    @torch.no_grad()
    def sample(self, *, seed: int, temperature: float = 1.0) -> pa.Table:
        generator = torch.Generator().manual_seed(seed)
        rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
            ids = torch.tensor([prompt] * GROUP)
            for _ in range(length):
                probabilities = (self.model(input_ids=ids).logits[:, -1] / temperature).softmax(-1)
                ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
            logits, responses = self.model(input_ids=ids).logits, ids[:, len(prompt) :]
            logprobs = token_logprobs(logits, ids, temperature=temperature)[:, len(prompt) :]
            rows["row_id"] += [f"{prompt[0]}-{i}" for i in range(GROUP)]
            rows["query_id"] += [f"q{prompt[0]}"] * GROUP
            rows["prompt_token_ids"] += [list(prompt)] * GROUP
            rows["response_token_ids"] += responses.tolist()
            rows["response_logprobs"] += logprobs.tolist()
            # A critic would point at each odd number.
            rows["segment_rewards"] += (-(responses % 2)).float().tolist()
            rows["score"] += (responses % 2 == 0).float().mean(dim=1).tolist()
        return pa.table(rows)


COLUMNS = (
    "row_id",
    "query_id",
    "prompt_token_ids",
    "response_token_ids",
    "response_logprobs",
    "segment_rewards",
    "score",
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(str(write_llama(tmp_path_factory.mktemp("models") / "toy", tied=True)))


@pytest.fixture(scope="module")
def pair(loop: Loop, toy: Toy) -> Iterator[TrainingGroup]:
    """Two ranks."""
    group = TrainingGroup(config=settings(2), source=toy.source, name="pair")
    loop.run(group.start())
    yield group
    loop.run(group.shutdown())


@pytest.fixture(scope="module")
def single(loop: Loop, toy: Toy) -> Iterator[TrainingGroup]:
    """One rank."""
    group = TrainingGroup(config=settings(1), source=toy.source, name="single")
    loop.run(group.start())
    yield group
    loop.run(group.shutdown())


async def update(
    group: TrainingGroup,
    table: pa.Table,
    *,
    loss: str,
    config: Config,
    epochs: int = 1,
    reference_weights: ReferenceWeights = "start_of_update",
) -> UpdateReport:
    plan = TrainingPlan.of(table.column("row_id").to_pylist(), batch_size=24, epochs=epochs, seed=0)
    return await group.update(table, loss=loss, loss_config=config, plan=plan, reference_weights=reference_weights)


# The value head starts at 0: rewards are to be trusted more than it is, and it is to learn quickly.
VALUES = {"gae_decay": 1.0, "value_coefficient": 0.5}


@pytest.mark.parametrize(
    ("loss", "config"),
    [
        ("grpo", grpo.Config()),
        ("grpo", grpo.Config(form="dapo")),
        ("rloo", rloo.Config()),
        ("reinforce_pp", reinforce_pp.Config()),
        ("ppo", ppo.Config(**VALUES)),
        ("relc", relc.Config(**VALUES)),
    ],
    ids=["grpo", "dapo", "rloo", "reinforce_pp", "ppo", "relc"],
)
def test_the_mean_score_of_a_bandit_rises(loop: Loop, pair: TrainingGroup, toy: Toy, loss: str, config: Config) -> None:
    async def call() -> list[UpdateReport]:
        await pair.reopen(config=settings(2, value_head=isinstance(config, ppo.Config)), source=toy.source)
        toy.reset()
        reports = []
        for iteration in range(12):
            reports.append(await update(pair, toy.sample(seed=iteration), loss=loss, config=config, epochs=2))
            await toy.take(pair)
        return reports

    reports = loop.run(call())
    scores = [report.staleness["score"] for report in reports]
    # Of 48 responses of about 4 tokens the standard error is about 0.04.
    assert scores[0] < 0.65
    assert sum(scores[-3:]) / 3 > scores[0] + 0.25
    for report in reports:
        first = report.steps[0]
        assert first.metrics["old_kl"] == 0.0
        assert first.metrics["clip_share"] == 0.0
        assert first.metrics["importance"] == pytest.approx(1.0, abs=1e-3)
        assert report.staleness["rollout_gap"] < 1e-4
        assert all(step.metrics["old_kl"] > 0 for step in report.steps[1:])
    if isinstance(config, ppo.Config):
        losses = [report.steps[0].metrics["value_loss"] for report in reports]
        assert reports[0].steps[0].metrics["value"] == 0.0
        assert reports[-1].steps[0].metrics["value"] > 0.3
        assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize(
    ("loss", "config"),
    [
        ("grpo", grpo.Config()),
        ("grpo", grpo.Config(form="dapo")),
        ("grpo", grpo.Config(form="dr_grpo", max_tokens=max(LENGTHS))),
        ("grpo", grpo.Config(form="gspo")),
        ("rloo", rloo.Config()),
        ("reinforce_pp", reinforce_pp.Config()),
        ("ppo", ppo.Config(**VALUES)),
        ("relc", relc.Config(**VALUES)),
    ],
    ids=["grpo", "dapo", "dr_grpo", "gspo", "rloo", "reinforce_pp", "ppo", "relc"],
)
def test_one_rank_trains_the_same_weights_as_two(
    loop: Loop, pair: TrainingGroup, single: TrainingGroup, toy: Toy, loss: str, config: Config
) -> None:
    """Groups are spread over steps and ranks, and what is left out weighs nothing anywhere."""
    toy.reset()
    table = toy.sample(seed=0)
    scores = [None if row % 7 == 0 else score for row, score in enumerate(table.column("score").to_pylist())]
    table = table.set_column(table.column_names.index("score"), "score", pa.array(scores, pa.float64()))

    async def call() -> list[tuple[UpdateReport, dict[str, torch.Tensor]]]:
        found = []
        for group, num_ranks in ((pair, 2), (single, 1)):
            told = settings(num_ranks, value_head=isinstance(config, ppo.Config))
            await group.reopen(config=told, source=toy.source)
            report = await update(group, table, loss=loss, config=config, epochs=2)
            found.append((report, await toy.take(group)))
        return found

    (two, weights), (one, others) = loop.run(call())
    assert one.staleness["unscored_share"] == pytest.approx(7 / 48)
    assert [step.loss for step in one.steps] == pytest.approx([step.loss for step in two.steps], abs=1e-5)
    for step, other in zip(one.steps, two.steps, strict=True):
        assert step.metrics == pytest.approx(other.metrics, abs=1e-4)
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) <= 1e-5
    assert max(float((weights[name] - toy.fresh[name]).abs().max()) for name in weights) > 1e-4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_value_head_learns_the_same_at_every_zero_stage_and_is_no_part_of_what_is_published(
    loop: Loop, pair: TrainingGroup, toy: Toy, stage: Literal[1, 2, 3]
) -> None:
    toy.reset()
    table, config = toy.sample(seed=4), ppo.Config(**VALUES)

    async def call(stage: Literal[0, 1, 2, 3]) -> tuple[UpdateReport, dict[str, torch.Tensor]]:
        await pair.reopen(config=settings(2, value_head=True, zero_stage=stage), source=toy.source)
        report = await update(pair, table, loss="ppo", config=config, epochs=2)
        weights = await toy.take(pair)
        # A loss that asks for no values leaves the head as it is.
        other = await update(pair, table, loss="rloo", config=rloo.Config())
        assert all(step.applied for step in other.steps)
        return report, weights

    (plain, wanted), (report, weights) = loop.run(call(0)), loop.run(call(stage))
    names = {name for name, _ in toy.model.named_parameters()}
    assert weights.keys() == wanted.keys() == names
    assert max(float((weights[name] - wanted[name]).abs().max()) for name in weights) <= 1e-5
    for metric in ("value", "value_loss", "policy_loss"):
        found = [step.metrics[metric] for step in report.steps]
        assert found == pytest.approx([step.metrics[metric] for step in plain.steps], abs=1e-5)


def test_values_of_packed_sequences_are_those_of_each_by_itself(loop: Loop, pair: TrainingGroup, toy: Toy) -> None:
    toy.reset()
    table, config = toy.sample(seed=4), ppo.Config(**VALUES)

    async def call(packing: bool) -> tuple[UpdateReport, dict[str, torch.Tensor]]:
        told = settings(2, value_head=True).model_copy(update={"packing": packing})
        await pair.reopen(config=told, source=toy.source)
        report = await update(pair, table, loss="ppo", config=config, epochs=2)
        return report, await toy.take(pair)

    (plain, wanted), (report, weights) = loop.run(call(False)), loop.run(call(True))
    assert max(float((weights[name] - wanted[name]).abs().max()) for name in weights) <= 1e-5
    assert plain.steps[-1].metrics["value"] != 0.0
    for step, other in zip(report.steps, plain.steps, strict=True):
        assert step.metrics["value"] == pytest.approx(other.metrics["value"], abs=1e-4)


def test_a_value_head_is_in_the_checkpoint_and_not_in_the_export(
    loop: Loop, pair: TrainingGroup, toy: Toy, tmp_path: Path
) -> None:
    toy.reset()
    table, config = toy.sample(seed=5), ppo.Config(**VALUES)

    async def call() -> tuple[UpdateReport, UpdateReport]:
        await pair.reopen(config=settings(2, value_head=True), source=toy.source)
        await update(pair, table, loss="ppo", config=config)
        await pair.save(tmp_path / "checkpoint")
        await pair.export(tmp_path / "policy")
        straight = await update(pair, table, loss="ppo", config=config)
        await pair.reopen(config=settings(2, value_head=True), source=toy.source)
        await pair.load(tmp_path / "checkpoint")
        return straight, await update(pair, table, loss="ppo", config=config)

    straight, resumed = loop.run(call())
    assert straight.steps[0].metrics["value"] != 0.0
    assert [step.metrics for step in resumed.steps] == [step.metrics for step in straight.steps]
    with safe_open(tmp_path / "policy" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == {name for name, _ in toy.model.named_parameters()}


def test_the_kl_to_a_reference_that_the_table_carries_is_paid_for(loop: Loop, pair: TrainingGroup, toy: Toy) -> None:
    toy.reset()
    table = toy.sample(seed=1)
    # A reference that gives every sampled token e^0.5 times the probability.
    shifted = [[value + 0.5 for value in row] for row in table.column("response_logprobs").to_pylist()]
    table = table.append_column("reference_logprobs", pa.array(shifted))

    async def call() -> UpdateReport:
        await pair.reopen(config=settings(2), source=toy.source)
        return await update(pair, table, loss="grpo", config=grpo.Config(kl_coefficient=0.1))

    report = loop.run(call())
    assert report.staleness["reference_kl_per_response"] == pytest.approx(-0.5 * sum(LENGTHS) / 3, abs=1e-3)
    # d = -0.5 for every token: k3 = e^0.5 - 1 - 0.5.
    assert report.steps[0].metrics["reference_kl"] == pytest.approx(0.148721, abs=1e-4)


def test_the_price_of_the_kl_to_the_first_weights_follows_it_and_is_resumed(
    loop: Loop, pair: TrainingGroup, toy: Toy, tmp_path: Path
) -> None:
    toy.reset()
    table = toy.sample(seed=3)
    config = rloo.Config(kl_coefficient=0.1, kl_control=KlControl(adaptive=True, horizon=100))

    async def call() -> tuple[UpdateReport, UpdateReport, UpdateReport]:
        async def next_update() -> UpdateReport:
            return await update(pair, table, loss="rloo", config=config, reference_weights="bootstrap")

        await pair.reopen(config=settings(2), source=toy.source)
        first = await next_update()
        await pair.save(tmp_path / "checkpoint")
        second = await next_update()
        await pair.reopen(config=settings(2), source=toy.source)
        await pair.load(tmp_path / "checkpoint")
        return first, second, await next_update()

    first, second, resumed = loop.run(call())
    assert (first.staleness["reference_kl_per_response"], first.staleness["kl_coefficient"]) == (0.0, 0.1)
    # KL 0 is 100 % below the target, cut at 20 %; 48 samples of a horizon of 100.
    assert second.staleness["kl_coefficient"] == pytest.approx(0.1 * (1 - 0.2 * 48 / 100))
    assert second.staleness["reference_kl_per_response"] != 0.0
    assert dict(resumed.staleness) == dict(second.staleness)
    assert [(s.loss, s.grad_norm, s.metrics) for s in resumed.steps] == [
        (s.loss, s.grad_norm, s.metrics) for s in second.steps
    ]


def test_the_temperature_of_the_sampling_is_that_of_the_log_probs(loop: Loop, pair: TrainingGroup, toy: Toy) -> None:
    toy.reset()
    table = toy.sample(seed=2, temperature=2.0)

    async def gap(temperature: float) -> float:
        await pair.reopen(config=settings(2), source=toy.source)
        report = await update(pair, table, loss="rloo", config=rloo.Config(temperature=temperature))
        assert report.steps[0].metrics["old_kl"] == 0.0
        return report.staleness["rollout_gap"]

    assert loop.run(gap(2.0)) < 1e-4
    assert loop.run(gap(1.0)) > 0.1


def test_a_method_with_a_value_model_is_refused_without_one(loop: Loop, pair: TrainingGroup, toy: Toy) -> None:
    toy.reset()

    async def call() -> None:
        await pair.reopen(config=settings(2), source=toy.source)
        await update(pair, toy.sample(seed=3), loss="ppo", config=ppo.Config())

    with pytest.raises(ValueError, match="wanted value_head = true"):
        loop.run(call())
