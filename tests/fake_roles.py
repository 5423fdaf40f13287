"""Hand-written roles for the tests of the loop: every part outside the driver's folder, without Ray, vLLM or DeepSpeed.

Pools answer from what is asked and its seed alone, whatever the order of arrival, so that a run that was killed and
resumed can be compared with one that was not, number by number. The learner's only skill is its first weight: how
often it makes no mistake in a problem that carries. The learner group moves its weights by every applied slot, in a
way that depends on the order, so that a slot applied twice, left out or exchanged shows in the weights.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from actors.attacker import Attacker, AttackerConfig
from actors.attacks.quality_diversity import Config as AttackConfig
from actors.attacks.quality_diversity import QualityDiversity
from actors.critic import Critic, CriticConfig
from actors.domains import Checker, GoldLedger, Purpose
from actors.domains.arithmetic import (
    Arithmetic,
    ArithmeticChecker,
    count_carries,
    write_answer,
    write_critique,
    write_flawed_answer,
)
from actors.domains.arithmetic import Config as ArithmeticConfig
from actors.expert_desk import ExpertDesk
from actors.experts import ExpertBudget, ExpertQueue, SimulatedExpert, SimulatedExpertConfig
from actors.generation import Completion, GenerationRequest
from actors.oversight import Judged, OversightConfig, make_oversight
from actors.records import ExpertLabel
from actors.refiner import RefinementConfig, Refiner
from actors.rollout import Rollout, RolloutConfig
from actors.rubrics import StepMarks
from cluster.config import Config
from cluster.pool_errors import PoolExhausted
from cluster.store import RunStore
from cluster.weights import ParityProbe, WeightAnswer, WeightManifest, parity
from tests.fake_pool import spoken
from trainers.driver import Driver, DriverConfig, LoopConfig, Roles
from trainers.evaluation import EvaluationConfig, evaluation_sets
from trainers.feedback.batch_builder import BatchConfig
from trainers.feedback.objectives import ObjectivesConfig
from trainers.feedback.preferences import PreferenceConfig
from trainers.feedback.refinement import Refining
from trainers.feedback.reward_config import RewardConfig
from trainers.feedback.reward_model import RewardModel, read_response
from trainers.feedback.selection import SelectionConfig
from trainers.feedback.trade_offs import TradeOffs
from trainers.importance import ImportanceConfig
from trainers.kl import KlBudget
from trainers.loop_state import STAGES
from trainers.losses import kto, load_loss
from trainers.progress import Silent, StopSignal
from trainers.ranks.kl_probe import KlReached, exceeded
from trainers.training_config import ReferenceWeights
from trainers.training_group import StepReport, TrainingPlan, UpdateReport

RUN = "fake"
DOMAIN = Arithmetic(ArithmeticConfig())
NUM_WEIGHTS = 6
PROBE_SEQUENCES = ((1, 2, 3, 4), (5, 6))
SURE, UNSURE = 0.995, 0.6
"""P(label) that the fake critic gives to the label that it writes."""

Weights = tuple[float, ...]
Reach = Callable[[str, int], None]
"""Told how often a named point of the loop has been reached in the open iteration; tests kill there."""


def pass_by(point: str, num: int) -> None:
    """Reach a point and go on."""


class KillPoint:
    """Ends this process with SIGKILL when a point has been reached often enough, as a power failure would."""

    def __init__(self, point: str, *, num: int = 1) -> None:
        self._point = point
        self._left = num

    def __call__(self, point: str, num: int) -> None:
        if point == self._point:
            self._left -= num
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


def draw(*parts: object) -> float:
    """Return a number in [0, 1) that depends on the parts alone."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / (1 << 64)


# ------------------------------------------------------------------------------------------------------ the models


def write_query(request: GenerationRequest, *, num_problems: int = 40) -> str:
    """Return a problem of the cell that was asked for, of any split; some texts are junk, some out of scope."""
    rng = random.Random(request.seed)
    kind = rng.randrange(12)
    if kind == 0:
        return "7+"
    if kind == 1:
        return "1234+4321"
    cell = next(cell for cell in DOMAIN.cells() if DOMAIN.attack_messages(cell) == request.messages)
    split = rng.choice(["train", "train", "train", "probe", "sealed"])
    return DOMAIN.seeds(cell, split=split, num=1, seed=rng.randrange(num_problems))[0].text


def write_answer_with_skill(request: GenerationRequest, weights: Weights) -> str:
    """Return an answer that is right unless the problem carries and the learner's skill does not reach."""
    query = request.messages[-1].content
    op = "+" if "+" in query else "-"
    left, right = map(int, query.split(op))
    luck = draw("luck", query, request.seed)
    skill = 1.0 / (1.0 + math.exp(-weights[0]))
    if count_carries(left, op, right) == 0 or luck < skill:
        return write_answer(left, op, right)
    return write_flawed_answer(left, op, right, rng=random.Random(f"{query}/{request.seed}"))


class FakeCritic:
    """Writes true step-mark critiques, and false ones at a given rate; babbles when told to."""

    def __init__(self, *, error_rate: float = 0.1, unsure_rate: float = 0.2, babble_rate: float = 0.0) -> None:
        self._error_rate = error_rate
        self._unsure_rate = unsure_rate
        self._babble_rate = babble_rate

    def write(self, request: GenerationRequest) -> str:
        """Return a critique."""
        query, answer = request.messages[-1].content.split("\n")
        if draw("babble", query, answer) < self._babble_rate:
            return "?yyP?n"
        op = "+" if "+" in query else "-"
        left, right = map(int, query.split(op))
        critique = write_critique(left, op, right, answer)
        if draw("error", query, answer) >= self._error_rate:
            return critique
        if critique.endswith("F"):
            return "".join(f"{part}?{part}y" for part in answer.split(" ")) + "P"
        return critique.removesuffix("yP") + "nF"

    def good_logprobs(self, request: GenerationRequest, text: str) -> list[tuple[float, float]]:
        """Return the log-probs (nats) of the good and the bad label at each mark."""
        marks = [mark for mark in text if mark in request.labels]
        rows = []
        for place, mark in enumerate(marks):
            unsure = place == len(marks) - 1 and draw("unsure", *request.messages) < self._unsure_rate
            p = UNSURE if unsure else SURE
            good = math.log(p), math.log(1.0 - p)
            rows.append(good if mark in ("y", "P") else good[::-1])
        return rows


# ------------------------------------------------------------------------------------------------------- the pools


@dataclass(slots=True)
class Event:
    """Something that happened at a pool."""

    what: str
    """"asked" or "answered"."""
    pool: str
    request_id: str
    version: str


class FakeRolePool:
    """Stands for a `Pool` of one replica: answers in chunks, in an order drawn from `arrival_seed`."""

    def __init__(
        self,
        name: str,
        *,
        events: list[Event],
        arrival_seed: int,
        published: Mapping[str, Weights] | None = None,
        reach: Reach = pass_by,
    ) -> None:
        self.name = name
        self.events = events
        self.current: tuple[WeightManifest, ParityProbe] | None = None
        self.weights_lock = asyncio.Lock()
        self.held = ("initial", (0.0,) * NUM_WEIGHTS)
        self._rng = random.Random(f"{name}/{arrival_seed}")
        self._published = published
        self._reach = reach
        self._running: set[str] = set()
        self._num_tokens = 0
        self.losing: frozenset[str] = frozenset()
        """Pools that lose a tenth of their requests."""

    def say(self, request: GenerationRequest) -> Completion:
        """Return the answer to one request, of the weights held now."""
        raise NotImplementedError

    async def route(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[list[Completion]]:
        """Yield one completion per request, in chunks; refuses an id that is running, as `Pool.route` does."""
        names = [request.request_id for request in requests]
        if len(set(names)) != len(names) or self._running & set(names):
            raise ValueError(f"pool {self.name}: a request id occurs twice")
        self._running |= set(names)
        self.events += [Event("asked", self.name, name, self.held[0]) for name in names]
        lost = {name: "poison" for name in names if self.loses(name)}
        waiting = [request for request in requests if request.request_id not in lost]
        self._rng.shuffle(waiting)
        try:
            while waiting:
                await asyncio.sleep(0)
                chunk = [self.say(waiting.pop()) for _ in range(min(len(waiting), self._rng.randrange(1, 6)))]
                self._num_tokens += sum(len(completion.token_ids) for completion in chunk)
                self.events += [Event("answered", self.name, done.request_id, self.held[0]) for done in chunk]
                yield chunk
        finally:
            self._running -= set(names)
        if lost:
            raise PoolExhausted(f"pool {self.name}: {len(lost)} requests have no answer", reasons=lost)

    def loses(self, request_id: str) -> bool:
        """Return whether a request finds no answer, the same ones each time; evaluations are never lost."""
        return self.name in self.losing and "/" not in request_id and int(request_id, 16) % 10 == 0

    async def stats(self) -> Any:
        """Return what the driver reads of PoolStats."""
        return SimpleNamespace(num_generated_tokens=self._num_tokens)

    async def offer_weights(self, *, timeout_s: float) -> dict[int, float | Exception]:
        """Take the current weights and answer the parity probe, as the one replica of a pool."""
        assert self.current is not None, "sync_weights sets it first"
        assert self._published is not None, "only the rollout pool is synced"
        manifest, probe = self.current
        self._reach("sync", 1)
        weights = self._published[manifest.version]
        self.held = (manifest.version, weights)
        answer = WeightAnswer(version=manifest.version, logprobs=fake_logprobs(weights, probe.token_ids))
        return {0: parity(answer, version=manifest.version, probe=probe)}


class AttackerPool(FakeRolePool):
    """The attacker's model."""

    def say(self, request: GenerationRequest) -> Completion:
        """Return a problem, or what is none."""
        return spoken(write_query(request), request_id=request.request_id)


class RolloutPool(FakeRolePool):
    """The learner's model, with the weights last synced."""

    answer: Callable[[GenerationRequest, Weights], str] = staticmethod(write_answer_with_skill)
    as_sampled: Callable[[Completion], Completion] = staticmethod(lambda said: said)
    """`FakeLearnerGroup.as_sampled`."""

    def say(self, request: GenerationRequest) -> Completion:
        """Return an answer."""
        version, weights = self.held
        said = spoken(self.answer(request, weights), request_id=request.request_id, weight_version=version)
        return self.as_sampled(replace(said, prompt_token_ids=(*said.prompt_token_ids, *map(ord, request.prefix))))


class CriticPool(FakeRolePool):
    """The critic's model."""

    critic = FakeCritic()

    def say(self, request: GenerationRequest) -> Completion:
        """Return a critique."""
        text = self.critic.write(request)
        return spoken(
            text,
            request_id=request.request_id,
            labels=request.labels,
            good_logprobs=self.critic.good_logprobs(request, text),
        )


# ----------------------------------------------------------------------------------------------- the learner group


def fake_logprobs(weights: Weights, sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """Return, for each sequence of n tokens, n - 1 numbers that show every weight."""
    return tuple(
        tuple(-abs(sum(w * math.sin(i + token) for i, w in enumerate(weights, start=1))) for token in sequence[1:])
        for sequence in sequences
    )


def applied(weights: Weights, *, row_id: str, epoch: int, chosen: str) -> Weights:
    """Return the weights after one slot: they shrink a little, then move, so the order of slots matters."""
    moved = [0.999 * w + 0.01 * (draw(row_id, epoch, chosen, i) - 0.5) for i, w in enumerate(weights)]
    return (moved[0] + 0.05, *moved[1:])


LEARNT_FROM = {
    "dpo": ("pair_id", "chosen"),
    "rso": ("pair_id", "chosen"),
    "grpo": ("row_id", "score"),
    "kto": ("row_id", "desirable"),
    "exo_group": ("row_id", "rewards"),
    "pro": ("row_id", "rewards"),
    "weak_to_strong": ("row_id", "response_token_ids"),
    "pretraining": ("row_id", "loss_mask"),
}
"""For each loss its table's column of ids, and the one that weights move by."""


class FakeLearnerGroup:
    """Stands for a `TrainingGroup`: weights, a record of every slot ever applied, checkpoints and exports."""

    def __init__(
        self, *, reach: Reach = pass_by, loads: bool = True, step_s: float = 0.0, rollout_gaps: Sequence[float] = ()
    ) -> None:
        """`loads=False` is the broken group of a control: a resume that forgets to load the checkpoint."""
        self.weights: Weights = (-0.5, *(0.1 * i for i in range(1, NUM_WEIGHTS)))
        self.slots: list[tuple[str, int, int]] = []
        """(row id, epoch, step) of every slot in the lineage of these weights."""
        self.plans: list[TrainingPlan] = []
        self.published: dict[str, Weights] = {}
        self.preference: tuple[float, ...] | None = None
        self.preferred: list[tuple[str, tuple[float, ...] | None]] = []
        """What was called, and the preference vector that held."""
        self._num_steps = 0
        self.may_learn: asyncio.Event | None = None
        """What an update waits for; None: for nothing."""
        self._reach = reach
        self._loads = loads
        self._step_s = step_s
        self._rollout_gaps = iter(rollout_gaps)

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
        """Apply the slots of a plan to the weights; a KL budget is spent after the first step."""
        if self.may_learn is not None:
            await self.may_learn.wait()
        self.preferred.append(("update", self.preference))
        key, told = LEARNT_FROM[loss]
        assert isinstance(loss_config, load_loss(loss).Config)
        self.plans.append(plan)
        assert tuple(table.column(key).to_pylist()) == plan.row_ids
        chosen = dict(zip(plan.row_ids, map(str, table.column(told).to_pylist()), strict=True))
        reports: list[StepReport] = []
        reached = KlReached(update=11.5, run=12.0) if kl_budget is not None and kl_budget.enabled else None
        stops = reached is not None
        for index, step in enumerate(plan.steps[:1] if stops else plan.steps):
            await asyncio.sleep(self._step_s)
            for slot in plan.slots(index):
                self.weights = applied(self.weights, row_id=slot.row_id, epoch=slot.epoch, chosen=chosen[slot.row_id])
                self.slots.append((slot.row_id, slot.epoch, slot.step))
            report = step_report(index, epoch=step.epoch, optimizer_step=self._num_steps)
            reports.append(replace(report, metrics=side_ratio(table, loss_config)))
            self._num_steps += 1
            self._reach("step", 1)
        slots = tuple(slot for index in range(len(reports)) for slot in plan.slots(index))
        gap = next(self._rollout_gaps, None)
        return UpdateReport(
            slots=slots,
            steps=tuple(reports),
            wall_s=0.1,
            reference_s=0.0,
            kl=reached,
            stopped_by=None if reached is None or kl_budget is None else exceeded(reached, kl_budget),
            num_left_out=len(plan.steps) - len(reports),
            staleness={} if gap is None else {"rollout_gap": gap},
        )

    def as_sampled(self, said: Completion) -> Completion:
        """Return what the rollout engine says with the log-probs that it has by these weights; here any will do."""
        return said

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
        """Return the log-probs of sequences."""
        return fake_logprobs(self.weights, sequences)

    async def set_preference(self, preference: Sequence[float]) -> None:
        """Have what follows be of one vector."""
        self.preference = tuple(preference)

    async def publish(self, *, version: str) -> WeightManifest:
        """Publish the weights under a version."""
        self._reach("publish", 1)
        self.preferred.append((f"publish {version}", self.preference))
        self.published[version] = self.weights
        return WeightManifest(version=version, tensors=(), buckets=())

    async def export(self, path: Path) -> None:
        """Write a policy directory; it appears whole or not at all."""
        self._reach("export", 1)
        self.preferred.append((f"export {path.name}", self.preference))
        _write_whole(path, {"policy.json": json.dumps([w.hex() for w in self.weights])})

    async def save(self, path: Path) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        self._reach("save", 1)
        body = {"weights": [w.hex() for w in self.weights], "slots": self.slots, "num_steps": self._num_steps}
        _write_whole(path, {"learner.json": json.dumps(body)})

    async def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        body = json.loads((path / "learner.json").read_text())
        if self._loads:
            self.weights = tuple(float.fromhex(w) for w in body["weights"])
            self.slots = [(row_id, epoch, step) for row_id, epoch, step in body["slots"]]
            self._num_steps = body["num_steps"]


class FakeRewardGroup:
    """Stands for a reward model's `TrainingGroup`: weights, a record of every slot ever applied, and scores by both."""

    def __init__(self, *, reach: Reach = pass_by) -> None:
        self.weights: Weights = (0.0,) * NUM_WEIGHTS
        self.slots: list[tuple[str, int, int]] = []
        self._reach = reach

    async def update(self, table: pa.Table, *, loss: str, loss_config: Config, plan: TrainingPlan) -> UpdateReport:
        """Apply the slots of a plan to the weights."""
        assert loss == "bradley_terry"
        assert tuple(table.column("pair_id").to_pylist()) == plan.row_ids
        chosen = dict(zip(plan.row_ids, map(str, table.column("chosen_token_ids").to_pylist()), strict=True))
        slots = [slot for step in range(len(plan.steps)) for slot in plan.slots(step)]
        for slot in slots:
            self.weights = applied(self.weights, row_id=slot.row_id, epoch=slot.epoch, chosen=chosen[slot.row_id])
            self.slots.append((slot.row_id, slot.epoch, slot.step))
        self._reach("reward step", 1)
        step = replace(step_report(), metrics={"accuracy": 0.5})
        return UpdateReport(slots=tuple(slots), steps=(step,), wall_s=0.1, reference_s=0.0)

    async def scores(self, sequences: Sequence[Sequence[int]]) -> tuple[float, ...]:
        """Return a score of each sequence, which shows every weight."""
        return tuple(sum(logprobs) for logprobs in fake_logprobs(self.weights, sequences))

    async def save(self, path: Path) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        _write_whole(
            path, {"reward.json": json.dumps({"weights": [w.hex() for w in self.weights], "slots": self.slots})}
        )

    async def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        body = json.loads((path / "reward.json").read_text())
        self.weights = tuple(float.fromhex(w) for w in body["weights"])
        self.slots = [(row_id, epoch, step) for row_id, epoch, step in body["slots"]]


def side_ratio(table: pa.Table, loss_config: Config) -> dict[str, float]:
    """Return what kto says of how it weighs the two sides of a table whose rows all weigh 1; {} of other losses."""
    if not isinstance(loss_config, kto.Config):
        return {}
    thumbs = table.column("desirable").to_pylist()
    num_good, num_bad = thumbs.count(True), thumbs.count(False)
    good, bad = kto.side_weights(loss_config, num_desirable=num_good, num_undesirable=num_bad)
    return {"side_ratio": good * num_good / (bad * num_bad)} if num_good and num_bad else {}


def step_report(step: int = 0, *, epoch: int = 0, optimizer_step: int = 0) -> StepReport:
    """Return what a step of a learner group reports."""
    return StepReport(
        step=step,
        epoch=epoch,
        optimizer_step=optimizer_step,
        applied=True,
        loss=0.7,
        grad_norm=1.0,
        learning_rate=1e-4,
        num_tokens=10,
        num_padded_tokens=12,
        num_unpadded_tokens=10,
        most_tokens=10,
        metrics={},
        seconds=0.0,
    )


def _write_whole(path: Path, files: Mapping[str, str]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for name, text in files.items():
        (beside / name).write_text(text)
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)


# ------------------------------------------------------------------------------------------- store, experts, driver


class WatchedStore(RunStore):
    """A real store that tells of every stage's rows when they are durable, and of every step of a commit."""

    reach: Reach = staticmethod(pass_by)

    @classmethod
    def of(cls, path: Path, *, reach: Reach) -> WatchedStore:
        """Open the run at `path`."""

        def on_step(name: str) -> None:
            reach(f"commit {store.iteration}: {name}", 1)

        store = cls.open(path, on_step=on_step)
        store.reach = reach  # type: ignore[method-assign, assignment]
        return store

    async def append_all(self, tables: Mapping[str, pa.Table], *, iteration: int | None = None) -> None:
        """Append stage by stage, and tell after each: a kill may come between any two."""
        number = self.iteration if iteration is None else iteration
        for stage, table in tables.items():
            await RunStore.append_all(self, {stage: table}, iteration=number)
            self.reach(f"{stage} {number}", table.num_rows)


class WatchedDesk(ExpertDesk):
    """A real desk that tells when the experts have answered, before anyone has seen what."""

    reach: Reach = staticmethod(pass_by)

    def ask(self, cases: Sequence[Judged]) -> Mapping[str, ExpertLabel]:
        """Ask, then tell."""
        labels = ExpertDesk.ask(self, cases)
        self.reach("experts", 1)
        return labels


def write_blank_run(path: Path) -> Path:
    """Create a run in which nothing has happened; copies of it save each run the second that describes the machine."""
    ids = {stage: column for stage, (_, column) in STAGES.items()}
    RunStore.create(path, config={"name": RUN}, id_columns=ids).close()
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a test varies of a run; 10 queries of 4 answers give 2 expert labels per iteration at 5 %."""

    iterations: int = 2
    queries_per_iteration: int = 10
    num_samples: int = 4
    attack_set: int = 6
    agreement_sample: int = 30
    batch_size: int = 2
    epochs: int = 2
    oversight: str = "escalation"
    budget: float = 0.05
    critic: FakeCritic = field(default_factory=FakeCritic)
    arrival_seed: int = 0
    loads: bool = True
    answer: Callable[[GenerationRequest, Weights], str] = write_answer_with_skill
    """What the learner answers with its weights."""
    losing: frozenset[str] = frozenset()
    """Names of the pools that lose a tenth of their requests."""
    max_policy_age: int = 0
    reward: RewardConfig | None = None
    """A reward model's, with whose scores the learner is trained by grpo; None: by `loss`."""
    loss: str = "dpo"
    loss_config: Config | None = None
    """Its settings; None: its own defaults."""
    kl_budget: KlBudget = field(default_factory=KlBudget)
    step_s: float = 0.0
    """How long the learner group takes for a step."""
    rollout_gaps: tuple[float, ...] = ()
    """What each update finds between the two engines' log-probs (nats per token); none where there is no more."""
    calibration: float = 0.0
    preferences: PreferenceConfig = field(default_factory=PreferenceConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    objectives: ObjectivesConfig | None = None
    refinement: RefinementConfig | None = None
    trade_offs: bool = False
    """Whether the learner is trained for all trade-offs between the objectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRun:
    """A driver and everything around it."""

    driver: Driver
    store: WatchedStore
    queue: ExpertQueue
    group: FakeLearnerGroup
    stop: StopSignal
    gold: GoldLedger
    events: list[Event]

    def close(self) -> None:
        """Give the run directory free."""
        self.queue.close()
        self.store.close()

    def finish(self) -> None:
        """Run to the end and close."""
        try:
            asyncio.run(self.driver.run())
        finally:
            self.close()


def fake_run(
    path: Path,
    settings: Settings,
    *,
    reach: Reach = pass_by,
    checker: Checker | None = None,
    stop: StopSignal | None = None,
    group: FakeLearnerGroup | None = None,
    config: DriverConfig | None = None,
) -> FakeRun:
    """Return a driver over fake roles and a real run directory, blank or to be resumed.

    Args:
        path: the run directory.
        settings: what the test varies.
        reach: told of every point that is reached.
        checker: who knows the truth; None: the domain's.
        stop: asks the loop to end; None: nobody does.
        group: the learner's; None: one that moves a few numbers.
        config: what the driver is told; None: what the settings say.
    """

    def tell(point: str, num: int) -> None:
        # Points inside an iteration are named with it: "responses 1", "step 2".
        reach(point if point.startswith("commit") or point[-1].isdigit() else f"{point} {store.iteration}", num)

    store = WatchedStore.of(path, reach=tell)

    gold = GoldLedger(checker or ArithmeticChecker(), regime="critic_expert")
    events: list[Event] = []
    group = group or FakeLearnerGroup(
        reach=tell, loads=settings.loads, step_s=settings.step_s, rollout_gaps=settings.rollout_gaps
    )
    attacker = AttackerPool("attacker", events=events, arrival_seed=settings.arrival_seed)
    rollouts = RolloutPool(
        "rollouts", events=events, arrival_seed=settings.arrival_seed, published=group.published, reach=tell
    )
    critic = CriticPool("critic", events=events, arrival_seed=settings.arrival_seed)
    critic.critic = settings.critic
    rollouts.answer = settings.answer  # type: ignore[method-assign]
    rollouts.as_sampled = group.as_sampled  # type: ignore[method-assign]
    for pool in (attacker, rollouts, critic):
        pool.losing = settings.losing
    queue = ExpertQueue(path / "labels" / "queue.sqlite3")
    desk = WatchedDesk(queue, SimulatedExpert(gold.checker_for(Purpose.EXPERT), config=SimulatedExpertConfig()))
    desk.reach = tell  # type: ignore[method-assign, assignment]
    stop = stop or StopSignal()
    judge = Critic(
        critic,  # type: ignore[arg-type]
        rubric=StepMarks(DOMAIN),
        config=CriticConfig(),
        run=RUN,
        seed=3,
    )
    driver = Driver(
        run=RUN,
        seed=3,
        roles=Roles(
            attacker=Attacker(
                attacker,  # type: ignore[arg-type]
                attack=QualityDiversity(AttackConfig(), domain=DOMAIN),
                attack_name="quality_diversity",
                domain=DOMAIN,
                config=AttackerConfig(),
                run=RUN,
                seed=3,
            ),
            rollout=Rollout(
                rollouts,  # type: ignore[arg-type]
                config=RolloutConfig(num_samples=settings.num_samples),
                run=RUN,
                seed=3,
            ),
            critic=judge,
            refining=None if settings.refinement is None else _refining(settings, rollouts, judge),
            oversight=make_oversight(
                OversightConfig(kind=settings.oversight, calibration=settings.calibration),  # type: ignore[arg-type]
                domain=DOMAIN,
                seed=3,
            ),
            experts=desk,
            learner_group=group,  # type: ignore[arg-type]
            pools={"attacker": attacker, "rollouts": rollouts, "critic": critic},  # type: ignore[dict-item]
            reward_model=(
                None
                if settings.reward is None
                else RewardModel(
                    FakeRewardGroup(reach=tell),  # type: ignore[arg-type]
                    config=settings.reward,
                    read=read_response,
                    run=RUN,
                    seed=3,
                )
            ),
        ),
        store=store,
        domain=DOMAIN,
        gold=gold,
        config=config or _driver_config(settings),
        progress=Silent(),
        stop=stop,
    )
    return FakeRun(driver=driver, store=store, queue=queue, group=group, stop=stop, gold=gold, events=events)


def _refining(settings: Settings, pool: FakeRolePool, critic: Critic) -> Refining:
    assert settings.refinement is not None
    return Refining(
        refiner=Refiner(
            pool,
            config=settings.refinement,
            max_tokens=RolloutConfig().max_tokens,
            encode=lambda text: tuple(map(ord, text)),
            run=RUN,
            seed=3,
        ),
        critic=critic,
        preferences=settings.preferences,
        min_agreement=settings.selection.min_agreement,
        max_age=settings.max_policy_age,
        tokens_spanning=lambda ids, num_chars: min(num_chars, len(ids)),
        run=RUN,
        seed=3,
    )


def _driver_config(settings: Settings) -> DriverConfig:
    evaluation = EvaluationConfig(
        sealed_per_cell=1,
        probe_per_cell=1,
        out_of_distribution_per_cell=1,
        attack_set=settings.attack_set,
        agreement_sample=settings.agreement_sample,
    )
    return DriverConfig(
        loop=LoopConfig(
            iterations=settings.iterations,
            queries_per_iteration=settings.queries_per_iteration,
            max_policy_age=settings.max_policy_age,
            epochs=settings.epochs,
            kl_budget=settings.kl_budget,
        ),
        batch=BatchConfig(
            loss=(loss := settings.loss if settings.reward is None else "grpo"),
            loss_config=settings.loss_config or load_loss(loss).Config(),
            preferences=settings.preferences,
            selection=settings.selection,
            objectives=settings.objectives,
            trade_offs=(
                TradeOffs(fixed=settings.objectives.weights, seed=3)
                if settings.trade_offs and settings.objectives is not None
                else TradeOffs()
            ),
            tokens_spanning=lambda ids, num_chars: min(num_chars, len(ids)),
        ),
        evaluation=evaluation,
        evaluation_sets=evaluation_sets(DOMAIN, evaluation),
        probe_sequences=PROBE_SEQUENCES,
        experts=ExpertBudget(fraction=settings.budget),
        batch_size=settings.batch_size,
    )
