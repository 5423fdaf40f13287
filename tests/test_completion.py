"""Completion: the script that bash reads completes commands, flags, runs, files and config keys, in a real bash."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import elenchus
from serve.completion import completion_script

BASH = shutil.which("bash") or "bash"
COMMANDS = list(elenchus.COMMANDS)


@pytest.fixture(scope="module")
def script() -> str:
    """Give what `elenchus completion bash` prints."""
    program = "import sys, elenchus; sys.exit(elenchus.main(['completion', 'bash']))"
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert made.stderr == ""
    return made.stdout


@pytest.fixture
def here(tmp_path: Path, script: str) -> Path:
    """Give a folder with the script, two runs, one unfinished directory, and files."""
    (tmp_path / "complete.sh").write_text(script)
    for name in ("alpha", "beta-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "resolved.json").write_text("{}")
    (tmp_path / "runs" / "unfinished").mkdir()
    (tmp_path / "elsewhere" / "gamma").mkdir(parents=True)
    (tmp_path / "elsewhere" / "gamma" / "resolved.json").write_text("{}")
    (tmp_path / "qwen.toml").touch()
    (tmp_path / "qwen.txt").touch()
    return tmp_path


def completed(here: Path, *words: str) -> set[str]:
    """Return what bash offers for the last word of `elenchus words…`."""
    program = f"""
        source {here}/complete.sh
        COMP_WORDS=(elenchus "$@"); COMP_CWORD=$#
        _elenchus 2> /dev/null
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    command = [BASH, "--norc", "--noprofile", "-c", program, "bash", *words]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    offered = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here, env=environment)
    return set(offered.stdout.split("\n")) - {""}


def test_bash_registers_the_script(here: Path) -> None:
    command = [BASH, "--norc", "-c", f"source {here}/complete.sh; complete -p elenchus"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout == "complete -F _elenchus elenchus\n"
    assert told.stderr == ""


def test_commands_are_completed(here: Path) -> None:
    assert completed(here, "") >= set(COMMANDS)
    assert completed(here, "re") == {"resume", "report"}
    assert completed(here, "zz") == set()


@pytest.mark.parametrize("command", elenchus.NAMED)
def test_runs_are_completed_where_a_run_is_named(command: str, here: Path) -> None:
    assert completed(here, command, "") == {"alpha", "beta-2"}
    assert completed(here, command, "be") == {"beta-2"}
    assert completed(here, command, "--") >= {"--runs-dir", "--help"}


def test_runs_are_looked_for_where_the_user_says_they_are(here: Path) -> None:
    assert completed(here, "chat", "--runs-dir", "elsewhere", "") == {"gamma"}
    assert completed(here, "chat", "--max-tokens", "9", "al") == {"alpha"}
    assert "alpha" not in completed(here, "sql", "beta-2", "")
    # The flag may also stand behind the word that is completed.
    behind = f"source {here}/complete.sh; COMP_WORDS=(elenchus chat '' --runs-dir elsewhere); COMP_CWORD=2; _elenchus"
    told = subprocess.run([BASH, "-c", f"{behind}; echo ${{COMPREPLY[@]}}"], capture_output=True, text=True, cwd=here)
    assert told.stdout == "gamma\n"


def test_files_are_completed_where_a_config_is_read(here: Path) -> None:
    assert completed(here, "run", "qw") == {"qwen.toml"}
    assert completed(here, "plan", "") == {"qwen.toml", "runs", "elsewhere"}
    assert completed(here, "run", "qwen.toml", "--name", "x", "q") == {"qwen.toml"}


def test_config_keys_are_completed_as_flags(here: Path) -> None:
    assert completed(here, "run", "--critic.repl") == {"--critic.replicas"}
    assert {"--loss.beta", "--loss.kind"} <= completed(here, "plan", "qwen.toml", "--loss.")
    assert completed(here, "demo", "--") >= {"--seed", "--name", "--loop.iterations"}
    assert completed(here, "chat", "alpha", "--loop") == set()


def test_choices_of_a_flag_are_completed(here: Path) -> None:
    assert completed(here, "sql", "alpha", "--format", "") == {"table", "csv", "json"}
    assert completed(here, "completion", "") == {"bash", "zsh", "fish"}


def test_a_person_at_a_terminal_gets_the_word_completed(here: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(here)
        os.environ.update({"PS1": "$ ", "TERM": "dumb", "HISTFILE": "/dev/null"})
        os.execv(BASH, ["bash", "--norc", "--noprofile", "-i"])
    try:
        os.write(terminal, b"bind 'set enable-bracketed-paste off'; source ./complete.sh; echo rea''dy\n")
        _read_until(terminal, b"\nready")
        os.write(terminal, b"elenchus cha\t")
        assert b"elenchus chat " in _read_until(terminal, b"chat ")
        os.write(terminal, b"al\t")
        assert b"alpha " in _read_until(terminal, b"alpha ")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)


def _read_until(terminal: int, text: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 20
    while text not in seen.replace(b"\r\n", b"\n"):
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 4096)
    return seen.replace(b"\r\n", b"\n")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_script_that_knows_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert elenchus.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert {"zsh": "#compdef elenchus", "fish": "complete --no-files --command 'elenchus'"}[shell] in text
    assert all(f"'{command}'" in text for command in COMMANDS)


def test_an_unknown_shell_is_answered_with_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert elenchus.main(["completion", "ksh"]) == 2
    assert "bash" in capsys.readouterr().err


def test_the_other_shells_script_is_left_as_tyro_made_it() -> None:
    lists = dict.fromkeys(("named", "configured", "files", "shells", "keys"), ("a",))
    assert completion_script("x", shell="zsh", **lists) == "x"
    assert completion_script("x", shell="bash", **lists).startswith("x")
    assert "@" not in completion_script("x", shell="bash", **lists).replace("[@]", "").replace("{@}", "")
