"""Writes how well a seed's critic would solve the sealed problems itself: by what it recomputes in its critiques.

    .venv/bin/python -m benchmarks.critic_solver --seed 31 --runs-dir runs/experiments/31

The main run's critic is asked about the learner's own answers from before the loop, as it would be within it; of its
critiques only the recomputed parts are kept, put together to an answer and judged by truth. Beside it stands the share
of those answers that were right to begin with. Written to critic_solver.json in that directory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.critic import Critic
from actors.domains import GoldLedger, Purpose, load_domain
from actors.engine import start_engine_replica
from actors.records import EvaluationAnswer, Message, Query, Response, Split, from_table
from actors.rubrics import StepMarks, recomputed_parts
from cluster.log import start_log
from cluster.pool import Pool
from cluster.ray_runtime import start_ray
from cluster.store import read_stage
from serve.console import RunConsole
from trainers.progress import Progress
from trainers.run_config import RunConfig, load_run_config
from trainers.session import base_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """The sealed problems in the order of the set."""

    correct: tuple[bool, ...]
    """Whether the critic's recomputed answer is right; False where its critique can't be read."""
    well_formed: tuple[bool, ...]


async def solve(config: RunConfig, *, progress: Progress) -> Solved:
    """Ask the critic about the learner's first answers, and judge what it recomputes."""
    domain, checker = load_domain(config.domain.kind, config.domain)
    truth = GoldLedger(checker, regime=config.supervision.regime).checker_for(Purpose.EVALUATION)
    rows = from_table(read_stage(config.run_dir, "evaluations", iteration=0), EvaluationAnswer)
    sealed = sorted((row for row in rows if row.set_name == "sealed"), key=lambda row: row.item)
    base = await base_model(config, domain=domain, progress=progress)
    assert base is not None, "the demo's roles are bootstrapped"
    if base.group is not None:
        await base.group.shutdown()
    engine = config.critic.engine.model_copy(update={"model": str(base.model_dir)})
    pool = Pool(
        name="critic",
        start_replica=lambda replica_id: start_engine_replica(engine, replica_id=replica_id, num_cpus=1.0),
        num_replicas=1,
    )
    await pool.start()
    try:
        critic = Critic(pool, rubric=StepMarks(domain), config=config.critic.judging, run=config.name, seed=config.seed)
        answers: dict[str, str] = {}
        async for critiques in critic.judge([_asked(row) for row in sealed]):
            answers.update({c.response_ids[0]: assembled(recomputed_parts(c.text)) for c in critiques})
    finally:
        await pool.shutdown()
    return Solved(
        correct=tuple(truth.correct(row.query, answers[row.answer_id]) for row in sealed),
        well_formed=tuple(domain.well_formed(row.query, answers[row.answer_id]) for row in sealed),
    )


def assembled(parts: Sequence[str]) -> str:
    """Return columns and digits of the result as one answer in the arithmetic domain's form.

    >>> assembled(("7+6+0=13", "4+8+1=13", "1", "3", "3"))
    '7+6+0=13 4+8+1=13 133'
    """
    columns = [part for part in parts if "=" in part]
    return " ".join([*columns, "".join(part for part in parts if "=" not in part)])


def _asked(row: EvaluationAnswer) -> tuple[Query, Response]:
    query = Query(
        query_id=f"sealed/{row.item}",
        sample_index=row.item,
        messages=(Message(role="user", content=row.query),),
        domain="",
        facets=row.facets,
        canonical=row.query,
        attack="none",
        parent_id=None,
        iteration=0,
        attacker_version="none",
        split=Split.SEALED,
    )
    response = Response(
        response_id=row.answer_id,
        query_id=query.query_id,
        sample_index=0,
        text=row.text,
        prompt_token_ids=(),
        token_ids=(),
        logprobs=(),
        policy_version=row.policy_version,
        finish_reason="stop",
    )
    return query, response


def main() -> int:
    """Run one seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--runs-dir", type=Path, required=True)
    parser.add_argument("settings", nargs="*", help="the main run's own settings, key=value")
    said = parser.parse_args()
    pairs = [setting.partition("=")[::2] for setting in said.settings]
    flags = [("seed", str(said.seed)), ("name", "main"), ("runs_dir", str(said.runs_dir)), *pairs]
    config = load_run_config([], flags=flags)
    start_log(said.runs_dir / "critic_solver.log", console_level=None)
    runtime = start_ray(config.ray)
    try:
        with RunConsole(sys.stdout) as console:
            solved = asyncio.run(solve(config, progress=console))
    finally:
        runtime.stop()
    (said.runs_dir / "critic_solver.json").write_text(json.dumps(asdict(solved)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
