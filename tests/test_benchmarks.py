"""The benchmarks run in their short forms and yield finite figures; what they measure is never asserted here."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import (
    bench,
    driver_cpu,
    overlap,
    padding,
    pool_speed,
    preference_table,
    scale_up,
    training_step,
    weight_transfer,
)
from benchmarks.figure import Figure, in_turns, table
from benchmarks.plain_process import PlainProcess


def assert_sound(figures: Sequence[Figure], *names: str) -> None:
    assert tuple(figure.name for figure in figures) == names
    for figure in figures:
        assert math.isfinite(figure.value)
        assert 0.0 < figure.low <= figure.value <= figure.high
        assert figure.num_rounds >= 2
        assert all(math.isfinite(value) for value in figure.details.values())


# ------------------------------------------------------------------------------------------------------------ figures


def test_a_figure_is_the_median_of_its_rounds_with_their_quartiles() -> None:
    figure = Figure.of("f", "a ÷ b", [1.0, 5.0, 2.0, 4.0, 3.0], at_most=3.0)
    assert (figure.low, figure.value, figure.high, figure.num_rounds) == (2.0, 3.0, 4.0, 5)
    assert figure.met
    assert not Figure.of("f", "a ÷ b", [3.1], at_most=3.0).met
    assert Figure.of("f", "a ÷ b", [3.1], at_least=3.0).met


def test_two_sides_run_in_turns_in_changing_order_and_the_warm_up_is_forgotten() -> None:
    said: list[str] = []

    async def ours() -> float:
        said.append("a")
        return float(len(said))

    async def plain() -> float:
        said.append("b")
        return 2.0

    rounds = asyncio.run(in_turns(ours, plain, num_rounds=2, num_warm=1))
    assert "".join(said) == "ab" + "ba" + "ab"
    # Ours came fourth and fifth of all.
    assert rounds.ours == (4.0, 5.0)
    assert rounds.ratios == [2.0, 2.5]
    assert rounds.medians("s") == {"ours_s": 4.5, "plain_s": 2.0}


def test_the_table_shows_which_targets_are_met() -> None:
    figures = [
        Figure.of("met", "a ÷ b", [0.97], at_least=0.95),
        Figure.of("missed", "c per d", [0.41], at_most=0.3, unit="ms"),
    ]
    lines = table(figures).splitlines()
    assert lines[2] == "| `met` | a ÷ b | ≥ 0.95 | **0.970** | 0.970 – 0.970 | 1 | ✓ |"
    assert lines[3] == "| `missed` | c per d | ≤ 0.3 ms | **0.410** ms | 0.410 – 0.410 | 1 | ✗ |"


def test_the_record_holds_every_figure_the_machine_and_the_commit() -> None:
    figure = Figure.of("f", "a ÷ b", [1.2, 1.4], at_most=1.0, details={"ours_s": 0.5})
    record = json.loads(json.dumps(bench.record([figure], quick=True, load_before=0.5)))
    [written] = record["figures"]
    assert written["name"] == "f"
    assert written["value"] == pytest.approx(1.3)
    assert written["met"] is False
    assert written["details"] == {"ours_s": 0.5}
    assert record["quick"] is True
    assert record["load_1min_before"] == 0.5
    assert record["environment"]["num_cpus"] >= 1
    assert "commit" in record["environment"]


# ------------------------------------------------------------------------------------------------------ plain process


def numbers(first: int) -> list[int]:
    return [first]


def append(held: list[int], number: int) -> list[int]:
    held.append(number)
    return held


def fail(held: list[int]) -> None:
    raise ValueError(f"holds {held}")


def leave(held: list[int]) -> None:
    sys.stdout.write("last words")
    sys.stdout.flush()
    raise SystemExit(3)


def test_a_plain_process_keeps_what_it_made_and_says_how_it_failed() -> None:
    async def scenario() -> None:
        # Functions of a test module travel by name.
        process = PlainProcess(environment={"PYTHONPATH": str(Path(__file__).parent)}, niceness=19)
        try:
            await process.start(numbers, 1)
            assert await process.call(append, 2) == [1, 2]
            with pytest.raises(RuntimeError, match=r"ValueError: holds \[1, 2\]"):
                await process.call(fail)
            assert await process.call(append, 3) == [1, 2, 3]
            with pytest.raises(RuntimeError, match=r"(?s)ended with 3.*last words"):
                await process.call(leave)
        finally:
            process.close()

    asyncio.run(scenario())


# --------------------------------------------------------------------------------------------------------- benchmarks


def test_padding_is_measured_without_a_clock() -> None:
    pairs, documents = figures = padding.measure(quick=True)
    assert_sound(figures, "padding_pairs", "padding_bootstrap")
    assert pairs.value <= 1.0
    assert documents.value <= 1.0


@pytest.mark.usefixtures("ray_session")
def test_a_preference_table_is_measured() -> None:
    assert_sound(asyncio.run(preference_table.measure(quick=True)), "preference_table")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_drivers_cpu_is_measured() -> None:
    assert_sound(asyncio.run(driver_cpu.measure(quick=True)), "driver_cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_pools_speed_is_measured_on_the_same_tokens() -> None:
    [figure] = figures = asyncio.run(pool_speed.measure(quick=True))
    assert_sound(figures, "pool_tokens_per_s")
    assert figure.details["ours_tokens"] == figure.details["plain_tokens"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_weight_transfers_are_measured() -> None:
    figures = asyncio.run(weight_transfer.measure(quick=True))
    assert_sound(figures, "weight_sync", "weight_transport", "weight_transport_4")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_training_step_is_measured_on_the_same_losses() -> None:
    assert_sound(asyncio.run(training_step.measure(quick=True)), "training_step")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_what_overlaps_and_what_replicas_add_is_measured() -> None:
    figures = asyncio.run(overlap.measure(quick=True))
    assert_sound(figures, "overlap_age_1", "overlap_age_0", "pool_scaling_2")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_how_long_a_new_replica_takes_is_measured() -> None:
    (figure,) = asyncio.run(scale_up.measure(quick=True))
    assert figure.name == "scale_up"
    assert figure.num_rounds == 2
    # A difference may be below 0; both sides start an engine.
    assert figure.details["ours_s"] > 1.0
    assert figure.details["plain_s"] > 1.0
