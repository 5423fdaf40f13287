"""Several objectives become one score: linear or Tchebycheff, of standardised scores; modpo gets their margins."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.oversight import Judged
from actors.records import PreferencePair, from_table, to_table
from cluster.store import read_stage
from tests.fake_roles import RUN, Settings, fake_run, write_blank_run
from tests.pair_tables import pair_table
from tests.refused_settings import problems_of
from tests.small_records import make_critique, make_judged, make_verdict
from trainers.feedback.objectives import (
    Moments,
    ObjectivesConfig,
    RunningScores,
    furthest,
    linear,
    rescored,
    scalar_scores,
    score_all,
    tchebycheff,
    with_margins,
)
from trainers.feedback.training_data import of_samples
from trainers.rows.pairs import pair_rows
from trainers.rows.samples import sample_rows
from trainers.run_config import load_run_config, read_resolved

FRONT = {"a": (1.0, 0.0), "b": (0.4, 0.4), "c": (0.0, 1.0)}
"""Three points of a concave front: b lies below the line from a to c."""


# ------------------------------------------------------------------------------------------------------- scalarisation


def test_the_worked_example() -> None:
    assert linear([0.8, 0.4], [0.5, 0.5]) == pytest.approx(0.6)
    # max(0.5 * 0.2, 0.5 * 0.6)
    assert tchebycheff([0.8, 0.4], [0.5, 0.5], ideal=[1.0, 1.0]) == pytest.approx(0.3)
    assert furthest([0.8, 0.4], [0.5, 0.5], ideal=[1.0, 1.0]) == 1


def test_weighted_sums_reach_the_ends_of_a_concave_front_alone_and_tchebycheff_all_of_it() -> None:
    by_sum, by_distance = set(), set()
    for i in range(101):
        weights = [i / 100, 1 - i / 100]
        by_sum.add(max(FRONT, key=lambda name: linear(FRONT[name], weights)))
        by_distance.add(min(FRONT, key=lambda name: tchebycheff(FRONT[name], weights, ideal=[1.0, 1.0])))
    assert by_sum == {"a", "c"}
    assert by_distance == {"a", "b", "c"}


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.floats(0.1, 0.6))
def test_the_gradient_of_tchebycheff_is_that_of_the_furthest_objective(values: list[float], first: float) -> None:
    weights, ideal = [first, (1 - first) / 2, (1 - first) / 2], [6.0, 6.0, 6.0]
    tensor = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    distances = torch.tensor(weights, dtype=torch.float64) * (torch.tensor(ideal) - tensor)
    chosen = furthest(values, weights, ideal=ideal)
    assert distances.max().item() == pytest.approx(distances[chosen].item())
    distances[chosen].backward()
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [-weights[i] if i == chosen else 0.0 for i in range(3)]


# ----------------------------------------------------------------------------------------------------- standardisation


@given(st.lists(st.lists(st.floats(-100, 100), max_size=6), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_scores_together(parts: list[list[float]]) -> None:
    moments, every = Moments(), [value for part in parts for value in part]
    for part in parts:
        moments.add(part)
    assert moments.num == len(every)
    if every:
        assert moments.mean == pytest.approx(fmean(every), abs=1e-9)
        assert moments.deviation == pytest.approx(pstdev(every), abs=1e-6)
        assert moments.best == max(every)


def test_a_score_is_counted_in_deviations_and_a_constant_objective_says_nothing() -> None:
    moments = Moments()
    moments.add([1.0, 3.0])
    assert [moments.standardised(value) for value in (1.0, 2.0, 5.0)] == [-1.0, 0.0, 3.0]
    constant = Moments()
    constant.add([0.1] * 7)
    assert constant.standardised(5.0) == 0.0


def test_what_scores_were_like_survives_a_commit() -> None:
    running = RunningScores()
    running.add({"a": (0.1, -3.0), "b": (0.7, None)}, ("verdict", "brevity"))
    restored = RunningScores.restore(json.loads(json.dumps(running.snapshot())))
    assert restored == running
    assert (restored.moments["brevity"].num, restored.moments["verdict"].num) == (1, 2)


# ------------------------------------------------------------------------------------------------------------ the loop


def judged_ones() -> list[Judged]:
    """Answers of 3, 2 and 6 tokens with P(good) 0.9, 0.6 and 0.2; the last has no step marks."""
    items = []
    for i, (score, text, marks) in enumerate(
        [(0.9, "ab", (0.9, 0.8, 0.5)), (0.6, "c", (0.5, 0.99)), (0.2, "defgh", (0.2,))]
    ):
        critique = replace(
            make_critique(f"c{i}", response_id=f"r{i}", score=score), label_logprobs=tuple(map(math.log, marks))
        )
        items.append(replace(make_judged(f"r{i}", text=text), critiques=(critique,)))
    return items


def test_each_objective_scores_what_it_says() -> None:
    judged = judged_ones()
    verdicts = [item.critic_verdict for item in judged]
    verdicts[1] = make_verdict("r1", 1.0, source="expert")
    config = ObjectivesConfig(names=("verdict", "steps", "brevity"), weights=(0.5, 0.25, 0.25))
    scores = score_all(judged, verdicts, config)
    # An expert's label stands for P(good); steps are the marks but for the last, which is the verdict's own.
    assert scores["r0"] == pytest.approx((0.9, 0.85, -3.0))
    assert scores["r1"] == pytest.approx((1.0, 0.5, -2.0))
    assert scores["r2"] == (0.2, None, -6.0)
    assert score_all(judged, [replace(v, label=None) for v in verdicts], config) == {}


def test_the_linear_score_is_the_weighted_sum_of_standardised_ones_and_missing_stays_missing() -> None:
    config = ObjectivesConfig(names=("verdict", "steps", "brevity"), weights=(0.5, 0.3, 0.2))
    scores = {"a": (1.0, 0.5, -2.0), "b": (0.0, 0.7, -4.0), "c": (0.5, None, -3.0)}
    running = RunningScores()
    running.add(scores, config.names)
    # Deviations: verdict sqrt(1/6) about 0.5, steps 0.1 about 0.6, brevity sqrt(2/3) about -3.
    first = 0.5 * 0.5 / math.sqrt(1 / 6) - 0.3 + 0.2 / math.sqrt(2 / 3)
    found = scalar_scores(scores, running, config)
    assert found["a"] == pytest.approx(first)
    assert found["b"] == pytest.approx(-first)
    assert found["c"] is None
    # An objective without weight need not be there.
    plain = scalar_scores(scores, running, config.model_copy(update={"weights": (1.0, 0.0, 0.0)}))
    assert plain["c"] == pytest.approx(0.0)


def test_tchebycheff_learns_from_the_objective_that_is_furthest_from_its_ideal() -> None:
    config = ObjectivesConfig(weights=(0.5, 0.5), scalarisation="tchebycheff", ideal=(1.0, -2.0))
    running = RunningScores()
    running.add({"x": (0.0, -2.0), "y": (1.0, -4.0)}, config.names)  # means 0.5 and -3, deviations 0.5 and 1
    # Now P(good) is 0.9 in the mean (0.2 deviations from the ideal), and answers have 5 tokens (3 from it).
    scores = {"a": (1.0, -4.0), "b": (0.8, -6.0)}
    assert scalar_scores(scores, running, config) == {"a": pytest.approx(-0.5), "b": pytest.approx(-1.5)}
    # And now P(good) is 0 in the mean (2 from it), and answers have 2 tokens: verdicts alone count.
    scores = {"a": (0.1, -2.0), "b": (-0.1, -2.0)}
    assert scalar_scores(scores, running, config) == {"a": pytest.approx(-0.4), "b": pytest.approx(-0.6)}


def test_tchebycheff_never_learns_from_an_objective_that_weighs_nothing() -> None:
    # The others are past their ideals, so nothing (0) is further away than they are.
    config = ObjectivesConfig(
        names=("verdict", "brevity", "steps"),
        weights=(0.9, 0.1, 0.0),
        scalarisation="tchebycheff",
        ideal=(0.5, -40.0, 0.5),
    )
    scores = {"a": (0.9, -30.0, 0.8), "b": (0.7, -31.0, 0.9)}
    running = RunningScores()
    running.add(scores, config.names)
    found = scalar_scores(scores, running, config)
    assert found["a"] is not None
    assert found["b"] is not None
    assert found["a"] > found["b"]


def test_tchebycheff_without_an_ideal_takes_the_best_seen() -> None:
    config = ObjectivesConfig(weights=(0.5, 0.5), scalarisation="tchebycheff")
    running = RunningScores()
    scores = {"a": (1.0, -10.0), "b": (0.9, -2.0)}
    running.add(scores, config.names)
    # Both means are one deviation from the best: the first of equals.
    assert scalar_scores(scores, running, config) == {"a": pytest.approx(0.5), "b": pytest.approx(-0.5)}


def test_a_bandit_trained_on_the_score_goes_where_the_scalarisation_says() -> None:
    """Three arms with the concave front's rewards: a weighted sum ends at an end of it, Tchebycheff in the middle.

    The exact policy gradient of the mean score; Tchebycheff's takes the objective that is furthest at each step.
    """
    rewards = torch.tensor([FRONT[name] for name in "abc"], dtype=torch.float64)

    def trained(kind: str, weights: list[float]) -> list[float]:
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=0.2)
        for _ in range(400):
            chances = logits.softmax(0)
            means = (chances.detach() @ rewards).tolist()
            chosen = furthest(means, weights, ideal=[1.0, 1.0])
            scores = rewards @ torch.tensor(weights, dtype=torch.float64)
            if kind == "tchebycheff":
                scores = weights[chosen] * rewards[:, chosen]
            optimizer.zero_grad()
            (-(chances * scores).sum()).backward()
            optimizer.step()
        return [float(value) for value in logits.softmax(0).detach() @ rewards]

    ends = trained("linear", [0.6, 0.4])
    assert ends[0] > 0.9 > 0.1 > ends[1]
    balanced = trained("tchebycheff", [0.5, 0.5])
    assert balanced[0] == pytest.approx(balanced[1], abs=0.05)


def test_samples_learn_from_the_one_score() -> None:
    judged = judged_ones()
    verdicts = [item.critic_verdict for item in judged]
    data = of_samples(judged, verdicts, version=0, max_age=0, spans=None)
    found = rescored(data, {"r0": 1.5, "r1": None, "r2": -0.5})
    scores = sample_rows(found.table).scores
    assert (scores[0], scores[2]) == (1.5, -0.5)
    assert math.isnan(scores[1])
    assert found.table.column_names == data.table.column_names


def test_a_pair_gets_a_margin_of_each_other_objective_in_deviations() -> None:
    config = ObjectivesConfig(names=("verdict", "brevity", "steps"), weights=(0.6, 0.2, 0.2))
    (pair,) = from_table(pair_table(ages=[0], shift=0.0), PreferencePair)
    scores = {pair.chosen_id: (0.9, -6.0, 0.7), pair.rejected_id: (0.1, -2.0, 0.5)}
    running = RunningScores()
    running.add(scores, config.names)
    # Of two values each is one deviation from the mean: 2 deviations apart.
    (found,), num_unscored = with_margins([pair], scores, running, config)
    assert found.other_margins is not None
    assert list(found.other_margins) == pytest.approx([-2.0, 2.0])
    assert num_unscored == 0
    missing = {**scores, pair.rejected_id: (0.1, -2.0, None)}
    assert with_margins([pair], missing, running, config) == ((), 1)


def test_a_table_of_margins_becomes_their_columns_and_a_dummy_has_as_many() -> None:
    pairs = from_table(pair_table(ages=[0] * 3, shift=0.0), PreferencePair)
    told = [replace(pair, other_margins=(0.5 * i, -1.0)) for i, pair in enumerate(pairs)]
    rows = pair_rows(pair_table_of(told))
    totals = rows.totals([0, 2])
    for chosen, wanted in (([0, 2], [[0.0, -1.0], [1.0, -1.0]]), ([], [[0.0, 0.0]])):
        padded = rows.pad(chosen)
        logprobs = torch.zeros(padded.token_ids.shape)
        batch = rows.batch(
            chosen,
            logprobs=logprobs,
            mask=padded.mask,
            totals=totals,
            reference=torch.zeros(max(len(chosen), 1), 2),
        )
        assert batch.margins is not None
        assert batch.margins.tolist() == wanted
    assert pair_rows(pair_table(ages=[0] * 3, shift=0.0)).other_margins is None
    ragged = [replace(pair, other_margins=(0.5,) * (i + 1)) for i, pair in enumerate(pairs)]
    with pytest.raises(ValueError, match="other_margins: wanted 1, as many as the first row"):
        pair_rows(pair_table_of(ragged))


def pair_table_of(pairs: list[PreferencePair]) -> pa.Table:
    return to_table(pairs, PreferencePair)


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blank_run(tmp_path_factory.mktemp("blank") / RUN)


def test_a_run_with_objectives_stores_each_pairs_margins(blank: Path, tmp_path: Path) -> None:
    shutil.copytree(blank, tmp_path / RUN)
    config = ObjectivesConfig(names=("verdict", "brevity"), weights=(0.7, 0.3))
    run = fake_run(tmp_path / RUN, Settings(objectives=config))
    run.finish()
    lengths: list[int] = []
    for iteration in (1, 2):
        responses = read_stage(tmp_path / RUN, "responses", iteration=iteration).to_pylist()
        judged = {row["response_id"] for row in read_stage(tmp_path / RUN, "verdicts", iteration=iteration).to_pylist()
                  if row["label"] is not None}  # fmt: skip
        lengths += [len(row["token_ids"]) for row in responses if row["response_id"] in judged]
        deviation = pstdev(lengths)
        pairs = from_table(read_stage(tmp_path / RUN, "pairs", iteration=iteration), PreferencePair)
        assert pairs
        tokens = {row["response_id"]: len(row["token_ids"]) for row in responses}
        for pair in pairs:
            gap = (tokens[pair.rejected_id] - tokens[pair.chosen_id]) / deviation
            assert pair.other_margins is not None
            assert list(pair.other_margins) == pytest.approx([gap], abs=1e-9)
    assert run.driver.state.scores.moments["brevity"].num == len(lengths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[loss]\nkind = "modpo"\n',
         'a.toml:2: loss.kind: got "modpo" without objectives, wanted a section [objectives], whose first is '
         "the pairs' own: it trades that against the others"),
        ('[loss]\nkind = "modpo"\nweights = [0.5, 0.5]\n[objectives]\n',
         "a.toml:3: loss.weights: got [0.5, 0.5], wanted those of objectives.weights, [0.9, 0.1], or none: they are "
         "then these"),
        ('[loss]\nkind = "modpo"\n[objectives]\nweights = [0, 1]\n',
         'a.toml:4: objectives.weights: got [0.0, 1.0] with loss.kind = "modpo", wanted the first above 0: its pairs '
         "are preferences by that"),
        ('[loss]\nkind = "modpo"\n[objectives]\nnames = ["brevity", "verdict"]\nweights = [0.5, 0.5]\n',
         'a.toml:4: objectives.names: got "brevity" first with loss.kind = "modpo", wanted "verdict": its pairs are '
         "preferences by that"),
        ('[objectives]\n[loss]\nkind = "dpo"\n',
         'a.toml:1: objectives: got the section with loss.kind = "dpo", wanted modpo or a loss that learns from '
         "scores, such as grpo: others know of one objective alone"),
        ('[loss]\nkind = "grpo"\n[objectives]\nnames = ["verdict", "steps"]\n[oversight]\nkind = "shuffled"\n',
         'a.toml:4: objectives.names: got "steps" with oversight.kind = "shuffled", wanted others: it reads the '
         "critiques as they are, so that the control would learn from what the critic wrote"),
        ('[loss]\nkind = "grpo"\n[objectives]\nnames = ["verdict", "steps"]\n[oversight]\nkind = "experts_only"\n',
         'a.toml:4: objectives.names: got "steps" with oversight.kind = "experts_only", wanted others: it reads the '
         "critiques as they are, so that the control would learn from what the critic wrote"),
        ("[objectives]\nweights = [0.5, 0.6]\n",
         "a.toml:2: objectives.weights: got [0.5, 0.6], wanted one for each of 2 objectives, none below 0, that add up "
         "to 1"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert problems_of(text, tmp_path)[:1] == [message]


@pytest.mark.parametrize("loss", ["modpo", "grpo"])
def test_objectives_by_toml_are_accepted(loss: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'[loss]\nkind = "{loss}"\n[objectives]\nweights = [0.5, 0.5]\n')
    assert load_run_config([path]).objectives == ObjectivesConfig(weights=(0.5, 0.5))


def test_modpo_that_is_told_no_weights_has_those_of_the_objectives(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[loss]\nkind = "modpo"\n[objectives]\nweights = [0.7, 0.3]\n')
    config = load_run_config([path])
    assert config.model_dump(mode="json")["loss"]["weights"] == [0.7, 0.3]
    resolved = tmp_path / "resolved.json"
    resolved.write_text(config.model_dump_json())
    assert read_resolved(resolved) == config
    path.write_text('[loss]\nkind = "modpo"\nweights = [0.9, 0.1]\n[objectives]\n')
    assert load_run_config([path]).loss.model_dump()["weights"] == (0.9, 0.1)


def test_one_of_three_random_scores_per_objective_is_enough_for_moments() -> None:
    rng = random.Random(1)
    running = RunningScores()
    for _ in range(3):
        running.add({f"r{i}": (rng.random(), None) for i in range(3)}, ("verdict", "steps"))
    assert (running.moments["verdict"].num, running.moments["steps"].num) == (9, 0)
    assert running.snapshot().keys() == {"verdict"}
