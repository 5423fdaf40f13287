"""Owns what the loop carries: the records of an open iteration, the state between two, the clock of the stages."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from actors.archive import Archive
from actors.oversight import Judged
from actors.records import (
    Critique,
    EvaluationAnswer,
    LeftOut,
    PreferencePair,
    Proposal,
    Query,
    RefinedResponse,
    Response,
    Reward,
    Verdict,
    from_table,
)
from cluster.pool_errors import PoolExhausted
from trainers.feedback.objectives import RunningScores
from trainers.feedback.preferences import age_of

logger = logging.getLogger(__name__)

STAGES = {
    "proposals": (Proposal, "proposal_id"),
    "queries": (Query, "query_id"),
    "responses": (Response, "response_id"),
    "critiques": (Critique, "critique_id"),
    "verdicts": (Verdict, "verdict_id"),
    "refinements": (RefinedResponse, "refinement_id"),
    "refinement_critiques": (Critique, "critique_id"),
    "refinement_verdicts": (Verdict, "verdict_id"),
    "pairs": (PreferencePair, "pair_id"),
    "rewards": (Reward, "reward_id"),
    "left_out": (LeftOut, "left_out_id"),
    "evaluations": (EvaluationAnswer, "answer_id"),
}
"""The journal's stages: the record of each and the column that identifies a row."""


@dataclass(slots=True)
class Rollouts:
    """The records of one iteration as they come in, by id."""

    iteration: int
    proposals: dict[str, Proposal] = field(default_factory=dict)
    queries: dict[str, Query] = field(default_factory=dict)
    responses: dict[str, Response] = field(default_factory=dict)
    critiques: dict[str, Critique] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    """Requests that no replica answered, by stage; a resume asks for them again, but for `refinement_stands`."""
    refined: dict[str, RefinedResponse] = field(default_factory=dict)
    """What failed answers were mended to; no answers of the learner's, so apart from `responses`."""
    refined_critiques: dict[str, Critique] = field(default_factory=dict)
    refined_verdicts: dict[str, Verdict] = field(default_factory=dict)
    """What is said of each, by its id, as it was stored."""
    refinement_stands: bool = False
    """An earlier sitting has stored their verdicts, or the pairs: nothing more is asked for them."""
    refinement: Counter[str] = field(default_factory=Counter)
    """What became of the failed answers that were to be mended (`feedback.refinement`)."""

    @classmethod
    def of(cls, logged: Mapping[str, pa.Table], *, iteration: int) -> Rollouts:
        """Return what the journal holds of an open iteration; of queries, see `Attacker.query_of`."""
        rollouts = cls(iteration=iteration)
        if "proposals" in logged:
            rollouts.proposals = {row.proposal_id: row for row in from_table(logged["proposals"], Proposal)}
        if "queries" in logged:
            rollouts.queries = {row.query_id: row for row in from_table(logged["queries"], Query)}
        if "responses" in logged:
            rollouts.responses = {row.response_id: row for row in from_table(logged["responses"], Response)}
        if "critiques" in logged:
            rollouts.critiques = {row.critique_id: row for row in from_table(logged["critiques"], Critique)}
        if "refinements" in logged:
            rollouts.refined = {row.refinement_id: row for row in from_table(logged["refinements"], RefinedResponse)}
        if "refinement_critiques" in logged:
            critiques = from_table(logged["refinement_critiques"], Critique)
            rollouts.refined_critiques = {row.critique_id: row for row in critiques}
        if "refinement_verdicts" in logged:
            verdicts = from_table(logged["refinement_verdicts"], Verdict)
            rollouts.refined_verdicts = {row.response_id: row for row in verdicts}
        rollouts.refinement_stands = "refinement_verdicts" in logged or "pairs" in logged
        return rollouts

    @contextmanager
    def counting_lost(self, stage: str) -> Iterator[None]:
        """Count requests that a pool which goes on could not have answered; they are missing, never a low score."""
        try:
            yield
        except PoolExhausted as error:
            self.lost[stage] += len(error.reasons)
            logger.warning("%s lost: %s", stage, error)

    @property
    def next_proposal(self) -> int:
        """Index of the first proposal that is not here."""
        return 1 + max((row.sample_index for row in self.proposals.values()), default=-1)

    def place(self, pair: PreferencePair) -> str:
        """Return where a pair stands in its iteration, whatever the run's name: its query and its two samples."""
        query, rejected = self.queries[pair.query_id].sample_index, self.responses[pair.rejected_id].sample_index
        if pair.chosen_id in self.refined:
            return f"{query}/refined {self.refined[pair.chosen_id].sample_index}/{rejected}"
        return f"{query}/{self.responses[pair.chosen_id].sample_index}/{rejected}"

    def ages(self, response_ids: Sequence[str], *, version: int) -> Counter[int]:
        """Return how many samples are how many policy versions behind the weights to be trained.

        What an answer was mended to is none.
        """
        sampled = [self.responses[response_id] for response_id in response_ids if response_id not in self.refined]
        return Counter(age_of(response, version=version) for response in sampled)

    def judged(self) -> list[Judged]:
        """Return every response with its critiques, in the order in which queries and responses were sampled."""
        by_response: dict[str, list[Critique]] = {response_id: [] for response_id in self.responses}
        for critique in self.critiques.values():
            by_response[critique.response_ids[0]].append(critique)
        places = {
            response.response_id: (self.queries[response.query_id].sample_index, response.sample_index)
            for response in self.responses.values()
        }
        return [
            Judged(
                query=self.queries[self.responses[response_id].query_id],
                response=self.responses[response_id],
                critiques=tuple(sorted(by_response[response_id], key=lambda c: c.critique_id)),
            )
            for response_id in sorted(places, key=lambda response_id: places[response_id])
        ]


@dataclass(slots=True)
class LoopState:
    """What the loop carries from one iteration to the next; it goes into every COMMIT.json."""

    iteration: int
    archive: Archive
    num_verdicts: int = 0
    num_asked: int = 0
    gold: Counter[str] = field(default_factory=Counter)
    parity_max_abs_diff: float = 0.0
    checked: Counter[str] = field(default_factory=Counter)
    """The critic's verdicts that experts checked on answers drawn at random (`feedback.mixed_feedback.tally`)."""
    scores: RunningScores = field(default_factory=RunningScores)
    """What each objective's scores were like so far (`objectives` of a run's config)."""
    wall_s: dict[str, float] = field(default_factory=dict)
    """Seconds by phase of all sittings up to the commit (`WallClock`)."""
    kl_spent: bool = False
    """The learner is further from the run's first weights than `loop.kl_budget.run` allows: no iteration follows."""

    @property
    def policy_version(self) -> str:
        """The learner's weights after this iteration."""
        return f"v{self.iteration}"

    def copy(self) -> LoopState:
        """Return a state that shares nothing with this one."""
        return LoopState.restore(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        return {
            "iteration": self.iteration,
            "policy_version": self.policy_version,
            "archive": self.archive.snapshot(),
            "num_verdicts": self.num_verdicts,
            "num_asked": self.num_asked,
            "gold": dict(self.gold),
            "parity_max_abs_diff": self.parity_max_abs_diff,
            "checked": dict(self.checked),
            "scores": self.scores.snapshot(),
            "wall_s": dict(self.wall_s),
            "kl_spent": self.kl_spent,
        }

    @classmethod
    def restore(cls, snapshot: Mapping[str, Any]) -> LoopState:
        """Return the state of a snapshot."""
        return cls(
            iteration=snapshot["iteration"],
            archive=Archive.restore(snapshot["archive"]),
            num_verdicts=snapshot["num_verdicts"],
            num_asked=snapshot["num_asked"],
            gold=Counter(snapshot["gold"]),
            parity_max_abs_diff=snapshot["parity_max_abs_diff"],
            checked=Counter(snapshot.get("checked", {})),
            scores=RunningScores.restore(snapshot.get("scores", {})),
            wall_s=dict(snapshot["wall_s"]),
            kl_spent=snapshot.get("kl_spent", False),
        )


class WallClock:
    """Wall-clock seconds of a run by phase: bootstrap, start, iterations. What a kill cut off is not in them."""

    def __init__(self) -> None:
        """Begin a sitting."""
        self._begin = time.monotonic()
        self._bootstrap_s = 0.0
        self._loop_begin: float | None = None
        self.before: dict[str, float] = {}
        """Seconds of the sittings before this one."""

    def bootstrapped(self, seconds: float) -> None:
        """Note how long the bootstrap took in this sitting."""
        self._bootstrap_s = seconds

    def begin_loop(self) -> None:
        """Note that all is ready for the next iteration; what came before was the start."""
        self._loop_begin = time.monotonic()

    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase so far, of the sittings before and this one."""
        now = time.monotonic()
        loop_begin = now if self._loop_begin is None else self._loop_begin
        here = {
            "bootstrap": self._bootstrap_s,
            "start": loop_begin - self._begin - self._bootstrap_s,
            "iterations": now - loop_begin,
        }
        return {phase: self.before.get(phase, 0.0) + seconds for phase, seconds in here.items()}


class StageClock:
    """Wall-clock seconds per stage of one iteration."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - begin

    def seconds(self) -> dict[str, float]:
        """Return the seconds per stage so far."""
        return dict(self._seconds)
