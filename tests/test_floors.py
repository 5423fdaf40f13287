"""The floors of the house: a module imports only from its own folder or from one to its left."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("cluster", "actors", "trainers", "serve", "elenchus")
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "manager", "common", "base", "misc"}
# Where an engine may be imported, so that `import trainers.losses.dpo` costs none.
ENGINES = {
    "vllm": {"actors/engine.py", "serve/learner_engine.py"},
    "deepspeed": {"trainers/ranks/deepspeed_engine.py"},
}


def modules() -> list[Path]:
    found = [path for floor in FLOORS[:-1] for path in sorted((ROOT / floor).rglob("*.py"))]
    return [*found, ROOT / "elenchus.py"]


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import, those inside functions and `if TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def breaches(module: Path, *, source: str | None = None) -> list[str]:
    name = module.relative_to(ROOT)
    floor = FLOORS.index(name.parts[0].removesuffix(".py"))
    found = []
    for line, imported in imports(module.read_text(encoding="utf-8") if source is None else source):
        top = imported.split(".")[0]
        if imported.startswith("."):
            found.append(f"{name}:{line} imports {imported} relatively")
        elif top in FLOORS and FLOORS.index(top) > floor:
            found.append(f"{name}:{line} imports {imported}, which is to its right")
        elif top in ENGINES and name.as_posix() not in ENGINES[top]:
            found.append(f"{name}:{line} imports {imported}, wanted only in {', '.join(ENGINES[top])}")
        elif top == "tests":
            found.append(f"{name}:{line} imports {imported}")
    return found


def test_modules_import_leftward_only_and_engines_in_one_place() -> None:
    assert [breach for module in modules() for breach in breaches(module)] == []


@pytest.mark.parametrize(
    ("module", "source", "num"),
    [
        ("cluster/pool.py", "from actors.records import Query", 1),
        ("cluster/pool.py", "def f():\n    import trainers.driver", 1),
        ("trainers/driver.py", "from actors.records import Query\nfrom cluster.pool import Pool", 0),
        ("trainers/losses/dpo.py", "import vllm", 1),
        ("actors/engine.py", "from vllm import LLMEngine", 0),
        ("actors/engine.py", "from . import records", 1),
    ],
)
def test_a_breach_is_seen(module: str, source: str, num: int) -> None:
    assert len(breaches(ROOT / module, source=source)) == num


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [str(path) for path in modules() if path.stem in VAGUE_NAMES] == []


def test_no_folder_of_tests_bears_a_packages_name() -> None:
    assert [path.name for path in (ROOT / "tests").rglob("*") if path.is_dir() and path.name in FLOORS] == []


def test_print_belongs_to_the_command_line() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        if path.name != "elenchus.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_every_module_says_what_it_owns() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []
