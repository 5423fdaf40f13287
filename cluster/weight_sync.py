"""Owns giving every replica of a pool a version of the weights: to all or to none, each proved by a parity probe.

    WeightManifest ──► sync_weights(pool) ──► every replica: apply_weights ──► WeightAnswer ──► parity
                       (writes pool.current before the fan-out)          (refused: quarantined)

Knows nothing of engines: what a replica does with the tensors is its own business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError

from cluster import metrics
from cluster.pool import Pool
from cluster.pool_errors import first_line
from cluster.weights import ParityProbe, WeightManifest, Weights

logger = logging.getLogger(__name__)


class SyncFailed(RuntimeError):
    """No replica took the new weights; the pool has gone back to those it held before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What a sync came to."""

    version: str
    accepted: tuple[int, ...]
    """Ids of the replicas that hold the version and passed the probe."""
    quarantined: dict[int, str]
    """Replica id to reason."""
    max_abs_diff: float
    """Nats, over the accepted replicas."""
    seconds: float


async def sync_weights(
    pool: Pool[Any, Any], manifest: WeightManifest, *, probe: ParityProbe, deadline_s: float
) -> SyncReport:
    """Give every replica of the pool the new weights, check each by the probe, and return who took them.

    `pool.current` is the new version from before the fan-out on, so a replica that (re)starts meanwhile takes it too.
    One accepted replica makes the sync good: the others are quarantined (killed, respawned with the new version).

    When all replicas died or were still starting, the sync waits, within the deadline, for one that comes up with the
    new version. When none takes it, the manifest itself is suspect: `pool.current` goes back to the previous version,
    replicas that still answer are given the previous weights again and must pass *its* probe, the others are
    quarantined, and `SyncFailed` is raised. (Without a previous version every replica is quarantined and comes back
    with what its model directory holds.) No result that a replica made between the fan-out and its acceptance leaves
    the pool unless it is accepted.

    Raises:
        SyncFailed: no replica took the version; names every replica's reason.
    """
    async with pool.weights_lock:
        started = time.monotonic()
        previous = pool.current
        pool.current = (manifest, probe)
        answers = await pool.offer_weights(timeout_s=deadline_s)
        diffs = {replica_id: answer for replica_id, answer in answers.items() if isinstance(answer, float)}
        failures = {replica_id: answer for replica_id, answer in answers.items() if isinstance(answer, Exception)}
        if not diffs and all(_is_death(error) for error in failures.values()):
            await _quarantine(pool, failures, version=manifest.version)
            diffs = await pool.wait_for_weights(timeout_s=deadline_s - (time.monotonic() - started))
        if not diffs:
            await _fall_back(pool, previous, failures=failures, deadline_s=deadline_s)
            metrics.sync_refused(pool.name, seconds=time.monotonic() - started)
            reasons = "; ".join(f"replica {i}: {first_line(error)}" for i, error in sorted(failures.items()))
            raise SyncFailed(
                f"pool {pool.name}: no replica took {manifest.version} within {deadline_s:g} s "
                f"({reasons or 'no replica came up'}); the pool is back at "
                f"{previous[0].version if previous else 'its initial weights'}"
            )
        await _quarantine(pool, failures, version=manifest.version)
        report = SyncReport(
            version=manifest.version,
            accepted=tuple(sorted(diffs)),
            quarantined={replica_id: first_line(error) for replica_id, error in failures.items()},
            max_abs_diff=max(diffs.values()),
            seconds=time.monotonic() - started,
        )
        metrics.synced(
            pool.name,
            num_quarantined=len(report.quarantined),
            seconds=report.seconds,
            max_abs_diff=report.max_abs_diff,
        )
        logger.info(
            "pool %s: %s on %d replicas, %d quarantined, max |Δ| %.3g nats, %.2f s",
            pool.name,
            report.version,
            len(report.accepted),
            len(report.quarantined),
            report.max_abs_diff,
            report.seconds,
        )
        return report


async def _fall_back(
    pool: Pool[Any, Any], previous: Weights | None, *, failures: dict[int, Exception], deadline_s: float
) -> None:
    version = "fallback"
    pool.current = previous
    unreachable = {i: e for i, e in failures.items() if _is_death(e) or isinstance(e, TimeoutError)}
    await _quarantine(pool, failures if previous is None else unreachable, version=version)
    if previous is not None:
        answers = await pool.offer_weights(timeout_s=deadline_s)
        await _quarantine(pool, {i: a for i, a in answers.items() if isinstance(a, Exception)}, version=version)


async def _quarantine(pool: Pool[Any, Any], failures: dict[int, Exception], *, version: str) -> None:
    await asyncio.gather(
        *(pool.quarantine(i, reason=f"weights {version}: {first_line(error)}") for i, error in failures.items())
    )


def _is_death(error: Exception) -> bool:
    return isinstance(error, RayActorError)
