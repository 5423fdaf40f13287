"""Owns what an iteration's verdicts become: the batch that the learner is trained on, by what its loss takes.

    responses, critiques, verdicts ──► agreeing ──┬─► scored answers (samples)  ◄── reward model, objectives
                                                  ├─► groups
                                                  ├─► judged answers
                                                  ├─► accepted answers          ──► selection
                                                  └─► pairs  ◄── refined pairs  ──► noise, weight, margins

What is stored is in the journal before it is trained on, and what an earlier sitting stored stands: a resume makes the
same batch. Knows neither DeepSpeed nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from actors.oversight import Judged
from actors.records import PreferencePair, Verdict, from_table
from cluster.config import Config
from trainers.feedback.objectives import ObjectivesConfig, Scores, rescored, scalar_scores, score_all
from trainers.feedback.pair_feedback import PairFeedback
from trainers.feedback.preferences import Pairs, PreferenceConfig, build_pairs
from trainers.feedback.refinement import Refining
from trainers.feedback.rejection_pairs import RejectionSettings, rejection_drawing
from trainers.feedback.reward_model import RewardModel
from trainers.feedback.segments import SegmentSettings, TokensSpanning
from trainers.feedback.selection import SelectionConfig, Trusted, agreeing, select_responses
from trainers.feedback.trade_offs import TradeOffs
from trainers.feedback.training_data import (
    Material,
    TrainingData,
    learns_from_equals,
    left_out,
    material_of,
    of_accepted,
    of_groups,
    of_judged,
    of_pairs,
    of_samples,
    reads_prompts,
    reads_spans,
)
from trainers.journal import Journal
from trainers.loop_state import LoopState, Rollouts
from trainers.training_group import TrainingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """The sections of a run's config that say what verdicts become."""

    loss: str
    loss_config: Config
    preferences: PreferenceConfig
    tokens_spanning: TokensSpanning
    """How many of the learner's tokens it takes to spell so many characters (actors.chat.num_tokens_spanning)."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Which labels are left out as probably wrong."""
    objectives: ObjectivesConfig | None = None
    """What responses are scored by besides the verdict; None: by that alone."""
    trade_offs: TradeOffs = field(default_factory=TradeOffs)
    """Of a learner that is trained for all of them: which one holds when."""

    @property
    def material(self) -> Material:
        """Return what the loss trains a policy on."""
        material = material_of(self.loss)
        assert material is not None, "the run's config's own check"
        return material


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBuilder:
    """Builds the batches of one run."""

    config: BatchConfig
    run: str
    """The run's name."""
    seed: int
    """The run's."""
    max_age: int
    """Versions that a sample may be behind the weights that it trains."""
    journal: Journal
    logged: Callable[[int], Mapping[str, pa.Table]]
    """What an earlier sitting stored of an open iteration, by stage."""
    reward_model: RewardModel | None = None
    """Scores the samples in the place of the verdicts; None: the verdicts do."""
    refining: Refining | None = None
    """Has failed answers mended, to be preferred to them; None: none are."""

    def trusted(self, judged: Sequence[Judged], verdicts: Sequence[Verdict]) -> Trusted:
        """Return what is not left out because its critiques differ too much."""
        return agreeing(judged, verdicts, min_agreement=self.config.selection.min_agreement)

    async def build(self, rollouts: Rollouts, trusted: Trusted, *, state: LoopState) -> TrainingData:
        """Return what the loss is to be given.

        Args:
            rollouts: of the iteration; of refined pairs it is told what became of the failed answers.
            trusted: its responses and verdicts.
            state: what the loop carries: experts' checks, and what scores were like so far, which these are added to.
        """
        config, iteration = self.config, rollouts.iteration
        judged, verdicts = trusted.judged, trusted.verdicts
        scores = self._score(trusted, state)
        if config.material == "pairs":
            data = of_pairs(await self._pairs(rollouts, verdicts, scores, state), rollouts.place)
        elif config.material == "samples":
            data = self._samples(judged, verdicts, iteration=iteration)
            if config.objectives is not None:
                objectives = config.trade_offs.weighed(config.objectives, iteration)
                data = rescored(data, scalar_scores(scores, state.scores, objectives))
        elif config.material == "groups":
            equals = learns_from_equals(config.loss)
            data = of_groups(judged, verdicts, version=iteration - 1, max_age=self.max_age, equals=equals)
        elif config.material == "judged":
            spans = config.tokens_spanning if config.preferences.cut_at_flaw else None
            data = of_judged(judged, verdicts, version=iteration - 1, max_age=self.max_age, spans=spans)
        else:
            spans = config.tokens_spanning if reads_spans(config.loss) else None
            data = of_accepted(
                judged,
                verdicts,
                version=iteration - 1,
                max_age=self.max_age,
                spans=spans,
                prompts=reads_prompts(config.loss),
            )
            data = select_responses(data, rollouts.responses, config.selection, iteration=iteration)
        return replace(data, dropped={**data.dropped, **trusted.dropped})

    async def pairs_to_score_by(
        self, rollouts: Rollouts, trusted: Trusted, *, state: LoopState
    ) -> Sequence[PreferencePair]:
        """Return the pairs that the reward model learns from; none without one."""
        if self.reward_model is None:
            return ()
        return (await self._pairs(rollouts, trusted.verdicts, {}, state)).pairs

    async def rewarded(
        self,
        judged: Sequence[Judged],
        verdicts: Sequence[Verdict],
        pairs: Sequence[PreferencePair],
        *,
        model: RewardModel,
        iteration: int,
    ) -> tuple[TrainingData, Mapping[str, float]]:
        """Train the reward model on the iteration's pairs; return the samples by its scores, and what to say of it."""
        found = await model.learn(judged, verdicts, pairs, iteration=iteration)
        if "rewards" not in self.logged(iteration):
            await self.journal.add("rewards", found.rewards, iteration=iteration)
        return self._samples(judged, verdicts, iteration=iteration, scores=found.scores), found.figures

    async def keep_left_out(
        self, judged: Sequence[Judged], verdicts: Sequence[Verdict], data: TrainingData, *, iteration: int
    ) -> None:
        """Store which responses are not trained on; of pairs the pairs say it."""
        material = self.config.material
        if material != "pairs" and "left_out" not in self.logged(iteration):
            unused = left_out(judged, verdicts, data, material=material, run=self.run, iteration=iteration)
            await self.journal.add("left_out", unused, iteration=iteration)

    def plan(self, data: TrainingData, *, batch_size: int, epochs: int, seed: int) -> TrainingPlan:
        """Return which rows are in which step of the update."""
        return self._pair_feedback.plan(data, batch_size=batch_size, epochs=epochs, seed=seed)

    # -------------------------------------------------------------------------------------------------- by material

    @property
    def _pair_feedback(self) -> PairFeedback:
        config = self.config
        return PairFeedback(mix=config.preferences.mix, selection=config.selection, objectives=config.objectives)

    def _samples(
        self,
        judged: Sequence[Judged],
        verdicts: Sequence[Verdict],
        *,
        iteration: int,
        scores: Mapping[str, float] | None = None,
    ) -> TrainingData:
        settings = self.config.loss_config
        return of_samples(
            judged,
            verdicts,
            version=iteration - 1,
            max_age=self.max_age,
            spans=self.config.tokens_spanning,
            segments=settings if isinstance(settings, SegmentSettings) else None,
            scores=scores,
        )

    def _score(self, trusted: Trusted, state: LoopState) -> Scores:
        """Return what the objectives make of the responses, and remember what they were like; empty without any."""
        objectives = self.config.objectives
        if objectives is None:
            return {}
        scores = score_all(trusted.judged, trusted.verdicts, objectives)
        state.scores.add(scores, objectives.names)
        return scores

    async def _pairs(self, rollouts: Rollouts, verdicts: Sequence[Verdict], scores: Scores, state: LoopState) -> Pairs:
        """Return the preference pairs of the verdicts, stored before they are trained on."""
        iteration, refining = rollouts.iteration, self.refining
        settings = self.config.loss_config
        built = build_pairs(
            list(rollouts.queries.values()),
            rollouts.responses,
            verdicts,
            config=self.config.preferences,
            run=self.run,
            tokens_spanning=self.config.tokens_spanning,
            version=iteration - 1,
            max_age=self.max_age,
            drawing=rejection_drawing(settings, seed=self.seed) if isinstance(settings, RejectionSettings) else None,
        )
        joined = None if refining is None else refining.joined(built, rollouts, verdicts)
        if joined is not None:
            built, verdicts = joined.pairs, joined.verdicts
        pairs = self._pair_feedback.told(
            built, verdicts, iteration=iteration, checked=state.checked, scores=scores, running=state.scores
        )
        told = pairs.pairs
        if refining is not None:
            pairs = refining.within_share(pairs, rollouts)
        logged = self.logged(iteration)
        if "pairs" in logged:
            pairs = replace(pairs, pairs=tuple(from_table(logged["pairs"], PreferencePair)))
        else:
            await self.journal.add("pairs", pairs.pairs, iteration=iteration)
        if joined is not None:
            rollouts.refinement = joined.fates(told, pairs.pairs)
        return pairs
