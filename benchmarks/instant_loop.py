"""Owns the loop that the driver's benchmarks run: everything of the driver's process real, engines and learner fakes.

The replicas are Ray actors in processes of their own that answer at once, or after a sleep, with what the tests' fake
roles write; the learner group has done at once, or after a sleep, what it is asked for.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import ray

from actors.attacker import Attacker
from actors.attacks import load_attack
from actors.critic import Critic
from actors.domains import GoldLedger, Purpose, load_domain
from actors.expert_desk import ExpertDesk
from actors.experts import ExpertBudget, ExpertQueue, SimulatedExpert
from actors.generation import Completion, GenerationRequest
from actors.oversight import make_oversight
from actors.rollout import Rollout
from actors.rubrics import StepMarks
from cluster.config import Config
from cluster.pool import Pool
from cluster.replica import EngineStats, Replica, ReplicaInfo
from cluster.store import RunStore
from cluster.weights import WeightAnswer, WeightManifest
from tests.fake_pool import spoken
from tests.fake_roles import FakeCritic, FakeLearnerGroup, write_answer_with_skill, write_query
from trainers.driver import Driver, DriverConfig, Roles
from trainers.evaluation import EvaluationConfig, evaluation_sets
from trainers.feedback.batch_builder import BatchConfig
from trainers.importance import ImportanceConfig
from trainers.kl import KlBudget
from trainers.loop_state import STAGES
from trainers.progress import Progress, StopSignal
from trainers.run_config import RunConfig
from trainers.training_config import ReferenceWeights
from trainers.training_group import StepReport, TrainingPlan, UpdateReport

CHUNK = 16
"""Samples that a replica hands over together; the demo's engines hand over some dozens every 50 ms."""
PROBE = ((1, 2, 3, 4), (5, 6))
SKILL = (-0.5,)
"""Of the fake learner: a little under half of the problems that carry are right."""


async def run_loop(
    config: RunConfig,
    path: Path,
    *,
    progress: Progress,
    num_queries: int,
    num_iterations: int,
    max_policy_age: int = 0,
    rollout_s: float = 0.0,
    update_s: float = 0.0,
) -> None:
    """Run a loop of fakes to its end; Ray runs.

    Args:
        progress: told of every committed iteration.
        num_queries: per iteration.
        num_iterations: after iteration 0.
        max_policy_age: as in the config's `loop`.
        rollout_s: how long each call of the rollout pool's replica sleeps before it answers.
        update_s: how long the learner group sleeps in every update.
    """
    ids = {stage: column for stage, (_, column) in STAGES.items()}
    domain, checker = load_domain(config.domain.kind, config.domain)
    gold = GoldLedger(checker, regime="critic_expert")
    evaluation = EvaluationConfig(sealed_per_cell=1, out_of_distribution_per_cell=1, attack_set=8)
    async with AsyncExitStack() as stack:
        store = stack.enter_context(RunStore.create(path, config={"name": "bench"}, id_columns=ids))
        queue = ExpertQueue(path / "labels" / "queue.sqlite3")
        stack.callback(queue.close)
        pools = {
            "attacker": instant_pool("attacker", propose),
            "rollouts": instant_pool("rollouts", answer, sleep_s=rollout_s),
            "critic": instant_pool("critic", criticise),
        }
        for pool in pools.values():
            stack.push_async_callback(pool.shutdown)
            await pool.start()
        seed, run = config.seed, "bench"
        driver = Driver(
            run=run,
            seed=seed,
            roles=Roles(
                attacker=Attacker(
                    pools["attacker"],
                    attack=load_attack(config.attack.kind, config.attack, domain=domain),
                    attack_name=config.attack.kind,
                    domain=domain,
                    config=config.attacker.sampling,
                    run=run,
                    seed=seed,
                ),
                rollout=Rollout(pools["rollouts"], config=config.rollouts.sampling, run=run, seed=seed),
                critic=Critic(
                    pools["critic"], rubric=StepMarks(domain), config=config.critic.judging, run=run, seed=seed
                ),
                oversight=make_oversight(config.oversight, domain=domain, seed=seed),
                experts=ExpertDesk(queue, SimulatedExpert(gold.checker_for(Purpose.EXPERT), config=config.experts)),
                learner_group=InstantLearnerGroup(sleep_s=update_s),  # type: ignore[arg-type]
                pools=pools,
            ),
            store=store,
            domain=domain,
            gold=gold,
            config=DriverConfig(
                loop=config.loop.model_copy(
                    update={
                        "iterations": num_iterations,
                        "queries_per_iteration": num_queries,
                        "max_policy_age": max_policy_age,
                    }
                ),
                batch=BatchConfig(
                    loss=config.loss.kind,
                    loss_config=config.loss,
                    preferences=config.preferences,
                    tokens_spanning=lambda token_ids, num_chars: min(num_chars, len(token_ids)),
                ),
                evaluation=evaluation,
                evaluation_sets=evaluation_sets(domain, evaluation),
                probe_sequences=PROBE,
                experts=ExpertBudget(fraction=config.oversight.budget),
                batch_size=config.learner.training.batch_size,
            ),
            progress=progress,
            stop=StopSignal(),
        )
        await driver.run()


# ------------------------------------------------------------------------------------------------------- the fakes


def propose(request: GenerationRequest) -> Completion:
    """Return what the fake attacker writes."""
    return spoken(write_query(request, num_problems=100_000), request_id=request.request_id)


def answer(request: GenerationRequest) -> Completion:
    """Return what the fake learner writes."""
    return spoken(write_answer_with_skill(request, SKILL), request_id=request.request_id)


def criticise(request: GenerationRequest) -> Completion:
    """Return what the fake critic writes, with the log-probs of its labels."""
    critic = FakeCritic()
    text = critic.write(request)
    return spoken(
        text,
        request_id=request.request_id,
        labels=request.labels,
        good_logprobs=critic.good_logprobs(request, text),
    )


def instant_pool(
    name: str,
    speak: Callable[[GenerationRequest], Completion],
    *,
    sleep_s: float = 0.0,
    num_replicas: int = 1,
    max_batch: int | None = None,
) -> Pool[GenerationRequest, Completion]:
    """Return a pool of replicas that answer at once, or after a sleep where they are to sample.

    Args:
        sleep_s: of each call.
        max_batch: requests of one call, which a replica then sleeps over one after the other, as an engine whose batch
            is full; the next one waits there, as with an engine too. None: all calls sleep side by side.
    """

    def start(replica_id: int) -> Replica:
        actor = ray.remote(InstantReplica).options(num_cpus=0.01, max_concurrency=1000)
        return Replica(actor=actor.remote(replica_id, speak, sleep_s, num_batches=1 if max_batch else 1000))

    if max_batch is None:
        return Pool(name=name, start_replica=start, num_replicas=num_replicas)
    return Pool(
        name=name,
        start_replica=start,
        num_replicas=num_replicas,
        max_samples_per_call=max_batch,
        max_samples_per_replica=2 * max_batch,
    )


class InstantReplica:
    """A replica as `cluster.replica` wants it, without an engine; a Ray actor."""

    def __init__(
        self,
        replica_id: int,
        speak: Callable[[GenerationRequest], Completion],
        sleep_s: float,
        *,
        num_batches: int = 1000,
    ) -> None:
        self._replica_id = replica_id
        self._sleep_s = sleep_s
        self._batches = asyncio.Semaphore(num_batches)
        self._version = "v0"
        self._speak = speak
        self._num_tokens = 0

    async def ready(self) -> ReplicaInfo:
        """Return where the replica lives."""
        node_id = ray.get_runtime_context().get_node_id()
        return ReplicaInfo(replica_id=self._replica_id, node_id=node_id, pid=os.getpid())

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Completion]]:
        """Yield the answers; greedy ones, which evaluations ask for, take no time."""
        if self._sleep_s and requests[0].temperature > 0:
            async with self._batches:
                await asyncio.sleep(self._sleep_s)
        for start in range(0, len(requests), CHUNK):
            done = [
                replace(self._speak(request), weight_version=self._version, weight_spans=())
                for request in requests[start : start + CHUNK]
            ]
            self._num_tokens += sum(len(completion.token_ids) for completion in done)
            yield done

    async def apply_weights(self, manifest: WeightManifest, probe_token_ids: Sequence[Sequence[int]]) -> WeightAnswer:
        """Take the version's name."""
        self._version = manifest.version
        return WeightAnswer(version=manifest.version, logprobs=nothing(probe_token_ids))

    async def stats(self) -> EngineStats:
        """Return the tokens generated."""
        return EngineStats(num_generated_tokens=self._num_tokens, num_prompt_tokens=0, busy_s=0.0, num_running=0)

    async def check(self) -> None:
        """Answer the canary."""


class InstantLearnerGroup(FakeLearnerGroup):
    """A learner group that has done everything it is asked for, updates after a sleep."""

    def __init__(self, *, sleep_s: float = 0.0) -> None:
        super().__init__()
        self._sleep_s = sleep_s

    async def update(
        self,
        table: pa.Table,
        *,
        loss: str,
        loss_config: Config,
        plan: TrainingPlan,
        importance: ImportanceConfig | None = None,
        reference_weights: ReferenceWeights = "start_of_update",
        kl_budget: KlBudget | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> UpdateReport:
        """Return an empty report."""
        await asyncio.sleep(self._sleep_s)
        return UpdateReport(slots=(), steps=(), wall_s=0.0, reference_s=0.0)

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
        """Return zeros."""
        return nothing(sequences)


def nothing(sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """Return n - 1 zeros for each sequence of n tokens."""
    return tuple((0.0,) * (len(sequence) - 1) for sequence in sequences)
