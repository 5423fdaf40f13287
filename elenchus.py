"""The command line: parses, calls, prints.

    elenchus demo                      the whole loop on this machine, on tiny models trained here
    elenchus run CONFIG.toml …         a run of your own
    elenchus resume NAME               go on after anything
    elenchus chat NAME                 talk to the current learner
    elenchus report NAME               write report.html anew

Exit codes: 0 done, 2 the user's input, 1 ours. Imports what a command needs only when it runs, so that help is quick.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn, Union

import tyro

if TYPE_CHECKING:
    from serve.console import RunConsole
    from trainers.progress import StopSignal
    from trainers.run_config import RunConfig
    from trainers.summary import Summary

Flags = Sequence[tuple[str, str]]

INTERRUPTED = 130
"""Exit code after a second Ctrl-C: neither the user's input nor ours."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Watch an attacker, a learner and a critic make a small model better, on this machine."""

    name: str = "demo"
    """The run's name."""
    seed: int = 0
    """Fixes every draw of the run."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a config: TOML files laid over one another left to right, then flags such as --critic.replicas 6."""

    configs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """TOML files; none runs the defaults."""
    name: str | None = None
    """The run's name, instead of the config's; by default the last file's name."""
    seed: int | None = None
    """Fixes every draw of the run, instead of the config's."""


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was stopped or killed."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""


@dataclass(frozen=True)
class Chat:
    """Talk to a run's newest learner; reads lines from a pipe too."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    max_tokens: int = 64
    """Longest answer, in tokens."""


@dataclass(frozen=True)
class Report:
    """Write a run's report.html from what it has measured so far."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""


COMMANDS = {"demo": Demo, "run": Run, "resume": Resume, "chat": Chat, "report": Report}
CONFIGURED = ("demo", "run")
"""Commands that take config flags."""

Command = Demo | Run | Resume | Chat | Report


class UsageError(ValueError):
    """What the user typed can't be done; the message says what can."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command, flags = parse(arguments)
        return execute(command, flags=flags)
    except ValueError as error:
        # The user's input, whoever noticed: one line for each thing that is wrong.
        for line in str(error).splitlines():
            print(f"✗ {line}", file=sys.stderr)
        if not _is_user_error(error):
            return _unexpected(error)
        return 2
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever it is, the user gets one line and a file
        return _unexpected(error)


if __name__ == "__main__":
    sys.exit(main())
