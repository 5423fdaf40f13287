"""Rejection sampling against the law that it is to draw from, and against its two limits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from trainers.feedback.rejection_sampling import acceptance, rejection_sample

REFERENCE = np.array([0.2, 0.3, 0.5])
REWARDS = np.array([1.0, 0.5, 0.0])
# Reference times acceptance at beta 0.5, (0.2, 0.3 / e, 0.5 / e^2), adds up to 0.378031, the rate of acceptance.
RATE = 0.378031
OPTIMUM = np.array([0.529056, 0.291944, 0.179000])


def test_a_candidate_is_accepted_by_how_far_it_is_below_the_best() -> None:
    assert acceptance(REWARDS, beta=0.5) == pytest.approx([1.0, 0.367879, 0.135335], abs=1e-6)


def test_accepted_candidates_of_a_stream_follow_the_optimum_under_the_penalty() -> None:
    generator = np.random.default_rng(0)
    stream = generator.choice(3, size=200_000, p=REFERENCE)
    accepted = stream[generator.random(len(stream)) < acceptance(REWARDS, beta=0.5)[stream]]
    assert len(accepted) / len(stream) == pytest.approx(RATE, abs=0.005)
    counts = np.bincount(accepted, minlength=3)
    assert chisquare(counts, OPTIMUM / OPTIMUM.sum() * counts.sum()).pvalue > 0.01
    # The reference itself, which an acceptance of 1 would give, is far off.
    assert chisquare(counts, REFERENCE * counts.sum()).pvalue < 1e-6


def test_the_first_accepted_of_many_candidates_follows_the_same_law() -> None:
    generator = np.random.default_rng(1)
    counts = Counter[int]()
    for _ in range(4000):
        candidates = generator.choice(3, size=64, p=REFERENCE)
        [index] = rejection_sample(REWARDS[candidates], num_samples=1, beta=0.5, generator=generator)
        counts[int(candidates[index])] += 1
    observed = [counts[i] for i in range(3)]
    assert chisquare(observed, OPTIMUM / OPTIMUM.sum() * 4000).pvalue > 0.01


def test_a_small_beta_takes_the_best() -> None:
    rewards = np.random.default_rng(2).random(20)
    got = rejection_sample(rewards, num_samples=5, beta=1e-6, generator=np.random.default_rng(3))
    assert got == np.argsort(-rewards)[:5].tolist()


def test_a_large_beta_takes_a_uniform_subset_and_not_the_first_ones() -> None:
    generator = np.random.default_rng(4)
    counts = np.zeros(6)
    for _ in range(3000):
        got = rejection_sample([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], num_samples=2, beta=1e9, generator=generator)
        counts[got] += 1
    assert chisquare(counts).pvalue > 0.01


def test_equal_candidates_keep_their_multiplicity_and_none_is_taken_twice() -> None:
    got = rejection_sample([1.0, 1.0, 1.0, 0.0], num_samples=4, beta=0.5, generator=np.random.default_rng(5))
    assert sorted(got) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rewards", "num_samples", "beta"),
    [([1.0], 2, 0.5), ([], 1, 0.5), ([1.0, float("nan")], 1, 0.5), ([1.0], 1, 0.0), ([1.0], 0, 0.5)],
)
def test_what_cannot_be_sampled_is_refused(rewards: list[float], num_samples: int, beta: float) -> None:
    with pytest.raises(ValueError, match="rejection sampling: got"):
        rejection_sample(rewards, num_samples=num_samples, beta=beta, generator=np.random.default_rng(0))
