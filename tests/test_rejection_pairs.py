"""RSO's pairs are of answers that rejection sampling accepts, in random order; what gives no pair is counted."""

from __future__ import annotations

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from actors.records import PreferencePair, Response, Verdict, draw_seed, from_table
from cluster.store import read_stage
from tests.fake_roles import RUN, FakeRun, Settings, fake_run, write_blank_run
from tests.refused_settings import problems_of
from tests.small_records import make_query, make_response, make_verdict
from trainers.feedback.preferences import Drawing, Pairs, PreferenceConfig, build_pairs
from trainers.feedback.rejection_pairs import (
    Pairing,
    RejectionSettings,
    meetings,
    most_rejection_pairs,
    num_accepted_of,
    rejection_drawing,
)
from trainers.loop_state import STAGES
from trainers.losses import dpo, rso
from trainers.run_config import load_run_config
from trainers.summary import read_metrics

Scored = tuple[float | None, str]
"""P(good) and text of an answer."""
BEST = 1e-9
"""A beta at which the best are accepted."""
ALL = 8
"""As many as are accepted of any query below."""


def drawn(
    *queries: Sequence[Scored],
    config: rso.Config,
    seed: int = 0,
    run: str = "test",
    margin: float = 0.5,
    most: int = 99,
    shuffle: int | None = None,
    flaw_end: int | None = None,
    version: int = 0,
) -> Pairs:
    """Return the pairs of queries q0, q1, …, each given as its answers; ids begin with the run's name."""
    responses: dict[str, Response] = {}
    verdicts: list[Verdict] = []
    for q, rows in enumerate(queries):
        for i, (score, text) in enumerate(rows):
            name = f"{run}/q{q}r{i}"
            responses[name] = make_response(name, query_id=f"{run}/q{q}", text=text, sample_index=i)
            verdicts.append(make_verdict(name, score, query_id=f"{run}/q{q}", flaw_end=flaw_end))
    if shuffle is not None:
        random.Random(shuffle).shuffle(verdicts)
    return build_pairs(
        [make_query(f"{run}/q{q}") for q in range(len(queries))],
        responses,
        verdicts,
        config=PreferenceConfig(margin=margin, max_pairs_per_query=most),
        run=run,
        tokens_spanning=lambda ids, num_chars: min(num_chars, len(ids)),
        version=version,
        max_age=0,
        drawing=rejection_drawing(config, seed=seed),
    )


def answers(*scores: float | None) -> list[Scored]:
    """Return answers of a text each."""
    return [(score, f"answer {i}") for i, score in enumerate(scores)]


def places(pairs: Pairs) -> list[tuple[int, int, int]]:
    """Return where each pair's query stands, and its chosen and its rejected answer in that."""
    return [
        (place_of(pair.query_id, "q"), place_of(pair.chosen_id, "r"), place_of(pair.rejected_id, "r"))
        for pair in pairs.pairs
    ]


def place_of(name: str, letter: str) -> int:
    return int(name.rpartition(letter)[2])


# ------------------------------------------------------------------------------------------------------- who meets whom


def test_the_first_round_pairs_neighbours_and_leaves_the_last_of_an_odd_number() -> None:
    assert meetings([3, 0, 2, 1, 4], [0.0] * 5, pairing="first_round") == [(3, 0), (2, 1)]


def test_in_a_tournament_winners_meet_until_one_is_left() -> None:
    scores = [0.2, 0.9, 0.4, 0.7, 0.1]
    # 1 beats 0 and 3 beats 2, 4 has no neighbour; 1 beats 3, and then 4.
    assert meetings([0, 1, 2, 3, 4], scores, pairing="tournament") == [(0, 1), (2, 3), (1, 3), (1, 4)]
    # 4 has no neighbour in the first round alone: of three winners it is again the last, of two it meets the first.
    assert meetings([4, 2, 0], scores, pairing="tournament") == [(4, 2), (2, 0)]


def test_of_equal_scores_the_first_goes_on() -> None:
    assert meetings([2, 0, 3, 1], [0.5] * 4, pairing="tournament") == [(2, 0), (3, 1), (2, 3)]


@pytest.mark.parametrize(
    ("wanted", "candidates", "accepted"), [(None, 8, 4), (None, 7, 3), (None, 3, 2), (None, 2, 2), (5, 8, 5), (5, 4, 4)]
)
def test_half_of_the_candidates_is_accepted_or_as_many_as_asked(
    wanted: int | None, candidates: int, accepted: int
) -> None:
    assert num_accepted_of(rso.Config(num_accepted=wanted), candidates) == accepted


# ------------------------------------------------------------------------------------------------------------ the pairs


def test_towards_beta_0_the_best_are_accepted() -> None:
    scores = answers(0.05, 0.9, 0.3, 0.01, 0.8, 0.02, 0.2, 0.03)
    several = [drawn(scores, config=rso.Config(beta=BEST), margin=0.0, seed=seed) for seed in range(20)]
    # Two pass, and the two best of the six that fail are at 2 and 6.
    assert {pair for found in several for pair in places(found)} == {(0, 1, 2), (0, 1, 6), (0, 4, 2), (0, 4, 6)}
    assert all(found.dropped["not_accepted"] == 4 for found in several)


def test_one_that_passes_meets_everyone_it_can_in_a_tournament() -> None:
    """Of four, the only pass wins twice; the better ones of those that fail may have met before."""
    scores = answers(0.1, 0.2, 0.9, 0.3)
    seen = set()
    for seed in range(30):
        found = drawn(scores, config=rso.Config(num_accepted=4, pairing="tournament"), seed=seed)
        (_, first, one), (_, second, other) = places(found)
        assert (first, second) == (2, 2)
        # The second one has beaten the one that is left over: it is the better of the two.
        left = ({0, 1, 3} - {one, other}).pop()
        assert (scores[other][0] or 0.0) > (scores[left][0] or 0.0)
        assert found.dropped == {"same_label": 1}
        seen.add((one, other))
    assert seen == {(0, 3), (1, 3), (3, 1)}


def test_the_draws_are_those_of_the_runs_seed_and_the_querys_place() -> None:
    """At a beta without end all are accepted in the first round, in the order in which they are asked."""
    scores = answers(0.9, 0.1, 0.8, 0.2, 0.7, 0.0, 0.6, 0.3)
    config = rso.Config(beta=1e12, num_accepted=6)
    found = drawn(scores, scores, scores, config=config, seed=7, margin=0.0)
    wanted = []
    for q in range(3):
        rng = np.random.default_rng(draw_seed(7, "rejection pairs", 1, q))
        order = rng.permutation(8)
        assert (rng.random(8) < 1.0 - 1e-9).all()
        rng.permutation(0)  # nobody is left for a second round
        met = rng.permutation(order[:6]).tolist()
        # Those of even places pass.
        wanted += [
            (q, one, other) if one % 2 == 0 else (q, other, one)
            for one, other in zip(met[::2], met[1::2], strict=True)
            if (one + other) % 2
        ]
    assert places(found) == wanted != []
    assert found.dropped == {"not_accepted": 3 * 2, "same_label": 3 * 3 - len(wanted)}


MIXED = [answers(0.9, 0.1, 0.8, 0.2, 0.05, 0.0, 0.15, 0.3)] * 12


def test_a_seed_gives_the_same_pairs_whatever_the_runs_name_and_the_order_of_arrival() -> None:
    config = rso.Config()
    found = drawn(*MIXED, config=config, seed=5)
    assert drawn(*MIXED, config=config, seed=5) == found
    assert drawn(*MIXED, config=config, seed=5, shuffle=1) == found
    renamed = drawn(*MIXED, config=config, seed=5, run="another")
    assert places(renamed) == places(found) != []
    assert {pair.pair_id for pair in renamed.pairs}.isdisjoint(pair.pair_id for pair in found.pairs)
    assert places(drawn(*MIXED, config=config, seed=6)) != places(found)


def test_candidates_are_known_by_their_place_and_not_by_their_ids() -> None:
    """Ids hang on the run's name."""
    query = replace(make_query("q"), sample_index=4)
    scores = (0.9, 0.1, 0.8, 0.2, 0.05, 0.0, 0.15, 0.3)
    found = []
    for names in ("abcdefgh", "hgfedcba"):
        responses = {name: make_response(name, text=f"answer {i}", sample_index=i) for i, name in enumerate(names)}
        verdicts = [make_verdict(name, scores[response.sample_index]) for name, response in sorted(responses.items())]
        candidates = rejection_drawing(rso.Config(), seed=1)(query, verdicts, responses)
        found.append([tuple(responses[one.response_id].sample_index for one in pair) for pair in candidates.pairs])
    assert found[0] == found[1] != []


def test_a_querys_draws_do_not_hang_on_the_others() -> None:
    config = rso.Config()
    among = [place for place in places(drawn(*MIXED, config=config)) if place[0] < 5]
    assert places(drawn(*MIXED[:5], config=config)) == among != []
    # Of equal answers each query draws for itself.
    assert len({place[1:] for place in among}) > 1


def test_whom_the_best_meets_is_drawn_evenly_and_not_by_the_order_of_acceptance() -> None:
    """By that order the best would meet the second best, at this beta always."""
    queries = [answers(0.9, 0.1, 0.2, 0.3)] * 600
    counts = Counter(
        rejected for _, _, rejected in places(drawn(*queries, config=rso.Config(beta=BEST, num_accepted=4)))
    )
    assert sum(counts.values()) == 600
    assert chisquare([counts[place] for place in (1, 2, 3)]).pvalue > 0.01


def test_an_answer_is_accepted_with_the_probability_of_its_distance_to_the_best() -> None:
    """Of (1, 0.75, 0) at beta 0.5 two are accepted; a, b: the others' chances in the first round, c: in a second one.

    The best is taken in the first round, of random order, always. It meets the third where that alone is taken beside
    it; in one of three orders where all are; and where none is, so that a second round, in which the second is the
    best, takes that for certain and the third too, in one of two orders before it.
    """
    a, b, c = np.exp([-0.5, -2.0, -1.5])
    best_and_third = b * (1 - a) + a * b / 3 + (1 - a) * (1 - b) * c / 2
    queries = [[(1.0, "a"), (0.75, "b"), (0.0, "c")]] * 4000
    found = drawn(*queries, config=rso.Config(num_accepted=2))
    counts = Counter(place[1:] for place in places(found))
    assert set(counts) == {(0, 2), (1, 2)}
    assert counts[0, 2] / 4000 == pytest.approx(best_and_third, abs=0.015)
    # The best is left out in one of three orders, where all are taken.
    assert counts[1, 2] / 4000 == pytest.approx(a * b / 3, abs=0.01)


# -------------------------------------------------------------------------------------------------- what gives no pair


def test_answers_that_are_not_accepted_and_meetings_of_equals_are_counted() -> None:
    # The four best of eight all pass.
    found = drawn(answers(0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4), config=rso.Config(beta=BEST))
    assert (found.pairs, found.dropped) == ((), {"not_accepted": 4, "same_label": 2})


def test_an_accepted_answer_without_a_partner_is_unpaired() -> None:
    # One of three is left over: either of those that fail, or the one that passes.
    for seed in range(10):
        found = drawn(answers(0.9, 0.1, 0.2), config=rso.Config(num_accepted=3), seed=seed)
        assert found.dropped.get("same_label", 0) == 1 - len(found.pairs)
        assert found.dropped["unpaired"] == 1
    whole = drawn(answers(0.9, 0.1, 0.2), config=rso.Config(num_accepted=3, pairing="tournament"))
    assert "unpaired" not in whole.dropped


@pytest.mark.parametrize(
    ("query", "dropped"),
    [
        ([(0.6, "a"), (0.4, "b")], {"margin": 1}),
        ([(0.9, "a"), (0.1, "a")], {"same_text": 1}),
        ([(0.9, "wring"), (0.1, "wrong")], {"flaw_in_chosen": 1}),
        ([(0.9, "a"), (0.8, "b")], {"all_pass": 1}),
        ([(0.2, "a"), (0.1, "b")], {"all_fail": 1}),
        ([(0.9, "a"), (None, "b")], {"all_pass": 1, "unjudged": 1}),
        ([(0.1, "a")], {"all_fail": 1}),
        ([(None, "a")], {"no_verdict": 1, "unjudged": 1}),
        ([], {"no_verdict": 1}),
    ],
    ids=[
        "margin",
        "same text",
        "flaw in chosen",
        "all pass",
        "all fail",
        "a lone pass",
        "a lone fail",
        "none",
        "empty",
    ],
)
def test_the_rules_of_all_pairs_hold_for_these(query: list[Scored], dropped: dict[str, int]) -> None:
    found = drawn(query, config=rso.Config(), flaw_end=2)
    assert (found.pairs, found.dropped) == ((), dropped)


def test_a_rejected_answer_ends_with_its_flaw_and_the_chosen_stays_whole() -> None:
    (pair,) = drawn([(0.9, "right"), (0.1, "wrong")], config=rso.Config(), flaw_end=3).pairs
    assert "".join(map(chr, pair.rejected_token_ids)) == "wro"
    assert "".join(map(chr, pair.chosen_token_ids)) == "right\0"


def test_stale_answers_are_no_candidates() -> None:
    found = drawn(answers(0.9, 0.1), config=rso.Config(), version=1)
    assert (found.pairs, found.dropped) == ((), {"stale": 2, "no_verdict": 1})


def test_a_query_keeps_its_first_pairs_up_to_the_limit() -> None:
    config = rso.Config(num_accepted=ALL, beta=1.0)
    queries = [answers(0.9, 0.1, 0.8, 0.2, 0.7, 0.05, 0.95, 0.15)] * 6
    whole, some = (drawn(*queries, config=config, most=most) for most in (99, 1))
    firsts = {}
    for place in places(whole):
        firsts.setdefault(place[0], place)
    assert places(some) == list(firsts.values())
    assert some.dropped["over_limit"] == len(whole.pairs) - len(some.pairs) > 0
    assert "over_limit" not in whole.dropped


def test_pairs_that_the_margin_drops_do_not_count_towards_the_limit() -> None:
    # Of the two that fail the pass beats both; only one of them by the margin.
    config = rso.Config(num_accepted=3, pairing="tournament")
    kept = [drawn(answers(0.7, 0.1, 0.4), config=config, most=1, seed=seed) for seed in range(12)]
    assert {place for found in kept for place in places(found)} == {(0, 0, 1)}
    # Where the two that fail have met first, the better one alone meets the pass.
    assert {tuple(sorted(found.dropped.items())) for found in kept} == {
        (("margin", 1),),
        (("margin", 1), ("same_label", 1)),
    }
    assert all(bool(found.pairs) != ("same_label" in found.dropped) for found in kept)


def test_equal_answers_are_candidates_each() -> None:
    """Rejection sampling draws from a law: what the learner says twice counts twice."""
    copies = [(0.9, "a"), (0.1, "b"), (0.9, "a"), (0.1, "b")]
    found = [drawn(copies, config=rso.Config(num_accepted=4), seed=seed) for seed in range(20)]
    assert {len(one.pairs) for one in found} == {0, 2}
    for one in found:
        assert one.dropped == ({} if one.pairs else {"same_label": 2})
        assert len({pair.pair_id for pair in one.pairs}) == len(one.pairs)


@pytest.mark.parametrize("pairing", ["first_round", "tournament"])
def test_the_most_pairs_of_a_query_are_reached_and_not_exceeded(pairing: Pairing) -> None:
    for num in range(2, 8):
        most = 0
        for num_pass in range(1, num):
            scores = [0.9 - 0.01 * i if i < num_pass else 0.1 - 0.01 * i for i in range(num)]
            # Which of those that pass is where makes no difference to how many pairs there are.
            for spots in itertools.combinations(range(num), num_pass):
                rest = [spot for spot in range(num) if spot not in spots]
                order = [0] * num
                for i, spot in enumerate([*spots, *rest]):
                    order[spot] = i
                met = meetings(order, scores, pairing=pairing)
                most = max(most, sum((one < num_pass) != (other < num_pass) for one, other in met))
        config = rso.Config(num_accepted=num, pairing=pairing)
        assert most_rejection_pairs(config, num_samples=num) == most


@settings(deadline=None, max_examples=80)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([None, 0.0, 0.2, 0.49, 0.5, 0.8, 1.0]), st.sampled_from("abcde")), max_size=8
        ),
        max_size=4,
    ),
    st.sampled_from([None, 2, 3, 8]),
    st.sampled_from(["first_round", "tournament"]),
    st.sampled_from([0.0, 0.5]),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_pairs_keep_their_promises_in_any_order_of_arrival(
    queries: list[list[Scored]], num_accepted: int | None, pairing: Pairing, margin: float, most: int, seed: int
) -> None:
    config = rso.Config(num_accepted=num_accepted, pairing=pairing)
    found = drawn(*queries, config=config, seed=seed, margin=margin, most=most)
    assert drawn(*queries, config=config, seed=seed, margin=margin, most=most, shuffle=seed) == found
    dropped = Counter(found.dropped)
    num_left = num_met = 0
    for q, rows in enumerate(queries):
        scores = [score for score, _ in rows if score is not None]
        mine = [place[1:] for place in places(found) if place[0] == q]
        assert len(mine) <= min(most, most_rejection_pairs(config, num_samples=len(scores)) if len(scores) > 1 else 0)
        # Who is rejected has lost, and is out.
        assert len({rejected for _, rejected in mine}) == len(mine)
        for chosen, rejected in mine:
            (good, text), (bad, other) = rows[chosen], rows[rejected]
            assert good is not None
            assert bad is not None
            assert good >= 0.5 > bad
            assert good - bad >= margin
            assert text != other
        if any(score >= 0.5 for score in scores) and any(score < 0.5 for score in scores):
            accepted = num_accepted_of(config, len(scores))
            num_left += len(scores) - accepted
            num_met += accepted // 2 if pairing == "first_round" else accepted - 1
    # Every judged answer and every meeting is accounted for.
    assert dropped["not_accepted"] == num_left
    refused = sum(dropped[reason] for reason in ("same_label", "margin", "same_text", "over_limit"))
    assert len(found.pairs) + refused == num_met


# ------------------------------------------------------------------------------------------------------------- settings


def test_the_loss_says_itself_that_its_pairs_are_drawn() -> None:
    assert isinstance(rso.Config(), RejectionSettings)
    assert not isinstance(dpo.Config(), RejectionSettings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_accepted = 9\n[rollouts.sampling]\nnum_samples = 8\n",
         "a.toml:3: loss.num_accepted: got 9, wanted at most rollouts.sampling.num_samples = 8: no query has more "
         "answers to be accepted"),
        ('[refinement]\nkind = "claim_revision"\n',
         'a.toml:4: refinement.kind: got "claim_revision" with loss.kind = "rso", wanted a loss that draws no pairs of '
         "its own, such as dpo: mended answers are no samples of the learner's, so that none can be accepted"),
        ("num_accepted = 1\n", "a.toml:3: loss.num_accepted: got 1, wanted at least 2"),
        ("beta = 0\n", "a.toml:3: loss.beta: got 0, wanted more than 0"),
        ('pairing = "all"\n', 'a.toml:3: loss.pairing: got "all", wanted one of first_round, tournament'),
    ],
)  # fmt: skip
def test_settings_that_draw_no_pairs_are_refused(text: str, message: str, tmp_path: Path) -> None:
    assert problems_of(f'[loss]\nkind = "rso"\n{text}', tmp_path) == [message]


def test_as_many_as_are_sampled_may_be_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[loss]\nkind = "rso"\nnum_accepted = 5\npairing = "tournament"\n')
    flags = [("rollouts.sampling.num_samples", "5"), ("preferences.mix.noise", '"none"')]
    assert isinstance(load_run_config([path], flags=flags).loss, RejectionSettings)


# ------------------------------------------------------------------------------------------------------------- the loop


class Killed(Exception):
    """The run ends here."""


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blank_run(tmp_path_factory.mktemp("blank") / RUN)


def run_at(path: Path, blank: Path, **options: Any) -> FakeRun:
    if not path.exists():
        shutil.copytree(blank, path)
    run = fake_run(path, Settings(loss="rso", num_samples=8), **options)
    run.finish()
    return run


def records(path: Path, stage: str, *, iteration: int) -> list[Any]:
    return from_table(read_stage(path, stage, iteration=iteration), STAGES[stage][0])


def rebuilt(path: Path, *, iteration: int, drawing: Drawing | None) -> Pairs:
    """Return the pairs that an iteration's stored verdicts give."""
    responses: list[Response] = records(path, "responses", iteration=iteration)
    return build_pairs(
        records(path, "queries", iteration=iteration),
        {row.response_id: row for row in responses},
        records(path, "verdicts", iteration=iteration),
        config=PreferenceConfig(),
        run=RUN,
        tokens_spanning=lambda ids, num_chars: min(num_chars, len(ids)),
        version=iteration - 1,
        max_age=0,
        drawing=drawing,
    )


def test_a_run_trains_on_pairs_of_accepted_answers(blank: Path, tmp_path: Path) -> None:
    run = run_at(tmp_path / RUN, blank)
    for iteration, (plan, metrics) in enumerate(zip(run.group.plans, read_metrics(run.store.path), strict=True), 1):
        pairs: list[PreferencePair] = records(run.store.path, "pairs", iteration=iteration)
        # 3 is the seed of all fake runs.
        wanted = rebuilt(run.store.path, iteration=iteration, drawing=rejection_drawing(rso.Config(), seed=3))
        assert {pair.pair_id: pair for pair in pairs} == {pair.pair_id: pair for pair in wanted.pairs} != {}
        assert set(plan.row_ids) == {pair.pair_id for pair in pairs}
        assert metrics.pairs_trained == len(pairs)
        assert metrics.pairs_dropped == wanted.dropped
        assert metrics.pairs_dropped["not_accepted"] > 0
        for drawing in (None, rejection_drawing(rso.Config(), seed=4)):
            other = rebuilt(run.store.path, iteration=iteration, drawing=drawing)
            assert {pair.pair_id for pair in other.pairs} != set(plan.row_ids)


def test_a_run_that_ends_before_its_pairs_are_stored_draws_the_same_ones_again(blank: Path, tmp_path: Path) -> None:
    whole = run_at(tmp_path / "whole" / RUN, blank)

    def ending(reached: str, num: int) -> None:
        if reached == "verdicts 1":
            raise Killed(reached)

    with pytest.raises(Killed):
        run_at(tmp_path / RUN, blank, reach=ending)
    resumed = run_at(tmp_path / RUN, blank)
    for iteration in (1, 2):
        found, wanted = (records(run.store.path, "pairs", iteration=iteration) for run in (resumed, whole))
        assert found == wanted != []
    assert [plan.row_ids for plan in resumed.group.plans] == [plan.row_ids for plan in whole.group.plans]
    dropped = [[row.pairs_dropped for row in read_metrics(run.store.path)] for run in (resumed, whole)]
    assert dropped[0] == dropped[1]
