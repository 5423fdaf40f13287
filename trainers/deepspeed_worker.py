"""Owns one rank of a training group: a DeepSpeed engine over a Hugging Face model, in its own process.

The only module that imports DeepSpeed, and it does so when a rank starts: importing it here costs no engine. Knows
nothing of who calls it (trainers/training_group.py) or of what the rows mean (trainers/batches.py).

Every method that computes is a collective: all ranks must be called alike.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from actors.engine import make_sender
from actors.receiving import Opened, ReplicaClient
from cluster.config import Config
from cluster.durable_files import FileDigest, write_json_atomic
from cluster.weight_transfer import Backend
from cluster.weights import WeightManifest, put_weights
from trainers.batches import (
    MicroBatch,
    Padded,
    PairRows,
    Rows,
    SampleRows,
    TokenRows,
    Totals,
    TrainingPlan,
    micro_batches,
    sample_rows,
    sequence_rows,
)
from trainers.checkpoint_files import (
    MANIFEST,
    CorruptCheckpoint,
    copy_tokenizer,
    digest_problem,
    files_of,
    fresh_beside,
    listing_problems,
    publish_directory,
    read_manifest,
    synced_digest,
)
from trainers.importance import ImportanceConfig
from trainers.logprobs import sequence_logprobs, token_logprobs
from trainers.losses import Loss, LossOutput, PairBatch, TokenBatch, TwoPassLoss, UnpairedBatch, load_loss
from trainers.muon import MuonAdamW
from trainers.policy_gradient import PolicyLoss
from trainers.training_config import TrainingConfig, learning_rate
from trainers.update_start import (
    Reference,
    corrected,
    each_row_once,
    estimated,
    refuse_other_rows,
    rows_for,
    temperature_of,
)
from trainers.value_head import add_value_head, aligned_values, policy_parameters

logger = logging.getLogger(__name__)

CHECKPOINT_TAG = "state"
TOPOLOGY = "training.json"
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
class Rendezvous:
    """Where the ranks meet."""

    host: str
    port: int
    one_node: bool
    """All ranks share a node: their sockets stay on loopback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Which weights a group starts from."""

    path: str
    """A Hugging Face directory: config.json, tokenizer, and safetensors unless `init_seed` is given."""
    init_seed: int | None = None
    """Weights are drawn with this seed; needed when the directory has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRef:
    """A table in the object store; inside a dataclass Ray passes the reference on, and each rank fetches it itself."""

    ref: ray.ObjectRef[pa.Table]


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
    metrics: dict[str, float]
    """What the loss reports."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    plan: TrainingPlan
    loss: Loss
    loss_config: Config
    rows: Rows
    reference: Tensor | None
    """[rows, 2] fp32: the reference's summed log-probs of chosen and rejected."""
    mismatched: tuple[Tensor, ...] = ()
    """Of an unpaired loss, for each step, [its rows, 2] fp32: the same of `PairRows.mismatched`."""

    @property
    def temperature(self) -> float:
        """Return that at which log-probs are taken: the sampling's, where the loss learns from samples."""
        return temperature_of(self.loss_config)


class _Forward(NamedTuple):
    logprobs: Tensor
    """[S, T]"""
    mask: Tensor
    padded: Padded
    values: Tensor | None
    """[S, T]; None without a value head, and where no loss asks for one."""


class DeepSpeedRank:
    """One rank; a Ray actor."""

    def __init__(self, *, rank: int, num_ranks: int, threads: int) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        torch.set_num_threads(threads)
        self._store: Any = None
        self._engine: Any = None
        self._update: _Update | None = None
        self._senders: dict[int, Any] = {}

    # ------------------------------------------------------------------------------------------------------- start

    def info(self) -> RankInfo:
        """Return where this rank runs."""
        return RankInfo(
            rank=self._rank,
            node_id=ray.get_runtime_context().get_node_id(),
            host=_node_address(),
            pid=os.getpid(),
        )

    def host_rendezvous(self, *, host: str, timeout_s: float) -> int:
        """Open the store at which the ranks meet and return its port; for rank 0."""
        # Port 0: the system picks one and the store holds it from then on, so nobody can take it in between.
        self._store = _tcp_store(host, 0, num_ranks=self._num_ranks, is_master=True, timeout_s=timeout_s)
        return int(self._store.port)

    def start(
        self, *, config: TrainingConfig, source: ModelSource, rendezvous: Rendezvous, timeout_s: float
    ) -> dict[str, float]:
        """Import DeepSpeed, meet the other ranks, build the engine; return the seconds that each took."""
        clock = _Clock()
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._set_environment(rendezvous)
        deepspeed = _import_deepspeed()
        clock.lap("import_deepspeed_s")
        from transformers import AutoModelForCausalLM  # noqa: F401 - so that a lap shows its seconds

        clock.lap("import_transformers_s")
        self._join(deepspeed, rendezvous=rendezvous, timeout_s=timeout_s)
        clock.lap("rendezvous_s")
        self.open(config=config, source=source)
        clock.lap("engine_s")
        return clock.laps

    def open(self, *, config: TrainingConfig, source: ModelSource) -> None:
        """Build the engine: model, optimizer, nothing carried over from an engine before it.

        Raises:
            ValueError: the directory is no model, or has no weights and no `init_seed` was given.
        """
        self._close_engine()
        self._config, self._source = config, source
        self._num_steps = 0
        self._num_bad_steps = 0
        self._update = None
        _seed_all(config.seed * 100_003 + self._rank)
        model = load_model(source, dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32)
        if config.value_head:
            add_value_head(model)
        self._engine = _build_engine(model.to(self._device), config=config, num_ranks=self._num_ranks)
        self._max_positions = getattr(model.config, "max_position_embeddings", None)

    def _set_environment(self, rendezvous: Rendezvous) -> None:
        values = {
            "RANK": str(self._rank),
            "WORLD_SIZE": str(self._num_ranks),
            "LOCAL_RANK": "0",  # Ray shows a rank its own devices alone
            "MASTER_ADDR": rendezvous.host,
            "MASTER_PORT": str(rendezvous.port),
        }
        if self._device.type == "cpu":
            values["DS_ACCELERATOR"] = "cpu"
        if rendezvous.one_node:
            values["GLOO_SOCKET_IFNAME"] = "lo"
        elif "GLOO_SOCKET_IFNAME" not in os.environ:
            # Else gloo takes what this host's name resolves to, which may be loopback.
            values["GLOO_SOCKET_IFNAME"] = interface_of(_node_address())
        # LOCAL_SIZE stays unset: with it DeepSpeed 0.19 leaves shared memory behind and hangs after a rank's death.
        os.environ.update(values)

    def _join(self, deepspeed: Any, *, rendezvous: Rendezvous, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        if self._store is None:
            self._store = _tcp_store(
                rendezvous.host, rendezvous.port, num_ranks=self._num_ranks, is_master=False, timeout_s=timeout_s
            )
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=self._store, rank=self._rank, world_size=self._num_ranks, timeout=timeout
        )
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)

    # ------------------------------------------------------------------------------------------------------ update

    def begin_update(
        self,
        table: TableRef,
        *,
        plan: TrainingPlan,
        loss: str,
        loss_config: Config,
        importance: ImportanceConfig | None = None,
    ) -> dict[str, float]:
        """Fetch the table and compute the reference's log-probs with the weights as they are now.

        Returns what they say of the samples' staleness (`trainers.importance`): nothing where the table does not say
        how its samples came about. Of scored samples it is what their scores and log-probs come to; how they are
        corrected for is the loss's own setting.

        Raises:
            ValueError: the table does not fit the plan, the loss or the model's longest sequence.
        """
        module = load_loss(loss)
        arrow = ray.get(table.ref)
        refuse_other_rows(arrow, plan)
        said: dict[str, float] = {}
        if isinstance(module, PolicyLoss):
            samples = sample_rows(arrow)
            self._refuse_long(samples)
            samples, said = self._estimated(samples, plan, module, loss_config)
            self._update = _Update(plan=plan, loss=module, loss_config=loss_config, rows=samples, reference=None)
            return said
        rows = rows_for(module, arrow, name=loss)
        self._refuse_long(rows)
        gaps = isinstance(rows, PairRows) and rows.rollout_logprobs is not None and importance is not None
        reference = self._reference(rows, plan) if module.uses_reference or gaps else None
        if isinstance(rows, PairRows):
            if reference is None:
                reference = Reference.nothing(len(rows.lengths))
            if importance is not None and rows.rollout_logprobs is not None:
                rows, said = corrected(rows, reference, importance)
        sums = None if reference is None else reference.sums
        mismatched: tuple[Tensor, ...] = ()
        if module.batch is UnpairedBatch:
            assert isinstance(rows, PairRows), "unpaired responses come as pairs"
            mismatched = tuple(
                self._logprobs_of_pairs(rows.mismatched(step.rows), [range(len(step.rows))]).sums for step in plan.steps
            )
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
        reports = [self._step(self._update, index) for index in range(first, first + count)]
        if first + count == len(self._update.plan.steps):
            self._update = None  # its rows are needed no longer
        return reports

    def _step(self, update: _Update, index: int) -> StepReport:
        begin, planned = time.monotonic(), update.plan.steps[index]
        totals = update.rows.totals(planned.rows)
        micros = self._micro_batches(update.rows, planned.rows)
        figures = self._first_pass(update, index, totals)
        if not self._engine.training:
            self._engine.train()
        sums: dict[str, float] = {}
        for i, micro in enumerate(micros):
            is_last = i == len(micros) - 1
            padded = update.rows.pad(micro.rows, num_passes=micro.num_passes)
            forward = self._forward(padded, temperature=update.temperature)
            batch = self._batch(update, micro.rows, forward, totals)
            if figures is not None:
                assert not isinstance(batch, PairBatch), "no pair loss looks at a step twice"
                batch = replace(batch, step_figures=figures)
            output = update.loss.loss(batch, update.loss_config)
            _add(sums, output, forward.padded)
            loss = output.loss
            if is_last:
                # Asked for here and waited for after the step: in between the ranks meet anyway, over the gradients.
                total = self._all_sum(sums)
                if not math.isfinite(sums["loss"]):
                    # Every rank must skip the step, also one whose own numbers are sound: a gradient that one rank has
                    # poisoned is poisoned on all, and every ZeRO stage recognises it. By way of all log-probs: padding
                    # that weighs nothing has none of its own in the loss.
                    loss = loss + math.nan * forward.logprobs.sum()
            self._engine.set_gradient_accumulation_boundary(is_last)
            # DeepSpeed averages gradients over ranks; ours are shares of the global mean, to be summed.
            self._engine.backward(loss * self._num_ranks)
        rate = learning_rate(self._config, step=self._num_steps)
        applied, grad_norm = self._apply(rate)
        sums = total()
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
            metrics=sums,
            seconds=time.monotonic() - begin,
        )
        self._count_step(report)
        return report

    def _micro_batches(self, rows: Rows, chosen: Sequence[int]) -> tuple[MicroBatch, ...]:
        layout = micro_batches(
            rows, chosen, num_ranks=self._num_ranks, micro_batch_tokens=self._config.micro_batch_tokens
        )
        return layout[self._rank]

    def _forward(self, padded: Padded, *, temperature: float = 1.0) -> _Forward:
        token_ids, mask = padded.token_ids.to(self._device), padded.mask.to(self._device)
        if len(padded.passes) == 1:
            logprobs, values = self._token_logprobs(token_ids, temperature)
            return _Forward(logprobs=logprobs, mask=mask, padded=padded, values=values)
        width = token_ids.shape[1]
        parts = [
            torch.nn.functional.pad(
                self._token_logprobs(token_ids[sequences, :length], temperature)[0], (0, width - length)
            )
            for sequences, length in padded.passes
        ]
        back = torch.argsort(torch.cat([part.sequences for part in padded.passes])).to(self._device)
        # Only pairs are computed in two passes, and pairs have no values.
        return _Forward(logprobs=torch.cat(parts)[back], mask=mask, padded=padded, values=None)

    def _token_logprobs(self, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
        """Return [S, T] log-probs, and values where the policy has a value head."""
        if not self._config.value_head:
            logits = self._engine(input_ids=token_ids, use_cache=False).logits
            return token_logprobs(logits, token_ids, temperature=temperature), None
        found = self._engine(input_ids=token_ids, use_cache=False, output_hidden_states=True)
        return token_logprobs(found.logits, token_ids, temperature=temperature), aligned_values(found["token_values"])

    def _batch(
        self, update: _Update, micro: tuple[int, ...], forward: _Forward, totals: Totals
    ) -> PairBatch | UnpairedBatch | TokenBatch:
        rows, logprobs, mask = update.rows, forward.logprobs, forward.mask
        if isinstance(rows, SampleRows):
            return rows.batch(micro, logprobs=logprobs, mask=mask, totals=totals, values=forward.values)
        if isinstance(rows, TokenRows):
            return rows.batch(micro, logprobs=logprobs, mask=mask, totals=totals)
        assert update.reference is not None, "begin_update makes one for pairs"
        reference = (update.reference[list(micro)] if micro else torch.zeros(1, 2)).to(self._device)
        if update.loss.batch is UnpairedBatch:
            return rows.unpaired_batch(micro, logprobs=logprobs, mask=mask, totals=totals, reference=reference)
        return rows.batch(micro, logprobs=logprobs, mask=mask, totals=totals, reference=reference)

    def _first_pass(self, update: _Update, index: int, totals: Totals) -> Tensor | None:
        """Return [N, F] figures of all rows of a step, the same on every rank; None where the loss asks for none.

        Each row's come from one rank, so that a sum over them is exact. Of an unpaired loss they are those of
        mismatched pairs, first the chosen, then the rejected.
        """
        loss = update.loss
        if not isinstance(loss, TwoPassLoss):
            return None
        places: Sequence[int] = update.plan.steps[index].rows
        num_sides = 1
        if loss.batch is UnpairedBatch:
            assert isinstance(update.rows, PairRows), "unpaired responses come as pairs"
            update = replace(update, rows=update.rows.mismatched(places), reference=update.mismatched[index])
            num_sides, places = 2, range(len(places))
        place_of = {row: place for place, row in enumerate(places)}
        parts = []
        for micro, forward in self._evaluated(update.rows, places, temperature=update.temperature):
            batch = self._batch(update, micro, forward, totals)
            if isinstance(batch, UnpairedBatch):
                batch = replace(batch, mismatched_policy=batch.policy, mismatched_reference=batch.reference)
            found = loss.first_pass(batch, update.loss_config)
            parts.append((micro, found.view(num_sides, -1, found.shape[1])))
        figures = parts[0][1].new_zeros(num_sides, len(places), parts[0][1].shape[2])
        for micro, found in parts:
            if micro:
                figures[:, [place_of[row] for row in micro]] = found
        dist.all_reduce(figures)
        return figures.flatten(0, 1)

    def _apply(self, rate: float) -> tuple[bool, float]:
        """Clip and step unless the gradient is not finite; return whether it was applied, and the gradient's norm."""
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        if self._config.zero_stage > 0:
            engine.step()  # ZeRO computes the norm over all ranks and skips the step when it is not finite
            return bool(engine.was_step_applied()), float(engine.get_global_grad_norm())
        parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if not math.isfinite(float(norm)):
            engine.zero_grad()
            return False, float(norm)
        if self._config.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.max_grad_norm, norm)
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

    # --------------------------------------------------------------------------------------------------- log-probs

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[int, tuple[float, ...]]:
        """Return, for the sequences that fell to this rank, the log-probs (nats) of tokens 2..n by sequence number.

        Raises:
            ValueError: a sequence of fewer than two tokens, or longer than the model takes.
        """
        rows = sequence_rows(sequences)
        self._refuse_long(rows)
        found: dict[int, tuple[float, ...]] = {}
        for micro, forward in self._evaluated(rows, range(len(rows.lengths))):
            for row, values in zip(micro, forward.logprobs.tolist(), strict=False):
                found[row] = tuple(values[1 : int(rows.lengths[row])])
        return found

    def _evaluated(
        self, rows: Rows, chosen: Sequence[int], *, temperature: float = 1.0
    ) -> Iterator[tuple[tuple[int, ...], _Forward]]:
        """Yield this rank's micro-batches with their log-probs, without gradient and without dropout."""
        self._engine.eval()
        with torch.no_grad():
            for micro in self._micro_batches(rows, chosen):
                padded = rows.pad(micro.rows, num_passes=micro.num_passes)
                yield micro.rows, self._forward(padded, temperature=temperature)

    def _reference(self, rows: Rows, plan: TrainingPlan) -> Reference | None:
        """Return the log-probs by the weights as they are now, each row computed once over all ranks.

        Laid out as the first epoch's steps are, so that the first step's log-ratios are exactly 0.
        """
        if not isinstance(rows, PairRows):
            return None
        return self._logprobs_of_pairs(rows, each_row_once(plan, num_rows=len(rows.lengths)))

    def _logprobs_of_pairs(self, rows: PairRows, parts: Iterable[Sequence[int]]) -> Reference:
        """Return the log-probs by the weights as they are now, laid out part by part; every row is in one."""
        num_rows = len(rows.lengths)
        sums, gaps = torch.zeros(num_rows, 2, device=self._device), torch.zeros(num_rows, 2, device=self._device)
        for chosen in parts:
            for micro, forward in self._evaluated(rows, chosen):
                if micro:
                    sums[list(micro)] = sequence_logprobs(forward.logprobs, forward.mask).view(2, -1).T
                    gaps[list(micro)] = rows.rollout_gaps(micro, forward.logprobs, forward.mask)
        dist.all_reduce(sums)  # each row is 0 on all ranks but one: the sum is exact
        dist.all_reduce(gaps)
        return Reference(sums=sums.cpu(), gaps=gaps.cpu())

    def _estimated(
        self, rows: SampleRows, plan: TrainingPlan, loss: PolicyLoss, config: Config
    ) -> tuple[SampleRows, dict[str, float]]:
        """Return the rows with log-probs by the weights as they are now and the advantages that the loss makes of them.

        Laid out as the first epoch's steps are, so that the first step's ratios are exactly 1.
        """
        # Log-probs, and values where there are any.
        old = torch.zeros(1 + self._config.value_head, *rows.shape, device=self._device)
        temperature = temperature_of(config)
        for chosen in each_row_once(plan, num_rows=len(rows.lengths)):
            for micro, forward in self._evaluated(rows, chosen, temperature=temperature):
                if micro:
                    told = (forward.logprobs,) if forward.values is None else (forward.logprobs, forward.values)
                    for kept, own in zip(old, told, strict=True):
                        kept[list(micro), : own.shape[1]] = torch.where(forward.mask, own, 0.0).float()
        dist.all_reduce(old)  # each row is 0 on all ranks but one: the sum is exact
        logprobs, *values = old.cpu()
        return estimated(rows, logprobs, values=values[0] if values else None, loss=loss, config=config)

    def _refuse_long(self, rows: Rows) -> None:
        if self._max_positions is not None and len(rows.lengths) and rows.lengths.max() > self._max_positions:
            row = int(np.argmax(rows.lengths))
            raise ValueError(
                f"row {row}: got {rows.lengths[row]} tokens, wanted at most {self._max_positions} "
                f"(max_position_embeddings of {self._source.path}); drop or cut it before training"
            )

    def _all_sum(self, sums: dict[str, float]) -> Callable[[], dict[str, float]]:
        """Begin to add up over all ranks; what is returned waits for the sums."""
        values = torch.tensor([sums[name] for name in sorted(sums)], dtype=torch.float64, device=self._device)
        work = dist.all_reduce(values, async_op=True)

        def result() -> dict[str, float]:
            work.wait()
            return dict(zip(sorted(sums), values.tolist(), strict=True))

        return result

    # ------------------------------------------------------------------------------------------- weights out of here

    def publish(self, *, version: str) -> WeightManifest | None:
        """Put the weights into the object store; the manifest on rank 0, None on the others."""
        if self._rank == 0:
            return put_weights(self._sent(), version=version)
        for _ in self._gathered():
            pass
        return None

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
        sender = self._senders.get(opened.replica_id)
        if sender is None:
            sender = self._senders[opened.replica_id] = make_sender(
                backend,
                rank=self._rank,
                parameters=self._parameters(),
                weights=self._sent,
                client=ReplicaClient(actor, backend=backend, deadline_s=deadline_s),
                num_workers=opened.num_workers,
                rendezvous=(host, port),
            )
        sender.send_weights()

    def _parameters(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return name, dtype and whole shape of what `_gathered` gives, without gathering."""
        named = policy_parameters(self._engine.module)
        # Under ZeRO 3 a parameter's own shape is that of what this rank holds, or of nothing.
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named]

    def _sent(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole parameters as a sender may keep them: those that ZeRO 3 gathers are copied."""
        for name, parameter in self._gathered():
            yield name, parameter.clone() if self._config.zero_stage == 3 else parameter

    def offload(self) -> None:
        """Keep in the host's memory what training needs beside the weights: moments, masters, gradients."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

        states = OffloadStateTypeEnum
        include = [states.optim_states, states.hp_params, states.lp_grads]
        self._engine.offload_states(include=include, pin_memory=self._device.type == "cuda")

    def reload(self) -> None:
        """Take back what `offload` put aside; nothing to do when nothing was."""
        self._engine.reload_states()

    def export(self, path: str) -> None:
        """Write an ordinary Hugging Face directory, which appears whole or not at all."""
        weights = {}
        for name, parameter in self._gathered():
            if self._rank == 0:
                weights[name] = parameter.detach().cpu().clone()
        if self._rank == 0:
            target = Path(path)
            beside = fresh_beside(target)
            self._engine.module.save_pretrained(beside, state_dict=weights)
            copy_tokenizer(Path(self._source.path), beside)
            publish_directory(beside, target)
        dist.barrier()

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the named parameters, whole also under ZeRO 3; a tied head has no entry of its own."""
        for name, parameter in policy_parameters(self._engine.module):
            with self._whole(parameter):
                yield name, parameter.detach()

    def _whole(self, parameter: Tensor) -> AbstractContextManager[Any]:
        if self._config.zero_stage < 3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)
        return context

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, path: str) -> tuple[FileDigest, ...]:
        """Write everything that training needs to go on bit by bit, and return the digests of all files.

        The directory, which the ranks must share, appears whole or not at all. DeepSpeed's own `latest` file is not
        written: which checkpoint counts is the run's commit to say.
        """
        target = Path(path)
        beside = target.with_name(f".{target.name}.tmp")
        if self._rank == 0:
            fresh_beside(target)
        dist.barrier()
        self._engine.save_checkpoint(str(beside), tag=CHECKPOINT_TAG, client_state={}, save_latest=False)
        torch.save(_random_states(), beside / f"random-{self._rank:05d}.pt")
        if self._rank == 0:
            (beside / TOPOLOGY).write_text(json.dumps({**self._topology(), **self._counters()}, indent=2) + "\n")
        dist.barrier()
        digests = tuple(sorted(self._on_all(self._share(beside, synced_digest)), key=lambda digest: digest.path))
        if self._rank == 0:
            write_json_atomic(beside / MANIFEST, {"files": [asdict(digest) for digest in digests]})
            publish_directory(beside, target)
        dist.barrier()
        return digests

    def load(self, path: str, *, files: tuple[FileDigest, ...] | None) -> None:
        """Go on from a checkpoint. Its files are checked before any of them is unpickled.

        Args:
            path: the directory that `save` wrote.
            files: the digests that it must have; by default those of its own manifest, whose digest is the caller's to
                check.

        Raises:
            CorruptCheckpoint: a file is missing, changed or one too many, or the topology is another.
        """
        source = Path(path)
        wanted = {digest.path: digest for digest in files or read_manifest(source)}
        problems = listing_problems(source, wanted) if self._rank == 0 else []
        problems = self._on_all([*problems, *self._share(source, lambda p, root: digest_problem(p, root, wanted))])
        found = [problem for problem in problems if problem]
        if found:
            raise CorruptCheckpoint(f"{source}: {'; '.join(sorted(set(found)))}")
        saved = json.loads((source / TOPOLOGY).read_text())
        here = self._topology()
        there = {key: saved[key] for key in here}
        if there != here:
            raise CorruptCheckpoint(
                f"{source}: saved with {there}, wanted {here}; "
                "set the config back, or start anew from the exported weights"
            )
        loaded, _ = self._engine.load_checkpoint(str(source), tag=CHECKPOINT_TAG)
        if loaded is None:
            raise RuntimeError(f"{source}: DeepSpeed found nothing to load under tag {CHECKPOINT_TAG!r}")
        self._num_steps, self._num_bad_steps = saved["num_steps"], saved["num_bad_steps"]
        self._update = None
        _restore_random_states(torch.load(source / f"random-{self._rank:05d}.pt", weights_only=True))
        dist.barrier()

    def _topology(self) -> dict[str, Any]:
        config = self._config
        return {"num_ranks": self._num_ranks, "zero_stage": config.zero_stage, "dtype": config.dtype}

    def _counters(self) -> dict[str, int]:
        return {"num_steps": self._num_steps, "num_bad_steps": self._num_bad_steps}

    def _share(self, directory: Path, call: Callable[[Path, Path], Any]) -> list[Any]:
        """Return what a call gives for this rank's share of a directory's files, so that hashing is split."""
        files = [path for path in files_of(directory) if path.name != MANIFEST]
        return [call(path, directory) for path in files[self._rank :: self._num_ranks]]

    def _on_all(self, items: list[Any]) -> list[Any]:
        gathered: list[Any] = [None] * self._num_ranks
        dist.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    # -------------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Leave the process group."""
        self._close_engine()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _close_engine(self) -> None:
        for sender in self._senders.values():
            sender.shutdown()
        self._senders = {}
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None


# ------------------------------------------------------------------------------------------------------------ model


def load_model(source: ModelSource, *, dtype: torch.dtype) -> Any:
    """Return the causal language model of a Hugging Face directory. Never runs code from it, never unpickles.

    Raises:
        ValueError: no such directory, no config.json, or no safetensors and no `init_seed`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(source.path)
    if not (path / "config.json").is_file():
        raise ValueError(f"model: {path} has no config.json, wanted a Hugging Face model directory")
    if source.init_seed is not None:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.random.fork_rng():
            torch.manual_seed(source.init_seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model: {path} has no *.safetensors; save it as safetensors, or give init_seed to draw random weights"
        )
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
    )


def _import_deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Else DeepSpeed 0.19 compiles an operator that training never uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _build_engine(model: Any, *, config: TrainingConfig, num_ranks: int) -> Any:
    import deepspeed

    optimizer = _optimizer(model, config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = _engine_settings(config, num_ranks=num_ranks, num_parameters=num_parameters)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _optimizer(model: Any, config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "muon":
        return MuonAdamW(
            model,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(
        _parameter_groups(model, weight_decay=config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def _engine_settings(config: TrainingConfig, *, num_ranks: int, num_parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's settings. Accumulation is driven by us: a step has as many micro-batches as its rows fill."""
    # DeepSpeed's buckets are sized for billions of parameters: 2 GB would be reserved for any model.
    bucket = min(50_000_000, num_parameters)
    settings: dict[str, Any] = {
        "train_batch_size": num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
            "stage3_prefetch_bucket_size": bucket,
            # Weights below this are kept whole on every rank: norms and biases, whatever the model's size.
            "stage3_param_persistence_threshold": min(100_000, num_parameters // 1000),
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if config.zero_stage > 0:
        settings["gradient_clipping"] = config.max_grad_norm
    if config.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["communication_data_type"] = "fp32"
        if config.zero_stage > 1:
            # Under stage 1 this would select an optimizer that does not skip a step whose gradient is not finite.
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _parameter_groups(model: Any, *, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay == 0.0:
        return [{"params": parameters, "weight_decay": 0.0}]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _add(sums: dict[str, float], output: LossOutput, padded: Padded) -> None:
    scalars = {**output.metrics, "loss": output.loss.detach()}
    values = dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))  # one transfer for all
    values["num_tokens"] = padded.num_real_tokens
    values["num_padded_tokens"] = padded.num_padded_tokens
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _node_address() -> str:
    address: Callable[[], str] = ray.util.get_node_ip_address
    return address()


def interface_of(address: str) -> str:
    """Return the name of this host's network interface that has an address.

    Raises:
        ValueError: none has it; lists those that there are.
    """
    addresses = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    for name, found in addresses.items():
        if address in found:
            return name
    raise ValueError(
        f"rank: got the node address {address}, wanted that of an interface of this host ({', '.join(addresses)}): "
        "start Ray with --node-ip-address of one of them, or set GLOO_SOCKET_IFNAME"
    )


def _tcp_store(host: str, port: int, *, num_ranks: int, is_master: bool, timeout_s: float) -> Any:
    store: Any = dist.TCPStore  # type: ignore[attr-defined] # torch 2.13 leaves it out of what it exports by name
    timeout = timedelta(seconds=timeout_s)
    return store(host, port, num_ranks, is_master=is_master, wait_for_workers=False, timeout=timeout)


# ------------------------------------------------------------------------------------------------------ randomness


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _random_states() -> dict[str, Any]:
    """Return the states of all generators as plain tensors and numbers, so that loading them runs no code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), gauss_next],
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = states["python"]
    random.setstate((version, tuple(words), gauss_next))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._last
        self._last = now
