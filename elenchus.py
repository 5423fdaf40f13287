"""The command line: parses, calls, prints.

    elenchus demo                      the whole loop on this machine, on tiny models trained here
    elenchus run CONFIG.toml …         a run of your own
    elenchus resume NAME               go on after anything
    elenchus chat NAME                 talk to the current learner
    elenchus report NAME               write report.html anew
    elenchus export NAME …             the learner at one trade-off, of a run that is trained for all
    elenchus plan CONFIG.toml …        what a run would take and write, and whether it fits; starts nothing
    elenchus doctor                    what is wrong with this machine, and the command that mends it
    elenchus sql NAME "select …"       query what a run has recorded
    elenchus scale critic 4 --run NAME replicas for a role, while the run goes on
    elenchus serve NAME                the newest committed learner behind an endpoint; promote, rollback, key
    elenchus submit CONFIG.toml --address URL  the run as a job of a Ray cluster
    elenchus watch NAME                how a run stands, and what holds it up; status says it once
    elenchus logs NAME                 what a run has logged
    elenchus stop NAME                 end a run where nothing is lost
    elenchus list                      the runs there are
    elenchus manifest NAME --kuberay   what Kubernetes is to be told to run it
    elenchus completion bash           completion for your shell

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
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeAlias

import tyro

from serve.exporting import Export
from serve.serving_commands import Key, Promote, Rollback, Serve

if TYPE_CHECKING:
    from cluster.jobs import Job, Jobs
    from serve.console import RunConsole
    from serve.run_endpoint import RunEndpoint
    from trainers.progress import StopSignal
    from trainers.run_config import RunConfig
    from trainers.summary import Summary

Flags = Sequence[tuple[str, str]]

STDERR = 2
SUBMISSION_WATCHED_S = 60.0
"""How long `submit` waits for a job to say that it has begun, or why it can't."""
WAITING_WATCHED_S = 20.0
"""The same for one that waits for room; it goes on waiting."""
WATCHED_BACK_S = 15.0
"""A job's log is told from its beginning: states older than this are passed over."""
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
    """The run's name, instead of the config's, "run" by default."""
    seed: int | None = None
    """Fixes every draw of the run, instead of the config's."""


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was stopped or killed."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    address: str | None = None
    """Dashboard of the Ray cluster that the run was submitted to; goes on there, as a job."""
    token_path: Path | None = None
    """File of that cluster's token; by default RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    python: str | None = None
    """Python of the cluster's head node that has the requirements; by default the one it was submitted with."""


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Run a config as a job of a Ray cluster, and return when it has begun. A run that is alive is left alone."""

    configs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """TOML files; none runs the defaults."""
    address: str
    """The cluster's dashboard, such as http://10.0.0.1:8265."""
    name: str | None = None
    """The run's name, instead of the config's, "run" by default."""
    seed: int | None = None
    """Fixes every draw of the run, instead of the config's."""
    token_path: Path | None = None
    """File of the cluster's token; by default RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    python: str = "python"
    """Python of the cluster's head node that has the requirements."""


@dataclass(frozen=True)
class Status:
    """Say how a run stands, once."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    address: str | None = None
    """Dashboard of the Ray cluster that the run was submitted to; without it, runs of this machine."""
    token_path: Path | None = None
    """File of the cluster's token; by default RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""


@dataclass(frozen=True)
class Watch:
    """Show how a run stands until it ends: iterations, pools, the bottleneck and what widens it. Ctrl-C only leaves."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    address: str | None = None
    """Dashboard of the Ray cluster that the run was submitted to; without it, runs of this machine."""
    token_path: Path | None = None
    """File of the cluster's token; by default RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""


@dataclass(frozen=True)
class Logs:
    """Print what a run has logged, without its state lines."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    address: str | None = None
    """Dashboard of the Ray cluster that the run was submitted to; without it, runs of this machine."""
    token_path: Path | None = None
    """File of the cluster's token; by default RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""


@dataclass(frozen=True)
class Stop:
    """Stop a run as Ctrl-C does, at a point where nothing is lost, and wait for it.

    On this machine a second stop is a second Ctrl-C: it ends the run at once.
    """

    name: tyro.conf.Positional[str]
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    address: str | None = None
    """Dashboard of the Ray cluster that the run was submitted to; without it, runs of this machine."""
    token_path: Path | None = None
    """File of the cluster's token; by default RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    timeout_s: float = 600.0
    """How long to wait for the end; the request stands all the same."""


@dataclass(frozen=True)
class ListRuns:
    """List the runs of this machine, or a cluster's jobs."""

    runs_dir: Path = Path("runs")
    """Where runs are."""
    address: str | None = None
    """Dashboard of a Ray cluster, whose jobs are listed instead."""
    token_path: Path | None = None
    """File of the cluster's token; by default RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""


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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show what a run of a config would take and write, and whether it fits here. Starts nothing.

    Exit code 2 when something does not fit.
    """

    configs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """TOML files; none plans the defaults."""
    name: str | None = None
    """The run's name, instead of the config's."""
    seed: int | None = None
    """Fixes every draw of the run, instead of the config's."""
    out: Path | None = None
    """Write the resolved config, with every key, to this JSON file."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the plan and the resolved config as JSON."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine: versions, memory, compiler, shared memory, disk, limits, network, environment.

    Exit code 1 when a check fails; its line ends with the command that mends it.
    """

    runs_dir: Path = Path("runs")
    """Where runs will be; checked for durable writes."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the checks as JSON."""


@dataclass(frozen=True)
class Sql:
    """Query a run's committed journal, metrics and expert labels by SQL (DuckDB's). Reads only."""

    name: tyro.conf.Positional[str]
    """The run's name."""
    query: tyro.conf.Positional[str | None] = None
    """What to run, in quotes; without it, the tables there are and their columns."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    format: Literal["table", "csv", "json"] = "table"
    """How rows are written."""
    max_rows: int = 40
    """Rows that a table shows; csv and json write all."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Set how many replicas a role's pool is to have, at once, or when the run is resumed. Does not wait for them."""

    role: tyro.conf.Positional[Literal["attacker", "rollouts", "critic"]]
    """Whose pool."""
    replicas: tyro.conf.Positional[str]
    """How many, 1 or more; "auto" leaves it to the config again."""
    run: str
    """The run's name."""
    runs_dir: Path = Path("runs")
    """Where runs are."""
    address: str | None = None
    """Dashboard of the Ray cluster that the run was submitted to; without it, a run of this machine."""
    token_path: Path | None = None
    """File of the cluster's token; by default RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Print what Kubernetes is to be told to begin a run of a config, or to go on with a run. Starts nothing.

    For KubeRay: a RayJob whose pods are sized as `elenchus plan` counts; or a RayService that serves a run's learner.
    docs/cluster.md says what the cluster needs.
    """

    what: tyro.conf.Positional[tuple[str, ...]] = ()
    """TOML files of a new run, or the name of one that is to go on; none begins a run of the defaults."""
    kuberay: tyro.conf.FlagCreatePairsOff[bool] = False
    """For KubeRay; must be said."""
    endpoint: tyro.conf.FlagCreatePairsOff[bool] = False
    """A RayService that serves the run of that name, in the place of a RayJob."""
    name: str | None = None
    """A new run's name, instead of the config's."""
    seed: int | None = None
    """Fixes every draw of a new run, instead of the config's."""
    runs_dir: Path = Path("runs")
    """Where runs are, of which one is to go on."""
    image: str | None = None
    """Name of the container image; by default the one that docker/ builds for the config's devices."""
    volume_claim: str = "elenchus"
    """PersistentVolumeClaim that all pods can write to; /data in every pod, from where relative paths count."""
    max_critics: int | None = None
    """Most critics that the cluster may grow for; by default critic.autoscale.max, or twice those of the start."""


@dataclass(frozen=True)
class Completion:
    """Print the script by which your shell completes elenchus.

    bash: add `source <(elenchus completion bash)` to ~/.bashrc. zsh: `elenchus completion zsh > ~/.zfunc/_elenchus`, a
    folder of your fpath. fish: `elenchus completion fish > ~/.config/fish/completions/elenchus.fish`.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Your shell."""


COMMANDS: dict[
    str,
    type[
        Demo
        | Run
        | Resume
        | Submit
        | Status
        | Watch
        | Logs
        | Stop
        | ListRuns
        | Chat
        | Serve
        | Promote
        | Rollback
        | Key
        | Export
        | Report
        | Plan
        | Doctor
        | Sql
        | Scale
        | Manifest
        | Completion
    ],
] = {
    "demo": Demo,
    "run": Run,
    "resume": Resume,
    "submit": Submit,
    "status": Status,
    "watch": Watch,
    "logs": Logs,
    "stop": Stop,
    "list": ListRuns,
    "chat": Chat,
    "serve": Serve,
    "promote": Promote,
    "rollback": Rollback,
    "key": Key,
    "export": Export,
    "report": Report,
    "plan": Plan,
    "doctor": Doctor,
    "sql": Sql,
    "scale": Scale,
    "manifest": Manifest,
    "completion": Completion,
}
CONFIGURED = ("demo", "run", "submit", "plan", "manifest")
"""Commands that take config flags."""
ADDRESSED = ("resume", "status", "watch", "logs", "stop", "list", "scale")
"""Commands about a run of this machine, or of the cluster whose address is given."""
NAMED = (
    "resume",
    "status",
    "watch",
    "logs",
    "stop",
    "chat",
    "report",
    "sql",
    "serve",
    "promote",
    "rollback",
    "key",
    "export",
)
"""Commands whose first word is a run's name."""

Command: TypeAlias = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Resume, tyro.conf.subcommand("resume")]
    | Annotated[Submit, tyro.conf.subcommand("submit")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Watch, tyro.conf.subcommand("watch")]
    | Annotated[Logs, tyro.conf.subcommand("logs")]
    | Annotated[Stop, tyro.conf.subcommand("stop")]
    | Annotated[ListRuns, tyro.conf.subcommand("list")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Promote, tyro.conf.subcommand("promote")]
    | Annotated[Rollback, tyro.conf.subcommand("rollback")]
    | Annotated[Key, tyro.conf.subcommand("key")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Sql, tyro.conf.subcommand("sql")]
    | Annotated[Scale, tyro.conf.subcommand("scale")]
    | Annotated[Manifest, tyro.conf.subcommand("manifest")]
    | Annotated[Completion, tyro.conf.subcommand("completion")]
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
    except KeyboardInterrupt:
        print("\ninterrupted; what was asked of a run stands", file=sys.stderr)
        return INTERRUPTED
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
        _refuse_exclusive_flags(name, rest[1:])
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
    lines = [line.strip(" │|╭╰─+╮╯") for line in plain.splitlines()[1:]]
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


def _refuse_exclusive_flags(name: str, words: Sequence[str]) -> None:
    """Raise UsageError for flags that mean different places, and for a cluster's without the cluster."""
    said = [word.split("=", 1)[0].replace("_", "-") for word in words if word.startswith("--")]
    if name in ADDRESSED and "--address" in said and "--runs-dir" in said:
        raise UsageError(
            f"elenchus {name}: got --address and --runs-dir, wanted one of them: the cluster's job knows where its run "
            "is; without --address it is a run of this machine"
        )
    lonely = [flag for flag in ("--token-path", "--python") if flag in said and "--address" not in said]
    if lonely:
        raise UsageError(
            f"elenchus {name}: got {lonely[0]} without --address, wanted both: give the dashboard of the cluster that "
            "it is for"
        )


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
        case Submit():
            return _submit(command, flags=flags)
        case Watch():
            return _watch(command)
        case Logs():
            return _logs(command)
        case Stop():
            return _stop(command)
        case Status():
            return _status(command)
        case ListRuns():
            return _list(command)
        case Chat():
            return _chat(command)
        case Serve() | Promote() | Rollback() | Key():
            return _serving(command)
        case Export():
            return _export(command)
        case Report():
            return _report(command)
        case Plan():
            return _plan(command, flags=flags)
        case Doctor():
            return _doctor(command)
        case Sql():
            return _sql(command)
        case Scale():
            return _scale(command)
        case Manifest():
            return _manifest(command, flags=flags)
        case Completion():
            return _completion(command)


def _run_flags(command: Run | Submit | Plan | Manifest) -> Flags:
    flags = []
    if command.name is not None:
        flags.append(("name", json.dumps(command.name)))
    if command.seed is not None:
        flags.append(("seed", str(command.seed)))
    return flags


def _run(*, paths: Sequence[Path], flags: Flags) -> int:
    from trainers.preflight import machine_problems
    from trainers.run_config import load_run_config

    config = load_run_config(
        paths, flags=flags, check=lambda config: (*machine_problems(config), *_serving_problems(config))
    )
    # Before Ray: in a virtual environment behind a symbolic link torch's MKL can't be loaded after it (2.13, Ray 2.60).
    from trainers import session

    _await_room(config)
    toml = "\n".join(path.read_text(encoding="utf-8") for path in paths) or None

    def sit(console: RunConsole, stop: StopSignal) -> Summary:
        endpoint = _own_endpoint(config, console=console)
        return session.run(config, progress=console, stop=stop, config_toml=toml, companion=endpoint)

    return watched(config, sit)


def _serving_problems(config: RunConfig) -> Iterator[str]:
    """Yield what stands against the endpoint that a run is to have of its own."""
    if config.serve.enabled:
        from serve.run_endpoint import serving_problems

        yield from serving_problems(config)


def _own_endpoint(config: RunConfig, *, console: RunConsole) -> RunEndpoint | None:
    """Return the endpoint that a run's config asks for; None when it does not."""
    if not config.serve.enabled:
        return None
    from serve.front import front_environment
    from serve.run_endpoint import RunEndpoint

    os.environ.update(front_environment(config.serve))  # before Ray starts: its processes inherit it
    return RunEndpoint(config, note=console.note)


def _await_room(config: RunConfig) -> None:
    """Wait for room on the cluster that a run will join, before its directory is made.

    Raises:
        ConfigError: there is none, or not in time.
    """
    import asyncio

    from cluster.ray_config import address_to_join

    if address_to_join(config.ray) is None:
        return
    from cluster.ray_runtime import start_ray
    from cluster.room import cluster_room
    from trainers.preflight import await_room

    def note(text: str) -> None:
        print(f"● {text}", flush=True)

    runtime = start_ray(config.ray)
    try:
        asyncio.run(await_room(config, look=cluster_room, note=note))
    finally:
        runtime.stop()


def _resume(command: Resume) -> int:
    if command.address is not None:
        return _resume_job(command, address=command.address)
    run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
    from trainers.preflight import check_resumable
    from trainers.run_config import read_resolved

    # Where the run is now: its directory may have been moved, or named from another folder.
    config = read_resolved(run_dir / "resolved.json").model_copy(update={"runs_dir": command.runs_dir})
    check_resumable(config, run_dir=run_dir)
    if problems := list(_serving_problems(config)):
        from cluster.config import ConfigError

        raise ConfigError(problems)
    from trainers import session

    def sit(console: RunConsole, stop: StopSignal) -> Summary:
        endpoint = _own_endpoint(config, console=console)
        return session.resume(config, progress=console, stop=stop, companion=endpoint)

    return watched(config, sit)


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
        f"Sealed problems: {sealed.before:.1%} → {sealed.after:.1%} "
        f"(gain {sealed.gain:+.1%}, 95 % CI {sealed.ci_low:+.1%} to {sealed.ci_high:+.1%}) · "
        f"experts asked {summary.experts.fraction:.1%} · report {report}"
    )
    print(f"Next: elenchus chat {summary.run} · elenchus report {summary.run} · make test")


def _report(command: Report) -> int:
    run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
    from serve.report import write_report

    print(write_report(run_dir))
    return 0


def _scale(command: Scale) -> int:
    from cluster.scaling import AUTO, read_pools, write_wanted

    said = command.replicas
    if said != AUTO and not (said.isascii() and said.isdigit() and int(said) >= 1):
        raise UsageError(f'elenchus scale: got "{said}" replicas, wanted a number, at least 1, or "{AUTO}"')
    if command.address is not None:
        return _scale_job(command, address=command.address)
    run_dir = _run_dir(command.run, runs_dir=command.runs_dir)
    pools = read_pools(run_dir)
    if pools and command.role not in pools:
        raise UsageError(
            f"elenchus scale: got {command.role}, which has no engines of its own in {command.run}, wanted one of "
            f"{', '.join(pools)}"
        )
    write_wanted(run_dir, command.role, None if said == AUTO else int(said))
    pool = pools.get(command.role)
    stood = f"it had {pool['ready']} ready of {pool['wanted']}" if pool else "it is not up yet"
    wanted = "what its config says" if said == AUTO else said
    print(f"{command.role}: wanted {wanted}; {stood}. {run_dir / 'pools.json'} says when they are ready, or why not")
    return 0


def _plan(command: Plan, *, flags: Flags) -> int:
    from cluster.machine import this_machine
    from cluster.ray_config import address_to_join
    from serve.terminal import plan_as_json, write_plan
    from trainers.plan import plan_run
    from trainers.preflight import CERTAIN, machine_problems
    from trainers.run_config import load_run_config

    config = load_run_config(command.configs, flags=[*_run_flags(command), *flags])
    joins = address_to_join(config.ray) is not None
    plan = plan_run(config, machine=None if joins else this_machine())
    # What is certain is told as `run` would tell it.
    problems = [
        *machine_problems(config),
        *_serving_problems(config),
        *(line for line in plan.problems if not line.startswith(CERTAIN)),
    ]
    resolved = config.model_dump(mode="json")
    if command.json:
        print(plan_as_json(plan, config=resolved, problems=problems))
    else:
        write_plan(sys.stdout, plan)
    if command.out is not None:
        _write_text(command.out, json.dumps(resolved, indent=2) + "\n", flag="--out")
    for line in problems:
        print(f"✗ {line}", file=sys.stderr)
    if not problems and not command.json:
        print("✓ it fits" if plan.machine is not None else "✓ nothing speaks against it here")
    return 2 if problems else 0


def _write_text(path: Path, text: str, *, flag: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{flag}: got {path} ({error.strerror}), wanted a file in a folder that can be written"
        ) from None


def _doctor(command: Doctor) -> int:
    from cluster.doctor import examine
    from serve.terminal import write_check

    checks = []
    for check in examine(root=Path(__file__).resolve().parent, runs_dir=command.runs_dir):
        checks.append(check)
        if not command.json:
            write_check(sys.stdout, check)
    failures = [check.name for check in checks if check.state == "failure"]
    if command.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    elif failures:
        print(f"\n✗ {len(failures)} of {len(checks)} checks failed: {', '.join(failures)}")
    else:
        print(f"\n✓ {len(checks)} checks, none failed. Next: elenchus plan · elenchus demo")
    return 1 if failures else 0


def _sql(command: Sql) -> int:
    run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
    from serve.journal_sql import JournalQueries
    from serve.terminal import write_rows

    with JournalQueries(run_dir) as journal:
        result = journal.listing() if command.query is None else journal.query(command.query)
        write_rows(sys.stdout, result.columns, result.rows, format=command.format, max_rows=command.max_rows)
    return 0


def _manifest(command: Manifest, *, flags: Flags) -> int:
    if not command.kuberay:
        raise UsageError("elenchus manifest: got no --kuberay, wanted it: say for what, and that is the one there is")
    from cluster.scaling import read_wanted
    from serve.manifest import Target, resume_manifest, run_manifest, service_manifest
    from trainers.run_config import load_run_config, read_resolved

    target = Target(image=command.image, volume_claim=command.volume_claim, max_critics=command.max_critics)
    if len(command.what) != 1 or command.what[0].endswith(".toml") or Path(command.what[0]).is_file():
        if command.endpoint:
            raise UsageError(
                "elenchus manifest: got --endpoint and no name of a run, wanted one: what is served is what it commits"
            )
        paths = [Path(word) for word in command.what]
        config = load_run_config(paths, flags=[*_run_flags(command), *flags])
        print(run_manifest(config, target=target), end="")
        return 0
    run_dir = _run_dir(command.what[0], runs_dir=command.runs_dir)
    said = [key for key, _ in (*_run_flags(command), *flags)]
    if said:
        raise UsageError(
            f"elenchus manifest: got {said[0]} beside the run {command.what[0]}, wanted the name alone: a run that has "
            "begun goes on with its own config"
        )
    config = read_resolved(run_dir / "resolved.json").model_copy(update={"runs_dir": command.runs_dir})
    if command.endpoint:
        print(service_manifest(config, target=target), end="")
    else:
        print(resume_manifest(config, wanted=read_wanted(run_dir), target=target), end="")
    return 0


def _completion(command: Completion) -> int:
    from cluster.config import describe
    from serve.completion import completion_script
    from trainers.run_config import RunConfig

    # tyro prints it and ends the program.
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        tyro.cli(Command, prog="elenchus", args=["--tyro-print-completion", command.shell])
    script = completion_script(
        printed.getvalue(),
        shell=command.shell,
        named=NAMED,
        configured=CONFIGURED,
        files=[name for name in CONFIGURED if name != "demo"],
        shells=("bash", "zsh", "fish"),
        keys=[doc.key for doc in describe(RunConfig) if "." in doc.key],
    )
    print(script, end="")
    return 0


# ---------------------------------------------------------------------- jobs and runs elsewhere


def _submit(command: Submit, *, flags: Flags) -> int:
    from cluster.jobs import Jobs
    from serve.shipment import shipment, shipped_config
    from trainers.run_config import load_run_config

    config = shipped_config(load_run_config(command.configs, flags=[*_run_flags(command), *flags]))
    jobs = Jobs.at(command.address, token_path=command.token_path)
    with shipment(config, python=command.python) as shipped:
        words = [command.python, "elenchus.py", "run", shipped.config_name]
        submitted = jobs.submit(config.name, words=words, folder=shipped.folder, metadata=shipped.metadata)
    if not submitted.is_new and submitted.job.metadata["config_hash"] != shipped.metadata["config_hash"]:
        raise UsageError(
            f'elenchus submit: got another config for "{config.name}", which is running as '
            f"{submitted.job.submission_id}, wanted a name that is free: stop that run, or give --name"
        )
    return _begun(jobs, submitted.job, is_new=submitted.is_new, address=command.address)


def _resume_job(command: Resume, *, address: str) -> int:
    from cluster.jobs import Jobs
    from serve.shipment import shipment

    jobs = Jobs.at(address, token_path=command.token_path)
    last = jobs.newest(command.name)
    python = command.python or last.metadata["python"]
    with shipment(None, python=python) as shipped:
        words = [python, "elenchus.py", "resume", command.name, "--runs-dir", last.metadata["runs_dir"]]
        kept = {key: last.metadata[key] for key in ("runs_dir", "config_hash")}
        submitted = jobs.submit(command.name, words=words, folder=shipped.folder, metadata={**shipped.metadata, **kept})
    return _begun(jobs, submitted.job, is_new=submitted.is_new, address=address)


def _scale_job(command: Scale, *, address: str) -> int:
    """Say what is wanted where the run's directory is, which need not be reachable from here."""
    from cluster.jobs import Jobs
    from serve.shipment import shipment
    from serve.watch import plain_log

    jobs = Jobs.at(address, token_path=command.token_path)
    last = jobs.newest(command.run)
    python, runs_dir = last.metadata["python"], last.metadata["runs_dir"]
    with shipment(None, python=python) as shipped:
        words = [python, "elenchus.py", "scale", command.role, command.replicas, "--run", command.run]
        errand = jobs.errand(command.run, words=[*words, "--runs-dir", runs_dir], folder=shipped.folder)
    for line in plain_log(errand.lines):
        print(line, file=sys.stdout if errand.exit_code == 0 else sys.stderr)
    if last.ended and errand.exit_code == 0:
        follows = f"`elenchus resume {last.run} --address {address}`"
        print(f"{last.submission_id} is {last.status.lower()}: {follows} follows it")
    return 1 if errand.exit_code is None else errand.exit_code


def _begun(jobs: Jobs, job: Job, *, is_new: bool, address: str) -> int:
    """Say that a job was submitted, and how to follow it, or why it ended at once; return the exit code."""
    from serve.watch import plain_log

    if not is_new:
        print(f"● {job.submission_id} is running already: elenchus watch {job.run} --address {address}")
        return 0
    where = f"{job.metadata['runs_dir']}/{job.run}"
    print(f"● {job.submission_id} is submitted to {jobs.address}; it writes {where}", flush=True)
    deadline, waits = time.monotonic() + SUBMISSION_WATCHED_S, ""
    while True:
        # In this order: what an ended job has said is all that it will say.
        job = jobs.newest(job.run)
        said = [line.rstrip() for line in plain_log(jobs.logs(job).splitlines()) if line.strip()]
        # The first lines that a run writes: it waits for room, or has found it.
        has_room = any(line.startswith("● cluster") for line in said)
        if has_room or job.ended or time.monotonic() > deadline:
            break
        newest = next((line for line in reversed(said) if line.startswith("● waiting")), waits)
        if newest != waits:
            print(newest, flush=True)
            # One that does not grow is refused soon.
            deadline, waits = min(deadline, time.monotonic() + WAITING_WATCHED_S), newest
        time.sleep(1.0)
    if job.status == "FAILED":
        faults = [line for line in said if line.startswith("✗")] or said[-1:] or [" ".join(job.message.split())[:200]]
        for line in faults:
            print(f"✗ {job.submission_id}: {line.removeprefix('✗ ')}", file=sys.stderr)
        return 2 if job.exit_code == 2 else 1
    print(f"● {job.submission_id} is {'waiting' if waits and not has_room and not job.ended else job.status.lower()}")
    for word in ("watch", "logs", "stop"):
        print(f"  elenchus {word} {job.run} --address {address}")
    return 0


def _status(command: Status) -> int:
    from serve.watch import states, table

    if command.address is None:
        run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
        print(_local_state(run_dir))
        return 0
    from cluster.jobs import Jobs

    jobs = Jobs.at(command.address, token_path=command.token_path)
    job = jobs.newest(command.name)
    print(f"● {job.submission_id}: {job.status.lower()}")
    *_, last = [None, *states(jobs.logs(job).splitlines())]
    if last is not None:
        print(table(last, now=time.time(), address=command.address))
    return 0


def _local_state(run_dir: Path) -> str:
    from cluster.lease import holder
    from serve.watch import table
    from trainers.live import read_live

    state = read_live(run_dir)
    if state is None:
        return f"● {run_dir.name}: {'starting' if holder(run_dir) else 'not running; it has not told how it stands'}"
    if holder(run_dir) is None:
        # A kill leaves the file as it was.
        state = state.model_copy(update={"ended": True})
    return table(state, now=time.time())


def _watch(command: Watch) -> int:
    try:
        if command.address is None:
            _watch_here(_run_dir(command.name, runs_dir=command.runs_dir))
        else:
            _watch_job(command, address=command.address)
    except KeyboardInterrupt:
        print("\nleft; the run goes on", file=sys.stderr)
    return 0


def _watch_here(run_dir: Path) -> None:
    from cluster.lease import holder
    from serve.terminal import redrawn

    with redrawn(sys.stdout) as draw:
        while True:
            alive = holder(run_dir) is not None
            draw(_local_state(run_dir))
            if not alive:
                return
            time.sleep(1.0)


def _watch_job(command: Watch, *, address: str) -> None:
    from cluster.jobs import Jobs
    from serve.terminal import redrawn
    from serve.watch import states, table

    jobs = Jobs.at(address, token_path=command.token_path)
    job = jobs.newest(command.name)
    with redrawn(sys.stdout) as draw:
        for state in states(jobs.follow(job)):
            if state.ended or time.time() - state.time < WATCHED_BACK_S:
                draw(table(state, now=time.time(), address=address))
    job = jobs.ended(job, timeout_s=60.0)
    print(f"● {job.submission_id}: {job.status.lower()}")


def _logs(command: Logs) -> int:
    from serve.watch import plain_log

    if command.address is None:
        run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
        path = run_dir / "elenchus.log"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    else:
        from cluster.jobs import Jobs

        jobs = Jobs.at(command.address, token_path=command.token_path)
        lines = jobs.logs(jobs.newest(command.name)).splitlines()
    for line in plain_log(lines):
        print(line)
    return 0


def _stop(command: Stop) -> int:
    if command.address is None:
        return _stop_here(command, run_dir=_run_dir(command.name, runs_dir=command.runs_dir))
    from cluster.jobs import Jobs
    from serve.watch import states

    jobs = Jobs.at(command.address, token_path=command.token_path)
    job = jobs.newest(command.name)
    if job.ended:
        print(f"● {job.submission_id}: {job.status.lower()} already")
        return 0
    job = jobs.stop(job, timeout_s=command.timeout_s)
    if not job.ended:
        print(
            f"✗ {job.submission_id} has not ended within {command.timeout_s:g} s; the request stands", file=sys.stderr
        )
        return 1
    *_, last = [None, *states(jobs.logs(job).splitlines())]
    rows = () if last is None else last.rows
    made = f"after iteration {rows[-1].iteration}" if rows else "before the first iteration"
    print(
        f"● {job.submission_id}: {job.status.lower()} {made}; "
        f"continue with `elenchus resume {job.run} --address {command.address}`"
    )
    return 0


def _stop_here(command: Stop, *, run_dir: Path) -> int:
    import socket

    import psutil

    from cluster.lease import holder
    from trainers.run_config import read_resolved

    config = read_resolved(run_dir / "resolved.json").model_copy(update={"runs_dir": command.runs_dir})
    found = holder(run_dir)
    if found is None:
        print(f"● {command.name}: not running; it stands {_progress_made(config)}")
        return 0
    if found.host != socket.gethostname():
        raise UsageError(
            f"elenchus stop: got {command.name}, which runs on {found.host} (pid {found.pid}), wanted a run of this "
            "machine: say it there, or give --address if it is a job"
        )
    lease = str((run_dir / "LEASE").resolve())
    try:
        holds = lease in [file.path for file in psutil.Process(found.pid).open_files()]
    except psutil.Error:
        holds = False
    if not holds:
        # Between taking the lock and writing its name a driver leaves its predecessor's there.
        raise UsageError(f"elenchus stop: got {command.name}, which is starting or ending, wanted a run; say it again")
    os.kill(found.pid, signal.SIGINT)
    deadline = time.monotonic() + command.timeout_s
    while holder(run_dir) == found:
        if time.monotonic() > deadline:
            print(f"✗ {command.name} has not ended within {command.timeout_s:g} s; the request stands", file=sys.stderr)
            return 1
        time.sleep(0.2)
    print(f"● {command.name}: stopped {_progress_made(config)}; continue with `elenchus resume {command.name}`")
    return 0


def _list(command: ListRuns) -> int:
    from serve.terminal import write_rows

    if command.address is None:
        columns: tuple[str, ...] = ("run", "state", "iteration", "accuracy")
        rows: list[tuple[Any, ...]] = list(_local_runs(command.runs_dir))
    else:
        from cluster.jobs import Jobs

        columns = ("run", "state", "job", "commit", "runs_dir")
        rows = [
            (
                job.run,
                job.status.lower(),
                job.submission_id,
                job.metadata["commit"][:12],
                job.metadata["runs_dir"],
            )
            for job in Jobs.at(command.address, token_path=command.token_path).all()
        ]
    write_rows(sys.stdout, columns, iter(rows), format="table", max_rows=1_000)
    return 0


def _local_runs(runs_dir: Path) -> Iterator[tuple[str, str, int | None, float | None]]:
    from cluster.commits import committed_iterations
    from cluster.lease import holder
    from trainers.summary import SUMMARY_FILE, read_metrics

    for path in sorted(runs_dir.glob("*/store.json")):
        run_dir = path.parent
        committed = committed_iterations(run_dir)
        last = max(committed, default=None)
        accuracy = next((row.probe_accuracy for row in read_metrics(run_dir) if row.iteration == last), None)
        state = "finished" if (run_dir / SUMMARY_FILE).is_file() else "stopped"
        yield run_dir.name, "running" if holder(run_dir) else state, last, accuracy


def _chat(command: Chat) -> int:
    run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
    from serve.endpoint_chat import endpoint_learner
    from serve.terminal import harmless

    endpoint = endpoint_learner(run_dir, version=command.version)
    if endpoint is not None:
        print(f"● {command.name} by its endpoint: ask, or end with Ctrl-D", file=sys.stderr)
        for question in _questions():
            for part in endpoint.answer(question, max_tokens=command.max_tokens):
                print(harmless(part), end="", flush=True)
            print()
            print(f"  · {endpoint.version}", file=sys.stderr)
        return 0
    from serve.chat import load_learner

    learner = load_learner(run_dir, version=command.version)
    print(f"● {command.name} {learner.version}: ask, or end with Ctrl-D", file=sys.stderr)
    for question in _questions():
        print(harmless(learner.answer(question, max_tokens=command.max_tokens)))
    return 0


def _questions() -> Iterator[str]:
    """Yield what is typed or piped in, until its end or Ctrl-C."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if question:
            yield question


def _serving(command: Serve | Promote | Rollback | Key) -> int:
    from serve import serving_commands

    run_dir = _run_dir(command.name, runs_dir=command.runs_dir)
    tell = partial(print, flush=True)
    match command:
        case Serve():
            return serving_commands.serve(command, run_dir, tell=tell)
        case Promote():
            return serving_commands.promote(command, run_dir, tell=tell)
        case Rollback():
            return serving_commands.rollback(command, run_dir, tell=tell)
        case Key():
            return serving_commands.key(command, run_dir, tell=tell)


def _export(command: Export) -> int:
    from serve.exporting import export

    return export(command, _run_dir(command.name, runs_dir=command.runs_dir), tell=print)


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
