"""Runs the real command line and notes, at every commit, on which nodes driver, ranks and replicas are.

python -m tests.noted_sitting run tiny.toml --name a        writes runs/a/nodes-1.json, …
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray

import elenchus
from trainers.driver import Driver
from trainers.loop_state import LoopState


def place_of(node_id: str) -> dict[str, str]:
    """Return a node's own label and address."""
    (node,) = [node for node in ray.nodes() if node["NodeID"] == node_id]
    return {"label": node["Labels"].get("elenchus/node", ""), "address": node["NodeManagerAddress"]}


async def note(driver: Driver, iteration: int) -> None:
    """Write down where everybody is."""
    roles, replicas = driver._roles, {}
    for name, pool in roles.pools.items():
        infos: dict[int, Any] = await pool.fanout(lambda actor: actor.ready.remote(), timeout_s=60.0)
        replicas[name] = [place_of(info.node_id) for info in infos.values() if not isinstance(info, Exception)]
    places = {
        "driver": place_of(ray.get_runtime_context().get_node_id()),
        "ranks": [place_of(node_id) for node_id in roles.learner_group.node_ids],
        "replicas": replicas,
    }
    beside = driver._store.path / f".nodes-{iteration}.json"
    beside.write_text(json.dumps(places))
    os.replace(beside, driver._store.path / f"nodes-{iteration}.json")


def main() -> None:
    """Hand the command line over to the real one."""
    commit = Driver._commit

    async def noted(self: Driver, state: LoopState, metrics: Any) -> None:
        await note(self, state.iteration)
        await commit(self, state, metrics)

    Driver._commit = noted  # type: ignore[method-assign]
    sys.exit(elenchus.main())


if __name__ == "__main__":
    main()
