"""Owns what labels of several sources are worth: how often each errs, what that makes of a pair, and what both say.

    answers drawn at random ──► critic's and expert's label of each ──► error rates ──► a pair's noise
    the same, and all that the critic alone judged                  ──► prediction-powered shares

An expert's label overrides the critic's (actors.oversight); here it also tells how often the critic errs, where the
answer was drawn at random for that. Those that were escalated say nothing of it: they are the least trusted ones.
Knows no torch, and of truth only what experts say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from pydantic import Field

from actors.oversight import EXPERT, Judged
from actors.records import PreferencePair, Verdict
from actors.rubrics import FAIL, PASS
from cluster.config import Config
from trainers.statistics import CONFIDENCE


class MixConfig(Config):
    """How pairs of critic and experts are weighed against each other."""

    noise: Literal["estimated", "none"] = "estimated"
    """estimated: every pair states how likely it is flipped, by its two labels, for losses that read it (cdpo, rdpo);
    none: it does not, and the loss's own setting holds."""
    prior_noise: float = Field(default=0.1, gt=0.0, lt=0.5)
    """How often the critic's verdicts are taken to be wrong before any was checked."""
    prior_items: float = Field(default=10.0, gt=0.0)
    """How many checked answers that assumption weighs as much as."""
    expert_noise: float = Field(default=0.01, gt=0.0, lt=0.5)
    """How often an expert's label is taken to be wrong; no label is checked by a better one."""
    critic_weight: float = Field(default=1.0, gt=0.0)
    """Of a pair whose two verdicts are the critic's."""
    expert_weight: float = Field(default=3.0, gt=0.0)
    """Of a pair with an expert's verdict on either side."""
    expert_share: float = Field(default=0.1, ge=0.0, le=0.5)
    """Least share of such pairs in every optimizer step, as long as the iteration has any: they come again as needed,
    though never twice in one step."""


# --------------------------------------------------------------------------------------------------- how often one errs


def double_labelled(judged: Sequence[Judged], verdicts: Sequence[Verdict]) -> list[tuple[Judged, Verdict]]:
    """Return the answers that were drawn at random and that both have labelled, each distinct one once.

    Args:
        judged: responses with their critiques.
        verdicts: of them, experts' labels in their places.
    """
    by_response = {verdict.response_id: verdict for verdict in verdicts}
    # An answer that was lost and came again after a resume has no verdict: those of its iteration stood already.
    found = [(item, by_response.get(item.response.response_id)) for item in judged]
    return [
        (item, verdict)
        for item, verdict in found
        if verdict is not None and verdict.drawn and verdict.source == EXPERT and item.critic_verdict.label is not None
    ]


def tally(judged: Sequence[Judged], verdicts: Sequence[Verdict]) -> Counter[str]:
    """Return how many of the critic's verdicts were checked, and how many were wrong, by what they said.

    Keys: "pass", "fail", "pass wrong", "fail wrong".
    """
    counts: Counter[str] = Counter()
    for item, verdict in double_labelled(judged, verdicts):
        said = str(item.critic_verdict.label)
        counts[said] += 1
        counts[f"{said} wrong"] += said != verdict.label
    return +counts


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRates:
    """How often a label is wrong, by whose it is and what it says."""

    critic: Mapping[str, float]
    """By "pass" and "fail": share of such verdicts of the critic's that an expert would not give."""
    expert: float

    def of(self, verdict: Verdict) -> float:
        """Return how likely a verdict with a label is wrong."""
        return self.expert if verdict.source == EXPERT else self.critic[str(verdict.label)]


def error_rates(counts: Mapping[str, int], config: MixConfig) -> ErrorRates:
    """Return the rates after a tally: (wrong + prior_noise * prior_items) / (checked + prior_items).

    It is the mean of a Beta posterior whose prior weighs `prior_items` answers. 2 wrong of 10 passes with the defaults:
    (2 + 1) / (10 + 10) = 0.15.
    """
    return ErrorRates(
        critic={
            said: (counts.get(f"{said} wrong", 0) + config.prior_noise * config.prior_items)
            / (counts.get(said, 0) + config.prior_items)
            for said in (PASS, FAIL)
        },
        expert=config.expert_noise,
    )


def pair_noise(chosen: float, rejected: float) -> float:
    """Return how likely a pair is flipped, given how likely its chosen is bad and its rejected is good.

    Both wrong: flipped. One of them wrong: both responses are good, or both bad, and either order is as right as the
    other. So e_c e_r + (e_c (1 - e_r) + (1 - e_c) e_r) / 2, which is (e_c + e_r) / 2.

    >>> pair_noise(0.2, 0.1) == 0.2 * 0.1 + (0.2 * 0.9 + 0.8 * 0.1) / 2
    True
    """
    return (chosen + rejected) / 2


class MixedPairs(NamedTuple):
    """Pairs that state their noise and weight."""

    pairs: tuple[PreferencePair, ...]
    num_noisy: int
    """Pairs left out, for with a noise of 1/2 or more a label tells nothing, or the opposite."""


def mixed(
    pairs: Sequence[PreferencePair], verdicts: Sequence[Verdict], *, rates: ErrorRates, config: MixConfig
) -> MixedPairs:
    """Return pairs with the noise that their two verdicts make, and the weight of their source."""
    by_response = {verdict.response_id: verdict for verdict in verdicts}
    done: list[PreferencePair] = []
    for pair in pairs:
        noise = pair_noise(rates.of(by_response[pair.chosen_id]), rates.of(by_response[pair.rejected_id]))
        weight = config.expert_weight if pair.source == EXPERT else config.critic_weight
        if config.noise == "none":
            done.append(replace(pair, weight=weight))
        elif noise < 0.5:
            done.append(replace(pair, weight=weight, noise=noise))
    return MixedPairs(pairs=tuple(done), num_noisy=len(pairs) - len(done))


# ----------------------------------------------------------------------------------------- prediction-powered inference


@dataclass(frozen=True, slots=True, kw_only=True)
class PoweredMean:
    """The mean of a figure as experts would state it, with a normal interval."""

    value: float
    ci_low: float
    ci_high: float
    kappa: float
    """How far the critic was relied on: 0 not at all, 1 as far as experts are."""
    num_human: int
    """Items that both have labelled."""
    num_ai: int
    """Items that the critic alone has labelled."""


def powered_mean(
    human: Sequence[float],
    ai_on_same: Sequence[float],
    ai_elsewhere: Sequence[float],
    *,
    kappa: float | None = None,
    confidence: float = CONFIDENCE,
) -> PoweredMean:
    """Return theta = kappa * mean_U f_AI + mean_L (f_H - kappa * f_AI) (Angelopoulos et al. 2023, arXiv 2301.09633).

    L are the n items that both have labelled, drawn at random from all; U the N others. For a given kappa it is
    unbiased, whatever the AI says. The best kappa (PPI++, Angelopoulos et al. 2023, arXiv 2311.01453) minimises the
    variance kappa^2 var_U(f_AI) / N + var_L(f_H - kappa f_AI) / n: it is cov_L(f_H, f_AI) / ((1 + n / N) var(f_AI)).
    Ours differs in that every item of L is put right with the kappa of the others, in [0, 1]: with one kappa of all of
    them the estimate of 40 binary labels is off by a tenth of its standard error.

    >>> found = powered_mean([1, 0, 1, 1], [1, 1, 1, 1], [0.9], kappa=1.0)
    >>> round(found.value, 6)  # 0.9 + (0.75 - 1)
    0.65

    Args:
        human: (n,) the experts' figures, two or more.
        ai_on_same: (n,) the critic's of the same items.
        ai_elsewhere: (N,) the critic's of the others; none makes it the experts' mean.
        kappa: None takes the best.
        confidence: of the interval, a normal one.

    Raises:
        ValueError: fewer than two items of L, or not one figure each.
    """
    n, num_ai = len(human), len(ai_elsewhere)
    if n < 2 or len(ai_on_same) != n:
        raise ValueError(
            f"powered_mean: got {n} human and {len(ai_on_same)} AI figures of the same items, wanted one of each, of 2 "
            "items or more: draw more answers for calibration"
        )
    if num_ai == 0:
        kappas = [0.0] * n
    elif kappa is None:
        kappas = _best_kappas(human, ai_on_same, ai_elsewhere)
    else:
        kappas = [kappa] * n
    residuals = [h - k * a for h, k, a in zip(human, kappas, ai_on_same, strict=True)]
    elsewhere = math.fsum(ai_elsewhere) / num_ai if num_ai else 0.0
    relied = math.fsum(kappas) / n
    value = relied * elsewhere + math.fsum(residuals) / n
    variance = relied**2 * _variance(ai_elsewhere) / max(num_ai, 1) + _variance(residuals) / n
    from scipy.stats import norm

    half = float(norm.ppf(0.5 + confidence / 2)) * math.sqrt(variance)
    return PoweredMean(
        value=value,
        ci_low=value - half,
        ci_high=value + half,
        kappa=relied,
        num_human=n,
        num_ai=num_ai,
    )


def _best_kappas(human: Sequence[float], ai_on_same: Sequence[float], ai_elsewhere: Sequence[float]) -> list[float]:
    """Return, for each item of L, the best kappa by all items but that one; 0 where they are too few or all alike."""
    n, num_ai = len(human), len(ai_elsewhere)
    if n < 3:
        return [0.0] * n
    left, everywhere = n - 1, n - 1 + num_ai
    sum_h, sum_a = math.fsum(human), math.fsum(ai_on_same)
    sum_ha = math.fsum(h * a for h, a in zip(human, ai_on_same, strict=True))
    sum_all = sum_a + math.fsum(ai_elsewhere)
    squares = math.fsum(a * a for a in (*ai_on_same, *ai_elsewhere))
    kappas = []
    for h, a in zip(human, ai_on_same, strict=True):
        covariance = (sum_ha - h * a - (sum_h - h) * (sum_a - a) / left) / (left - 1)
        variance = (squares - a * a - (sum_all - a) ** 2 / everywhere) / (everywhere - 1)
        kappas.append(min(1.0, max(0.0, covariance / ((1 + n / num_ai) * variance))) if variance > 1e-12 else 0.0)
    return kappas


def _variance(values: Sequence[float]) -> float:
    """Return the unbiased variance; 0 of fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def powered_share(
    judged: Sequence[Judged], verdicts: Sequence[Verdict], *, figure: Callable[[Verdict], float]
) -> PoweredMean | None:
    """Return the mean over distinct judged answers of what experts would say; None with fewer than two drawn ones.

    Args:
        judged: responses with their critiques.
        verdicts: of them, experts' labels in their places.
        figure: of a verdict with a label; 1 for a failing one, to get the share of failures.
    """
    both = double_labelled(judged, verdicts)
    if len(both) < 2:
        return None
    drawn = {(item.query.query_id, item.response.text) for item, _ in both}
    others: dict[tuple[str, str], Verdict] = {}
    for item in judged:
        key = item.query.query_id, item.response.text
        if key not in drawn and item.critic_verdict.label is not None:
            others.setdefault(key, item.critic_verdict)
    return powered_mean(
        [figure(verdict) for _, verdict in both],
        [figure(item.critic_verdict) for item, _ in both],
        [figure(verdict) for verdict in others.values()],
    )


def failure_share(judged: Sequence[Judged], verdicts: Sequence[Verdict]) -> PoweredMean | None:
    """Return the share of distinct live answers that experts would fail (`powered_share`)."""
    return powered_share(judged, verdicts, figure=lambda verdict: float(verdict.label == FAIL))
