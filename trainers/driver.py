"""Owns the loop: attack, respond, critique, judge, pair, update, publish, evaluate, commit.

    seeds ──► attacker ──queries──► learner ──responses──► critic ──verdicts──► experts (the least trusted)
                 ▲                     ▲                                            │
                 └──── outcomes ───────┼── weights vN ── learner group ◄── batch ───┘

Queries, responses and critiques stream: a response goes to the critic when it is finished, not when all are. An
iteration has two halves: `_prepare` ends with its training batch (accepted answers, pairs, or scored ones, by what
the loss takes), `_learn` with its commit. With `loop.max_policy_age` the next iterations are prepared while one is
learnt. Every record is in the journal before it is used, so a run that was killed anywhere goes on from what it had.
The driver knows neither vLLM nor DeepSpeed nor how a run was put together (`trainers.session` does that).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from actors.archive import Archive
from actors.attacker import Attacker
from actors.attacks import Outcome
from actors.critic import Critic
from actors.domains import Domain, GoldLedger, Purpose
from actors.engine import Completion, GenerationRequest
from actors.expert_desk import ExpertDesk
from actors.experts import ExpertBudget
from actors.oversight import EXPERT, Judged, Oversight
from actors.records import (
    EvaluationAnswer,
    PreferencePair,
    Query,
    Response,
    Split,
    Verdict,
    from_table,
    lineage_id,
)
from actors.rollout import Rollout
from cluster.durable_files import FileDigest, digest_directory
from cluster.pool import Pool
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
from trainers.feedback.batch_builder import BatchBuilder, BatchConfig
from trainers.feedback.mixed_feedback import error_rates, failure_share, tally
from trainers.feedback.refinement import Refining
from trainers.feedback.reward_model import RewardModel
from trainers.feedback.trade_offs import Preference, version_at
from trainers.feedback.training_data import TrainingData
from trainers.gpu_turns import GpuTurns
from trainers.importance import ImportanceConfig
from trainers.journal import Journal
from trainers.loop_config import LoopConfig
from trainers.loop_state import LoopState, Rollouts, StageClock, WallClock
from trainers.losses import AdvisingLoss, load_loss
from trainers.progress import Progress, StopSignal
from trainers.summary import FeedbackMetrics, IterationMetrics, append_metrics, rewind_metrics
from trainers.training_config import ReferenceWeights
from trainers.training_group import TrainingGroup, UpdateReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverConfig:
    """The sections of a run's config that the loop itself reads."""

    loop: LoopConfig
    batch: BatchConfig
    evaluation: EvaluationConfig
    evaluation_sets: Mapping[str, Sequence[tuple[str, tuple[str, ...]]]]
    """(query, cell) of the sealed, probe and out-of-distribution sets."""
    probe_sequences: tuple[tuple[int, ...], ...]
    """Token ids whose log-probs every replica must give as the learner does."""
    experts: ExpertBudget
    batch_size: int
    """Rows of an update's data per optimizer step."""
    importance: ImportanceConfig | None = None
    """How samples of older weights are corrected for; None where their log-probs can't be compared."""
    reference_weights: ReferenceWeights = "start_of_update"
    """Weights that the loss compares the learner with."""


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


def _num_judged(judged: Sequence[Judged]) -> int:
    """Return how many responses the critic gave a verdict on: what the experts' budget is a share of."""
    return sum(item.critic_verdict.label is not None for item in judged)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An iteration's first half: everything up to what the learner is to be trained on."""

    iteration: int
    rollouts: Rollouts
    judged: Sequence[Judged]
    verdicts: Sequence[Verdict]
    data: TrainingData
    outcomes: Sequence[Outcome]
    clock: StageClock
    state: LoopState
    """What is to be committed with it."""
    pairs: Sequence[PreferencePair] = ()
    """What the reward model learns from first; none without one."""
    reward: Mapping[str, float] = field(default_factory=dict)
    """What there is to say of it once it has learnt (`trainers.feedback.reward_model.Rewarded`)."""


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
    turns: GpuTurns = field(default_factory=GpuTurns)
    """Whose turn it is on GPUs that pools share with the learner; without such, everybody's."""
    reward_model: RewardModel | None = None
    """Scores the samples in the place of the verdicts; None: the verdicts do."""
    refining: Refining | None = None
    """Has failed answers mended, to be preferred to them; None: none are."""


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
        self._journal = Journal(store)
        self._logged_before: dict[int, Mapping[str, pa.Table]] = {}
        self._batches = BatchBuilder(
            config=config.batch,
            run=run,
            seed=seed,
            max_age=config.loop.max_policy_age,
            journal=self._journal,
            logged=self._before,
            reward_model=roles.reward_model,
            refining=roles.refining,
        )
        self._tokens_before: dict[str, int] = {}
        self._advised = False
        self._last_row = 0.0
        commit = store.last_commit()
        self.state = (
            LoopState(iteration=-1, archive=Archive.empty(domain.cells()))
            if commit is None
            else LoopState.restore(commit.state)
        )
        self._head = self.state
        """The state that the next iteration to be prepared begins with."""
        self._committed = asyncio.Event()
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
        try:
            if self.state.iteration < 0:
                await self._begin()
            else:
                await self._restore()
            self._wall.begin_loop()
            await self._iterate()
        finally:
            await self._journal.settle()
        self.state.wall_s = self._wall.seconds()
        return self.state

    async def _iterate(self) -> None:
        """Prepare iterations and learn from them, one after the other or, as far as samples may age, side by side."""
        await self._tokens_per_s()
        self._last_row = time.monotonic()
        self._head = self.state.copy()
        ready: asyncio.Queue[Prepared] = asyncio.Queue()
        last = self.state.iteration if self.state.kl_spent else self._config.loop.iterations
        numbers = range(self.state.iteration + 1, last + 1)
        async with streams() as tasks:
            preparing = tasks.create_task(self._prepare_all(numbers, ready))
            for _ in numbers:
                await self._learn(await ready.get())
                if self.state.kl_spent:
                    preparing.cancel()  # nobody will learn from what it has begun
                    break
                self._check_stop()

    async def _prepare_all(self, numbers: range, ready: asyncio.Queue[Prepared]) -> None:
        try:
            for iteration in numbers:
                # Its samples come from the weights that are committed, and train those of the iteration before it.
                await self._until_committed(iteration - 1 - self._config.loop.max_policy_age)
                ready.put_nowait(await self._prepare(iteration))
        except Stopped:
            # What is prepared is learnt and committed first.
            await self._until_committed(self._head.iteration)
            raise

    async def _until_committed(self, iteration: int) -> None:
        while self.state.iteration < iteration:
            self._committed.clear()
            await self._committed.wait()

    async def _prepare(self, iteration: int) -> Prepared:
        """Attack, respond, critique, judge, pair: with the weights that the rollout pool holds meanwhile."""
        clock = StageClock()
        if (drawn := self._config.batch.trade_offs.drawn(iteration)) is not None:
            await self._publish(iteration - 1, clock, drawn=drawn)
        rollouts = await self._attack_respond_critique(iteration, clock)
        judged = rollouts.judged()
        verdicts = await self._judge(iteration, judged, clock)
        self._head.checked.update(tally(judged, verdicts))
        trusted = self._batches.trusted(judged, verdicts)
        if (refining := self._batches.refining) is not None:
            with clock.stage("refine"):
                await refining.refine(rollouts, trusted.verdicts, journal=self._journal, stop=self._check_stop)
        data = await self._batches.build(rollouts, trusted, state=self._head)
        pairs = await self._batches.pairs_to_score_by(rollouts, trusted, state=self._head)
        self._check_stop()
        outcomes = self._steer(rollouts, judged)
        self._account(iteration, judged, verdicts)
        return Prepared(
            iteration=iteration,
            rollouts=rollouts,
            judged=judged,
            verdicts=verdicts,
            data=data,
            outcomes=outcomes,
            clock=clock,
            state=self._head.copy(),
            pairs=pairs,
        )

    async def _learn(self, prepared: Prepared) -> None:
        """Update, publish, evaluate, commit."""
        prepared = await self._rewarded(prepared)
        update = await self._update(prepared)
        prepared.state.kl_spent = self._spends_run_budget(prepared.iteration, update)
        sync = await self._publish(prepared.iteration, prepared.clock)
        metrics = await self._evaluate(prepared, update, sync)
        await self._commit(prepared.state, metrics)

    # --------------------------------------------------------------------------------------------- the stages

    async def _attack_respond_critique(self, iteration: int, clock: StageClock) -> Rollouts:
        """Return an iteration's queries, responses and critiques; the three stages stream into one another."""
        rollouts = await self._logged(iteration, archive=self._head.archive)
        wanted = self._config.loop.queries_per_iteration
        with clock.stage("rollout"):
            async with streams() as tasks:
                known = list(rollouts.queries.values())
                tasks.create_task(self._respond(known, rollouts, tasks))
                self._critique(list(rollouts.responses.values()), rollouts, tasks)
                if len(known) < wanted:
                    async for attacked in self._roles.attacker.attack(
                        self._head.archive,
                        iteration=iteration,
                        num_queries=wanted - len(known),
                        split=Split.TRAIN,
                        version="v0",
                        start=rollouts.next_proposal,
                    ):
                        self._check_stop()
                        await self._journal.add("proposals", attacked.proposals, iteration=iteration)
                        await self._journal.add("queries", attacked.queries, iteration=iteration)
                        rollouts.proposals.update({row.proposal_id: row for row in attacked.proposals})
                        rollouts.queries.update({row.query_id: row for row in attacked.queries})
                        self._progress.stage("queries", done=len(rollouts.queries), total=wanted)
                        tasks.create_task(self._respond(attacked.queries, rollouts, tasks))
        return rollouts

    async def _respond(self, queries: Sequence[Query], rollouts: Rollouts, tasks: asyncio.TaskGroup) -> None:
        with rollouts.counting_lost("responses"):
            async for responses in self._roles.rollout.respond(queries, known=set(rollouts.responses)):
                self._check_stop()
                await self._journal.add("responses", responses, iteration=rollouts.iteration)
                rollouts.responses.update({row.response_id: row for row in responses})
                self._critique(responses, rollouts, tasks)

    def _critique(self, responses: Sequence[Response], rollouts: Rollouts, tasks: asyncio.TaskGroup) -> None:
        if responses:
            tasks.create_task(self._write_critiques(responses, rollouts))

    async def _write_critiques(self, responses: Sequence[Response], rollouts: Rollouts) -> None:
        items = [(rollouts.queries[row.query_id], row) for row in responses]
        total = self._config.loop.queries_per_iteration * self._roles.rollout.num_samples
        with rollouts.counting_lost("critiques"):
            async for critiques in self._roles.critic.judge(items, known=set(rollouts.critiques)):
                self._check_stop()
                await self._journal.add("critiques", critiques, iteration=rollouts.iteration)
                rollouts.critiques.update({row.critique_id: row for row in critiques})
                self._progress.stage("critiques", done=len(rollouts.critiques), total=total)

    async def _judge(self, iteration: int, judged: Sequence[Judged], clock: StageClock) -> list[Verdict]:
        """Return the verdicts: the critic's, and experts' for the least trusted, within their budget."""
        logged = self._before(iteration)
        if "verdicts" in logged:
            return from_table(logged["verdicts"], Verdict)
        with clock.stage("judge"):
            num_allowed = self._config.experts.allowed(
                self._head.num_verdicts + _num_judged(judged), num_asked=self._head.num_asked
            )
            verdicts = self._roles.oversight.decide(judged, self._roles.experts.ask, num_allowed=num_allowed)
            await self._journal.add("verdicts", verdicts, iteration=iteration)
        return verdicts

    async def _rewarded(self, prepared: Prepared) -> Prepared:
        """Train the reward model on the iteration's pairs, and have its scores in the place of the verdicts'."""
        model = self._roles.reward_model
        if model is None:
            return prepared
        with prepared.clock.stage("reward"):
            data, figures = await self._batches.rewarded(
                prepared.judged, prepared.verdicts, prepared.pairs, model=model, iteration=prepared.iteration
            )
        return replace(prepared, data=data, reward=figures)

    async def _update(self, prepared: Prepared) -> UpdateReport | None:
        """Train the learner on the iteration's data, an Arrow table; None when there is none."""
        data, iteration = prepared.data, prepared.iteration
        await self._batches.keep_left_out(prepared.judged, prepared.verdicts, data, iteration=iteration)
        if not data.row_ids:
            logger.warning("iteration %d: nothing to train on: all was dropped", prepared.iteration)
            return None
        with prepared.clock.stage("update"):
            plan = self._batches.plan(
                data,
                batch_size=self._config.batch_size,
                epochs=self._config.loop.epochs,
                seed=self._seed * 1_000 + prepared.iteration,
            )
            done, whole = prepared.iteration - 1, self._config.loop.iterations
            plan = replace(plan, training=(done / whole, (done + 1) / whole))
            async with self._roles.turns.learner():
                group, trade_offs = self._roles.learner_group, self._config.batch.trade_offs
                await trade_offs.prefer(group, trade_offs.drawn(prepared.iteration))
                report = await group.update(
                    data.table,
                    loss=self._config.batch.loss,
                    loss_config=self._config.batch.loss_config,
                    plan=plan,
                    importance=self._config.importance,
                    reference_weights=self._config.reference_weights,
                    kl_budget=self._config.loop.kl_budget,
                )
        self._tell_stop(prepared.iteration, report)
        self._watch_gap(prepared.iteration, report)
        self._watch_settings(prepared.iteration, report)
        return report

    def _tell_stop(self, iteration: int, report: UpdateReport) -> None:
        """Say it when a KL budget has ended the update before its plan did (H-KLB)."""
        if report.stopped_by is None or report.kl is None:
            return
        budget = self._config.loop.kl_budget
        reached, most = {
            "update": (f"{report.kl.update:.2f} nats per response from the update's start", budget.update),
            "run": (f"{report.kl.run:.2f} nats per response from the run's start", budget.run),
        }[report.stopped_by]
        self._progress.note(
            f"stopped by KL budget: iteration {iteration} ended its update after {len(report.steps)} of "
            f"{len(report.steps) + report.num_left_out} steps, {reached}, wanted at most {most:g}"
        )

    def _spends_run_budget(self, iteration: int, update: UpdateReport | None) -> bool:
        """Return whether the run ends here, too far from its first weights to learn any more, and say so (H-KLB)."""
        loop = self._config.loop
        if update is None or update.kl is None or update.kl.run <= loop.kl_budget.run:
            return False
        self._progress.note(
            f"run ended by KL budget: iteration {iteration} of {loop.iterations} is the last, {update.kl.run:.2f} nats "
            f"per response from the run's start, wanted at most {loop.kl_budget.run:g}"
        )
        return True

    def _watch_gap(self, iteration: int, report: UpdateReport) -> None:
        """Raise the alarm when two engines with one version's weights differ more than they should (L-TIS)."""
        gap, most = report.staleness.get("rollout_gap"), self._config.loop.importance.alarm
        if gap is not None and gap > most:
            self._progress.note(
                f"alarm: in iteration {iteration} the rollout engine's log-probs differ from the learner's by "
                f"{gap:.3f} nats per token at equal weights, wanted at most {most:g}: compare dtypes and sampling"
            )

    def _watch_settings(self, iteration: int, report: UpdateReport) -> None:
        """Say, once in a sitting, what the loss finds wrong with its settings."""
        loss = load_loss(self._config.batch.loss)
        if self._advised or not isinstance(loss, AdvisingLoss):
            return
        if (advice := loss.advice(report.means)) is not None:
            self._advised = True
            self._progress.note(f"warning: in iteration {iteration} {advice}")

    async def _publish(self, iteration: int, clock: StageClock, *, drawn: Preference | None = None) -> SyncReport:
        """Give the learner's weights to every rollout replica; each proves by its log-probs that it holds them."""
        with clock.stage("publish"):
            group = self._roles.learner_group
            sequences = self._config.probe_sequences
            async with self._roles.turns.learner():
                await self._config.batch.trade_offs.prefer(group, drawn)
                manifest = await group.publish(version=version_at(f"v{iteration}", drawn))
                logprobs = await group.logprobs(sequences)
            probe = ParityProbe(token_ids=sequences, logprobs=logprobs, bound=self._config.loop.parity_bound)
            report = await sync_weights(
                self._roles.pools["rollouts"], manifest, probe=probe, deadline_s=self._config.loop.sync_deadline_s
            )
        self.state.parity_max_abs_diff = max(self.state.parity_max_abs_diff, report.max_abs_diff)
        return report

    def _steer(self, rollouts: Rollouts, judged: Sequence[Judged]) -> list[Outcome]:
        """Hand the critic's own verdicts on the queries to the attack: where it aims next."""
        outcomes = attack_outcomes(rollouts.queries, [item.critic_verdict for item in judged])
        self._roles.attacker.observe(self._head.archive, outcomes)
        return outcomes

    async def _evaluate(self, prepared: Prepared, update: UpdateReport | None, sync: SyncReport) -> IterationMetrics:
        """Return what the iteration measured; truth is asked here, for the report alone, and nothing is steered."""
        iteration, rollouts, data = prepared.iteration, prepared.rollouts, prepared.data
        with prepared.clock.stage("evaluate"):
            critic_alone = [item.critic_verdict for item in prepared.judged]
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
            if prepared.state.kl_spent or iteration == self._config.loop.iterations:
                for name in ("sealed", "out_of_distribution", "attack_set"):
                    await self._answer(iteration, name)
        attacked = [outcome for outcome in prepared.outcomes if outcome.num_judged]
        tokens_per_s = await self._tokens_per_s()
        wall_s, self._last_row = time.monotonic() - self._last_row, time.monotonic()
        return IterationMetrics(
            iteration=iteration,
            policy_version=f"v{iteration}",
            live_attack_success=sum(o.success for o in attacked) / len(attacked) if attacked else None,
            num_attacks=len(attacked),
            probe_accuracy=sum(probe) / len(probe),
            num_probe=len(probe),
            critic_agreement=agreement_of(live),
            experts_asked=sum(verdict.escalated for verdict in prepared.verdicts),
            num_verdicts=sum(verdict.label is not None for verdict in critic_alone),
            material=self._config.batch.material,
            pairs_trained=len(data.row_ids),
            pairs_dropped=dict(data.dropped),
            refinement=dict(rollouts.refinement),
            proposals=dict(Counter(row.outcome for row in rollouts.proposals.values())),
            sample_ages=dict(rollouts.ages(data.response_ids, version=iteration - 1)),
            lost=dict(rollouts.lost),
            cells=cell_counts(prepared.outcomes, self._domain.cells()),
            seconds=prepared.clock.seconds(),
            wall_s=wall_s,
            tokens_per_s=tokens_per_s,
            parity_max_abs_diff=sync.max_abs_diff,
            training={
                **({} if update is None else update.means),
                **{f"reward_model_{name}": value for name, value in prepared.reward.items()},
            },
            feedback=self._feedback(prepared),
            preference=self._config.batch.trade_offs.drawn(iteration),
        )

    def _feedback(self, prepared: Prepared) -> FeedbackMetrics | None:
        """Return what experts' labels of randomly drawn answers say; None where none was drawn."""
        shown = failure_share(prepared.judged, prepared.verdicts)
        mix = self._config.batch.preferences.mix
        rates = None if mix is None else error_rates(prepared.state.checked, mix)
        sources = prepared.data.table.column("source") if "source" in prepared.data.table.column_names else None
        return FeedbackMetrics.of(
            shown,
            checked=prepared.state.checked,
            rates={} if rates is None else rates.critic,
            num_expert_pairs=None if sources is None else sources.to_pylist().count(EXPERT),
        )

    def _account(self, iteration: int, judged: Sequence[Judged], verdicts: Sequence[Verdict]) -> None:
        """Carry over what the next iteration's budget depends on."""
        self._head.iteration = iteration
        self._head.num_verdicts += _num_judged(judged)
        self._head.num_asked += sum(verdict.escalated for verdict in verdicts)

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
        await self._journal.add("evaluations", rows, iteration=iteration)

    async def _commit(self, state: LoopState, metrics: IterationMetrics | None) -> None:
        """Write checkpoint and policy, then COMMIT.json: the one point at which the iteration has happened."""
        iteration, group = state.iteration, self._roles.learner_group
        checkpoint, policy = self._store.checkpoint_dir(iteration), self._store.policy_dir(iteration)
        async with self._roles.turns.learner():
            await self._config.batch.trade_offs.prefer(group)
            await group.save(checkpoint)
            await group.export(policy)
        rewards = self._store.checkpoint_dir(iteration, of="reward")
        if self._roles.reward_model is not None:
            await self._roles.reward_model.save(rewards)
        state.gold = Counter(self._gold.counts)
        state.parity_max_abs_diff = self.state.parity_max_abs_diff
        state.wall_s = self._wall.seconds()
        if metrics is not None:
            append_metrics(self._store.path, metrics)
        await asyncio.to_thread(
            self._store.commit,
            iteration,
            state=state.snapshot(),
            checkpoint=(
                *await self._digests(checkpoint),
                *(() if self._roles.reward_model is None else await self._digests(rewards)),
            ),
            policy=await self._digests(policy),
        )
        self.state = state
        self._logged_before.pop(iteration, None)
        if metrics is not None:
            self._progress.row(metrics)
        self._committed.set()

    # ---------------------------------------------------------------------------------- before the first iteration

    async def _begin(self) -> None:
        """Freeze the attack set, answer the evaluation sets with the untrained learner, and commit iteration 0."""
        await self._publish(0, StageClock())
        await self._freeze_attack_set()
        for name in ("sealed", "out_of_distribution", "attack_set", "probe"):
            await self._answer(0, name)
        self.state.iteration = 0
        await self._commit(self.state, None)
        self._check_stop()

    async def _restore(self) -> None:
        """Load the last commit's checkpoint and give its weights to the rollout pool."""
        iteration = self.state.iteration
        async with self._roles.turns.learner():
            await self._roles.learner_group.load(self._store.checkpoint_dir(iteration))
        if self._roles.reward_model is not None:
            await self._roles.reward_model.load(self._store.checkpoint_dir(iteration, of="reward"))
        await self._publish(iteration, StageClock())

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
            await self._journal.add("proposals", attacked.proposals, iteration=0)
            await self._journal.add("queries", attacked.queries, iteration=0)
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
        await self._journal.add("evaluations", rows, iteration=iteration)
        return list(found.correct)

    # ---------------------------------------------------------------------------------------------- small things

    def _evaluation_queries(self, name: str) -> Sequence[tuple[str, tuple[str, ...]]]:
        if name != "attack_set":
            return self._config.evaluation_sets[name]
        queries = from_table(self._store.read("queries", iteration=0), Query)
        return [(query.messages[-1].content, query.facets) for query in sorted(queries, key=lambda q: q.sample_index)]

    def _logged_answers(self, iteration: int, name: str) -> list[EvaluationAnswer]:
        """Return an evaluation set's answers in the order of its items; they are stored all at once or not at all."""
        logged = self._before(iteration)
        rows = from_table(logged["evaluations"], EvaluationAnswer) if "evaluations" in logged else []
        return sorted((row for row in rows if row.set_name == name), key=lambda row: row.item)

    async def _digests(self, directory: Path) -> tuple[FileDigest, ...]:
        return await asyncio.to_thread(digest_directory, directory, root=self._store.path)

    async def _tokens_per_s(self) -> dict[str, float]:
        """Return the generated tokens per second since the last row of metrics, by pool."""
        elapsed_s = time.monotonic() - self._last_row
        rates = {}
        for name, pool in self._roles.pools.items():
            total = (await pool.stats()).num_generated_tokens
            rates[name] = max(0, total - self._tokens_before.get(name, 0)) / max(elapsed_s, 1e-9)
            self._tokens_before[name] = total
        return rates

    def _before(self, iteration: int) -> Mapping[str, pa.Table]:
        """Return what an earlier sitting logged of an open iteration: by stage, read once."""
        if iteration not in self._logged_before:
            self._logged_before[iteration] = self._store.logged(iteration)
        return self._logged_before[iteration]

    async def _logged(self, iteration: int, *, archive: Archive) -> Rollouts:
        """Return what the journal holds of the open iteration, and let the archive remember its queries.

        A proposal is logged before its query: an accepted one without a query was cut off by a kill.
        """
        rollouts = Rollouts.of(self._before(iteration), iteration=iteration)
        cut_off = [
            self._roles.attacker.query_of(row, version="v0")
            for row in rollouts.proposals.values()
            if row.query_id is not None and row.query_id not in rollouts.queries
        ]
        await self._journal.add("queries", cut_off, iteration=iteration)
        rollouts.queries.update({query.query_id: query for query in cut_off})
        for query in rollouts.queries.values():
            archive.remember(query.canonical)
        return rollouts

    def _check_stop(self) -> None:
        if self._stop.requested:
            raise Stopped(self.state.iteration)
