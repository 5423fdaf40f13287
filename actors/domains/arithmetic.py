"""Addition and subtraction with written-out columns: a world small enough to learn from nothing on a laptop.

A query is `347+586`. An answer works from the last column to the first and then states the result:

    7+6+0=13 4+8+1=13 3+5+1=09 0933

A column `x op y op c = kd` names both digits, the carry (or borrow) taken in, the carry given out `k` and the digit
`d`; in a subtraction `7-9-0=18` says: borrow one, the digit is 8. The result has one digit more than the operands. A
critique quotes each column and each digit of the result, works it out again from the query beside the quote, marks it
`y` or `n`, and ends with `P` when every mark is `y`, else `F`:

    7+6+0=13?7+6+0=13y4+8+0=12?4+8+1=13n1?1y2?3n3?3yF

Cells are operation x digits x carries. Four-digit problems are the out-of-distribution family. A *carry* count is a
property of the query, not of any answer.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from pydantic import Field, model_validator

from actors.domains import Checker, Demonstration, Domain, Problem, Role
from actors.records import Message, Split
from cluster.config import Config as BaseConfig

MAX_DIGITS = 6
QUERY = re.compile(rf"(\d{{1,{MAX_DIGITS}}})([+-])(\d{{1,{MAX_DIGITS}}})")
ANSWER = re.compile(r"((?:\d[+-]\d[+-]\d=\d\d )+)(\d+)")
FLAWS = (
    "carry_in",
    "carry_in",
    "carry_in",
    "left_digit",
    "right_digit",
    "column",
    "digit",
    "digit",
    "carry_out",
    "outcome",
    "outcome",
)
"""Kinds of planted flaws of a column; a kind that stands twice is drawn twice as often. `outcome` changes carry and
digit; half of the time as if no column could overflow (4-5-0=01)."""
FLAW_RATES = (0.15, 0.3, 0.5)
"""Chance of a flaw in each column; one of these is drawn for each flawed answer."""
INSTRUCTIONS = {
    Role.ATTACKER: (
        "You set arithmetic problems. You are given an operation, a number of digits and a number of carries, written "
        "without spaces: +32 asks for an addition of two 3-digit numbers in which exactly two columns carry, -21 for a "
        "subtraction of two 2-digit numbers, not below zero, with exactly one borrow. Vary the numbers. Reply with the "
        "problem alone, without a space.\n\nExample: +32\n{query}"
    ),
    Role.LEARNER: (
        "Work out the problem column by column, from the last digits to the first. Write each column as "
        "a+b+c=kd (or a-b-c=kd): the two digits, the carry or borrow taken in, the carry or borrow given out, the "
        "digit that results. Then write the result with one digit more than the numbers have, zeros in front. Reply "
        "with nothing else.\n\nExample: {query}\n{answer}"
    ),
    Role.CRITIC: (
        "You check arithmetic. The first line is a problem, the second an answer worked out column by column: digits, "
        "carry or borrow in, = carry or borrow out, digit. Go through its columns, then through each digit of its "
        "result. For each, quote it, write ?, work it out afresh from the problem, and write y if the two are equal, "
        "else n. At the end write P if all are y, else F. No spaces, nothing else.\n\nExample:\n{query}\n{flawed}"
        "\n{critique}"
    ),
}
"""What a model that was not bootstrapped here is told of a role; the examples' problem is one of the train split."""
EXAMPLE = (347, "+", 586)
EXAMPLE_FLAWED = "7+6+0=13 4+8+0=12 3+5+1=09 0923"
RESULT_ALONE_RATE = 0.35
"""Share of the flawed answers whose columns are right and whose result does not follow from them."""
RESULT_RIGHT_RATE = 0.25
"""Share of the answers with a flawed column that end in the right result: no mark must follow from another."""


class Config(BaseConfig):
    """Settings of the arithmetic domain."""

    digits: tuple[int, ...] = (2, 3)
    """Numbers of digits in scope; both operands have the same."""
    out_of_distribution_digits: tuple[int, ...] = (4,)
    """Numbers of digits that no role sees before evaluation."""
    hard_share: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the learner's demonstrations that carry or borrow; the others do neither."""
    forget_rate: float = Field(default=0.7, ge=0.0, le=1.0)
    """Chance with which the learner's teacher forgets a carry or borrow that a column takes in: its weakness."""
    critic_borrow_weight: float = Field(default=2.5, gt=0.0)
    """How much likelier a demonstration of the critic's is from a cell that borrows than from one that doesn't."""
    flawed_share: float = Field(default=0.6, ge=0.0, le=1.0)
    """Share of the critic's demonstrations whose answer carries a planted flaw."""
    instructions: bool = False
    """Explain each role's task and form in its prompt, with an example: for models that the bootstrap did not make."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        scopes = {"digits": self.digits, "out_of_distribution_digits": self.out_of_distribution_digits}
        for key, digits in scopes.items():
            if not digits or len(set(digits)) < len(digits) or not all(1 <= d <= MAX_DIGITS for d in digits):
                raise ValueError(
                    f"{key}: got {list(digits)}, wanted one or more different numbers of digits, each 1 to {MAX_DIGITS}"
                )
        both = sorted(set(self.digits) & set(self.out_of_distribution_digits))
        if both:
            raise ValueError(
                f"out_of_distribution_digits: got {list(self.out_of_distribution_digits)}, wanted none of digits = "
                f"{list(self.digits)}: {both[0]} digits would be trained on"
            )
        return self


def canonical_form(left: int, op: str, right: int) -> str:
    """Return the problem with its operands sorted where the operation commutes."""
    if op == "+":
        left, right = min(left, right), max(left, right)
    return f"{left}{op}{right}"


def split_of(canonical: str) -> Split:
    """Return the split of a canonical problem: 80 % train, 10 % probe, 10 % sealed, by its hash."""
    bucket = int.from_bytes(hashlib.sha256(f"arithmetic/{canonical}".encode()).digest()[:8], "big") % 10
    return Split.SEALED if bucket == 9 else Split.PROBE if bucket == 8 else Split.TRAIN


def count_carries(left: int, op: str, right: int) -> int:
    """Return in how many columns a carry (or a borrow) arises.

    >>> count_carries(347, "+", 586)
    2
    """
    carry = count = 0
    while left or right:
        column = left % 10 + right % 10 + carry if op == "+" else left % 10 - right % 10 - carry
        carry = int(column > 9 or column < 0)
        count += carry
        left, right = left // 10, right // 10
    return count


def write_answer(left: int, op: str, right: int) -> str:
    """Return the written-out answer.

    >>> write_answer(47, "+", 86)
    '7+6+0=13 4+8+1=13 133'
    >>> write_answer(52, "-", 19)
    '2-9-0=13 5-1-1=03 033'
    """
    return _write(left, op, right, flaws={}, rng=random.Random(0))


def write_forgetful_answer(left: int, op: str, right: int, *, rate: float, rng: random.Random) -> str:
    """Return an answer in which each carry or borrow that a column should take in was forgotten with chance `rate`.

    >>> write_forgetful_answer(47, "+", 86, rate=1.0, rng=random.Random(0))
    '7+6+0=13 4+8+0=12 123'
    """
    forgotten = {column: "forgotten" for column in range(len(str(left))) if rng.random() < rate}
    return _write(left, op, right, flaws=forgotten, rng=rng)


def write_flawed_answer(left: int, op: str, right: int, *, rng: random.Random) -> str:
    """Return an answer into which flaws of the kinds FLAWS were planted, and carried through.

    A plant can miss (two equal columns exchanged, say): the result may then be flawless, as a critique will say.
    """
    if rng.random() < RESULT_ALONE_RATE:
        *columns, result = write_answer(left, op, right).split(" ")
        return " ".join([*columns, _other_number(result, rng)])
    rate = rng.choice(FLAW_RATES)
    flaws: dict[int, str] = {}
    while not flaws:
        flaws = {column: rng.choice(FLAWS) for column in range(len(str(left))) if rng.random() < rate}
    *columns, result = _write(left, op, right, flaws=flaws, rng=rng).split(" ")
    if rng.random() < RESULT_RIGHT_RATE:
        result = write_answer(left, op, right).rsplit(" ", 1)[1]
    return " ".join([*columns, result])


def write_critique(left: int, op: str, right: int, answer: str) -> str:
    """Return the critique of an answer with as many parts as the right one: quote, recompute, mark; then the label.

    >>> write_critique(47, "+", 86, "7+6+0=13 4+8+0=12 123")
    '7+6+0=13?7+6+0=13y4+8+0=12?4+8+1=13n1?1y2?3n3?3yF'
    """
    parts = zip(_parts(answer), _parts(write_answer(left, op, right)), strict=True)
    marked = [f"{quote}?{mine}{'y' if quote == mine else 'n'}" for quote, mine in parts]
    return "".join(marked) + ("P" if all(mark.endswith("y") for mark in marked) else "F")


def _parts(answer: str) -> list[str]:
    """Return what a critique judges one by one: the columns, then the digits of the result."""
    *columns, result = answer.split(" ")
    return [*columns, *result]


class Arithmetic:
    """Addition and subtraction of equally long numbers."""

    name = "arithmetic"
    facet_names: tuple[str, ...] = ("operation", "digits", "carries")

    def __init__(self, config: Config) -> None:
        self._config = config

    def cells(self) -> list[tuple[str, ...]]:
        """Return the declared cells: additions with 0..d carries, subtractions with 0..d-1 borrows."""
        return _cells(self._config.digits)

    def out_of_distribution_cells(self) -> list[tuple[str, ...]]:
        """Return the cells of the families that are absent from training."""
        return _cells(self._config.out_of_distribution_digits)

    def parse(self, text: str) -> Problem | None:
        """Return the problem a text poses, or None when it poses none."""
        match = QUERY.fullmatch(text)
        if match is None:
            return None
        left, op, right = int(match[1]), match[2], int(match[3])
        if str(left) != match[1] or str(right) != match[3] or len(match[1]) != len(match[3]):
            return None
        if op == "-" and left < right:
            return None
        canonical = canonical_form(left, op, right)
        return Problem(
            text=text,
            canonical=canonical,
            facets=(op, str(len(match[1])), str(count_carries(left, op, right))),
            split=split_of(canonical),
            in_scope=len(match[1]) in self._config.digits,
        )

    def seeds(self, cell: tuple[str, ...], *, split: str, num: int, seed: int) -> list[Problem]:
        """Return `num` distinct problems of a cell and split, the same for the same seed.

        Raises:
            ValueError: the cell holds fewer than `num` problems of the split.
        """
        rng = random.Random(f"{seed}/{split}/{'/'.join(cell)}")
        found: dict[str, Problem] = {}
        for _ in range(400 * num + 20_000):
            if len(found) == num:
                break
            left, op, right = _draw(cell, rng)
            problem = self.parse(f"{left}{op}{right}")
            if problem is not None and problem.facets == cell and problem.split == split:
                found.setdefault(problem.canonical, problem)
        if len(found) < num:
            raise ValueError(
                f"evaluation: cell {'/'.join(cell)} holds {len(found)} {split} problems, wanted {num}; "
                "ask for fewer per cell"
            )
        return list(found.values())

    def attack_messages(self, cell: tuple[str, ...]) -> tuple[Message, ...]:
        """Return the prompt that asks the attacker for a query of a cell."""
        return (self._system(Role.ATTACKER), Message(role="user", content="".join(cell)))

    def learner_messages(self, text: str) -> tuple[Message, ...]:
        """Return the prompt that puts a query to the learner."""
        asked = Message(role="user", content=text)
        return (self._system(Role.LEARNER), asked) if self._config.instructions else (asked,)

    def well_formed(self, query: str, response: str) -> bool:
        """Return whether a response is one column per digit, then a number of one digit more."""
        problem, answer = self.parse(query), ANSWER.fullmatch(response)
        if problem is None or answer is None:
            return False
        digits = int(problem.facets[1])
        return answer[1].count(" ") == digits and len(answer[2]) == digits + 1

    def final_answer(self, query: str, response: str) -> str | None:
        """Return the last number of a well-formed response."""
        return response.rsplit(" ", 1)[-1] if self.well_formed(query, response) else None

    def demonstrations(self, role: Role, *, rng: random.Random, num: int, easy: bool = False) -> list[Demonstration]:
        """Return examples of a role's behaviour, from train problems in scope; easy ones have the fewest digits."""
        write = {
            Role.ATTACKER: self._attacker_demonstration,
            Role.LEARNER: self._learner_demonstration,
            Role.CRITIC: self._critic_demonstration,
        }[role]
        shortest = str(min(self._config.digits))
        cells = [cell for cell in self.cells() if not easy or cell[1] == shortest]
        return [write(cells, rng) for _ in range(num)]

    def critic_messages(self, query: str, response: str) -> tuple[Message, ...]:
        """Return the prompt that puts a query and a response to the critic."""
        return (self._system(Role.CRITIC), Message(role="user", content=f"{query}\n{response}"))

    def _system(self, role: Role) -> Message:
        """Return what opens a role's prompt: its control token, or instructions in words."""
        if not self._config.instructions:
            return Message(role="system", content=role)
        text = INSTRUCTIONS[role].format(
            query="".join(map(str, EXAMPLE)),
            answer=write_answer(*EXAMPLE),
            flawed=EXAMPLE_FLAWED,
            critique=write_critique(*EXAMPLE, EXAMPLE_FLAWED),
        )
        return Message(role="system", content=text)

    def _train_problem(self, cell: tuple[str, ...], rng: random.Random) -> tuple[int, str, int]:
        while True:
            left, op, right = _draw(cell, rng)
            problem = self.parse(f"{left}{op}{right}")
            if problem is not None and problem.facets == cell and problem.split == Split.TRAIN:
                return left, op, right

    def _attacker_demonstration(self, cells: Sequence[tuple[str, ...]], rng: random.Random) -> Demonstration:
        cell = rng.choice(cells)
        left, op, right = self._train_problem(cell, rng)
        query = f"{left}{op}{right}"
        return Demonstration(role=Role.ATTACKER, problem=query, messages=self.attack_messages(cell), response=query)

    def _learner_demonstration(self, cells: Sequence[tuple[str, ...]], rng: random.Random) -> Demonstration:
        easy = [cell for cell in cells if cell[2] == "0"]
        hard = [cell for cell in cells if cell[2] != "0"]
        cell = rng.choice(hard if hard and rng.random() < self._config.hard_share else easy)
        left, op, right = self._train_problem(cell, rng)
        return Demonstration(
            role=Role.LEARNER,
            problem=f"{left}{op}{right}",
            messages=self.learner_messages(f"{left}{op}{right}"),
            response=write_forgetful_answer(left, op, right, rate=self._config.forget_rate, rng=rng),
        )

    def _critic_demonstration(self, cells: Sequence[tuple[str, ...]], rng: random.Random) -> Demonstration:
        weights = [self._config.critic_borrow_weight if cell[0] == "-" and cell[2] != "0" else 1.0 for cell in cells]
        left, op, right = self._train_problem(rng.choices(cells, weights=weights)[0], rng)
        flawed = rng.random() < self._config.flawed_share
        answer = write_flawed_answer(left, op, right, rng=rng) if flawed else write_answer(left, op, right)
        return Demonstration(
            role=Role.CRITIC,
            problem=f"{left}{op}{right}",
            messages=self.critic_messages(f"{left}{op}{right}", answer),
            response=write_critique(left, op, right, answer),
        )


class ArithmeticChecker:
    """Truth for arithmetic: the last number of an answer."""

    def correct(self, query: str, response: str) -> bool:
        """Return whether the last word of a response is the right number."""
        match = QUERY.fullmatch(query)
        assert match is not None, f"the checker was asked about {query!r}, which is no arithmetic query"
        left, right = int(match[1]), int(match[3])
        wanted = left + right if match[2] == "+" else left - right
        result = response.rsplit(" ", 1)[-1]
        return result.isascii() and result.isdigit() and int(result) == wanted

    def solution(self, query: str) -> str:
        """Return the written-out answer of a query."""
        match = QUERY.fullmatch(query)
        assert match is not None, f"the checker was asked about {query!r}, which is no arithmetic query"
        return write_answer(int(match[1]), match[2], int(match[3]))

    def difficulty(self, query: str) -> float:
        """Return the number of columns plus the number of carries."""
        match = QUERY.fullmatch(query)
        assert match is not None, f"the checker was asked about {query!r}, which is no arithmetic query"
        return len(match[1]) + count_carries(int(match[1]), match[2], int(match[3]))


def make_domain(config: Config) -> Domain:
    """Return the domain with its settings."""
    return Arithmetic(config)


def make_checker(config: Config) -> Checker:
    """Return the domain's truth."""
    return ArithmeticChecker()


def _cells(digits: tuple[int, ...]) -> list[tuple[str, ...]]:
    return [(op, str(d), str(k)) for d in digits for op in ("+", "-") for k in range(d + 1 if op == "+" else d)]


def _draw(cell: tuple[str, ...], rng: random.Random) -> tuple[int, str, int]:
    """Return operands of a cell, digit by digit so that rare carry counts cost no more than common ones."""
    op, digits, carries = cell[0], int(cell[1]), int(cell[2])
    columns = range(digits) if op == "+" else range(digits - 1)
    carrying = set(rng.sample(columns, min(carries, len(columns))))
    left, right, carry = "", "", 0
    for column in range(digits):
        pairs = list(_column_pairs(op, carry, carries=column in carrying, leading=column == digits - 1))
        if not pairs:
            return _draw(cell, rng)
        x, y = rng.choice(pairs)
        left, right, carry = f"{x}{left}", f"{y}{right}", int(column in carrying)
    return int(left), op, int(right)


def _column_pairs(op: str, carry: int, *, carries: bool, leading: bool) -> Iterator[tuple[int, int]]:
    low = 1 if leading else 0
    for x in range(low, 10):
        for y in range(low, 10):
            column = x + y + carry if op == "+" else x - y - carry
            if (column > 9 or column < 0) == carries:
                yield x, y


def _write(left: int, op: str, right: int, *, flaws: Mapping[int, str], rng: random.Random) -> str:
    xs, ys = [int(c) for c in reversed(str(left))], [int(c) for c in reversed(str(right))]
    ys += [0] * (len(xs) - len(ys))
    carry, parts, digits = 0, [], []
    for column, (x, y) in enumerate(zip(xs, ys, strict=True)):
        flaw = flaws.get(column)
        if flaw == "carry_in":
            carry = 1 - carry
        elif flaw == "forgotten":
            carry = 0
        elif flaw == "left_digit":
            x = _other_digit(x, rng)
        elif flaw == "right_digit":
            y = _other_digit(y, rng)
        elif flaw == "column":
            x, y = rng.choice(xs), rng.choice(ys)
        total = x + y + carry if op == "+" else x - y - carry
        out, digit = (total // 10, total % 10) if op == "+" else (int(total < 0), total % 10)
        if flaw == "digit":
            digit = (digit + rng.choice((1, 9, 1, 9, 2, 8, 3, 5, 7))) % 10
        elif flaw == "carry_out":
            out = 1 - out
        elif flaw == "outcome":
            naive = rng.random() < 0.5
            out, digit = (0, abs(total) % 10) if naive else (rng.randrange(2), rng.randrange(10))
        parts.append(f"{x}{op}{y}{op}{carry}={out}{digit}")
        digits.append(digit)
        carry = out
    digits.append(carry if op == "+" else 0)
    return " ".join([*parts, "".join(str(d) for d in reversed(digits))])


def _other_digit(digit: int, rng: random.Random) -> int:
    return rng.choice([d for d in range(10) if d != digit])


def _other_number(number: str, rng: random.Random) -> str:
    """Return what a slip of the pen makes of a number: one or two digits changed, or two neighbours exchanged."""
    at = rng.randrange(len(number))
    if at > 0 and rng.random() < 0.3 and number[at] != number[at - 1]:
        return number[: at - 1] + number[at] + number[at - 1] + number[at + 1 :]
    changed = {at, rng.randrange(len(number))} if rng.random() < 0.4 else {at}
    return "".join(str(_other_digit(int(d), rng)) if i in changed else d for i, d in enumerate(number))
