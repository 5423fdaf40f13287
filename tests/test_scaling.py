"""Whoever asks for replicas writes what is wanted and goes; the run's driver follows, and so do the queues."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import elenchus
from cluster.pool import PoolStats, Readiness
from cluster.scaling import (
    SHRINK_AFTER_S,
    WANTED_FILE,
    AutoscaleConfig,
    Autoscaler,
    Follower,
    read_pools,
    read_wanted,
    write_wanted,
)
from trainers.run_config import RunConfig, load_run_config

IDLE = PoolStats(
    name="critic",
    wanted=1,
    ready=1,
    starting=0,
    num_lost=0,
    num_retried=0,
    num_queued=0,
    num_open=0,
    num_answered=0,
    why=None,
    version=None,
    num_generated_tokens=0,
    num_prompt_tokens=0,
    busy_s=0.0,
    num_running=0,
    replicas={},
)


@dataclass(slots=True)
class FakePool:
    """Does at once what is wanted of it."""

    wanted: int = 1
    stands: PoolStats = IDLE

    async def scale(self, num_replicas: int) -> None:
        self.wanted = num_replicas
        self.stands = replace(self.stands, wanted=num_replicas, ready=num_replicas)

    async def stats(self) -> PoolStats:
        return self.stands

    def readiness(self) -> Readiness:
        return Readiness(wanted=self.wanted, ready=self.wanted, starting=0, leaving=0, why=None)


def follower(run_dir: Path, **pools: Any) -> Follower:
    return Follower(
        run_dir,
        pools,
        configured=dict.fromkeys(pools, 1),
        autoscale={"critic": AutoscaleConfig(min=1, max=4, target_queue_s=10.0), "rollouts": AutoscaleConfig()},
    )


# ------------------------------------------------------------------------------------------------------ desired state


def test_what_is_wanted_is_found_again_and_taken_back(tmp_path: Path) -> None:
    assert read_wanted(tmp_path) == {}
    write_wanted(tmp_path, "critic", 4)
    write_wanted(tmp_path, "rollouts", 2)
    assert read_wanted(tmp_path) == {"critic": 4, "rollouts": 2}
    write_wanted(tmp_path, "critic", None)
    assert read_wanted(tmp_path) == {"rollouts": 2}


@pytest.mark.parametrize("content", ["{", "[1]", '{"critic": 0}', '{"critic": true}', '{"critic": "4"}'])
def test_a_damaged_file_is_named_and_changes_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / WANTED_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"wanted\.json: got .*; remove it or scale again"):
        read_wanted(tmp_path)
    pool = FakePool()
    asyncio.run(follower(tmp_path, rollouts=pool).step(now=0.0))
    assert pool.wanted == 1


def test_the_pools_follow_what_is_wanted_and_go_back_to_their_config(tmp_path: Path) -> None:
    async def scenario() -> None:
        attacker, rollouts = FakePool(), FakePool()
        watch = follower(tmp_path, attacker=attacker, rollouts=rollouts)
        await watch.step(now=0.0)
        assert read_pools(tmp_path)["rollouts"] == {
            "wanted": 1, "ready": 1, "starting": 0, "leaving": 0, "why": None,
        }  # fmt: skip
        for wanted in (4, 2, 1, 3):
            write_wanted(tmp_path, "rollouts", wanted)
            await watch.step(now=0.5)
            assert (rollouts.wanted, attacker.wanted) == (wanted, 1)
            assert read_pools(tmp_path)["rollouts"]["ready"] == wanted
        write_wanted(tmp_path, "rollouts", None)
        await watch.step(now=1.0)
        assert rollouts.wanted == 1

    asyncio.run(scenario())


# ----------------------------------------------------------------------------------------------------------- autoscale


def test_a_pool_grows_to_answer_its_queue_within_the_target_and_shrinks_later() -> None:
    scaler = Autoscaler(AutoscaleConfig(min=1, max=4, target_queue_s=10.0))
    # Nothing is known of its speed yet.
    assert scaler.wanted(replace(IDLE, num_open=1_000), now=0.0) == 1
    # Ten a second: 1,000 left are 100 s of one replica, ten replicas' work for 10 s; four are allowed.
    assert scaler.wanted(replace(IDLE, num_open=1_000, num_answered=20), now=2.0) == 4
    # 250 left are 25 s of one, 10 s of three: fewer, but not at once.
    four = replace(IDLE, wanted=4, ready=4)
    assert scaler.wanted(replace(four, num_open=250, num_answered=100), now=4.0) == 4
    assert scaler.wanted(replace(four, num_open=250, num_answered=180), now=4.0 + SHRINK_AFTER_S - 1) == 4
    shrunk = scaler.wanted(replace(four, num_open=0, num_answered=430), now=4.0 + SHRINK_AFTER_S)
    assert shrunk == 1


def test_a_pause_between_stages_is_no_slowness() -> None:
    scaler = Autoscaler(AutoscaleConfig(min=1, max=4, target_queue_s=10.0))
    scaler.wanted(replace(IDLE, num_open=100), now=0.0)
    scaler.wanted(replace(IDLE, num_open=80, num_answered=20), now=2.0)
    scaler.wanted(replace(IDLE, num_open=0, num_answered=100), now=10.0)
    # Idle for a minute, then asked again: still ten a second.
    assert scaler.wanted(replace(IDLE, num_open=100, num_answered=100), now=70.0) == 1
    assert scaler.wanted(replace(IDLE, num_open=300, num_answered=120), now=72.0) == 3


def test_what_somebody_asked_for_stands_above_the_queue(tmp_path: Path) -> None:
    async def scenario() -> None:
        pool = FakePool(stands=replace(IDLE, num_open=1_000))
        watch = follower(tmp_path, critic=pool)
        await watch.step(now=0.0)
        pool.stands = replace(pool.stands, num_answered=20)
        await watch.step(now=2.0)
        assert pool.wanted == 4
        write_wanted(tmp_path, "critic", 2)
        await watch.step(now=4.0)
        assert pool.wanted == 2
        write_wanted(tmp_path, "critic", None)
        pool.stands = replace(pool.stands, num_answered=60)
        await watch.step(now=6.0)
        assert pool.wanted == 4

    asyncio.run(scenario())


def test_the_bounds_must_be_a_range() -> None:
    config = load_run_config([], flags=[("critic.autoscale.max", "4"), ("critic.autoscale.min", "2")])
    assert (config.critic.autoscale.min, config.critic.autoscale.max) == (2, 4)
    assert RunConfig().critic.autoscale.max == 0
    with pytest.raises(ValueError, match="max: got 2, wanted at least min = 3, or 0"):
        AutoscaleConfig(min=3, max=2)


# -------------------------------------------------------------------------------------------------------- command line


def test_the_command_writes_what_is_wanted_and_says_how_the_pool_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a")
    run.mkdir(parents=True)
    (run / "resolved.json").write_text("{}")
    assert elenchus.main(["scale", "critic", "4", "--run", "a"]) == 0
    assert read_wanted(run) == {"critic": 4}
    assert "critic: wanted 4; it is not up yet." in capsys.readouterr().out
    (run / "pools.json").write_text(json.dumps({"critic": {"ready": 1, "wanted": 2}}))
    assert elenchus.main(["scale", "critic", "auto", "--run", "a"]) == 0
    assert read_wanted(run) == {}
    assert "critic: wanted what its config says; it had 1 ready of 2." in capsys.readouterr().out


@pytest.mark.parametrize("said", ["0", "two", "1.5", "٣"])
def test_a_number_that_is_none_is_refused(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert elenchus.main(["scale", "critic", said, "--run", "a"]) == 2
    line = f'elenchus scale: got "{said}" replicas, wanted a number, at least 1, or "auto"'
    assert line in capsys.readouterr().err
