"""Owns what an update makes of its table before its first step: rows, corrections of pairs, advantages of samples.

All of it hangs on the weights as they are then, or on nothing; no collectives, no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from cluster.config import Config
from trainers.advantages import informative
from trainers.batches import TrainingPlan
from trainers.importance import ImportanceConfig, correction
from trainers.kl import controlled
from trainers.losses import GroupBatch, LabelBatch, Loss, PairBatch, ScoreBatch, TokenBatch, UnpairedBatch
from trainers.policy_gradient import PolicyConfig, PolicyLoss, kl_price
from trainers.rows import Rows
from trainers.rows.columns import Floats, Ids
from trainers.rows.documents import token_rows
from trainers.rows.groups import GroupRows, group_rows
from trainers.rows.labels import label_rows
from trainers.rows.pairs import PairRows, pair_rows
from trainers.rows.samples import SampleRows
from trainers.rows.unpaired import UnpairedRows, unpaired_rows

ComparedRows: TypeAlias = PairRows | GroupRows | UnpairedRows
"""Rows whose responses are compared with a reference, each as a whole: of pairs two, chosen and rejected, of groups up
to K, of judged responses one."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the weights at an update's start say of each row's responses, K of them at most."""

    sums: Tensor
    """[rows, K] fp32: log-probs (nats), summed over a response's tokens; of a pair chosen and rejected."""
    gaps: Tensor
    """[rows, K] fp32: sums over its tokens of |log-prob - that of the rollout engine|; 0 where it is not known."""

    @classmethod
    def nothing(cls, rows: ComparedRows) -> Reference:
        """Return zeros."""
        shape = len(rows.lengths), rows.num_responses
        return cls(sums=torch.zeros(shape), gaps=torch.zeros(shape))


def rows_for(loss: Loss, table: pa.Table, *, name: str) -> Rows:
    """Return a table's rows as a loss takes them.

    Raises:
        ValueError: it takes what no table holds.
    """
    if loss.batch in (PairBatch, ScoreBatch):
        return pair_rows(table)
    if loss.batch is UnpairedBatch:
        return unpaired_rows(table)
    if loss.batch is TokenBatch:
        return token_rows(table)
    if loss.batch is GroupBatch:
        return group_rows(table)
    if loss.batch is LabelBatch:
        return label_rows(table)
    raise ValueError(f'update: got loss "{name}", which takes a {loss.batch.__name__}: a table holds no such rows')


def refuse_other_rows(table: pa.Table, plan: TrainingPlan) -> None:
    """Check that a table has the plan's rows, in its order.

    Raises:
        ValueError: it has others.
    """
    if table.num_rows != len(plan.row_ids):
        raise ValueError(f"update: the table has {table.num_rows} rows, the plan {len(plan.row_ids)}")
    for name in ("pair_id", "row_id"):
        if name in table.column_names and tuple(table.column(name).to_pylist()) != plan.row_ids:
            raise ValueError(f"update: column {name!r} differs from the plan's row ids; plan in the table's order")


def corrected(
    rows: ComparedRows, reference: Reference, config: ImportanceConfig
) -> tuple[ComparedRows, dict[str, float]]:
    """Return the rows with the factors of their losses, and what is worth knowing of how they came about."""
    assert rows.rollout_logprobs is not None, "without them there is nothing to compare"
    sampled = np.zeros(reference.sums.shape)
    for sums, responses in zip(sampled, rows.rollout_logprobs, strict=True):
        sums[: len(responses)] = [logprobs.sum() for logprobs in responses]
    # What no policy has sampled as it is has no ratio: it is left as it is, and tells nothing of the engines.
    known = np.array([bool(responses) for responses in rows.rollout_logprobs], dtype=np.bool_)
    stale = rows.ages > 0
    log_ratios = np.where(known, (reference.sums.double().numpy() - sampled).sum(axis=1), 0.0)
    factors = correction(log_ratios, stale=stale, config=config)
    gaps = reference.gaps.double().numpy().sum(axis=1)
    told = _staleness(gaps[known], num_tokens=rows.num_response_tokens[known], stale=stale[known])
    said = {"importance_mean": float(factors.mean()), **told}
    return replace(rows, correction=factors), said


def _staleness(gaps: Floats, *, num_tokens: Ids, stale: npt.NDArray[np.bool_]) -> dict[str, float]:
    """Return the share of rows of older weights, and the mean gap (nats per token) of the others and of these.

    Args:
        gaps: (rows,) sums over response tokens of |log-prob - as sampled|.
        num_tokens: (rows,)
        stale: (rows,)
    """
    said = {"stale_share": float(stale.mean())}
    for name, chosen in (("rollout_gap", ~stale), ("rollout_gap_stale", stale)):
        if chosen.any():
            said[name] = float(gaps[chosen].sum() / num_tokens[chosen].sum())
    return said


def estimated(
    rows: SampleRows, old_logprobs: Tensor, *, loss: PolicyLoss, config: Config, values: Tensor | None = None
) -> tuple[SampleRows, dict[str, float]]:
    """Return the rows with what a loss makes of all of them at once, and what is worth knowing of how they came about.

    Args:
        rows: of a whole update, so that no group is cut.
        old_logprobs: [rows, T] by the weights at the update's start.
        loss: whose advantages they become.
        config: the loss's settings.
        values: [rows, T] by the same weights; None without a value head.
    """
    samples = rows.samples(old_logprobs, values=values)
    found = loss.advantages(samples, config)
    scored = samples.scored()
    said = {
        "score": float(samples.scores[scored].mean()) if bool(scored.any()) else 0.0,
        "unscored_share": float((~scored).double().mean()),
        "left_out_share": float((~found.live).double().mean()),
        "equal_scores_share": float((scored & ~informative(samples.scores, samples.groups)).double().mean()),
        "reference_kl_per_response": float(samples.log_ratios().sum(dim=1).mean()),
    }
    if rows.rollout_logprobs is not None:
        gaps = torch.where(samples.mask, (old_logprobs - rows.rollout_logprobs).abs(), 0.0).double().sum(dim=1)
        num_tokens = samples.mask.sum(dim=1).numpy()
        said |= _staleness(gaps.numpy(), num_tokens=num_tokens, stale=rows.ages > 0)
    return rows.with_signals(samples, found), said


def at_price(config: Config, coefficient: float | None) -> Config:
    """Return the settings with the KL's price that the controller has come to; as they are where it has not."""
    if coefficient is None or not isinstance(config, PolicyConfig) or not config.kl_control.adaptive:
        return config
    return config.model_copy(update={"kl_coefficient": coefficient})


def next_price(config: Config, said: Mapping[str, float], *, num_samples: int) -> tuple[float | None, dict[str, float]]:
    """Return the KL's price of the next update, and this one's as a figure; None and nothing where it is fixed.

    Args:
        config: this update's settings.
        said: of this update's samples (`estimated`).
        num_samples: of this update.
    """
    if not isinstance(config, PolicyConfig) or not config.kl_control.adaptive:
        return None, {}
    price = kl_price(config)
    kl = said["reference_kl_per_response"]
    return controlled(price, kl=kl, num_samples=num_samples, control=config.kl_control), {"kl_coefficient": price}


def temperature_of(config: Config) -> float:
    """Return that at which log-probs are taken: the sampling's, where the loss learns from samples."""
    return (config.temperature if isinstance(config, PolicyConfig) else None) or 1.0


def each_row_once(plan: TrainingPlan, *, num_rows: int) -> Iterator[tuple[int, ...]]:
    """Yield the rows of each step of the first epoch, then those that it leaves over."""
    left = set(range(num_rows))
    for planned in plan.steps:
        if planned.epoch == 0:
            # A plan may have a row in several steps (trainers.feedback.mixed_plan).
            if fresh := tuple(row for row in planned.rows if row in left):
                yield fresh
            left -= set(fresh)
    if left:
        yield tuple(sorted(left))
