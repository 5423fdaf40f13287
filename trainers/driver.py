"""Owns the loop: attack, respond, critique, judge, pair, update, publish, evaluate, commit.

    seeds ──► attacker ──queries──► learner ──responses──► critic ──verdicts──► experts (the least trusted)
                 ▲                     ▲                                            │
                 └──── outcomes ───────┼── weights vN ── learner group ◄── pairs ───┘

Queries, responses and critiques stream: a response goes to the critic when it is finished, not when all are. Every
record is in the journal before it is used, so a run that was killed anywhere goes on from what it had. The driver knows
neither vLLM nor DeepSpeed nor how a run was put together (`trainers.session` does that).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.archive import Archive
from actors.attacker import Attacker
from actors.attacks import Outcome
from actors.critic import Critic
from actors.domains import Domain, GoldLedger, Purpose
from actors.engine import Completion, GenerationRequest
from actors.expert_desk import ExpertDesk
from actors.experts import ExpertBudget
from actors.oversight import Judged, Oversight, critic_verdict
from actors.records import (
    EvaluationAnswer,
    PreferencePair,
    Query,
    Response,
    Split,
    Verdict,
    from_table,
    lineage_id,
    to_table,
)
from actors.rollout import Rollout
from cluster.config import Config
from cluster.durable_files import FileDigest, digest_directory
from cluster.pool import Pool
from cluster.pool_errors import PoolExhausted
from cluster.store import RunStore
from cluster.weight_sync import SyncReport, sync_weights
from cluster.weights import ParityProbe
from trainers import evaluation
from trainers.evaluation import (
    EvaluationConfig,
    LiveSample,
    agreement_of,
    attack_outcomes,
    cell_counts,
    live_sample,
)
from trainers.loop_config import LoopConfig
from trainers.loop_state import STAGES, LoopState, Rollouts, StageClock, WallClock
from trainers.preferences import Pairs, PreferenceConfig, build_pairs
from trainers.progress import Progress, StopSignal
from trainers.summary import IterationMetrics, append_metrics, rewind_metrics
from trainers.training_group import TrainingGroup, TrainingPlan, UpdateReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverConfig:
    """The sections of a run's config that the loop itself reads."""

    loop: LoopConfig
    preferences: PreferenceConfig
    evaluation: EvaluationConfig
    evaluation_sets: Mapping[str, Sequence[tuple[str, tuple[str, ...]]]]
    """(query, cell) of the sealed, probe and out-of-distribution sets."""
    probe_sequences: tuple[tuple[int, ...], ...]
    """Token ids whose log-probs every replica must give as the learner does."""
    experts: ExpertBudget
    loss: str
    loss_config: Config
    batch_size: int
    """Pairs per optimizer step."""
    tokens_spanning: Callable[[Sequence[int], int], int]
    """How many of the learner's tokens it takes to spell so many characters (actors.chat.num_tokens_spanning)."""


class Stopped(Exception):
    """The user asked the loop to stop; everything up to the last commit is safe, and what is logged is kept."""


@asynccontextmanager
async def streams() -> AsyncIterator[asyncio.TaskGroup]:
    """Run tasks that feed one another; what ends one ends all, and is raised as it is, not as a group of one."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from group


@contextmanager
def _counting_lost(stage: str, rollouts: Rollouts) -> Iterator[None]:
    """Count requests that a pool which goes on could not have answered; they are missing, never a low score."""
    try:
        yield
    except PoolExhausted as error:
        rollouts.lost[stage] += len(error.reasons)
        logger.warning("%s lost: %s", stage, error)


def _num_judged(judged: Sequence[Judged]) -> int:
    """Return how many responses the critic gave a verdict on: what the experts' budget is a share of."""
    return sum(critic_verdict(item).label is not None for item in judged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Who takes part."""

    attacker: Attacker
    rollout: Rollout
    critic: Critic
    oversight: Oversight
    experts: ExpertDesk
    learner_group: TrainingGroup
    pools: Mapping[str, Pool[GenerationRequest, Completion]]
    """By role: attacker, rollouts, critic; two roles may share one pool."""


class Driver:
    """Runs the loop over roles that are ready."""

    def __init__(
        self,
        *,
        run: str,
        seed: int,
        roles: Roles,
        store: RunStore,
        domain: Domain,
        gold: GoldLedger,
        config: DriverConfig,
        progress: Progress,
        stop: StopSignal,
        wall: WallClock | None = None,
    ) -> None:
        """Take up the run where the store's last commit left it.

        Args:
            run: its name.
            seed: all random draws depend on it and on what is drawn.
            roles: who takes part, ready to work.
            store: the run's journal, held by this process.
            domain: what the problems are.
            gold: where truth is asked and counted.
            config: the sections that the loop reads.
            progress: who is told.
            stop: asks the loop to end at the next point where nothing is lost.
            wall: the sitting's clock; None: it begins here.
        """
        self._run = run
        self._seed = seed
        self._roles = roles
        self._store = store
        self._domain = domain
        self._gold = gold
        self._config = config
        self._progress = progress
        self._stop = stop
        self._clock = StageClock()
        self._tokens_before: dict[str, int] = {}
        commit = store.last_commit()
        self.state = (
            LoopState(iteration=-1, archive=Archive.empty(domain.cells()))
            if commit is None
            else LoopState.restore(commit.state)
        )
        self._wall = wall or WallClock()
        self._wall.before = dict(self.state.wall_s)
        gold.counts.update(self.state.gold)
        # The queue outlives a kill: what it holds of the open iteration is not asked for, nor counted, again.
        gold.counts[Purpose.EXPERT] = roles.experts.num_from_truth()

    # ---------------------------------------------------------------------------------------------- the loop

    async def run(self) -> LoopState:
        """Run what is still to do, and return the state after the last commit.

        Raises:
            Stopped: the user asked for a stop; the last commit stands.
        """
        rewind_metrics(self._store.path, last_iteration=self.state.iteration)
        if self.state.iteration < 0:
            await self._begin()
        else:
            await self._restore()
        self._wall.begin_loop()
        while self.state.iteration < self._config.loop.iterations:
            await self._iterate(self.state.iteration + 1)
        self.state.wall_s = self._wall.seconds()
        return self.state

    async def _iterate(self, iteration: int) -> None:
        self._clock.restart()
        await self._tokens_per_s()
        rollouts = await self._attack_respond_critique(iteration)
        verdicts = await self._judge(iteration, rollouts)
        pairs = await self._pair(iteration, rollouts, verdicts)
        update = await self._update(iteration, pairs, rollouts)
        sync = await self._publish(iteration)
        outcomes = self._steer(rollouts)
        metrics = await self._evaluate(iteration, rollouts, outcomes, verdicts, pairs, update, sync)
        self._account(iteration, metrics)
        await self._commit(iteration, metrics)

    # --------------------------------------------------------------------------------------------- the stages

    async def _attack_respond_critique(self, iteration: int) -> Rollouts:
        """Return an iteration's queries, responses and critiques; the three stages stream into one another."""
        rollouts = await self._logged(iteration, archive=self.state.archive)
        wanted = self._config.loop.queries_per_iteration
        with self._clock.stage("rollout"):
            async with streams() as tasks:
                known = list(rollouts.queries.values())
                tasks.create_task(self._respond(known, rollouts, tasks))
                self._critique(list(rollouts.responses.values()), rollouts, tasks)
                if len(known) < wanted:
                    async for attacked in self._roles.attacker.attack(
                        self.state.archive,
                        iteration=iteration,
                        num_queries=wanted - len(known),
                        split=Split.TRAIN,
                        version="v0",
                        start=rollouts.next_proposal,
                    ):
                        self._check_stop()
                        await self._log("proposals", attacked.proposals)
                        await self._log("queries", attacked.queries)
                        rollouts.proposals.update({row.proposal_id: row for row in attacked.proposals})
                        rollouts.queries.update({row.query_id: row for row in attacked.queries})
                        self._progress.stage("queries", done=len(rollouts.queries), total=wanted)
                        tasks.create_task(self._respond(attacked.queries, rollouts, tasks))
        return rollouts

    async def _respond(self, queries: Sequence[Query], rollouts: Rollouts, tasks: asyncio.TaskGroup) -> None:
        with _counting_lost("responses", rollouts):
            async for responses in self._roles.rollout.respond(queries, known=set(rollouts.responses)):
                self._check_stop()
                await self._log("responses", responses)
                rollouts.responses.update({row.response_id: row for row in responses})
                self._critique(responses, rollouts, tasks)

    def _critique(self, responses: Sequence[Response], rollouts: Rollouts, tasks: asyncio.TaskGroup) -> None:
        if responses:
            tasks.create_task(self._write_critiques(responses, rollouts))

    async def _write_critiques(self, responses: Sequence[Response], rollouts: Rollouts) -> None:
        items = [(rollouts.queries[row.query_id], row) for row in responses]
        total = self._config.loop.queries_per_iteration * self._roles.rollout.num_samples
        with _counting_lost("critiques", rollouts):
            async for critiques in self._roles.critic.judge(items, known=set(rollouts.critiques)):
                self._check_stop()
                await self._log("critiques", critiques)
                rollouts.critiques.update({row.critique_id: row for row in critiques})
                self._progress.stage("critiques", done=len(rollouts.critiques), total=total)

    async def _judge(self, iteration: int, rollouts: Rollouts) -> list[Verdict]:
        """Return the verdicts: the critic's, and experts' for the least trusted, within their budget."""
        logged = self._store.logged(iteration, stages=("verdicts",))
        if "verdicts" in logged:
            return from_table(logged["verdicts"], Verdict)
        with self._clock.stage("judge"):
            judged = rollouts.judged()
            num_allowed = self._config.experts.allowed(
                self.state.num_verdicts + _num_judged(judged), num_asked=self.state.num_asked
            )
            verdicts = self._roles.oversight.decide(judged, self._roles.experts.ask, num_allowed=num_allowed)
            await self._log("verdicts", verdicts)
        return verdicts

    async def _pair(self, iteration: int, rollouts: Rollouts, verdicts: Sequence[Verdict]) -> Pairs:
        """Return the preference pairs of the verdicts, stored before they are trained on."""
        pairs = build_pairs(
            list(rollouts.queries.values()),
            rollouts.responses,
            verdicts,
            config=self._config.preferences,
            run=self._run,
            tokens_spanning=self._config.tokens_spanning,
        )
        logged = self._store.logged(iteration, stages=("pairs",))
        if "pairs" in logged:
            pairs = replace(pairs, pairs=tuple(from_table(logged["pairs"], PreferencePair)))
        else:
            await self._log("pairs", pairs.pairs)
        self._check_stop()
        return pairs

    async def _update(self, iteration: int, pairs: Pairs, rollouts: Rollouts) -> UpdateReport | None:
        """Train the learner on the pairs, as an Arrow table; None when there are none."""
        if not pairs.pairs:
            logger.warning("iteration %d: no pairs, nothing to train on", iteration)
            return None
        with self._clock.stage("update"):
            table = to_table(pairs.pairs, PreferencePair)
            plan = TrainingPlan.of(
                [pair.pair_id for pair in pairs.pairs],
                keys=[rollouts.place(pair) for pair in pairs.pairs],
                batch_size=self._config.batch_size,
                epochs=self._config.loop.epochs,
                seed=self._seed * 1_000 + iteration,
            )
            return await self._roles.learner_group.update(
                table, loss=self._config.loss, loss_config=self._config.loss_config, plan=plan
            )

    async def _publish(self, iteration: int) -> SyncReport:
        """Give the learner's weights to every rollout replica; each proves by its log-probs that it holds them."""
        with self._clock.stage("publish"):
            group = self._roles.learner_group
            manifest = await group.publish(version=f"v{iteration}")
            sequences = self._config.probe_sequences
            probe = ParityProbe(
                token_ids=sequences,
                logprobs=await group.logprobs(sequences),
                bound=self._config.loop.parity_bound,
            )
            report = await sync_weights(
                self._roles.pools["rollouts"], manifest, probe=probe, deadline_s=self._config.loop.sync_deadline_s
            )
        self.state.parity_max_abs_diff = max(self.state.parity_max_abs_diff, report.max_abs_diff)
        return report

    def _steer(self, rollouts: Rollouts) -> list[Outcome]:
        """Hand the critic's own verdicts on the queries to the attack: where it aims next."""
        outcomes = attack_outcomes(rollouts.queries, [critic_verdict(item) for item in rollouts.judged()])
        self._roles.attacker.observe(self.state.archive, outcomes)
        return outcomes

    async def _evaluate(
        self,
        iteration: int,
        rollouts: Rollouts,
        outcomes: Sequence[Outcome],
        verdicts: Sequence[Verdict],
        pairs: Pairs,
        update: UpdateReport | None,
        sync: SyncReport,
    ) -> IterationMetrics:
        """Return what the iteration measured; truth is asked here, for the report alone, and nothing is steered."""
        with self._clock.stage("evaluate"):
            critic_alone = [critic_verdict(item) for item in rollouts.judged()]
            live = live_sample(
                rollouts.queries,
                rollouts.responses,
                critic_alone,
                size=self._config.evaluation.agreement_sample,
                seed=self._seed * 1_000 + iteration,
                checker=self._gold.checker_for(Purpose.EVALUATION),
            )
            await self._keep_agreement(iteration, live, rollouts)
            probe = await self._answer(iteration, "probe")
            if iteration == self._config.loop.iterations:
                for name in ("sealed", "out_of_distribution", "attack_set"):
                    await self._answer(iteration, name)
        attacked = [outcome for outcome in outcomes if outcome.num_judged]
        return IterationMetrics(
            iteration=iteration,
            policy_version=f"v{iteration}",
            live_attack_success=sum(o.success for o in attacked) / len(attacked) if attacked else None,
            num_attacks=len(attacked),
            probe_accuracy=sum(probe) / len(probe),
            num_probe=len(probe),
            critic_agreement=agreement_of(live),
            experts_asked=sum(verdict.escalated for verdict in verdicts),
            num_verdicts=sum(verdict.label is not None for verdict in critic_alone),
            pairs_trained=len(pairs.pairs),
            pairs_dropped=dict(pairs.dropped),
            proposals=dict(Counter(row.outcome for row in rollouts.proposals.values())),
            lost=dict(rollouts.lost),
            cells=cell_counts(outcomes, self._domain.cells()),
            seconds=self._clock.seconds(),
            wall_s=self._clock.elapsed_s(),
            tokens_per_s=await self._tokens_per_s(),
            parity_max_abs_diff=sync.max_abs_diff,
            training={} if update is None else dict(update.means),
        )

    def _account(self, iteration: int, metrics: IterationMetrics) -> None:
        """Carry over what the next iteration's budget depends on."""
        self.state.iteration = iteration
        self.state.num_verdicts += metrics.num_verdicts
        self.state.num_asked += metrics.experts_asked

    async def _keep_agreement(self, iteration: int, live: LiveSample, rollouts: Rollouts) -> None:
        """Store which live answers truth was asked about, and what it said: for the report, read by no stage."""
        if self._logged_answers(iteration, "agreement"):
            return
        answers = [rollouts.responses[response_id] for response_id in live.response_ids]
        queries = [rollouts.queries[answer.query_id] for answer in answers]
        rows = [
            EvaluationAnswer(
                answer_id=answer.response_id,
                set_name="agreement",
                iteration=iteration,
                item=i,
                query=query.messages[-1].content,
                facets=query.facets,
                text=answer.text,
                correct=correct,
                well_formed=self._domain.well_formed(query.messages[-1].content, answer.text),
                policy_version=answer.policy_version,
            )
            for i, (query, answer, correct) in enumerate(zip(queries, answers, live.truth, strict=True))
        ]
        await self._log("evaluations", rows)

    async def _commit(self, iteration: int, metrics: IterationMetrics | None) -> None:
        """Write checkpoint and policy, then COMMIT.json: the one point at which the iteration has happened."""
        group = self._roles.learner_group
        checkpoint, policy = self._store.checkpoint_dir(iteration), self._store.policy_dir(iteration)
        await group.save(checkpoint)
        await group.export(policy)
        self.state.gold = Counter(self._gold.counts)
        self.state.wall_s = self._wall.seconds()
        if metrics is not None:
            append_metrics(self._store.path, metrics)
        await asyncio.to_thread(
            self._store.commit,
            iteration,
            state=self.state.snapshot(),
            checkpoint=await self._digests(checkpoint),
            policy=await self._digests(policy),
        )
        if metrics is not None:
            self._progress.row(metrics)
        self._check_stop()

    # ---------------------------------------------------------------------------------- before the first iteration

    async def _begin(self) -> None:
        """Freeze the attack set, answer the evaluation sets with the untrained learner, and commit iteration 0."""
        await self._publish(0)
        await self._freeze_attack_set()
        for name in ("sealed", "out_of_distribution", "attack_set", "probe"):
            await self._answer(0, name)
        self.state.iteration = 0
        await self._commit(0, None)

    async def _restore(self) -> None:
        """Load the last commit's checkpoint and give its weights to the rollout pool."""
        iteration = self.state.iteration
        await self._roles.learner_group.load(self._store.checkpoint_dir(iteration))
        await self._publish(iteration)

    async def _freeze_attack_set(self) -> None:
        """Ask attacker v0 for the frozen attack set: valid, distinct queries of the probe split (SCIENCE §3)."""
        archive = Archive.empty(self._domain.cells())
        logged = await self._logged(0, archive=archive)
        num_have = len(logged.queries)
        wanted = self._config.evaluation.attack_set
        if num_have >= wanted:
            return
        async for attacked in self._roles.attacker.attack(
            archive,
            iteration=0,
            num_queries=wanted - num_have,
            split=Split.PROBE,
            version="v0",
            start=logged.next_proposal,
        ):
            self._check_stop()
            await self._log("proposals", attacked.proposals)
            await self._log("queries", attacked.queries)
            num_have += len(attacked.queries)
            self._progress.stage("frozen attack set", done=num_have, total=wanted)

    async def _answer(self, iteration: int, name: str) -> list[bool]:
        """Answer an evaluation set greedily, store the answers, and return which are right.

        Answers that an earlier sitting stored stand: the weights that gave them were made again, bit by bit.
        """
        logged = self._logged_answers(iteration, name)
        if logged:
            return [answer.correct for answer in logged]
        queries = self._evaluation_queries(name)
        found = await evaluation.evaluate(
            self._roles.rollout,
            [query for query, _ in queries],
            name=f"{name}/{iteration}",
            domain=self._domain,
            checker=self._gold.checker_for(Purpose.EVALUATION),
        )
        rows = [
            EvaluationAnswer(
                answer_id=lineage_id(self._run, iteration=iteration, stage=name, sample_index=i),
                set_name=name,
                iteration=iteration,
                item=i,
                query=query,
                facets=facets,
                text=text,
                correct=correct,
                well_formed=well_formed,
                policy_version=f"v{iteration}",
            )
            for i, ((query, facets), text, correct, well_formed) in enumerate(
                zip(queries, found.texts, found.correct, found.well_formed, strict=True)
            )
        ]
        await self._log("evaluations", rows)
        return list(found.correct)

    # ---------------------------------------------------------------------------------------------- small things

    def _evaluation_queries(self, name: str) -> Sequence[tuple[str, tuple[str, ...]]]:
        if name != "attack_set":
            return self._config.evaluation_sets[name]
        queries = from_table(self._store.read("queries", iteration=0), Query)
        return [(query.messages[-1].content, query.facets) for query in sorted(queries, key=lambda q: q.sample_index)]

    def _logged_answers(self, iteration: int, name: str) -> list[EvaluationAnswer]:
        """Return an evaluation set's answers in the order of its items; they are stored all at once or not at all."""
        logged = self._store.logged(iteration, stages=("evaluations",))
        rows = from_table(logged["evaluations"], EvaluationAnswer) if "evaluations" in logged else []
        return sorted((row for row in rows if row.set_name == name), key=lambda row: row.item)

    async def _digests(self, directory: Path) -> tuple[FileDigest, ...]:
        return await asyncio.to_thread(digest_directory, directory, root=self._store.path)

    async def _tokens_per_s(self) -> dict[str, float]:
        """Return the generated tokens per second of this iteration so far, by pool."""
        rates = {}
        for name, pool in self._roles.pools.items():
            total = (await pool.stats()).num_generated_tokens
            rates[name] = max(0, total - self._tokens_before.get(name, 0)) / max(self._clock.elapsed_s(), 1e-9)
            self._tokens_before[name] = total
        return rates

    async def _logged(self, iteration: int, *, archive: Archive) -> Rollouts:
        """Return what the journal holds of the open iteration, and let the archive remember its queries.

        A proposal is logged before its query: an accepted one without a query was cut off by a kill.
        """
        rollouts = Rollouts.of(self._store.logged(iteration))
        cut_off = [
            self._roles.attacker.query_of(row, version="v0")
            for row in rollouts.proposals.values()
            if row.query_id is not None and row.query_id not in rollouts.queries
        ]
        await self._log("queries", cut_off)
        rollouts.queries.update({query.query_id: query for query in cut_off})
        for query in rollouts.queries.values():
            archive.remember(query.canonical)
        return rollouts

    def _check_stop(self) -> None:
        if self._stop.requested:
            raise Stopped(self.state.iteration)

    async def _log(self, stage: str, rows: Sequence[Any]) -> None:
        if rows:
            await self._store.append(stage, to_table(rows, STAGES[stage][0]))
