"""Every loss runs from a run's words: through the real driver, and on a real rank's forward and backward passes.

Only the pools are fake. A loss that is added to the registry is found here, and fails until the loop has a way to it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import elenchus
from benchmarks.algorithms import ALGORITHMS
from cluster.config import ConfigError, plugin_names
from tests.fake_roles import DOMAIN, RUN, Settings, fake_run, write_blank_run
from tests.inline_rank import InlineLearnerGroup, InlineRank
from tests.tiny_models import char_tokenizer
from trainers.feedback.training_data import material_of, reads_spans
from trainers.run_config import RunConfig, load_run_config
from trainers.session import _driver_config
from trainers.summary import read_metrics

REFUSED = {"bradley_terry": "wanted a loss of a policy: it trains a reward model"}
"""Losses that no iteration can train the learner by, and what a run says of them."""
NAMED = {settings.settings["loss.kind"] for settings in ALGORITHMS.values()}
LOSSES: Mapping[str, Mapping[str, str]] = {
    **{name: algorithm.settings for name, algorithm in ALGORITHMS.items()},
    **{name: {"loss.kind": name} for name in plugin_names("trainers.losses") if name not in NAMED | REFUSED.keys()},
}
"""By name what a run is told: the comparison's settings, and for a loss that is not in it its name alone."""
SMALL = {
    "loop.iterations": "2",
    "loop.queries_per_iteration": "10",
    "rollouts.sampling.num_samples": "4",
    "evaluation.sealed_per_cell": "1",
    "evaluation.probe_per_cell": "1",
    "evaluation.out_of_distribution_per_cell": "1",
    "evaluation.attack_set": "4",
    "evaluation.agreement_sample": "10",
    "learner.training.num_ranks": "1",
    "learner.training.batch_size": "8",
}


def config_of(settings: Mapping[str, str]) -> RunConfig:
    """Return the config of a command line."""
    _, flags = elenchus.parse(["run", *(f"{key}={value}" for key, value in settings.items())])
    return load_run_config([], flags=flags)


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InlineRank]:
    inline = InlineRank(tmp_path_factory.mktemp("models"))
    yield inline
    inline.close()


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blank_run(tmp_path_factory.mktemp("blank") / RUN)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_trains_a_real_model_through_two_iterations_of_the_loop(
    name: str, blank: Path, tmp_path: Path, inline: InlineRank
) -> None:
    config = config_of({**SMALL, **LOSSES[name]})
    kind = config.loss.kind
    assert kind == LOSSES[name]["loss.kind"]
    group = InlineLearnerGroup(inline, config.learner.training)
    before = inline.weights()
    shutil.copytree(blank, tmp_path / RUN)
    fake_run(
        tmp_path / RUN,
        Settings(num_samples=config.rollouts.sampling.num_samples, oversight=config.oversight.kind),
        group=group,
        config=_driver_config(config, domain=DOMAIN, tokenizer=char_tokenizer()),
    ).finish()

    rows = read_metrics(tmp_path / RUN)
    assert [row.iteration for row in rows] == [1, 2]
    for row, plan, report in zip(rows, group.plans, group.reports, strict=True):
        assert row.material == material_of(kind)
        assert row.pairs_trained == len(plan.row_ids) > 0
        assert len(report.slots) == config.loop.epochs * len(plan.row_ids)
        assert all(step.applied and step.num_tokens > 0 for step in report.steps)
        assert any(step.grad_norm > 0 for step in report.steps)
        assert all(math.isfinite(value) for value in row.training.values())
        # The engine that sampled has the weights of the update's start: whatever compares the two finds them equal.
        assert report.staleness.get("rollout_gap", 0.0) < 1e-4
        assert report.staleness.get("stale_share", 0.0) == 0.0
    after = inline.weights()
    assert max(float((after[key] - before[key]).abs().max()) for key in before) > 1e-6
    if reads_spans(kind):
        column = "segment_rewards" if "segment_rewards" in group.tables[0].column_names else "flagged"
        assert any(any(values) for table in group.tables for values in table.column(column).to_pylist())


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_no_iteration_can_train_by_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf'loss.kind: got "{name}", {REFUSED[name]}'):
        config_of({"loss.kind": name})


def test_every_loss_of_the_registry_is_run_or_refused() -> None:
    assert {settings["loss.kind"] for settings in LOSSES.values()} | REFUSED.keys() == set(
        plugin_names("trainers.losses")
    )
    assert {settings.get("loss.form") for settings in LOSSES.values()} >= {None, "dapo", "dr_grpo", "gspo"}
