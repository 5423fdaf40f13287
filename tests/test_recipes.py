"""Every recipe is a config that loads, and what it asks of the cluster is what its name and its head say.

The public models are here by the sizes in their configs alone: weights with the right headers, and holes for bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import trainers.plan
from cluster.machine import Gpu, Machine
from serve.manifest import Target, run_manifest
from tests.tiny_models import char_tokenizer
from trainers.memory_estimate import GIB
from trainers.plan import Plan, plan_run
from trainers.run_config import load_run_config, tenants

RECIPES = sorted((Path(__file__).resolve().parent.parent / "trainers" / "recipes").glob("*.toml"))
GPUS_PER_NODE = 8


class Sizes(NamedTuple):
    """Of a Qwen2.5, as its config.json on the hub says."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    billions: float
    """Parameters, as its model card says."""


MODELS = {
    "Qwen2.5-1.5B-Instruct": Sizes(1536, 8960, 28, 12, 2, 151_936, True, 1.54),
    "Qwen2.5-7B-Instruct": Sizes(3584, 18944, 28, 28, 4, 152_064, False, 7.61),
    "Qwen2.5-14B-Instruct": Sizes(5120, 13824, 48, 40, 8, 152_064, False, 14.7),
    "Qwen2.5-32B-Instruct": Sizes(5120, 27648, 64, 40, 8, 152_064, False, 32.5),
}


def tensors_of(sizes: Sizes) -> dict[str, list[int]]:
    """Return names and shapes of a Qwen2.5's weights."""
    kv = sizes.hidden // sizes.heads * sizes.kv_heads
    found = {"model.embed_tokens.weight": [sizes.vocabulary, sizes.hidden], "model.norm.weight": [sizes.hidden]}
    if not sizes.tied:
        found["lm_head.weight"] = [sizes.vocabulary, sizes.hidden]
    for layer in range(sizes.layers):
        here = f"model.layers.{layer}"
        for name, width in (("q", sizes.hidden), ("k", kv), ("v", kv)):
            found[f"{here}.self_attn.{name}_proj.weight"] = [width, sizes.hidden]
            found[f"{here}.self_attn.{name}_proj.bias"] = [width]
        found[f"{here}.self_attn.o_proj.weight"] = [sizes.hidden, sizes.hidden]
        for name in ("gate", "up"):
            found[f"{here}.mlp.{name}_proj.weight"] = [sizes.intermediate, sizes.hidden]
        found[f"{here}.mlp.down_proj.weight"] = [sizes.hidden, sizes.intermediate]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{here}.{name}.weight"] = [sizes.hidden]
    return found


def write_model(path: Path, sizes: Sizes) -> None:
    """Write a model's directory, whose weights take no room on the disk."""
    path.mkdir(parents=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": sizes.tied,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    char_tokenizer().save_pretrained(path)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors_of(sizes).items():
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with models/ as the recipes name them."""
    root = tmp_path_factory.mktemp("public")
    for name, sizes in MODELS.items():
        write_model(root / "models" / name, sizes)
    return root


def machine(*, gpus: int, gib: int = 80) -> Machine:
    one = Gpu(index=0, name="GPU", memory_bytes=gib * GIB, free_bytes=gib * GIB, driver="580.65.06")
    return Machine(
        system="Linux x86_64",
        num_cpus=96,
        memory_bytes=1024 * GIB,
        free_memory_bytes=1000 * GIB,
        gpus=(one,) * gpus,
        shm_bytes=512 * GIB,
    )


def planned(
    recipe: str, models: Path, monkeypatch: pytest.MonkeyPatch, *, on: Machine | None, nixl: bool = False
) -> Plan:
    """Return the plan of a recipe on a machine, or on a cluster that nobody looked at."""
    monkeypatch.chdir(models)
    monkeypatch.setattr(trainers.plan, "_vllm_device", lambda: "cuda")
    names = {"nccl", "ipc"} | ({"sharded_rdt"} if nixl else set())
    monkeypatch.setattr(trainers.plan, "usable_backends", lambda: frozenset(names))
    (path,) = [path for path in RECIPES if path.stem == recipe]
    flags = [("ray.address", "10.0.0.1:6379")] if on is None else []
    plan = plan_run(load_run_config([path], flags=flags), machine=on)
    # This machine's disk says nothing of theirs.
    return replace(plan, problems=tuple(line for line in plan.problems if not line.startswith("disk:")))


def needed_gpus(plan: Plan) -> dict[str, tuple[float, ...]]:
    """Return by role what all its processes reserve of GPUs."""
    return {role.role: role.gpus * role.count for role in plan.roles}


def nodes_for(replicas: Sequence[Sequence[float]]) -> int:
    """Return how many nodes of eight GPUs hold replicas of whole GPUs, each on one node; first fit, largest first."""
    free: list[int] = []
    for size in sorted((len(replica) for replica in replicas), reverse=True):
        place = next((i for i, left in enumerate(free) if left >= size), None)
        if place is None:
            free.append(GPUS_PER_NODE - size)
        else:
            free[place] -= size
    return len(free)


def reserved_replicas(plan: Plan) -> list[tuple[float, ...]]:
    return [role.gpus for role in plan.roles for _ in range(role.count) if role.gpus]


def test_each_model_has_the_parameters_of_its_card(models: Path) -> None:
    from trainers.memory_estimate import directory_shape

    for name, sizes in MODELS.items():
        found = directory_shape(models / "models" / name).num_parameters
        assert found / 1e9 == pytest.approx(sizes.billions, rel=0.01)
    assert directory_shape(models / "models" / "Qwen2.5-7B-Instruct").num_parameters == 7_615_616_512


def test_there_are_recipes_for_one_gpu_for_a_node_and_for_several_nodes() -> None:
    numbers = {int(re.findall(r"-(\d+)gpu$", path.stem)[0]) for path in RECIPES}
    assert {1, 8, 16} <= numbers
    assert max(numbers) > 16


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_reserves_the_gpus_of_its_name(path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(path.stem, models, monkeypatch, on=None)
    named = int(re.findall(r"-(\d+)gpu$", path.stem)[0])
    assert plan.problems == ()
    assert plan.gpus == pytest.approx(named, abs=0.06)
    if named > 1:
        # Ranks and replicas of whole GPUs, none over two nodes, fill the nodes that the head of the file counts.
        assert nodes_for(reserved_replicas(plan)) == -(-named // GPUS_PER_NODE)


def test_one_gpu_holds_three_engines_and_the_learner(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("qwen2.5-1.5b-1gpu", models, monkeypatch, on=machine(gpus=1))
    assert plan.problems == ()
    assert needed_gpus(plan) == {"attacker": (0.15,), "rollouts": (0.15,), "critic": (0.15,), "learner": (0.5,)}
    assert plan.transfer.backend == "ipc"
    # Half of 48 GiB is less than the learner's states and one micro-batch.
    small = planned("qwen2.5-1.5b-1gpu", models, monkeypatch, on=machine(gpus=1, gib=48))
    assert any(problem.startswith("learner.training: an estimated") for problem in small.problems)


def test_eight_gpus_train_on_four_and_answer_attack_and_judge_on_the_others(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("qwen2.5-7b-8gpu", models, monkeypatch, on=machine(gpus=8))
    assert plan.problems == ()
    assert needed_gpus(plan) == {
        "attacker": (1.0,),
        "rollouts": (1.0, 1.0),
        "critic": (1.0,),
        "learner": (1.0, 1.0, 1.0, 1.0),
    }
    assert (plan.transfer.backend, plan.transfer.reason) == ("nccl", "ranks and replicas have GPUs of their own")
    assert plan.roles[3].notes[-1] == "new weights go by nccl (ranks and replicas have GPUs of their own)"
    (problem,) = planned("qwen2.5-7b-8gpu", models, monkeypatch, on=machine(gpus=7)).problems
    assert problem.startswith("placement: the roles reserve 8 GPUs")


def test_four_gpus_are_shared_in_turn(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("qwen2.5-7b-shared-4gpu", models, monkeypatch, on=machine(gpus=4))
    assert plan.problems == ()
    assert needed_gpus(plan) == {"attacker": (), "rollouts": (), "critic": (), "learner": (1.0, 1.0, 1.0, 1.0)}
    assert plan.transfer.backend == "ipc"
    for role in plan.roles[:3]:
        assert role.notes[-1] == "on the learner's GPUs, 1 each, asleep while it trains"
        # What sleeps, and what is put aside, is in the host's memory: 2 bytes a parameter.
        assert role.memory["asleep"] == 2 * 7_615_616_512
    assert plan.roles[3].memory["put aside"] > 3 * 7_615_616_512
    greedy = planned("qwen2.5-7b-shared-4gpu", models, monkeypatch, on=machine(gpus=4, gib=64))
    assert any("between its turns" in problem for problem in greedy.problems)


def test_sixteen_gpus_are_a_node_that_trains_and_a_node_of_pools(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("qwen2.5-14b-16gpu", models, monkeypatch, on=None)
    roles = {role.role: role for role in plan.roles}
    assert {name: role.count for name, role in roles.items()} == {
        "attacker": 2,
        "rollouts": 4,
        "critic": 2,
        "learner": 8,
    }
    assert plan.transfer.backend == "nccl"
    # By formula, on GPUs of 80 GiB: nothing has been measured.
    assert sum(roles["learner"].gpu_memory.values()) < 80 * GIB


def test_thirty_two_billion_parameters_are_split_over_nodes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("qwen2.5-32b-24gpu", models, monkeypatch, on=None)
    assert {role: len(gpus) for role, gpus in needed_gpus(plan).items()} == {
        "attacker": 2,
        "rollouts": 4,
        "critic": 2,
        "learner": 16,
    }
    assert sum(plan.roles[3].gpu_memory.values()) < 80 * GIB
    assert plan.transfer.backend == "nccl"
    by_rdma = planned("qwen2.5-32b-24gpu", models, monkeypatch, on=None, nixl=True).transfer
    assert (by_rdma.backend, by_rdma.reason) == (
        "sharded_rdt",
        "16 ranks of ZeRO 3 fill more than one node: each serves the workers beside it",
    )


def test_a_manifest_is_made_of_what_does_not_take_turns(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    for path in RECIPES:
        config = load_run_config([path])
        if config.placement.colocate:
            with pytest.raises(ValueError, match=r"placement\.colocate: got attacker, rollouts, critic, wanted none"):
                run_manifest(config, target=Target())
        else:
            assert "kind: RayJob" in run_manifest(config, target=Target())


def test_only_the_shared_recipe_takes_turns() -> None:
    assert {path.stem: bool(tenants(load_run_config([path]))) for path in RECIPES} == {
        path.stem: "shared" in path.stem for path in RECIPES
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_head_says_how_to_get_its_model_and_how_to_run_it(path: Path) -> None:
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"elenchus run trainers/recipes/{path.name}" in head
    (model,) = {*re.findall(r'models/([\w.-]+)"', path.read_text())}
    assert f"hf download Qwen/{model} --local-dir models/{model}" in head
    assert "has not been made yet" in head
