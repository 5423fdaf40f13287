"""Runs the real driver over the fake roles, in forked children that kill themselves (SIGKILL) where they are told to.

    python -m tests.driver_process RUNS_DIR < cases.json > endings.json

Every case is a run: its sittings follow one another in the same run directory, each in a process of its own. One
process imports what all of them need. An ending is a process's exit code, -9 after SIGKILL.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # noqa: F401 - pyarrow imports it at its first array: here once, instead of in every child
import scipy.stats  # noqa: F401 - so do the intervals of an iteration's metrics
import statsmodels.stats.proportion  # noqa: F401

from tests.fake_roles import KillPoint, Settings, fake_run, pass_by, write_blank_run

NUM_WORKERS = 3
"""Runs at a time: a sitting waits for the disk about as long as it computes."""


def fork(work: Callable[[], None]) -> int:
    """Do work in a child and return its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the child must never return into the parent's code
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ending(child: int) -> int:
    """Wait for a child and return how it ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sit(
    path: Path,
    *,
    arrival_seed: int,
    kill: str | None = None,
    num: int = 1,
    loads: bool = True,
    max_policy_age: int = 0,
    iterations: int = 2,
) -> None:
    """Run one sitting, up to the kill or to the end."""
    reach = pass_by if kill is None else KillPoint(kill, num=num)
    settings = Settings(
        arrival_seed=arrival_seed,
        loads=loads,
        max_policy_age=max_policy_age,
        iterations=iterations,
        step_s=0.01 if max_policy_age else 0.0,
    )
    fake_run(path, settings, reach=reach).finish()


def run_cases(runs: Path, cases: Mapping[str, Sequence[dict[str, Any]]], *, blank: Path, report: Path) -> None:
    """Run cases one after the other and write how each sitting ended."""
    endings: dict[str, list[int]] = {}
    for case, sittings in cases.items():
        path = Path(shutil.copytree(blank, runs / case))
        endings[case] = [
            ending(fork(lambda path=path, number=number, options=options: sit(path, arrival_seed=number, **options)))
            for number, options in enumerate(sittings)
        ]
    report.write_text(json.dumps(endings))


def main() -> None:
    """Run the cases of stdin and print how each sitting ended."""
    runs, cases = Path(sys.argv[1]), list(json.load(sys.stdin).items())
    gc.freeze()  # what was imported is not to be copied into every child by a collection
    blank = write_blank_run(runs / "blank")
    reports = [runs / f"endings-{worker}.json" for worker in range(NUM_WORKERS)]
    workers = [
        fork(
            lambda worker=worker: run_cases(runs, dict(cases[worker::NUM_WORKERS]), blank=blank, report=reports[worker])
        )
        for worker in range(NUM_WORKERS)
    ]
    assert [ending(worker) for worker in workers] == [0] * NUM_WORKERS
    json.dump({case: found for report in reports for case, found in json.loads(report.read_text()).items()}, sys.stdout)


if __name__ == "__main__":
    main()
