"""The campaign's commands are ones that the command line takes, and its tables say what the runs' answers say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

import benchmarks.experiments as experiments_module
import elenchus
from actors.domains import GoldLedger, Purpose, load_domain
from actors.records import EvaluationAnswer, Split, to_table
from benchmarks.distil import gold_solutions
from cluster.store import RunStore
from trainers.bootstrap import BootstrapConfig
from trainers.run_config import RunConfig, load_run_config
from trainers.statistics import paired_gain

SEED = 21
CAMPAIGN = experiments_module.Campaign()
MAIN_BEFORE = [True] * 3 + [False] * 7
MAIN_AFTER = [True] * 9 + [False]
SHUFFLED_AFTER = [False] + [True] * 3 + [False] * 6


def write_run(directory: Path, *, before: Sequence[bool], after: Sequence[bool]) -> None:
    """Write what the campaign reads of a finished run of two iterations: its summary and its sealed answers."""
    ends = {"before": sum(before) / len(before), "after": sum(after) / len(after)}
    share = {"before": 1.0, "after": 0.97}
    summary = {
        "policy_version": "v2",
        "sealed_accuracy": ends,
        "well_formed": share,
        "attack_success": {"before": 0.7, "after": 0.3},
        "ood_accuracy": {"before": 0.0, "after": 0.1},
        "critic_agreement": {"lowest": 0.99},
        "experts": {"fraction": 0.05},
        "parity_max_abs_diff": 2e-5,
        "wall_s": {"bootstrap": 200.0, "start": 30.0, "iterations": 100.0, "total": 330.0},
    }
    with RunStore.create(directory, config={}, id_columns={"evaluations": "answer_id"}) as store:
        for iteration, correct in enumerate((before, before, after)):
            asyncio.run(store.append("evaluations", sealed_rows(correct, iteration=iteration)))
            store.commit(iteration, state={})
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "sitting.json").write_text(json.dumps({"exit_code": 0, "wall_s": 333.3, "peak_gb": 4.21}))


def sealed_rows(correct: Sequence[bool], *, iteration: int) -> pa.Table:
    """Return the answers to the sealed set, last item first."""
    rows = [
        EvaluationAnswer(
            answer_id=f"{iteration}/{item}",
            set_name="sealed",
            iteration=iteration,
            item=item,
            query="47+86",
            facets=("+", "2", "2"),
            text="133" if right else "123",
            correct=right,
            well_formed=True,
            policy_version=f"v{iteration}",
        )
        for item, right in enumerate(correct)
    ]
    return to_table(rows[::-1], EvaluationAnswer)


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(experiments_module, "EXPERIMENTS", tmp_path)
    write_run(tmp_path / str(SEED) / "main", before=MAIN_BEFORE, after=MAIN_AFTER)
    write_run(tmp_path / str(SEED) / "shuffled", before=MAIN_BEFORE, after=SHUFFLED_AFTER)
    return tmp_path


@pytest.mark.parametrize("arm", [arm for arm in experiments_module.ARMS if arm != "critic_solver"])
def test_an_arm_is_a_config_that_the_command_line_takes(arm: str, experiments: Path) -> None:
    program, *words = CAMPAIGN.words_of(arm, seed=SEED)
    assert program == "elenchus.py"
    command, flags = elenchus.parse(words)
    assert isinstance(command, elenchus.Run)
    assert (command.name, command.seed) == (arm, SEED)
    config = load_run_config([], flags=flags)
    demo = RunConfig(runs_dir=experiments / str(SEED)).model_dump(mode="json")
    changed = {key for key, value in config.model_dump(mode="json").items() if value != demo[key]}
    wanted = {
        "main": set(),
        "shuffled": {"oversight"},
        "experts_only": {"oversight"},
        "majority": {"oversight"},
        # 2,400 steps in 200 s, and a loop of 100 s: 1,200 more.
        "more_bootstrap": {"bootstrap", "loop"},
        "distillation": {"learner", "rollouts", "loop", "supervision"},
    }
    assert changed == wanted[arm]
    if arm == "more_bootstrap":
        assert (config.bootstrap.steps, config.loop.iterations) == (3_600, 0)


def test_an_arms_figures_are_paired_with_the_main_runs(experiments: Path) -> None:
    main = CAMPAIGN.result_of("main", seed=SEED)
    assert (main.before, main.after, main.gain, main.behind_main) == (0.3, 0.9, pytest.approx(0.6), None)
    shuffled = CAMPAIGN.result_of("shuffled", seed=SEED)
    # Three of ten before and after, but not the same three: one lost, one won.
    gain = paired_gain(MAIN_BEFORE, SHUFFLED_AFTER)
    assert (gain.num_improved, gain.num_worsened) == (1, 1)
    assert (shuffled.gain, shuffled.ci_low, shuffled.ci_high) == (0.0, gain.ci_low, gain.ci_high)
    # The control solves items 1 to 3, the main run 0 to 8: six more, and none that the control alone solves.
    assert shuffled.behind_main == pytest.approx(0.6)


def test_the_tables_hold_every_arm_and_every_seed(experiments: Path) -> None:
    solved = {"correct": [True] * 8 + [False] * 2, "well_formed": [True] * 10}
    (experiments / str(SEED) / "critic_solver.json").write_text(json.dumps(solved))
    results = [CAMPAIGN.result_of(arm, seed=SEED) for arm in ("main", "shuffled", "critic_solver")]
    (row,) = experiments_module.main_table(results).splitlines()[2:]
    assert row.startswith("| 21 | 0.300 → 0.900 | +60.0 (")
    assert row.endswith("| 200 + 30 + 100 | 333 | 4.2 |")
    rows = [line.split(" | ") for line in experiments_module.controls_table(results).splitlines()[2:]]
    assert [(cells[0], cells[2]) for cells in rows] == [
        ("| main", "0.900"),
        ("| shuffled", "0.300"),
        ("| critic_solver", "0.800"),
    ]


def test_a_recipe_changes_every_arm_alike_and_has_runs_of_its_own(experiments: Path) -> None:
    honest = experiments_module.Campaign(recipe="honest_teacher")
    assert honest.directory(SEED) == experiments / "honest_teacher" / str(SEED)
    for arm in ("main", "majority", "critic_solver"):
        words = honest.words_of(arm, seed=SEED)
        assert {"domain.hard_share=0.005", "domain.forget_rate=0.0"} <= set(words)
    _, flags = elenchus.parse(honest.words_of("main", seed=SEED)[1:])
    assert load_run_config([], flags=flags).domain.forget_rate == 0.0


def test_a_main_run_is_not_begun_anew_under_finished_controls(experiments: Path) -> None:
    with pytest.raises(RuntimeError, match="under the finished arms shuffled; move"):
        CAMPAIGN.run_arm("main", seed=SEED)
    assert (experiments / str(SEED) / "shuffled" / "summary.json").is_file()


def test_gold_solutions_are_right_answers_to_the_critics_own_problems() -> None:
    config = RunConfig()
    domain, checker = load_domain(config.domain.kind, config.domain)
    gold = GoldLedger(checker, regime="gold")
    bootstrap = BootstrapConfig(steps=100, num_chunks=2)
    rows = gold_solutions(domain, gold.checker_for(Purpose.SUPERVISION), bootstrap, seed=3)
    # 100 steps of 40 in two pieces of 2,000: less 5 % for the attacker and 12 % for the learner.
    assert len(rows) == 2 * (2_000 - 100 - 240)
    assert gold.counts == {Purpose.SUPERVISION: len(rows)}
    for row in rows[:200]:
        problem = domain.parse(row.problem)
        assert problem is not None
        assert problem.split is Split.TRAIN
        assert checker.correct(row.problem, row.response)
        assert row.messages == domain.learner_messages(row.problem)
