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
import io
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeAlias

import tyro

if TYPE_CHECKING:
    from serve.console import RunConsole
    from trainers.progress import StopSignal
    from trainers.run_config import RunConfig
    from trainers.summary import Summary

Flags = Sequence[tuple[str, str]]

STDERR = 2
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
    version: str | None = None
    """A committed version of the policy, such as v3, instead of the newest."""
    max_tokens: int = 64
    """Longest answer, in tokens."""


@dataclass(frozen=True)
class Report:
    """Write a run's report.html from what it has measured so far."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""


COMMANDS: dict[str, type[Demo | Run | Resume | Chat | Report]] = {
    "demo": Demo,
    "run": Run,
    "resume": Resume,
    "chat": Chat,
    "report": Report,
}
CONFIGURED = ("demo", "run")
"""Commands that take config flags."""

Command: TypeAlias = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Resume, tyro.conf.subcommand("resume")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


class UsageError(ValueError):
    """What the user typed can't be done; the message says what can."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command, flags = parse(arguments)
        return execute(command, flags=flags)
    except BrokenPipeError:
        # Whoever read our output has left (`elenchus run --help | head`): nothing to tell and nobody to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - outermost: whatever it is, the user gets one line and where to read on
        return _explain(error)


# ---------------------------------------------------------------------- parsing


def parse(arguments: Sequence[str]) -> tuple[Command, Flags]:
    """Return the command and the config flags that the arguments say; `--help` prints and exits.

    Raises:
        UsageError: no or an unknown command, or an unknown flag; names the nearest.
    """
    name = arguments[0] if arguments else ""
    if name not in COMMANDS and name not in ("-h", "--help"):
        said = f'got "{name}"' if name else "got nothing"
        raise UsageError(f"command: {said}, wanted one of {', '.join(COMMANDS)}{_nearest(name, list(COMMANDS))}")
    rest, flags = split_flags(arguments) if name in CONFIGURED else (list(arguments), [])
    if name in COMMANDS:
        _refuse_unknown_flags(name, rest[1:])
        _refuse_repeated_flags(name, rest[1:], flags)
    if name in CONFIGURED and {"-h", "--help"} & set(rest):
        _print_keys()
    return _parsed(rest), flags


def _parsed(words: list[str]) -> Command:
    """Return what tyro makes of the words; its boxed complaint becomes one line.

    Raises:
        UsageError: a value is missing or is of the wrong type.
    """
    complaint = io.StringIO()
    description = "Train a model against an attacker and a critic. `elenchus COMMAND --help` says more."
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Command, prog="elenchus", description=description, args=words)
    except SystemExit as end:
        if end.code in (0, None):
            raise
    plain = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue())
    # The box is drawn in ASCII where the terminal knows no better.
    lines = [line.strip(" │|╭╰─+-╮╯") for line in plain.splitlines()[1:]]
    said = [line for line in lines if re.search(r"\w", line)]
    beside = ("For full helptext", "Argument helptext")
    kept = said[: next((i for i, line in enumerate(said) if line.startswith(beside)), None)]
    raise UsageError(f"{' '.join(kept)} · see elenchus {words[0]} --help")


def split_flags(arguments: Sequence[str]) -> tuple[list[str], Flags]:
    """Return the arguments without config flags, and those: `--a.b value`, `--a.b=value`, `a.b=value`.

    >>> split_flags(["run", "x.toml", "--critic.replicas", "6", "seed=3"])
    (['run', 'x.toml'], [('critic.replicas', '6'), ('seed', '3')])
    """
    rest: list[str] = []
    flags: list[tuple[str, str]] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        dotted = re.fullmatch(r"--(\w[\w-]*(?:\.[\w-]+)+)(?:=(.*))?", word, re.DOTALL)
        bare = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*)=(.*)", word, re.DOTALL)
        if bare:
            flags.append((bare[1], bare[2]))
        elif dotted is None:
            rest.append(word)
        elif dotted[2] is not None:
            flags.append((dotted[1], dotted[2]))
        else:
            has_value = left and not left[0].startswith("--")
            flags.append((dotted[1], left.pop(0) if has_value else "true"))
    return rest, flags


def _refuse_unknown_flags(name: str, words: Sequence[str]) -> None:
    """Raise UsageError for the first flag that a command does not have."""
    known = ["--help", *(f"--{field.name.replace('_', '-')}" for field in fields(COMMANDS[name]))]
    for word in words:
        flag = word.split("=", 1)[0].replace("_", "-")
        if word.startswith("--") and flag not in known:
            more = "; a config key is given in full, such as --critic.replicas 6" if name in CONFIGURED else ""
            near = _nearest(flag, known)
            raise UsageError(
                f"elenchus {name}: unknown flag {flag}{near or ', wanted one of ' + ', '.join(known)}{more}"
            )


def _refuse_repeated_flags(name: str, words: Sequence[str], flags: Flags) -> None:
    """Raise UsageError for the first thing that is said twice, such as `--seed 1 seed=2`: which one counts?"""
    said = [word[2:].split("=", 1)[0] for word in words if word.startswith("--")]
    counts = Counter(key.replace("-", "_") for key in [*said, *(key for key, _ in flags)])
    for key, times in counts.items():
        if times > 1:
            raise UsageError(f"elenchus {name}: got {key} {times} times on the command line, wanted it once")


def _print_keys() -> None:
    from cluster.config import describe
    from trainers.run_config import RunConfig

    print("Config keys, in TOML or as --section.key VALUE:\n")
    for doc in describe(RunConfig, defaults=RunConfig().model_dump(mode="json")):
        print(f"  {doc.key} = {doc.default}\n      {doc.meaning}")
    print()


def _nearest(word: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]}?" if nearest else ""


# ---------------------------------------------------------------------- commands


def execute(command: Command, *, flags: Flags) -> int:
    """Do what a command says and return the exit code."""
    match command:
        case Demo():
            return _run(paths=(), flags=[("name", json.dumps(command.name)), ("seed", str(command.seed)), *flags])
        case Run():
            return _run(paths=command.configs, flags=[*_run_flags(command), *flags])
        case Resume():
            return _resume(command)
        case Chat():
            return _chat(command)
        case Report():
            return _report(command)


def _run_flags(command: Run) -> Flags:
    flags = []
    if command.name is not None:
        flags.append(("name", json.dumps(command.name)))
    if command.seed is not None:
        flags.append(("seed", str(command.seed)))
    return flags


def _run(*, paths: Sequence[Path], flags: Flags) -> int:
    from trainers.preflight import machine_problems
    from trainers.run_config import load_run_config

    config = load_run_config(paths, flags=flags, check=machine_problems)
    from trainers import session

    toml = "\n".join(path.read_text(encoding="utf-8") for path in paths) or None
    return watched(config, lambda console, stop: session.run(config, progress=console, stop=stop, config_toml=toml))


def _resume(command: Resume) -> int:
    run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
    from trainers.preflight import check_resumable
    from trainers.run_config import read_resolved

    # Where the run is now: its directory may have been moved, or named from another folder.
    config = read_resolved(run_dir / "resolved.json").model_copy(update={"runs_dir": command.runs_dir})
    check_resumable(config, run_dir=run_dir)
    from trainers import session

    return watched(config, lambda console, stop: session.resume(config, progress=console, stop=stop))


def watched(config: RunConfig, sit: Callable[[RunConsole, StopSignal], Summary]) -> int:
    """Run a sitting under a console, a log file and Ctrl-C, and return the exit code."""
    from cluster.log import start_log
    from serve.console import RunConsole
    from serve.report import write_report
    from trainers.driver import Stopped
    from trainers.progress import StopSignal

    console, stop = RunConsole(sys.stdout), StopSignal()
    start_log(config.run_dir / "elenchus.log", console_level=None)
    try:
        with console, _stopping(stop, console=console, config=config):
            summary = sit(console, stop)
    except Stopped:
        print(f"stopped cleanly {_progress_made(config)}; continue with `elenchus resume {config.name}`")
        return 0
    except Exception as error:  # noqa: BLE001 - its trace goes to the run's own log file
        return _explain(error, log=config.run_dir / "elenchus.log")
    _print_summary(summary, report=write_report(config.run_dir))
    return 0


@contextlib.contextmanager
def _stopping(stop: StopSignal, *, console: RunConsole, config: RunConfig) -> Iterator[None]:
    """Let the first Ctrl-C ask for a clean stop and the second end the process at once."""

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            _leave(config)
        stop.request()
        # Written as is: the console's own lock may be held by the very frame that this handler interrupts.
        os.write(STDERR, b"\nstopping at the next safe point; Ctrl-C again to leave at once\n")

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(config: RunConfig) -> NoReturn:
    """End the process at once, saying what is saved; Ray's processes end with their parent."""
    text = f"\nleft at once {_progress_made(config)}; continue with `elenchus resume {config.name}`\n"
    os.write(STDERR, text.encode())
    os._exit(INTERRUPTED)


def _progress_made(config: RunConfig) -> str:
    """Return how far the run directory is, from the names of what is committed alone."""
    commits = (config.run_dir / "journal").glob("iteration=*/COMMIT.json")
    iterations = [int(path.parent.name.removeprefix("iteration=")) for path in commits]
    return f"after iteration {max(iterations)}" if iterations else "before the first commit"


def _print_summary(summary: Summary, *, report: Path) -> None:
    sealed, version = summary.sealed_accuracy, summary.policy_version
    print(f"✓ {version}: every replica's log-probs agree with the learner's to {summary.parity_max_abs_diff:.0e}")
    print(
        f"Sealed problems: {sealed.before:.0%} → {sealed.after:.0%} "
        f"(gain {sealed.gain:+.1%}, 95 % CI {sealed.ci_low:+.1%} to {sealed.ci_high:+.1%}) · "
        f"experts asked {summary.experts.fraction:.1%} · report {report}"
    )
    print(f"Next: elenchus chat {summary.run} · elenchus report {summary.run} · make test")


def _report(command: Report) -> int:
    run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
    from serve.report import write_report

    print(write_report(run_dir))
    return 0


def _chat(command: Chat) -> int:
    run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
    from serve.chat import load_learner

    learner = load_learner(run_dir, version=command.version)
    print(f"● {command.name} {learner.version}: ask, or end with Ctrl-D", file=sys.stderr)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if question:
            print(_harmless(learner.answer(question, max_tokens=command.max_tokens)))


def _harmless(text: str) -> str:
    """Return a model's text with control characters spelt out, which a terminal would obey."""
    return "".join(mark if mark.isprintable() or mark == "\n" else f"\\x{ord(mark):02x}" for mark in text)


def _run_dir(name: str, *, runs_dir: Path) -> Path:
    """Return a run's directory.

    Raises:
        UsageError: there is no such run; names those that exist.
    """
    found = runs_dir / name
    if "/" not in name and name not in (".", "..") and (found / "resolved.json").is_file():
        return found
    names = sorted(path.parent.name for path in runs_dir.glob("*/resolved.json"))
    wanted = f"wanted one of {', '.join(names)}" if names else "and there is none yet: make one by `elenchus demo`"
    raise UsageError(f'run: got "{name}", which is not in {runs_dir}, {wanted}{_nearest(name, names)}')


# ---------------------------------------------------------------------- failures


def _explain(error: BaseException, *, log: Path | None = None) -> int:
    """Say in a line (or one for each config error) what went wrong, and return the exit code."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if _is_the_users(error):
        for line in str(error).splitlines():
            print(f"✗ {line}", file=sys.stderr)
        return 2
    path = log or Path(tempfile.mkdtemp(prefix="elenchus-")) / "elenchus.log"
    with path.open("a", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    said = " ".join(str(error).split())[:200]
    print(f"✗ {type(error).__name__}: {said} · the trace is in {path}", file=sys.stderr)
    return 1


def _is_the_users(error: BaseException) -> bool:
    """Whether an error is about what the user wrote: a ValueError that our own code raised, not a library."""
    if not isinstance(error, ValueError):
        return False
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    home = Path(__file__).resolve().parent
    raised_in = Path(last.tb_frame.f_code.co_filename).resolve() if last is not None else home
    return raised_in.is_relative_to(home) and not raised_in.is_relative_to(home / ".venv")


if __name__ == "__main__":
    sys.exit(main())
