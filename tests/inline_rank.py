"""A learner group of one real rank in this process: DeepSpeed without Ray, for tests of what the loop trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from actors.generation import Completion
from cluster.config import Config
from tests.fake_roles import FakeLearnerGroup, applied
from tests.tiny_models import write_llama
from trainers.importance import ImportanceConfig
from trainers.kl import KlBudget
from trainers.ranks.deepspeed_worker import DeepSpeedRank, StepReport
from trainers.ranks.model_source import ModelSource
from trainers.ranks.rendezvous import Rendezvous
from trainers.training_config import ReferenceWeights, TrainingConfig
from trainers.training_group import TrainingPlan, UpdateReport

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class HeldTable:
    """Stands for a `TableRef`: the table is here."""

    table: pa.Table

    def fetch(self) -> pa.Table:
        return self.table


class InlineRank:
    """One rank over a tiny model."""

    def __init__(self, folder: Path) -> None:
        # Tokens are characters' codes (tests.fake_pool), and what is written here has none above 101.
        self.source = ModelSource(path=str(write_llama(folder / "llama", num_layers=1)))
        # A model this small is quicker with one thread, above all where other processes want the cores too.
        self._threads_before = torch.get_num_threads()
        self.rank = DeepSpeedRank(rank=0, num_ranks=1, threads=1)
        port = self.rank.host_rendezvous(host="127.0.0.1", timeout_s=TIMEOUT_S)
        self.rank.start(
            config=TrainingConfig(num_ranks=1),
            source=self.source,
            rendezvous=Rendezvous(host="127.0.0.1", port=port, one_node=True),
            timeout_s=TIMEOUT_S,
        )

    def close(self) -> None:
        """Leave the process as it was."""
        self.rank.close()
        torch.set_num_threads(self._threads_before)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the policy's."""
        module: Any = self.rank._model.engine.module
        return {name: p.detach().clone() for name, p in module.named_parameters() if not name.startswith("value_head")}


class InlineLearnerGroup(FakeLearnerGroup):
    """Trains the tiny model on what it is given; what the learner answers hangs on the fake's numbers, as there."""

    def __init__(self, inline: InlineRank, config: TrainingConfig) -> None:
        super().__init__()
        inline.rank.open(config=config, source=inline.source)
        self.rank = inline.rank
        self.tables: list[pa.Table] = []
        self.reports: list[UpdateReport] = []

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
        """Make every step of the plan for real."""
        said = self.rank.begin_update(
            HeldTable(table),  # type: ignore[arg-type]
            plan=plan,
            loss=loss,
            loss_config=loss_config,
            importance=importance,
            reference_weights=reference_weights,
            kl_budget=kl_budget,
        )
        steps = tuple(self.rank.steps(0, len(plan.steps)))
        slots = tuple(slot for step in steps for slot in plan.slots(step.step))
        for slot in slots:
            self.weights = applied(self.weights, row_id=slot.row_id, epoch=slot.epoch, chosen="")
        report = UpdateReport(slots=slots, steps=steps, wall_s=0.1, reference_s=0.0, staleness=said)
        self.plans.append(plan)
        self.tables.append(table)
        self.reports.append(report)
        return report

    def as_sampled(self, said: Completion) -> Completion:
        """Return what the rollout engine says with the tiny model's log-probs."""
        (logprobs,) = self.rank.logprobs([(*said.prompt_token_ids, *said.token_ids)]).values()
        return replace(said, logprobs=logprobs[len(said.prompt_token_ids) - 1 :])
