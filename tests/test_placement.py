"""Where roles stand and which way weights go: on GPUs that are not here, so tested at what a config asks for.

What vLLM and DeepSpeed are asked for is held against their own signatures: where those change, a test here breaks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import shutil
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import ValidationError

from actors.engine import EngineActor, EngineAsleep, EngineBroken, sender_info, shared_environment, vllm_arguments
from actors.engine_config import EngineConfig, gpus_reserved, replica_bundles, split_problem
from actors.generation import GenerationRequest
from actors.receiving import Receiving, ReplicaClient
from actors.records import Message
from cluster.config import ConfigError
from cluster.node_labels import label_selector, selects
from cluster.placement import PlacementTimeout, SharedPlaces, Slot, inside, nodes_of, place_gang, place_replica, release
from cluster.pool import Pool
from cluster.replica import Replica
from cluster.weight_transfer import (
    Ends,
    WeightSyncConfig,
    checked_transfer,
    choose_transfer,
    obstacle,
    usable_backends,
)
from cluster.weights import ParityProbe, WeightManifest
from tests import fake_roles
from tests.fake_replica import Behaviour, FakeReplica, FakeRequest, FakeResult, echo
from tests.test_engine_requests import FakeEngine, manifest_of
from tests.tiny_models import write_llama
from trainers.gpu_turns import GpuTurns, PlacementConfig, Tenant, colocation_problems, shared_bundles, shared_slots
from trainers.run_config import RunConfig, load_run_config
from trainers.training_config import TrainingConfig
from trainers.training_group import ModelSource, TrainingGroup

ALL = frozenset({"nccl", "ipc", "sharded_rdt"})


def engine(**values: Any) -> EngineConfig:
    return EngineConfig.model_validate({"model": "m", "device": "cuda", **values})


def user(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


# ---------------------------------------------------------------------------------------------------- what is reserved


def test_a_replica_reserves_its_share_or_a_whole_gpu_for_each_worker() -> None:
    assert replica_bundles(EngineConfig(model="m"), num_cpus=0.2) == [{"CPU": 0.2}]
    assert replica_bundles(engine(gpu_memory_utilization=0.3), num_cpus=1) == [{"CPU": 1, "GPU": 0.3}]
    assert replica_bundles(engine(num_gpus=1), num_cpus=1) == [{"CPU": 1, "GPU": 1.0}]
    # vLLM's own workers have the GPUs; the actor beside them has none.
    assert replica_bundles(engine(tensor_parallel_size=2), num_cpus=1) == [{"CPU": 1}, {"GPU": 1.0}, {"GPU": 1.0}]
    assert gpus_reserved(engine(tensor_parallel_size=2)) == 0.0


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"device": "cpu", "tensor_parallel_size": 2}, 'tensor_parallel_size: got 2 with device = "cpu", wanted 1'),
        ({"device": "cpu", "num_gpus": 0.5}, 'num_gpus: got 0.5 with device = "cpu", wanted none'),
        ({"device": "cpu", "sleeps": True}, 'sleeps: got true with device = "cpu", wanted false'),
        ({"tensor_parallel_size": 2, "num_gpus": 1}, "num_gpus: got 1 with tensor_parallel_size = 2, wanted none"),
        ({"num_gpus": 0.5}, "num_gpus: got 0.5, wanted at least gpu_memory_utilization = 0.9"),
        ({"node_labels": ["critic"]}, 'got "critic", wanted "label=value"'),
        ({"node_labels": ["a=1", "a=2"]}, "got a twice, wanted each label once"),
    ],
)
def test_what_can_not_be_placed_is_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as refused:
        engine(**values)
    assert line in str(refused.value)


def test_labels_select_nodes_as_ray_s_operators_do() -> None:
    assert label_selector(("ray.io/node-group=critic", "zone=in(a,b)")) == {
        "ray.io/node-group": "critic",
        "zone": "in(a,b)",
    }
    for wanted, chosen in (("a", "a"), ("in(a,b)", "ab"), ("!a", "bc-"), ("!in(a,b)", "c-")):
        values = {letter: None if letter == "-" else letter for letter in "abc-"}
        assert "".join(name for name, value in values.items() if selects(wanted, value)) == chosen


def test_heads_are_split_evenly_or_not_at_all() -> None:
    # Qwen2.5-7B: 28 query heads, 4 key-value heads.
    assert [split_problem(n, num_heads=28, num_kv_heads=4) is None for n in (1, 2, 3, 4, 7, 8, 14)] == [
        True,
        True,
        False,
        True,
        False,  # 28 / 7 is whole, but 7 workers can't share 4 key-value heads
        False,
        False,
    ]
    assert split_problem(8, num_heads=32, num_kv_heads=4) is None  # two workers keep a copy of the same head


def tiny_gpu_config(tmp_path: Path, *flags: str) -> RunConfig:
    model = str(write_llama(tmp_path / "llama"))
    pairs = [("learner.model", model), ("learner.training.gpus_per_rank", "1"), ("learner.training.zero_stage", "2")]
    for role in ("attacker", "rollouts", "critic"):
        pairs += [(f"{role}.engine.model", model), (f"{role}.engine.device", "cuda")]
    given = [(flag.split("=", 1)[0], flag.split("=", 1)[1]) for flag in flags]
    return load_run_config([], flags=[("runs_dir", str(tmp_path / "runs")), *pairs, *given])


def test_a_model_that_can_not_be_split_is_told_before_an_engine_starts(tmp_path: Path) -> None:
    from trainers.plan import plan_run

    config = tiny_gpu_config(tmp_path, "critic.engine.tensor_parallel_size=4")
    with pytest.raises(
        ValueError, match=r"critic\.engine\.tensor_parallel_size: got 4, wanted a divisor of the model's"
    ):
        plan_run(config, machine=None)


def test_float16_beside_a_bf16_learner_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'rollouts\.engine\.dtype: got "float16" beside learner\.training\.dtype'):
        tiny_gpu_config(tmp_path, "rollouts.engine.dtype=float16", "learner.training.dtype=bf16")


# ----------------------------------------------------------------------------------------------------- on a real Ray


@ray.remote(num_cpus=0)
class Sitter:
    """An actor that sits somewhere."""

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


@pytest.mark.usefixtures("ray_session")
def test_a_replica_is_on_one_node_whether_kept_apart_or_not_and_a_label_that_nobody_has_is_named() -> None:
    groups = [
        place_replica([{"CPU": 0.1}, {"CPU": 0.1}], pool="twins", apart=apart, timeout_s=20) for apart in (False, True)
    ]
    (node,) = {node for group in groups for node in nodes_of(group)}
    sitter = Sitter.options(scheduling_strategy=inside(groups[1], bundle=1)).remote()
    assert ray.get(sitter.node.remote(), timeout=60) == node
    for group in groups:
        release(group)
    with pytest.raises(PlacementTimeout, match=r"on 0 node\(s\) with pool=x; label a node by `ray start --labels`"):
        place_replica([{"CPU": 0.1}], pool="nowhere", labels={"pool": "x"}, timeout_s=0.5)
    with pytest.raises(PlacementTimeout, match="no node can hold it: the most that one has is 2 CPU, 0 GPU"):
        place_replica([{"CPU": 0.1}, {"GPU": 1}, {"GPU": 1}], pool="large", timeout_s=0.5)


@pytest.mark.usefixtures("ray_session")
def test_a_shared_place_is_taken_while_its_actor_lives() -> None:
    group = place_gang([{"CPU": 0.1}] * 3, timeout_s=20)
    places = SharedPlaces(group, pool="rollouts", slots=[(0, 1), (2,)])

    def sit() -> tuple[Slot, Any]:
        with places.next(timeout_s=10) as slot:
            strategy = inside(group, bundle=slot.bundles[0])
            return slot, Sitter.options(name=slot.name, scheduling_strategy=strategy).remote()

    (first, actor), (second, _) = sit(), sit()
    assert (first.bundles, second.bundles) == ((0, 1), (2,))
    with pytest.raises(PlacementTimeout, match="all 2 places on shared GPUs are taken"), places.next(timeout_s=0.3):
        pass
    ray.kill(actor)
    again, _ = sit()
    assert again == first
    release(group)


# ------------------------------------------------------------------------------------------------------ which way


def ends(**values: Any) -> Ends:
    """Four ranks and replicas on GPUs of their own."""
    base = Ends(num_ranks=4, gpus_per_rank=1.0, zero_stage=2, tensor_parallel=1, gpus_per_replica=(0.9,))
    return replace(base, **values)


@pytest.mark.parametrize(
    ("found", "backend", "reason"),
    [
        (ends(), "nccl", "GPUs of their own"),
        (ends(tensor_parallel=2, gpus_per_replica=(1.0, 1.0), gpus_per_rank=0.5), "nccl", "GPUs of their own"),
        (ends(in_turn=True), "ipc", "the ranks' own GPUs"),
        (ends(num_ranks=1, gpus_per_rank=0.5, gpus_per_replica=(0.15,), num_gpus=1), "ipc", "the ranks' own GPUs"),
        # Shares on one of several GPUs: nobody knows beforehand whose neighbour a replica is.
        (ends(gpus_per_rank=0.5, gpus_per_replica=(0.15,), num_gpus=4), "object_store", "Ray alone decides"),
        (ends(gpus_per_rank=0.5, gpus_per_replica=(0.6,), num_gpus=4), "nccl", "GPUs of their own"),
        (ends(gpus_per_rank=0.0), "object_store", "the ranks compute on CPUs"),
        (ends(gpus_per_replica=()), "object_store", "the replicas compute on CPUs"),
        (ends(num_ranks=16, zero_stage=3), "sharded_rdt", "16 ranks of ZeRO 3 fill more than one node"),
        (ends(num_ranks=16, zero_stage=2), "nccl", "GPUs of their own"),
        (ends(num_ranks=8, zero_stage=3), "nccl", "GPUs of their own"),
    ],
)
def test_weights_go_the_way_that_placement_gives(found: Ends, backend: str, reason: str) -> None:
    transfer = choose_transfer(found, backends=ALL)
    assert transfer.backend == backend
    assert reason in transfer.reason


def test_what_is_not_installed_is_not_chosen() -> None:
    assert choose_transfer(ends(num_ranks=16, zero_stage=3), backends=frozenset({"nccl", "ipc"})).backend == "nccl"
    nothing = choose_transfer(ends(), backends=frozenset())
    assert (nothing.backend, nothing.reason) == ("object_store", "the vLLM here has no other")


def test_a_way_that_is_asked_for_is_taken_or_refused_with_the_reason() -> None:
    assert checked_transfer(WeightSyncConfig(backend="object_store"), ends(), backends=ALL).backend == "object_store"
    assert checked_transfer(WeightSyncConfig(backend="sharded_rdt"), ends(), backends=ALL).backend == "sharded_rdt"
    with pytest.raises(
        ValueError, match='got "ipc", but the replicas are on other GPUs than the ranks; wanted "auto", w'
    ):
        checked_transfer(WeightSyncConfig(backend="ipc"), ends(), backends=ALL)
    with pytest.raises(ValueError, match='got "nccl", but the replicas are on the ranks\' own GPUs'):
        checked_transfer(WeightSyncConfig(backend="nccl"), ends(in_turn=True), backends=ALL)
    with pytest.raises(ValueError, match="it needs the package nixl beside vLLM"):
        checked_transfer(WeightSyncConfig(backend="sharded_rdt"), ends(), backends=frozenset({"nccl"}))
    assert obstacle("nccl", ends()) is None


# ----------------------------------------------------------------------------------------- against vLLM's signatures


@pytest.fixture(scope="module")
def transfers() -> Any:
    """Give vLLM's registries of weight transfer."""
    return pytest.importorskip("vllm.distributed.weight_transfer.factory")


def test_the_ways_that_are_found_by_file_are_those_that_vllm_registers(transfers: Any) -> None:
    names = {"nccl", "ipc", "sharded_rdt"}
    assert names <= set(transfers.WeightTransferEngineFactory._registry)
    assert names <= set(transfers.WeightTransferTrainerFactory._registry)
    # NIXL is not installed here.
    assert usable_backends() | {"sharded_rdt"} == names


@pytest.mark.parametrize(
    ("backend", "wanted"),
    [
        ("nccl", {"master_address": "10.0.0.1", "master_port": 29500, "world_size": 3, "packed": True, "rank": 0}),
        ("ipc", {"packed": True, "rank": 0}),
    ],
)
def test_a_sending_rank_is_described_as_vllm_wants_it(transfers: Any, backend: Any, wanted: dict[str, Any]) -> None:
    info = sender_info(backend, rank=0, num_workers=2, rendezvous=("10.0.0.1", 29500))
    assert info.backend == backend
    assert info.is_sender
    assert dataclasses.asdict(info).items() >= wanted.items()
    assert not sender_info(backend, rank=1, num_workers=2, rendezvous=("10.0.0.1", 29500)).is_sender
    engine_cls = transfers.WeightTransferTrainerFactory._registry[backend]()
    assert engine_cls.init_info_cls is type(info)
    assert set(inspect.signature(engine_cls.trainer_init).parameters) == {"init_info", "client", "source"}
    assert set(inspect.signature(engine_cls.send_weights).parameters) == {"self"}


@pytest.mark.usefixtures("ray_session")
def test_the_ranks_of_zero_3_are_described_as_vllm_wants_them(transfers: Any) -> None:
    info = sender_info("sharded_rdt", rank=3, num_workers=4, rendezvous=("", 0))
    assert (info.backend, info.num_consumers, info.workers_per_replica, info.rank) == ("sharded_rdt", 4, 4, 3)
    assert info.trainer_actor_namespace == ray.get_runtime_context().namespace


def test_a_client_speaks_vllm_s_protocol(transfers: Any) -> None:
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    assert isinstance(ReplicaClient(None, backend="nccl", deadline_s=1.0), VLLMWeightSyncClient)
    for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        theirs = inspect.signature(getattr(VLLMWeightSyncClient, name)).parameters
        ours = inspect.signature(getattr(ReplicaClient, name)).parameters
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_an_engine_is_asked_for_with_arguments_that_vllm_has(transfers: Any) -> None:
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    known = {entry.name for entry in dataclasses.fields(EngineArgs)}
    asked = vllm_arguments(engine(tensor_parallel_size=4, dtype="bfloat16", sleeps=True), seed=7)
    assert asked.keys() <= known
    assert {
        "tensor_parallel_size": 4,
        "distributed_executor_backend": "ray",
        "dtype": "bfloat16",
        "enable_sleep_mode": True,
        "worker_extension_cls": "actors.engine.WorkerExtension",
        "kv_cache_memory_bytes": None,
        "trust_remote_code": False,
    }.items() <= asked.items()
    alone = vllm_arguments(EngineConfig(model="m", kv_cache_gb=0.5), seed=7)
    assert (alone["distributed_executor_backend"], alone["kv_cache_memory_bytes"]) == ("uni", 1 << 29)
    assert not alone["enable_sleep_mode"]
    assert "level" in inspect.signature(LLMEngine.sleep).parameters
    assert all(
        p.default is not p.empty for n, p in inspect.signature(LLMEngine.wake_up).parameters.items() if n != "self"
    )
    assert shared_environment(Slot(name="s", bundles=(2, 3))).keys() <= envs.environment_variables.keys()


def test_a_worker_has_the_methods_that_an_update_calls(transfers: Any) -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.v1.worker.cpu_worker import CPUWorker

    for name, parameters in {
        "init_weight_transfer_engine": ["self", "init_info"],
        "start_weight_update": ["self"],
        "update_weights": ["self", "update_info"],
        "finish_weight_update": ["self"],
    }.items():
        assert list(inspect.signature(getattr(CPUWorker, name)).parameters) == parameters
    for name in ("parse_init_info", "init_transfer_engine", "start_weight_update", "update_weights", "shutdown"):
        assert callable(getattr(WeightTransferEngine, name))


def test_deepspeed_puts_aside_by_these_names() -> None:
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert {"include", "pin_memory"} <= set(inspect.signature(DeepSpeedZeroOptimizer.offload_states).parameters)
    assert {"optim_states", "hp_params", "lp_grads"} <= {state.value for state in OffloadStateTypeEnum}


# ------------------------------------------------------------------------------------------------- turns on a GPU


class Noted:
    """A pool or a group that notes what it is told, and fails when it is told to."""

    def __init__(self, name: str, notes: list[str], *, fails: str = "") -> None:
        self.name = name
        self._notes = notes
        self._fails = fails

    async def sleep(self) -> None:
        self._note("sleep")

    async def wake(self) -> None:
        self._note("wake")

    async def offload(self) -> None:
        self._note("offload")

    async def reload(self) -> None:
        self._note("reload")

    def _note(self, what: str) -> None:
        self._notes.append(f"{self.name} {what}")
        if what == self._fails:
            raise RuntimeError(f"{self.name} can't {what}")


def taken(notes: list[str], *, fails: dict[str, str] | None = None, work: str = "trained") -> None:
    """Have the learner take one turn; `work` is what it does, or raises."""
    fails = fails or {}
    pools = [Noted(name, notes, fails=fails.get(name, "")) for name in ("rollouts", "critic")]
    turns = GpuTurns(pools=pools, learner=Noted("learner", notes, fails=fails.get("learner", "")))

    async def story() -> None:
        async with turns.learner():
            notes.append(work)
            if work == "failed":
                raise ValueError("the loss is not finite")

    asyncio.run(story())


def test_the_learner_trains_while_the_engines_sleep() -> None:
    notes: list[str] = []
    taken(notes)
    assert notes == [
        "rollouts sleep",
        "critic sleep",
        "learner reload",
        "trained",
        "learner offload",
        "rollouts wake",
        "critic wake",
    ]


@pytest.mark.parametrize(
    ("work", "fails", "error", "last"),
    [
        ("failed", {}, "the loss is not finite", ["failed", "learner offload", "rollouts wake", "critic wake"]),
        ("trained", {"critic": "sleep"}, "critic can't sleep", ["critic sleep", "rollouts wake", "critic wake"]),
        (
            "trained",
            {"learner": "reload"},
            "learner can't reload",
            ["learner reload", "learner offload", "rollouts wake", "critic wake"],
        ),
        (
            "trained",
            {"learner": "offload"},
            "learner can't offload",
            ["learner offload", "rollouts wake", "critic wake"],
        ),
    ],
)
def test_whatever_fails_leaves_the_engines_awake(work: str, fails: dict[str, str], error: str, last: list[str]) -> None:
    notes: list[str] = []
    with pytest.raises((ValueError, RuntimeError), match=error):
        taken(notes, fails=fails, work=work)
    assert notes[-len(last) :] == last


def test_one_turn_at_a_time_and_none_without_pools_that_share() -> None:
    notes: list[str] = []
    turns = GpuTurns(pools=[Noted("p", notes)], learner=Noted("l", notes))

    async def train(name: str) -> None:
        async with turns.learner():
            notes.append(f"{name} begins")
            await asyncio.sleep(0.01)
            notes.append(f"{name} ends")

    async def start() -> None:
        notes.append("start")

    async def story() -> None:
        await turns.begin(start)
        await asyncio.gather(train("a"), train("b"))
        async with GpuTurns().learner():
            notes.append("free")
        await GpuTurns().begin(start)

    asyncio.run(story())
    turn = ["p sleep", "l reload", "{0} begins", "{0} ends", "l offload", "p wake"]
    wanted = ["p sleep", "start", "l offload", "p wake"]
    wanted += [step.format(name) for name in "ab" for step in turn] + ["free", "start"]
    assert notes == wanted


class Gate:
    """Whose turn it is, seen from outside: engines answer while it is open, the learner works while it is shut."""

    def __init__(self) -> None:
        self.awake = asyncio.Event()
        self.awake.set()
        self.num_running = 0
        self.num_turns = 0
        self.name = "every pool"

    async def sleep(self) -> None:
        self.awake.clear()
        while self.num_running:
            await asyncio.sleep(0)
        self.num_turns += 1

    async def wake(self) -> None:
        self.awake.set()


@pytest.mark.parametrize("max_policy_age", [0, 1])
def test_the_loop_gives_the_learner_its_turns_and_comes_to_the_same_weights(
    max_policy_age: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = fake_roles.write_blank_run(tmp_path / "blank" / fake_roles.RUN)
    settings = fake_roles.Settings(max_policy_age=max_policy_age)

    def run(name: str, turns: GpuTurns | None) -> fake_roles.FakeRun:
        shutil.copytree(blank, tmp_path / name / fake_roles.RUN)
        made = fake_roles.fake_run(tmp_path / name / fake_roles.RUN, settings)
        if turns is not None:
            made.driver._roles = replace(made.driver._roles, turns=turns)
        made.finish()
        return made

    plain = run("plain", None)
    gate = Gate()
    plain_route = fake_roles.FakeRolePool.route

    async def route(pool: Any, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Any]]:
        await gate.awake.wait()
        gate.num_running += 1
        try:
            async for chunk in plain_route(pool, requests):
                yield chunk
        finally:
            gate.num_running -= 1

    monkeypatch.setattr(fake_roles.FakeRolePool, "route", route)
    for name in ("update", "publish", "logprobs", "save", "export", "load"):
        method = getattr(fake_roles.FakeLearnerGroup, name)

        async def guarded(group: Any, *args: Any, _method: Any = method, **kwargs: Any) -> Any:
            assert not gate.awake.is_set(), "the learner worked while the engines were awake"
            return await _method(group, *args, **kwargs)

        monkeypatch.setattr(fake_roles.FakeLearnerGroup, name, guarded)
    shared = run("shared", GpuTurns(pools=[gate], learner=Noted("learner", [])))
    assert gate.awake.is_set()
    # Begun: published and committed; then each iteration trains, publishes and commits.
    assert gate.num_turns == 2 + 3 * settings.iterations
    assert shared.group.slots
    if max_policy_age == 0:  # beyond it, what is in time to be trained on depends on the clock
        assert shared.group.slots == plain.group.slots
        assert shared.group.weights == plain.group.weights


def tenant(*, replicas: int = 1, parallel: int = 1, most: int = 0, cpus: float = 1.0, device: str = "cuda") -> Tenant:
    settings = {"model": "m", "device": device, "tensor_parallel_size": parallel, "num_cpus": cpus}
    return Tenant(engine=EngineConfig.model_validate(settings), replicas=replicas, most_replicas=max(most, replicas))


def test_pools_stand_side_by_side_on_the_learners_gpus() -> None:
    pools = {"rollouts": tenant(replicas=2, parallel=2, cpus=1.0), "critic": tenant(cpus=0.5)}
    assert shared_slots(pools) == {"rollouts": ((0, 1), (2, 3)), "critic": ((4,),)}
    training = TrainingConfig(num_ranks=6, batch_size=6, gpus_per_rank=1, cpus_per_rank=2, zero_stage=2)
    assert shared_bundles(pools, training=training) == [
        {"GPU": 1.0, "CPU": 3.0},
        {"GPU": 1.0, "CPU": 2.0},
        {"GPU": 1.0, "CPU": 3.0},
        {"GPU": 1.0, "CPU": 2.0},
        {"GPU": 1.0, "CPU": 2.5},
        {"GPU": 1.0, "CPU": 2.0},
    ]


def test_what_can_not_take_turns_is_refused() -> None:
    def problems(pool: Tenant, **training: Any) -> list[str]:
        placement = PlacementConfig(colocate=("rollouts",))
        settings = {"num_ranks": 2, "batch_size": 2, "gpus_per_rank": 1, "zero_stage": 2} | training
        config = TrainingConfig.model_validate(settings)
        return list(colocation_problems(placement, tenants={"rollouts": pool}, training=config))

    assert problems(tenant(replicas=2)) == []
    assert problems(tenant(device="cpu"))[0].startswith('rollouts.engine.device: got "cpu"')
    assert problems(tenant(most=3))[0].startswith("rollouts.autoscale.max: got 3")
    assert problems(tenant(), gpus_per_rank=0.5)[0].startswith("learner.training.gpus_per_rank: got 0.5")
    assert problems(tenant(), zero_stage=3)[0].startswith("learner.training.zero_stage: got 3")
    assert problems(tenant(), offload="cpu")[0].startswith('learner.training.offload: got "cpu"')
    (line,) = problems(tenant(replicas=2, parallel=2))
    assert line.startswith("placement.colocate: the pools want 4 GPUs (2 × 2 rollouts), wanted at most the learner's 2")


# ------------------------------------------------------------------------------------------------ a pool that sleeps


class SleepyReplica(FakeReplica):
    """A fake that can sleep, and answers nothing while it does."""

    def __init__(self, replica_id: int, *, stubborn: bool) -> None:
        super().__init__(replica_id, Behaviour(delay_s=0.1), echo)
        self.slept: list[str] = []
        self._stubborn = stubborn

    async def sleep(self, level: int = 1) -> None:
        if self._stubborn:
            raise RuntimeError("can't sleep")
        assert self.num_running == 0, "put to sleep with work on its hands"
        self.slept.append("sleep")

    async def wake(self) -> None:
        self.slept.append("wake")

    async def history(self) -> list[str]:
        return self.slept


def sleepy(replica_id: int) -> Replica:
    """Start a replica; number 1 can't sleep."""
    actor = ray.remote(SleepyReplica).options(num_cpus=0.01, max_concurrency=1000)
    return Replica(actor=actor.remote(replica_id, stubborn=replica_id == 1))


@pytest.mark.usefixtures("ray_session")
def test_a_pool_answers_what_is_on_its_way_sleeps_and_goes_on_awake() -> None:
    async def story() -> None:
        pool: Pool[FakeRequest, FakeResult] = Pool(name="sleepy", start_replica=sleepy, num_replicas=2)
        await pool.start()
        try:
            first = asyncio.create_task(answers(pool, "a"))
            await asyncio.sleep(0.05)
            await pool.sleep()
            # The one that could not sleep is gone, and nobody comes in its place while the others sleep.
            assert pool.readiness().ready == 1
            waiting = asyncio.create_task(answers(pool, "b"))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            assert (pool.readiness().ready, pool.readiness().starting) == (1, 0)
            await pool.wake()
            assert len(await first) == len(await waiting) == 8
            while pool.readiness().ready < 2:
                await asyncio.sleep(0.05)
            told = await pool.fanout(lambda actor: actor.history.remote(), timeout_s=20)
            assert sorted(map(len, told.values())) == [0, 2]  # type: ignore[arg-type]
        finally:
            await pool.shutdown()

    asyncio.run(asyncio.wait_for(story(), 120))


async def answers(pool: Pool[FakeRequest, FakeResult], name: str) -> list[FakeResult]:
    requests = [FakeRequest(request_id=f"{name}{i}", prompt="x") for i in range(8)]
    return [result async for chunk in pool.route(requests) for result in chunk]


# ------------------------------------------------------------------------- an engine that sleeps, and that is sent to


class SentTo(FakeEngine):
    """A hand-written engine that notes what it is told of sleep and of weights from the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def connect(self, backend: str, rendezvous: Any) -> None:
        self.told.append(("connect", backend, dict(rendezvous)))

    def start_update(self) -> None:
        self.told.append("start")

    def receive(self, part: Any) -> None:
        if part == "bad":
            raise RuntimeError("the wire broke")
        self.told.append(("receive", part))

    def finish_update(self) -> None:
        self.told.append("finish")

    def adopt(self, version: str) -> None:
        self.version = version
        self.told.append(("adopt", version))

    def step(self) -> Any:
        self.told.append("step")
        return super().step()

    def sleep(self, level: int) -> None:
        self.told.append(("sleep", level))

    def wake(self) -> None:
        self.told.append("wake")


@pytest.fixture
def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[EngineActor, SentTo]:
    monkeypatch.setattr("actors.engine.expected_shapes", lambda model: {"a": (2, 3)})
    fake = SentTo()
    config = EngineConfig(model=str(write_llama(tmp_path / "m")))
    return EngineActor(config, replica_id=5, make_engine=lambda config, seed: fake, on_fatal=[].append), fake


def test_an_engine_sleeps_only_when_idle_and_refuses_all_until_it_wakes(actor: tuple[EngineActor, SentTo]) -> None:
    replica, fake = actor

    async def story() -> None:
        fake.may_step.clear()
        asked = asyncio.create_task(first_chunk(replica))
        while not fake.left:
            await asyncio.sleep(0.01)
        fallen = asyncio.create_task(replica.sleep())
        await asyncio.sleep(0.05)
        fake.may_step.set()
        # Between two steps a sample is still there.
        with pytest.raises(ValueError, match="got 1 samples running, wanted none before it sleeps"):
            await fallen
        await asked
        await replica.sleep()
        with pytest.raises(EngineAsleep, match="wanted wake"):
            await first_chunk(replica)
        with pytest.raises(EngineAsleep):
            await replica.check()
        await replica.wake()
        await replica.wake()
        assert len(await first_chunk(replica)) == 1
        assert [entry for entry in fake.told if entry != "step"] == [("sleep", 1), "wake"]

    asyncio.run(asyncio.wait_for(story(), 30))


async def first_chunk(replica: EngineActor) -> list[Any]:
    request = GenerationRequest(request_id="r", messages=user("a"), max_tokens=3)
    return [done async for chunk in replica.generate([request]) for done in chunk]


def test_weights_from_the_ranks_come_in_parts_and_nothing_is_stepped_between_them(
    actor: tuple[EngineActor, SentTo],
) -> None:
    replica, fake = actor
    manifest = manifest_of({"a": (2, 3)}, version="v3")

    async def story() -> None:
        opened = await replica.open_weights(manifest)
        assert (opened.replica_id, opened.num_workers) == (5, 1)
        asked = asyncio.create_task(first_chunk(replica))
        await replica.connect_weights("nccl", {"port": 1})
        await replica.start_weights()
        await replica.receive_weights("p0")
        await asyncio.sleep(0.05)
        await replica.receive_weights("p1")
        await replica.finish_weights()
        answer = await replica.prove_weights("v3", [[1, 2, 3]])
        assert (answer.version, answer.logprobs) == ("v3", ((-0.25, -0.25),))
        (done,) = await asked
        assert done.weight_version == "v3"
        wanted = [("connect", "nccl", {"port": 1}), "start", ("receive", "p0"), ("receive", "p1"), "finish"]
        assert fake.told[:6] == [*wanted, ("adopt", "v3")]

    asyncio.run(asyncio.wait_for(story(), 30))


def test_a_part_that_fails_leaves_the_replica_broken_and_a_wrong_manifest_leaves_it_as_it_was(
    actor: tuple[EngineActor, SentTo],
) -> None:
    replica, fake = actor

    async def story() -> None:
        with pytest.raises(ValueError, match=r"1 missing \(a\)"):
            await replica.open_weights(manifest_of({"b": (1,)}, version="v3"))
        with pytest.raises(RuntimeError, match="wanted open_weights first"):
            await replica.start_weights()
        assert len(await first_chunk(replica)) == 1
        await replica.open_weights(manifest_of({"a": (2, 3)}, version="v3"))
        with pytest.raises(RuntimeError, match="the wire broke"):
            await replica.receive_weights("bad")
        with pytest.raises(RuntimeError):
            await replica.finish_weights()
        with pytest.raises(EngineBroken, match="receiving failed half-way"):
            await replica.prove_weights("v3", [[1, 2]])
        with pytest.raises(EngineBroken):
            await first_chunk(replica)
        assert fake.version == "v0"

    asyncio.run(asyncio.wait_for(story(), 30))


def test_an_update_whose_parts_stop_coming_is_given_up() -> None:
    receiving = Receiving(silence_s=0.05)
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            receiving.serve(FakeEngine())  # type: ignore[arg-type]
        except TimeoutError as error:
            failed.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(timeout=10)
    assert "no part of the update came for 0.05 s" in str(failed[0])
    with pytest.raises(RuntimeError, match="an update that is over"):
        receiving.do(lambda engine: None)


# ------------------------------------------------------------------------------------------------ ranks that send


@dataclass
class Far:
    """A remote method of a hand-written actor: notes the call and answers later, as Ray does."""

    name: str
    notes: list[str]
    answer: Any = None

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        self.notes.append(self.name)

        async def answered() -> Any:
            return self.answer

        return asyncio.ensure_future(answered())


@dataclass
class FarReplica:
    """A replica's actor, hand-written."""

    notes: list[str] = field(default_factory=list)
    replica_id: int = 0

    def __getattr__(self, name: str) -> Far:
        from actors.receiving import Opened

        answers = {
            "open_weights": Opened(replica_id=self.replica_id, num_workers=2),
            "prove_weights": "proof",
            "apply_weights": "from the store",
        }
        return Far(name, self.notes, answers.get(name))


def group_of(ranks: Sequence[Any]) -> TrainingGroup:
    """Return a group whose ranks are hand-written."""
    from trainers.ranks.deepspeed_worker import RankInfo

    group = TrainingGroup(config=TrainingConfig(num_ranks=len(ranks)), source=ModelSource(path="m"))
    group._ranks = list(ranks)
    group._infos = [RankInfo(rank=i, node_id="n", host="10.0.0.1", pid=i) for i in range(len(ranks))]
    return group


def test_a_published_version_goes_straight_to_a_replica_and_an_older_one_by_the_store() -> None:
    ranks = [FarRank(notes := []), FarRank([])]
    group = group_of(ranks)
    replica = FarReplica()

    async def story() -> None:
        manifest = await group.publish(version="v4")
        probe = ParityProbe(token_ids=((1, 2),), logprobs=((-1.0,),), bound=1e-4)
        for _ in range(2):
            assert await group.deliver(replica, (manifest, probe), backend="nccl") == "proof"
        assert replica.notes == ["open_weights", "prove_weights"] * 2
        # They meet once; every rank takes part in every sending.
        assert notes == ["publish", "free_port", "send_weights", "send_weights"]
        assert ranks[1].notes == ["publish", "send_weights", "send_weights"]
        older = replace(manifest, version="v3")
        assert await group.deliver(replica, (older, probe), backend="nccl") == "from the store"
        assert notes[-1] == "send_weights"

    asyncio.run(asyncio.wait_for(story(), 10))


class FarRank:
    """A rank's actor, hand-written."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def __getattr__(self, name: str) -> Far:
        manifest = WeightManifest(version="v4", tensors=(), buckets=())
        return Far(name, self.notes, {"publish": manifest, "free_port": 4711}.get(name))
