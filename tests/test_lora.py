"""LoRA without ranks and engines: settings and their refusals, names, shapes, files, merging, the plan."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import elenchus
from actors.adapter import AdapterConfig, adapter_shapes, engine_rank, write_adapter, zero_adapter
from actors.engine import check_manifest, published_shapes, vllm_arguments
from actors.engine_config import EngineConfig, with_adapter
from actors.generation import Completion, GenerationRequest, OfBase
from actors.model_directory import expected_shapes
from actors.records import Message
from cluster.config import ConfigError
from cluster.weight_transfer import Ends, choose_transfer
from tests.tiny_models import write_gpt2, write_llama
from trainers.base_model import BaseModelConfig, write_base_model
from trainers.memory_estimate import bootstrap_shape, checkpoint_bytes, num_trained, training_memory
from trainers.ranks.lora import (
    LoraConfig,
    adapter_parameters,
    add_adapter,
    base_checksum,
    merged_parameters,
    without_adapter,
)
from trainers.ranks.value_head import NAME as VALUE_HEAD
from trainers.ranks.value_head import add_value_head
from trainers.run_config import RunConfig, load_run_config, sharing
from trainers.training_config import TrainingConfig

IDS = torch.tensor([[7, 8, 9, 10, 31, 45]])
SMALL = LoraConfig(rank=2, alpha=6.0, targets=("q_proj", "down_proj"))


def model_with(path: Path, config: LoraConfig, *, seed: int = 0) -> Any:
    """Return a tiny Llama with an adapter that changes it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_llama(path, tied=True), dtype=torch.float32)
    add_adapter(model, config, seed=seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def configured(tmp_path: Path, text: str) -> RunConfig:
    (tmp_path / "run.toml").write_text(text)
    return load_run_config([tmp_path / "run.toml"])


def refused(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        configured(tmp_path, text)
    return [line.split(": ", 1)[1] if ".toml" in line.split(": ", 1)[0] else line for line in error.value.problems]


# -------------------------------------------------------------------------------------------------------- settings


def test_a_run_without_the_section_trains_all_weights_and_one_with_it_an_adapter(tmp_path: Path) -> None:
    assert configured(tmp_path, "").learner.training.lora is None
    lora = configured(tmp_path, "[learner.training.lora]\nrank = 4\ndropout = 0.1\n").learner.training.lora
    assert lora == LoraConfig(rank=4, alpha=16.0, dropout=0.1)
    assert lora is not None
    assert lora.adapter == AdapterConfig(rank=4, alpha=16.0)


def test_what_an_adapter_can_not_be_is_refused_in_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path, '[learner.training.lora]\ntargets = ["q_proj", "c_attn"]\n') == [
        "learner.training.lora.targets: got c_attn, wanted layers of the base model's blocks: q_proj, k_proj, v_proj, "
        "o_proj, gate_proj, up_proj, down_proj"
    ]
    assert refused(tmp_path, '[learner.training.lora]\n[rollouts.engine]\nload_format = "dummy"\n') == [
        'rollouts.engine.load_format: got "dummy" with learner.training.lora, wanted "auto": the base, which an update '
        "does not bring, is read from the directory"
    ]
    with pytest.raises(ValidationError, match='got "muon" with lora, wanted "adamw": it is for whole matrices'):
        TrainingConfig(optimizer="muon", lora=LoraConfig())
    with pytest.raises(ValidationError, match=r'got \["q_proj", "q_proj"\], wanted names of layers, each once'):
        LoraConfig(targets=("q_proj", "q_proj"))
    with pytest.raises(ValidationError, match="less than or equal to 512"):
        LoraConfig(rank=513)


def test_an_adapter_goes_by_the_object_store_wherever_the_ends_are() -> None:
    ends = Ends(num_ranks=2, gpus_per_rank=1, zero_stage=2, tensor_parallel=1, gpus_per_replica=(1.0,), adapter=True)
    found = choose_transfer(ends, backends=frozenset({"nccl", "ipc"}))
    assert found.backend == "object_store"
    assert found.reason == "the learner publishes an adapter, which a replica takes as files"


def test_an_engine_makes_room_for_the_least_rank_of_vllm_that_is_enough() -> None:
    arguments = vllm_arguments(
        with_adapter(EngineConfig(model="m"), AdapterConfig(rank=9, targets=("q_proj",))), seed=0
    )
    wanted = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16, "lora_target_modules": ["q_proj"]}
    assert wanted.items() <= arguments.items()
    shared = with_adapter(EngineConfig(model="m"), AdapterConfig(), base_too=True)
    assert vllm_arguments(shared, seed=0)["max_loras"] == 2
    assert "enable_lora" not in vllm_arguments(EngineConfig(model="m"), seed=0)
    assert [engine_rank(rank) for rank in (1, 2, 8, 65, 512)] == [1, 8, 8, 128, 512]


# ---------------------------------------------------------------------------------------------------- what it is


def test_an_adapters_tensors_are_named_and_shaped_as_peft_has_them(tmp_path: Path) -> None:
    model = model_with(tmp_path / "m", SMALL)
    wanted = adapter_shapes(expected_shapes(str(tmp_path / "m")), SMALL)
    # 2 blocks x 2 layers x A and B; q is 64 to 64, down 128 to 64.
    assert {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model)} == wanted
    assert len(wanted) == 8
    assert wanted["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (2, 128)
    assert wanted["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"] == (64, 2)
    assert published_shapes(with_adapter(EngineConfig(model=str(tmp_path / "m")), SMALL.adapter)) == wanted


def test_the_adapter_alone_is_trained_and_begins_by_changing_nothing(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write_llama(tmp_path / "m", tied=True)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)  # what else is drawn must not matter
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        add_adapter(model, SMALL, seed=seed)
        models.append(model)
    assert torch.equal(logits(models[0]), logits(base))
    drawn = [dict(adapter_parameters(model)) for model in models]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert any(not torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])
    trained = {id(parameter) for parameter in models[0].parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in drawn[0].values()}


def test_merged_weights_answer_as_base_and_adapter_do_and_the_value_head_is_no_part_of_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = model_with(tmp_path / "m", SMALL)
    add_value_head(model)
    merged = dict(merged_parameters(model, whole=lambda _: nullcontext(), leave_out=VALUE_HEAD))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert merged.keys() == dict(plain.named_parameters()).keys()
    before = logits(plain)
    plain.load_state_dict(merged, strict=False)
    assert float((logits(plain) - before).abs().max()) > 0.1
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)


def test_without_its_adapter_a_model_is_its_base_to_the_bit(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = model_with(tmp_path / "m", SMALL)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    changed = logits(model)
    with without_adapter(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), changed)


def test_the_files_are_those_that_peft_reads(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = model_with(tmp_path / "m", SMALL)
    named = [(name, parameter.detach()) for name, parameter in adapter_parameters(model)]
    write_adapter(tmp_path / "a", named, SMALL.adapter, base_model=str(tmp_path / "m"))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 2
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / "a").eval()), logits(model), atol=1e-6)


def test_a_zero_adapter_has_all_tensors_and_nothing_in_them() -> None:
    named = dict(zero_adapter({"a": (2, 3), "b": (3, 2)}))
    assert {name: tuple(tensor.shape) for name, tensor in named.items()} == {"a": (2, 3), "b": (3, 2)}
    assert not any(bool(tensor.any()) for tensor in named.values())


def test_a_base_is_known_by_every_value_of_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write_llama(tmp_path / "m", tied=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    found = base_checksum(model)
    assert found == base_checksum(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16))
    with torch.no_grad():
        model.model.norm.weight[5] += 0.25
    assert base_checksum(model) != found


def test_layers_that_a_model_has_not_or_that_are_no_linear_ones_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_gpt2(tmp_path / "g"))
    with pytest.raises(ValueError, match=r"got q_proj, wanted layers of the model's blocks: c_attn, c_fc, c_proj$"):
        add_adapter(model, LoraConfig(targets=("q_proj", "c_attn")), seed=0)
    with pytest.raises(ValueError, match="got a GPT2LMHeadModel, whose layers are Conv1D, wanted a model of Linear"):
        add_adapter(model, LoraConfig(targets=("c_attn",)), seed=0)


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """Return what `elenchus run` ends with before anything starts."""
    capsys.readouterr()  # what writing a model said
    assert elenchus.main(["run", *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return [line.removeprefix("✗ command line: ") for line in said.err.splitlines()]


SCORED = ("loss.kind=grpo", "reward.kind=model")


def test_targets_that_the_base_model_has_not_are_refused_of_the_reward_model_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = 'reward.training.lora.targets=["query_key_value", "q_proj"]'
    assert told(capsys, f"runs_dir={tmp_path}/runs", *SCORED, lora) == [
        "reward.training.lora.targets: got query_key_value, wanted layers of the base model's blocks: q_proj, k_proj, "
        "v_proj, o_proj, gate_proj, up_proj, down_proj"
    ]
    # Without a reward model nobody reads them.
    configured(tmp_path, '[reward.training.lora]\ntargets = ["query_key_value"]\n')


def test_targets_that_a_model_directory_has_not_are_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_a_model = [f"runs_dir={tmp_path}/runs", *SCORED]
    llama = write_llama(tmp_path / "llama")
    flags = [*of_a_model, f"learner.model={llama}", f"rollouts.engine.model={llama}"]
    targets = 'targets=["c_attn", "q_proj"]'
    assert told(capsys, *flags, f"learner.training.lora.{targets}", f"reward.training.lora.{targets}") == [
        f"{section}.training.lora.targets: got c_attn, wanted layers of the model's blocks: down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj"
        for section in ("learner", "reward")
    ]
    gpt2 = write_gpt2(tmp_path / "gpt2")
    flags = [*of_a_model, f"learner.model={gpt2}", f"rollouts.engine.model={gpt2}"]
    targets = ['learner.training.lora.targets=["q_proj"]', 'reward.training.lora.targets=["c_attn"]']
    assert told(capsys, *flags, *targets) == [
        "learner.training.lora.targets: got q_proj, wanted layers of the model's blocks: c_attn, c_fc, c_proj",
        "reward.training.lora: got a GPT2LMHeadModel, whose layers are Conv1D, wanted a model of Linear layers; train "
        "all of its weights: leave reward.training.lora out",
    ]


def test_a_full_update_is_refused_where_an_adapter_is_wanted(tmp_path: Path) -> None:
    from cluster.weights import TensorSpec, WeightManifest

    shapes = expected_shapes(str(write_llama(tmp_path / "m")))
    specs = tuple(
        TensorSpec(name=name, dtype="float32", shape=shape, bucket=0, part=i, size_bytes=0)
        for i, (name, shape) in enumerate(shapes.items())
    )
    manifest = WeightManifest(version="v1", tensors=specs, buckets=())
    with pytest.raises(ValueError, match=r"got 21 tensors for 8 parameters: 8 missing .* an adapter, that alone"):
        check_manifest(manifest, expected=adapter_shapes(shapes, SMALL))


# -------------------------------------------------------------------------------------------------------- the plan


def test_a_plan_counts_what_an_adapter_takes(tmp_path: Path) -> None:
    # The demo's model: 2 blocks of 128 by 256. Rank 8: 4 x (128 + 128) + 3 x (128 + 256) = 2,176 ends per block.
    shape = bootstrap_shape(BaseModelConfig())
    full, lora = TrainingConfig(zero_stage=1), TrainingConfig(zero_stage=1, lora=LoraConfig(rank=8))
    assert num_trained(shape, full) == shape.num_parameters
    assert num_trained(shape, lora) == 2 * 8 * 2_176 == 34_816
    parameters = expected_shapes(str(write_base_model(tmp_path / "base", BaseModelConfig(), seed=0)))
    published = sum(math.prod(shape) for shape in adapter_shapes(parameters, LoraConfig(rank=8)).values())
    assert (published, sum(map(math.prod, parameters.values()))) == (34_816, 341_760)
    assert checkpoint_bytes(shape, lora) == 16 * 2 * 8 * 2_176
    taken, whole = training_memory(shape, lora), training_memory(shape, full)
    assert taken["weights"] == 4 * (shape.num_parameters + 2 * 8 * 2_176)
    assert taken["optimizer"] * shape.num_parameters == whole["optimizer"] * num_trained(shape, lora)


# --------------------------------------------------------------------------------------------- one base, many roles

SHARED = """
[learner.training.lora]
rank = 4
[attacker]
shares = "rollouts"
[critic]
shares = "rollouts"
"""


def test_roles_that_share_the_rollout_pool_have_no_engines_of_their_own_in_the_plan(tmp_path: Path) -> None:
    from trainers.plan import plan_run

    config = configured(tmp_path, SHARED)
    assert sharing(config) == ("attacker", "critic")
    rollouts, learner = plan_run(config, machine=None).roles
    assert (rollouts.role, learner.role) == ("rollouts", "learner")
    assert rollouts.notes[-1] == "attacker and critic ask its base"
    assert ", an adapter of rank 4: 17,408 parameters, 5.1%" in learner.notes[0]
    alone = configured(tmp_path, "")
    assert sharing(alone) == ()
    assert [role.role for role in plan_run(alone, machine=None).roles] == ["attacker", "rollouts", "critic", "learner"]


def test_roles_share_engines_only_where_they_are_the_same_engines(tmp_path: Path) -> None:
    assert refused(tmp_path, '[critic]\nshares = "rollouts"\n') == [
        'critic.shares: got "rollouts" without learner.training.lora or learner.training.panacea, wanted one of them: '
        "with all weights trained the rollout pool's engines are the learner's alone"
    ]
    assert refused(
        tmp_path, SHARED.replace("[critic]", "[critic]\nreplicas = 3") + "[attacker.engine]\nthreads = 2\n"
    ) == [
        'critic.replicas: got 3 with critic.shares = "rollouts", wanted none: it has no engines of its own; set '
        "rollouts.replicas",
        'attacker.engine.threads: got 2 with attacker.shares = "rollouts", wanted rollouts.engine.threads = 1: they '
        "are the same engines",
    ]


def test_engines_that_a_role_has_not_are_not_scaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "pools.json").write_text('{"rollouts": {"ready": 1, "wanted": 1}}')
    (tmp_path / "runs" / "a" / "resolved.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert elenchus.main(["scale", "critic", "4", "--run", "a"]) == 2
    assert (
        "elenchus scale: got critic, which has no engines of its own in a, wanted one of rollouts"
        in capsys.readouterr().err
    )


def test_what_a_role_asks_of_a_shared_pool_it_asks_of_the_base() -> None:
    asked: list[GenerationRequest] = []

    class Pool:
        async def route(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Completion]]:
            asked.extend(requests)
            yield []

    async def ask() -> None:
        request = GenerationRequest(request_id="r", messages=(Message(role="user", content="?"),), max_tokens=3)
        async for _ in OfBase(Pool()).route([request]):
            pass

    asyncio.run(ask())
    assert [(request.request_id, request.max_tokens, request.of_base) for request in asked] == [("r", 3, True)]
