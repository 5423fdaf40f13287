"""One learner for all trade-offs in the loop: which vector holds when, also after a kill, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pyarrow as pa
import pytest

from cluster.store import read_stage
from tests.fake_roles import RUN, Settings, fake_run, write_blank_run
from tests.refused_settings import problems_of
from trainers.feedback.objectives import ObjectivesConfig
from trainers.feedback.trade_offs import TradeOffs, draw_preference, version_at
from trainers.run_config import adapters, load_run_config
from trainers.summary import read_metrics

OBJECTIVES = ObjectivesConfig(names=("verdict", "brevity"), weights=(0.6, 0.4))
SETTINGS = Settings(objectives=OBJECTIVES, trade_offs=True, loss="grpo")
PLAIN = '[loss]\nkind = "grpo"\n[objectives]\n[learner.training.panacea]\n'


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blank_run(tmp_path_factory.mktemp("blank") / RUN)


def drawn(iteration: int) -> tuple[float, ...]:
    return draw_preference(2, seed=3, iteration=iteration)


def test_rollouts_and_update_are_of_the_drawn_vector_and_all_else_of_the_fixed_one(blank: Path, tmp_path: Path) -> None:
    path = shutil.copytree(blank, tmp_path / RUN)
    run = fake_run(path, SETTINGS)
    tables: list[pa.Table] = []
    update = run.group.update

    async def watched(table: pa.Table, **settings: Any) -> Any:
        tables.append(table)
        return await update(table, **settings)

    run.group.update = watched  # type: ignore[method-assign]
    run.finish()
    first, second, fixed = drawn(1), drawn(2), OBJECTIVES.weights
    assert run.group.preferred == [
        ("publish v0", fixed),
        ("export v000000", fixed),
        (f"publish {version_at('v0', first)}", first),
        ("update", first),
        ("publish v1", fixed),
        ("export v000001", fixed),
        (f"publish {version_at('v1', second)}", second),
        ("update", second),
        ("publish v2", fixed),
        ("export v000002", fixed),
    ]
    rows = read_metrics(path)
    assert [row.preference for row in rows] == [first, second]
    assert [row.sample_ages for row in rows] == [{0: row.pairs_trained} for row in rows]
    # The weights of the one score are the vector's.
    lengths: list[float] = []
    goods: list[float] = []
    for iteration, vector in ((1, first), (2, second)):
        responses = read_stage(path, "responses", iteration=iteration).to_pylist()
        assert {row["policy_version"] for row in responses} == {version_at(f"v{iteration - 1}", vector)}
        tokens = {row["response_id"]: -float(len(row["token_ids"])) for row in responses}
        judged = [v for v in read_stage(path, "verdicts", iteration=iteration).to_pylist() if v["label"] is not None]
        goods += [row["score"] for row in judged]
        lengths += [tokens[row["response_id"]] for row in judged]
        wanted = {
            row["response_id"]: vector[0] * (row["score"] - fmean(goods)) / pstdev(goods)
            + vector[1] * (tokens[row["response_id"]] - fmean(lengths)) / pstdev(lengths)
            for row in judged
        }
        table = tables[iteration - 1]
        got = dict(zip(table.column("row_id").to_pylist(), table.column("score").to_pylist(), strict=True))
        assert got == pytest.approx({name: wanted[name] for name in got}, abs=1e-9)
    evaluated = read_stage(path, "evaluations", iteration=1).to_pylist()
    assert {row["policy_version"] for row in evaluated if row["set_name"] == "probe"} == {"v1"}


@pytest.mark.parametrize("point", ["responses 2", "critiques 1", "step 2", "publish 2", "export 1"])
def test_a_run_that_breaks_anywhere_resumes_to_the_one_that_it_would_have_been(
    point: str, whole: Path, blank: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(blank, tmp_path / RUN)
    broken: list[str] = []

    def reach(where: str, num: int) -> None:
        if where == point and not broken:
            broken.append(where)
            raise OSError("as a full disk does")

    with pytest.raises(OSError, match="as a full disk does"):
        fake_run(path, SETTINGS, reach=reach).finish()
    fake_run(path, SETTINGS).finish()
    for iteration in range(3):
        for name in (f"policies/v{iteration:06d}/policy.json", f"checkpoints/iteration={iteration:06d}/learner.json"):
            if (whole / name).exists():
                assert json.loads((path / name).read_text()) == json.loads((whole / name).read_text())
    assert [row.preference for row in read_metrics(path)] == [drawn(1), drawn(2)]


@pytest.fixture(scope="module")
def whole(blank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(blank, tmp_path_factory.mktemp("whole") / RUN))
    fake_run(path, SETTINGS).finish()
    return path


def test_without_the_section_nobody_is_told_of_a_vector(blank: Path, tmp_path: Path) -> None:
    path = shutil.copytree(blank, tmp_path / RUN)
    run = fake_run(path, Settings(objectives=OBJECTIVES, loss="grpo"))
    run.finish()
    assert {vector for _, vector in run.group.preferred} == {None}
    assert [row.preference for row in read_metrics(path)] == [None, None]
    assert {row["policy_version"] for row in read_stage(path, "responses", iteration=2).to_pylist()} == {"v1"}


def test_a_vector_takes_the_place_of_the_weights() -> None:
    assert TradeOffs(fixed=OBJECTIVES.weights, seed=3).weighed(OBJECTIVES, 2).weights == drawn(2)
    assert TradeOffs().weighed(OBJECTIVES, 2) is OBJECTIVES


# -------------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[loss]\nkind = "grpo"\n[learner.training.panacea]\n',
         "a.toml:3: learner.training.panacea: got it without objectives, wanted a section [objectives]: it is trained "
         "for their trade-offs"),
        (f"{PLAIN}num_objectives = 3\n",
         "a.toml:5: learner.training.panacea.num_objectives: got 3, wanted 2, as many as objectives.names"),
        ('[loss]\nkind = "modpo"\nweights = [0.9, 0.1]\n[objectives]\n[learner.training.panacea]\n',
         'a.toml:5: learner.training.panacea: got it with loss.kind = "modpo", wanted a loss that learns from scores, '
         "such as grpo: the weights of modpo are the loss's own, and do not follow those that an iteration draws"),
        (f"{PLAIN}[loop]\nmax_policy_age = 1\n",
         "a.toml:4: learner.training.panacea: got it with loop.max_policy_age = 1, wanted 0: samples that one "
         "trade-off made do not train another"),
        (f"{PLAIN}[learner.training.lora]\n",
         "a.toml:4: learner.training.panacea: got it with lora, wanted one of the two: both take the weights' place"),
        (f"{PLAIN}[learner.training]\nvalue_head = true\n",
         "a.toml:4: learner.training.panacea: got it with value_head = true, wanted false: a value is of one "
         "trade-off, and knows of none; take a loss without values, such as grpo"),
        (f'{PLAIN}[learner.training]\noptimizer = "muon"\n',
         'a.toml:6: learner.training.optimizer: got "muon" with panacea, wanted "adamw": it is for whole matrices'),
        (f"{PLAIN}rank = 511\n",
         "a.toml:5: learner.training.panacea.rank: got 511 with 2 objectives, wanted at most 510: engines take "
         "adapters of rank 512 at most"),
        (f'{PLAIN}targets = ["c_attn"]\n',
         "a.toml:5: learner.training.panacea.targets: got c_attn, wanted layers of the base model's blocks: q_proj, "
         "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        (f'{PLAIN}[rollouts.engine]\nload_format = "dummy"\n',
         'a.toml:6: rollouts.engine.load_format: got "dummy" with learner.training.panacea, wanted "auto": the base, '
         "which an update does not bring, is read from the directory"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert problems_of(text, tmp_path)[:1] == [message]


def test_by_toml_the_section_alone_is_enough_and_engines_are_told_of_rank_k_plus_m(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(PLAIN)
    config = load_run_config([path])
    (adapter,) = adapters(config).values()
    assert (adapter.rank, adapter.alpha, config.learner.training.adapter) == (10, 10.0, adapter)
