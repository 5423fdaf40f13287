"""Whatever a config file and the flags hold, the answer is a config or lines that a person can read.

10,000 cases take about a minute of one core and are among the slow tests; 1,000 are among the fast ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import elenchus
from cluster.config import ConfigError, describe
from trainers.run_config import RunConfig, load_run_config

MAX_LINE = 500
"""Characters of one message."""
MAX_CPU_S = 2.0
"""Of one case: no input may take longer."""

DEFAULTS = RunConfig().model_dump(mode="json")
KEYS = sorted({doc.key for doc in describe(RunConfig, defaults=DEFAULTS)})
PARTS = sorted({part for key in KEYS for part in key.split(".")})


def absent_sections(values: Mapping[str, Any], *, path: str = "") -> Iterator[str]:
    """Yield the beginnings of the keys of sections that are not there by default."""
    for key, value in values.items():
        if value is None:
            yield f"{path}{key}."
        elif isinstance(value, dict):
            yield from absent_sections(value, path=f"{path}{key}.")


ABSENT = tuple(absent_sections(DEFAULTS))
VALID = "".join(
    f"{doc.key} = {doc.default}\n"
    for doc in describe(RunConfig, defaults=DEFAULTS)
    # A loss has one kind at a time, TOML has no null, and a section that is absent by default is not for every run.
    if doc.default != "null"
    and (doc.meaning.startswith(f"({DEFAULTS['loss']['kind']})") or not doc.meaning.startswith("("))
    and not doc.key.startswith(ABSENT)
)
"""A config with every key at its default."""

ODD_NUMBERS = [
    "0", "-0.0", "nan", "-inf", "1e400", "-1e-400", "9223372036854775807", "9223372036854775808",
    "0xffffffffffffffffff", "1_0", "1__0", "9" * 400, "9" * 5000, "0b" + "1" * 300, "1e", "+1", "007", ".5", "5.",
]  # fmt: skip
ODD_TEXTS = [
    '"${HOME}"', '"${NO_SUCH_VARIABLE}"', '"${}"', '"$HOME"', '"\\u0000"', '"\\n"', '"\\ud800"', '"\\U0010ffff"',
    '"\\u2028\\u202e"', '"' + "x" * 3000 + '"', "'''\n'''", '"""\n"', '"hf_' + "a1" * 20 + '"', '"bootstrap"', '"dpo"',
    '"/dev/null"', '"../../.."', "''", '"true"', "2026-01-01", "07:32:00", "1979-05-27T00:32:00.999999-07:00",
]  # fmt: skip
NESTED = [f"{'[' * depth}{']' * depth}" for depth in (1, 40, 400, 3000)]
NESTED += [f"{'{a=' * depth}1{'}' * depth}" for depth in (1, 40, 400, 3000)]

SCALARS = (
    st.sampled_from(["true", "false", *ODD_NUMBERS, *ODD_TEXTS, *NESTED])
    | st.integers(-3, 300).map(str)
    | st.floats().map(repr)
    | st.text(max_size=12).map(lambda text: json.dumps(text, ensure_ascii=False))
)
PLAIN = (
    st.sampled_from(
        ["true", "false", "0", "1", "0.5", "-1", "7", '"x"', '"bf16"', '"cuda"', '"muon"', "[]", "{}", "[2]"]
    )
    | st.integers(-3, 300).map(str)
    | st.floats(0, 2).map(repr)
)
"""Values that are TOML, and that some key takes."""
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(st.sampled_from(PARTS), inner, max_size=3).map(
            lambda table: "{" + ", ".join(f"{key} = {value}" for key, value in table.items()) + "}"
        )
    ),
    max_leaves=5,
)
NAMES = (
    st.sampled_from(KEYS)
    | st.sampled_from([key.rsplit(".", 1)[0] for key in KEYS])
    | st.sampled_from(["api_key", "ray.token", "loss.kind", "a." * 60 + "a", '"a b"', '""', '"\\u2028"', '"\\n"'])
    | st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)
    | st.text(max_size=80).map(lambda text: json.dumps(text, ensure_ascii=False))
)
PLAIN_FILES = st.dictionaries(st.sampled_from(KEYS), PLAIN, min_size=1, max_size=8).map(
    lambda values: "".join(f"{key} = {value}\n" for key, value in values.items())
)
LINES = st.tuples(NAMES, VALUES).map(lambda pair: f"{pair[0]} = {pair[1]}\n") | NAMES.map(lambda name: f"[{name}]\n")


@st.composite
def spoilt(draw: st.DrawFn) -> str:
    """Draw a config with every key that is sound but for a few lines or characters."""
    lines = VALID.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["plain", "plain", "plain", "odd", "line", "twice", "cut", "mark"])):
            case "plain":
                lines[at] = f"{lines[at].split('=', 1)[0]}= {draw(PLAIN)}\n"
            case "odd":
                lines[at] = f"{lines[at].split('=', 1)[0]}= {draw(VALUES)}\n"
            case "line":
                lines[at] = draw(LINES)
            case "twice":
                lines.append(lines[at])
            case "cut":
                lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
            case "mark":
                position = draw(st.integers(0, len(lines[at])))
                lines[at] = lines[at][:position] + draw(st.characters()) + lines[at][position:]
    return "".join(lines)


# A lone surrogate can't be written as UTF-8: its bytes are, as a broken editor would.
FILES = st.one_of(
    PLAIN_FILES.map(str.encode),
    PLAIN_FILES.map(str.encode),
    st.lists(LINES, max_size=3).map("".join).map(lambda text: text.encode(errors="surrogatepass")),
    spoilt().map(lambda text: text.encode(errors="surrogatepass")),
    spoilt().map(lambda text: text.encode(errors="surrogatepass")),
    st.binary(max_size=80) | st.text(alphabet="[]{}\"'=.#\\\n\t\r ab1-+_:", max_size=80).map(str.encode),
)
FLAGS = st.lists(
    st.tuples(
        st.sampled_from(["--", ""]),
        st.sampled_from(KEYS) | st.lists(st.sampled_from(PARTS), max_size=4).map(".".join),
        VALUES,
    ).map(lambda parts: f"{parts[0]}{parts[1]}={parts[2]}")
    | st.text(max_size=20).filter(lambda word: not word.startswith("-")),
    max_size=3,
)


def answer(path: Path, data: bytes, words: list[str]) -> list[str]:
    """Return what is said to a config file and flags; nothing when they make a config, which reads back as it is."""
    path.write_bytes(data)
    try:
        _, flags = elenchus.split_flags(words)
        config = load_run_config([path], flags=flags)
    except ConfigError as error:
        return str(error).split("\n")
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    return []


def check(folder: Path, data: bytes, words: list[str]) -> None:
    began = time.process_time()
    lines = answer(folder / "a.toml", data, words)
    assert time.process_time() - began < MAX_CPU_S
    for line in lines:
        assert line.splitlines() == [line], "one line, whatever Unicode takes for a line's end"
        assert line.encode(), "no lone surrogate, which no terminal shows"
        assert len(line.replace(f"{folder}/", "")) < MAX_LINE, line[:300]
        assert "Traceback" not in line
        assert ": " in line, "where, and what"


SETTINGS = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
}


@settings(max_examples=1_000, **SETTINGS)
@given(FILES, FLAGS)
def test_whatever_is_configured_is_a_config_or_readable_lines(tmp_path: Path, data: bytes, words: list[str]) -> None:
    check(tmp_path, data, words)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=10_000, **SETTINGS)
@given(FILES, FLAGS)
def test_ten_thousand_configs_are_configs_or_readable_lines(tmp_path: Path, data: bytes, words: list[str]) -> None:
    check(tmp_path, data, words)


@settings(max_examples=200, **SETTINGS)
@given(
    st.sampled_from(["run", "demo", "resume", "chat", "report"]),
    st.lists(
        st.sampled_from(
            ["--seed", "--name=", "--runs-dir", "--version", "7", "-1", "x", "--", "-", "--=", "=", "--a.b"]
        )
        | st.text(max_size=10),
        max_size=4,
    ).filter(lambda words: not {"-h", "--help"} & set(words)),
)
def test_whatever_is_typed_is_a_command_or_one_line(name: str, words: list[str]) -> None:
    try:
        elenchus.parse([name, *words])
    except elenchus.UsageError as error:
        assert str(error).splitlines() == [str(error)]  # noqa: PT017 - other words are a command, and that is right too
        assert "Traceback" not in str(error)  # noqa: PT017


def test_the_config_that_is_spoilt_is_sound(tmp_path: Path) -> None:
    assert answer(tmp_path / "a.toml", VALID.encode(), []) == []
