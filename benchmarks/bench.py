"""Measures what the parts cost over doing without them, and prints the table of docs/benchmarks.md.

    make bench                                             everything, about five minutes on two cores
    .venv/bin/python -m benchmarks.bench --only padding    one of them
    .venv/bin/python -m benchmarks.bench --quick           a small form of each, which only shows that they run

Every figure but driver_cpu is a ratio of two sides measured in turns in one run, so that what the machine does
meanwhile falls on both; given are the median over the rounds and its quartiles. All of them go to runs/bench/bench.json
with the commit and the machine. Seconds are this machine's; the ratios are what counts. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import (
    driver_cpu,
    overlap,
    padding,
    pool_speed,
    preference_table,
    scale_up,
    serve_overload,
    serve_speed,
    serve_swaps,
    training_step,
    weight_transfer,
)
from benchmarks.cold_demo import ROOT
from benchmarks.figure import Figure, table
from cluster.durable_files import write_json_atomic
from cluster.environment import environment
from cluster.ray_runtime import RayConfig, start_ray

RESULTS = ROOT / "runs" / "bench" / "bench.json"
STORE_GB = 2.5
"""Of the object store: two versions of a model of 125M parameters, and room between them."""

Measure = Callable[..., Coroutine[Any, Any, list[Figure]]]

ON_RAY: dict[str, Measure] = {
    "pool_speed": pool_speed.measure,
    "weight_transfer": weight_transfer.measure,
    "driver_cpu": driver_cpu.measure,
    "overlap": overlap.measure,
    "scale_up": scale_up.measure,
    "preference_table": preference_table.measure,
    "training_step": training_step.measure,
    "serve_speed": serve_speed.measure,
    "serve_swaps": serve_swaps.measure,
}
NAMES = (*ON_RAY, "serve_overload", "padding")


def run(names: Sequence[str], *, quick: bool) -> list[Figure]:
    """Return the figures of some benchmarks, measured one after another on one local Ray."""
    figures: list[Figure] = []
    asked = [name for name in ON_RAY if name in names]
    if asked:
        # The engines' libraries would look for a GPU, and say so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        runtime = start_ray(RayConfig(object_store_gb=STORE_GB))
        try:
            for name in asked:
                figures += _told(name, partial(_on_ray, ON_RAY[name], quick=quick))
        finally:
            runtime.stop()
    if "serve_overload" in names:
        figures += _told("serve_overload", partial(serve_overload.on_its_own_ray, quick=quick))
    if "padding" in names:
        figures += _told("padding", partial(padding.measure, quick=quick))
    return figures


def _on_ray(measure: Measure, *, quick: bool) -> list[Figure]:
    return asyncio.run(measure(quick=quick))


def _told(name: str, measure: Callable[[], list[Figure]]) -> list[Figure]:
    print(f"● {name} …", file=sys.stderr, flush=True)
    begin = time.monotonic()
    figures = measure()
    print(f"  {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    return figures


def record(figures: Sequence[Figure], *, quick: bool, load_before: float) -> dict[str, Any]:
    """Return the figures with all that a reader needs to judge them."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": quick,
        "load_1min_before": load_before,
        "figures": [{**asdict(figure), "met": figure.met} for figure in figures],
        "environment": environment(),
    }


def main() -> int:
    """Measure what is asked for, write it down and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="small forms, for the tests: their numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    said = parser.parse_args()
    load_before = os.getloadavg()[0]
    figures = run(said.only, quick=said.quick)
    said.out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(said.out, record(figures, quick=said.quick, load_before=load_before))
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
