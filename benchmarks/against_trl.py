"""DPO on the same pairs by a training group and by TRL's DPOTrainer: pairs per second of one over the other.

    make against-trl                                    (TRL lives in .parity/, an environment of its own)
    .venv/bin/python -m benchmarks.against_trl --quick  (small forms, which only show that they run)

Both sides: this machine's cores, fp32, no GPU; the same model, pairs, batches of 16, two epochs, learning rate, AdamW
and clipping; the time from tokens in memory to trained weights, the reference's log-probs included, in turns. TRL is
one process with a thread for each core, as its DPOTrainer is started on one machine; ours is the default group of two
ranks. TRL is measured as it comes (the reference is asked in every step) and with `precompute_ref_log_probs`, the
faster way of the two; gradient checkpointing, its default, is off: it would only slow it down.

Both sides count their tokens and report the loss of their first step (log 2): it is the same work.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from actors.chat import load_tokenizer
from benchmarks.bench import STORE_GB, record
from benchmarks.cold_demo import ROOT
from benchmarks.figure import Figure, in_turns, table
from benchmarks.plain_process import PlainProcess, worker_niceness
from benchmarks.trl_dpo import EPOCHS, Pair, Trained, TrlSetting, hold, train
from benchmarks.weight_transfer import SHAPE
from cluster.durable_files import write_json_atomic
from cluster.ray_runtime import RayConfig, start_ray
from trainers.base_model import CHARACTERS, BaseModelConfig, write_base_model
from trainers.batches import TrainingPlan
from trainers.losses.dpo import Config as DpoConfig
from trainers.run_config import RunConfig
from trainers.training_config import TrainingConfig
from trainers.training_group import ModelSource, TrainingGroup

PYTHON = ROOT / ".parity" / "bin" / "python"
RESULTS = ROOT / "runs" / "bench" / "against_trl.json"


async def measure(models: Sequence[str], *, quick: bool) -> list[Figure]:
    """Return the figures; Ray runs."""
    figures = []
    for name, shape, num_pairs, num_rounds in (
        ("tiny", BaseModelConfig(), 32 if quick else 160, 2 if quick else 8),
        ("125m", SHAPE, 32, 3),
    ):
        if name not in models or (quick and name != "tiny"):
            continue
        with tempfile.TemporaryDirectory(prefix="elenchus-bench-") as folder:
            model = write_base_model(Path(folder) / "model", shape, seed=0)
            figures.append(await _measure(name, model, demo_texts(num_pairs), num_rounds=num_rounds))
    return figures


async def _measure(name: str, model: Path, pairs: Sequence[Pair], *, num_rounds: int) -> Figure:
    training = RunConfig().learner.training.model_copy(update={"cpus_per_rank": 0.1})
    rows = pair_table(pairs, model)
    cores = len(os.sched_getaffinity(0))
    setting = TrlSetting(
        model=str(model),
        pairs=tuple(pairs),
        learning_rate=training.learning_rate,
        max_grad_norm=training.max_grad_norm,
        beta=DpoConfig().beta,
        threads=cores,
        output=str(model.parent / "trl"),
    )
    group = TrainingGroup(config=training, source=ModelSource(path=str(model)), name=f"trl-{name}")
    threads = {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(model.parent / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    peer = PlainProcess(environment={**threads, **offline}, niceness=worker_niceness(), python=PYTHON)
    as_it_comes: list[float] = []
    try:
        await asyncio.gather(group.start(), peer.start(hold, setting))

        async def ours() -> float:
            found = await _ours(group, rows, training=training)
            _check(found, num_tokens=EPOCHS * num_pair_tokens(rows))
            return found.seconds

        async def theirs() -> float:
            found = [await peer.call(train, precompute) for precompute in (True, False)]
            for one in found:
                _check(one, num_tokens=EPOCHS * num_pair_tokens(rows))
            as_it_comes.append(found[1].seconds)
            return float(min(one.seconds for one in found))

        rounds = await in_turns(theirs, ours, num_rounds=num_rounds, num_warm=1)
    finally:
        peer.close()
        await group.shutdown()
    num = EPOCHS * len(pairs)
    return Figure.of(
        f"dpo_against_trl_{name}",
        f"pairs per second ÷ TRL's DPOTrainer, {name}",
        rounds.ratios,
        at_least=1.5,
        details={
            "ours_pairs_per_s": num / statistics.median(rounds.plain),
            "trl_pairs_per_s": num / statistics.median(rounds.ours),
            "trl_as_it_comes_pairs_per_s": num / statistics.median(as_it_comes),
        },
    )


def _check(found: Trained, *, num_tokens: int) -> None:
    if found.num_tokens != num_tokens or abs(found.first_loss - math.log(2.0)) > 1e-3:
        raise RuntimeError(f"not the same work: got {found}, wanted {num_tokens} tokens and a first loss of log 2")


async def _ours(group: TrainingGroup, rows: pa.Table, *, training: TrainingConfig) -> Trained:
    plan = TrainingPlan.of(
        [str(pair_id) for pair_id in rows.column("pair_id").to_pylist()],
        batch_size=training.batch_size,
        epochs=EPOCHS,
        seed=0,
    )
    begin = time.perf_counter()
    report = await group.update(rows, loss="dpo", loss_config=DpoConfig(), plan=plan)
    return Trained(
        seconds=time.perf_counter() - begin,
        num_tokens=sum(step.num_tokens for step in report.steps),
        first_loss=report.steps[0].loss,
    )


def demo_texts(num: int) -> list[Pair]:
    """Return pairs of the demo's lengths: prompts of 7 to 11 characters, chosen of 22 to 34, rejected of 8 to 28."""
    rng = random.Random(0)
    letters = CHARACTERS[2:]  # neither line breaks nor spaces, which a tokenizer may treat on their own

    def text(least: int, most: int) -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(least, most)))

    # Chosen and rejected begin differently, else TRL would take what they share for prompt.
    return [Pair(prompt=text(7, 11), chosen="a" + text(21, 33), rejected="b" + text(7, 27)) for _ in range(num)]


def pair_table(pairs: Sequence[Pair], model: Path) -> pa.Table:
    """Return the pairs' tokens, an end of sequence after each response."""
    tokenizer = load_tokenizer(model)
    end = tokenizer.eos_token_id

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return pa.table(
        {
            "pair_id": [f"p{number:05d}" for number in range(len(pairs))],
            "prompt_token_ids": [ids(pair.prompt) for pair in pairs],
            "chosen_token_ids": [[*ids(pair.chosen), end] for pair in pairs],
            "rejected_token_ids": [[*ids(pair.rejected), end] for pair in pairs],
        }
    )


def num_pair_tokens(rows: pa.Table) -> int:
    """Return the tokens of one pass over all pairs: each prompt twice."""
    lengths = {
        name: sum(map(len, rows.column(f"{name}_token_ids").to_pylist())) for name in ("prompt", "chosen", "rejected")
    }
    return 2 * lengths["prompt"] + lengths["chosen"] + lengths["rejected"]


def main() -> int:
    """Measure, write it down and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("tiny", "125m"), default=("tiny", "125m"))
    parser.add_argument("--quick", action="store_true", help="small forms: their numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    said = parser.parse_args()
    if not PYTHON.is_file():
        print(f"✗ {PYTHON}: got nothing, wanted an environment with TRL: make against-trl", file=sys.stderr)
        return 2
    load_before = os.getloadavg()[0]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    runtime = start_ray(RayConfig(object_store_gb=STORE_GB))
    try:
        figures = asyncio.run(measure(said.models, quick=said.quick))
    finally:
        runtime.stop()
    said.out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(said.out, record(figures, quick=said.quick, load_before=load_before))
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
