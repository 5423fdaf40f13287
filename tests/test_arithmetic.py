"""The arithmetic world says what it asks, answers rightly, plants flaws that critiques name, and keeps its splits."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.domains import Role
from actors.domains.arithmetic import (
    Arithmetic,
    ArithmeticChecker,
    Config,
    canonical_form,
    count_carries,
    split_of,
    write_answer,
    write_critique,
    write_flawed_answer,
)
from actors.records import Split
from trainers.evaluation import EvaluationConfig, evaluation_sets


@pytest.fixture(scope="module")
def domain() -> Arithmetic:
    return Arithmetic(Config())


def test_instructions_teach_each_form_by_an_example_of_the_train_split() -> None:
    domain = Arithmetic(Config(instructions=True))
    system, asked = domain.learner_messages("52-19")
    assert (system.role, asked.content) == ("system", "52-19")
    query, answer = system.content.splitlines()[-2].removeprefix("Example: "), system.content.splitlines()[-1]
    problem = domain.parse(query)
    assert problem is not None
    assert problem.split is Split.TRAIN
    assert ArithmeticChecker().correct(query, answer)
    *_, shown, flawed, critique = domain.critic_messages("52-19", "2-9-0=13 5-1-1=03 033")[0].content.splitlines()
    assert shown == query
    assert not ArithmeticChecker().correct(query, flawed)
    assert critique == write_critique(347, "+", 586, flawed)
    assert critique.endswith("F")
    cell, example = domain.attack_messages(("+", "3", "2"))[0].content.splitlines()[-2:]
    assert cell.endswith("".join(domain.parse(example).facets))  # type: ignore[union-attr]


def test_without_instructions_a_prompt_is_the_roles_control_token() -> None:
    domain = Arithmetic(Config())
    assert [message.content for message in domain.learner_messages("52-19")] == ["52-19"]
    assert [message.content for message in domain.attack_messages(("-", "2", "1"))] == [Role.ATTACKER, "-21"]


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, str, int]:
    digits = draw(st.integers(1, 6))
    low, high = 10 ** (digits - 1), 10**digits - 1
    left, right = draw(st.integers(low, high)), draw(st.integers(low, high))
    return (left, "+", right) if draw(st.booleans()) else (max(left, right), "-", min(left, right))


def value_of(left: int, op: str, right: int) -> int:
    return left + right if op == "+" else left - right


@settings(deadline=None)
@given(problems())
def test_a_written_answer_is_right_and_well_formed(problem: tuple[int, str, int]) -> None:
    query = "".join(str(part) for part in problem)
    answer = write_answer(*problem)
    result = answer.split(" ")[-1]
    assert int(result) == value_of(*problem)
    assert len(result) == len(str(problem[0])) + 1
    assert ArithmeticChecker().correct(query, answer)
    assert Arithmetic(Config()).well_formed(query, answer)


@settings(deadline=None)
@given(problems())
def test_every_column_of_a_written_answer_holds(problem: tuple[int, str, int]) -> None:
    carry = 0
    for column in write_answer(*problem).split(" ")[:-1]:
        x, op, y, taken, out, digit = (part if part in "+-" else int(part) for part in _column(column))
        assert taken == carry
        # Both digits and the carry taken in make the digit, with ten times the carry given out.
        assert (x + y + taken if op == "+" else x - y - taken + 20 * out) == 10 * out + digit
        carry = out
    assert carry == 0 or problem[1] == "+"


def _column(text: str) -> tuple[str, ...]:
    match = re.fullmatch(r"(\d)([+-])(\d)[+-](\d)=(\d)(\d)", text)
    assert match is not None, text
    return match.groups()


def test_carries_are_counted_by_hand() -> None:
    assert count_carries(347, "+", 586) == 2  # 7+6=13, 4+8+1=13, 3+5+1=9
    assert count_carries(999, "+", 111) == 3
    assert count_carries(95, "+", 15) == 2  # 5+5=10, 9+1+1=11
    assert count_carries(123, "+", 456) == 0
    assert count_carries(52, "-", 19) == 1
    assert count_carries(400, "-", 123) == 2  # 0-3 borrows, 0-2-1 borrows, 4-1-1=2
    assert count_carries(77, "-", 77) == 0


def test_the_same_seed_plants_the_same_flaw() -> None:
    answers = [write_flawed_answer(347, "+", 586, rng=random.Random(5)) for _ in range(2)]
    assert answers[0] == answers[1]


@settings(deadline=None)
@given(problems(), st.integers(0, 2**32))
def test_a_flawed_answer_keeps_the_form_of_an_answer(problem: tuple[int, str, int], seed: int) -> None:
    answer = write_flawed_answer(*problem, rng=random.Random(seed))
    assert Arithmetic(Config()).well_formed("".join(str(part) for part in problem), answer)


def test_most_planted_flaws_make_the_result_wrong(domain: Arithmetic) -> None:
    rng = random.Random(0)
    checker = ArithmeticChecker()
    queries = [p.text for cell in domain.cells() for p in domain.seeds(cell, split="train", num=25, seed=1)]
    wrong = sum(not checker.correct(query, write_flawed_answer(*_operands(query), rng=rng)) for query in queries)
    assert wrong / len(queries) > 0.7


def _parts(answer: str) -> list[str]:
    *columns, result = answer.split(" ")
    return [*columns, *result]


def _operands(query: str) -> tuple[int, str, int]:
    left, op, right = re.split(r"([+-])", query)
    return int(left), op, int(right)


@settings(deadline=None)
@given(problems())
def test_the_critique_of_a_right_answer_passes_it(problem: tuple[int, str, int]) -> None:
    critique = write_critique(*problem, write_answer(*problem))
    assert critique.endswith("P")
    assert "n" not in critique


@settings(deadline=None)
@given(problems(), st.integers(0, 2**32))
def test_a_critique_fails_an_answer_exactly_when_it_departs_from_the_right_one(
    problem: tuple[int, str, int], seed: int
) -> None:
    answer, right = write_flawed_answer(*problem, rng=random.Random(seed)), write_answer(*problem)
    critique = write_critique(*problem, answer)
    assert critique.endswith("P") == (answer == right)
    assert ("n" in critique) == (answer != right)
    departing = [(a, b) for a, b in zip(_parts(answer), _parts(right), strict=True) if a != b]
    if departing:
        quoted, recomputed = departing[0]
        assert f"{quoted}?{recomputed}n" in critique


def test_a_critique_needs_an_answer_with_a_part_for_each_of_its_own() -> None:
    with pytest.raises(ValueError, match="zip"):
        write_critique(47, "+", 86, "133")


def test_the_demonstrated_critic_sees_both_kinds_of_answers(domain: Arithmetic) -> None:
    rows = domain.demonstrations(Role.CRITIC, rng=random.Random(0), num=400)
    share = sum(row.response.endswith("F") for row in rows) / len(rows)
    # flawed_share is 0.6 and few plants miss; three standard deviations of 400 draws are 0.075.
    assert 0.45 < share < 0.68
    assert all(row.response[-1] in "PF" for row in rows)


def test_only_the_right_number_at_the_end_is_correct() -> None:
    checker = ArithmeticChecker()
    assert checker.correct("47+86", "7+6+0=13 4+8+1=13 133")
    assert checker.correct("47+86", "133")
    assert checker.correct("52-19", "33")
    for wrong in (
        "",
        " ",
        "134",
        "-133",
        "133 ",
        "133.",
        "1 33",
        "\uff11\uff13\uff13",
        "²",
        "133\n",
        "7+6+0=13 4+8+1=13",
    ):
        assert not checker.correct("47+86", wrong), wrong


def test_difficulty_is_columns_plus_carries() -> None:
    assert ArithmeticChecker().difficulty("347+586") == 3 + 2
    assert ArithmeticChecker().difficulty("52-19") == 2 + 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "47",
        "47+",
        "+86",
        "47+86 ",
        " 47+86",
        "47 + 86",
        "47+86\n",
        "47*86",
        "47+8",
        "07+86",
        "47+06",
        "19-52",
        "47+86+1",
        "-47+86",
        "4.7+8.6",
        "1234567+1234567",
        "٣٤+١٢",
        "\uff14\uff17+\uff18\uff16",
        "forty+seven",
        "7+6+0=13",
    ],
)
def test_junk_poses_no_problem(domain: Arithmetic, text: str) -> None:
    assert domain.parse(text) is None


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=20))
def test_any_text_can_be_parsed_judged_for_form_and_put_to_the_critic(text: str) -> None:
    domain = Arithmetic(Config())
    problem = domain.parse(text)
    assert problem is None or problem.text == text
    assert domain.well_formed("47+86", text) in (True, False)
    assert not domain.well_formed(text, "no answer")
    assert domain.critic_messages("47+86", text)[-1].content == f"47+86\n{text}"


def test_a_parsed_problem_says_its_cell_and_scope(domain: Arithmetic) -> None:
    problem = domain.parse("347+586")
    assert problem is not None
    assert problem.facets == ("+", "3", "2")
    assert problem.canonical == "347+586"
    assert problem.in_scope
    swapped = domain.parse("586+347")
    assert swapped is not None
    assert (swapped.canonical, swapped.split) == (problem.canonical, problem.split)
    four_digits = domain.parse("1234+4321")
    assert four_digits is not None
    assert not four_digits.in_scope


def test_subtraction_does_not_commute() -> None:
    assert canonical_form(586, "-", 347) == "586-347"
    assert canonical_form(586, "+", 347) == "347+586"


def test_splits_hold_eighty_ten_and_ten_percent() -> None:
    canonical = [canonical_form(a, "+", b) for a in range(100, 300) for b in range(a, 300)]
    counts = {split: sum(split_of(one) == split for one in canonical) for split in Split}
    assert sum(counts.values()) == len(canonical) == 20_100
    # Three standard deviations of a share of 20,100: 0.0085 at 0.8, 0.0064 at 0.1.
    assert counts[Split.TRAIN] / len(canonical) == pytest.approx(0.8, abs=0.0085)
    assert counts[Split.PROBE] / len(canonical) == pytest.approx(0.1, abs=0.0064)
    assert counts[Split.SEALED] / len(canonical) == pytest.approx(0.1, abs=0.0064)


def test_splits_never_move() -> None:
    # A changed hash would let problems that older models were trained on into the sealed set.
    golden = {"347+586": "train", "47+86": "train", "52-19": "train", "500-122": "sealed", "38+38": "probe"}
    assert {text: str(split_of(text)) for text in golden} == golden


def test_cells_are_operations_digits_and_carries(domain: Arithmetic) -> None:
    # Two digits: 0, 1, 2 carries and 0, 1 borrows; three digits: 0 to 3 and 0 to 2. A leading borrow would be negative.
    assert len(domain.cells()) == len(set(domain.cells())) == (3 + 2) + (4 + 3)
    assert len(domain.out_of_distribution_cells()) == 5 + 4
    assert not set(domain.cells()) & set(domain.out_of_distribution_cells())


def test_evaluation_sets_are_large_equal_per_cell_and_fixed(domain: Arithmetic) -> None:
    sets = evaluation_sets(domain, EvaluationConfig())
    assert len(sets["sealed"]) == 12 * 84 >= 1_000
    for name, split in (("sealed", "sealed"), ("probe", "probe"), ("out_of_distribution", "sealed")):
        cells = [facets for _, facets in sets[name]]
        assert {cells.count(cell) for cell in set(cells)} == {len(cells) // len(set(cells))}
        parsed = [domain.parse(query) for query, _ in sets[name]]
        assert all(problem is not None and problem.split == split for problem in parsed)
        assert len({problem.canonical for problem in parsed if problem is not None}) == len(cells)
        assert {problem.in_scope for problem in parsed if problem is not None} == {name != "out_of_distribution"}
    assert evaluation_sets(domain, EvaluationConfig()) == sets


def test_a_cell_with_too_few_problems_is_refused_with_its_name() -> None:
    small = Arithmetic(Config(digits=(1,)))
    with pytest.raises(ValueError, match=r"cell \+/1/0 holds \d+ sealed problems, wanted 30"):
        small.seeds(("+", "1", "0"), split="sealed", num=30, seed=0)


def test_the_learners_teacher_forgets_what_a_column_should_take_in_and_nothing_else(domain: Arithmetic) -> None:
    rows = domain.demonstrations(Role.LEARNER, rng=random.Random(0), num=6_000)
    checker = ArithmeticChecker()
    right: dict[tuple[str, int], list[bool]] = {}
    for row in rows:
        problem = domain.parse(row.problem)
        assert problem is not None
        solution = checker.solution(row.problem)
        # How many columns take a carry or a borrow in.
        num_taken_in = sum(column[3:6] in ("+1=", "-1=") for column in solution.split(" ")[:-1])
        right.setdefault((problem.facets[0], num_taken_in), []).append(row.response == solution)
        wrong_columns = [
            (mine, own)
            for mine, own in zip(row.response.split(" ")[:-1], solution.split(" ")[:-1], strict=True)
            if mine[:3] != own[:3] or int(mine[4]) > int(own[4])
        ]
        assert wrong_columns == []  # the digits are the problem's own, and no carry is invented
    for (_, num_taken_in), found in right.items():
        # Each is remembered with chance 0.3, on its own; what is forgotten can spare a later one.
        share = sum(found) / len(found)
        bound = 4 * 0.5 / len(found) ** 0.5
        assert share == pytest.approx(0.3**num_taken_in, abs=bound)
    assert {num for _, num in right} == {0, 1, 2}


def test_half_of_the_learners_demonstrations_carry_or_borrow(domain: Arithmetic) -> None:
    rows = domain.demonstrations(Role.LEARNER, rng=random.Random(0), num=2_000)
    hard = [problem.facets[2] != "0" for row in rows if (problem := domain.parse(row.problem)) is not None]
    assert len(hard) == 2_000
    assert sum(hard) / len(hard) == pytest.approx(0.5, abs=4 * 0.5 / 2_000**0.5)
