"""A reward model on real DeepSpeed: pairs in, scores out that order responses which it has never seen."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
import torch
from safetensors import safe_open

from tests.one_loop import Loop
from tests.tiny_models import write_llama
from trainers.losses import bradley_terry
from trainers.training_group import ModelSource, TrainingConfig, TrainingGroup, TrainingPlan, UpdateReport

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

GOOD, FIRST, LAST = 50, 10, 90
"""A response is the better the more of its tokens are below 50."""


def settings(
    num_ranks: int, *, micro_batch_tokens: int = 256, zero_stage: Literal[0, 1, 2, 3] = 0, value_head: bool = True
) -> TrainingConfig:
    return TrainingConfig(
        num_ranks=num_ranks,
        batch_size=16,
        micro_batch_tokens=micro_batch_tokens,
        learning_rate=2e-3,
        epsilon=1e-5,  # under 1e-8 a gradient that is 0 but for rounding would still move weights
        cpus_per_rank=0.01,
        value_head=value_head,
        zero_stage=zero_stage,
    )


def pairs(num: int, *, seed: int, critiques: str = "none") -> pa.Table:
    """Pairs of one prompt: three quarters of the chosen's tokens are good, a quarter of the rejected's.

    Args:
        num: of pairs.
        seed: of all of them.
        critiques: after the response 95 for the better one and 96 for the worse, "right" or "swapped"; or "none".
    """
    generator = random.Random(seed)

    def response(share: float) -> list[int]:
        length = generator.randrange(4, 16)
        sides = [generator.random() < share for _ in range(length)]
        return [generator.randrange(FIRST, GOOD) if good else generator.randrange(GOOD, LAST) for good in sides]

    rows: dict[str, list[Any]] = {"pair_id": [f"{seed}-{i:03d}" for i in range(num)]}
    rows["prompt_token_ids"] = [[generator.randrange(FIRST, LAST) for _ in range(4)] for _ in range(num)]
    says = {"none": ([], []), "right": ([95], [96]), "swapped": ([96], [95])}[critiques]
    for side, share, said in (("chosen", 0.75, says[0]), ("rejected", 0.25, says[1])):
        rows[f"{side}_token_ids"] = [response(share) + said for _ in range(num)]
    return pa.table(rows)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(path=str(write_llama(Path(tmp_path_factory.mktemp("models")) / "llama", tied=True)))


@pytest.fixture(scope="module")
def groups(loop: Loop, source: ModelSource) -> Iterator[dict[int, TrainingGroup]]:
    """One rank, and two."""
    started = {num: TrainingGroup(config=settings(num), source=source, name=f"reward-{num}") for num in (1, 2)}
    for group in started.values():
        loop.run(group.start())
    yield started
    for group in started.values():
        loop.run(group.shutdown())


async def train(group: TrainingGroup, table: pa.Table, **config: Any) -> UpdateReport:
    plan = TrainingPlan.of(table.column("pair_id").to_pylist(), batch_size=16, epochs=1, seed=0)
    return await group.update(
        table, loss="bradley_terry", loss_config=bradley_terry.Config(**config), plan=plan, importance=None
    )


async def gaps(group: TrainingGroup, table: pa.Table) -> torch.Tensor:
    """Return the scores of the chosen less those of the rejected."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    sides = [
        await group.scores([p + r for p, r in zip(columns["prompt_token_ids"], columns[side], strict=True)])
        for side in ("chosen_token_ids", "rejected_token_ids")
    ]
    return torch.tensor(sides[0]) - torch.tensor(sides[1])


def accuracy(found: torch.Tensor) -> float:
    return float((found > 0).double().mean())


def test_held_out_pairs_are_ordered_rightly_after_one_epoch_alike_on_one_rank_and_on_two(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    table, unseen = pairs(256, seed=0), pairs(100, seed=1)

    async def call(num_ranks: int, config: TrainingConfig) -> tuple[torch.Tensor, UpdateReport, torch.Tensor]:
        group = groups[num_ranks]
        await group.reopen(config=config, source=source)
        before = await gaps(group, unseen)
        return before, await train(group, table), await gaps(group, unseen)

    before, report, after = loop.run(call(1, settings(1)))
    assert before.tolist() == [0.0] * 100  # the head starts at 0
    assert report.steps[0].loss == pytest.approx(0.693147, abs=1e-6)
    assert report.steps[0].metrics["accuracy"] == 0.0
    assert sum(step.metrics["accuracy"] for step in report.steps[-4:]) / 4 > 0.75
    # Of 100 pairs whose better one shows in its tokens, by hand about 97 in 100.
    assert accuracy(after) >= 0.85
    _, two, same = loop.run(call(2, settings(2, micro_batch_tokens=60)))
    assert [step.loss for step in two.steps] == pytest.approx([step.loss for step in report.steps], abs=1e-4)
    assert [s.metrics["score_gap"] for s in two.steps] == pytest.approx(
        [s.metrics["score_gap"] for s in report.steps], abs=1e-3
    )
    assert torch.allclose(after, same, atol=5e-3)


def test_a_score_is_the_heads_value_at_the_last_token_whatever_stands_beside_it(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource, tmp_path: Path
) -> None:
    """By hand, from the weights that the ranks export and the head in their checkpoint."""
    from transformers import AutoModelForCausalLM

    table = pairs(16, seed=2)
    sequences = [[5, 6], [11, 12, 13, 14, 60, 70], [20, 21, 22]]

    async def call() -> tuple[float, ...]:
        await groups[2].reopen(config=settings(2), source=source)
        await train(groups[2], table)
        await train(groups[2], table)
        await groups[2].export(tmp_path / "weights")
        await groups[2].save(tmp_path / "checkpoint")
        return await groups[2].scores(sequences)

    found = loop.run(call())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", dtype=torch.float32)
    with safe_open(tmp_path / "weights" / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "head" in name]  # noqa: SIM118 - not a mapping
    (state,) = (tmp_path / "checkpoint" / "state").glob("mp_rank_00_model_states.pt")
    head = torch.load(state, weights_only=False)["module"]["value_head.weight"][0]
    assert head.abs().max() > 0
    with torch.no_grad():
        for sequence, score in zip(sequences, found, strict=True):
            hidden = model(input_ids=torch.tensor([sequence]), output_hidden_states=True).hidden_states[-1]
            assert score == pytest.approx(float(hidden[0, -1] @ head), abs=1e-5)


def test_the_centring_term_keeps_sums_of_scores_small(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    async def sums(centring: float) -> float:
        await groups[1].reopen(config=settings(1), source=source)
        report = await train(groups[1], pairs(128, seed=3), centring=centring)
        return sum(step.metrics["squared_sum"] for step in report.steps[2:])

    assert loop.run(sums(1.0)) < 0.5 * loop.run(sums(0.0))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_reward_model_learns_the_same_under_zero_and_goes_on_from_its_checkpoint(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource, tmp_path: Path, stage: Literal[2, 3]
) -> None:
    table, more, unseen = pairs(64, seed=4), pairs(32, seed=5), pairs(20, seed=6)

    async def call(stage: Literal[0, 2, 3]) -> tuple[torch.Tensor, torch.Tensor]:
        group = groups[2]
        await group.reopen(config=settings(2, zero_stage=stage), source=source)
        await train(group, table)
        await group.save(tmp_path / f"checkpoint-{stage}")
        await train(group, more)
        straight = await gaps(group, unseen)
        await group.reopen(config=settings(2, zero_stage=stage), source=source)
        await group.load(tmp_path / f"checkpoint-{stage}")
        await train(group, more)
        return straight, await gaps(group, unseen)

    plain, sharded = loop.run(call(0)), loop.run(call(stage))
    assert torch.equal(sharded[0], sharded[1])
    assert torch.allclose(plain[0], sharded[0], atol=1e-4)
    assert plain[0].abs().max() > 0.05


def test_a_reward_model_that_reads_critiques_believes_them(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    async def call(critiques: str, asked: str) -> float:
        await groups[1].reopen(config=settings(1), source=source)
        await train(groups[1], pairs(128, seed=7, critiques=critiques))
        return accuracy(await gaps(groups[1], pairs(50, seed=8, critiques=asked)))

    plain, right, swapped = (
        loop.run(call(*how)) for how in (("none", "none"), ("right", "right"), ("right", "swapped"))
    )
    assert right >= max(plain, 0.95)
    assert swapped < 0.5


def test_a_model_without_a_head_has_no_scores(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    async def call() -> None:
        await groups[1].reopen(config=settings(1, value_head=False), source=source)
        with pytest.raises(ValueError, match="got a group with value_head = false, wanted true"):
            await groups[1].scores([[5, 6]])
        with pytest.raises(ValueError, match="got a group with value_head = false, wanted true"):
            await train(groups[1], pairs(16, seed=9))

    loop.run(call())
