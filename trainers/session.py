"""Owns one sitting of a run: start Ray, bootstrap, place pools and learner group, hand them to the driver, sum up.

The only place that knows how the parts are put together.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from actors.attacker import Attacker
from actors.attacks import load_attack
from actors.chat import Tokenizer, encode_chat, encode_text, load_tokenizer, num_tokens_spanning
from actors.critic import Critic
from actors.domains import Domain, GoldLedger, Purpose, Role, load_domain
from actors.engine import Completion, EngineConfig, GenerationRequest, start_engine_replica
from actors.engine_config import with_adapter
from actors.expert_desk import ExpertDesk
from actors.experts import ExpertBudget, ExpertQueue, SimulatedExpert
from actors.generation import OfBase
from actors.oversight import Judged, make_oversight
from actors.records import EvaluationAnswer, from_table
from actors.refiner import Refiner
from actors.rollout import Rollout
from actors.rubrics import StepMarks
from cluster.environment import git_commit
from cluster.jobs import JOB_VARIABLE
from cluster.metrics import recording
from cluster.placement import SharedPlaces, release
from cluster.pool import Pool
from cluster.ray_runtime import start_ray
from cluster.room import cluster_room
from cluster.scaling import Follower
from cluster.store import RunStore
from trainers import loop_metrics, statistics
from trainers.bootstrap import BootstrapResult, bootstrap
from trainers.driver import Driver, DriverConfig, Roles, Stopped
from trainers.evaluation import evaluation_sets
from trainers.feedback.batch_builder import BatchConfig
from trainers.feedback.refinement import Refining
from trainers.feedback.reward_model import RewardModel, first_critique, read_response
from trainers.feedback.segments import TokensSpanning
from trainers.feedback.trade_offs import TradeOffs
from trainers.gpu_turns import GpuTurns, share_gpus
from trainers.live import Live
from trainers.loop_state import STAGES, LoopState, WallClock
from trainers.plan import planned_transfer
from trainers.preflight import await_room, model_record
from trainers.progress import Progress, StopSignal
from trainers.ranks.model_source import longest_sequence
from trainers.run_config import BOOTSTRAP, RunConfig, sharing, tenants
from trainers.summary import (
    BeforeAfter,
    CountedBeforeAfter,
    GainSummary,
    Gold,
    IterationMetrics,
    Summary,
    WallSeconds,
    read_metrics,
    summarise_agreement,
    summarise_experts,
    summarise_pairs,
    write_summary,
)
from trainers.trackers import TrackedRun
from trainers.tracking import Trackers, identity_of, told_settings
from trainers.training_group import ModelSource, TrainingGroup

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOP_POLL_S = 0.2
"""How soon a stop is noticed while there is no loop yet to notice it."""
NUM_PROBE_SEQUENCES = 16
"""Sequences of the parity probe, drawn from the domain's probe problems."""


class Companion(Protocol):
    """Something that lives on the run's Ray beside the loop, such as the endpoint. The run does not depend on it."""

    def start(self) -> None:
        """Begin, and return at once."""
        ...

    def stop(self) -> None:
        """End, and return when nothing of it is left."""
        ...


def run(
    config: RunConfig,
    *,
    progress: Progress,
    stop: StopSignal,
    config_toml: str | None = None,
    companion: Companion | None = None,
) -> Summary:
    """Run a config from its beginning to its summary.

    Raises:
        ValueError: the run directory holds another run.
        Stopped: the user asked for a stop; the last commit stands.
    """
    store = RunStore.create(
        config.run_dir,
        config=config.model_dump(mode="json"),
        id_columns={stage: column for stage, (_, column) in STAGES.items()},
        config_toml=config_toml,
        models=model_record(config),
    )
    return _sit(config, store=store, progress=progress, stop=stop, companion=companion)


def resume(config: RunConfig, *, progress: Progress, stop: StopSignal, companion: Companion | None = None) -> Summary:
    """Go on with a run from its last commit and what its journal holds of the open iteration.

    Raises:
        ValueError: there is no such run, or it is active elsewhere.
        Stopped: the user asked for a stop; the last commit stands.
    """
    return _sit(config, store=RunStore.open(config.run_dir), progress=progress, stop=stop, companion=companion)


def _name_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, before transformers imports it: otherwise it says so on stdout."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _sit(
    config: RunConfig, *, store: RunStore, progress: Progress, stop: StopSignal, companion: Companion | None
) -> Summary:
    _name_accelerator()
    with store:
        return asyncio.run(_run(config, store=store, progress=progress, stop=stop, companion=companion))


class Recorded:
    """A watcher that also gives every committed iteration to the trackers and to Ray's metrics."""

    def __init__(self, inner: Progress, trackers: Trackers) -> None:
        self._inner = inner
        self._trackers = trackers

    def stage(self, name: str, *, done: int, total: int | None = None) -> None:
        """Pass on how far a stage is."""
        self._inner.stage(name, done=done, total=total)

    def row(self, metrics: IterationMetrics) -> None:
        """Write an iteration and pass it on."""
        self._trackers.log(metrics)
        loop_metrics.committed(metrics)
        self._inner.row(metrics)

    def note(self, text: str) -> None:
        """Pass on a line."""
        self._inner.note(text)


async def _run(
    config: RunConfig, *, store: RunStore, progress: Progress, stop: StopSignal, companion: Companion | None
) -> Summary:
    wall = WallClock()
    domain, checker = load_domain(config.domain.kind, config.domain)
    gold = GoldLedger(checker, regime=config.supervision.regime)
    async with AsyncExitStack() as stack:
        runtime = start_ray(config.ray)
        stack.callback(runtime.stop)
        stack.enter_context(recording(run=config.name))
        if not runtime.is_local:
            await _unless_stopped(await_room(config, look=cluster_room, note=progress.note), stop=stop)
        progress.note(
            f"cluster   Ray at {runtime.address}"
            + (f" · dashboard {runtime.dashboard_url}" if runtime.dashboard_url else "")
        )
        base = await _unless_stopped(base_model(config, domain=domain, progress=progress), stop=stop)
        wall.bootstrapped(0.0 if base is None else base.seconds)
        tokenizer = load_tokenizer(_model(config.learner.model, base))
        starting = _start_roles(
            config, store=store, domain=domain, gold=gold, base=base, tokenizer=tokenizer, stack=stack
        )
        roles = await _unless_stopped(starting, stop=stop)
        if companion is not None:
            stack.push_async_callback(asyncio.to_thread, companion.stop)
            companion.start()
        commit = store.last_commit()
        before = [] if commit is None else [m for m in read_metrics(store.path) if m.iteration <= commit.iteration]
        tracked = TrackedRun(
            name=config.name,
            identity=identity_of(store.path),
            run_dir=store.path,
            project=config.tracking.project,
            last_iteration=0 if commit is None else commit.iteration,
            settings=told_settings(config.model_dump(mode="json")),
        )
        trackers = stack.enter_context(Trackers(config.tracking, tracked, note=progress.note))
        if before:
            loop_metrics.resumed(before[-1])
        live = Live(
            Recorded(progress, trackers),
            run=config.name,
            run_dir=store.path,
            iterations=config.loop.iterations,
            before=before,
            echo=sys.stdout if JOB_VARIABLE in os.environ else None,
        )
        driver = Driver(
            run=config.name,
            seed=config.seed,
            roles=roles,
            store=store,
            domain=domain,
            gold=gold,
            config=_driver_config(config, domain=domain, tokenizer=tokenizer),
            progress=live,
            stop=stop,
            wall=wall,
        )
        async with _follower(config, store=store, roles=roles).following(), live.looking(roles.pools):
            state = await driver.run()
        summary = summarise(config, store=store, state=state, base=base, gold=gold)
    write_summary(store.path, summary)
    return summary


async def _unless_stopped(work: Coroutine[Any, Any, T], *, stop: StopSignal) -> T:
    """Return what the work comes to; a stop that is asked for meanwhile ends it: it holds nothing that must be kept.

    Raises:
        Stopped: the user asked for a stop.
    """
    task = asyncio.create_task(work)
    try:
        while True:
            await asyncio.wait([task], timeout=STOP_POLL_S)
            if task.done():
                return task.result()
            if stop.requested:
                raise Stopped
    finally:
        task.cancel()
        await asyncio.wait([task])


async def base_model(config: RunConfig, *, domain: Domain, progress: Progress) -> BootstrapResult | None:
    """Return the base model of a config's roles, from the cache or trained now; None when no role asks for one."""
    models = (config.learner.model, config.attacker.engine.model, config.critic.engine.model)
    if BOOTSTRAP not in models:
        return None
    result = await bootstrap(
        config.bootstrap,
        base_model=config.base_model,
        domain=domain,
        domain_config=config.domain,
        training=config.learner.training,
        seed=config.seed,
        cache_dir=config.runs_dir / ".cache",
        progress=progress,
    )
    how = f"trained in {result.seconds:.0f} s" if result.seconds else "found in the cache"
    progress.note(f"bootstrap one base model for three roles, from scratch, on {domain.name}: {how}")
    return result


async def _start_roles(
    config: RunConfig,
    *,
    store: RunStore,
    domain: Domain,
    gold: GoldLedger,
    base: BootstrapResult | None,
    tokenizer: Tokenizer,
    stack: AsyncExitStack,
) -> Roles:
    """Start pools and learner group side by side, and give the roles to them."""
    engines = {
        Role.ATTACKER: (config.attacker.engine, config.attacker.replicas),
        Role.LEARNER: (config.rollouts.engine, config.rollouts.replicas),
        Role.CRITIC: (config.critic.engine, config.critic.replicas),
    }
    adapter = config.learner.training.adapter
    pools: dict[str, Pool[GenerationRequest, Completion]] = {}
    shared = await asyncio.to_thread(share_gpus, tenants(config), training=config.learner.training)
    if shared is not None:
        stack.callback(release, shared.group)
    shares = sharing(config)
    for number, (role, (engine, replicas)) in enumerate(engines.items()):
        name = "rollouts" if role is Role.LEARNER else role.value
        if name in shares:
            continue
        engine = engine.model_copy(
            update={
                "model": str(_model(engine.model, base)),
                "base_seed": config.seed * 1_000 + number * 100,
                "sleeps": name in config.placement.colocate,
            }
        )
        if role is Role.LEARNER:
            engine = with_adapter(engine, adapter, base_too=bool(shares))
        pools[name] = _pool(
            name,
            engine,
            num_replicas=replicas,
            log_path=store.path / "engines.log",
            places=None if shared is None else shared.places.get(name),
        )
    source = ModelSource(path=str(_model(config.learner.model, base)))
    running = None if base is None else base.group
    group = running or TrainingGroup(
        name="learner_group",
        source=source,
        config=config.learner.training,
        shared=None if shared is None else shared.group,
    )
    transfer = planned_transfer(config, num_gpus=int(cluster_room().total.get("GPU", 0)))
    logger.info("weights go by %s: %s", transfer.backend, transfer.reason)
    if transfer.backend != "object_store":
        pools["rollouts"].deliver = partial(group.deliver, backend=transfer.backend)
    turns = GpuTurns(pools=[pools[name] for name in config.placement.colocate], learner=group)
    for pool in pools.values():
        stack.push_async_callback(pool.shutdown)
    stack.push_async_callback(group.shutdown)
    reward_group = _reward_group(config, source=source)
    if reward_group is not None:
        stack.push_async_callback(reward_group.shutdown)
    async with asyncio.TaskGroup() as tasks:
        if reward_group is not None:
            tasks.create_task(reward_group.start())
        if running is not None:
            tasks.create_task(group.reopen(config=config.learner.training, source=source))
        elif shared is None:
            tasks.create_task(group.start())
        for pool in pools.values():
            tasks.create_task(pool.start())
    if shared is not None:
        await turns.begin(group.start)
    queue = ExpertQueue(store.path / "labels" / "queue.sqlite3")
    stack.callback(queue.close)
    expert = SimulatedExpert(gold.checker_for(Purpose.EXPERT), config=config.experts)
    critic = Critic(
        pools["critic"] if "critic" in pools else OfBase(pools["rollouts"]),
        rubric=StepMarks(domain),
        config=config.critic.judging,
        run=config.name,
        seed=config.seed,
    )
    return Roles(
        attacker=Attacker(
            pools["attacker"] if "attacker" in pools else OfBase(pools["rollouts"]),
            attack=load_attack(config.attack.kind, config.attack, domain=domain),
            attack_name=config.attack.kind,
            domain=domain,
            config=config.attacker.sampling,
            run=config.name,
            seed=config.seed,
        ),
        rollout=Rollout(pools["rollouts"], config=config.rollouts.sampling, run=config.name, seed=config.seed),
        critic=critic,
        oversight=make_oversight(config.oversight, domain=domain, seed=config.seed),
        experts=ExpertDesk(queue, expert),
        learner_group=group,
        pools=pools,
        turns=turns,
        refining=_refining(config, pools["rollouts"], critic=critic, tokenizer=tokenizer),
        reward_model=(
            None
            if reward_group is None
            else _reward_model(config, reward_group, model=Path(source.path), tokenizer=tokenizer)
        ),
    )


def _reward_group(config: RunConfig, *, source: ModelSource) -> TrainingGroup | None:
    """Return the ranks of the reward model, which begins with the learner's first weights; None where there is none."""
    if config.reward.kind != "model":
        return None
    return TrainingGroup(name="reward_group", source=source, config=config.reward.training)


def _refining(
    config: RunConfig, pool: Pool[GenerationRequest, Completion], *, critic: Critic, tokenizer: Tokenizer
) -> Refining | None:
    """Return how failed answers are mended; None where none is."""
    if config.refinement is None:
        return None
    refiner = Refiner(
        pool,
        config=config.refinement,
        max_tokens=config.rollouts.sampling.max_tokens,
        encode=partial(encode_text, tokenizer),
        run=config.name,
        seed=config.seed,
    )
    return Refining(
        refiner=refiner,
        critic=critic,
        preferences=config.preferences,
        min_agreement=config.selection.min_agreement,
        max_age=config.loop.max_policy_age,
        tokens_spanning=_spanning(tokenizer),
        run=config.name,
        seed=config.seed,
    )


def _spanning(tokenizer: Tokenizer) -> TokensSpanning:
    return lambda ids, num_chars: num_tokens_spanning(tokenizer, ids, num_chars=num_chars)


def _reward_model(config: RunConfig, group: TrainingGroup, *, model: Path, tokenizer: Tokenizer) -> RewardModel:
    def critique(item: Judged) -> tuple[int, ...] | None:
        text = first_critique(item, run=config.name)
        return None if text is None else encode_text(tokenizer, text)

    read = partial(
        read_response, critique=critique if config.reward.critiques else None, longest=longest_sequence(model)
    )
    return RewardModel(group, config=config.reward, read=read, run=config.name, seed=config.seed)


def _follower(config: RunConfig, *, store: RunStore, roles: Roles) -> Follower:
    attacker, rollouts, critic = config.attacker, config.rollouts, config.critic
    return Follower(
        store.path,
        roles.pools,
        configured={"attacker": attacker.replicas, "rollouts": rollouts.replicas, "critic": critic.replicas},
        autoscale={"attacker": attacker.autoscale, "rollouts": rollouts.autoscale, "critic": critic.autoscale},
    )


def _pool(
    name: str, engine: EngineConfig, *, num_replicas: int, log_path: Path, places: SharedPlaces | None = None
) -> Pool[GenerationRequest, Completion]:
    return Pool(
        name=name,
        start_replica=lambda replica_id: start_engine_replica(
            engine,
            replica_id=replica_id,
            name=name,
            num_cpus=engine.num_cpus,
            log_path=str(log_path),
            places=places,
        ),
        num_replicas=num_replicas,
    )


def _model(model: str, base: BootstrapResult | None) -> Path:
    if model != BOOTSTRAP:
        return Path(model)
    assert base is not None, "a run that names the bootstrap has bootstrapped"
    return base.model_dir


def _driver_config(config: RunConfig, *, domain: Domain, tokenizer: Tokenizer) -> DriverConfig:
    sets = evaluation_sets(domain, config.evaluation)
    probe = [query for query, _ in sets["probe"]]
    stride = max(1, len(probe) // NUM_PROBE_SEQUENCES)
    return DriverConfig(
        loop=config.loop,
        batch=_batch_config(config, tokenizer),
        evaluation=config.evaluation,
        evaluation_sets=sets,
        experts=ExpertBudget(fraction=config.oversight.budget),
        batch_size=config.learner.training.batch_size,
        # At another temperature the engine's log-probs are of another distribution than the learner's.
        importance=config.loop.importance if config.rollouts.sampling.temperature == 1.0 else None,
        reference_weights=config.reference_weights,
        probe_sequences=tuple(
            encode_chat(tokenizer, domain.learner_messages(query)) for query in probe[::stride][:NUM_PROBE_SEQUENCES]
        ),
    )


def _batch_config(config: RunConfig, tokenizer: Tokenizer) -> BatchConfig:
    whole = config.reward.kind == "model"  # it scores whole responses, so its pairs are whole
    trade_offs = TradeOffs()
    if config.learner.training.panacea is not None and config.objectives is not None:
        trade_offs = TradeOffs(fixed=config.objectives.weights, seed=config.seed)
    return BatchConfig(
        loss=config.loss.kind,
        loss_config=config.loss_as_sampled,
        preferences=config.preferences.model_copy(update={"cut_at_flaw": False}) if whole else config.preferences,
        selection=config.selection,
        objectives=config.objectives,
        trade_offs=trade_offs,
        tokens_spanning=_spanning(tokenizer),
    )


def summarise(
    config: RunConfig,
    *,
    store: RunStore,
    state: LoopState,
    base: BootstrapResult | None,
    gold: GoldLedger,
) -> Summary:
    """Return a finished run in figures, from its journal and its metrics."""
    last = state.iteration
    rows = read_metrics(store.path)
    before, after = _answers(store, 0), _answers(store, last)
    both = [
        (b.correct, a.correct)
        for b, a in zip(before["sealed"], after["sealed"], strict=True)
        if b.well_formed and a.well_formed
    ]
    pools = [name for name in ("attacker", "rollouts", "critic") if any(name in row.tokens_per_s for row in rows)]
    weights = {name: [row.tokens_per_s.get(name, 0.0) for row in rows] for name in pools}
    shown = {} if base is None else base.gold
    drawn = sum(row.feedback.num_drawn for row in rows if row.feedback is not None)
    return Summary(
        run=config.name,
        sealed_accuracy=GainSummary.of(
            statistics.paired_gain([b.correct for b in before["sealed"]], [a.correct for a in after["sealed"]])
        ),
        sealed_accuracy_well_formed=(
            GainSummary.of(statistics.paired_gain([b for b, _ in both], [a for _, a in both])) if both else None
        ),
        well_formed=BeforeAfter(before=_share(before["sealed"], "form"), after=_share(after["sealed"], "form")),
        ood_accuracy=CountedBeforeAfter(
            before=_share(before["out_of_distribution"], "correct"),
            after=_share(after["out_of_distribution"], "correct"),
            n=len(after["out_of_distribution"]),
        ),
        attack_success=CountedBeforeAfter(
            before=1.0 - _share(before["attack_set"], "correct"),
            after=1.0 - _share(after["attack_set"], "correct"),
            n=len(after["attack_set"]),
        ),
        live_attack_success={row.iteration: row.live_attack_success for row in rows},
        critic_agreement=summarise_agreement(rows),
        experts=summarise_experts(rows),
        gold=Gold(
            learner_bootstrap=shown.get(Role.LEARNER, 0),
            critic_bootstrap=shown.get(Role.CRITIC, 0),
            expert=gold.counts[Purpose.EXPERT] - drawn,
            calibration=drawn,
            canaries=0,
        ),
        regime=config.supervision.regime,
        policy_version=state.policy_version,
        parity_max_abs_diff=state.parity_max_abs_diff,
        pairs=summarise_pairs(rows),
        wall_s=WallSeconds(**state.wall_s, total=sum(state.wall_s.values())),
        tokens_per_s={name: sum(values) / len(values) for name, values in weights.items() if values},
        seed=config.seed,
        commit=git_commit(Path(__file__).resolve().parent)[0] or "unknown",
    )


def _answers(store: RunStore, iteration: int) -> dict[str, list[EvaluationAnswer]]:
    sets: dict[str, list[EvaluationAnswer]] = {}
    for answer in from_table(store.read("evaluations", iteration=iteration), EvaluationAnswer):
        sets.setdefault(answer.set_name, []).append(answer)
    return {name: sorted(answers, key=lambda answer: answer.item) for name, answers in sets.items()}


def _share(answers: Sequence[EvaluationAnswer], what: str) -> float:
    return sum(answer.correct if what == "correct" else answer.well_formed for answer in answers) / len(answers)
