"""Owns a run's reward model: what it reads, which pairs train it, how well it knows the others, what it scores.

    an iteration's pairs ──┬─► trained on ────────────► reward group ──► a score of every response ──► the learner
                           └─► held out, by query ────► accuracy

It reads prompt and response, and where it is asked to (METHODS L-CRM; Ye et al. 2024, arXiv 2405.20850) the critique
after them, when it learns and when it scores. A response is read whole, also where the pair that a policy is trained on
would end at its flaw. Knows no DeepSpeed and no torch; trainers/ranks/sequence_scores.py says what a score is.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from actors.critic import critique_id_of
from actors.oversight import Judged
from actors.records import PreferencePair, Reward, Verdict, draw_seed, lineage_id
from trainers.batches import TrainingPlan
from trainers.feedback.reward_config import LOSS, RewardConfig

if TYPE_CHECKING:
    from trainers.training_group import TrainingGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reward model is shown of one response."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The response's, end-of-sequence included, and the critique's."""
    is_cut: bool
    """The critique's end did not fit into the model's context."""

    @property
    def sequence(self) -> tuple[int, ...]:
        """Return all of it."""
        return self.prompt_token_ids + self.token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewarded:
    """What a reward model made of an iteration."""

    rewards: tuple[Reward, ...]
    figures: Mapping[str, float]
    """`accuracy` and `held_out`: share of the held-out pairs whose chosen scores higher, and their number; `pairs`:
    trained on; `loss`, `train_accuracy`: means over its steps; `mean`, `std`: of all scores; `cut`: critiques that did
    not fit. What there is none of is absent."""

    @property
    def scores(self) -> dict[str, float]:
        """Return the scores by response id."""
        return {reward.response_id: reward.score for reward in self.rewards}


def read_response(
    item: Judged, *, critique: Callable[[Judged], Sequence[int] | None] | None = None, longest: int | None = None
) -> Reading | None:
    """Return what a reward model is shown of a response; None where it is to read a critique and there is none.

    Args:
        item: the response.
        critique: gives the token ids of its critique; None: none is read. An empty one changes nothing.
        longest: tokens that the model takes; a critique's end is cut off beyond them.
    """
    response = item.response
    said = () if critique is None else critique(item)
    if said is None:
        return None
    room = len(said) if longest is None else max(0, longest - len(response.prompt_token_ids) - len(response.token_ids))
    return Reading(
        prompt_token_ids=response.prompt_token_ids,
        token_ids=(*response.token_ids, *said[:room]),
        is_cut=room < len(said),
    )


def first_critique(item: Judged, *, run: str) -> str | None:
    """Return the text of a response's first critique, the greedy one, readable or not; None where it was lost."""
    wanted = critique_id_of(run, item.query, item.response, 0)
    return next((critique.text for critique in item.critiques if critique.critique_id == wanted), None)


def certainty(chosen: float, rejected: float) -> float:
    """Return the probability that the chosen is the good one, given that one of the two is and the other is not.

    Args:
        chosen: P(good) of the one, by its verdict.
        rejected: that of the other; the two are taken as independent.

    >>> round(certainty(0.9, 0.2), 6)
    0.972973
    """
    right, wrong = chosen * (1.0 - rejected), rejected * (1.0 - chosen)
    return right / (right + wrong)


def reward_table(
    pairs: Sequence[PreferencePair],
    readings: Mapping[str, Reading],
    verdicts: Mapping[str, Verdict],
    *,
    config: RewardConfig,
) -> pa.Table:
    """Return pairs as a reward model learns from them.

    Args:
        pairs: whose two responses have readings and verdicts.
        readings: by response id.
        verdicts: by response id.
        config: which margins and targets they have.
    """
    ids = pa.list_(pa.int64())
    sides = {
        "prompt_token_ids": [readings[pair.chosen_id].prompt_token_ids for pair in pairs],
        "chosen_token_ids": [readings[pair.chosen_id].token_ids for pair in pairs],
        "rejected_token_ids": [readings[pair.rejected_id].token_ids for pair in pairs],
    }
    return pa.table(
        {
            "pair_id": pa.array([pair.pair_id for pair in pairs], pa.string()),
            **{name: pa.array([list(row) for row in rows], ids) for name, rows in sides.items()},
            "margin": pa.array([pair.margin if config.graded_margins else 0.0 for pair in pairs], pa.float64()),
            "weight": pa.array([pair.weight for pair in pairs], pa.float64()),
            "noise": pa.array([_noise(pair, verdicts, soft=config.soft_targets) for pair in pairs], pa.float64()),
        }
    )


def _noise(pair: PreferencePair, verdicts: Mapping[str, Verdict], *, soft: bool) -> float:
    """Return how likely a pair is labelled the wrong way round: by its own estimate and, if asked, its verdicts'."""
    if not soft:
        return pair.noise
    chosen, rejected = (verdicts[response_id].score for response_id in (pair.chosen_id, pair.rejected_id))
    assert chosen is not None, "a pair's responses are judged"
    assert rejected is not None, "both of them"
    sure = certainty(chosen, rejected)
    return (1.0 - sure) * (1.0 - pair.noise) + sure * pair.noise


def held_out_queries(
    pairs: Sequence[PreferencePair], places: Mapping[str, int], *, share: float, seed: int, iteration: int
) -> frozenset[str]:
    """Return the queries whose pairs do not train: a share of those that have pairs, of two or more at least one.

    Args:
        pairs: of an iteration.
        places: each query's position in it; with the seed all that the draw hangs on, whatever the run's name.
        share: of the queries; 0: none.
        seed: the run's.
        iteration: the pairs'.
    """
    queries = sorted(
        {pair.query_id for pair in pairs}, key=lambda query: draw_seed(seed, "reward", iteration, places[query])
    )
    if share == 0.0 or len(queries) < 2:
        return frozenset()
    return frozenset(queries[: min(max(1, round(share * len(queries))), len(queries) - 1)])


def accuracy(pairs: Sequence[PreferencePair], scores: Mapping[str, float]) -> float | None:
    """Return the share of pairs whose chosen scores higher than its rejected; equal scores are wrong; None of none."""
    if not pairs:
        return None
    return sum(scores[pair.chosen_id] > scores[pair.rejected_id] for pair in pairs) / len(pairs)


class RewardModel:
    """A group that learns to score responses from pairs; its weights are no policy's."""

    def __init__(
        self,
        group: TrainingGroup,
        *,
        config: RewardConfig,
        read: Callable[[Judged], Reading | None],
        run: str,
        seed: int,
    ) -> None:
        """Take a group that is running.

        Args:
            group: of a model with a value head.
            config: how it learns.
            read: what it is shown of a response (`read_response`).
            run: the run's name.
            seed: the run's; the order of the pairs and what is held out depend on it.
        """
        self._group = group
        self._config = config
        self._read = read
        self._run = run
        self._seed = seed

    async def learn(
        self,
        judged: Sequence[Judged],
        verdicts: Sequence[Verdict],
        pairs: Sequence[PreferencePair],
        *,
        iteration: int,
    ) -> Rewarded:
        """Train on an iteration's pairs but for the held-out ones, then score all its responses.

        Without any pair the responses are scored by what was learnt before; untrained, all of them by 0.

        Args:
            judged: all responses of the iteration.
            verdicts: theirs.
            pairs: made of these responses.
            iteration: theirs.
        """
        read = [(item, self._read(item)) for item in judged]
        readings = {item.response.response_id: reading for item, reading in read if reading is not None}
        usable = [pair for pair in pairs if pair.chosen_id in readings and pair.rejected_id in readings]
        places = {item.query.query_id: item.query.sample_index for item in judged}
        held_out = held_out_queries(usable, places, share=self._config.held_out, seed=self._seed, iteration=iteration)
        shown = [pair for pair in usable if pair.query_id not in held_out]
        means = await self._train(shown, readings, verdicts, judged, iteration=iteration) if shown else {}
        scores = await self._scores(readings)
        hidden = [pair for pair in usable if pair.query_id in held_out]
        known = accuracy(hidden, scores)
        rewards = tuple(
            Reward(
                reward_id=lineage_id(
                    self._run, iteration=iteration, stage="rewards", parents=[item.response.response_id]
                ),
                query_id=item.query.query_id,
                response_id=item.response.response_id,
                score=scores[item.response.response_id],
                held_out=item.query.query_id in held_out,
                iteration=iteration,
            )
            for item in judged
            if item.response.response_id in scores
        )
        figures = {
            **({} if known is None else {"accuracy": known}),
            "held_out": float(len(hidden)),
            "pairs": float(len(shown)),
            **({"loss": means["loss"], "train_accuracy": means["accuracy"]} if "loss" in means else {}),
            **(
                {"mean": statistics.fmean(scores.values()), "std": statistics.pstdev(scores.values())} if scores else {}
            ),
            "cut": float(sum(reading.is_cut for reading in readings.values())),
        }
        logger.info("reward model: iteration %d: %s", iteration, figures)
        return Rewarded(rewards=rewards, figures=figures)

    async def _train(
        self,
        pairs: Sequence[PreferencePair],
        readings: Mapping[str, Reading],
        verdicts: Sequence[Verdict],
        judged: Sequence[Judged],
        *,
        iteration: int,
    ) -> dict[str, float]:
        of = {item.response.response_id: item for item in judged}
        verdict_of = {verdict.response_id: verdict for verdict in verdicts}
        plan = TrainingPlan.of(
            [pair.pair_id for pair in pairs],
            # Where a pair stands, whatever the run's name.
            keys=[
                f"{of[pair.chosen_id].query.sample_index}/{of[pair.chosen_id].response.sample_index}/"
                f"{of[pair.rejected_id].response.sample_index}"
                for pair in pairs
            ],
            batch_size=self._config.training.batch_size,
            epochs=self._config.epochs,
            seed=self._seed * 1_000 + iteration,
        )
        report = await self._group.update(
            reward_table(pairs, readings, verdict_of, config=self._config),
            loss=LOSS,
            loss_config=self._config.loss,
            plan=plan,
        )
        return report.means

    async def _scores(self, readings: Mapping[str, Reading]) -> dict[str, float]:
        """Return the scores by response id; copies of a text are scored once, so that theirs are equal to the bit."""
        distinct = list(dict.fromkeys(reading.sequence for reading in readings.values()))
        found = dict(zip(distinct, await self._group.scores(distinct), strict=True)) if distinct else {}
        return {response_id: found[reading.sequence] for response_id, reading in readings.items()}

    async def save(self, path: Path) -> None:
        """Write a checkpoint of weights, optimizer and steps."""
        await self._group.save(path)

    async def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CorruptCheckpoint: its files or its topology are not as saved.
        """
        await self._group.load(path)
