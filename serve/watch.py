"""Owns how a run that goes on elsewhere looks: its last iterations, its pools, and which role holds it up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from actors.records import policy_number
from serve.terminal import harmless
from trainers.live import MARK, LiveState, PoolState, parse_live

TRAINING = ("update", "publish")
"""Stages of an iteration in which the learner's group works and the pools wait."""


def states(lines: Iterable[str]) -> Iterator[LiveState]:
    """Yield the states that a job's log tells."""
    for line in lines:
        state = parse_live(line.removeprefix(MARK)) if line.startswith(MARK) else None
        if state is not None:
            yield state


def plain_log(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a job's log that are for people."""
    return (harmless(line) for line in lines if not line.startswith(MARK))


def bottleneck(state: LiveState, *, address: str | None = None) -> tuple[str, str]:
    """Return the role that holds a run up, and what widens it (at a cluster's address) or why nothing does.

    The pool with the longest queue in seconds; the learner where training takes longer than the rollout of the last
    iteration and no queue would take longer than that training.
    """
    queues = {name: pool.queue_s for name, pool in state.pools.items()}
    waits = {name: seconds for name, seconds in queues.items() if seconds}
    unknown = [name for name, seconds in queues.items() if seconds is None]
    longest = max(waits, key=lambda name: waits[name]) if waits else None
    if state.rows:
        seconds = state.rows[-1].seconds
        training = sum(seconds.get(stage, 0.0) for stage in TRAINING)
        if training > seconds.get("rollout", 0.0) and training > (waits[longest] if longest else 0.0):
            return "learner", f"it trained for {training:.0f} s of the last iteration; its ranks are the config's"
    if longest is not None:
        return longest, _widening(longest, state, address=address)
    if unknown:
        return unknown[0], f"{state.pools[unknown[0]].open} samples open and none answered yet"
    return "none", "no pool has a queue"


def _widening(role: str, state: LiveState, *, address: str | None) -> str:
    pool = state.pools[role]
    if pool.why is not None:
        return f"{pool.ready} of {pool.wanted} replicas: {harmless(pool.why)}"
    where = "" if address is None else f" --address {address}"
    return f"elenchus scale {role} {pool.wanted + 1} --run {state.run}{where}"


def sample_age(state: LiveState) -> int | None:
    """Return how many policy versions the rollout pool is behind the last commit; None before the first of either."""
    rollouts = state.pools.get("rollouts")
    if rollouts is None or rollouts.version is None or not state.rows:
        return None
    return max(0, policy_number(state.rows[-1].policy_version) - policy_number(rollouts.version))


def table(state: LiveState, *, now: float, address: str | None = None) -> str:
    """Return a run's state as a few lines; `address` is that of the cluster whose job it is."""
    committed = state.rows[-1].iteration if state.rows else None
    at = (
        ""
        if state.stage is None
        else f" · {harmless(state.stage)} {state.done}" + ("" if state.total is None else f" of {state.total}")
    )
    done = "none yet" if committed is None else f"{committed} of {state.iterations}"
    quiet = now - state.time
    said = "ended" if state.ended else "running" if quiet < 30 else f"silent for {quiet:.0f} s"
    lines = [f"● {state.run}: {said} · iterations committed: {done}{at}"]
    if state.rows:
        lines.append("  iteration  attack success  accuracy")
        lines += [
            f"  {row.iteration:>9}  {_percent(row.attack_success):>14}  {_percent(row.probe_accuracy):>8}"
            for row in state.rows
        ]
    if state.pools:
        lines.append("  pool        replicas  queued    open  seconds of work  tokens/s  weights")
        lines += [_pool_line(name, pool) for name, pool in state.pools.items()]
    age = sample_age(state)
    lines.append(f"  sample age: {'–' if age is None else age} policy versions")
    if not state.ended:
        role, remedy = bottleneck(state, address=address)
        lines.append(f"  bottleneck: {role} · {remedy}")
    return "\n".join(lines)


def _pool_line(name: str, pool: PoolState) -> str:
    wait = "–" if pool.queue_s is None else f"{pool.queue_s:.0f}"
    return (
        f"  {name:<10}  {f'{pool.ready}/{pool.wanted}':>8}  {pool.queued:>6}  {pool.open:>6}  {wait:>15}  "
        f"{pool.tokens_per_s:>8.0f}  {pool.version or '–'}"
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}".replace("%", " %")
