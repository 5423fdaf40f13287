"""Labels of several sources: drawn answers tell how often each errs, pairs state it, every step has experts' pairs."""

from __future__ import annotations

import math
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.oversight import EXPERT, Escalation, Judged, Shuffled
from actors.records import ExpertLabel, PreferencePair, Verdict, from_table
from cluster.store import read_stage
from tests.fake_roles import RUN, Settings, fake_run, write_blank_run
from tests.refused_settings import problems_of
from tests.small_records import make_judged, make_query, make_verdict
from trainers.batches import TrainingPlan
from trainers.driver import Stopped
from trainers.feedback.mixed_feedback import (
    ErrorRates,
    MixConfig,
    double_labelled,
    error_rates,
    failure_share,
    mixed,
    pair_noise,
    powered_mean,
    tally,
)
from trainers.feedback.mixed_plan import plan_with_share
from trainers.feedback.objectives import ObjectivesConfig
from trainers.feedback.preferences import Pairs, PreferenceConfig, build_pairs
from trainers.feedback.selection import SelectionConfig
from trainers.feedback.training_data import of_pairs
from trainers.losses import PairBatch, cdpo, dpo, rdpo
from trainers.progress import StopSignal
from trainers.ranks.update_start import each_row_once
from trainers.rows.pairs import pair_rows
from trainers.run_config import load_run_config
from trainers.summary import read_metrics


def expert_label(response_id: str, label: str | None) -> ExpertLabel:
    return ExpertLabel(item_id=response_id, kind="response", label=label, expert="a", seconds=0, time=0, comment="")


def checked(score: float, label: str | None, *, name: str = "r0", drawn: bool = True) -> tuple[Judged, Verdict]:
    """An answer that the critic gave a P(good) and an expert a label; None: the expert abstained."""
    item = make_judged(name, score, text=name)
    known = make_verdict(name, score) if label is None else make_verdict(name, float(label == "pass"), source="expert")
    return item, replace(known, drawn=drawn)


def verdicts_of(*rows: tuple[Judged, Verdict]) -> tuple[list[Judged], list[Verdict]]:
    return [item for item, _ in rows], [verdict for _, verdict in rows]


# ------------------------------------------------------------------------------------------------ drawn for calibration


def answers(num: int) -> list[Judged]:
    """Answers to a query of their own each, the first the least trusted."""
    return [make_judged(f"r{i}", 0.5 + 0.4 * i / num, query_id=f"q{i}", text=f"answer {i}") for i in range(num)]


class Asked:
    """Passes all that it is asked."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def ask(self, cases: Sequence[Judged]) -> Mapping[str, ExpertLabel]:
        self.names += [case.response.response_id for case in cases]
        return {name: expert_label(name, "pass") for name in self.names}


def test_part_of_the_budget_is_drawn_and_the_rest_are_the_least_trusted_of_the_others() -> None:
    asked = Asked()
    verdicts = Escalation(calibration=0.3, seed=1).decide(answers(40), asked.ask, num_allowed=10)
    drawn = {verdict.response_id for verdict in verdicts if verdict.drawn}
    # ceil(0.3 * 10) drawn ones, and seven others.
    assert (len(drawn), len(asked.names), len(set(asked.names))) == (3, 10, 10)
    least_trusted = [f"r{i}" for i in range(40) if f"r{i}" not in drawn][:7]
    assert asked.names[3:] == least_trusted
    assert {verdict.response_id for verdict in verdicts if verdict.escalated} == set(asked.names)


def test_without_calibration_nothing_is_drawn() -> None:
    verdicts = Escalation().decide(answers(10), Asked().ask, num_allowed=4)
    assert not any(verdict.drawn for verdict in verdicts)
    assert [verdict.escalated for verdict in verdicts] == [True] * 4 + [False] * 6


def test_a_draw_goes_by_the_seed_alone_and_not_by_what_the_critic_says() -> None:
    def drawn(judged: list[Judged], seed: int) -> list[str]:
        verdicts = Escalation(calibration=1.0, seed=seed).decide(judged, Asked().ask, num_allowed=5)
        return sorted(verdict.response_id for verdict in verdicts if verdict.drawn)

    plain = answers(40)
    turned = [replace(item, critiques=make_judged("x", 0.99).critiques) for item in plain]
    assert drawn(plain, 1) == drawn(turned[::-1], 1) != drawn(plain, 2)


def test_every_distinct_answer_is_drawn_about_as_often() -> None:
    counts: Counter[str] = Counter()
    for seed in range(400):
        verdicts = Escalation(calibration=1.0, seed=seed).decide(answers(20), Asked().ask, num_allowed=5)
        counts.update(verdict.response_id for verdict in verdicts if verdict.drawn)
    # 400 * 5 / 20 = 100 each, with a standard deviation of sqrt(100 * 3 / 4) = 8.7.
    assert len(counts) == 20
    assert max(abs(num - 100) for num in counts.values()) < 4 * 8.7


def test_a_permuted_verdict_checks_nothing_of_the_critics() -> None:
    judged = [make_judged(f"r{i}", 0.9, text=f"{i}") for i in range(6)]
    verdicts = Shuffled(Escalation(calibration=1.0)).decide(judged, Asked().ask, num_allowed=2)
    assert [verdict.source for verdict in verdicts].count("expert") == 2
    assert not any(verdict.drawn for verdict in verdicts)
    assert tally(judged, verdicts) == {}


# --------------------------------------------------------------------------------------------------- how often one errs


def test_only_drawn_answers_that_both_labelled_say_how_often_the_critic_errs() -> None:
    judged, verdicts = verdicts_of(
        checked(0.9, "pass", name="r0"),
        checked(0.9, "fail", name="r1"),
        checked(0.2, "fail", name="r2"),
        checked(0.2, None, name="r3"),  # the expert abstained
        checked(0.55, "fail", name="r4", drawn=False),  # escalated: the least trusted are wrong more often
    )
    judged.append(make_judged("r5", None, text="r5"))
    verdicts.append(replace(make_verdict("r5", 1.0, source="expert"), drawn=True))  # the critic could not be read
    assert len(double_labelled(judged, verdicts)) == 3
    assert tally(judged, verdicts) == {"pass": 2, "pass wrong": 1, "fail": 1}


def test_an_error_rate_begins_at_the_prior_and_goes_to_what_was_found() -> None:
    config = MixConfig(prior_noise=0.1, prior_items=10, expert_noise=0.02)
    assert error_rates({}, config) == ErrorRates(critic={"pass": 0.1, "fail": 0.1}, expert=0.02)
    # (2 + 1) / (10 + 10) and (300 + 1) / (1000 + 10)
    found = error_rates({"pass": 10, "pass wrong": 2, "fail": 1000, "fail wrong": 300}, config)
    assert found.critic == {"pass": pytest.approx(0.15), "fail": pytest.approx(301 / 1010)}
    assert found.of(make_verdict("r", 0.9)) == pytest.approx(0.15)
    assert found.of(make_verdict("r", 0.1)) == pytest.approx(301 / 1010)
    assert found.of(make_verdict("r", 0.0, source="expert")) == 0.02


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_pairs_noise_is_the_chance_that_it_is_flipped_where_ties_count_half(chosen: float, rejected: float) -> None:
    flipped, tied = chosen * rejected, chosen * (1 - rejected) + (1 - chosen) * rejected
    assert pair_noise(chosen, rejected) == pytest.approx(flipped + tied / 2)


def pairs_of(*sides: tuple[Verdict, Verdict]) -> tuple[tuple[PreferencePair, ...], list[Verdict]]:
    """Pairs of verdicts on a query each."""
    responses, verdicts, queries = {}, [], []
    for i, both in enumerate(sides):
        queries.append(make_query(f"q{i}"))
        for k, verdict in enumerate(both):
            item = make_judged(f"{'ab'[k]}{i}", 0.5, query_id=f"q{i}", text=f"text {k}")
            responses[item.response.response_id] = item.response
            verdicts.append(replace(verdict, query_id=f"q{i}", response_id=item.response.response_id))
    built = build_pairs(
        queries,
        responses,
        verdicts,
        config=PreferenceConfig(),
        run="test",
        version=0,
        max_age=0,
        tokens_spanning=lambda ids, num: min(num, len(ids)),
    )
    return built.pairs, verdicts


GOOD, BAD = make_verdict("a", 0.9), make_verdict("b", 0.1)
SURELY_GOOD, SURELY_BAD = make_verdict("a", 1.0, source="expert"), make_verdict("b", 0.0, source="expert")


def test_a_pair_states_the_noise_of_its_two_labels_and_the_weight_of_its_source() -> None:
    pairs, verdicts = pairs_of((GOOD, BAD), (SURELY_GOOD, BAD), (SURELY_GOOD, SURELY_BAD))
    rates = ErrorRates(critic={"pass": 0.3, "fail": 0.2}, expert=0.02)
    found = mixed(pairs, verdicts, rates=rates, config=MixConfig())
    assert [pair.source for pair in found.pairs] == ["critic", "expert", "expert"]
    # (0.3 + 0.2) / 2, (0.02 + 0.2) / 2, 0.02; METHODS' w_H is 3.
    assert [pair.noise for pair in found.pairs] == pytest.approx([0.25, 0.11, 0.02])
    assert [pair.weight for pair in found.pairs] == [1.0, 3.0, 3.0]
    plain = mixed(pairs, verdicts, rates=rates, config=MixConfig(noise="none", critic_weight=0.5))
    assert [(pair.noise, pair.weight) for pair in plain.pairs] == [(0.0, 0.5), (0.0, 3.0), (0.0, 3.0)]


def test_a_pair_whose_label_tells_nothing_is_left_out_and_counted() -> None:
    pairs, verdicts = pairs_of((GOOD, BAD), (SURELY_GOOD, BAD))
    found = mixed(pairs, verdicts, rates=ErrorRates(critic={"pass": 0.7, "fail": 0.3}, expert=0.01), config=MixConfig())
    # (0.7 + 0.3) / 2 is half: no better than a coin.
    assert ([pair.source for pair in found.pairs], found.num_noisy) == (["expert"], 1)


def test_an_expert_overrides_the_critic_and_so_turns_the_pair() -> None:
    judged = [make_judged("r0", 0.9, text="a"), make_judged("r1", 0.1, text="b")]

    def ask(cases: Sequence[Judged]) -> Mapping[str, ExpertLabel]:
        return {"r0": expert_label("r0", "fail"), "r1": expert_label("r1", "pass")}

    verdicts = Escalation().decide(judged, ask, num_allowed=2)
    (pair,) = build_pairs(
        [make_query("q")],
        {item.response.response_id: item.response for item in judged},
        verdicts,
        config=PreferenceConfig(),
        run="test",
        version=0,
        max_age=0,
        tokens_spanning=lambda ids, num: min(num, len(ids)),
    ).pairs
    assert (pair.chosen, pair.rejected, pair.source) == ("b", "a", "expert")


def toy_batch(noise: Sequence[float], weights: Sequence[float]) -> PairBatch:
    """METHODS' TOY-P (z = 0.15) and a second pair with z = -0.3."""
    return PairBatch(
        policy_chosen=torch.tensor([-10.0, -13.0], dtype=torch.float64, requires_grad=True),
        policy_rejected=torch.tensor([-12.0, -10.5], dtype=torch.float64, requires_grad=True),
        reference_chosen=torch.tensor([-11.0, -11.0], dtype=torch.float64),
        reference_rejected=torch.tensor([-11.5, -11.5], dtype=torch.float64),
        chosen_lengths=torch.tensor([5.0, 5.0]),
        rejected_lengths=torch.tensor([4.0, 4.0]),
        noise=torch.tensor(noise, dtype=torch.float64),
        weights=torch.tensor(weights, dtype=torch.float64),
    )


def test_without_noise_and_with_equal_weights_the_robust_losses_are_dpo() -> None:
    plain = dpo.loss(toy_batch([0.0, 0.0], [1.0, 1.0]), dpo.Config(beta=0.1)).loss.item()
    for module in (cdpo, rdpo):
        got = module.loss(toy_batch([0.0, 0.0], [1.0, 1.0]), module.Config(beta=0.1)).loss.item()
        assert got == pytest.approx(plain, abs=1e-12)


def test_the_mixed_loss_is_the_weighted_mean_of_each_sources_own() -> None:
    def softplus(z: float) -> float:
        return math.log1p(math.exp(z))

    got = cdpo.loss(toy_batch([0.1, 0.02], [1.0, 3.0]), cdpo.Config(beta=0.1)).loss.item()
    first = 0.9 * softplus(-0.15) + 0.1 * softplus(0.15)
    second = 0.98 * softplus(0.3) + 0.02 * softplus(-0.3)
    assert first == pytest.approx(0.635957, abs=1e-6)
    assert got == pytest.approx((first + 3 * second) / 4)


# ----------------------------------------------------------------------------------------- prediction-powered inference


def test_powered_mean_of_the_worked_example() -> None:
    # H = (1, 0, 1, 1), the AI passes all of them and 9 in 10 of the others: 0.9 + (0.75 - 1) = 0.65.
    found = powered_mean([1, 0, 1, 1], [1, 1, 1, 1], [1.0] * 9 + [0.0], kappa=1.0)
    assert found.value == pytest.approx(0.65)
    # Variance: 0.1 (of ten values, 9 of them 1: 0.9 * 0.1 * 10 / 9) / 10 + var(0, -1, 0, 0) / 4 = 0.01 + 0.25 / 4.
    assert found.ci_high - found.value == pytest.approx(1.959964 * math.sqrt(0.01 + 0.0625), abs=1e-6)
    alone = powered_mean([1, 0, 1, 1], [1, 1, 1, 1], [0.9], kappa=0.0)
    assert alone.value == pytest.approx(0.75)


def test_an_ai_that_agrees_with_the_experts_gives_its_own_mean() -> None:
    assert powered_mean([1, 0, 1], [1, 0, 1], [0.2, 0.4], kappa=1.0).value == pytest.approx(0.3)


def test_an_ai_that_says_the_same_of_everything_is_not_relied_on() -> None:
    found = powered_mean([1, 0, 1, 1], [1, 1, 1, 1], [1.0] * 20)
    assert found.kappa == 0.0
    assert found.value == pytest.approx(0.75)


def test_the_best_kappa_of_the_other_items_is_that_of_the_formula_and_hardly_any_has_less_variance() -> None:
    human, same, others = [1, 0, 1, 1, 0, 0], [0.9, 0.2, 0.7, 0.6, 0.5, 0.1], [0.8, 0.1, 0.4, 0.9, 0.3, 0.6, 0.7, 0.2]
    found = powered_mean(human, same, others)
    kappas, residuals = [], []
    for i in range(6):
        h, a = human[:i] + human[i + 1 :], same[:i] + same[i + 1 :]
        covariance = float(np.cov(h, a)[0, 1])
        kappas.append(min(1.0, covariance / ((1 + 6 / 8) * float(np.var([*a, *others], ddof=1)))))
        residuals.append(human[i] - kappas[-1] * same[i])
    assert found.kappa == pytest.approx(sum(kappas) / 6)
    assert found.value == pytest.approx(found.kappa * sum(others) / 8 + sum(residuals) / 6)

    def width(kappa: float) -> float:
        other = powered_mean(human, same, others, kappa=kappa)
        return other.ci_high - other.ci_low

    # The formula takes one variance of both parts; it is near the least of the estimate that takes two.
    assert width(found.kappa) < min(width(0.0), width(1.0))
    assert width(found.kappa) <= 1.05 * min(width(k / 100) for k in range(101))


def simulated(rng: random.Random, *, agreement: float) -> tuple[list[float], list[float]]:
    """Figures of experts (mean 0.3) and of an AI that says the same at a rate, and 1 otherwise; of 440 items."""
    human = [float(rng.random() < 0.3) for _ in range(440)]
    ai = [value if rng.random() < agreement else 1.0 for value in human]
    return human, ai


@pytest.mark.parametrize("kappa", [1.0, None])
def test_the_powered_mean_is_unbiased_and_covers_over_2000_simulations(kappa: float | None) -> None:
    rng = random.Random(5)
    found = []
    for _ in range(2_000):
        human, ai = simulated(rng, agreement=0.9)
        found.append(powered_mean(human[:40], ai[:40], ai[40:], kappa=kappa))
    values = [one.value for one in found]
    error = math.sqrt(sum((value - 0.3) ** 2 for value in values) / 2_000)
    assert sum(values) / 2_000 == pytest.approx(0.3, abs=4 * error / math.sqrt(2_000))
    covered = sum(one.ci_low <= 0.3 <= one.ci_high for one in found) / 2_000
    assert 0.90 <= covered <= 0.98
    # The AI alone is biased: 0.3 + 0.1 * 0.7 = 0.37.
    assert sum(ai) / len(ai) > 0.33


def test_an_ai_that_mostly_agrees_halves_the_variance_of_experts_alone() -> None:
    rng = random.Random(6)
    powered, alone = [], []
    for _ in range(1_000):
        human, ai = simulated(rng, agreement=0.95)
        powered.append((powered_mean(human[:40], ai[:40], ai[40:]).value - 0.3) ** 2)
        alone.append((sum(human[:40]) / 40 - 0.3) ** 2)
    assert sum(powered) < 0.5 * sum(alone)


def test_a_figure_without_two_experts_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="powered_mean: got 1 human and 1 AI figures of the same items, wanted one"):
        powered_mean([1.0], [1.0], [0.5])


def test_the_share_of_failures_is_put_right_by_drawn_answers_copies_counted_once() -> None:
    judged, verdicts = verdicts_of(
        checked(0.9, "fail", name="r0"), checked(0.9, "pass", name="r1"), checked(0.1, "fail", name="r2")
    )
    assert failure_share(judged[:1], verdicts[:1]) is None
    for i, score in enumerate((0.9, 0.9, 0.1, 0.1), start=3):
        judged.append(make_judged(f"r{i}", score, text=f"r{min(i, 5)}"))  # the last two say the same
        verdicts.append(make_verdict(f"r{i}", score))
    found = failure_share(judged, verdicts)
    assert found is not None
    assert (found.num_human, found.num_ai) == (3, 3)
    # The critic fails (0, 0, 1) of the drawn, (0, 0, 1) of the others; experts fail (1, 0, 1).
    # Without the first: cov((0, 1), (0, 1)) = 1/2, var(0, 1, 0, 0, 1) = 3/10, n / N = 1: kappa 0.5 / 0.6. Without the
    # second: the experts say 1 of both, cov 0. Without the third: the critic says 0 of both, cov 0.
    kappa = (0.5 / 0.6 + 0 + 0) / 3
    assert found.kappa == pytest.approx(kappa)
    # The critic's mean of the others is 1/3; of the drawn, the first (where the critic says 0) alone is put right.
    assert found.value == pytest.approx(kappa / 3 + 2 / 3)


# -------------------------------------------------------------------------------------------------- shares of each step


def shares(plan: TrainingPlan, kept: Sequence[bool]) -> list[tuple[int, int]]:
    return [(sum(kept[row] for row in step.rows), len(step.rows)) for step in plan.steps]


@given(
    num_others=st.integers(0, 60),
    num_kept=st.integers(0, 20),
    share=st.floats(0.01, 0.5),
    batch_size=st.integers(2, 17),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_every_step_has_its_share_of_experts_rows(
    num_others: int, num_kept: int, share: float, batch_size: int, seed: int
) -> None:
    num = num_others + num_kept
    if not num:
        return
    kept = [i < num_kept for i in range(num)]
    random.Random(seed).shuffle(kept)
    plan = plan_with_share(
        [f"p{i}" for i in range(num)], kept=kept, share=share, batch_size=batch_size, epochs=2, seed=seed
    )
    for num_here, size in shares(plan, kept):
        assert 1 <= size <= batch_size
        if num_kept and num_others:
            assert num_here >= min(num_kept, share * size - 1e-6)
    for epoch in (0, 1):
        rows = [row for step in plan.steps if step.epoch == epoch for row in step.rows]
        counts = Counter(rows)
        assert set(counts) == set(range(num))
        assert all(counts[row] == 1 for row in range(num) if not kept[row])
    assert all(len(set(step.rows)) == len(step.rows) for step in plan.steps)


def test_a_fifth_of_experts_rows_is_kept_by_repeating_them() -> None:
    # 36 of the critic's and 2 of the experts', 8 to a step: 7 others and 1, or 6 and 2 for a fifth.
    kept = [True] * 2 + [False] * 36
    plan = plan_with_share([f"p{i}" for i in range(38)], kept=kept, share=0.2, batch_size=8, epochs=1, seed=0)
    assert shares(plan, kept) == [(2, 8)] * 6


def test_without_experts_rows_or_without_a_share_the_plan_is_the_plain_one() -> None:
    ids = [f"p{i}" for i in range(20)]
    plain = TrainingPlan.of(ids, batch_size=6, epochs=2, seed=4)
    for kept, share in (([False] * 20, 0.1), ([True] * 20, 0.1), ([True] * 3 + [False] * 17, 0.0)):
        assert plan_with_share(ids, kept=kept, share=share, batch_size=6, epochs=2, seed=4) == plain


def test_a_row_that_comes_again_has_its_reference_computed_once() -> None:
    kept = [True] * 2 + [False] * 36
    plan = plan_with_share([f"p{i}" for i in range(38)], kept=kept, share=0.2, batch_size=8, epochs=2, seed=0)
    rows = [row for part in each_row_once(plan, num_rows=38) for row in part]
    assert sorted(rows) == list(range(38))


# ------------------------------------------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blank_run(tmp_path_factory.mktemp("blank") / RUN)


def test_a_run_weighs_its_pairs_by_what_its_drawn_answers_told(blank: Path, tmp_path: Path) -> None:
    mix = MixConfig(expert_share=0.5)
    shutil.copytree(blank, tmp_path / RUN)
    run = fake_run(
        tmp_path / RUN,
        Settings(
            budget=0.1,
            calibration=0.5,
            preferences=PreferenceConfig(mix=mix),
            batch_size=4,
            queries_per_iteration=30,
        ),
    )
    run.finish()
    counts = run.driver.state.checked
    assert counts["pass"] + counts["fail"] >= 4
    (first, second) = read_metrics(tmp_path / RUN)
    assert first.feedback is not None
    assert second.feedback is not None
    assert second.feedback.checked == dict(counts)
    assert second.feedback.error_rates == pytest.approx(error_rates(counts, mix).critic)
    for number, row in ((1, first), (2, second)):
        assert row.feedback is not None
        pairs = from_table(read_stage(tmp_path / RUN, "pairs", iteration=number), PreferencePair)
        verdicts = from_table(read_stage(tmp_path / RUN, "verdicts", iteration=number), Verdict)
        by_response = {verdict.response_id: verdict for verdict in verdicts}
        rates = ErrorRates(critic=row.feedback.error_rates, expert=mix.expert_noise)
        for pair in pairs:
            sides = [rates.of(by_response[name]) for name in (pair.chosen_id, pair.rejected_id)]
            assert pair.noise == pytest.approx(sum(sides) / 2)
            assert pair.weight == (3.0 if pair.source == EXPERT else 1.0)
        assert row.feedback.num_expert_pairs == sum(pair.source == EXPERT for pair in pairs)
        assert row.experts_asked <= math.floor(0.1 * row.num_verdicts)
        assert pair_rows(of_pairs_table(pairs)).noise is not None
        # Half of every step's pairs are the experts', as far as there are any.
        mine = {pair.pair_id: pair.source == EXPERT for pair in pairs}
        steps: dict[int, list[bool]] = {}
        for row_id, _, step in run.group.slots:
            if row_id in mine:
                steps.setdefault(step, []).append(mine[row_id])
        assert 0 < sum(mine.values()) < len(mine)
        assert all(sum(step) >= min(sum(mine.values()), len(step) / 2) for step in steps.values())


def test_a_run_that_is_stopped_and_goes_on_counts_each_check_once(blank: Path, tmp_path: Path) -> None:
    def settled(name: str, *points: str) -> tuple[Any, list[Any], list[PreferencePair]]:
        path = Path(shutil.copytree(blank, tmp_path / name / RUN))
        chosen = Settings(
            budget=0.2,
            calibration=0.5,
            preferences=PreferenceConfig(mix=MixConfig()),
            selection=SelectionConfig(drop=0.3, ramp_iterations=1),
            objectives=ObjectivesConfig(),
        )
        for point in points:
            stop = StopSignal()

            def ask(reached: str, num: int, point: str = point, stop: StopSignal = stop) -> None:
                if reached == point:
                    stop.request()

            with pytest.raises(Stopped):
                fake_run(path, chosen, reach=ask, stop=stop).finish()
        run = fake_run(path, chosen)
        run.finish()
        pairs = from_table(read_stage(path, "pairs", iteration=2), PreferencePair)
        feedback = [row.feedback for row in read_metrics(path)]
        return run.driver.state.scores, feedback, sorted(pairs, key=lambda pair: pair.pair_id)

    whole = settled("whole")
    assert whole[1][1] is not None
    assert settled("stopped", "pairs 1", "critiques 2", "pairs 2") == whole


def of_pairs_table(pairs: Sequence[PreferencePair]) -> Any:
    return of_pairs(Pairs(pairs=tuple(pairs), dropped={}), lambda pair: pair.pair_id).table


def test_a_run_without_a_mix_is_the_run_that_it_was(blank: Path, tmp_path: Path) -> None:
    shutil.copytree(blank, tmp_path / RUN)
    run = fake_run(tmp_path / RUN, Settings())
    run.finish()
    (first, _) = read_metrics(tmp_path / RUN)
    assert first.feedback is None
    pairs = from_table(read_stage(tmp_path / RUN, "pairs", iteration=1), PreferencePair)
    assert {(pair.weight, pair.noise, pair.other_margins) for pair in pairs} == {(1.0, 0.0, None)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('preferences.mix = {}\noversight.calibration = 0.5\nloss.kind = "dpo"\n',
         'a.toml:1: preferences.mix.noise: got "estimated" with loss.kind = "dpo", wanted "none", or one of cdpo, '
         "rdpo, which read it"),
        ('preferences.mix = {}\n[loss]\nkind = "cdpo"\n',
         'a.toml:1: preferences.mix.noise: got "estimated" with oversight.calibration = 0, wanted that above 0, or '
         '"none": without answers drawn at random nothing tells how often the critic errs'),
        ('preferences.mix = {}\n[loss]\nkind = "cdpo"\n[oversight]\nkind = "shuffled"\ncalibration = 0.5\n',
         'a.toml:1: preferences.mix.noise: got "estimated" with oversight.kind = "shuffled", wanted "none": permuted '
         "labels say nothing of how often the critic errs"),
        ('preferences.mix = { noise = "none" }\n[loss]\nkind = "sft"\n',
         'a.toml:1: preferences.mix: got it with loss.kind = "sft", wanted a loss of pairs, such as cdpo'),
        ('preferences.mix = { noise = "none" }\n[loss]\nkind = "kto"\n',
         'a.toml:1: preferences.mix: got it with loss.kind = "kto", wanted a loss of pairs, such as cdpo'),
        ("[oversight]\nbudget = 0.0\ncalibration = 0.5\n",
         "a.toml:3: oversight.calibration: got 0.5 with oversight.budget = 0, wanted a budget above 0: it is a "
         "share of it"),
        ('[loss]\nkind = "span_noise"\n[oversight]\nkind = "shuffled"\n',
         'a.toml:2: loss.kind: got "span_noise" with oversight.kind = "shuffled", wanted one that reads no spans: the '
         "control would learn from what the critic wrote"),
        ('[preferences.mix]\nnoise = "none"\n[learner.training]\nbatch_size = 1\nnum_ranks = 1\n[loss]\nkind = "dpo"\n',
         "a.toml:1: preferences.mix.expert_share: got 0.1 with learner.training.batch_size = 1, wanted a batch of 2 or "
         "more: a step of one pair has no share to keep"),
        ('[oversight]\nkind = "single"\ncalibration = 0.5\n',
         'a.toml:3: oversight.calibration: got 0.5 with oversight.kind = "single", wanted 0: only escalation and '
         "shuffled draw answers for it"),
        ('[preferences.mix]\nexpert_share = 0.6\nnoise = "none"\n[loss]\nkind = "dpo"\n',
         "a.toml:2: preferences.mix.expert_share: got 0.6, wanted at most 0.5"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert problems_of(text, tmp_path) == [message]


def test_a_mix_by_toml_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[oversight]\ncalibration = 0.5\n[preferences.mix]\nexpert_weight = 2\n[loss]\nkind = "rdpo"\n')
    mix = load_run_config([path]).preferences.mix
    assert mix == MixConfig(expert_weight=2.0)
