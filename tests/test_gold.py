"""Truth is handed out for evaluation and to the simulated expert, counted; no other code can name it (SCIENCE §1)."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.domains import GoldLedger, Purpose
from actors.domains.arithmetic import ArithmeticChecker
from tests.small_records import make_query

ROOT = Path(__file__).resolve().parent.parent
TRUTH = re.compile(r"\w*Checker|GoldLedger|checker_for|make_checker|load_domain")
"""Names by which code can come to truth."""
MAY_NAME = {
    "actors/experts.py": {"Checker"},  # the simulated expert is given one
    "trainers/driver.py": {"GoldLedger", "checker_for"},
    "trainers/evaluation.py": {"LedgeredChecker"},
    "trainers/session.py": {"GoldLedger", "checker_for", "load_domain"},
}
MAY_ASK = {"actors/experts.py", "trainers/evaluation.py"}
"""Where a checker's answers may be asked for."""
MAY_HAND_OVER = {
    ("trainers/driver.py", "EVALUATION"): {"evaluate", "live_sample"},
    ("trainers/session.py", "EXPERT"): {"SimulatedExpert"},
}
"""Which purposes a module may name, and which functions may be handed the checker."""
MAY_NAME_SEALED = {"actors/records.py", "trainers/evaluation.py"}
MAY_NAME_JUDGED_ANSWERS = {"actors/records.py", "trainers/driver.py", "trainers/loop_state.py", "trainers/session.py"}
"""Where an evaluation's answers, judged by truth, may be named; reports come after the run and may name them too."""


# ----------------------------------------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize("regime", ["critic_expert", "gold"])
@pytest.mark.parametrize("purpose", [Purpose.EVALUATION, Purpose.EXPERT])
def test_truth_is_there_for_evaluation_and_experts_in_every_regime(regime: str, purpose: Purpose) -> None:
    gold = GoldLedger(ArithmeticChecker(), regime=regime)
    checker = gold.checker_for(purpose)
    assert checker.correct("47+86", "133")
    assert not checker.correct(make_query(text="47+86"), "134")
    assert gold.counts == Counter({purpose: 2})


@pytest.mark.parametrize("regime", ["critic_expert", "Gold", "", "anything"])
def test_supervision_by_truth_is_refused_outside_the_gold_regime(regime: str) -> None:
    gold = GoldLedger(ArithmeticChecker(), regime=regime)
    with pytest.raises(ValueError, match=f'supervision.regime: got "{regime}", wanted "gold"'):
        gold.checker_for(Purpose.SUPERVISION)
    assert gold.counts == Counter()


def test_the_gold_regime_admits_supervision_and_counts_it() -> None:
    gold = GoldLedger(ArithmeticChecker(), regime="gold")
    assert gold.checker_for(Purpose.SUPERVISION).correct("52-19", "33")
    assert gold.counts == Counter({"supervision": 1})


def test_uses_are_counted_by_purpose_over_all_checkers_that_were_handed_out() -> None:
    gold = GoldLedger(ArithmeticChecker(), regime="critic_expert")
    for _ in range(3):
        gold.checker_for(Purpose.EVALUATION).correct("47+86", "133")
    expert = gold.checker_for(Purpose.EXPERT)
    expert.correct("47+86", "no answer at all")
    # How hard a query is tells nothing of any answer.
    assert expert.difficulty(make_query(text="47+86")) == 4
    assert gold.counts == {"evaluation": 3, "expert": 1}


def test_handing_a_checker_out_counts_nothing() -> None:
    gold = GoldLedger(ArithmeticChecker(), regime="critic_expert")
    gold.checker_for(Purpose.EVALUATION)
    assert gold.counts == Counter()


# ------------------------------------------------------------------------------------------------------------- the code


def modules() -> list[str]:
    """Return every module of the house but the domains themselves, which own truth."""
    paths = [path for floor in ("cluster", "actors", "trainers", "serve") for path in (ROOT / floor).rglob("*.py")]
    names = [path.relative_to(ROOT).as_posix() for path in [*paths, ROOT / "elenchus.py"]]
    return sorted(name for name in names if not name.startswith("actors/domains/"))


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and identifier of whatever code names: variables, attributes, imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[-1]
                # Another name for it would hide every later use.
                if alias.asname and TRUTH.fullmatch(alias.name.split(".")[-1]):
                    yield node.lineno, f"{alias.name} as {alias.asname}"


def calls_in(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Yield every call with the last part of what it calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield node, function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def breaches(module: str, source: str) -> list[str]:
    """Return where a module comes nearer to truth than it may."""
    tree = ast.parse(source)
    found = []
    for line, name in names_in(tree):
        if (TRUTH.fullmatch(name) or " as " in name) and name not in MAY_NAME.get(module, set()):
            found.append(f"{module}:{line} names {name}")
        elif name == "SUPERVISION":
            found.append(f"{module}:{line} asks for truth as supervision")
        elif name == "SEALED" and module not in MAY_NAME_SEALED:
            found.append(f"{module}:{line} names the sealed split")
        elif name == "EvaluationAnswer" and module not in MAY_NAME_JUDGED_ANSWERS and not module.startswith("serve/"):
            found.append(f"{module}:{line} names answers that truth has judged")
    handed: set[ast.Call] = set()
    for call, function in calls_in(tree):
        if function in ("correct", "difficulty", "solution") and module not in MAY_ASK:
            found.append(f"{module}:{call.lineno} asks for truth")
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
            if isinstance(argument, ast.Call) and function in _receivers(module, argument):
                handed.add(argument)
    for call, function in calls_in(tree):
        if function == "checker_for" and call not in handed:
            found.append(f"{module}:{call.lineno} hands truth to something else than evaluation or an expert")
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and module != "trainers/session.py" and _loads_domain(node.value):
            target = node.targets[0]
            if not (isinstance(target, ast.Tuple) and getattr(target.elts[-1], "id", "") == "_"):
                found.append(f"{module}:{node.lineno} keeps the domain's checker")
    return found


def _receivers(module: str, call: ast.Call) -> set[str]:
    """Return what may be handed the checker of a `checker_for(Purpose.X)` call."""
    if not (isinstance(call.func, ast.Attribute) and call.func.attr == "checker_for" and len(call.args) == 1):
        return set()
    purpose = call.args[0]
    return MAY_HAND_OVER.get((module, purpose.attr), set()) if isinstance(purpose, ast.Attribute) else set()


def _loads_domain(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and getattr(value.func, "id", getattr(value.func, "attr", "")) == "load_domain"


def test_no_code_comes_nearer_to_truth_than_it_may() -> None:
    found = [line for name in modules() for line in breaches(name, (ROOT / name).read_text(encoding="utf-8"))]
    assert found == []


def test_the_exceptions_are_all_in_use() -> None:
    # A list of exceptions only shrinks: what is no longer needed leaves it.
    for module, names in MAY_NAME.items():
        assert names <= {name for _, name in names_in(ast.parse((ROOT / module).read_text(encoding="utf-8")))}, module


@pytest.mark.parametrize(
    ("module", "source", "num"),
    [
        ("actors/attacker.py", "from actors.domains import Domain, Problem", 0),
        ("actors/attacker.py", "from actors.domains import Checker", 1),
        ("actors/attacker.py", "from actors import domains\nx: domains.LedgeredChecker", 1),
        ("actors/critic.py", "from actors.domains.arithmetic import ArithmeticChecker as Helper", 2),
        ("actors/critic.py", "if gold.correct(query, text): pass", 1),
        ("actors/oversight.py", "from actors.records import EvaluationAnswer", 1),
        ("actors/attacks/new.py", "self.domain.difficulty(query)", 1),
        ("trainers/bootstrap.py", "rows = [checker.solution(query) for query in queries]", 1),
        ("trainers/feedback/preferences.py", "checker = gold.checker_for(Purpose.EVALUATION)", 2),
        ("trainers/bootstrap.py", "domain.seeds(cell, split=Split.SEALED, num=1, seed=0)", 1),
        ("trainers/driver.py", "live_sample(a, checker=self._gold.checker_for(Purpose.EVALUATION))", 0),
        ("trainers/driver.py", "build_pairs(a, checker=self._gold.checker_for(Purpose.EVALUATION))", 1),
        ("trainers/driver.py", "live_sample(a, checker=self._gold.checker_for(Purpose.EXPERT))", 1),
        ("trainers/driver.py", "live_sample(a, checker=self._gold.checker_for(Purpose.SUPERVISION))", 2),
        ("trainers/driver.py", "kept = self._gold.checker_for(Purpose.EVALUATION)", 1),
        ("trainers/session.py", "SimulatedExpert(gold.checker_for(Purpose.EXPERT), config=c)", 0),
        ("trainers/session.py", "domain, checker = load_domain(kind, config)", 0),
        ("serve/chat.py", "domain = domain_called(kind, config)", 0),
        ("serve/chat.py", "domain, truth = load_domain(kind, config)", 2),
        ("serve/report.py", "from actors.records import EvaluationAnswer", 0),
        ("serve/learner_app.py", "from actors.domains.arithmetic import make_checker", 1),
    ],
)
def test_a_breach_is_seen(module: str, source: str, num: int) -> None:
    assert len(breaches(module, source)) == num, breaches(module, source)
