"""The base model is trained once for its config: who comes second waits, and what it depends on names it."""

from __future__ import annotations

import asyncio
import fcntl
import json
from pathlib import Path

import pytest

from actors.domains import domain_called
from trainers.base_model import cache_key
from trainers.bootstrap import BootstrapResult, bootstrap
from trainers.progress import Silent
from trainers.run_config import RunConfig, load_run_config

CONFIG = RunConfig()


def key_of(config: RunConfig, *, seed: int = 0) -> str:
    return cache_key(
        config.bootstrap,
        base_model=config.base_model,
        domain=config.domain,
        training=config.learner.training,
        seed=seed,
    )


def test_who_comes_second_waits_and_finds_what_the_first_has_trained(tmp_path: Path) -> None:
    target = tmp_path / f"bootstrap-{key_of(CONFIG)}"

    async def story() -> BootstrapResult:
        with (tmp_path / f".{target.name}.lock").open("w") as first:
            fcntl.flock(first, fcntl.LOCK_EX)
            second = asyncio.create_task(
                bootstrap(
                    CONFIG.bootstrap,
                    base_model=CONFIG.base_model,
                    domain=domain_called(CONFIG.domain.kind, CONFIG.domain),
                    domain_config=CONFIG.domain,
                    training=CONFIG.learner.training,
                    seed=0,
                    cache_dir=tmp_path,
                    progress=Silent(),
                )
            )
            await asyncio.sleep(0.2)
            assert not second.done()
            target.mkdir()
            (target / "bootstrap.json").write_text(json.dumps({"gold": {"critic": 7}}))
        return await asyncio.wait_for(second, 30)

    result = asyncio.run(story())
    assert (result.model_dir, result.seconds, result.gold, result.group) == (target, 0.0, {"critic": 7}, None)


@pytest.mark.parametrize(
    ("key", "value", "matters"),
    [
        ("bootstrap.steps", "100", True),
        ("base_model.hidden_size", "64", True),
        ("domain.forget_rate", "0.5", True),
        ("learner.training.num_ranks", "1", True),
        ("learner.training.max_grad_norm", "2.0", True),
        ("learner.training.learning_rate", "1e-6", False),
        ("learner.training.step_deadline_s", "9.0", False),
        ("loop.iterations", "3", False),
    ],
)
def test_what_the_base_model_depends_on_names_it(key: str, value: str, matters: bool) -> None:
    assert (key_of(load_run_config([], flags=[(key, value)])) != key_of(CONFIG)) == matters


def test_a_seed_has_its_own_base_model() -> None:
    assert key_of(CONFIG, seed=1) != key_of(CONFIG)
