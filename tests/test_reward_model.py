"""A reward model learns from pairs that are not held out and scores all responses; critiques it reads after them."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from actors.critic import critique_id_of
from actors.model_directory import context_length
from actors.oversight import Judged
from actors.records import PreferencePair, Verdict
from cluster.config import Config, plugin_names
from cluster.machine import Gpu
from tests.machines import TWO_CORES
from tests.small_records import make_judged, make_verdict
from tests.tiny_models import write_llama
from trainers.batches import TrainingPlan
from trainers.feedback.preferences import PreferenceConfig, build_pairs
from trainers.feedback.reward_config import RewardConfig, reward_problems
from trainers.feedback.reward_model import (
    Reading,
    Rewarded,
    RewardModel,
    accuracy,
    certainty,
    first_critique,
    held_out_queries,
    read_response,
    reward_table,
)
from trainers.feedback.training_data import of_samples
from trainers.losses import bradley_terry
from trainers.plan import plan_run
from trainers.ranks.model_source import ModelSource, load_model, longest_sequence, max_positions
from trainers.ranks.sequence_scores import last_targets, sequence_scores
from trainers.ranks.value_head import add_value_head
from trainers.rows.pairs import pair_rows
from trainers.rows.samples import sample_rows
from trainers.run_config import load_run_config

RUN = "run"


class BagOfTokens:
    """Stands for a reward group: a response's score is the sum of what its tokens are worth, which is learnt."""

    def __init__(self) -> None:
        self.worth = torch.zeros(300, dtype=torch.float64, requires_grad=True)
        self.updates: list[tuple[pa.Table, TrainingPlan]] = []
        self.num_asked = 0

    async def update(self, table: pa.Table, *, loss: str, loss_config: Config, plan: TrainingPlan) -> Any:
        assert loss == "bradley_terry"
        assert isinstance(loss_config, bradley_terry.Config)
        rows = pair_rows(table)
        self.updates.append((table, plan))
        found = []
        for step in plan.steps:
            padded = rows.pad(step.rows)
            scores = (self.worth[padded.token_ids] * padded.mask).sum(dim=1)
            output = bradley_terry.loss(
                rows.score_batch(step.rows, scores=scores, totals=rows.totals(step.rows)), loss_config
            )
            (gradient,) = torch.autograd.grad(output.loss, self.worth)
            with torch.no_grad():
                self.worth -= 0.5 * gradient
            found.append({name: value.item() for name, value in output.metrics.items()} | {"loss": output.loss.item()})
        means = {name: math.fsum(row[name] for row in found) / len(found) for name in found[0]}
        return SimpleNamespace(means=means)

    async def scores(self, sequences: Sequence[Sequence[int]]) -> tuple[float, ...]:
        self.num_asked += len(sequences)
        # A prompt of three tokens comes first.
        return tuple(float(self.worth.detach()[list(sequence[3:])].sum()) for sequence in sequences)


class World:
    """Queries with four answers: good ones are mostly of the letter a, bad ones of b; verdicts are right."""

    def __init__(self, *, num_queries: int = 30, seed: int = 0, share: float = 0.8, iteration: int = 1) -> None:
        generator = random.Random(seed)
        self.judged: list[Judged] = []
        self.verdicts: list[Verdict] = []
        self.good: dict[str, bool] = {}
        for query in range(num_queries):
            for sample in range(4):
                good = sample < 2
                response_id = f"{seed}-{query}-r{sample}"
                text = "".join("ab"[(generator.random() < share) != good] for _ in range(5))
                text += "".join(generator.choices("cdefghij", k=3))
                item = make_judged(response_id, 0.9 if good else 0.1, query_id=f"{seed}-q{query}", text=text)
                self.judged.append(replace(item, query=replace(item.query, iteration=iteration)))
                self.verdicts.append(make_verdict(response_id, 0.9 if good else 0.1, query_id=f"{seed}-q{query}"))
                self.good[response_id] = good
        self.pairs = build_pairs(
            [item.query for item in self.judged[::4]],
            {item.response.response_id: item.response for item in self.judged},
            self.verdicts,
            config=PreferenceConfig(cut_at_flaw=False),
            run=RUN,
            tokens_spanning=lambda ids, num_chars: num_chars,
            version=0,
            max_age=0,
        ).pairs

    def learn(
        self,
        config: RewardConfig | None = None,
        *,
        group: BagOfTokens | None = None,
        read: Callable[[Judged], Reading | None] = read_response,
        iteration: int = 1,
    ) -> Rewarded:
        model = RewardModel(
            group or BagOfTokens(),  # type: ignore[arg-type]
            config=config or RewardConfig(kind="model"),
            read=read,
            run=RUN,
            seed=0,
        )
        return asyncio.run(model.learn(self.judged, self.verdicts, self.pairs, iteration=iteration))

    def verdict_is_right(self, response_id: str, *, share: float) -> bool:
        return random.Random(response_id).random() < share


def saying(world: World, *, share: float = 1.0, swapped: bool = False) -> Callable[[Judged], Sequence[int]]:
    """Return critiques of one token, 200 for good and 201 for bad; a share of them is right."""

    def critique(item: Judged) -> Sequence[int]:
        response_id = item.response.response_id
        good = world.good[response_id] == world.verdict_is_right(response_id, share=share)
        return [200 if good != swapped else 201]

    return critique


def reading(critique: Callable[[Judged], Sequence[int] | None]) -> Callable[[Judged], Reading | None]:
    return lambda item: read_response(item, critique=critique)


# ------------------------------------------------------------------------------------------------------------- scores


def test_a_score_is_read_at_the_last_target_of_each_sequence_in_one_pass_or_two() -> None:
    class Echo:
        """A model whose head's value at a position is 10 times the position, plus the token."""

        def __call__(self, *, input_ids: torch.Tensor, **_: Any) -> Any:
            values = 10.0 * torch.arange(input_ids.shape[1]) + input_ids
            return type("Output", (dict,), {"logits": torch.zeros(len(input_ids), 1, 7)})(token_values=values)

    rows = pair_rows(
        pa.table(
            {
                "prompt_token_ids": [[1, 1], [1, 1]],
                "chosen_token_ids": [[1, 2], [3]],
                "rejected_token_ids": [[1, 1, 1, 1, 4], [5]],
            }
        )
    )
    for num_passes in (1, 2):
        padded = rows.pad((0, 1), num_passes=num_passes)
        # Chosen of the rows, then rejected: last tokens 2, 3, 4, 5 at positions 3, 2, 6, 2.
        assert sequence_scores(Echo(), padded, device=torch.device("cpu")).tolist() == [32.0, 23.0, 64.0, 25.0]
    dummy = rows.pad(())
    assert last_targets(dummy.mask).tolist() == [0, 0]


def test_a_reward_models_score_carries_a_gradient_of_0_to_the_head_that_predicts_tokens() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, tie_word_embeddings=False,
        )
    )  # fmt: skip
    add_value_head(model)
    torch.nn.init.ones_(model.value_head.weight)
    table = {"prompt_token_ids": [[1, 2]], "chosen_token_ids": [[3]], "rejected_token_ids": [[4, 5, 6]]}
    padded = pair_rows(pa.table(table)).pad((0,))
    scores = sequence_scores(model, padded, device=torch.device("cpu"))
    with torch.no_grad():
        for ids, score in zip(([1, 2, 3], [1, 2, 4, 5, 6]), scores.tolist(), strict=True):
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
            assert score == pytest.approx(float(hidden[0, -1].sum()), abs=1e-6)
    scores.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert float(model.lm_head.weight.grad.abs().max()) == 0.0
    assert float(model.value_head.weight.grad.abs().max()) > 0.0


def test_a_pairs_margin_noise_and_weight_reach_the_loss() -> None:
    rows = pair_rows(
        pa.table(
            {
                "prompt_token_ids": [[1], [1]],
                "chosen_token_ids": [[2], [2]],
                "rejected_token_ids": [[3], [3]],
                "margin": [1 / 3, 0.0],
                "noise": [0.0, 0.3],
                "weight": [1.0, 3.0],
            }
        )
    )
    scores = torch.tensor([1.2, 1.2, 0.4, 0.4], dtype=torch.float64)
    batch = rows.score_batch((0, 1), scores=scores, totals=rows.totals((0, 1)))
    # METHODS L-BT: 0.486793 with margin 1/3, 0.611101 with p = 0.7.
    found = bradley_terry.loss(batch, bradley_terry.Config())
    assert float(found.loss) == pytest.approx((0.486793 + 3 * 0.611101) / 4, abs=1e-6)
    # The same over two micro-batches (G1), a dummy among them (G5).
    parts = [rows.score_batch((row,), scores=scores[row::2], totals=rows.totals((0, 1))) for row in (0, 1)]
    parts.append(rows.score_batch((), scores=torch.zeros(2, dtype=torch.float64), totals=rows.totals((0, 1))))
    losses = [bradley_terry.loss(part, bradley_terry.Config()).loss for part in parts]
    assert float(sum(losses)) == pytest.approx(float(found.loss), abs=1e-12)


# ------------------------------------------------------------------------------------------------------- what it reads


def test_a_critique_is_read_after_the_response_and_cut_where_the_context_ends() -> None:
    item = make_judged("r0", 0.9, text="ab")
    plain = read_response(item)
    assert plain == Reading(prompt_token_ids=(1, 2, 3), token_ids=(97, 98, 0), is_cut=False)
    said = [7, 8, 9]
    whole = read_response(item, critique=lambda _: said, longest=9)
    assert whole == Reading(prompt_token_ids=(1, 2, 3), token_ids=(97, 98, 0, 7, 8, 9), is_cut=False)
    assert read_response(item, critique=lambda _: said, longest=7) == Reading(
        prompt_token_ids=(1, 2, 3), token_ids=(97, 98, 0, 7), is_cut=True
    )
    assert read_response(item, critique=lambda _: said, longest=2) == replace(plain, is_cut=True)
    assert read_response(item, critique=lambda _: None) is None


@pytest.mark.parametrize("positions", [64, None])
def test_a_critique_is_cut_where_the_ranks_would_refuse_it_also_where_an_engine_stretches_positions(
    tmp_path: Path, positions: int | None
) -> None:
    path = write_llama(tmp_path / "m", max_positions=64)
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = positions
    stretched = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config |= {"rope_parameters": stretched}
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    most = max_positions(load_model(ModelSource(path=str(path)), dtype=torch.float32).config)
    # A config that says nothing has transformers' own default.
    assert (most, context_length(path)) == ((64, 256) if positions else (2048, None))
    item = make_judged("r0", 0.9, text="ab")
    reading = read_response(item, critique=lambda _: [7] * 3000, longest=longest_sequence(path))
    assert reading is not None
    assert (len(reading.sequence), reading.is_cut) == (most, True)


def test_the_critique_is_the_greedy_one_whatever_the_order_of_ids() -> None:
    item = make_judged("r0", 0.9, 0.8, 0.7)
    critiques = [
        replace(critique, critique_id=critique_id_of(RUN, item.query, item.response, k), text=f"critique {k}")
        for k, critique in enumerate(item.critiques)
    ]
    for order in ((0, 1, 2), (2, 0, 1)):
        assert first_critique(replace(item, critiques=tuple(critiques[k] for k in order)), run=RUN) == "critique 0"
    # It was lost: another one is not taken in its place.
    assert first_critique(replace(item, critiques=tuple(critiques[1:])), run=RUN) is None


def test_an_empty_critique_is_no_critique_to_the_bit() -> None:
    """METHODS L-CRM: empty c gives L-BT."""
    plain, empty = BagOfTokens(), BagOfTokens()
    world = World()
    first, second = world.learn(group=plain), world.learn(group=empty, read=reading(lambda _: ()))
    assert first == second
    assert torch.equal(plain.worth, empty.worth)
    assert plain.updates[0][0] == empty.updates[0][0]


def test_swapped_critiques_reduce_accuracy_and_better_ones_raise_it() -> None:
    """METHODS L-CRM: on synthetic data whose responses say little themselves."""
    train, fresh = World(num_queries=60, share=0.55), World(num_queries=60, seed=1, share=0.55)

    def known(share: float | None, *, swapped: bool = False) -> float:
        group = BagOfTokens()
        of_train, of_fresh = (
            read_response if share is None else reading(saying(world, share=share, swapped=swap))
            for world, swap in ((train, False), (fresh, swapped))
        )
        train.learn(RewardConfig(kind="model", held_out=0.0, epochs=4), group=group, read=of_train)
        readings = {item.response.response_id: of_fresh(item) for item in fresh.judged}
        sequences = {name: shown.sequence for name, shown in readings.items() if shown is not None}
        scores = asyncio.run(group.scores(list(sequences.values())))
        found = accuracy(fresh.pairs, dict(zip(sequences, scores, strict=True)))
        assert found is not None
        return found

    plain = known(None)
    rising = [known(share) for share in (0.6, 0.8, 0.95)]
    assert rising == sorted(rising)
    assert rising[-1] > plain + 0.1
    assert known(0.95, swapped=True) < 0.3


def test_a_response_whose_critique_was_lost_has_no_score_and_trains_no_pair() -> None:
    world, group = World(num_queries=6), BagOfTokens()
    lost = world.pairs[0].chosen_id
    found = world.learn(
        RewardConfig(kind="model", held_out=0.0),
        group=group,
        read=reading(lambda item: None if item.response.response_id == lost else [200]),
    )
    assert len(found.scores) == len(world.judged) - 1
    assert lost not in found.scores
    assert world.pairs[0].pair_id not in group.updates[0][1].row_ids
    assert found.figures["pairs"] == len(world.pairs) - 1
    data = of_samples(world.judged, world.verdicts, version=0, max_age=0, spans=None, scores=found.scores)
    assert data.dropped == {"unjudged": 1}


# ----------------------------------------------------------------------------------------------------- how it learns


def test_held_out_pairs_train_nothing_and_measure_the_model() -> None:
    world, group = World(), BagOfTokens()
    found = world.learn(RewardConfig(kind="model", epochs=3), group=group)
    ((_, plan),) = group.updates
    held_out = {reward.query_id for reward in found.rewards if reward.held_out}
    assert len(held_out) == 6  # a fifth of 30
    trained = {pair.query_id for pair in world.pairs if pair.pair_id in plan.row_ids}
    assert trained | held_out == {pair.query_id for pair in world.pairs}
    assert not trained & held_out
    hidden = [pair for pair in world.pairs if pair.query_id in held_out]
    assert found.figures["held_out"] == len(hidden)
    assert found.figures["pairs"] == len(world.pairs) - len(hidden)
    right = sum(found.scores[pair.chosen_id] > found.scores[pair.rejected_id] for pair in hidden)
    assert found.figures["accuracy"] == right / len(hidden) > 0.8
    assert found.figures["loss"] < math.log(2)
    assert {reward.response_id for reward in found.rewards} == {item.response.response_id for item in world.judged}


def test_what_is_held_out_hangs_on_places_and_seed_alone() -> None:
    pairs = World().pairs
    renamed = [replace(pair, query_id=f"other-{pair.query_id}", pair_id=f"other-{pair.pair_id}") for pair in pairs]
    places = {pair.query_id: i for i, pair in enumerate(pairs)}

    def drawn(of: Sequence[PreferencePair], prefix: str = "", *, seed: int = 0, iteration: int = 1) -> set[str]:
        named = {f"{prefix}{query}": place for query, place in places.items()}
        found = held_out_queries(of, named, share=0.3, seed=seed, iteration=iteration)
        return {query.removeprefix(prefix) for query in found}

    assert drawn(pairs) == drawn(list(reversed(pairs))) == drawn(renamed, "other-")
    assert len({frozenset(drawn(pairs, seed=seed, iteration=i)) for seed in (0, 1) for i in (1, 2)}) == 4
    # Of two queries one is held out, of one none: something must train.
    two = [pair for pair in pairs if pair.query_id in ("0-q0", "0-q1")]
    assert len(held_out_queries(two, places, share=0.01, seed=0, iteration=1)) == 1
    assert len(held_out_queries(two, places, share=0.99, seed=0, iteration=1)) == 1
    assert held_out_queries(two[:1], places, share=0.5, seed=0, iteration=1) == frozenset()
    assert held_out_queries(two, places, share=0.0, seed=0, iteration=1) == frozenset()


def test_copies_of_a_response_are_scored_once_and_alike() -> None:
    world, group = World(num_queries=1), BagOfTokens()
    first, second, *others = world.judged
    world.judged = [
        first,
        replace(second, response=replace(second.response, token_ids=first.response.token_ids)),
        *others,
    ]
    found = world.learn(group=group)
    assert group.num_asked == 3
    assert found.scores[first.response.response_id] == found.scores[second.response.response_id]


def test_without_a_pair_what_was_learnt_before_scores() -> None:
    group = BagOfTokens()
    World().learn(group=group)
    later = World(num_queries=4, seed=5)
    later.pairs = ()
    found = later.learn(group=group, iteration=2)
    assert len(group.updates) == 1
    assert set(found.figures) == {"held_out", "pairs", "mean", "std", "cut"}
    assert found.figures["std"] > 0
    # Untrained, all is 0.
    assert set(later.learn().scores.values()) == {0.0}
    # And nobody is asked to score nothing.
    later.judged, later.verdicts = [], []
    assert later.learn().figures == {"held_out": 0.0, "pairs": 0.0, "cut": 0.0}


def test_margins_and_targets_are_what_the_verdicts_are_sure_of() -> None:
    world = World(num_queries=2)
    readings = {item.response.response_id: read_response(item) for item in world.judged}
    verdicts = {verdict.response_id: verdict for verdict in world.verdicts}
    noisy = [replace(pair, noise=0.1, weight=2.0) for pair in world.pairs]

    def columns(**config: bool) -> dict[str, Any]:
        table = reward_table(noisy, readings, verdicts, config=RewardConfig(kind="model", **config))  # type: ignore[arg-type]
        return {name: table.column(name).to_pylist()[0] for name in ("margin", "noise", "weight")}

    assert columns() == {"margin": 0.0, "noise": 0.1, "weight": 2.0}
    found = columns(graded_margins=True, soft_targets=True)
    assert found["margin"] == pytest.approx(0.8)
    # 0.9 and 0.1: 0.81 / (0.81 + 0.01) right; flipped once more with probability 0.1.
    assert certainty(0.9, 0.1) == pytest.approx(0.9878049, abs=1e-7)
    assert found["noise"] == pytest.approx((1 - 0.9878049) * 0.9 + 0.9878049 * 0.1, abs=1e-6)
    assert certainty(1.0, 0.0) == 1.0


def test_scores_of_the_reward_model_take_the_place_of_verdicts() -> None:
    world = World(num_queries=2)
    world.verdicts[3] = make_verdict(world.judged[3].response.response_id, None, query_id="0-q0")
    scores = {item.response.response_id: -1.5 + i for i, item in enumerate(world.judged)}
    data = of_samples(world.judged, world.verdicts, version=0, max_age=0, spans=None, scores=scores)
    rows = sample_rows(data.table)
    assert rows.scores.tolist() == [-1.5 + i for i in range(8)]  # the unjudged one too
    assert data.dropped == {}
    assert of_samples(world.judged, world.verdicts, version=1, max_age=0, spans=None, scores=scores).dropped == {
        "stale": 8
    }


# ------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("loss", ["dpo", "kto", "sft", "pro"])
def test_a_reward_model_beside_a_loss_that_takes_no_scores_is_refused(loss: str) -> None:
    assert list(reward_problems(RewardConfig(kind="model"), loss=loss, oversight="escalation")) == [
        f'reward.kind: got "model" with loss.kind = "{loss}", which learns from no scores of single responses, wanted '
        'loss.kind to be one of grpo, ppo, reinforce_pp, relc, rloo; or "critic"'
    ]


def test_a_reward_models_own_settings_are_checked_and_only_where_there_is_one() -> None:
    training = RewardConfig().training.model_copy(update={"value_head": False, "batch_size": 15, "num_ranks": 2})
    assert list(
        reward_problems(RewardConfig(kind="model", training=training), loss="grpo", oversight="escalation")
    ) == [
        "reward.training.value_head: got false, wanted true: the head's value is the score",
        "reward.training.batch_size: got 15, wanted a multiple of reward.training.num_ranks = 2",
    ]
    assert list(reward_problems(RewardConfig(training=training), loss="dpo", oversight="escalation")) == []
    assert list(reward_problems(RewardConfig(critiques=True), loss="grpo", oversight="escalation")) == [
        'reward.critiques: got true with reward.kind = "critic", wanted "model": only that reads them'
    ]
    assert list(reward_problems(RewardConfig(kind="model", critiques=True), loss="grpo", oversight="experts_only")) == [
        'reward.critiques: got true with oversight.kind = "experts_only", wanted false: the control would learn from '
        "what the critic wrote"
    ]
    for name in plugin_names("trainers.losses"):
        assert list(reward_problems(RewardConfig(), loss=name, oversight="escalation")) == []


def test_a_plan_counts_the_reward_models_ranks_and_checkpoints(tmp_path: Path) -> None:
    flags = [("runs_dir", str(tmp_path / "runs")), ("loss.kind", "grpo")]
    plain = plan_run(load_run_config([], flags=flags), machine=TWO_CORES)
    plan = plan_run(load_run_config([], flags=[*flags, ("reward.kind", "model")]), machine=TWO_CORES)
    assert plan.problems == ()
    *roles, reward = plan.roles
    assert (tuple(roles), reward.role, reward.unit, reward.count) == (plain.roles, "reward", "rank", 1)
    assert plan.cpus == pytest.approx(plain.cpus + 0.2)
    # fp32 without ZeRO: weights, gradients, two moments; no copy, for nobody is published to.
    assert sum(reward.memory[name] for name in ("weights", "gradients", "optimizer")) == 16 * reward.num_parameters
    assert "copy" not in reward.memory
    assert plan.memory_bytes - plain.memory_bytes == reward.memory_bytes
    (kept,) = [file for file in plan.files if "checkpoints-reward" in file.path]
    assert kept.size_bytes == 3 * 12 * reward.num_parameters


def test_a_reward_model_too_large_for_its_gpu_is_named(tmp_path: Path) -> None:
    flags = [("runs_dir", str(tmp_path / "runs")), ("loss.kind", "grpo"), ("reward.kind", "model")]
    flags += [
        ("reward.training.gpus_per_rank", "0.5"),
        ("base_model.hidden_size", "8192"),
        ("base_model.num_layers", "40"),
    ]
    gpu = Gpu(index=0, name="H100", memory_bytes=80 << 30, free_bytes=80 << 30, driver="580.65.06")
    plan = plan_run(load_run_config([], flags=flags), machine=replace(TWO_CORES, gpus=(gpu,)))
    (line,) = [line for line in plan.problems if line.startswith("reward.training:")]
    assert line.endswith(
        "per rank, wanted at most 0.5 of a GPU's 80.0 GiB: raise zero_stage, num_ranks or gpus_per_rank, or lower "
        "micro_batch_tokens"
    )
