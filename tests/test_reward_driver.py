"""The driver trains a reward model before the learner, journals its scores, commits it, and resumes with it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from actors.records import PreferencePair, Reward, from_table
from cluster.commits import last_commit
from cluster.store import read_stage
from tests.fake_roles import Settings, fake_run, write_blank_run
from trainers.feedback.reward_config import RewardConfig
from trainers.summary import read_metrics

SETTINGS = Settings(iterations=3, reward=RewardConfig(kind="model"))


class Killed(Exception):
    """What ends a sitting in these tests."""


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blank_run(tmp_path_factory.mktemp("blank") / "run")


@pytest.fixture(scope="module")
def whole(blank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(blank, path)
    fake_run(path, SETTINGS).finish()
    return path


def rewards_of(run: Path, iteration: int) -> list[Reward]:
    return sorted(from_table(read_stage(run, "rewards", iteration=iteration), Reward), key=lambda row: row.response_id)


def pairs_of(run: Path, iteration: int) -> list[PreferencePair]:
    table = read_stage(run, "pairs", iteration=iteration)
    return from_table(table, PreferencePair) if table.num_columns else []


def checkpoint(run: Path, of: str, file: str, *, iteration: int = 3) -> Any:
    return json.loads((run / of / f"iteration={iteration:06d}" / file).read_text())


def test_every_response_is_scored_once_and_the_learner_is_trained_on_the_scores(whole: Path) -> None:
    learner = checkpoint(whole, "checkpoints", "learner.json")
    for row in read_metrics(whole):
        rewards = rewards_of(whole, row.iteration)
        responses = read_stage(whole, "responses", iteration=row.iteration).column("response_id").to_pylist()
        assert [reward.response_id for reward in rewards] == sorted(responses)
        assert row.material == "samples"
        assert row.pairs_trained == len(rewards) == 40
        assert row.seconds["reward"] >= 0
    trained = Counter(slot[0] for slot in learner["slots"])
    scored = [reward.response_id for iteration in (1, 2, 3) for reward in rewards_of(whole, iteration)]
    assert trained == dict.fromkeys(scored, 2)  # two epochs of the learner's


def test_pairs_of_held_out_queries_never_train_the_reward_model(whole: Path) -> None:
    slots = checkpoint(whole, "checkpoints-reward", "reward.json")["slots"]
    trained = Counter(slot[0] for slot in slots)
    num_hidden = 0
    for row in read_metrics(whole):
        rewards, pairs = rewards_of(whole, row.iteration), pairs_of(whole, row.iteration)
        scores = {reward.response_id: reward.score for reward in rewards}
        held_out = {reward.query_id for reward in rewards if reward.held_out}
        hidden = [pair for pair in pairs if pair.query_id in held_out]
        assert (len(hidden) > 0) == (len({pair.query_id for pair in pairs}) > 1)
        num_hidden += len(hidden)
        for pair in pairs:
            assert trained[pair.pair_id] == (0 if pair.query_id in held_out else 1)
        assert row.training["reward_model_held_out"] == len(hidden)
        assert row.training["reward_model_pairs"] == len(pairs) - len(hidden)
        right = sum(scores[pair.chosen_id] > scores[pair.rejected_id] for pair in hidden)
        assert row.training.get("reward_model_accuracy") == (right / len(hidden) if hidden else None)
    assert num_hidden > 0
    assert sum(trained.values()) == len(trained) > 0


def test_a_commit_names_both_checkpoints_and_the_older_ones_are_pruned(whole: Path) -> None:
    commit = last_commit(whole)
    assert commit is not None
    assert [file.path for file in commit.checkpoint] == [
        "checkpoints/iteration=000003/learner.json",
        "checkpoints-reward/iteration=000003/reward.json",
    ]
    for name in ("checkpoints", "checkpoints-reward"):
        assert sorted(path.name for path in (whole / name).iterdir()) == ["iteration=000002", "iteration=000003"]


@pytest.mark.parametrize("point", ["pairs 2", "reward step 2", "rewards 2", "step 2", "commit 2: manifest written"])
def test_a_run_killed_around_its_reward_model_resumes_to_the_run_that_it_would_have_been(
    whole: Path, blank: Path, tmp_path: Path, point: str
) -> None:
    path = tmp_path / "run"
    shutil.copytree(blank, path)
    reached = []

    def kill(name: str, num: int) -> None:
        reached.append(name)
        if name == point:
            raise Killed

    first = fake_run(path, SETTINGS, reach=kill)
    with pytest.raises(Killed):
        first.finish()
    assert reached[-1] == point
    commit = last_commit(path)
    assert commit is not None
    assert commit.iteration == 1
    fake_run(path, SETTINGS).finish()
    for iteration in (1, 2, 3):
        assert rewards_of(path, iteration) == rewards_of(whole, iteration)
    for of, file in (("checkpoints", "learner.json"), ("checkpoints-reward", "reward.json")):
        assert checkpoint(path, of, file) == checkpoint(whole, of, file)


def test_a_damaged_checkpoint_of_the_reward_model_is_not_resumed_from(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    (path / "checkpoints-reward" / "iteration=000003" / "reward.json").write_text("{}")
    commit = last_commit(path)
    assert commit is not None
    assert commit.iteration == 2
