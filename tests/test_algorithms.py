"""The comparison's commands are ones that the command line takes, and its tables say what the runs say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import elenchus
from actors.records import Response
from benchmarks import algorithms
from benchmarks.algorithms import (
    ALGORITHMS,
    Outcome,
    best_rate,
    choice_table,
    choose,
    confirm_table,
    next_rate,
    rate_means,
    report_table,
    run_chosen,
    words_of,
)
from benchmarks.run_figures import RunFigures, kl_from, self_bleu
from trainers.base_model import BaseModelConfig, write_base_model
from trainers.logprobs import token_logprobs
from trainers.run_config import RunConfig, load_run_config
from trainers.summary import GainSummary

FIGURES = RunFigures(kl_from_start=0.5, distinct=0.25, self_bleu=80.0, num_tokens=1_000)
SEALED = GainSummary(before=0.4, after=0.9, n=10, gain=0.5, ci_low=0.2, ci_high=0.8)
ONE = Outcome(
    algorithm="dpo",
    rate="3e-5",
    seed=51,
    probe=(0.5, 0.7, 0.9),
    walls=(10.0, 10.0, 10.0),
    sealed=SEALED,
    agreement=0.95,
    attack_success=0.1,
    figures=FIGURES,
    commit="0000000",
)


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_an_algorithm_is_a_config_that_the_command_line_takes(name: str) -> None:
    for rate in ALGORITHMS[name].rates:
        command, flags = elenchus.parse(words_of(name, rate=rate, seed=3))
        assert isinstance(command, elenchus.Run)
        config = load_run_config([], flags=flags)
        assert command.seed == 3
        assert RunConfig(name=command.name).name == f"{name}-{rate}"
        assert config.learner.training.learning_rate == float(rate)
        assert config.loss.kind == ALGORITHMS[name].settings["loss.kind"]


def test_the_rate_that_learnt_fastest_on_probe_is_chosen_over_all_seeds() -> None:
    found = {"3e-5": {"0": [0.5, 0.7, 0.9]}, "1e-5": {"0": [0.4, 0.4, 0.95]}}
    assert best_rate(rate_means(found)) == "3e-5"
    found["3e-5"]["1"] = [0.1, 0.1, 0.1]
    assert best_rate(rate_means(found)) == "1e-5"
    assert "| dpo | **0.583** | 0.400 | 0.40, 0.40, 0.95 |" in choice_table({"dpo": found})


@pytest.mark.parametrize(
    ("means", "wanted"),
    [
        ({}, "2"),
        ({"2": 0.5}, "1"),
        ({"2": 0.5, "1": 0.6}, None),
        ({"2": 0.5, "1": 0.4}, "3"),
        ({"2": 0.5, "1": 0.4, "3": 0.6}, None),
        ({"3": 0.6}, "2"),
        ({"3": 0.6, "9": 0.7}, "2"),
    ],
    ids=[
        "middle first",
        "lower next",
        "lower is better",
        "upper next",
        "upper is better",
        "from above",
        "no such rate",
    ],
)
def test_rates_are_tried_until_no_neighbour_of_the_best_is_left(means: dict[str, float], wanted: str | None) -> None:
    assert next_rate(("1", "2", "3"), means) == wanted


def test_a_campaign_goes_on_where_its_figures_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str, int]] = []

    def run_one(algorithm: str, *, rate: str, seed: int) -> Outcome:
        made.append((algorithm, rate, seed))
        if len(made) == 2:
            raise RuntimeError("killed")
        return replace(ONE, algorithm=algorithm, rate=rate, seed=seed, probe=(float(rate) * 1e3,))

    monkeypatch.setattr(algorithms, "run_one", run_one)
    monkeypatch.setattr(algorithms, "FIGURES", tmp_path / "figures.json")
    with pytest.raises(RuntimeError, match="killed"):
        choose(["sft"], [0])
    choose(["sft"], [0])
    assert made == [("sft", "1e-4", 0), ("sft", "3e-5", 0), ("sft", "3e-5", 0), ("sft", "3e-4", 0)]
    assert json.loads((tmp_path / "figures.json").read_text())["choice"]["sft"]["3e-4"] == {"0": [0.3]}
    run_chosen("report", ["sft"], [51])
    run_chosen("report", ["sft"], [51, 52])
    assert made[4:] == [("sft", "3e-4", 51), ("sft", "3e-4", 52)]
    kept = json.loads((tmp_path / "figures.json").read_text())["report"]
    assert [Outcome.of(one).seed for one in kept] == [51, 52]
    assert Outcome.of(kept[0]) == replace(ONE, algorithm="sft", rate="3e-4", probe=(0.3,))


def test_further_seeds_count_beside_those_of_the_choice() -> None:
    choice = {"dpo": {"3e-5": {"0": [0.4, 0.6]}, "1e-4": {"0": [0.1, 0.1]}}, "sft": {"3e-5": {"0": [0.5, 0.5]}}}
    found = confirm_table(choice, [ONE, replace(ONE, algorithm="sft", probe=(0.8, 0.8), agreement=0.5)])
    first, second = found.splitlines()[2:]
    assert first.startswith("| sft | 3e-5 | 0.650 | 0.500, 0.800 | 0.80, 0.80 | 0.500 |")
    assert second.startswith("| dpo | 3e-5 | 0.600 | 0.500, 0.700 | 0.50, 0.70, 0.90 | 0.950 |")


def replace_gain(gain: float) -> GainSummary:
    return SEALED.model_copy(update={"gain": gain})


def test_at_equal_wall_a_run_counts_as_far_as_it_had_come() -> None:
    quick = replace(ONE, algorithm="grpo", walls=(5.0, 5.0, 5.0), probe=(0.6, 0.8, 1.0), sealed=replace_gain(0.55))
    assert ONE.probe_by(9.9) is None
    assert [ONE.probe_by(wall) for wall in (10.0, 29.0, 30.0)] == [0.5, 0.7, 0.9]
    rows = [line.split(" | ") for line in report_table([ONE, quick]).splitlines()[2:]]
    # The quickest takes 15 s in all.
    assert [(row[0], row[4], row[8]) for row in rows] == [
        ("| dpo", "+50.0 (+20.0 to +80.0)", "0.500"),
        ("| grpo", "+55.0 (+20.0 to +80.0)", "1.000"),
    ]


def test_kl_from_the_start_is_the_gap_of_the_log_probs_per_answer(tmp_path: Path) -> None:
    path = write_base_model(tmp_path / "model", BaseModelConfig(), seed=0)
    start = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    responses = []
    for number, (prompt, answer) in enumerate((((5, 6, 7), (8, 9)), ((5, 6), (9, 8, 7, 6)))):
        token_ids = torch.tensor([prompt + answer])
        with torch.inference_mode():
            logprobs = token_logprobs(start(input_ids=token_ids).logits, token_ids, temperature=0.7)
        responses.append(
            Response(
                response_id=str(number),
                query_id="q",
                sample_index=number,
                text="",
                prompt_token_ids=prompt,
                token_ids=answer,
                # The first answer's tokens are each likelier than at the start by a half nat.
                logprobs=tuple(value + 0.5 * (number == 0) for value in logprobs[0, len(prompt) :].tolist()),
                policy_version="v5",
                finish_reason="stop",
            )
        )
    assert kl_from(start, responses, temperature=0.7) == pytest.approx((2 * 0.5 + 0.0) / 2, abs=1e-5)


def test_self_bleu_is_higher_the_more_alike_the_texts_are() -> None:
    assert self_bleu(["12+34=46"] * 3) == 100.0
    alike, unlike = self_bleu(["12+34=46", "12+34=47"]), self_bleu(["12+34=46", "carry none, so"])
    assert 0.0 <= unlike < alike < 100.0
    assert math.isfinite(unlike)
