"""Owns the handle of a training group: N ranks of one DeepSpeed engine, placed together, called together.

    TrainingGroup ──► rank 0 … rank N-1 (Ray actors, trainers/ranks/deepspeed_worker.py)

Every call has a deadline. When a rank dies, hangs or fails, all are killed and TrainingGroupError says what the rank
said last: half a group can only hang. Knows nothing of DeepSpeed, nor of what is trained or why.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup

from actors.receiving import Opened
from cluster.config import Config
from cluster.durable_files import FileDigest
from cluster.node_labels import label_selector
from cluster.placement import SHARED_GPU, inside, place_gang, release
from cluster.ray_runtime import worker_stderr
from cluster.weight_transfer import Backend
from cluster.weights import WeightAnswer, WeightManifest, Weights
from trainers.batches import PlannedStep, Slot, TrainingPlan
from trainers.importance import ImportanceConfig
from trainers.kl import KlBudget
from trainers.losses import load_loss
from trainers.ranks.checkpoint_files import CorruptCheckpoint
from trainers.ranks.deepspeed_worker import DeepSpeedRank, RankInfo, StepReport, TableRef, TrainingDiverged
from trainers.ranks.kl_probe import KlReached, exceeded
from trainers.ranks.model_source import ModelSource
from trainers.ranks.rendezvous import Rendezvous
from trainers.training_config import ReferenceWeights, TrainingConfig, learning_rate

__all__ = [
    "CorruptCheckpoint",
    "ModelSource",
    "PlannedStep",
    "Slot",
    "StepReport",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingGroup",
    "TrainingGroupError",
    "TrainingPlan",
    "UpdateReport",
    "learning_rate",
]

logger = logging.getLogger(__name__)

SETTLE_S = 2.0
"""After one rank's failure, how long to wait for what the others have to say: the cause is often another's death."""
STRETCHES_IN_FLIGHT = 2
"""Calls for steps made at once, so that a rank never waits for its caller between two."""
STRETCH_S = 1.0
"""About how long the steps that one call asks for take: of small ones many, for a call costs a rank 1 to 2 ms."""


class TrainingGroupError(RuntimeError):
    """A rank died, failed or missed a deadline; the whole group has been killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What an update did."""

    slots: tuple[Slot, ...]
    """What was applied, in order; the rows of a skipped step are not among them."""
    steps: tuple[StepReport, ...]
    wall_s: float
    """Reference log-probs included."""
    reference_s: float
    """Seconds until the first step: fetching the table and computing reference log-probs."""
    staleness: Mapping[str, float] = field(default_factory=dict)
    """`importance_mean` (mean factor of the losses), `stale_share` (of the rows), and the mean |difference| per token
    in nats between this group's log-probs and the rollout engine's, of rows sampled by the weights that the update
    begins from (`rollout_gap`) and of older ones' (`rollout_gap_stale`). Of an unpaired loss also `num_desirable` and
    `num_undesirable`, the sums of the weights of good and of bad rows."""
    kl: KlReached | None = None
    """How far the update has moved the weights; None where nobody asked."""
    stopped_by: Literal["update", "run"] | None = None
    """Which KL budget was spent before the plan's end; None: neither."""
    num_left_out: int = 0
    """Steps of the plan that were not made for it."""
    num_ranks: int = 1
    """Of the group."""

    @property
    def num_skipped(self) -> int:
        """Return the number of steps whose loss or gradient was not finite."""
        return sum(not step.applied for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Return real tokens trained on per second, all ranks together; a prompt counts with each of its responses,
        also where it is computed once for two.
        """
        return sum(step.num_tokens for step in self.steps) / max(self.wall_s, 1e-9)

    @property
    def padding_efficiency(self) -> float:
        """Return the share of computed tokens that were real: a prompt that is computed once counts once."""
        padded = sum(step.num_padded_tokens for step in self.steps)
        return sum(step.num_unpadded_tokens for step in self.steps) / max(padded, 1)

    @property
    def rank_balance(self) -> float:
        """Return the greatest number of real tokens that a rank had in a step, over the ranks' mean; over all steps.

        1: no rank waits for another; at N ranks, N: one of them does all the work.
        """
        most = sum(step.most_tokens for step in self.steps)
        return most * self.num_ranks / max(sum(step.num_tokens for step in self.steps), 1)

    @property
    def means(self) -> dict[str, float]:
        """Return loss, gradient norm and the loss's metrics as means over the applied steps, and the update's speed."""
        rows = [
            {"loss": s.loss, "grad_norm": s.grad_norm, "learning_rate": s.learning_rate, **s.metrics}
            for s in self.steps
            if s.applied
        ]
        names = rows[0] if rows else {}
        means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
        moved = {} if self.kl is None else {"kl_from_update_start": self.kl.update, "kl_from_run_start": self.kl.run}
        return means | {
            **self.staleness,
            **moved,
            **({} if self.stopped_by is None else {"num_left_out": float(self.num_left_out)}),
            "num_steps": float(len(self.steps)),
            "num_skipped": float(self.num_skipped),
            "tokens_per_s": self.tokens_per_s,
            "padding_efficiency": self.padding_efficiency,
            "rank_balance": self.rank_balance,
        }


class TrainingGroup:
    """The ranks that train one role's weights. Calls are made one at a time."""

    def __init__(
        self,
        *,
        config: TrainingConfig,
        source: ModelSource,
        name: str = "learner_group",
        shared: PlacementGroup | None = None,
    ) -> None:
        """Describe the group; nothing starts yet.

        Args:
            config: ranks, optimizer and schedule.
            source: the weights that it starts from.
            name: for messages, and of its placement.
            shared: a gang with one bundle for each rank, whose GPUs it shares in turn; who placed it releases it.
        """
        self.config = config
        self.name = name
        self.start_laps: dict[str, float] = {}
        """Seconds of the slowest rank per part of the start."""
        self._source = source
        self._ranks: list[Any] = []
        self._infos: list[RankInfo] = []
        self._placement: PlacementGroup | None = None
        self._shared = shared
        self._published: str | None = None
        """The version that the ranks' weights are; None from the first step beyond it."""
        self._connected: set[int] = set()
        """Replicas that the ranks have met."""
        self._lock = asyncio.Lock()
        self._delivery = asyncio.Lock()

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Return the ids of the ranks' nodes, rank 0 first."""
        return tuple(info.node_id for info in self._infos)

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the ranks' process ids, rank 0 first."""
        return tuple(info.pid for info in self._infos)

    # ------------------------------------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Place the ranks, start them, and load the model.

        Raises:
            PlacementTimeout: the cluster has no room for all ranks at once.
            ValueError: the model directory is none, or has no weights.
            TrainingGroupError: a rank failed or the start took too long.
        """
        assert not self._ranks, "already started"
        config, begin = self.config, time.monotonic()
        bundle = rank_bundle(config)
        self._placement = self._shared or await asyncio.to_thread(
            place_gang,
            [bundle] * config.num_ranks,
            strategy="SPREAD" if config.arrangement == "spread" else "PACK",
            name=self.name,
            labels=label_selector(config.node_labels),
            timeout_s=config.start_deadline_s,
        )
        self._ranks = [self._start_rank(rank, bundle) for rank in range(config.num_ranks)]
        deadline_s = config.start_deadline_s
        self._infos = await self._on_all("info", [rank.info.remote() for rank in self._ranks], deadline_s=deadline_s)
        processes_s = time.monotonic() - begin
        host = self._infos[0].host
        ports = await self._on_all(
            "host_rendezvous",
            [self._ranks[0].host_rendezvous.remote(host=host, timeout_s=deadline_s)],
            deadline_s=deadline_s,
        )
        one_node = len({info.node_id for info in self._infos}) == 1
        rendezvous = Rendezvous(host=host, port=ports[0], one_node=one_node)
        laps = await self._on_all(
            "start",
            [
                rank.start.remote(config=config, source=self._source, rendezvous=rendezvous, timeout_s=deadline_s)
                for rank in self._ranks
            ],
            deadline_s=deadline_s,
        )
        self.start_laps = {"processes_s": processes_s, **{name: max(lap[name] for lap in laps) for name in laps[0]}}
        logger.info("%s: %d ranks in %.1f s %s", self.name, len(self._ranks), time.monotonic() - begin, self.start_laps)

    async def reopen(self, *, config: TrainingConfig, source: ModelSource) -> None:
        """Start anew in the same processes, from other weights or with other settings: optimizer and steps are fresh.

        Raises:
            ValueError: the ranks' number or resources differ: that takes a new group; or the model is none.
        """
        fixed = ("num_ranks", "threads_per_rank", "cpus_per_rank", "gpus_per_rank", "arrangement", "node_labels")
        differing = [name for name in fixed if getattr(config, name) != getattr(self.config, name)]
        if differing:
            raise ValueError(f"{self.name}: reopen can't change {', '.join(differing)}; start a new group")
        await self._call(
            "open",
            lambda rank: rank.open.remote(config=config, source=source),
            deadline_s=config.start_deadline_s,
        )
        self.config, self._source = config, source
        self._published, self._connected = None, set()

    async def shutdown(self) -> None:
        """End the ranks and give their place back. A second call does nothing."""
        if self._ranks:
            closing = [rank.close.remote() for rank in self._ranks]
            await asyncio.wait([asyncio.ensure_future(_awaited(ref)) for ref in closing], timeout=10.0)
        self._kill()

    def _start_rank(self, rank: int, bundle: dict[str, float]) -> Any:
        assert self._placement is not None, "placed above"
        actor = ray.remote(DeepSpeedRank).options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0) if self._shared is None else SHARED_GPU,
            scheduling_strategy=inside(self._placement, bundle=rank),
            max_restarts=0,
        )
        return actor.remote(rank=rank, num_ranks=self.config.num_ranks, threads=self.config.threads_per_rank)

    def _kill(self) -> None:
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        self._ranks = []
        self._published, self._connected = None, set()
        if self._placement is not None and self._shared is None:
            release(self._placement)
        self._placement = None

    # ------------------------------------------------------------------------------------------------------- calls

    async def update(
        self,
        table: pa.Table | ray.ObjectRef[pa.Table],
        *,
        loss: str,
        loss_config: Config,
        plan: TrainingPlan,
        importance: ImportanceConfig | None = None,
        reference_weights: ReferenceWeights = "start_of_update",
        kl_budget: KlBudget | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> UpdateReport:
        """Train on the rows of a table as planned; each rank reads the table from the object store.

        Args:
            table: `PreferencePair` rows for a loss of pairs or scores; `prompt_token_ids` and `response_token_ids` for
                a token loss; scored responses for a policy-gradient loss (`trainers.rows.samples`); groups of
                them for a loss of groups (`trainers.rows.groups`); for a loss of labels what a token loss takes.
            loss: a file of trainers/losses.
            loss_config: that loss's settings.
            plan: which rows make which step.
            importance: how pairs of older weights' samples are corrected for; None: not at all, and no gap is measured.
            reference_weights: whose log-probs the reference's are: the weights at the update's start, or "bootstrap":
                those that the group was opened with.
            kl_budget: how far the weights may go before the update's other steps are left out; None: as far as they do.
            on_step: called after each step, for progress.

        Raises:
            ValueError: no such loss, settings of another, or a table that does not fit.
            TrainingDiverged: three steps in a row were not finite; the group has been killed.
            TrainingGroupError: a rank died, failed or missed a deadline.
        """
        settings = _settings_of(loss, loss_config)
        begin = time.monotonic()
        self._published = None
        ref = TableRef(ref=ray.put(table) if isinstance(table, pa.Table) else table)
        said = await self._call(
            "begin_update",
            lambda rank: rank.begin_update.remote(
                ref,
                plan=plan,
                loss=loss,
                loss_config=settings,
                importance=importance,
                reference_weights=reference_weights,
                kl_budget=kl_budget,
            ),
            deadline_s=self.config.call_deadline_s,
        )
        reference_s = time.monotonic() - begin
        reports = await self._steps(len(plan.steps), on_step=on_step)
        slots = tuple(slot for report in reports if report.applied for slot in plan.slots(report.step))
        kl = _last_kl(reports, said[0])
        return UpdateReport(
            slots=slots,
            steps=tuple(reports),
            wall_s=time.monotonic() - begin,
            reference_s=reference_s,
            staleness=said[0],
            kl=kl,
            stopped_by=exceeded(kl, kl_budget) if len(reports) < len(plan.steps) and kl and kl_budget else None,
            num_left_out=len(plan.steps) - len(reports),
            num_ranks=self.config.num_ranks,
        )

    async def set_preference(self, preference: Sequence[float]) -> None:
        """Have everything that follows, updates and exports too, be of one trade-off between objectives.

        It is in no checkpoint: whoever loads one sets it again.

        Raises:
            ValueError: the group trains no layers of Panacea, or the vector is not in the simplex of their objectives.
        """
        vector = tuple(preference)
        self._published = None
        await self._call(
            "set_preference", lambda rank: rank.set_preference.remote(vector), deadline_s=self.config.call_deadline_s
        )

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
        """Return, for each sequence of n tokens, the log-probs (nats, fp32) of tokens 2..n, without dropout.

        Raises:
            ValueError: a sequence is shorter than two tokens or longer than the model takes.
        """
        plain = tuple(tuple(sequence) for sequence in sequences)
        parts = await self._call(
            "logprobs", lambda rank: rank.logprobs.remote(plain), deadline_s=self.config.call_deadline_s
        )
        found = {row: values for part in parts for row, values in part.items()}
        return tuple(found[row] for row in range(len(plain)))

    async def scores(self, sequences: Sequence[Sequence[int]]) -> tuple[float, ...]:
        """Return a reward model's score of each sequence, read at its last token, without dropout.

        Raises:
            ValueError: the group has no value head; or a sequence is shorter than two tokens or longer than the model
                takes.
        """
        plain = tuple(tuple(sequence) for sequence in sequences)
        parts = await self._call(
            "scores", lambda rank: rank.scores.remote(plain), deadline_s=self.config.call_deadline_s
        )
        found = {row: score for part in parts for row, score in part.items()}
        return tuple(found[row] for row in range(len(plain)))

    async def publish(self, *, version: str) -> WeightManifest:
        """Put the weights into the object store and return where they lie; they live as long as rank 0."""
        parts = await self._call(
            "publish", lambda rank: rank.publish.remote(version=version), deadline_s=self.config.call_deadline_s
        )
        manifest = parts[0]
        assert isinstance(manifest, WeightManifest), "rank 0 makes it"
        self._published = version
        return manifest

    async def deliver(self, actor: Any, weights: Weights, *, backend: Backend) -> WeightAnswer:
        """Send a published version straight from the ranks' memory to one replica, and return what that says of it.

        A version that the ranks have trained beyond goes by the object store, where `publish` put it.

        Args:
            actor: the replica's.
            weights: the version and its probe.
            backend: one of vLLM's own ways.

        Raises:
            ValueError: the replica refuses the version before anything is sent.
            TrainingGroupError: it failed in the middle; the group has been killed, for what was begun can't be ended.
        """
        manifest, probe = weights
        if manifest.version != self._published:
            answer: WeightAnswer = await actor.apply_weights.remote(manifest, probe.token_ids)
            return answer
        deadline_s = self.config.call_deadline_s
        async with self._delivery:
            opened: Opened = await actor.open_weights.remote(manifest)
            port = 0
            if opened.replica_id not in self._connected:
                (port,) = await self._on_all("free_port", [self._ranks[0].free_port.remote()], deadline_s=deadline_s)
            try:
                await self._call(
                    "send_weights",
                    lambda rank: rank.send_weights.remote(
                        actor,
                        backend=backend,
                        opened=opened,
                        host=self._infos[0].host,
                        port=port,
                        deadline_s=deadline_s,
                    ),
                    deadline_s=deadline_s,
                )
            except asyncio.CancelledError:
                # The replica missed its deadline: the ranks would go on sending, behind the next call's back.
                self._kill()
                raise
            self._connected.add(opened.replica_id)
        proof: WeightAnswer = await actor.prove_weights.remote(manifest.version, probe.token_ids)
        return proof

    async def offload(self) -> None:
        """Keep optimizer states, masters and gradients in the host's memory; nothing to do when no rank runs."""
        if self._ranks:
            await self._call("offload", lambda rank: rank.offload.remote(), deadline_s=self.config.call_deadline_s)

    async def reload(self) -> None:
        """Take them onto the GPUs again."""
        await self._call("reload", lambda rank: rank.reload.remote(), deadline_s=self.config.call_deadline_s)

    async def export(self, path: Any) -> None:
        """Write a Hugging Face directory (safetensors, config, tokenizer); it appears whole or not at all."""
        await self._call("export", lambda rank: rank.export.remote(str(path)), deadline_s=self.config.call_deadline_s)

    async def save(self, path: Any) -> tuple[FileDigest, ...]:
        """Write a checkpoint and return its files' digests, paths relative to it; it appears whole or not at all."""
        parts = await self._call(
            "save", lambda rank: rank.save.remote(str(path)), deadline_s=self.config.call_deadline_s
        )
        digests: tuple[FileDigest, ...] = parts[0]
        return digests

    async def load(self, path: Any, *, files: Sequence[FileDigest] | None = None) -> None:
        """Go on from a checkpoint, bit by bit as if nothing had been; its hashes are checked before it is read.

        Args:
            path: what `save` wrote.
            files: the digests it must have; by default those of the manifest inside it.

        Raises:
            CorruptCheckpoint: its files or its topology are not as saved; nothing was loaded.
        """
        wanted = None if files is None else tuple(files)
        self._published = None
        await self._call(
            "load", lambda rank: rank.load.remote(str(path), files=wanted), deadline_s=self.config.call_deadline_s
        )

    async def _steps(self, num_steps: int, *, on_step: Callable[[StepReport], None] | None) -> list[StepReport]:
        """Run all steps, the next ones asked for before the last have answered; the deadline is that of each call.

        Ranks that answer with fewer than were asked for have ended the update, and make no step that is asked for yet.
        """
        reports: list[StepReport] = []
        async with self._lock:
            asked: deque[tuple[int, list[ray.ObjectRef[list[StepReport]]]]] = deque()
            next_step, ended = 0, False
            try:
                while asked or (len(reports) < num_steps and not ended):
                    while len(asked) < STRETCHES_IN_FLIGHT and next_step < num_steps and not ended:
                        count = min(_stretch(reports), num_steps - next_step)
                        asked.append((count, [rank.steps.remote(next_step, count) for rank in self._ranks]))
                        next_step += count
                    count, refs = asked.popleft()
                    answers = await self._on_all("step", refs, deadline_s=self.config.step_deadline_s)
                    ended = len(answers[0]) < count
                    for report in answers[0]:
                        reports.append(report)
                        if on_step is not None:
                            on_step(report)
            except BaseException:
                # Steps asked for would go on behind the caller's back; what the ranks hold then is no state to keep.
                self._kill()
                raise
        return reports

    async def _call(self, what: str, call: Callable[[Any], ray.ObjectRef[Any]], *, deadline_s: float) -> list[Any]:
        async with self._lock:
            if not self._ranks:
                raise TrainingGroupError(f"{self.name}: {what}: the group is not running; start it, then load")
            return await self._on_all(what, [call(rank) for rank in self._ranks], deadline_s=deadline_s)

    async def _on_all(self, what: str, refs: Sequence[ray.ObjectRef[Any]], *, deadline_s: float) -> list[Any]:
        """Return every rank's answer; otherwise kill all ranks, unless all of them refused the user's input alike."""
        tasks = [asyncio.ensure_future(_awaited(ref)) for ref in refs]
        try:
            done, pending = await asyncio.wait(tasks, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
            if pending and any(task.exception() for task in done):
                done, pending = await asyncio.wait(tasks, timeout=SETTLE_S)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        errors = {rank: task.exception() for rank, task in enumerate(tasks) if task.done() and task.exception()}
        if not errors and not pending:
            return [task.result() for task in tasks]
        for task in pending:
            task.cancel()
        causes = {rank: _cause(error) for rank, error in errors.items() if error is not None}
        if not pending and len(causes) == len(tasks) and all(isinstance(c, ValueError) for c in causes.values()):
            raise causes[0]
        late = [rank for rank, task in enumerate(tasks) if task in pending]
        message = self._told(what, causes, late=late, deadline_s=deadline_s)
        self._kill()
        diverged = [cause for cause in causes.values() if isinstance(cause, TrainingDiverged)]
        raise diverged[0] if diverged else TrainingGroupError(message)

    def _told(self, what: str, causes: dict[int, BaseException], *, late: list[int], deadline_s: float) -> str:
        lines = [f"{self.name}: {what} failed; all ranks were killed"]
        # Deaths first: what the others then say of broken connections follows from them.
        for rank, cause in sorted(causes.items(), key=lambda item: not isinstance(item[1], RayActorError)):
            died = isinstance(cause, RayActorError)
            text = str(cause).strip().splitlines()
            end = "died" if died else "failed"
            lines.append(f"rank {rank} {end}: {type(cause).__name__}: {text[0] if text else ''}")
            if died and rank < len(self._infos):
                stderr = worker_stderr(pid=self._infos[rank].pid)
                lines += [f"rank {rank} stderr: {line}" for line in stderr.splitlines()]
        if late:
            lines.append(f"rank(s) {', '.join(map(str, late))}: no answer within {deadline_s:g} s")
        return "\n".join(lines)


def rank_bundle(config: TrainingConfig) -> dict[str, float]:
    """Return what one rank reserves."""
    bundle = {"CPU": config.cpus_per_rank, "GPU": config.gpus_per_rank}
    return {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001}


def _last_kl(reports: Sequence[StepReport], said: Mapping[str, float]) -> KlReached | None:
    """Return what was last measured: after a step, or before the first one; None without a budget."""
    found = [report.kl for report in reports if report.kl is not None]
    if found:
        return found[-1]
    return KlReached(update=0.0, run=said["kl_at_start"]) if "kl_at_start" in said else None


def _stretch(reports: Sequence[StepReport]) -> int:
    """Return how many steps the next call asks for, by how long the last one took."""
    return max(1, int(STRETCH_S / max(reports[-1].seconds, 1e-3))) if reports else 1


async def _awaited(ref: ray.ObjectRef[Any]) -> Any:
    return await ref


def _cause(error: BaseException) -> BaseException:
    """Return the exception that a rank raised, out of what Ray wraps it in."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, BaseException) else error


def _settings_of(loss: str, config: Config) -> Config:
    """Return the loss's own settings, without the `kind` that a run's config adds.

    Raises:
        ValueError: there is no such loss, or the settings are another's.
    """
    kind = load_loss(loss).Config
    values = config.model_dump()
    values.pop("kind", None)
    return kind.model_validate(values)
