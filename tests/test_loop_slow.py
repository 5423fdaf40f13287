"""The whole loop on real engines, by the command line: killed, resumed, replayed; nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from actors.records import PreferencePair, Response, from_table
from cluster.append_log import read_log
from cluster.commits import last_commit
from cluster.scaling import read_pools, write_wanted
from cluster.store import read_stage
from tests.sitting import NUM_QUERIES, NUM_SAMPLES, Sitting, finished
from trainers.loop_state import Rollouts
from trainers.run_config import read_resolved
from trainers.summary import read_metrics
from trainers.training_group import ModelSource, TrainingGroup, TrainingPlan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def logged_stages(run: Path, *, iteration: int) -> list[str]:
    """Return the stage of each record that the log of an open iteration holds."""
    path = run / "journal" / f"iteration={iteration:06d}" / "append.log"
    payloads = read_log(path).payloads
    return [str(json.loads(payload[4 : 4 + int.from_bytes(payload[:4], "little")])["stage"]) for payload in payloads]


def replayed(run: Path, *, target: Path) -> Path:
    """Train a fresh group on the run's committed pairs, as planned, and return the policy that it exports."""
    config = read_resolved(run / "resolved.json")
    (base,) = (run.parent / ".cache").glob("bootstrap-*")

    async def replay() -> None:
        group = TrainingGroup(name="replay", source=ModelSource(path=str(base)), config=config.learner.training)
        await group.start()
        try:
            for iteration in range(1, config.loop.iterations + 1):
                table = read_stage(run, "pairs", iteration=iteration)
                assert table.num_rows > 0, f"no pairs in iteration {iteration}: nothing was trained"
                pairs = from_table(table, PreferencePair)
                rollouts = Rollouts.of(
                    {stage: read_stage(run, stage, iteration=iteration) for stage in ("queries", "responses")},
                    iteration=iteration,
                )
                plan = TrainingPlan.of(
                    [pair.pair_id for pair in pairs],
                    keys=[rollouts.place(pair) for pair in pairs],
                    batch_size=config.learner.training.batch_size,
                    epochs=config.loop.epochs,
                    seed=config.seed * 1_000 + iteration,
                )
                await group.update(table, loss=config.loss.kind, loss_config=config.loss, plan=plan)
            await group.export(target)
        finally:
            await group.shutdown()

    asyncio.run(replay())
    return target


def assert_same_weights(found: Path, wanted: Path) -> None:
    a, b = (load_file(path / "model.safetensors") for path in (found, wanted))
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


def run_killed_and_resumed(home: Path, sit: Callable[..., Sitting], *, name: str, killed: str) -> list[str]:
    """Run up to the kill, then to the end; return the stages of the records that the kill left."""
    run = home / "runs" / name
    sitting = sit("run", "tiny.toml", "--name", name, killed=killed)
    assert sitting.end() == -signal.SIGKILL, sitting.output[-3000:]
    # Ray's own processes notice that their driver is gone.
    sitting.assert_gone(timeout_s=60.0)
    commit = last_commit(run)
    assert commit is not None
    assert commit.iteration == 0, "the kill came too late: iteration 1 was committed"
    kept = logged_stages(run, iteration=1)
    resumed = sit("resume", name)
    assert resumed.end() == 0, resumed.output[-3000:]
    finished(run)
    return kept


def test_a_run_killed_among_the_critiques_resumes_and_replays(
    home: Path, sit: Callable[..., Sitting], ray_session: str, tmp_path: Path
) -> None:
    kept = run_killed_and_resumed(home, sit, name="among-critiques", killed="among-critiques")
    assert kept.count("critiques") == 1
    assert "verdicts" not in kept
    run = home / "runs" / "among-critiques"
    assert_same_weights(replayed(run, target=tmp_path / "replayed"), run / "policies" / "v000002")


def test_a_run_killed_in_training_resumes_and_replays(
    home: Path, sit: Callable[..., Sitting], ray_session: str, tmp_path: Path
) -> None:
    kept = run_killed_and_resumed(home, sit, name="in-training", killed="in-training")
    assert kept[-1] == "pairs"
    run = home / "runs" / "in-training"
    assert_same_weights(replayed(run, target=tmp_path / "replayed"), run / "policies" / "v000002")


def wait_for_pools(run: Path, sitting: Sitting, *, timeout_s: float = 180.0, **ready: int) -> None:
    """Wait until the pools have so many replicas ready and none on its way in or out; the run must go on meanwhile."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert sitting.process.poll() is None, sitting.output[-3000:]
        pools = read_pools(run) if run.is_dir() else {}
        if pools and all(
            (pools[name]["ready"], pools[name]["starting"], pools[name]["leaving"]) == (num, 0, 0)
            for name, num in ready.items()
        ):
            return
        time.sleep(0.1)
    raise AssertionError(f"after {timeout_s:g} s the pools stand at {read_pools(run)}, wanted {ready}")


def test_pools_grow_and_shrink_while_the_run_goes_on(home: Path, sit: Callable[..., Sitting]) -> None:
    run = home / "runs" / "scaled"
    sitting = sit("run", "tiny.toml", "--name", "scaled", "--loop.iterations", "500")
    # The first run of the session trains the base model.
    wait_for_pools(run, sitting, timeout_s=600.0, critic=1, rollouts=1)
    for critic, rollouts in ((2, 2), (1, 3), (1, 1)):
        write_wanted(run, "critic", critic)
        write_wanted(run, "rollouts", rollouts)
        wait_for_pools(run, sitting, critic=critic, rollouts=rollouts)
    sitting.process.send_signal(signal.SIGINT)
    assert sitting.end() == 0, sitting.output[-3000:]
    rows = read_metrics(run)
    assert len(rows) >= 2
    assert [row.iteration for row in rows] == list(range(1, len(rows) + 1))
    # Nothing was lost, nothing made twice, and every replica that ever answered had the weights' log-probs.
    for row in rows:
        assert row.lost == {}
        assert row.parity_max_abs_diff is not None
        assert row.parity_max_abs_diff <= 1e-4
        answers = from_table(read_stage(run, "responses", iteration=row.iteration), Response)
        assert len({answer.response_id for answer in answers}) == len(answers) == NUM_QUERIES * NUM_SAMPLES
        assert {answer.policy_version for answer in answers} == {f"v{row.iteration - 1}"}
        assert read_stage(run, "critiques", iteration=row.iteration).num_rows == len(answers)


def test_a_run_whose_iterations_overlap_learns_from_samples_one_version_old(
    home: Path, sit: Callable[..., Sitting]
) -> None:
    run = home / "runs" / "ahead"
    sitting = sit("run", "tiny.toml", "--name", "ahead", "--loop.max_policy_age", "1", "--loop.iterations", "4")
    assert sitting.end() == 0, sitting.output[-3000:]
    rows = read_metrics(run)
    assert [row.iteration for row in rows] == [1, 2, 3, 4]
    for row in rows:
        answers = from_table(read_stage(run, "responses", iteration=row.iteration), Response)
        assert len({answer.response_id for answer in answers}) == len(answers) == NUM_QUERIES * NUM_SAMPLES
        versions = {int(answer.policy_version.removeprefix("v")) for answer in answers}
        assert versions <= {row.iteration - 1, max(0, row.iteration - 2)}
        pairs = from_table(read_stage(run, "pairs", iteration=row.iteration), PreferencePair)
        assert {pair.age for pair in pairs} <= {0, 1}
        assert row.parity_max_abs_diff is not None
        assert row.parity_max_abs_diff <= 1e-4
        # At equal weights the two engines differ by rounding; what is older differs by what was learnt since.
        assert row.training.get("rollout_gap", 0.0) < 1e-4
        assert row.training["importance_mean"] <= 3.0
    stale = [row for row in rows if row.sample_ages.get(1)]
    assert stale, "while one iteration was learnt, none was sampled"
    assert all(row.training["rollout_gap_stale"] > 1e-4 for row in stale)


def test_an_attacker_that_was_hardly_trained_ends_the_run_with_one_clear_line(
    home: Path, sit: Callable[..., Sitting]
) -> None:
    sitting = sit("run", "tiny.toml", "untrained.toml", "--name", "untrained")
    assert sitting.end() == 1
    (line,) = [line for line in sitting.output.splitlines() if "AttackCollapsed" in line]
    assert "proposals were usable in iteration 0, wanted 8 queries; train the attacker longer" in line
    assert last_commit(home / "runs" / "untrained") is None
