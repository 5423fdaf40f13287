"""Owns one rank of a training group: its updates, step by step, in a process of its own.

    DeepSpeedRank ──► RankModel    engine, adapter, first weights     rank_model.py
                  ├─► Passes       forward passes over rows           passes.py
                  ├─► WeightsOut   to replicas, to a directory        weights_out.py
                  └─► Checkpoints  saved, checked, resized            checkpoints.py

DeepSpeed itself is imported by trainers/ranks/deepspeed_engine.py alone. Knows nothing of who calls it
(trainers/training_group.py) or of what the rows mean (trainers/rows/).

Every method that computes is a collective: all ranks must be called alike.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from actors.receiving import Opened
from cluster.config import Config
from cluster.durable_files import FileDigest
from cluster.weight_transfer import Backend
from cluster.weights import WeightManifest
from trainers.batches import TrainingPlan
from trainers.importance import ImportanceConfig
from trainers.kl import KlBudget
from trainers.losses import (
    GroupBatch,
    LabelBatch,
    Loss,
    LossOutput,
    PairBatch,
    ScoreBatch,
    SmoothedLoss,
    TokenBatch,
    TwoPassLoss,
    UnpairedBatch,
    load_loss,
)
from trainers.policy_gradient import PolicyLoss
from trainers.ranks.checkpoints import Checkpoints
from trainers.ranks.collectives import all_sum, on_all
from trainers.ranks.deepspeed_engine import import_deepspeed, join_deepspeed, put_aside
from trainers.ranks.kl_probe import KlProbe, KlReached, probe_rows
from trainers.ranks.model_source import ModelSource
from trainers.ranks.panacea import set_preference
from trainers.ranks.passes import Forward, Passes
from trainers.ranks.rank_model import RankModel
from trainers.ranks.rendezvous import Rendezvous, join, meet_by, node_address, tcp_store
from trainers.ranks.sequence_scores import refuse_headless
from trainers.ranks.update_start import (
    ComparedRows,
    Reference,
    at_price,
    corrected,
    estimated,
    next_price,
    refuse_other_rows,
    rows_for,
    temperature_of,
)
from trainers.ranks.weights_out import WeightsOut
from trainers.rows import Padded, Rows, Totals
from trainers.rows.documents import TokenRows, sequence_rows
from trainers.rows.labels import LabelRows, item_places
from trainers.rows.pairs import PairRows
from trainers.rows.samples import SampleRows, sample_rows
from trainers.rows.unpaired import UnpairedRows
from trainers.training_config import ReferenceWeights, TrainingConfig, learning_rate

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 3
"""Steps in a row with a loss or gradient that is not finite, after which training ends."""


class TrainingDiverged(RuntimeError):
    """Several steps in a row had a loss or gradient that is not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """Where a rank runs."""

    rank: int
    node_id: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRef:
    """A table in the object store; inside a dataclass Ray passes the reference on, and each rank fetches it itself."""

    ref: ray.ObjectRef[pa.Table]

    def fetch(self) -> pa.Table:
        """Return the table."""
        return ray.get(self.ref)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step, the same on every rank."""

    step: int
    """Position in the update's plan."""
    epoch: int
    optimizer_step: int
    """Counted from 0 over the group's life, checkpoints included."""
    applied: bool
    """False when loss or gradient was not finite: the weights are as before."""
    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Before clipping; infinite or NaN when not applied."""
    learning_rate: float
    num_tokens: int
    """Real tokens of the batch, prompts included."""
    num_padded_tokens: int
    """Tokens computed, padding included."""
    num_unpadded_tokens: int
    """Tokens computed, without it: `num_tokens`, but a prompt that is computed once for two responses counts once."""
    most_tokens: int
    """Real tokens of the rank that had most of them: the others wait for it."""
    metrics: dict[str, float]
    """What the loss reports."""
    seconds: float
    kl: KlReached | None = None
    """How far the update has moved the weights; None where it was not measured after this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    plan: TrainingPlan
    loss: Loss
    loss_config: Config
    rows: Rows
    reference: Tensor | None
    """[rows, K] fp32: the reference's summed log-probs of a row's responses (update_start.Reference)."""
    mismatched: tuple[Tensor, ...] = ()
    """Of an unpaired loss, for each step, [its rows, 1] fp32: the same of `UnpairedRows.mismatched`."""
    probe: KlProbe | None = None
    """None: nobody asks how far it moves the weights."""

    @property
    def temperature(self) -> float:
        """Return that at which log-probs are taken: the sampling's, where the loss learns from samples."""
        return temperature_of(self.loss_config)


class DeepSpeedRank:
    """One rank; a Ray actor."""

    def __init__(self, *, rank: int, num_ranks: int, threads: int) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        torch.set_num_threads(threads)
        self._store: Any = None
        self._update: _Update | None = None
        self._is_open = False

    # ------------------------------------------------------------------------------------------------------- start

    def info(self) -> RankInfo:
        """Return where this rank runs."""
        return RankInfo(
            rank=self._rank,
            node_id=ray.get_runtime_context().get_node_id(),
            host=node_address(),
            pid=os.getpid(),
        )

    def host_rendezvous(self, *, host: str, timeout_s: float) -> int:
        """Open the store at which the ranks meet and return its port; for rank 0."""
        # Port 0: the system picks one and the store holds it from then on, so nobody can take it in between.
        self._store = tcp_store(host, 0, num_ranks=self._num_ranks, is_master=True, timeout_s=timeout_s)
        return int(self._store.port)

    def start(
        self, *, config: TrainingConfig, source: ModelSource, rendezvous: Rendezvous, timeout_s: float
    ) -> dict[str, float]:
        """Import DeepSpeed, meet the other ranks, build the engine; return the seconds that each took."""
        clock = _Clock()
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        meet_by(rendezvous, rank=self._rank, num_ranks=self._num_ranks, on_gpu=self._device.type == "cuda")
        import_deepspeed()
        clock.lap("import_deepspeed_s")
        from transformers import AutoModelForCausalLM  # noqa: F401 - so that a lap shows its seconds

        clock.lap("import_transformers_s")
        self._store = join(
            rendezvous,
            store=self._store,
            rank=self._rank,
            num_ranks=self._num_ranks,
            backend="nccl" if self._device.type == "cuda" else "gloo",
            timeout_s=timeout_s,
        )
        join_deepspeed(timeout_s=timeout_s)
        clock.lap("rendezvous_s")
        self.open(config=config, source=source)
        clock.lap("engine_s")
        return clock.laps

    def open(self, *, config: TrainingConfig, source: ModelSource) -> None:
        """Build the engine: model, optimizer, nothing carried over from an engine before it.

        Raises:
            ValueError: the directory is no model, or has no weights and no `init_seed` was given.
        """
        self._close_model()
        self._num_steps = 0
        self._num_bad_steps = 0
        self._kl_coefficient: float | None = None
        self._update = None
        self._model = RankModel(
            rank=self._rank, num_ranks=self._num_ranks, device=self._device, config=config, source=source
        )
        self._passes = Passes(self._model)
        self._out = WeightsOut(self._model)
        self._checkpoints = Checkpoints(self._model)
        self._is_open = True

    # ------------------------------------------------------------------------------------------------------ update

    def begin_update(
        self,
        table: TableRef,
        *,
        plan: TrainingPlan,
        loss: str,
        loss_config: Config,
        importance: ImportanceConfig | None = None,
        reference_weights: ReferenceWeights = "start_of_update",
        kl_budget: KlBudget | None = None,
    ) -> dict[str, float]:
        """Fetch the table and compute the reference's log-probs: with the weights as they are now, or the first ones.

        Returns what they say of the samples' staleness (`trainers.importance`): nothing where the table does not say
        how its samples came about. Of scored samples it is what their scores and log-probs come to; how they are
        corrected for is the loss's own setting.

        Raises:
            ValueError: the table does not fit the plan, the loss or the model's longest sequence.
        """
        # An update that a KL budget ended is still here, with its probe's [tokens, V]; two would not have room.
        self._update = None
        arrow = table.fetch()
        refuse_other_rows(arrow, plan)
        priced = at_price(loss_config, self._kl_coefficient)
        said = self._prepare(
            arrow, plan=plan, loss=loss, loss_config=priced, importance=importance, reference_weights=reference_weights
        )
        assert self._update is not None, "made by _prepare"
        self._kl_coefficient, price = next_price(priced, said, num_samples=len(plan.row_ids))
        moved: dict[str, float] = {}
        if kl_budget is not None and kl_budget.enabled:
            probe = self._probe(self._update, kl_budget)
            self._update = replace(self._update, probe=probe)
            moved = {"kl_at_start": self._kl_reached(self._update, probe).run}
        return {**said, **price, **moved, **self._cache_figures()}

    def _prepare(
        self,
        arrow: pa.Table,
        *,
        plan: TrainingPlan,
        loss: str,
        loss_config: Config,
        importance: ImportanceConfig | None,
        reference_weights: ReferenceWeights,
    ) -> dict[str, float]:
        """Make the update's rows, and what is known of them before its first step."""
        module = load_loss(loss)
        by_reference = self._passes.by_first_weights if reference_weights == "bootstrap" else nullcontext
        said: dict[str, float] = {}
        if isinstance(module, PolicyLoss):
            samples = sample_rows(arrow)
            self._model.refuse_long(samples)
            if reference_weights == "bootstrap" and samples.reference_logprobs is None:
                with by_reference():
                    logprobs, *_ = self._passes.of_samples(samples, plan, temperature=temperature_of(loss_config))
                samples = replace(samples, reference_logprobs=logprobs)
            samples, said = self._estimated(samples, plan, module, loss_config)
            self._update = _Update(plan=plan, loss=module, loss_config=loss_config, rows=samples, reference=None)
            return said
        if module.batch is ScoreBatch:
            refuse_headless(self._model.config)
        rows = rows_for(module, arrow, name=loss)
        self._model.refuse_long(rows)
        gaps = isinstance(rows, ComparedRows) and rows.rollout_logprobs is not None and importance is not None
        # What a sample's age is corrected by is always of the weights that are to be trained.
        at_start = gaps or (module.uses_reference and reference_weights == "start_of_update")
        reference = self._passes.reference(rows, plan) if at_start else None
        if isinstance(rows, ComparedRows):
            if reference is None:
                reference = Reference.nothing(rows)
            if importance is not None and rows.rollout_logprobs is not None:
                rows, said = corrected(rows, reference, importance)
        mismatched: tuple[Tensor, ...] = ()
        with by_reference():
            if module.uses_reference and reference_weights == "bootstrap":
                reference = self._passes.reference(rows, plan)
            if isinstance(rows, UnpairedRows):
                mismatched = tuple(
                    self._passes.logprobs_of_rows(rows.mismatched(step.rows), [range(len(step.rows))]).sums
                    for step in plan.steps
                )
        if isinstance(rows, UnpairedRows):
            said |= {"num_desirable": rows.num_desirable, "num_undesirable": rows.num_undesirable}
        sums = None if reference is None else reference.sums
        self._update = _Update(
            plan=plan, loss=module, loss_config=loss_config, rows=rows, reference=sums, mismatched=mismatched
        )
        return said

    def steps(self, first: int, count: int) -> list[StepReport]:
        """Make some optimizer steps of the update, one after the other; the last of all ends it.

        Raises:
            TrainingDiverged: a third step in a row had a loss or gradient that is not finite.
        """
        assert self._update is not None, "begin_update comes first"
        update, reports = self._update, []
        for index in range(first, first + count):
            if update.probe is not None and update.probe.spent:
                break
            report = self._step(update, index)
            if update.probe is not None and update.probe.is_due(index, is_last=index + 1 == len(update.plan.steps)):
                report = replace(report, kl=self._kl_reached(update, update.probe))
            reports.append(report)
        if first + count == len(update.plan.steps):
            self._update = None  # its rows are needed no longer
        return reports

    def _probe(self, update: _Update, budget: KlBudget) -> KlProbe:
        """Return what measures how far an update moves the weights."""
        rows = probe_rows(update.rows, update.plan, num_sequences=budget.num_sequences)
        start = list(self._passes.distributions(rows, update.temperature))
        first = None
        if self._num_steps > 0:
            with self._passes.by_first_weights():
                first = list(self._passes.distributions(rows, update.temperature))
        return KlProbe(budget, rows, start=start, first=first)

    def _kl_reached(self, update: _Update, probe: KlProbe) -> KlReached:
        sums = probe.sums(list(self._passes.distributions(probe.rows, update.temperature))).to(self._device)
        dist.all_reduce(sums)
        return probe.note(sums.cpu())

    def _cache_figures(self) -> dict[str, float]:
        """Return how many of the reference's sequences were asked for, and the share that was known; {} without any."""
        asked, found = map(sum, zip(*on_all([self._model.first.cache.counts()]), strict=True))
        return {"reference_sequences": float(asked), "reference_cached_share": found / asked} if asked else {}

    def _step(self, update: _Update, index: int) -> StepReport:
        begin, planned = time.monotonic(), update.plan.steps[index]
        totals = update.rows.totals(planned.rows)
        micros = self._passes.micro_batches(update.rows, planned.rows)
        figures = self._first_pass(update, index, totals)
        if not self._model.engine.training:
            self._model.engine.train()
        sums: dict[str, float] = {}
        for i, micro in enumerate(micros):
            is_last = i == len(micros) - 1
            padded = update.rows.pad(micro.rows, num_passes=micro.num_passes)
            forward = self._passes.forward(
                padded,
                temperature=update.temperature,
                scored=update.loss.batch is ScoreBatch,
                labelled=isinstance(update.rows, LabelRows),
                means=isinstance(update.loss, SmoothedLoss) and update.loss.reads_means(update.loss_config),
            )
            batch = self._batch(update, micro.rows, forward, totals)
            if isinstance(batch, LabelBatch):
                batch = replace(batch, progress=update.plan.progress(index))
            if figures is not None:
                assert not isinstance(batch, PairBatch | GroupBatch | ScoreBatch), "none of these looks at a step twice"
                batch = replace(batch, step_figures=figures)
            output = update.loss.loss(batch, update.loss_config)
            _add(sums, output, forward.padded)
            loss = output.loss
            if is_last:
                # Asked for here and waited for after the step: in between the ranks meet anyway, over the gradients.
                own = {f"num_tokens/{rank}": sums["num_tokens"] * (rank == self._rank) for rank in self._ranks()}
                total = all_sum({**sums, **own}, device=self._device)
                if not math.isfinite(sums["loss"]):
                    # Every rank must skip the step, also one whose own numbers are sound: a gradient that one rank has
                    # poisoned is poisoned on all, and every ZeRO stage recognises it. By way of all log-probs: padding
                    # that weighs nothing has none of its own in the loss.
                    loss = loss + math.nan * forward.logprobs.sum()
            self._model.engine.set_gradient_accumulation_boundary(is_last)
            # DeepSpeed averages gradients over ranks; ours are shares of the global mean, to be summed.
            self._model.engine.backward(loss * self._num_ranks)
        rate = learning_rate(self._model.config, step=self._num_steps)
        applied, grad_norm = self._apply(rate)
        sums = total()
        most = max(sums.pop(f"num_tokens/{rank}") for rank in self._ranks())
        report = StepReport(
            step=index,
            epoch=planned.epoch,
            optimizer_step=self._num_steps,
            applied=applied,
            loss=sums.pop("loss"),
            grad_norm=grad_norm,
            learning_rate=rate,
            num_tokens=round(sums.pop("num_tokens")),
            num_padded_tokens=round(sums.pop("num_padded_tokens")),
            num_unpadded_tokens=round(sums.pop("num_unpadded_tokens")),
            most_tokens=round(most),
            metrics=sums,
            seconds=time.monotonic() - begin,
        )
        self._count_step(report)
        return report

    def _ranks(self) -> range:
        return range(self._num_ranks)

    def _batch(
        self, update: _Update, micro: tuple[int, ...], forward: Forward, totals: Totals
    ) -> PairBatch | UnpairedBatch | TokenBatch | GroupBatch | ScoreBatch | LabelBatch:
        rows, logprobs, mask = update.rows, forward.logprobs, forward.mask
        if isinstance(rows, SampleRows):
            return rows.batch(micro, logprobs=logprobs, mask=mask, totals=totals, values=forward.values)
        if isinstance(rows, TokenRows):
            return rows.batch(micro, logprobs=logprobs, mask=mask, totals=totals, mean_logprobs=forward.mean_logprobs)
        if isinstance(rows, LabelRows):
            token_ids = forward.padded.token_ids.to(self._device)
            return rows.batch(micro, logits=logprobs, token_ids=token_ids, mask=mask, totals=totals)
        assert isinstance(rows, ComparedRows), "there are no other rows"
        if update.loss.batch is ScoreBatch:
            assert isinstance(rows, PairRows), "scores are of pairs"
            return rows.score_batch(micro, scores=logprobs[:, 0], totals=totals)
        assert update.reference is not None, "begin_update makes one for all rows that are left"
        reference = (update.reference[list(micro)] if micro else torch.zeros(1, rows.num_responses)).to(self._device)
        return rows.batch(micro, logprobs=logprobs, mask=mask, totals=totals, reference=reference)

    def _first_pass(self, update: _Update, index: int, totals: Totals) -> Tensor | None:
        """Return [N, F] figures of all rows of a step, the same on every rank; None where the loss asks for none.

        Each row's come from one rank, so that a sum over them is exact. Of an unpaired loss they are those of
        mismatched rows, of a loss of labels those of each row's tokens.
        """
        loss = update.loss
        if not isinstance(loss, TwoPassLoss):
            return None
        places: Sequence[int] = update.plan.steps[index].rows
        if isinstance(update.rows, UnpairedRows):
            update = replace(update, rows=update.rows.mismatched(places), reference=update.mismatched[index])
            places = range(len(places))
        place_of, num_items = item_places(update.rows, places)
        parts = []
        for micro, forward in self._passes.evaluated(update.rows, places, temperature=update.temperature):
            batch = self._batch(update, micro, forward, totals)
            if isinstance(batch, UnpairedBatch):
                batch = replace(batch, mismatched_policy=batch.policy, mismatched_reference=batch.reference)
            parts.append((micro, loss.first_pass(batch, update.loss_config)))
        figures = parts[0][1].new_zeros(num_items, parts[0][1].shape[1])
        for micro, found in parts:
            if micro:
                figures[[place for row in micro for place in place_of[row]]] = found
        dist.all_reduce(figures)
        return figures

    def _apply(self, rate: float) -> tuple[bool, float]:
        """Clip and step unless the gradient is not finite; return whether it was applied, and the gradient's norm."""
        engine = self._model.engine
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        if self._model.config.zero_stage > 0:
            engine.step()  # ZeRO computes the norm over all ranks and skips the step when it is not finite
            return bool(engine.was_step_applied()), float(engine.get_global_grad_norm())
        parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if not math.isfinite(float(norm)):
            engine.zero_grad()
            return False, float(norm)
        if self._model.config.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._model.config.max_grad_norm, norm)
        engine.step()
        return True, float(norm)

    def _count_step(self, report: StepReport) -> None:
        self._num_steps += 1
        self._num_bad_steps = 0 if report.applied else self._num_bad_steps + 1
        if not report.applied:
            logger.warning(
                "optimizer step %d: loss %s, gradient norm %s: skipped (%d in a row)",
                report.optimizer_step,
                report.loss,
                report.grad_norm,
                self._num_bad_steps,
            )
        if self._num_bad_steps >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"{self._num_bad_steps} steps in a row up to optimizer step {report.optimizer_step} had no finite "
                f"loss or gradient (loss {report.loss}, norm {report.grad_norm}); load the last checkpoint and lower "
                f"the learning rate of {report.learning_rate:g}"
            )

    def set_preference(self, preference: Sequence[float]) -> None:
        """Have everything that follows, updates and exports too, be of one vector (`trainers.ranks.panacea`)."""
        set_preference(self._model.engine.module, preference)

    # --------------------------------------------------------------------------------------------------- log-probs

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[int, tuple[float, ...]]:
        """Return, for the sequences that fell to this rank, the log-probs (nats) of tokens 2..n by sequence number.

        Raises:
            ValueError: a sequence of fewer than two tokens, or longer than the model takes.
        """
        rows = sequence_rows(sequences)
        self._model.refuse_long(rows)
        found: dict[int, tuple[float, ...]] = {}
        for micro, forward in self._passes.evaluated(rows, range(len(rows.lengths))):
            for row, values in zip(micro, forward.logprobs.tolist(), strict=False):
                found[row] = tuple(values[1 : int(rows.lengths[row])])
        return found

    def scores(self, sequences: Sequence[Sequence[int]]) -> dict[int, float]:
        """Return a reward model's scores of the sequences that fell to this rank, by sequence number.

        Raises:
            ValueError: there is no value head; or as `logprobs`.
        """
        refuse_headless(self._model.config)
        rows = sequence_rows(sequences)
        self._model.refuse_long(rows)
        found: dict[int, float] = {}
        for micro, forward in self._passes.evaluated(rows, range(len(rows.lengths)), scored=True):
            found.update(zip(micro, forward.logprobs[:, 0].tolist(), strict=False))
        return found

    def _estimated(
        self, rows: SampleRows, plan: TrainingPlan, loss: PolicyLoss, config: Config
    ) -> tuple[SampleRows, dict[str, float]]:
        """Return the rows with log-probs by the weights as they are now and the advantages that the loss makes of them.

        Laid out as the first epoch's steps are, so that the first step's ratios are exactly 1.
        """
        logprobs, *values = self._passes.of_samples(rows, plan, temperature=temperature_of(config))
        return estimated(rows, logprobs, values=values[0] if values else None, loss=loss, config=config)

    # ------------------------------------------------------------------------------------------- weights out of here

    def publish(self, *, version: str) -> WeightManifest | None:
        """Put the weights into the object store; the manifest on rank 0, None on the others."""
        return self._out.publish(version=version)

    def free_port(self) -> int:
        """Return a port of this node that nobody listens at now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
        return port

    def send_weights(
        self, actor: Any, *, backend: Backend, opened: Opened, host: str, port: int, deadline_s: float
    ) -> None:
        """Send the weights as they are to one replica, by vLLM's own transfer; the first time they meet for it.

        Args:
            actor: the replica's, which waits for them.
            backend: one of vLLM's.
            opened: who waits.
            host: rank 0's address.
            port: a free one there; read when they meet.
            deadline_s: longest time for one answer of the replica.
        """
        self._out.send_weights(actor, backend=backend, opened=opened, host=host, port=port, deadline_s=deadline_s)

    def offload(self) -> None:
        """Keep in the host's memory what training needs beside the weights: moments, masters, gradients."""
        put_aside(self._model.engine, on_gpu=self._device.type == "cuda")

    def reload(self) -> None:
        """Take back what `offload` put aside; nothing to do when nothing was."""
        self._model.engine.reload_states()

    def export(self, path: str) -> None:
        """Write an ordinary Hugging Face directory, which appears whole or not at all."""
        self._out.export(path)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, path: str) -> tuple[FileDigest, ...]:
        """Write everything that training needs to go on bit by bit, and return the digests of all files.

        The directory, which the ranks must share, appears whole or not at all. DeepSpeed's own `latest` file is not
        written: which checkpoint counts is the run's commit to say.
        """
        counters = {
            "num_steps": self._num_steps,
            "num_bad_steps": self._num_bad_steps,
            "kl_coefficient": self._kl_coefficient,
        }
        return self._checkpoints.save(path, counters=counters)

    def load(self, path: str, *, files: tuple[FileDigest, ...] | None) -> None:
        """Go on from a checkpoint. Its files are checked before any of them is unpickled.

        Args:
            path: the directory that `save` wrote.
            files: the digests that it must have; by default those of its own manifest, whose digest is the caller's to
                check.

        Raises:
            CorruptCheckpoint: a file is missing, changed or one too many, or it was saved with other settings; another
                number of ranks is no hindrance.
        """
        saved = self._checkpoints.load(path, files=files)
        self._num_steps, self._num_bad_steps = saved["num_steps"], saved["num_bad_steps"]
        self._kl_coefficient = saved.get("kl_coefficient")
        self._update = None

    # -------------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Leave the process group."""
        self._close_model()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _close_model(self) -> None:
        if self._is_open:
            self._out.close()
            self._model.close()
            self._is_open = False


def _add(sums: dict[str, float], output: LossOutput, padded: Padded) -> None:
    scalars = {**output.metrics, "loss": output.loss.detach()}
    values = dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))  # one transfer for all
    values["num_tokens"] = padded.num_real_tokens
    values["num_padded_tokens"] = padded.num_padded_tokens
    values["num_unpadded_tokens"] = padded.num_unpadded_tokens
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now
