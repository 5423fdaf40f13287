"""Every offline loss on real DeepSpeed, by its name in a run's TOML: one rank or two train the same weights."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import pyarrow as pa
import pytest
import torch

from cluster.config import plugin_names
from cluster.weights import iter_tensors
from tests.one_loop import Loop
from tests.tiny_models import write_llama
from trainers.logprobs import token_logprobs
from trainers.losses import PairBatch, gce, kto, load_loss, span_noise, token_noise
from trainers.rows.unpaired import partners
from trainers.run_config import load_run_config
from trainers.training_config import ReferenceWeights
from trainers.training_group import ModelSource, TrainingConfig, TrainingGroup, TrainingPlan, UpdateReport

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

T = TypeVar("T")
IDS = [f"p{i:02d}" for i in range(10)]
PAIR_LOSSES = [name for name in plugin_names("trainers.losses") if load_loss(name).batch is PairBatch]
NOISE, MARGIN = 0.2, 0.3
FLAGS = {"dpo": (("loss.nll_weight", "0"),), "modpo": (("objectives.weights", "[0.5, 0.5]"),)}
"""A run's dpo has an NLL term unless it is told otherwise, and its modpo wants to know of what objectives."""


def settings(
    num_ranks: int,
    *,
    micro_batch_tokens: int = 512,
    learning_rate: float = 3e-5,
    zero_stage: Literal[0, 1, 2, 3] = 0,
) -> TrainingConfig:
    return TrainingConfig(
        num_ranks=num_ranks,
        batch_size=5 * num_ranks,
        micro_batch_tokens=micro_batch_tokens,
        learning_rate=learning_rate,
        epsilon=1e-5,  # under 1e-8 a gradient that is 0 but for rounding would still move weights
        cpus_per_rank=0.01,
        zero_stage=zero_stage,
    )


def pair_table() -> pa.Table:
    generator = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [generator.randrange(6, 100) for _ in range(generator.randrange(least, most))]

    return pa.table(
        {
            "pair_id": IDS,
            "prompt_token_ids": [ids(3, 10) for _ in IDS],
            "chosen_token_ids": [ids(2, 20) for _ in IDS],
            "rejected_token_ids": [ids(2, 20) for _ in IDS],
            "weight": [0.5 + generator.random() for _ in IDS],
            "noise": [NOISE] * len(IDS),
            "margin": [MARGIN] * len(IDS),
        }
    )


def thumbs_table() -> pa.Table:
    """Seven up and three down; two and three rows have a prompt in common."""
    pairs = pair_table()
    prompts, responses = (pairs.column(f"{name}_token_ids").to_pylist() for name in ("prompt", "chosen"))
    return pa.table(
        {
            "row_id": IDS,
            "prompt_token_ids": [prompts[{6: 0, 7: 1, 8: 1}.get(row, row)] for row in range(len(IDS))],
            "response_token_ids": responses,
            "desirable": [row not in (0, 4, 7) for row in range(len(IDS))],
            "weight": pairs.column("weight"),
        }
    )


def group_table() -> pa.Table:
    """Groups of 1 to 5 responses."""
    generator = random.Random(1)

    def ids(least: int, most: int) -> list[int]:
        return [generator.randrange(6, 100) for _ in range(generator.randrange(least, most))]

    sizes = [1 + i % 5 for i in range(len(IDS))]
    return pa.table(
        {
            "row_id": IDS,
            "prompt_token_ids": [ids(3, 10) for _ in IDS],
            "responses_token_ids": [[ids(2, 20) for _ in range(size)] for size in sizes],
            "rewards": [[generator.random() for _ in range(size)] for size in sizes],
            "weight": [0.5 + generator.random() for _ in IDS],
        }
    )


def label_table() -> pa.Table:
    pairs = pair_table()
    return pa.table(
        {
            "row_id": IDS,
            "prompt_token_ids": pairs.column("prompt_token_ids"),
            "response_token_ids": pairs.column("chosen_token_ids"),
            "weight": pairs.column("weight"),
        }
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(path=str(write_llama(Path(tmp_path_factory.mktemp("models")) / "llama", tied=True)))


@pytest.fixture(scope="module")
def groups(loop: Loop, source: ModelSource) -> Iterator[dict[int, TrainingGroup]]:
    """One rank, and two."""
    started = {num: TrainingGroup(config=settings(num), source=source, name=f"losses-{num}") for num in (1, 2)}
    for group in started.values():
        loop.run(group.start())
    yield started
    for group in started.values():
        loop.run(group.shutdown())


async def train(
    group: TrainingGroup,
    *,
    source: ModelSource,
    config: TrainingConfig,
    name: str,
    table: pa.Table | None = None,
    reference_weights: ReferenceWeights = "start_of_update",
) -> tuple[UpdateReport, dict[str, torch.Tensor]]:
    """Two epochs of two steps of five pairs from the source's weights, with the settings that a TOML gives."""
    run = load_run_config([], flags=[("loss.kind", name), *FLAGS.get(name, ())])
    plan = TrainingPlan.of(IDS, batch_size=5, epochs=2, seed=0)
    await group.reopen(config=config, source=source)
    given = (thumbs_table() if name == "kto" else pair_table()) if table is None else table
    report = await group.update(
        given, loss=run.loss.kind, loss_config=run.loss, plan=plan, reference_weights=reference_weights
    )
    manifest = await group.publish(version="v1")
    return report, {name: tensor.clone() for name, tensor in iter_tensors(manifest)}


# Where the policy is the reference every pair has the same loss: delta = 0.
FIRST_LOSS = {
    "dpo": math.log(2),
    "cdpo": math.log(2),
    "rdpo": math.log(2),
    # softmax (1/2, 1/2) against (0.999, 0.001)
    "exo": -math.log(2) - (math.log(0.999) + math.log(0.001)) / 2,
    "ipo": 25.0,
    "rso": 1.0,
    "modpo": math.log1p(math.exp(MARGIN)),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_named_in_a_toml_trains_pairs_alike_on_one_rank_and_on_two(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource, name: str
) -> None:
    report, weights = loop.run(train(groups[1], source=source, config=settings(1), name=name))
    assert report.steps[0].loss == pytest.approx(FIRST_LOSS[name], abs=1e-5)
    assert [step.applied for step in report.steps] == [True] * 4
    # The second epoch's pairs have been learnt from; at a larger step IPO's square would overshoot its margin.
    assert sum(step.loss for step in report.steps[2:]) < sum(step.loss for step in report.steps[:2])
    two, same = loop.run(train(groups[2], source=source, config=settings(2, micro_batch_tokens=40), name=name))
    assert max(float((weights[key] - same[key]).abs().max()) for key in weights) <= 1e-6
    for one, other in zip(report.steps, two.steps, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-5)
        assert one.metrics == pytest.approx(other.metrics, abs=1e-4)


def test_thumbs_train_alike_on_one_rank_and_on_two(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    columns = thumbs_table().to_pydict()
    thumbs = list(zip(columns["weight"], columns["desirable"], strict=True))
    num_good, num_bad = (math.fsum(weight for weight, thumb in thumbs if thumb is side) for side in (True, False))
    rows = TrainingPlan.of(IDS, batch_size=5, epochs=2, seed=0).steps[0].rows
    assert {columns["desirable"][row] for row in rows} == {True, False}
    # Seven up and three down: the bad ones weigh more. At the reference every row costs a half.
    assert num_good > num_bad
    costs = [thumbs[row][0] * (1.0 if thumbs[row][1] else num_good / num_bad) / 2 for row in rows]
    report, weights = loop.run(train(groups[1], source=source, config=settings(1), name="kto"))
    assert report.steps[0].loss == pytest.approx(sum(costs) / sum(thumbs[row][0] for row in rows), abs=1e-5)
    assert report.staleness == pytest.approx({"num_desirable": num_good, "num_undesirable": num_bad})
    assert [step.metrics["side_ratio"] for step in report.steps] == pytest.approx([1.0] * 4, abs=1e-5)
    assert [step.applied for step in report.steps] == [True] * 4
    assert sum(step.loss for step in report.steps[2:]) < sum(step.loss for step in report.steps[:2])
    packed = settings(1).model_copy(update={"packing": True})
    for group, config in ((groups[2], settings(2, micro_batch_tokens=40)), (groups[1], packed)):
        again, same = loop.run(train(group, source=source, config=config, name="kto"))
        assert max(float((weights[key] - same[key]).abs().max()) for key in weights) <= 1e-6
        for one, other in zip(report.steps, again.steps, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-5)
            assert one.metrics == pytest.approx(other.metrics, abs=1e-4)


@pytest.mark.parametrize("name", ["exo_group", "pro", "weak_to_strong", "forward_correction"])
def test_a_loss_of_groups_or_labels_named_in_a_toml_trains_alike_on_one_rank_and_on_two(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource, name: str
) -> None:
    table = group_table() if name in ("exo_group", "pro") else label_table()
    # The second rank's three of five rows do not fit into one micro-batch, and under ZeRO 3 all must follow.
    one, two = settings(1), settings(2, micro_batch_tokens=40, zero_stage=3 if name == "weak_to_strong" else 0)
    report, weights = loop.run(train(groups[1], source=source, config=one, name=name, table=table))
    assert report.steps[0].loss == pytest.approx(first_loss(name, table, source), abs=1e-5)
    assert [step.applied for step in report.steps] == [True] * 4
    first, second = (epoch_loss(name, table, report, epoch=epoch) for epoch in (0, 1))
    assert second < first
    if name == "weak_to_strong":
        # Half of the tokens have a say; a fifth of the way is none of the first step, and all of the second.
        assert [step.metrics["alpha"] for step in report.steps] == pytest.approx([0.0, 0.25, 0.25, 0.25], abs=0.02)
    again, same = loop.run(train(groups[2], source=source, config=two, name=name, table=table))
    assert max(float((weights[key] - same[key]).abs().max()) for key in weights) <= 1e-6
    for step, other in zip(report.steps, again.steps, strict=True):
        assert step.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-5)
        assert step.metrics == pytest.approx(other.metrics, abs=1e-4)


@pytest.mark.parametrize("name", ["kto", "exo_group"])
def test_the_runs_first_weights_are_the_reference_of_mismatched_rows_and_of_groups_too(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource, name: str
) -> None:
    """The first update begins at them, so both references are the same."""
    table = group_table() if name == "exo_group" else thumbs_table()
    reports = []
    for reference_weights in get_args(ReferenceWeights):
        training = train(
            groups[2],
            source=source,
            config=settings(2),
            name=name,
            table=table,
            reference_weights=reference_weights,
        )
        reports.append(loop.run(training)[0])
    own, first = ([(step.loss, step.grad_norm, step.metrics) for step in report.steps] for report in reports)
    assert own == first
    assert reports[1].staleness["reference_sequences"] > len(IDS)
    assert "reference_sequences" not in reports[0].staleness


def test_the_reference_of_groups_may_be_the_first_weights(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    from transformers import AutoModelForCausalLM

    table, loss_config = group_table(), load_loss("exo_group").Config()
    plan = TrainingPlan.of(IDS, batch_size=10, epochs=1, seed=0)

    async def call() -> tuple[list[float], dict[str, torch.Tensor]]:
        await groups[2].reopen(config=settings(2, micro_batch_tokens=40, learning_rate=1e-3), source=source)
        await groups[2].update(table, loss="exo_group", loss_config=loss_config, plan=plan)
        manifest = await groups[2].publish(version="v1")
        weights = {name: tensor.clone() for name, tensor in iter_tensors(manifest)}
        report = await groups[2].update(
            table, loss="exo_group", loss_config=loss_config, plan=plan, reference_weights="bootstrap"
        )
        return [step.loss for step in report.steps], weights

    losses, weights = loop.run(call())
    first, now = (AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32) for _ in range(2))
    now.load_state_dict(weights, strict=False)
    columns: dict[str, Any] = table.to_pydict()
    total = 0.0
    for row in range(len(IDS)):
        prompt = columns["prompt_token_ids"][row]
        logratios = []
        for response in columns["responses_token_ids"][row]:
            ids = torch.tensor([prompt + response])
            sums = [
                token_logprobs(model(input_ids=ids).logits, ids)[0, len(prompt) :].sum().item()
                for model in (now, first)
            ]
            logratios.append(sums[0] - sums[1])
        log_p = (0.5 * torch.tensor(logratios, dtype=torch.float64)).log_softmax(0)
        log_q = (torch.tensor(columns["rewards"][row], dtype=torch.float64) / 0.5).log_softmax(0)
        total += columns["weight"][row] * float((log_p.exp() * (log_p - log_q)).sum())
    assert losses == [pytest.approx(total / sum(columns["weight"]), abs=1e-5)]
    assert abs(losses[0] - first_loss("exo_group", table, source, plan=plan)) > 1e-3


def epoch_loss(name: str, table: pa.Table, report: UpdateReport, *, epoch: int) -> float:
    """Return what all rows cost together: steps differ in what they are a mean over."""
    weights = dict(zip(IDS, table.column("weight").to_pylist(), strict=True))
    if name in ("weak_to_strong", "forward_correction"):
        lengths = map(len, table.column("response_token_ids").to_pylist())
        weights = {row: weights[row] * length for row, length in zip(IDS, lengths, strict=True)}
    rows = [slot for slot in report.slots if slot.epoch == epoch]
    return math.fsum(report.steps[slot.step].loss * weights[slot.row_id] for slot in rows)


def first_loss(name: str, table: pa.Table, source: ModelSource, *, plan: TrainingPlan | None = None) -> float:
    """Return what the first step's rows cost by hand, with transformers' own log-probs of one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    rows = (plan or TrainingPlan.of(IDS, batch_size=5, epochs=2, seed=0)).steps[0].rows
    columns: dict[str, Any] = {key: table.column(key).to_pylist() for key in table.column_names}

    def logprobs(prompt: list[int], response: list[int]) -> list[float]:
        ids = torch.tensor([prompt + response])
        found: list[float] = token_logprobs(model(input_ids=ids).logits, ids)[0, len(prompt) :].tolist()
        return found

    total = denominator = 0.0
    for row in rows:
        prompt, weight = columns["prompt_token_ids"][row], columns["weight"][row]
        if name == "exo_group":
            # All log-ratios are 0: p is uniform.
            rewards = torch.tensor(columns["rewards"][row], dtype=torch.float64)
            log_q = (rewards / 0.5).log_softmax(0)
            total -= weight * float(math.log(len(rewards)) + log_q.mean())
            denominator += weight
        elif name == "pro":
            total += weight * ranking_loss([logprobs(prompt, r) for r in columns["responses_token_ids"][row]],
                                           columns["rewards"][row])  # fmt: skip
            denominator += weight
        else:
            found = logprobs(prompt, columns["response_token_ids"][row])
            if name == "forward_correction":
                other = 0.1 / (model.config.vocab_size - 1)
                found = [math.log((0.9 - other) * math.exp(value) + other) for value in found]
            total -= weight * sum(found)
            denominator += weight * len(found)
    return total / denominator


def ranking_loss(logprobs: list[list[float]], rewards: list[float]) -> float:
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    scores = [sum(values) / len(values) for values in logprobs]
    cost = 0.05 * (len(order) - 1) ** 2 * -sum(logprobs[order[0]])
    for place, best in enumerate(order[:-1]):
        gaps = {i: rewards[best] - rewards[i] for i in order[place + 1 :]}
        own = scores[best] * max(gaps.values())
        cost += math.log(math.exp(own) + sum(math.exp(scores[i] * gap) for i, gap in gaps.items())) - own
    return cost


def test_a_first_pass_is_a_collective_that_zero_3_can_follow(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    [plain, weights], [sharded, same] = (
        loop.run(train(groups[2], source=source, config=config, name="kto"))
        for config in (settings(2), settings(2, micro_batch_tokens=40, zero_stage=3))
    )
    assert [step.loss for step in sharded.steps] == pytest.approx([step.loss for step in plain.steps], abs=1e-5)
    assert max(float((weights[key] - same[key]).abs().max()) for key in weights) <= 1e-6


def test_a_pairs_own_noise_reaches_the_loss(loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource) -> None:
    # Both start at log 2; cdpo's gradient there is 1 - 2 * 0.2 = 0.6 of dpo's, and with the config's 0.1 it were 0.8.
    [plain, _], [smoothed, _] = (
        loop.run(train(groups[1], source=source, config=settings(1), name=name)) for name in ("dpo", "cdpo")
    )
    assert smoothed.steps[0].grad_norm / plain.steps[0].grad_norm == pytest.approx(0.6, rel=1e-4)


def test_margins_of_other_objectives_reach_modpo_in_the_place_of_the_pairs_own(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    table = pair_table().append_column("other_margins", pa.array([[0.4]] * len(IDS)))
    report, _ = loop.run(train(groups[2], source=source, config=settings(2), name="modpo", table=table))
    # softplus(0.5 * 0.4 / 0.5)
    assert report.steps[0].loss == pytest.approx(math.log1p(math.exp(0.4)), abs=1e-4)


def test_kto_measures_its_reference_point_on_other_rows_responses(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    """The second step's z0 by hand: its weights are published after the first, and nothing else is known of them."""
    from transformers import AutoModelForCausalLM

    # All rows in each step, and the good weigh far more: responses become likelier whatever they answer, so that the
    # second step's z0 is not cut off at 0.
    config = kto.Config(desirable_weight=20.0, undesirable_weight=0.05)
    plan = TrainingPlan.of(IDS, batch_size=10, epochs=2, seed=0)
    table = thumbs_table()

    async def call() -> tuple[UpdateReport, dict[str, torch.Tensor]]:
        training = settings(2, micro_batch_tokens=40, learning_rate=1e-3)
        await groups[2].reopen(config=training, source=source)
        one = TrainingPlan(row_ids=plan.row_ids, steps=plan.steps[:1])
        await groups[2].update(table, loss="kto", loss_config=config, plan=one)
        manifest = await groups[2].publish(version="v1")
        weights = {name: tensor.clone() for name, tensor in iter_tensors(manifest)}
        await groups[2].reopen(config=training, source=source)
        return await groups[2].update(table, loss="kto", loss_config=config, plan=plan), weights

    report, weights = loop.run(call())
    models = {}
    for which in ("reference", "policy"):
        models[which] = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    models["policy"].load_state_dict(weights, strict=False)
    rows = plan.steps[1].rows
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    total = 0.0
    prompts = [columns["prompt_token_ids"][row] for row in rows]
    # What is longer than any of the table's sequences is cut.
    longest = max(len(columns["prompt_token_ids"][row] + columns["response_token_ids"][row]) for row in rows)
    for place, other in enumerate(partners([tuple(prompt) for prompt in prompts])):
        prompt, response = prompts[place], columns["response_token_ids"][rows[other]]
        assert prompts[other] != prompt
        ids = torch.tensor([(prompt + response)[:longest]])
        policy, reference = (
            token_logprobs(models[which](input_ids=ids).logits, ids)[0, len(prompt) :].sum().item()
            for which in ("policy", "reference")
        )
        total += columns["weight"][rows[place]] * (policy - reference)
    mean = total / sum(columns["weight"][row] for row in rows)
    assert mean > 0.1
    assert report.steps[1].metrics["reference_point"] == pytest.approx(max(0.0, mean), abs=1e-4)
    assert report.steps[0].metrics["reference_point"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["gce", "token_noise", "span_noise", "smoothed"])
def test_a_noise_robust_loss_starts_at_what_the_whole_batch_comes_to_by_hand(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    generator = random.Random(5)
    prompts = [[generator.randrange(6, 100) for _ in range(3)] for _ in range(6)]
    responses = [[generator.randrange(6, 100) for _ in range(n)] for n in (2, 30, 4, 9, 17, 3)]
    flagged = [[generator.random() < 0.3 for _ in response] for response in responses]
    columns = {"prompt_token_ids": prompts, "response_token_ids": responses, "flagged": flagged}
    plan = TrainingPlan.of([str(i) for i in range(6)], batch_size=6, epochs=1, seed=0)
    # Few tokens of an untrained model of about 100 have a probability above 0.0095.
    config = {
        "gce": gce.Config(q=0.7),
        "token_noise": token_noise.Config(min_probability=0.0095),
        "span_noise": span_noise.Config(unlikelihood=0.5),
        "smoothed": token_noise.Config(min_probability=0.0, label_smoothing=0.1),
    }[name]
    kind = "token_noise" if name == "smoothed" else name

    async def call() -> UpdateReport:
        await groups[2].reopen(config=settings(2, micro_batch_tokens=32), source=source)
        return await groups[2].update(pa.table(columns), loss=kind, loss_config=config, plan=plan)

    report = loop.run(call())
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    losses = []
    for prompt, response, flags in zip(prompts, responses, flagged, strict=True):
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids).logits
        logprobs: list[float] = token_logprobs(logits, ids)[0].tolist()
        if name == "smoothed":
            smoothed = torch.nn.functional.cross_entropy(
                logits[0, 2:-1], ids[0, 3:], label_smoothing=0.1, reduction="none"
            )
            losses += smoothed.tolist()
            continue
        for logprob, flag in zip(logprobs[3:], flags, strict=True):
            probability = math.exp(logprob)
            if name == "gce":
                losses.append((1 - probability**0.7) / 0.7)
            elif name == "span_noise":
                losses.append(-0.5 * math.log(1 - probability) if flag else -logprob)
            elif probability > 0.0095:
                losses.append(-logprob)
    assert 5 < len(losses) <= 65
    assert report.steps[0].loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_table_of_other_rows_than_the_losss_is_refused(
    loop: Loop, groups: dict[int, TrainingGroup], source: ModelSource
) -> None:
    plan = TrainingPlan.of(IDS, batch_size=5, epochs=1, seed=0)

    async def call() -> None:
        await groups[1].reopen(config=settings(1), source=source)
        await groups[1].update(pair_table(), loss="pro", loss_config=load_loss("pro").Config(), plan=plan)

    with pytest.raises(ValueError, match="no column 'responses_token_ids'"):
        loop.run(call())
