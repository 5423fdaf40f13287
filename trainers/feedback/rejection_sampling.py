"""Owns rejection sampling of scored candidates (Liu et al. 2023, arXiv 2309.06657, algorithm 1): whom to pair for RSO.

Candidates drawn from the supervised policy, of which each is kept with probability exp((r - r_max) / beta), follow
the optimum of the reward under a KL penalty of beta towards that policy: pi * exp(r / beta). Knows neither models nor
pairs (trainers.feedback.rejection_pairs).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def acceptance(rewards: npt.ArrayLike, *, beta: float) -> Floats:
    """Return the probability with which each candidate is accepted: exp((r - max r) / beta).

    Rewards (1, 0.5, 0) at beta 0.5: (1, 0.367879, 0.135335).
    """
    values = np.asarray(rewards, dtype=np.float64)
    return np.exp((values - values.max()) / beta)


def rejection_sample(
    rewards: npt.ArrayLike, *, num_samples: int, beta: float, generator: np.random.Generator
) -> list[int]:
    """Return the indices of accepted candidates, in the order of their acceptance.

    Round after round over those that remain, in random order: each is accepted with the probability that `acceptance`
    gives it among them, and then is out. Candidates are known by index, so that equal texts keep their multiplicity.
    The order is ours; the paper's is that of the candidates, which at a large beta would favour the first ones.

    Args:
        rewards: (K,), finite.
        num_samples: how many to accept.
        beta: weight of the KL penalty, in units of reward: towards 0 the best are taken, without end a random subset.
        generator: draws the order and the acceptances.

    Raises:
        ValueError: more samples are wanted than there are candidates, a reward is not finite, or beta is not above 0.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or not 0 < num_samples <= len(values):
        raise ValueError(
            f"rejection sampling: got {num_samples} wanted of {values.size} candidates, "
            "wanted at least one, and no more than there are: sample more candidates for each prompt"
        )
    if not np.isfinite(values).all() or not beta > 0:
        raise ValueError(
            f"rejection sampling: got beta {beta} and rewards {values.tolist()}, wanted both finite, beta > 0"
        )
    remaining = generator.permutation(len(values))
    accepted: list[int] = []
    while len(accepted) < num_samples:
        keep = generator.random(len(remaining)) < acceptance(values[remaining], beta=beta)
        accepted += remaining[keep].tolist()
        remaining = generator.permutation(remaining[~keep])
    return accepted[:num_samples]
