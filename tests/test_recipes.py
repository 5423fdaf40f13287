"""Every recipe is a config that loads, and what it asks of the cluster fits what its name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from actors.engine import gpus_reserved
from trainers.run_config import load_run_config

RECIPES = sorted((Path(__file__).resolve().parent.parent / "trainers" / "recipes").glob("*.toml"))


def test_there_is_a_recipe() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_fits_the_gpus_of_its_name(path: Path) -> None:
    config = load_run_config([path])
    named = re.search(r"-(\d+)gpu$", path.stem)
    assert named is not None, "a recipe's name ends with the GPUs that it takes"
    roles = [(config.attacker.engine, config.attacker.replicas), (config.rollouts.engine, config.rollouts.replicas)]
    roles.append((config.critic.engine, config.critic.replicas))
    asked = sum(
        replicas * (gpus_reserved(engine) or engine.tensor_parallel_size * (engine.device == "cuda"))
        for engine, replicas in roles
    )
    asked += config.learner.training.num_ranks * config.learner.training.gpus_per_rank
    assert 0 < asked <= int(named[1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_head_says_how_to_get_its_model_and_how_to_run_it(path: Path) -> None:
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"elenchus run trainers/recipes/{path.name}" in head
    assert "hf download" in head
