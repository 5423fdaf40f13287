"""Has a run's parts record over a local Ray of its own, and reads from the node's metrics port what comes out.

    RAY_metrics_report_interval_ms=1000 python -m tests.metrics_process FOLDER > found.json

The interval must be in the environment before Ray is imported. Prints every sample of ours at two times, further apart
than Ray keeps a gauge that nobody sets; nothing is recorded between the two.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import ray
import torch
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import Kind, recording
from cluster.pool import Pool
from cluster.ray_runtime import RayConfig, start_ray
from cluster.scaling import Follower, write_wanted
from cluster.weight_sync import SyncFailed, sync_weights
from cluster.weights import ParityProbe, put_weights
from tests.fake_replica import Behaviour, FakeRequest, FakeResult, fake_starter
from tests.synthetic_run import make_row
from trainers import loop_metrics
from trainers.live import Live
from trainers.progress import Silent

INTERVAL_S = 1.0
"""Between Ray's reports; it forgets a gauge after two."""
DEADLINE_S = 30.0


async def record(folder: Path) -> None:
    """Do what a run does with one pool: sync weights, answer, scale, commit an iteration, sync again in vain."""
    pool: Pool[FakeRequest, FakeResult] = Pool(
        name="critic", start_replica=fake_starter({1: Behaviour(parity_error=1.0)}), num_replicas=2
    )
    await pool.start()
    manifest = put_weights([("w", torch.tensor([1.0, 2.0]))], version="v1")
    probe = ParityProbe(token_ids=((1, 2, 3),), logprobs=((-3.00005, -3.00005),), bound=1e-4)
    await sync_weights(pool, manifest, probe=probe, deadline_s=30.0)
    async for _ in pool.route([FakeRequest(request_id=f"r{i}", num_samples=2) for i in range(5)]):
        pass
    write_wanted(folder, "critic", 3)
    follower = Follower(folder, {"critic": pool}, configured={"critic": 2}, autoscale={})
    await follower.step(now=time.monotonic())
    while pool.readiness().ready < 3:
        await asyncio.sleep(0.05)
    await Live(Silent(), run="r", run_dir=folder, iterations=2).look({"critic": pool}, now=time.monotonic())
    loop_metrics.committed(make_row(1).model_copy(update={"sample_ages": {0: 90, 2: 30}}))
    wrong = ParityProbe(token_ids=((1, 2, 3),), logprobs=((0.0, 0.0),), bound=1e-4)
    try:
        await sync_weights(pool, manifest, probe=wrong, deadline_s=30.0)
    except SyncFailed:
        await pool.shutdown()
        return
    raise AssertionError("replicas took weights that fail the probe")


def samples(port: int) -> Iterator[tuple[str, float]]:
    """Yield what the node exports of ours: `name tag=value …`, and the value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_elenchus_"):
                ours = sorted((key, value) for key, value in sample.labels.items() if key.islower() and "_" not in key)
                yield " ".join([sample.name, *(f"{key}={value}" for key, value in ours)]), sample.value


def main(folder: Path) -> None:
    """Record, and print what comes out."""
    runtime = start_ray(RayConfig(num_cpus=2, object_store_gb=0.1, temp_dir=folder, token_path=folder / "token"))
    try:
        port = ray.nodes()[0]["MetricsExportPort"]
        with recording(run="r"):
            asyncio.run(record(folder))
            last = loop_metrics.LOOP_SERIES[0]
            assert last.kind is Kind.GAUGE
            deadline = time.monotonic() + DEADLINE_S
            first: dict[str, float] = {}
            while f"{last.exported} run=r" not in first and time.monotonic() < deadline:
                time.sleep(0.2)
                first = dict(samples(port))
            # Reported in the same breath, but the agent may have been read in between.
            time.sleep(2 * INTERVAL_S)
            first = dict(samples(port))
            time.sleep(3 * INTERVAL_S)
            later = dict(samples(port))
        time.sleep(4 * INTERVAL_S)
        afterwards = dict(samples(port))
    finally:
        runtime.stop()
    sys.stdout.write(json.dumps({"first": first, "later": later, "afterwards": afterwards}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
