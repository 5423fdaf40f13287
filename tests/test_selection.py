"""Labels that are probably wrong are left out and counted: critiques that disagree, rows of a large loss."""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from actors.records import PreferencePair, from_table
from cluster.store import read_stage
from tests.fake_roles import RUN, Settings, fake_run, write_blank_run
from tests.pair_tables import pair_table
from tests.refused_settings import problems_of
from tests.small_records import make_judged, make_verdict
from trainers.feedback.selection import (
    SelectionConfig,
    agreeing,
    cross_selected,
    drop_share,
    pair_loss,
    response_loss,
    select_pairs,
    select_responses,
    smallest,
)
from trainers.feedback.training_data import of_accepted
from trainers.summary import read_metrics


def test_a_verdict_stays_where_enough_of_its_critiques_say_the_same() -> None:
    judged = [
        make_judged("r0", 0.9, 0.8, 0.6),  # all pass it
        make_judged("r1", 0.9, 0.9, 0.1),  # two of three
        make_judged("r2", 0.9, None, 0.1),  # one of two that can be read
        make_judged("r3", None, None),  # none can be read
        make_judged("r4", 0.1, 0.9, 0.9),  # an expert has decided
    ]
    verdicts = [item.critic_verdict for item in judged]
    verdicts[4] = make_verdict("r4", 0.0, source="expert")
    for least, kept in ((0.0, "01234"), (0.6, "0134"), (0.7, "034"), (1.0, "034")):
        found = agreeing(judged, verdicts, min_agreement=least)
        assert [item.response.response_id for item in found.judged] == [f"r{i}" for i in kept]
        assert [verdict.response_id for verdict in found.verdicts] == [f"r{i}" for i in kept]
        assert found.dropped == ({"disagreement": 5 - len(kept)} if len(kept) < 5 else {})


def test_which_responses_stay_hangs_on_their_critiques_and_not_on_permuted_verdicts() -> None:
    judged = [make_judged(f"r{i}", *scores) for i, scores in enumerate([(0.9, 0.9), (0.9, 0.1), (0.1, 0.1)])]
    plain = [item.critic_verdict for item in judged]
    turned = [replace(v, label="fail" if v.label == "pass" else "pass") for v in plain]
    for verdicts in (plain, turned):
        found = agreeing(judged, verdicts, min_agreement=1.0)
        assert [verdict.response_id for verdict in found.verdicts] == ["r0", "r2"]


def test_agreement_raises_the_share_of_right_labels_when_critics_err_independently() -> None:
    rng = random.Random(0)
    judged, truth = [], {}
    for i in range(600):
        good = rng.random() < 0.5
        # Each of three critics errs in 20 % of the cases.
        scores = [0.9 if good == (rng.random() >= 0.2) else 0.1 for _ in range(3)]
        judged.append(make_judged(f"r{i}", *scores))
        truth[f"r{i}"] = "pass" if good else "fail"
    verdicts = [item.critic_verdict for item in judged]

    def right(least: float) -> float:
        kept = agreeing(judged, verdicts, min_agreement=least).verdicts
        return sum(verdict.label == truth[verdict.response_id] for verdict in kept) / len(kept)

    # Majority of three: 0.8^3 + 3 * 0.8^2 * 0.2 = 0.896. All three alike: 0.512 / (0.512 + 0.008) = 0.985.
    assert right(0.0) == pytest.approx(0.896, abs=0.04)
    assert right(1.0) == pytest.approx(0.985, abs=0.02)


def test_the_share_left_out_rises_from_nothing_to_the_noise() -> None:
    config = SelectionConfig(drop=0.2, ramp_iterations=10)
    assert [drop_share(config, iteration=i) for i in (1, 2, 6, 11, 50)] == pytest.approx([0.0, 0.02, 0.1, 0.2, 0.2])


@pytest.mark.parametrize(("drop", "kept"), [(0.0, [0, 1, 2, 3]), (0.25, [0, 1, 2]), (0.3, [0, 1, 2]), (0.5, [0, 2])])
def test_the_rows_of_smallest_loss_are_kept_in_their_order(drop: float, kept: list[int]) -> None:
    # ceil((1 - drop) * 4); of the two losses of 0.4 the first.
    assert smallest([0.3, 0.4, 0.1, 0.4], drop=drop) == kept


def test_of_two_models_each_learns_from_what_the_other_finds_easy() -> None:
    mine, peers = [0.1, 0.9, 0.2, 0.8], [0.9, 0.1, 0.8, 0.2]
    assert cross_selected(mine, peers, drop=0.5) == ([1, 3], [0, 2])


def a_pair(chosen: float, rejected: float, *, source: str = "critic", num: int = 0) -> PreferencePair:
    """A pair whose tokens have, each side, these log-probs on average."""
    (pair,) = from_table(pair_table(ages=[0], shift=0.0), PreferencePair)
    return replace(
        pair,
        pair_id=f"p{num}",
        source=source,
        chosen_logprobs=(chosen - 0.5, chosen + 0.5),
        rejected_logprobs=(rejected, rejected, rejected),
    )


def test_the_loss_of_a_pair_is_that_of_its_mean_log_probs_whatever_the_lengths() -> None:
    assert pair_loss(a_pair(-1.0, -3.0)) == pytest.approx(math.log1p(math.exp(-2.0)))
    assert pair_loss(a_pair(-3.0, -1.0)) == pytest.approx(math.log1p(math.exp(2.0)))
    assert pair_loss(replace(a_pair(-3.0, -1.0), chosen_logprobs=None)) is None


def test_pairs_that_the_policy_believes_least_are_left_out_but_not_the_experts() -> None:
    pairs = [a_pair(-2.0, -1.0 - i / 10, num=i) for i in range(10)]  # the first is believed least
    pairs[1] = replace(pairs[1], source="expert")
    config = SelectionConfig(drop=0.3, ramp_iterations=1)
    assert select_pairs(pairs, config, iteration=1) == (tuple(pairs), 0)
    kept, num = select_pairs(pairs, config, iteration=2)
    assert ([pair.pair_id for pair in kept], num) == (["p1", *(f"p{i}" for i in range(4, 10))], 3)


def test_pairs_without_log_probs_stay_and_do_not_count_in_the_share() -> None:
    pairs = [a_pair(-2.0, -1.0 - i / 10, num=i) for i in range(10)]
    mended = [
        replace(a_pair(-2.0, -1.0, num=num), chosen_logprobs=None, rejected_logprobs=None) for num in range(10, 20)
    ]
    kept, num = select_pairs([*pairs, *mended], SelectionConfig(drop=0.3, ramp_iterations=1), iteration=2)
    # 3 of the 10 that can be compared, not 6 of 20.
    assert ([pair.pair_id for pair in kept], num) == ([f"p{i}" for i in range(3, 20)], 3)
    assert select_pairs(mended, SelectionConfig(drop=0.3, ramp_iterations=1), iteration=2) == (tuple(mended), 0)


def test_small_loss_finds_flipped_pairs_of_a_policy_that_mostly_knows() -> None:
    """The policy prefers the better one in 9 of 10 pairs; a fifth of the labels is flipped."""
    rng = random.Random(3)
    pairs, flipped = [], set()
    for i in range(2_000):
        gap = 1.5 if rng.random() < 0.9 else -1.5
        if rng.random() < 0.2:
            flipped.add(f"p{i}")
            gap = -gap
        pairs.append(a_pair(-2.0 + gap, -2.0, num=i))
    kept, _ = select_pairs(pairs, SelectionConfig(drop=0.2, ramp_iterations=1), iteration=9)
    left = sum(pair.pair_id in flipped for pair in kept) / len(kept)
    # 0.9 * 0.2 + 0.1 * 0.8 = 26 % look wrong; 20 points of them are left out. Of the flips stay 0.1 * 0.2 that look
    # right and 0.06 * 0.18 / 0.26: 0.0615 / 0.8 = 7.7 %.
    assert left == pytest.approx(0.077, abs=0.02)
    assert len(flipped) / 2_000 == pytest.approx(0.2, abs=0.03)


def test_accepted_responses_of_large_loss_are_left_out_and_counted() -> None:
    judged = []
    for i, logprob in enumerate((-0.1, -3.0, -0.2, -0.4)):
        item = make_judged(f"r{i}", 0.9, text=f"answer {i}")
        response = replace(item.response, logprobs=tuple(logprob for _ in item.response.token_ids))
        judged.append(replace(item, response=response))
    data = of_accepted(judged, [item.critic_verdict for item in judged], version=0, max_age=0, spans=None)
    responses = {item.response.response_id: item.response for item in judged}
    assert response_loss(responses["r1"]) == pytest.approx(3.0)
    config = SelectionConfig(drop=0.25, ramp_iterations=1)
    assert select_responses(data, responses, config, iteration=1) is data
    found = select_responses(data, responses, config, iteration=2)
    assert found.row_ids == found.response_ids == ("r0", "r2", "r3")
    assert found.table.column("row_id").to_pylist() == ["r0", "r2", "r3"]
    assert found.places == ("0/0", "0/2", "0/3")
    assert found.dropped == {"large_loss": 1}


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blank_run(tmp_path_factory.mktemp("blank") / RUN)


def test_a_run_leaves_out_pairs_of_large_loss_from_its_second_iteration_on(blank: Path, tmp_path: Path) -> None:
    shutil.copytree(blank, tmp_path / RUN)
    selection = SelectionConfig(drop=0.5, ramp_iterations=1)
    fake_run(tmp_path / RUN, Settings(selection=selection, queries_per_iteration=20)).finish()
    first, second = read_metrics(tmp_path / RUN)
    assert "large_loss" not in first.pairs_dropped
    assert second.pairs_dropped["large_loss"] > 0
    stored = read_stage(tmp_path / RUN, "pairs", iteration=2).num_rows
    assert stored == second.pairs_trained
    whole = stored + second.pairs_dropped["large_loss"]
    assert stored >= math.ceil(whole / 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[selection]\nmin_agreement = 0.8\n",
         "a.toml:2: selection.min_agreement: got 0.8 with critic.judging.num_critiques = 1, wanted 2 or more of them: "
         "one always agrees with itself"),
        ('[selection]\nmin_agreement = 0.9\n[critic.judging]\nnum_critiques = 3\n[oversight]\nkind = "majority"\n',
         'a.toml:2: selection.min_agreement: got 0.9 with oversight.kind = "majority", wanted 0: the control would '
         "learn from what the critic wrote"),
        ('[selection]\ndrop = 0.1\n[loss]\nkind = "grpo"\n',
         'a.toml:2: selection.drop: got 0.1 with loss.kind = "grpo", wanted 0, or a loss of pairs or of tokens: '
         "samples are compared within their group, which must be whole"),
        ('[selection]\ndrop = 0.1\n[loss]\nkind = "kto"\n',
         'a.toml:2: selection.drop: got 0.1 with loss.kind = "kto", wanted 0, or a loss of pairs or of tokens: '
         "how likely a response is does not tell whether it was called bad by mistake"),
        ("[selection]\ndrop = 1\n", "a.toml:2: selection.drop: got 1, wanted less than 1"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert problems_of(text, tmp_path) == [message]
