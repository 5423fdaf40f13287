"""Writes the distillation baseline: a seed's base model fine-tuned on gold solutions (SCIENCE: gold regime).

    .venv/bin/python -m benchmarks.distil --seed 21 --runs-dir runs/experiments/21 --out runs/experiments/21/distilled

The base model comes from the cache of that directory, or is trained into it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from actors.domains import Demonstration, Domain, GoldLedger, LedgeredChecker, Purpose, Role, load_domain
from cluster.log import start_log
from cluster.ray_runtime import start_ray
from serve.console import RunConsole
from trainers.bootstrap import BootstrapConfig, bootstrap_training, demonstration_mix, train_on
from trainers.progress import Progress
from trainers.run_config import RunConfig, load_run_config
from trainers.session import base_model
from trainers.training_group import ModelSource, TrainingGroup


async def write_baseline(config: RunConfig, *, target: Path, progress: Progress) -> int:
    """Fine-tune and export; return the number of gold solutions."""
    domain, checker = load_domain(config.domain.kind, config.domain)
    gold = GoldLedger(checker, regime=config.supervision.regime)
    base = await base_model(config, domain=domain, progress=progress)
    assert base is not None, "the demo's learner is bootstrapped"
    if base.group is not None:
        await base.group.shutdown()
    rows = gold_solutions(domain, gold.checker_for(Purpose.SUPERVISION), config.bootstrap, seed=config.seed)
    num_steps = -(-len(rows) // config.bootstrap.batch_size)
    group = TrainingGroup(
        name="distillation",
        source=ModelSource(path=str(base.model_dir)),
        config=bootstrap_training(config.bootstrap, config.learner.training, num_steps=num_steps, seed=config.seed),
    )
    await group.start()
    try:
        await train_on(
            group,
            iter([rows]),
            num_steps=num_steps,
            batch_size=config.bootstrap.batch_size,
            start_dir=base.model_dir,
            seed=config.seed,
            progress=progress,
        )
        await group.export(target)
    finally:
        await group.shutdown()
    return len(rows)


def gold_solutions(
    domain: Domain, checker: LedgeredChecker, config: BootstrapConfig, *, seed: int
) -> list[Demonstration]:
    """Return the problems of the critic's demonstrations in a bootstrap as the learner's, with right answers."""
    return [
        Demonstration(
            role=Role.LEARNER,
            problem=row.problem,
            messages=domain.learner_messages(row.problem),
            response=checker.solution(row.problem),
        )
        for rows in demonstration_mix(domain, config, seed=seed)
        for row in rows
        if row.role is Role.CRITIC
    ]


def main() -> int:
    """Run one seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--runs-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("settings", nargs="*", help="the main run's own settings, key=value")
    said = parser.parse_args()
    pairs = [setting.partition("=")[::2] for setting in said.settings]
    flags = [("seed", str(said.seed)), ("runs_dir", str(said.runs_dir)), ("supervision.regime", "gold"), *pairs]
    config = load_run_config([], flags=flags)
    start_log(said.runs_dir / "distil.log", console_level=None)
    runtime = start_ray(config.ray)
    try:
        with RunConsole(sys.stdout) as console:
            num_solutions = asyncio.run(write_baseline(config, target=said.out, progress=console))
    finally:
        runtime.stop()
    (said.out / "distillation.json").write_text(json.dumps({"gold_solutions": num_solutions, "seed": said.seed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
