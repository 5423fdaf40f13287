"""Owns how what a command found looks: a query's rows, a machine's checks, a run's plan.

On a terminal with colour and cut to its width, anywhere else plain and whole. Model text can hold control characters,
which a terminal would obey: there they are spelt out.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from decimal import Decimal
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.machine import gib

if TYPE_CHECKING:
    from cluster.doctor import Check
    from trainers.plan import Plan, Work

Format: TypeAlias = Literal["table", "csv", "json"]
"""How rows are written."""

MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failure": "[red]✗[/]"}


UPDATE_ROWS = {
    "pairs": "pairs",
    "judged": "judged answers",
    "samples": "scored answers",
    "groups": "groups",
    "accepted": "accepted answers",
}
"""What an update's rows are, by `trainers.feedback.training_data.Material`."""


def harmless(text: str) -> str:
    """Return a text with all that a terminal would obey spelt out: control and bidirectional characters; not line ends.

    >>> print(harmless("a\\x1b[2Jb"))
    a\\x1b[2Jb
    """
    return "".join(mark if mark.isprintable() or mark == "\n" else _spelt(mark) for mark in text)


def _spelt(mark: str) -> str:
    code = ord(mark)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _console(stream: TextIO) -> Console:
    """Return a console that neither wraps nor colours what does not go to a terminal."""
    live = stream.isatty()
    return Console(file=stream, highlight=False, soft_wrap=not live, width=None if live else 10_000)


def _show(stream: TextIO, *parts: RenderableType) -> None:
    """Write parts below one another, without the blanks that a table fills its lines with."""
    console = _console(stream)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    stream.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


@contextmanager
def redrawn(stream: TextIO) -> Iterator[Callable[[str], None]]:
    """Give what shows a text in the place of the last one on a terminal; elsewhere below it, when it differs."""
    if stream.isatty():
        with Live(console=_console(stream), auto_refresh=False) as live:
            yield lambda text: live.update(Text(harmless(text)), refresh=True)
        return
    shown = ""

    def draw(text: str) -> None:
        nonlocal shown
        if text != shown:
            stream.write(f"{text}\n")
            stream.flush()
        shown = text

    yield draw


# --------------------------------------------------------------------------------------------------------------- rows


def write_rows(
    stream: TextIO, columns: Sequence[str], rows: Iterator[tuple[Any, ...]], *, format: Format, max_rows: int
) -> None:
    """Write the rows of a query; a table shows the first `max_rows`, the other formats all."""
    live = stream.isatty()
    match format:
        case "table":
            _write_table(stream, columns, rows, max_rows=max_rows)
        case "csv":
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            for row in rows:
                cells = [_csv_cell(value) for value in row]
                writer.writerow([harmless(cell) for cell in cells] if live else cells)
        case "json":
            _write_json(stream, columns, rows, ascii_only=live)


def _write_table(stream: TextIO, columns: Sequence[str], rows: Iterator[tuple[Any, ...]], *, max_rows: int) -> None:
    shown = list(islice(rows, max_rows))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        numeric = any(isinstance(row[i], int | float | Decimal) for row in shown)
        table.add_column(_plain(name), justify="right" if numeric else "left", overflow="fold")
    for row in shown:
        table.add_row(*(_table_cell(value) for value in row))
    count = f"{len(shown):,} row{'s' * (len(shown) != 1)}"
    if next(rows, None) is not None:
        count = f"the first {count}; --format csv writes all of them, --max-rows {10 * max_rows} more"
    _show(stream, table, f"[dim]({count})[/]")


def _table_cell(value: Any) -> str:
    if value is None:
        return "[dim]NULL[/]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return _plain(_csv_cell(value))


def _csv_cell(value: Any) -> str:
    """Return a value as text: lists and tables as JSON, NULL as nothing."""
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=_json_value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _write_json(stream: TextIO, columns: Sequence[str], rows: Iterator[tuple[Any, ...]], *, ascii_only: bool) -> None:
    """Write a JSON list of objects, one on a line; NaN and infinities, which JSON lacks, as text."""
    stream.write("[")
    for number, row in enumerate(rows):
        item = dict(zip(columns, map(_finite, row), strict=True))
        text = json.dumps(item, ensure_ascii=ascii_only, allow_nan=False, default=_json_value)
        stream.write(f"{',' if number else ''}\n  {text}")
    stream.write("\n]\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return {name: _finite(item) for name, item in value.items()} if isinstance(value, dict) else value


def _json_value(value: Any) -> Any:
    """Return what JSON has for a value of DuckDB's: whole decimals are sums of whole numbers."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return str(value)


# ------------------------------------------------------------------------------------------------------------- checks


def write_check(stream: TextIO, check: Check) -> None:
    """Write a line for a check; what failed ends with its remedy."""
    remedy = f" · [bold]{_plain(check.remedy)}[/]" if check.remedy else ""
    _show(stream, f"{MARKS[check.state]} {_plain(check.name)}: {_plain(check.found)}{remedy}")


# --------------------------------------------------------------------------------------------------------------- plan


def plan_as_json(plan: Plan, *, config: Mapping[str, Any], problems: Sequence[str]) -> str:
    """Return a plan and its resolved config as one JSON object."""
    totals = {
        "cpus": plan.cpus,
        "gpus": plan.gpus,
        "memory_bytes": plan.memory_bytes,
        "disk_bytes": plan.disk_bytes,
    }
    whole = {"fits": not problems, **asdict(plan), "problems": list(problems), "totals": totals, "config": config}
    return json.dumps(whole, indent=2, ensure_ascii=True)


def write_plan(stream: TextIO, plan: Plan) -> None:
    """Write a plan: who runs where, with how much memory, what is made, and what is written."""
    _show(
        stream,
        f"● plan of {_plain(plan.name)}; nothing is started and nothing written",
        _indented(
            f"seed {plan.seed}, of the evaluation {plan.evaluation_seed}; regime {plan.regime}: {LABELS[plan.regime]}"
        ),
        _grid(_change_rows(plan)),
        "",
        _placement(plan),
        "",
        *(_indented(line) for line in _memory_lines(plan)),
        "",
        _grid(_work_rows(plan)),
        "",
        f"  it writes about {gib(plan.disk_bytes)} of the {gib(plan.free_disk_bytes)} that are free:",
        _grid(_file_rows(plan)),
        *([""] if plan.notes else []),
        *(f"{MARKS['warning']} {_plain(note)}" for note in plan.notes),
    )


LABELS = {
    "critic_expert": "labels from critic and experts alone",
    "gold": "computable truth may be a label",
}


def _change_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the settings that are not defaults, a row for each section."""
    sections: dict[str, list[str]] = {}
    for key, value in plan.changed.items():
        section, _, name = key.rpartition(".")
        if key not in ("name", "seed"):
            sections.setdefault(section, []).append(f"{name} = {value}")
    yield from ((_plain(section or "config"), _plain(" · ".join(said))) for section, said in sections.items())
    if not sections:
        yield "config", "all defaults"


def _placement(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "runs as", "model"):
        table.add_column(name, overflow="fold")
    for name in ("CPUs", "GPUs", "memory, estimate"):
        table.add_column(name, justify="right", no_wrap=True)
    for role in plan.roles:
        table.add_row(
            f"  {role.role}",
            f"{role.count} {role.unit}{'s' * (role.count != 1)}",
            f"{_plain(role.model.rstrip('/').split('/')[-1])}, {_parameters(role.num_parameters)}",
            f"{role.count * role.cpus:g}",
            f"{role.count * sum(role.gpus):g}" if role.gpus else "–",
            gib(role.memory_bytes),
        )
    for name, size_bytes in plan.shared_memory.items():
        table.add_row(f"  {name}", "", "", "", "", gib(size_bytes))
    table.add_row("  together", "", "", f"{plan.cpus:g}", f"{plan.gpus:g}", gib(plan.memory_bytes), style="bold")
    machine = plan.machine
    if machine is not None:
        has = (str(plan.num_cpus), str(len(machine.gpus)), gib(machine.memory_bytes))
        table.add_row("  there are", "", "", *has, style="bold")
        table.add_row("  free now", "", "", "", "", gib(machine.free_memory_bytes), style="bold")
    return table


def _memory_lines(plan: Plan) -> Iterator[str]:
    """Yield what one process of each role takes, roles that take the same in one line."""
    alike: dict[str, list[str]] = {}
    for role in plan.roles:
        threads = f"{role.threads} thread{'s' * (role.threads != 1)}"
        said = [_sum(role.memory), *role.notes, threads]
        if role.gpu_memory:
            gpus = "its GPU" if len(role.gpus) == 1 else f"each of its {len(role.gpus)} GPUs"
            said.insert(1, f"on {gpus} {_sum(role.gpu_memory)}")
        alike.setdefault(f": {'; '.join(said)}", []).append(f"{role.unit} of {role.role}")
    for text, names in alike.items():
        first, *others = names
        yield _plain(f"one {', '.join([first, *(name.split(' of ', 1)[1] for name in others)])}{text}")


def _indented(text: str) -> Padding:
    return Padding(text, (0, 0, 0, 2))


def _sum(parts: Mapping[str, int]) -> str:
    return f"{gib(sum(parts.values()))} = " + " + ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)


def _work_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    work = plan.work
    yield (
        "an iteration",
        f"{work.queries:,} queries → {work.responses:,} answers (≤ {work.response_tokens:,} tokens) → "
        f"{work.critiques:,} critiques (≤ {work.critique_tokens:,} tokens) → {_mended(work)}"
        f"≤ {work.rows:,} {UPDATE_ROWS[work.material]}, ≤ {work.optimizer_steps:,} optimizer steps; "
        f"≤ {work.expert_labels:,} expert labels",
    )
    rest = ", ".join(f"{size:,} {name}" for name, size in work.evaluation.items() if name != "probe")
    yield (
        "the run",
        f"{work.iterations} iterations; {work.evaluation['probe']:,} probe problems after each, {rest} problems at the "
        "start and the end",
    )


def _mended(work: Work) -> str:
    if not work.mended:
        return ""
    answers, tokens, critiques, critique_tokens = (
        f"{work.mended[name]:,}" for name in ("answers", "tokens", "critiques", "critique_tokens")
    )
    return f"≤ {answers} mended (≤ {tokens} tokens), ≤ {critiques} critiques of them (≤ {critique_tokens} tokens) → "


def _file_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    for file in plan.files:
        yield f"{'≤' if file.is_bound else '≈'} {gib(file.size_bytes)}", f"{_plain(file.path)}  {_plain(file.what)}"


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    """Return two columns, of which the second is wrapped."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for first, second in rows:
        table.add_row(f"  {first}", second)
    return table


def _parameters(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _plain(text: str) -> str:
    """Return a text as rich is to print it: no markup, nothing that the terminal obeys."""
    return escape(harmless(text))
