"""Owns what becomes of an iteration's pairs before they are stored: noise and weight, selection, other margins.

    pairs ──► noise and weight by source (mixed_feedback) ──► small loss (selection) ──► margins (objectives)

Each is off unless the config has it; what it leaves out is counted: `noisy`, `large_loss`, `unscored`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.oversight import EXPERT
from actors.records import Verdict
from trainers.feedback.mixed_feedback import MixConfig, error_rates, mixed
from trainers.feedback.mixed_plan import plan_with_share
from trainers.feedback.objectives import ObjectivesConfig, RunningScores, Scores, with_margins
from trainers.feedback.preferences import Pairs
from trainers.feedback.selection import SelectionConfig, select_pairs
from trainers.feedback.training_data import TrainingData
from trainers.training_group import TrainingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFeedback:
    """What an iteration's pairs are told by."""

    mix: MixConfig | None
    selection: SelectionConfig
    objectives: ObjectivesConfig | None

    def told(
        self,
        pairs: Pairs,
        verdicts: Sequence[Verdict],
        *,
        iteration: int,
        checked: Mapping[str, int],
        scores: Scores,
        running: RunningScores,
    ) -> Pairs:
        """Return the pairs that are left, with noise, weight and margins.

        Args:
            pairs: of the iteration, as they were built.
            verdicts: that they were built of.
            iteration: from 1.
            checked: the critic's verdicts that experts checked so far (`mixed_feedback.tally`).
            scores: of the responses by objective; empty without objectives.
            running: what scores were like so far.
        """
        rows, dropped = pairs.pairs, dict(pairs.dropped)
        if self.mix is not None:
            rows, dropped["noisy"] = mixed(rows, verdicts, rates=error_rates(checked, self.mix), config=self.mix)
        rows, dropped["large_loss"] = select_pairs(rows, self.selection, iteration=iteration)
        if self.objectives is not None:
            rows, dropped["unscored"] = with_margins(rows, scores, running, self.objectives)
        return Pairs(pairs=rows, dropped={reason: num for reason, num in dropped.items() if num})

    def plan(self, data: TrainingData, *, batch_size: int, epochs: int, seed: int) -> TrainingPlan:
        """Return an update's plan: with experts' pairs in every step where the config wants them there."""
        share = 0.0 if self.mix is None else self.mix.expert_share
        kept = [False] * len(data.row_ids)
        if share and "source" in data.table.column_names:
            kept = [source == EXPERT for source in data.table.column("source").to_pylist()]
        return plan_with_share(
            data.row_ids, kept=kept, share=share, batch_size=batch_size, epochs=epochs, seed=seed, keys=data.places
        )
