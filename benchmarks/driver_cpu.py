"""CPU time of the driver's process per sample, with engines and learner replaced by instant fakes.

Everything in the driver's process is real: the loop, three pools with their routing, Ray's client and its threads, the
roles, the rubric, the journal with its Arrow tables, commits. The replicas are Ray actors in processes of their own
that answer at once with what the tests' fake roles write (whose CPU time is not counted), sixteen samples at a time;
the learner group has done at once what it is asked for. A sample is one answer of the learner: its query, critique,
verdict and pair are counted with it, and so is its share of publishing, evaluating and committing. Each iteration is a
round; the first is warm-up, and the last is left out with the final evaluation.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
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
from benchmarks.figure import Figure
from cluster.config import Config
from cluster.pool import EngineStats, Pool, Replica, ReplicaInfo
from cluster.store import RunStore
from cluster.weights import WeightAnswer, WeightManifest
from tests.fake_pool import spoken
from tests.fake_roles import FakeCritic, FakeLearnerGroup, write_answer_with_skill, write_query
from trainers.driver import Driver, DriverConfig, Roles
from trainers.evaluation import EvaluationConfig, evaluation_sets
from trainers.importance import ImportanceConfig
from trainers.loop_state import STAGES
from trainers.progress import Silent, StopSignal
from trainers.run_config import RunConfig
from trainers.summary import IterationMetrics
from trainers.training_group import StepReport, TrainingPlan, UpdateReport

CHUNK = 16
"""Samples that a replica hands over together; the demo's engines hand over about as many every 20 ms."""
PROBE = ((1, 2, 3, 4), (5, 6))
SKILL = (-0.5,)
"""Of the fake learner: a little under half of the problems that carry are right."""


async def measure(*, quick: bool) -> list[Figure]:
    """Return the figure; Ray runs."""
    config = RunConfig()
    num_queries = 8 if quick else config.loop.queries_per_iteration
    clock = IterationClock()
    with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
        await _run(config, Path(folder) / "run", clock=clock, num_queries=num_queries, num_iterations=4 if quick else 8)
    num_samples = num_queries * config.rollouts.sampling.num_samples
    milliseconds = [1e3 * seconds / num_samples for seconds in clock.cpu_s[1:-1]]
    return [
        Figure.of(
            "driver_cpu",
            "driver CPU per sample, instant engines and learner",
            milliseconds,
            at_most=0.3,
            unit="ms",
            details={"samples_per_iteration": num_samples},
        )
    ]


class IterationClock(Silent):
    """Takes the driver's CPU time at the end of every iteration."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []
        """Of each iteration; iteration 0's evaluation is in the first."""
        self._last = time.process_time()

    def row(self, metrics: IterationMetrics) -> None:
        """Note what the iteration took; all threads of the process count."""
        now = time.process_time()
        self.cpu_s.append(now - self._last)
        self._last = now


async def _run(config: RunConfig, path: Path, *, clock: IterationClock, num_queries: int, num_iterations: int) -> None:
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
            "rollouts": instant_pool("rollouts", answer),
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
                learner_group=InstantLearnerGroup(),  # type: ignore[arg-type]
                pools=pools,
            ),
            store=store,
            domain=domain,
            gold=gold,
            config=DriverConfig(
                loop=config.loop.model_copy(
                    update={"iterations": num_iterations, "queries_per_iteration": num_queries}
                ),
                preferences=config.preferences,
                evaluation=evaluation,
                evaluation_sets=evaluation_sets(domain, evaluation),
                probe_sequences=PROBE,
                experts=ExpertBudget(fraction=config.oversight.budget),
                loss=config.loss.kind,
                loss_config=config.loss,
                batch_size=config.learner.training.batch_size,
                tokens_spanning=lambda token_ids, num_chars: min(num_chars, len(token_ids)),
            ),
            progress=clock,
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


def instant_pool(name: str, speak: Callable[[GenerationRequest], Completion]) -> Pool[GenerationRequest, Completion]:
    """Return a pool of one replica that answers at once."""

    def start(replica_id: int) -> Replica:
        actor = ray.remote(InstantReplica).options(num_cpus=0.05, max_concurrency=1000)
        return Replica(actor=actor.remote(replica_id, speak))

    return Pool(name=name, start_replica=start, num_replicas=1)


class InstantReplica:
    """A replica as `cluster.pool` wants it, without an engine; a Ray actor."""

    def __init__(self, replica_id: int, speak: Callable[[GenerationRequest], Completion]) -> None:
        self._replica_id = replica_id
        self._speak = speak
        self._num_tokens = 0

    async def ready(self) -> ReplicaInfo:
        """Return where the replica lives."""
        node_id = ray.get_runtime_context().get_node_id()
        return ReplicaInfo(replica_id=self._replica_id, node_id=node_id, pid=os.getpid())

    async def generate(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Completion]]:
        """Yield the answers."""
        for start in range(0, len(requests), CHUNK):
            done = [self._speak(request) for request in requests[start : start + CHUNK]]
            self._num_tokens += sum(len(completion.token_ids) for completion in done)
            yield done

    async def apply_weights(self, manifest: WeightManifest, probe_token_ids: Sequence[Sequence[int]]) -> WeightAnswer:
        """Take the version's name."""
        return WeightAnswer(version=manifest.version, logprobs=nothing(probe_token_ids))

    async def stats(self) -> EngineStats:
        """Return the tokens generated."""
        return EngineStats(num_generated_tokens=self._num_tokens, num_prompt_tokens=0, busy_s=0.0, num_running=0)

    async def check(self) -> None:
        """Answer the canary."""


class InstantLearnerGroup(FakeLearnerGroup):
    """A learner group that has done everything it is asked for."""

    async def update(
        self,
        table: pa.Table,
        *,
        loss: str,
        loss_config: Config,
        plan: TrainingPlan,
        importance: ImportanceConfig | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> UpdateReport:
        """Return an empty report."""
        return UpdateReport(slots=(), steps=(), wall_s=0.0, reference_s=0.0)

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
        """Return zeros."""
        return nothing(sequences)


def nothing(sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """Return n - 1 zeros for each sequence of n tokens."""
    return tuple((0.0,) * (len(sequence) - 1) for sequence in sequences)
