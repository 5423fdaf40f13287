"""Owns several raylets on this machine, in a process of their own that a test talks to by lines.

    python -m tests.raylets '{"learner": 2, "pools-a": 1}'    one raylet per name, with so many CPUs, and a head of none
    ready 192.0.2.2:41337                                     each has the label elenchus/node=NAME
    remove pools-a                                            (from the test) ends that raylet and all in it

At the end of its input everything ends. The token is that of the environment.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

STORE_BYTES = 100 << 20


def main() -> None:
    """Start the raylets and obey the lines."""
    wanted: dict[str, int] = json.loads(sys.argv[1])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "labels": {"elenchus/node": "head"},
        },
    )
    nodes = {
        name: cluster.add_node(num_cpus=num, object_store_memory=STORE_BYTES, labels={"elenchus/node": name})
        for name, num in wanted.items()
    }
    say(f"ready {cluster.address}")
    for line in sys.stdin:
        verb, _, name = line.strip().partition(" ")
        assert verb == "remove", f"got {line!r}, wanted remove NAME"
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
        say(f"removed {name}")
    cluster.shutdown()


def say(line: str) -> None:
    """Tell the test."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
