"""Owns one rank of a training group: a DeepSpeed engine over a Hugging Face model, in its own process.

DeepSpeed itself is imported by trainers/ranks/deepspeed_engine.py alone. Knows nothing of who calls it
(trainers/training_group.py) or of what the rows mean (trainers/batches.py).

Every method that computes is a collective: all ranks must be called alike.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
from trainers.importance import ImportanceConfig
from trainers.kl import KlBudget
from trainers.label_rows import LabelRows, item_places, target_logits
from trainers.logprobs import sequence_logprobs, token_logprobs
from trainers.losses import (
    GroupBatch,
    LabelBatch,
    Loss,
    LossOutput,
    PairBatch,
    ScoreBatch,
    TokenBatch,
    TwoPassLoss,
    UnpairedBatch,
    load_loss,
)
from trainers.policy_gradient import PolicyLoss
from trainers.ranks import shared_prompts
from trainers.ranks.adapters import adapter_in, adapter_topology
from trainers.ranks.checkpoint_files import (
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
from trainers.ranks.deepspeed_engine import (
    build_engine,
    convert_to_universal,
    import_deepspeed,
    join_deepspeed,
    put_aside,
    repair_universal,
    whole_parameter,
)
from trainers.ranks.first_weights import FirstWeights
from trainers.ranks.kl_probe import KlProbe, KlReached, distributions, probe_rows
from trainers.ranks.lora import base_checksum
from trainers.ranks.model_source import ModelSource, load_model, max_positions
from trainers.ranks.panacea import set_preference
from trainers.ranks.random_states import random_states, restore_random_states, seed_all
from trainers.ranks.reference_cache import weights_digest
from trainers.ranks.rendezvous import Rendezvous, join, meet_by, node_address, tcp_store
from trainers.ranks.sequence_scores import refuse_headless, sequence_scores
from trainers.ranks.update_start import (
    ComparedRows,
    Reference,
    at_price,
    corrected,
    each_row_once,
    estimated,
    next_price,
    refuse_other_rows,
    rows_for,
    temperature_of,
)
from trainers.ranks.value_head import add_value_head, aligned_values, policy_parameters
from trainers.training_config import ReferenceWeights, TrainingConfig, learning_rate

logger = logging.getLogger(__name__)

CHECKPOINT_TAG = "state"
TOPOLOGY = "training.json"
REFERENCE_CACHE = "reference.pt"
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
    """Of an unpaired loss, for each step, [its rows, 2] fp32: the same of `PairRows.mismatched`."""
    probe: KlProbe | None = None
    """None: nobody asks how far it moves the weights."""

    @property
    def temperature(self) -> float:
        """Return that at which log-probs are taken: the sampling's, where the loss learns from samples."""
        return temperature_of(self.loss_config)


class _Forward(NamedTuple):
    logprobs: Tensor
    """[S, T]; of a scored pass the scores, [S, 1]; of a labelled one the logits that predict targets, [S, P, V]."""
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
        self._close_engine()
        self._config, self._source = config, source
        self._num_steps = 0
        self._num_bad_steps = 0
        self._kl_coefficient: float | None = None
        self._update = None
        self._first, self._by_first = self._first_weights(), False
        self._build(universal=False)

    def _build(self, *, universal: bool) -> None:
        """Make model and engine anew; a universal one reads checkpoints of any number of ranks, and no others."""
        config, source = self._config, self._source
        if self._engine is not None:
            self._engine.destroy()
        self._universal = universal
        seed_all(config.seed * 100_003 + self._rank)
        model = load_model(source, dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32)
        self._adapter = adapter_in(config)
        self._base = "" if self._adapter is None else base_checksum(model)
        if self._adapter is not None:
            self._adapter.add(model, seed=config.seed)
        if config.value_head:
            add_value_head(model)
        if config.shared_prompts:
            shared_prompts.check(model.to(self._device), name=source.path, device=self._device)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._engine = build_engine(
            model.to(self._device), config=config, num_ranks=self._num_ranks, universal=universal
        )
        self._max_positions = max_positions(model.config)

    def _first_weights(self) -> FirstWeights:
        config, source = self._config, self._source

        def load() -> Any:
            model = load_model(source, dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32)
            if config.value_head:
                add_value_head(model)  # at 0: nobody reads it
            return model.to(self._device)

        def digest() -> str:
            mine = [weights_digest(Path(source.path), init_seed=source.init_seed)] if self._rank == 0 else []
            return f"{self._on_all(mine)[0]}/{config.dtype}"

        return FirstWeights(load=load, digest=digest)

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
        arrow = ray.get(table.ref)
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
        by_reference = self._by_first_weights if reference_weights == "bootstrap" else nullcontext
        said: dict[str, float] = {}
        if isinstance(module, PolicyLoss):
            samples = sample_rows(arrow)
            self._refuse_long(samples)
            if reference_weights == "bootstrap" and samples.reference_logprobs is None:
                with by_reference():
                    logprobs, *_ = self._of_samples(samples, plan, temperature=temperature_of(loss_config))
                samples = replace(samples, reference_logprobs=logprobs)
            samples, said = self._estimated(samples, plan, module, loss_config)
            self._update = _Update(plan=plan, loss=module, loss_config=loss_config, rows=samples, reference=None)
            return said
        if module.batch is ScoreBatch:
            refuse_headless(self._config)
        rows = rows_for(module, arrow, name=loss)
        self._refuse_long(rows)
        gaps = isinstance(rows, ComparedRows) and rows.rollout_logprobs is not None and importance is not None
        # What a sample's age is corrected by is always of the weights that are to be trained.
        at_start = gaps or (module.uses_reference and reference_weights == "start_of_update")
        reference = self._reference(rows, plan) if at_start else None
        if isinstance(rows, ComparedRows):
            if reference is None:
                reference = Reference.nothing(rows)
            if importance is not None and rows.rollout_logprobs is not None:
                rows, said = corrected(rows, reference, importance)
        mismatched: tuple[Tensor, ...] = ()
        with by_reference():
            if module.uses_reference and reference_weights == "bootstrap":
                reference = self._reference(rows, plan)
            if module.batch is UnpairedBatch:
                assert isinstance(rows, PairRows), "unpaired responses come as pairs"
                mismatched = tuple(
                    self._logprobs_of_rows(rows.mismatched(step.rows), [range(len(step.rows))]).sums
                    for step in plan.steps
                )
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
        start = list(self._distributions(rows, update.temperature))
        first = None
        if self._num_steps > 0:
            with self._by_first_weights():
                first = list(self._distributions(rows, update.temperature))
        return KlProbe(budget, rows, start=start, first=first)

    def _kl_reached(self, update: _Update, probe: KlProbe) -> KlReached:
        sums = probe.sums(list(self._distributions(probe.rows, update.temperature))).to(self._device)
        dist.all_reduce(sums)
        return probe.note(sums.cpu())

    def _distributions(self, rows: TokenRows, temperature: float) -> Iterator[Tensor]:
        """Yield, for each of this rank's micro-batches, the log-probs of all tokens wherever one is a target."""
        self._engine.eval()
        with torch.no_grad():
            for micro in self._micro_batches(rows, range(len(rows.lengths))):
                padded = rows.pad(micro.rows)
                logits = self._engine(input_ids=padded.token_ids.to(self._device), use_cache=False).logits
                yield distributions(logits, padded.mask.to(self._device), temperature=temperature)

    @contextmanager
    def _by_first_weights(self) -> Iterator[None]:
        """Compute by the weights that the group was opened with, or take what they gave before."""
        engine, first = self._engine, self._first
        _ = first.digest  # a collective, which all ranks come to here
        # An adapter's base is here already; under ZeRO 3 one rank alone, whose rows are not cached, can't ask it.
        adapter = self._adapter if self._config.zero_stage < 3 else None
        self._engine, self._by_first = first if adapter is None else engine, True
        try:
            with nullcontext() if adapter is None else adapter.without(engine.module):
                yield
        finally:
            self._engine, self._by_first = engine, False
            first.let_go()
        first.cache.add(self._on_all([first.cache.new()]))

    def _cache_figures(self) -> dict[str, float]:
        """Return how many of the reference's sequences were asked for, and the share that was known; {} without any."""
        asked, found = map(sum, zip(*self._on_all([self._first.cache.counts()]), strict=True))
        return {"reference_sequences": float(asked), "reference_cached_share": found / asked} if asked else {}

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
            forward = self._forward(
                padded,
                temperature=update.temperature,
                scored=update.loss.batch is ScoreBatch,
                labelled=isinstance(update.rows, LabelRows),
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
                total = self._all_sum({**sums, **own})
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

    def _micro_batches(self, rows: Rows, chosen: Sequence[int]) -> tuple[MicroBatch, ...]:
        layout = micro_batches(
            rows, chosen, num_ranks=self._num_ranks, micro_batch_tokens=self._config.micro_batch_tokens
        )
        return layout[self._rank]

    def _forward(
        self, padded: Padded, *, temperature: float = 1.0, scored: bool = False, labelled: bool = False
    ) -> _Forward:
        token_ids, mask = padded.token_ids.to(self._device), padded.mask.to(self._device)
        if labelled:
            logits = target_logits(self._engine, token_ids, mask)
            return _Forward(logprobs=logits, mask=mask, padded=padded, values=None)
        if scored:
            scores = sequence_scores(self._engine, padded, device=self._device)
            return _Forward(logprobs=scores[:, None], mask=mask, padded=padded, values=None)
        if self._by_first:
            found = self._first.cache.find(padded, digest=self._first.digest, temperature=temperature)
            if found is not None:
                return _Forward(logprobs=found.to(self._device), mask=mask, padded=padded, values=None)
        forward = self._computed(token_ids, mask, padded, temperature=temperature)
        if self._by_first:
            self._first.cache.keep(padded, forward.logprobs, digest=self._first.digest, temperature=temperature)
        return forward

    def _computed(self, token_ids: Tensor, mask: Tensor, padded: Padded, *, temperature: float) -> _Forward:
        if self._config.shared_prompts and padded.is_pairs:
            pairs = shared_prompts.joined(padded)
            logprobs = shared_prompts.logprobs(
                self._engine, padded, pairs, temperature=temperature, device=self._device
            )
            return _Forward(logprobs=logprobs, mask=mask, padded=pairs.counted(padded), values=None)
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
        # Only pairs and groups are computed in two passes, and they have no values.
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
    ) -> PairBatch | UnpairedBatch | TokenBatch | GroupBatch | ScoreBatch | LabelBatch:
        rows, logprobs, mask = update.rows, forward.logprobs, forward.mask
        if isinstance(rows, SampleRows):
            return rows.batch(micro, logprobs=logprobs, mask=mask, totals=totals, values=forward.values)
        if isinstance(rows, TokenRows):
            return rows.batch(micro, logprobs=logprobs, mask=mask, totals=totals)
        if isinstance(rows, LabelRows):
            token_ids = forward.padded.token_ids.to(self._device)
            return rows.batch(micro, logits=logprobs, token_ids=token_ids, mask=mask, totals=totals)
        assert isinstance(rows, ComparedRows), "there are no other rows"
        if update.loss.batch is ScoreBatch:
            assert isinstance(rows, PairRows), "scores are of pairs"
            return rows.score_batch(micro, scores=logprobs[:, 0], totals=totals)
        assert update.reference is not None, "begin_update makes one for pairs and groups"
        reference = (update.reference[list(micro)] if micro else torch.zeros(1, rows.num_responses)).to(self._device)
        if update.loss.batch is UnpairedBatch:
            assert isinstance(rows, PairRows), "unpaired responses come as pairs"
            return rows.unpaired_batch(micro, logprobs=logprobs, mask=mask, totals=totals, reference=reference)
        return rows.batch(micro, logprobs=logprobs, mask=mask, totals=totals, reference=reference)

    def _first_pass(self, update: _Update, index: int, totals: Totals) -> Tensor | None:
        """Return [N, F] figures of all rows of a step, the same on every rank; None where the loss asks for none.

        Each row's come from one rank, so that a sum over them is exact. Of an unpaired loss they are those of
        mismatched pairs, first the chosen, then the rejected; of a loss of labels those of each row's tokens.
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
        place_of, num_items = item_places(update.rows, places)
        parts = []
        for micro, forward in self._evaluated(update.rows, places, temperature=update.temperature):
            batch = self._batch(update, micro, forward, totals)
            if isinstance(batch, UnpairedBatch):
                batch = replace(batch, mismatched_policy=batch.policy, mismatched_reference=batch.reference)
            found = loss.first_pass(batch, update.loss_config)
            parts.append((micro, found.view(num_sides, -1, found.shape[1])))
        figures = parts[0][1].new_zeros(num_sides, num_items, parts[0][1].shape[2])
        for micro, found in parts:
            if micro:
                figures[:, [place for row in micro for place in place_of[row]]] = found
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

    def set_preference(self, preference: Sequence[float]) -> None:
        """Have everything that follows, updates and exports too, be of one vector (`trainers.ranks.panacea`)."""
        set_preference(self._engine.module, preference)

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

    def scores(self, sequences: Sequence[Sequence[int]]) -> dict[int, float]:
        """Return a reward model's scores of the sequences that fell to this rank, by sequence number.

        Raises:
            ValueError: there is no value head; or as `logprobs`.
        """
        refuse_headless(self._config)
        rows = sequence_rows(sequences)
        self._refuse_long(rows)
        found: dict[int, float] = {}
        for micro, forward in self._evaluated(rows, range(len(rows.lengths)), scored=True):
            found.update(zip(micro, forward.logprobs[:, 0].tolist(), strict=False))
        return found

    def _evaluated(
        self, rows: Rows, chosen: Sequence[int], *, temperature: float = 1.0, scored: bool = False
    ) -> Iterator[tuple[tuple[int, ...], _Forward]]:
        """Yield this rank's micro-batches with their log-probs, without gradient and without dropout."""
        self._engine.eval()
        with torch.no_grad():
            for micro in self._micro_batches(rows, chosen):
                padded = rows.pad(micro.rows, num_passes=micro.num_passes)
                labelled = isinstance(rows, LabelRows)
                yield micro.rows, self._forward(padded, temperature=temperature, scored=scored, labelled=labelled)

    def _reference(self, rows: Rows, plan: TrainingPlan) -> Reference | None:
        """Return the log-probs by the weights as they are now, each row computed once over all ranks.

        Laid out as the first epoch's steps are, so that the first step's log-ratios are exactly 0.
        """
        if not isinstance(rows, ComparedRows):
            return None
        return self._logprobs_of_rows(rows, each_row_once(plan, num_rows=len(rows.lengths)))

    def _logprobs_of_rows(self, rows: ComparedRows, parts: Iterable[Sequence[int]]) -> Reference:
        """Return the log-probs by the weights as they are now, laid out part by part; every row is in one."""
        nothing = Reference.nothing(rows)
        sums, gaps = nothing.sums.to(self._device), nothing.gaps.to(self._device)
        for chosen in parts:
            for micro, forward in self._evaluated(rows, chosen):
                if micro:
                    sums[list(micro)] = rows.by_row(micro, sequence_logprobs(forward.logprobs, forward.mask))
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
        logprobs, *values = self._of_samples(rows, plan, temperature=temperature_of(config))
        return estimated(rows, logprobs, values=values[0] if values else None, loss=loss, config=config)

    def _of_samples(self, rows: SampleRows, plan: TrainingPlan, *, temperature: float) -> Tensor:
        """Return [1 or 2, rows, T]: log-probs, and values where there are any; 0 outside the responses."""
        old = torch.zeros(1 + self._config.value_head, *rows.shape, device=self._device)
        for chosen in each_row_once(plan, num_rows=len(rows.lengths)):
            for micro, forward in self._evaluated(rows, chosen, temperature=temperature):
                if micro:
                    told = (forward.logprobs,) if forward.values is None else (forward.logprobs, forward.values)
                    for kept, own in zip(old, told, strict=False):
                        kept[list(micro), : own.shape[1]] = torch.where(forward.mask, own, 0.0).float()
        dist.all_reduce(old)  # each row is 0 on all ranks but one: the sum is exact
        return old.cpu()

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
        named = policy_parameters(self._engine.module)  # an adapter never goes this way
        # Under ZeRO 3 a parameter's own shape is that of what this rank holds, or of nothing.
        return [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named]

    def _sent(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole parameters as a sender may keep them: those that ZeRO 3 gathers are copied."""
        for name, parameter in self._gathered():
            yield name, parameter.clone() if self._config.zero_stage == 3 else parameter

    def offload(self) -> None:
        """Keep in the host's memory what training needs beside the weights: moments, masters, gradients."""
        put_aside(self._engine, on_gpu=self._device.type == "cuda")

    def reload(self) -> None:
        """Take back what `offload` put aside; nothing to do when nothing was."""
        self._engine.reload_states()

    def export(self, path: str) -> None:
        """Write an ordinary Hugging Face directory, which appears whole or not at all."""
        weights = {}
        for name, parameter in self._exported():
            if self._rank == 0:
                weights[name] = parameter.detach().cpu().clone()
        target = Path(path)
        beside = fresh_beside(target) if self._rank == 0 else None
        if beside is not None:
            self._engine.module.save_pretrained(beside, state_dict=weights)
            copy_tokenizer(Path(self._source.path), beside)
        if self._adapter is not None:
            self._adapter.write(self._engine.module, beside, whole=self._whole, base=self._base)
        if beside is not None:
            publish_directory(beside, target)
        dist.barrier()

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the rollout pool is given, whole: the policy's parameters, or its adapter's alone.

        A tied head has no entry of its own.
        """
        if self._adapter is not None:
            yield from self._adapter.published(self._engine.module, whole=self._whole)
            return
        for name, parameter in policy_parameters(self._engine.module):
            with self._whole(parameter):
                yield name, parameter.detach()

    def _exported(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole policy, an adapter merged into its base."""
        if self._adapter is None:
            return self._gathered()
        return self._adapter.merged(self._engine.module, whole=self._whole)

    def _whole(self, parameter: Tensor) -> AbstractContextManager[Any]:
        return whole_parameter(parameter) if self._config.zero_stage == 3 else nullcontext()

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
        self._engine.save_checkpoint(
            str(beside),
            tag=CHECKPOINT_TAG,
            client_state={},
            save_latest=False,
            exclude_frozen_parameters=self._adapter is not None,
        )
        torch.save(random_states(), beside / f"random-{self._rank:05d}.pt")
        if self._rank == 0:
            if len(self._first.cache):
                torch.save(self._first.cache.state(), beside / REFERENCE_CACHE)
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
            CorruptCheckpoint: a file is missing, changed or one too many, or it was saved with other settings; another
                number of ranks is no hindrance, but for an adapter.
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
        there = {key: saved.get(key) for key in here}
        # An adapter's checkpoint leaves out its base, which is that of the topology.
        whole = self._adapter is None
        resized = whole and there != here and {**there, "num_ranks": self._num_ranks} == here
        if there != here and not resized:
            raise CorruptCheckpoint(
                f"{source}: saved with {there}, wanted {here}; "
                "set the config back, or start anew from the exported weights"
            )
        with self._readable(source, resized=resized) as folder:
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG, load_module_strict=whole)
        if loaded is None:
            raise RuntimeError(f"{source}: DeepSpeed found nothing to load under tag {CHECKPOINT_TAG!r}")
        self._num_steps, self._num_bad_steps = saved["num_steps"], saved["num_bad_steps"]
        self._kl_coefficient = saved.get("kl_coefficient")
        if (source / REFERENCE_CACHE).is_file():
            self._first.cache.restore(torch.load(source / REFERENCE_CACHE, weights_only=True))
        self._update = None
        states = source / f"random-{self._rank:05d}.pt"
        if states.is_file():  # else a rank that there was not when it was saved: it keeps its own
            restore_random_states(torch.load(states, weights_only=True))
        dist.barrier()

    @contextmanager
    def _readable(self, source: Path, *, resized: bool) -> Iterator[Path]:
        """Give the checkpoint in a form that the engine reads: of another number of ranks, DeepSpeed's universal one.

        Without ZeRO every rank holds everything, and there is nothing to convert.
        """
        universal = resized and self._config.zero_stage > 0
        if universal != self._universal:
            self._build(universal=universal)
        if not universal:
            yield source
            return
        folder = source.with_name(f".{source.name}.universal")
        if self._rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            convert_to_universal(source / CHECKPOINT_TAG, folder / CHECKPOINT_TAG)
        dist.barrier()
        decays = [group["weight_decay"] for group in self._engine.optimizer.param_groups]
        try:
            yield folder
            repair_universal(self._engine.optimizer, decays)
            dist.barrier()
        finally:
            if self._rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def _topology(self) -> dict[str, Any]:
        config = self._config
        topology = {"num_ranks": self._num_ranks, "zero_stage": config.zero_stage, "dtype": config.dtype}
        return {**topology, **adapter_topology(config, base=self._base)}

    def _counters(self) -> dict[str, float | None]:
        return {
            "num_steps": self._num_steps,
            "num_bad_steps": self._num_bad_steps,
            "kl_coefficient": self._kl_coefficient,
        }

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
