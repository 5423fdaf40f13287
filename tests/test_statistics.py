"""The statistics against closed forms, brute force and published examples."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.statistics import agreement, auroc, calibration, paired_gain, tango_interval, wilson

Z = 1.959963984540054


def test_tango_interval_equals_the_published_airway_example() -> None:
    # 21 children, 1 changed one way and 7 the other (Fagerland, Lydersen, Laake 2014): -0.286 (-0.517 to -0.026).
    low, high = tango_interval(1, 7, 21)
    assert low == pytest.approx(-0.517, abs=5e-4)
    assert high == pytest.approx(-0.026, abs=5e-4)


def test_tango_interval_equals_an_independent_implementation_at_ninety_percent() -> None:
    # R's PropCIs::scoreci.mp(25, 28, 618, 0.90), whose difference is second minus first.
    low, high = tango_interval(28, 25, 618, confidence=0.90)
    assert (round(low, 4), round(high, 4)) == (-0.0148, 0.0247)


def test_without_discordant_pairs_the_interval_is_z2_over_n_plus_z2_both_ways() -> None:
    # Then q(d) = 0 for d > 0 and the statistic is -sqrt(n d / (1 - d)); setting it to -z gives z²/(n + z²).
    gain = paired_gain([True, False] * 25, [True, False] * 25)
    assert gain.gain == 0.0
    assert gain.ci_high == pytest.approx(Z**2 / (50 + Z**2))
    assert gain.ci_low == pytest.approx(-(Z**2) / (50 + Z**2))


@pytest.mark.parametrize("n", [1, 3, 4, 100, 1008])
def test_when_every_item_improves_the_interval_ends_at_one(n: int) -> None:
    # Then q(d) = (1 - d)/2 and the statistic is sqrt(n (1 - d)/(1 + d)); setting it to z gives (n - z²)/(n + z²).
    gain = paired_gain([False] * n, [True] * n)
    assert (gain.before, gain.after, gain.gain) == (0.0, 1.0, 1.0)
    assert gain.ci_high == 1.0
    assert gain.ci_low == pytest.approx((n - Z**2) / (n + Z**2))


def test_when_every_item_worsens_the_interval_starts_at_minus_one() -> None:
    gain = paired_gain([True] * 100, [False] * 100)
    assert gain.ci_low == -1.0
    assert gain.ci_high == pytest.approx(-(100 - Z**2) / (100 + Z**2))


def test_paired_gain_counts_items_in_both_directions() -> None:
    before = [True, True, False, False, False]
    after = [True, False, True, True, False]
    gain = paired_gain(before, after)
    assert (gain.before, gain.after, gain.n) == (0.4, 0.6, 5)
    assert (gain.num_improved, gain.num_worsened) == (2, 1)
    assert gain.gain == pytest.approx(0.2)
    assert gain.ci_low < 0.2 < gain.ci_high


def test_equally_many_changes_both_ways_give_a_symmetric_interval() -> None:
    low, high = tango_interval(12, 12, 200)
    assert low == pytest.approx(-high)
    assert high > 0


def _statistic_by_brute_force(b: int, c: int, n: int, d: float) -> float:
    """The score statistic with the nuisance share maximised on a grid and refined, without Tango's formula."""
    lowest, highest = max(0.0, -d), (1 - d) / 2

    def likelihood(q: float) -> float:
        cells = ((b, q + d), (c, q), (n - b - c, 1 - 2 * q - d))
        if any(count and share <= 0 for count, share in cells):
            return -math.inf
        return sum(count * math.log(share) for count, share in cells if count)

    for _ in range(60):  # the log-likelihood is concave in q: ternary search
        third = (highest - lowest) / 3
        if likelihood(lowest + third) < likelihood(highest - third):
            lowest += third
        else:
            highest -= third
    q = (lowest + highest) / 2
    return (b - c - n * d) / math.sqrt(max(n * (2 * q + d * (1 - d)), 1e-300))


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 50), (1, 0, 44), (0, 3, 10), (30, 5, 36), (1, 1, 2)])
def test_the_ends_of_the_interval_are_where_the_statistic_by_brute_force_meets_z(b: int, c: int, n: int) -> None:
    low, high = tango_interval(b, c, n)
    assert _statistic_by_brute_force(b, c, n, low) == pytest.approx(Z, rel=1e-4)
    assert _statistic_by_brute_force(b, c, n, high) == pytest.approx(-Z, rel=1e-4)


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_the_interval_holds_the_estimate_and_mirrors_when_before_and_after_swap(b: int, c: int, rest: int) -> None:
    n = b + c + rest
    if n == 0:
        return
    low, high = tango_interval(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    mirrored = tango_interval(c, b, n)
    assert mirrored == (-high, -low)


def test_the_interval_covers_the_true_difference_about_95_percent_of_the_time() -> None:
    # Exact coverage at n = 30 with P(improved) = 0.3, P(worsened) = 0.1: sum of multinomial chances of the samples
    # whose interval holds 0.2.
    n, p, q = 30, 0.3, 0.1
    covered = 0.0
    for b, c in product(range(n + 1), repeat=2):
        if b + c <= n:
            low, high = tango_interval(b, c, n)
            if low <= p - q <= high:
                ways = math.comb(n, b) * math.comb(n - b, c)
                covered += ways * p**b * q**c * (1 - p - q) ** (n - b - c)
    assert 0.93 < covered < 0.97


def test_paired_gain_refuses_two_sets_of_different_sizes_and_no_items() -> None:
    with pytest.raises(ValueError, match="3 items before and 2 after"):
        paired_gain([True] * 3, [True] * 2)
    with pytest.raises(ValueError, match="at least one"):
        paired_gain([], [])


def test_wilson_interval_equals_its_formula() -> None:
    share = wilson(7, 20)
    centre = (7 + Z**2 / 2) / (20 + Z**2)
    half = Z / (20 + Z**2) * math.sqrt(7 * 13 / 20 + Z**2 / 4)
    assert share.value == 0.35
    assert (share.ci_low, share.ci_high) == (pytest.approx(centre - half), pytest.approx(centre + half))


def test_wilson_interval_of_none_and_all_ends_at_zero_and_one() -> None:
    assert wilson(0, 10).ci_low == 0.0
    assert wilson(0, 10).ci_high == pytest.approx(Z**2 / (10 + Z**2))
    assert wilson(10, 10).ci_high == 1.0
    with pytest.raises(ValueError, match="3 of 0"):
        wilson(3, 0)


def test_agreement_weighs_good_and_bad_answers_equally() -> None:
    # 90 good, 81 of them passed; 10 bad, 4 of them failed: (0.9 + 0.4)/2, although plain accuracy is 0.85.
    truth = [True] * 90 + [False] * 10
    passed = [True] * 81 + [False] * 9 + [False] * 4 + [True] * 6
    found = agreement(truth, passed)
    assert found.balanced_accuracy == pytest.approx(0.65)
    assert found.false_fail == pytest.approx(0.1)
    assert found.false_pass == pytest.approx(0.6)
    assert (found.num_good, found.num_bad) == (90, 10)
    assert found.ci_low is not None
    assert found.ci_high is not None
    good, bad = wilson(81, 90), wilson(4, 10)
    assert found.ci_low == pytest.approx(0.65 - math.hypot(0.9 - good.ci_low, 0.4 - bad.ci_low) / 2)
    assert found.ci_high == pytest.approx(0.65 + math.hypot(good.ci_high - 0.9, bad.ci_high - 0.4) / 2)


def test_agreement_is_absent_and_not_one_when_a_kind_of_answer_is_missing() -> None:
    found = agreement([True, True], [True, False])
    assert found.balanced_accuracy is None
    assert found.ci_low is None
    assert found.false_pass is None
    assert found.false_fail == 0.5
    assert agreement([], []).balanced_accuracy is None


def test_auroc_counts_pairs_and_halves_ties() -> None:
    truth = [True, True, True, False, False]
    scores = [0.9, 0.5, 0.2, 0.5, 0.1]
    # good 0.9 beats both; 0.5 ties one and beats one; 0.2 loses to 0.5 and beats 0.1: (2 + 1.5 + 1)/6.
    assert auroc(truth, scores) == pytest.approx(4.5 / 6)
    assert auroc([True, False], [0.3, 0.3]) == 0.5
    assert auroc([True, True], [0.1, 0.2]) is None


def test_auroc_refuses_a_missing_score() -> None:
    with pytest.raises(ValueError, match="not a number"):
        auroc([True, False], [math.nan, 0.1])


def test_calibration_equals_the_worked_example() -> None:
    # Four bins of one item each: |1-.95| + |1-.85| + |0-.75| + |1-.65| = 1.3 over 4; squares .71 over 4.
    found = calibration([0.95, 0.85, 0.75, 0.65], [True, True, False, True])
    assert found.expected_error == pytest.approx(0.325)
    assert found.brier == pytest.approx(0.1775)
    assert [cell.n for cell in found.bins] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert found.bins[0].accuracy is None


def test_calibration_puts_confidence_one_into_the_last_bin_and_averages_within_a_bin() -> None:
    found = calibration([1.0, 0.92, 0.0], [True, False, False])
    assert found.bins[9].n == 2
    assert found.bins[9].mean_confidence == pytest.approx(0.96)
    assert found.bins[9].accuracy == 0.5
    assert found.expected_error == pytest.approx((2 * 0.46 + 0.0) / 3)


def test_calibration_refuses_a_confidence_that_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"all in \[0, 1\]"):
        calibration([1.5], [True])
