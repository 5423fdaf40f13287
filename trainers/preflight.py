"""Owns what is checked against this machine before anything starts: models, cores, disk, ports, the run's directory.

Each problem is one line that begins with the key, or the thing, that it is about. Starts nothing and leaves nothing
behind; a config's own checks are done when it is read (`trainers.run_config`).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from actors.model_directory import check_model_directory, check_weights, context_length, empty_model, fingerprint
from cluster.config import ConfigError
from cluster.ray_config import address_to_join
from cluster.room import NAMES, Demand, Need, RayDemand, Room, shortages
from trainers.ranks.lora import check_targets
from trainers.run_config import BOOTSTRAP, RunConfig, adapters
from trainers.tracking_config import missing_trackers

ROOM_TIMEOUT_S = 10.0
"""How long a run waits for room on a cluster before it is refused: what has just ended gives back within seconds."""
GROWTH_TIMEOUT_S = 1800.0
"""The same where nodes come when they are asked for: a cloud takes minutes, a queue before it longer."""
MAX_NAMED = 4
"""Differing keys that one message names."""
CERTAIN = ("placement:", "disk:")
"""What of a plan's problems ends a run; its memory is an estimate, and that is for `elenchus plan` to tell."""


def machine_problems(config: RunConfig) -> Iterator[str]:
    """Yield what stands against beginning a run of the config on this machine."""
    yield from _place_problems(config)
    yield from missing_trackers(config.tracking)
    yield from _port_problems(config)
    yield from _cluster_problems(config)
    wrong_models = list(_model_problems(config))
    yield from wrong_models
    if not wrong_models:
        yield from _plan_problems(config)


def check_resumable(config: RunConfig, *, run_dir: Path) -> None:
    """Check that a run can go on: it is whole, nobody else is at it, and its models are those that it began with.

    Raises:
        ConfigError: with every problem there is.
    """
    _raise_all(_resume_problems(config, run_dir=run_dir))


def _resume_problems(config: RunConfig, *, run_dir: Path) -> Iterator[str]:
    from cluster import store

    if config.run_dir.absolute() != run_dir.absolute():
        yield f'{run_dir}: got the directory of the run "{config.name}", wanted it under that name: rename it back'
        return
    yield from _told(partial(store.check_resumable, run_dir))
    yield from missing_trackers(config.tracking)
    yield from _port_problems(config)
    yield from _cluster_problems(config)
    wrong_models = list(_model_problems(config))
    yield from wrong_models
    if not wrong_models:
        yield from _changed_models(config)
        yield from (line for line in _plan_problems(config) if not line.startswith("disk:"))


def reserved(config: RunConfig) -> list[Need]:
    """Return what a run's roles reserve of a cluster, as `elenchus plan` counts it."""
    from trainers.plan import plan_run

    return [
        Need(role=role.role, count=role.count, cpus=role.cpus, gpus=sum(role.gpus), node_labels=role.node_labels)
        for role in plan_run(config, machine=None).roles
    ]


async def await_room(
    config: RunConfig,
    *,
    look: Callable[[], Room],
    note: Callable[[str], None],
    demand: Callable[[Sequence[Need]], Demand] = RayDemand,
    timeout_s: float | None = None,
) -> None:
    """Return when a cluster that was joined has room for a run's roles.

    Others may be just giving it back; where the cluster grows it is asked to, and waited for.

    Args:
        look: says what room there is.
        note: is told what is waited for, and again when that changes.
        demand: asks a cluster that grows for nodes.
        timeout_s: how long to wait; None for ROOM_TIMEOUT_S, or GROWTH_TIMEOUT_S where the cluster grows.

    Raises:
        ConfigError: it has not got it in time; a line for each resource.
    """
    needs = reserved(config)
    begun = time.monotonic()
    asked: Demand | None = None
    said = ""
    try:
        while True:
            room = look()
            lacking = list(shortages(needs, room=room)) if asked is None else []
            if not lacking and (asked is None or asked.is_met()):
                return
            if room.grows and asked is None:
                asked = demand(needs)
            if asked is not None:
                # What has come for it counts as held: from now on the demand itself says when all is there.
                lacking = [_growth(needs, room=room)]
            limit_s = timeout_s or (GROWTH_TIMEOUT_S if room.grows else ROOM_TIMEOUT_S)
            if time.monotonic() - begun >= limit_s:
                raise ConfigError(lacking)
            if (waits_for := " · ".join(lacking)) != said:
                said = waits_for
                note(f"waiting up to {limit_s:g} s for room: {said}")
            await asyncio.sleep(min(0.5, limit_s))
    finally:
        if asked is not None:
            asked.release()


def _growth(needs: Sequence[Need], *, room: Room) -> str:
    """Return what a cluster that grows has got so far of what it was asked for."""
    there = " and ".join(f"{room.total.get(name, 0.0):g} {name}s" for name in NAMES)
    roles = " + ".join(f"{need.count} × {need.role} ({' and '.join(_amounts(need))})" for need in needs)
    return (
        f"cluster: got {len(room.nodes)} nodes with {there}, wanted room for {roles}: it was asked to grow "
        "(`ray status` on its head says how far that is); lower the counts if it may not"
    )


def _amounts(need: Need) -> Iterator[str]:
    yield from (f"{getattr(need, each):g} {name}s" for name, each in NAMES.items() if getattr(need, each))


# -------------------------------------------------------------------------------------------------------------- models


def model_record(config: RunConfig) -> dict[str, Any]:
    """Return what the models that a run begins with are recognised by: flat keys, JSON values."""
    record: dict[str, Any] = {}
    for key, model in _models(config).items():
        record[key] = model
        if model != BOOTSTRAP:
            record |= {f"{model}/{name}": value for name, value in fingerprint(model).items()}
    if BOOTSTRAP in _models(config).values():
        sections = {"base_model": config.base_model, "bootstrap": config.bootstrap, "domain": config.domain}
        for section, values in sections.items():
            record |= {f"{section}.{key}": value for key, value in values.model_dump(mode="json").items()}
        record["seed"] = config.seed
    return record


def _changed_models(config: RunConfig) -> Iterator[str]:
    path = config.run_dir / "models.json"
    if not path.is_file():
        return  # begun by a version that kept no record
    before: Mapping[str, Any] = json.loads(path.read_bytes())
    now = model_record(config)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(
            f"{key} ({_brief(before.get(key))} is now {_brief(now.get(key))})" for key in changed[:MAX_NAMED]
        )
        more = f" and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
        yield (
            f"{config.run_dir}: got another model than the run began with, {shown}{more}, wanted the same: "
            "put it back, or begin a new run by `elenchus run`"
        )


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if value is not None else "nothing"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _models(config: RunConfig) -> dict[str, str]:
    return {
        "learner.model": config.learner.model,
        "attacker.engine.model": config.attacker.engine.model,
        "critic.engine.model": config.critic.engine.model,
    }


def _model_problems(config: RunConfig) -> Iterator[str]:
    keys: dict[str, list[str]] = {}
    for key, model in _models(config).items():
        keys.setdefault(model, []).append(key)
    keys.pop(BOOTSTRAP, None)
    for model, named in keys.items():
        # One directory for several roles is told of once, under the first key that names it.
        found = list(_told(partial(check_model_directory, model))) or list(_told(partial(check_weights, model)))
        yield from (f"{named[0]}: {line}" for line in found)
        if not found:
            yield from _context_problems(config, model)
        if not found and model == config.learner.model:
            yield from _adapter_problems(config)


def _adapter_problems(config: RunConfig) -> Iterator[str]:
    """Yield where an adapter is for layers that the learner's model directory, the base of all of them, has not."""
    sections = adapters(config)
    if sections:
        base = empty_model(config.learner.model)
        for key, lora in sections.items():
            yield from _told(partial(check_targets, base, lora, key=key))


def _context_problems(config: RunConfig, model: str) -> Iterator[str]:
    """Yield where a role is told to go beyond the context that a model directory's own config has."""
    context = context_length(model)
    if context is None:
        return
    roles = (
        ("attacker", config.attacker.engine, "attacker.sampling", config.attacker.sampling.max_tokens),
        ("rollouts", config.rollouts.engine, "rollouts.sampling", config.rollouts.sampling.max_tokens),
        ("critic", config.critic.engine, "critic.judging", config.critic.judging.max_tokens),
    )
    for role, engine, section, max_tokens in roles:
        if engine.model != model:
            continue
        if engine.max_model_len is not None and engine.max_model_len > context:
            yield f"{role}.engine.max_model_len: got {engine.max_model_len}, wanted at most the model's {context}"
        elif engine.max_model_len is None and max_tokens >= context:
            yield (
                f"{section}.max_tokens: got {max_tokens}, wanted less than the model's context, {context}, "
                "which prompt and answer share"
            )


# ------------------------------------------------------------------------------------------------------------- machine


def _place_problems(config: RunConfig) -> Iterator[str]:
    from cluster.store import refuse_other_contents

    wrong = list(_told(partial(refuse_other_contents, config.run_dir)))
    yield from (f"runs_dir: {line}" for line in wrong)
    refusal = None if wrong else _refusal_to_write(config.run_dir)
    if refusal is not None:
        yield (
            f"runs_dir: got {config.run_dir}, which can't be written to ({refusal}), wanted a directory of yours: "
            "set runs_dir to another one"
        )


def _refusal_to_write(directory: Path) -> str | None:
    """Return what the system says to a file in a directory that may have to be made; leaves nothing behind."""
    made: list[Path] = []
    probe = directory / f".probe-{os.getpid()}.tmp"
    try:
        for folder in reversed([directory, *directory.parents]):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    finally:
        for folder in reversed(made):
            folder.rmdir()
    return None


def _port_problems(config: RunConfig) -> Iterator[str]:
    if not config.ray.dashboard or address_to_join(config.ray) is not None:
        return
    with socket.socket() as listener:
        # As the dashboard does: a port whose last connections are only just closed is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", config.ray.dashboard_port))
        except OSError as error:
            yield (
                f"ray.dashboard_port: got {config.ray.dashboard_port}, which is not free ({error.strerror}), wanted a "
                "free port: choose another, or set ray.dashboard = false"
            )


def _cluster_problems(config: RunConfig) -> Iterator[str]:
    if address_to_join(config.ray) is not None:
        from cluster.ray_runtime import reachable_cluster

        yield from _told(partial(reachable_cluster, config.ray))


def _plan_problems(config: RunConfig) -> Iterator[str]:
    from cluster.machine import this_machine
    from trainers.plan import plan_run

    local = address_to_join(config.ray) is None
    try:
        plan = plan_run(config, machine=this_machine() if local else None)
    except ValueError as error:
        yield from str(error).splitlines()
        return
    most = max(plan.roles, key=lambda role: role.count)
    key = f"{most.role}.training.num_ranks" if most.unit == "rank" else f"{most.role}.replicas"
    for line in plan.problems:
        if line.startswith(CERTAIN):
            yield line.replace("placement: ", f"{key}: got {most.count}, and ", 1)


def _told(check: Callable[[], object]) -> Iterator[str]:
    """Yield the lines of the ValueError that a check raises."""
    try:
        check()
    except ValueError as error:
        yield from str(error).splitlines()


def _raise_all(problems: Iterator[str]) -> None:
    found = list(problems)
    if found:
        raise ConfigError(found)
