"""What a run would take: formulas against numbers derived by hand, and what is said where something does not fit."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.machine
import elenchus
import trainers.plan
from actors.engine_config import EngineConfig
from actors.model_directory import num_parameters
from cluster.machine import Gpu, Machine
from serve.terminal import write_plan
from tests.default_loss import LOSS_KEY
from tests.machines import TWO_CORES
from tests.tiny_models import write_gpt2, write_llama
from trainers.base_model import BaseModelConfig, write_base_model
from trainers.memory_estimate import (
    DRIVER_BYTES,
    ENGINE_PROCESS_BYTES,
    GIB,
    GPU_OVERHEAD_BYTES,
    RANK_PROCESS_BYTES,
    RAY_BYTES,
    ModelShape,
    activation_bytes,
    bootstrap_shape,
    checkpoint_bytes,
    directory_shape,
    engine_gpu_memory,
    engine_memory,
    first_weights_bytes,
    kl_probe_bytes,
    kv_bytes_per_token,
    on_host,
    training_memory,
)
from trainers.plan import Plan, changed_keys, plan_run
from trainers.run_config import RunConfig, load_run_config, read_resolved
from trainers.training_config import TrainingConfig

DEMO_PARAMETERS = 341_760


def shape(**values: Any) -> ModelShape:
    defaults = {
        "num_parameters": 1000,
        "hidden_size": 10,
        "intermediate_size": 20,
        "num_layers": 3,
        "kv_width": 5,
        "vocab_size": 7,
        "context": 100,
        "dtype": "float32",
    }
    return ModelShape(**(defaults | values))


def gpu(gib: int = 80) -> Gpu:
    return Gpu(index=0, name="H100", memory_bytes=gib * GIB, free_bytes=gib * GIB, driver="580.65.06")


def config_of(folder: Path, *flags: str) -> RunConfig:
    pairs = [(flag.split("=", 1)[0], flag.split("=", 1)[1]) for flag in flags]
    return load_run_config([], flags=[("runs_dir", str(folder / "runs")), *pairs])


def plan_of(folder: Path, *flags: str, machine: Machine | None = TWO_CORES) -> Plan:
    return plan_run(config_of(folder, *flags), machine=machine)


# ---------------------------------------------------------------------- shapes


def test_the_demos_model_has_the_parameters_that_a_hand_counts(tmp_path: Path) -> None:
    # 9 control tokens, newline and 95 printable characters; a layer is 4 x 128 x 128, 3 x 128 x 256 and two norms.
    by_hand = 105 * 128 + 2 * (4 * 128 * 128 + 3 * 128 * 256 + 2 * 128) + 128
    found = bootstrap_shape(BaseModelConfig())
    assert found.num_parameters == by_hand == DEMO_PARAMETERS
    path = write_base_model(tmp_path / "model", BaseModelConfig(), seed=0)
    assert num_parameters(path) == DEMO_PARAMETERS
    assert directory_shape(path) == found


def test_a_directory_with_grouped_heads_and_one_with_other_names_are_read(tmp_path: Path) -> None:
    llama = directory_shape(write_llama(tmp_path / "llama", hidden_size=64, num_layers=2, max_positions=512))
    # One key-value head of 32; embedding and head apart; q and o 64 x 64, k and v 64 x 32.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    vocabulary = llama.vocab_size
    assert (llama.kv_width, llama.context, llama.num_layers) == (32, 512, 2)
    assert llama.num_parameters == 2 * vocabulary * 64 + 2 * layer + 64
    gpt2 = directory_shape(write_gpt2(tmp_path / "gpt2", hidden_size=64, num_layers=3, max_positions=256))
    assert (gpt2.hidden_size, gpt2.intermediate_size, gpt2.kv_width, gpt2.num_layers) == (64, 256, 64, 3)
    assert gpt2.context == 256


def test_a_config_without_a_size_is_named(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "llama")
    config = json.loads((path / "config.json").read_text())
    del config["num_hidden_layers"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: got no num_hidden_layers, wanted a whole number"):
        directory_shape(path)


# ---------------------------------------------------------------------- memory


def test_the_kv_cache_of_llama_3_8b_takes_128_kib_a_token() -> None:
    llama = shape(num_layers=32, kv_width=8 * 128)
    assert kv_bytes_per_token(llama, dtype="bfloat16") == 128 * 1024
    assert kv_bytes_per_token(llama, dtype="float32") == 256 * 1024


def test_an_engine_on_a_cpu_holds_weights_cache_logits_and_itself() -> None:
    engine = EngineConfig(model="m", dtype="bfloat16", kv_cache_gb=0.25, max_num_seqs=8)
    assert engine_memory(shape(), engine) == {
        "weights": 2000,
        "KV cache": 1 << 28,
        "sampling": 3 * 4 * 8 * 7,
        "process": ENGINE_PROCESS_BYTES,
    }


def test_an_engine_on_a_gpu_fills_its_share_with_cache() -> None:
    engine = EngineConfig(model="m", device="cuda", dtype="auto", gpu_memory_utilization=0.5, tensor_parallel_size=2)
    large = shape(num_parameters=8 * GIB, dtype="bfloat16", num_layers=32, kv_width=1024, context=8192)
    # Half of each of two GPUs; weights 2 bytes each, split in two.
    known = engine_gpu_memory(large, engine, gpu_bytes=80 * GIB)
    assert known == {"weights": 8 * GIB, "KV cache": (40 - 8 - 2) * GIB, "overhead": GPU_OVERHEAD_BYTES}
    # Of an unknown GPU, one sequence: 8192 x 128 KiB over two GPUs.
    assert engine_gpu_memory(large, engine, gpu_bytes=None)["KV cache"] == GIB // 2


@pytest.mark.parametrize(
    ("stage", "billions"),
    # Rajbhandari et al. 2019, figure 1: 7.5B parameters, 64 ranks, mixed precision. Stage 1: 2 + 2 + 12/64 bytes each.
    # Stage 2: 2 + 16/64 (gradients are accumulated in fp32 here); stage 3: 18/64, and 10^9 gathered of 2 bytes.
    [(1, 31.4), (2, 16.875), (3, 2.109375 + 2.0)],
)
def test_model_states_take_what_the_zero_paper_counts(stage: int, billions: float) -> None:
    training = TrainingConfig(num_ranks=64, zero_stage=stage, dtype="bf16", batch_size=64)
    found = training_memory(shape(num_parameters=7_500_000_000), training)
    states = sum(found[part] for part in ("weights", "gathered", "gradients", "optimizer"))
    assert states == pytest.approx(billions * 1e9, rel=1e-3)
    # Two fp32 buckets of 50 million.
    assert found["buckets"] == 400_000_000


def test_without_zero_every_rank_has_16_bytes_a_parameter_and_no_master_copy() -> None:
    found = training_memory(shape(), TrainingConfig(num_ranks=4, batch_size=4))
    assert (found["weights"], found["gradients"], found["optimizer"], found["gathered"]) == (4000, 4000, 8000, 0)
    assert found["buckets"] == 4000
    assert training_memory(shape(), TrainingConfig(num_ranks=1))["buckets"] == 0


def test_muon_keeps_one_moment_of_the_blocks_matrices() -> None:
    demo = bootstrap_shape(BaseModelConfig())
    matrices = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    found = training_memory(demo, TrainingConfig(optimizer="muon"))
    assert found["optimizer"] == 4 * matrices + 8 * (DEMO_PARAMETERS - matrices)


def test_activations_are_those_of_one_micro_batch_and_no_more_than_the_batch_has() -> None:
    # 9 x 10 + 2 x 5 + 4 x 20 = 180 values of 4 bytes in 3 layers, and 3 x 4 x 7 bytes of logits: 2,244 bytes a token.
    assert activation_bytes(shape(), TrainingConfig(micro_batch_tokens=10)) == 10 * 2244
    # Two ranks of one pair each: 2 x 100 tokens at most.
    small = TrainingConfig(num_ranks=2, batch_size=2, micro_batch_tokens=4096)
    assert activation_bytes(shape(), small) == 200 * 2244
    # Computed again: 3 inputs of 10 values, and one block's 180.
    again = TrainingConfig(micro_batch_tokens=10, gradient_checkpointing=True)
    assert activation_bytes(shape(), again) == 10 * (4 * (3 * 10 + 180) + 3 * 4 * 7)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_activations_are_near_what_autograd_saves(again: bool) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainers.logprobs import token_logprobs

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=105,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
        )
    )
    if again:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    token_ids = torch.zeros(2, 256, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_logprobs(model(input_ids=token_ids, use_cache=False).logits, token_ids)
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    small = shape(hidden_size=64, intermediate_size=128, num_layers=2, kv_width=32, vocab_size=105, context=256)
    training = TrainingConfig(num_ranks=1, batch_size=1, micro_batch_tokens=512, gradient_checkpointing=again)
    estimate = activation_bytes(small, training)
    if again:
        # The block that is computed again lives in the backward pass; the last norm, beside so little, counts.
        estimate += 512 * 4 * (3 * 64 - (9 * 64 + 2 * 32 + 4 * 128))
    # Of the three copies of the logits one is saved; the other two live while the loss is computed.
    assert estimate - 2 * 4 * 105 * 512 == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "dtype", "measured_mib"),
    # Greatest private memory of a rank (Pss_Anon of smaps_rollup) over an update and a publication: two ranks on CPUs,
    # 8 blocks of width 512, documents of 256 tokens, one in each micro-batch.
    [(0, "fp32", 1190), (1, "fp32", 1310), (2, "fp32", 1222), (3, "fp32", 1462), (1, "bf16", 1112)],
)
def test_a_rank_takes_about_what_was_measured(stage: int, dtype: str, measured_mib: int) -> None:
    measured = bootstrap_shape(
        BaseModelConfig(hidden_size=512, intermediate_size=2048, num_layers=8, num_heads=8, max_positions=1024)
    )
    training = TrainingConfig.model_validate(
        {"num_ranks": 2, "zero_stage": stage, "dtype": dtype, "batch_size": 4, "micro_batch_tokens": 256}
    )
    copy = measured.num_parameters * (4 if dtype == "fp32" else 2)
    estimate = sum(training_memory(measured, training).values()) + copy + RANK_PROCESS_BYTES
    assert estimate / (1 << 20) == pytest.approx(measured_mib, rel=0.12)


def test_what_is_computed_by_the_first_weights_and_a_kl_budget_are_counted() -> None:
    training = TrainingConfig(num_ranks=2, batch_size=2, dtype="bf16", zero_stage=3)
    assert first_weights_bytes(shape(), training) == 2000
    # Three times 8 responses of 100 tokens over a vocabulary of 7.
    assert kl_probe_bytes(shape(), num_ranks=2, num_sequences=16) == 3 * 8 * 100 * 7 * 4


def test_what_is_offloaded_takes_the_hosts_memory() -> None:
    def hosts(**training: Any) -> frozenset[str]:
        return on_host(TrainingConfig.model_validate(training))

    assert hosts(zero_stage=3) == frozenset()
    assert hosts(zero_stage=1, offload="cpu") == {"optimizer"}
    assert hosts(zero_stage=2, offload="cpu") == {"optimizer", "gradients"}
    assert hosts(zero_stage=3, offload="cpu") == {"optimizer", "gradients", "weights"}


def test_a_checkpoint_holds_weights_moments_and_under_zero_the_masters() -> None:
    # The demo's: 3 x 4 bytes a parameter; 4,128,275 bytes with DeepSpeed's own were measured.
    demo = bootstrap_shape(BaseModelConfig())
    assert checkpoint_bytes(demo, TrainingConfig()) == 12 * DEMO_PARAMETERS == pytest.approx(4_128_275, rel=0.01)
    assert checkpoint_bytes(shape(), TrainingConfig(zero_stage=2, dtype="bf16")) == 14_000


# ---------------------------------------------------------------------- placement


def test_the_demo_fits_on_two_cores(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.problems == ()
    assert [(role.role, role.count, role.unit) for role in plan.roles] == [
        ("attacker", 1, "replica"),
        ("rollouts", 1, "replica"),
        ("critic", 1, "replica"),
        ("learner", 2, "rank"),
    ]
    assert plan.cpus == pytest.approx(3 * 0.2 + 2 * 0.5)
    assert (plan.gpus, plan.num_cpus) == (0.0, 2)
    engine = 4 * DEMO_PARAMETERS + GIB // 2 + 3 * 4 * 256 * 105 + ENGINE_PROCESS_BYTES
    states = (4 + 4 + 8 + 4) * DEMO_PARAMETERS
    tokens = 2 * (9 * 128 + 2 * 128 + 4 * 256) * 4 + 12 * 105
    rank = states + 4096 * tokens + 4 * DEMO_PARAMETERS + RANK_PROCESS_BYTES
    assert plan.memory_bytes == 3 * engine + 2 * rank + GIB + RAY_BYTES + DRIVER_BYTES
    # Measured with Linux's own count of private memory, object store apart: 5,161 MiB.
    assert (plan.memory_bytes - GIB) / (1 << 20) == pytest.approx(5161, rel=0.1)


def test_a_replica_reserves_what_the_session_reserves_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from trainers import session

    asked: dict[str, Any] = {}
    made: Callable[[int], object]

    def start(engine: EngineConfig, **options: Any) -> None:
        asked.update(options)

    def pool(*, start_replica: Callable[[int], object], **_: Any) -> Callable[[int], object]:
        return start_replica

    monkeypatch.setattr(session, "start_engine_replica", start)
    monkeypatch.setattr(session, "Pool", pool)
    engine = EngineConfig(model="m", num_cpus=0.7)
    made = session._pool("critic", engine, num_replicas=1, log_path=tmp_path / "log")
    made(0)
    assert asked["num_cpus"] == 0.7


def test_cores_are_counted_as_ray_counts_them(tmp_path: Path) -> None:
    # 5 x 0.2 + 2 x 0.5 is 2 exactly, which floating point does not see.
    assert plan_of(tmp_path, "critic.replicas=3").problems == ()
    (problem,) = plan_of(tmp_path, "critic.replicas=4").problems
    assert problem == (
        "placement: the roles reserve 2.2 CPUs (1 × 0.2 attacker + 1 × 0.2 rollouts + 4 × 0.2 critic + 2 × 0.5 "
        "learner), wanted at most the 2 that Ray has here: lower replicas, num_ranks or cpus_per_rank, or raise "
        "ray.num_cpus (then processes take turns)"
    )
    assert plan_of(tmp_path, "critic.replicas=4", "ray.num_cpus=3").problems == ()


@pytest.fixture
def on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Give what plans three engines and a learner on GPUs, with a vLLM that is built for them."""
    model = write_llama(tmp_path / "llama")
    monkeypatch.setattr(trainers.plan, "_vllm_device", lambda: "cuda")
    roles = ("attacker", "rollouts", "critic")

    def plan(*flags: str, share: float, gpus: int, gib: int = 80) -> Plan:
        engines = [f"{role}.engine.device=cuda" for role in roles]
        engines += [f"{role}.engine.gpu_memory_utilization={share}" for role in roles]
        engines += [f"{role}.engine.model={model}" for role in roles]
        learner = [f"learner.model={model}", "learner.training.num_ranks=1", "learner.training.gpus_per_rank=0.5"]
        some = Machine(
            system="Linux x86_64",
            num_cpus=16,
            memory_bytes=128 * GIB,
            free_memory_bytes=100 * GIB,
            gpus=(gpu(gib),) * gpus,
            shm_bytes=64 * GIB,
        )
        return plan_of(tmp_path, *engines, *learner, *flags, machine=some)

    return plan


def test_engines_share_a_gpu_as_far_as_their_shares_go(on_gpus: Callable[..., Plan]) -> None:
    fitting = on_gpus(share=0.15, gpus=1)
    assert (fitting.problems, fitting.gpus) == ((), pytest.approx(0.95))
    assert any("by formula alone" in note for note in fitting.notes)
    # 3 x 0.6 + 0.5 is 2.3 in all, and still no two of them fit onto one GPU: four are needed.
    (problem,) = on_gpus(share=0.6, gpus=3).problems
    assert problem.startswith(
        "placement: the roles reserve 2.3 GPUs (1 × 0.6 attacker + 1 × 0.6 rollouts + 1 × 0.6 critic + 1 × 0.5 "
        "learner), wanted what fits onto the 3 that are here: lower"
    )
    assert on_gpus(share=0.6, gpus=4).problems == ()
    assert on_gpus(share=0.5, gpus=2).problems == ()


def test_tensor_parallel_engines_take_whole_gpus(on_gpus: Callable[..., Plan]) -> None:
    flags = ("critic.engine.tensor_parallel_size=2",)
    assert on_gpus(*flags, share=0.25, gpus=4).gpus == 2 + 0.25 + 0.25 + 0.5
    assert on_gpus(*flags, share=0.25, gpus=3).problems == ()
    assert len(on_gpus(*flags, share=0.25, gpus=2).problems) == 1


def test_a_gpu_too_small_for_its_share_is_named(on_gpus: Callable[..., Plan]) -> None:
    long_batches = ("learner.training.micro_batch_tokens=4000000", "learner.training.batch_size=8000")
    found = on_gpus(*long_batches, share=0.1, gpus=1, gib=8).problems
    assert [line.split(":")[0] for line in found] == [
        "attacker.engine",
        "rollouts.engine",
        "critic.engine",
        "learner.training",
    ]
    assert "per GPU for weights, overhead and one sequence, wanted at most 0.1 of 8.0 GiB" in found[0]
    assert "wanted at most 0.5 of a GPU's 8.0 GiB: raise zero_stage" in found[3]


def test_a_device_that_the_installed_vllm_is_not_built_for_is_named(tmp_path: Path) -> None:
    found = plan_of(tmp_path, "critic.engine.device=cuda").problems
    assert found[0].startswith("placement: the roles reserve 0.9 GPUs (1 × 0.9 critic), wanted what fits onto the 0")
    assert found[1] == (
        'critic.engine.device: got "cuda", wanted "cpu", which the vLLM that is installed is built for: change it, or '
        "install the other build"
    )


def test_a_driver_that_does_not_answer_is_told_of_where_gpus_are_missing(tmp_path: Path) -> None:
    mute = replace(TWO_CORES, gpu_error="nvidia-smi gave no answer within 30 s")
    assert plan_of(tmp_path, machine=mute).problems == ()
    found = plan_of(tmp_path, "critic.engine.device=cuda", machine=mute).problems
    assert "the 0 that are here (nvidia-smi gave no answer within 30 s): lower" in found[0]


# ---------------------------------------------------------------------- room


def test_more_memory_than_there_is_is_named_with_its_largest_part(tmp_path: Path) -> None:
    (problem,) = plan_of(tmp_path, "critic.engine.kv_cache_gb=40").problems
    assert problem.startswith("memory: an estimated 45.8 GiB in all, wanted at most the 24.0 GiB that are here; most")
    assert "most is for critic, 40.7 GiB: lower replicas, num_ranks, kv_cache_gb or ray.object_store_gb" in problem
    scarce = plan_of(tmp_path, "critic.engine.kv_cache_gb=16")
    assert scarce.problems == ()
    assert "20.0 GiB of memory are free now, less than the estimate: end other programs before the run" in scarce.notes


def test_a_cache_that_holds_no_whole_sequence_is_named(tmp_path: Path) -> None:
    # 256 tokens x 2 x 2 layers x 128 x 4 bytes are 512 KiB.
    assert plan_of(tmp_path, "critic.engine.kv_cache_gb=0.00048828125").problems == ()
    (problem,) = plan_of(tmp_path, "critic.engine.kv_cache_gb=0.0004").problems
    assert problem == (
        "critic.engine.kv_cache_gb: got 0.0004, wanted room for one sequence of 256 tokens, 512 KiB: raise it, or "
        "lower critic.engine.max_model_len"
    )


def test_an_object_store_that_cannot_hold_two_versions_is_named(tmp_path: Path) -> None:
    # Two versions of 4 x 341,760 bytes are 2.6 MiB.
    assert plan_of(tmp_path, "ray.object_store_gb=0.003").problems == ()
    (problem,) = plan_of(tmp_path, "ray.object_store_gb=0.002").problems
    assert problem == (
        "ray.object_store_gb: got 0.002, wanted room for 2 versions of the learner's weights, 3 MiB: set 1"
    )


def test_a_store_larger_than_shared_memory_is_worth_a_word(tmp_path: Path) -> None:
    assert any("Ray will put it on disk" in note for note in plan_of(tmp_path, "ray.object_store_gb=13").notes)


def test_too_little_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=GIB, used=0, free=1 << 20))
    (problem,) = plan_of(tmp_path).problems
    assert problem.startswith("disk: an estimated ")
    assert f"wanted at most the 1 MiB that are free at {tmp_path / 'runs'}" in problem


def test_a_cluster_is_not_asked(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "ray.address=10.0.0.1:6379", "critic.replicas=100", machine=None)
    assert plan.problems == ()
    assert plan.cluster == "10.0.0.1:6379"
    assert plan.shared_memory == {"driver": DRIVER_BYTES}
    assert any("10.0.0.1:6379" in note for note in plan.notes)


def test_a_model_that_is_none_is_told_of_once_for_all_its_roles(tmp_path: Path) -> None:
    flags = [f"{key}={tmp_path}/nowhere" for key in ("learner.model", "rollouts.engine.model", "critic.engine.model")]
    with pytest.raises(ValueError, match=r"rollouts\.engine\.model: .*nowhere: no directory of this name") as told:
        plan_of(tmp_path, *flags)
    assert len(str(told.value).splitlines()) == 1


# ---------------------------------------------------------------------- work and files


def test_an_iterations_work_is_what_the_config_multiplies_to(tmp_path: Path) -> None:
    work = plan_of(
        tmp_path,
        "loop.queries_per_iteration=10",
        "rollouts.sampling.num_samples=5",
        "rollouts.sampling.max_tokens=7",
        "critic.judging.num_critiques=2",
        "critic.judging.max_tokens=11",
        "loss.kind=dpo",
        "preferences.max_pairs_per_query=3",
        "loop.epochs=2",
        "oversight.budget=0.07",
        "evaluation.sealed_per_cell=2",
    ).work
    assert (work.queries, work.responses, work.response_tokens) == (10, 50, 350)
    assert (work.critiques, work.critique_tokens) == (100, 1100)
    # 0.07 of 50 verdicts are 3.5; each of two pairs a query has two of the five answers; two epochs of two steps of 16.
    assert (work.expert_labels, work.optimizer_steps) == (3, 4)
    assert (work.material, work.rows) == ("pairs", 20)
    # 40 proposals a query and 64 before the attacker gives up; 12 cells.
    assert (work.proposals, work.evaluation["sealed"]) == (464, 24)


@pytest.mark.parametrize(
    ("kind", "most", "tokens", "rows"),
    [
        # All 5 answers of a query may fail and each be the loser of a pair: 10 * 5. Or one is taken for each query.
        ("detect_critique_refine", 9, 350, 50),
        ("detect_critique_refine", 4, 350, 40),
        ("claim_revision", 9, 0, 30),
    ],
)
def test_mended_answers_are_work_too(kind: str, most: int, tokens: int, rows: int, tmp_path: Path) -> None:
    flags = (
        "loop.queries_per_iteration=10",
        "rollouts.sampling.num_samples=5",
        "rollouts.sampling.max_tokens=7",
        "critic.judging.num_critiques=2",
        "critic.judging.max_tokens=11",
        "loss.kind=dpo",
        f"preferences.max_pairs_per_query={most}",
        "loop.epochs=2",
    )
    plain, plan = plan_of(tmp_path, *flags), plan_of(tmp_path, *flags, f"refinement.kind={kind}")
    assert plan.work.mended == {"answers": 50, "tokens": tokens, "critiques": 100, "critique_tokens": 1100}
    assert (plan.work.rows, plan.work.optimizer_steps) == (rows, 2 * math.ceil(rows / 16))
    assert (plain.work.mended, plain.work.rows) == ({}, 20)
    assert plan.disk_bytes > plain.disk_bytes
    for one, is_told in ((plain, False), (plan, True)):
        told = io.StringIO()
        write_plan(told, one)
        assert ("≤ 50 mended" in told.getvalue()) == is_told


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        # Of 5 answers half are accepted, 2: a pair for each of 10 queries.
        ((), 10),
        # All 5: two pairs and one left over, who in a tournament is in a third one.
        (("loss.num_accepted=5",), 20),
        (("loss.num_accepted=5", "loss.pairing=tournament"), 30),
        (("loss.num_accepted=5", "loss.pairing=tournament", "preferences.max_pairs_per_query=1"), 10),
    ],
)
def test_the_pairs_of_rejection_sampling_are_as_many_as_meet(flags: tuple[str, ...], rows: int, tmp_path: Path) -> None:
    given = ("loss.kind=rso", "loop.queries_per_iteration=10", "rollouts.sampling.num_samples=5")
    assert plan_of(tmp_path, *given, *flags).work.rows == rows


@pytest.mark.parametrize("loss", ["exo_group", "pro"])
def test_a_loss_of_groups_is_given_a_row_for_each_query(loss: str, tmp_path: Path) -> None:
    flags = (f"loss.kind={loss}", "loop.queries_per_iteration=40", "rollouts.sampling.num_samples=5", "loop.epochs=2")
    work = plan_of(tmp_path, *flags).work
    # 40 groups are three steps of 16 at most, twice.
    assert (work.material, work.rows, work.optimizer_steps) == ("groups", 40, 6)


@pytest.mark.parametrize(
    ("loss", "material"),
    [
        ("rloo", "samples"),
        ("kto", "judged"),
        ("sft", "accepted"),
        ("weak_to_strong", "accepted"),
        ("forward_correction", "accepted"),
    ],
)
def test_a_loss_of_answers_is_given_all_that_are_sampled_at_most(loss: str, material: str, tmp_path: Path) -> None:
    flags = (f"loss.kind={loss}", "loop.queries_per_iteration=10", "rollouts.sampling.num_samples=5", "loop.epochs=1")
    work = plan_of(tmp_path, *flags).work
    # 50 answers are four steps of 16 at most.
    assert (work.material, work.rows, work.optimizer_steps) == (material, 50, 4)


@pytest.mark.parametrize(("kind", "labels"), [("single", 0), ("majority", 0), ("experts_only", 38), ("shuffled", 38)])
def test_experts_are_asked_by_the_oversight_that_asks_them(kind: str, labels: int, tmp_path: Path) -> None:
    flags = ("loop.queries_per_iteration=96", "rollouts.sampling.num_samples=8")
    assert plan_of(tmp_path, f"oversight.kind={kind}", *flags).work.expert_labels == labels


def test_the_files_are_those_of_a_run_with_their_sizes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "loop.iterations=8", "name=x")
    sizes = {Path(file.path.split(" ")[0]).relative_to(tmp_path).as_posix(): file.size_bytes for file in plan.files}
    assert sizes["runs/x/policies/v000000"] == 9 * 4 * DEMO_PARAMETERS
    assert sizes["runs/x/checkpoints"] == 3 * 12 * DEMO_PARAMETERS
    base = next(file for file in plan.files if ".cache/bootstrap-" in file.path)
    assert base.size_bytes == 4 * DEMO_PARAMETERS
    assert "trained here first" in base.what
    Path(base.path).mkdir(parents=True)
    cached = plan_of(tmp_path, "loop.iterations=8", "name=x")
    assert len(cached.files) == len(plan.files) - 1


def test_what_is_not_at_its_default_is_listed() -> None:
    config = load_run_config([], flags=[("critic.replicas", "6"), (f"loss.{LOSS_KEY}", "0.25"), ("name", "x")])
    assert changed_keys(config) == {"critic.replicas": "6", f"loss.{LOSS_KEY}": "0.25", "name": '"x"'}
    assert changed_keys(RunConfig()) == {}


# ---------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Give what runs `elenchus plan` with flags, on a machine of two cores."""
    monkeypatch.setattr(cluster.machine, "this_machine", lambda: TWO_CORES)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return lambda *words: elenchus.main(["plan", *words, f"runs_dir={tmp_path / 'runs'}"])


def test_a_plan_that_fits_is_zero_and_leaves_nothing_behind(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--name", "x", "critic.replicas=2") == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.splitlines()[0] == "● plan of x; nothing is started and nothing written"
    assert "  critic  replicas = 2" in told.out.splitlines()
    assert "  critic        2 replicas  bootstrap, 0.34 M   0.4     –" in told.out
    assert told.out.splitlines()[-1] == "✓ it fits"
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_does_not_fit_is_two_and_every_reason_is_told(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--critic.replicas", "9", "--critic.engine.kv_cache_gb", "40") == 2
    told = capsys.readouterr()
    assert [line.split(" ", 2)[:2] for line in told.err.splitlines()][-1] == ["✗", "memory:"]
    assert len(told.err.splitlines()) == 2
    assert "it fits" not in told.out


def test_a_plan_as_json_has_the_plan_the_config_and_the_totals(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--json", "--critic.replicas", "9") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert len(found["problems"]) == 1
    assert found["totals"]["cpus"] == pytest.approx(3.2)
    assert found["config"]["critic"]["replicas"] == 9
    assert [role["count"] for role in found["roles"]] == [1, 1, 9, 2]


def test_the_resolved_config_is_written_where_it_is_asked_for(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "resolved.json"
    assert command("--seed", "7", "--out", str(out), "--critic.replicas", "2") == 0
    assert read_resolved(out) == config_of(tmp_path, "seed=7", "critic.replicas=2")
    assert command("--out", str(tmp_path / "no" / "folder.json")) == 2
    assert capsys.readouterr().err.startswith(f"✗ --out: got {tmp_path}/no/folder.json (No such file or directory)")


def test_a_plan_tells_what_the_config_has_wrong(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--critic.replics", "2") == 2
    assert capsys.readouterr().err == ("✗ command line: critic.replics: unknown key, did you mean critic.replicas?\n")
