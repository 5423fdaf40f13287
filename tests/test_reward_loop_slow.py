"""A whole run on the real engines whose learner learns from the scores of a reward model that reads critiques."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.records import PreferencePair, Response, Reward, from_table
from cluster.commits import last_commit
from cluster.store import read_stage
from tests.sitting import NUM_QUERIES, NUM_SAMPLES, Sitting, finished
from trainers.summary import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_with_a_reward_model_learns_from_its_scores(home: Path, sit: Callable[..., Sitting]) -> None:
    run = home / "runs" / "rewarded"
    words = ["--loss.kind", "grpo", "--reward.kind", "model", "--reward.critiques", "true", "--loop.epochs", "2"]
    sitting = sit("run", "tiny.toml", "--name", "rewarded", *words)
    assert sitting.end() == 0, sitting.output[-3000:]
    finished(run)
    for row in read_metrics(run):
        assert row.material == "samples"
        rewards = from_table(read_stage(run, "rewards", iteration=row.iteration), Reward)
        responses = from_table(read_stage(run, "responses", iteration=row.iteration), Response)
        assert {reward.response_id for reward in rewards} == {response.response_id for response in responses}
        assert len(rewards) == row.pairs_trained == NUM_QUERIES * NUM_SAMPLES
        scores = {reward.response_id: reward.score for reward in rewards}
        # What the learner was trained on are these scores.
        assert row.training["score"] == pytest.approx(statistics.fmean(scores.values()), abs=1e-6)
        assert row.training["reward_model_std"] > 0
        # What the metrics say of the reward model follows from the journal.
        pairs = from_table(read_stage(run, "pairs", iteration=row.iteration), PreferencePair)
        held_out = {reward.query_id for reward in rewards if reward.held_out}
        hidden = [pair for pair in pairs if pair.query_id in held_out]
        assert row.training["reward_model_held_out"] == len(hidden) > 0
        assert row.training["reward_model_pairs"] == len(pairs) - len(hidden) > 0
        right = sum(scores[pair.chosen_id] > scores[pair.rejected_id] for pair in hidden)
        assert row.training["reward_model_accuracy"] == pytest.approx(right / len(hidden))
    commit = last_commit(run)
    assert commit is not None
    assert {Path(file.path).parts[:2] for file in commit.checkpoint} == {
        ("checkpoints", "iteration=000002"),
        ("checkpoints-reward", "iteration=000002"),
    }
    kept = sorted(path.name for path in (run / "checkpoints-reward").iterdir())
    assert kept == ["iteration=000001", "iteration=000002"]
    # No policy has a head.
    assert not list((run / "policies").glob("*/*reward*"))
