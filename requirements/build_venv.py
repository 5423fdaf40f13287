"""Builds .venv from requirements/cpu.txt once, and goes on from where an interrupted build stopped.

Runs on the system's Python with the standard library alone. `make setup` calls it.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements" / "cpu.txt"
VENV = ROOT / ".venv"
STAMP = VENV / "elenchus-ready"
LOG = VENV / "setup.log"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DISK_NEEDED_BYTES = 5 << 30
# Their first import would otherwise spend 20 s on compiling, in every one of the demo's processes at once.
COMPILED_AHEAD = ("deepspeed", "fastapi", "pyarrow", "pydantic", "ray", "sympy", "torch", "transformers", "vllm")


class SetupError(Exception):
    """What the user has to mend before the environment can be built: one line, with the remedy."""


def main() -> int:
    """Returns 0 when .venv is ready, 2 when the machine lacks something, 1 when installing failed."""
    started = time.monotonic()
    try:
        _say("✓", machine_line())
        with _only_one_build():
            built = build(key=stamp_key())
        if built:
            _say("✓", f"environment ready in {_duration(time.monotonic() - started)}", note="(next time: 1s)")
        else:
            _say("✓", "environment ready")
    except SetupError as error:
        _say("✗", str(error))
        return 2
    except subprocess.CalledProcessError as error:
        print(_tail(LOG, num_lines=12), file=sys.stderr)
        _say(
            "✗",
            f"{' '.join(map(str, error.cmd[:4]))} … failed; its output is in {LOG}. "
            "Run `make setup` again: it goes on from here",
        )
        return 1
    except KeyboardInterrupt:
        _say("✗", "stopped; `make setup` goes on from here")
        return 130
    return 0


def machine_line() -> str:
    """Returns what the machine is: system, Python, cores and free memory."""
    gpu = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    free = _free_memory_bytes() / 2**30
    text = (
        f"{platform.system()} {platform.machine()} · Python {sys.version_info.major}.{sys.version_info.minor} · "
        f"{len(os.sched_getaffinity(0))} cores · {free:.0f} GB free"
    )
    note = "(a GPU is here; this environment is the CPU's)" if gpu else "(no GPU: tiny models, trained here)"
    return f"{text:<57} {note}"


def stamp_key() -> str:
    """Returns what a finished environment is stamped with: hash of pin list and this file, Python version, place."""
    digest = hashlib.sha256(PINS.read_bytes() + Path(__file__).read_bytes())
    return f"{digest.hexdigest()} {platform.python_version()} {ROOT}"


def build(*, key: str) -> bool:
    """Builds .venv unless it carries this key; returns whether there was anything to do.

    Raises:
        SetupError: too little disk, no `venv` module, or no C++ compiler.
        subprocess.CalledProcessError: pip failed; its output is in the log.
    """
    if STAMP.is_file() and STAMP.read_text() == key and _works():
        return False
    _check_machine()
    if not _works():
        _create()
    else:
        STAMP.unlink(missing_ok=True)
        _say("●", "an environment that is unfinished or of another pin list is here: going on from it")
        _remove_half_installed()
    pins = _pins()
    with LOG.open("a", encoding="utf-8") as log:
        _install_torch(pins, log=log)
        options = ("--no-build-isolation", "-r", str(PINS))
        _pip(*options, log=log, label="packages", total=len(pins))
        _pip("--no-build-isolation", "-e", str(ROOT), log=log, label="elenchus", total=1)
        _verify(pins, log=log)
        _compile_ahead(log)
    STAMP.write_text(key)
    return True


def _works() -> bool:
    """Whether .venv has a Python of this version that can run pip."""
    python = VENV / "bin" / "python"
    if not python.exists():
        return False
    ask = "import sys, pip; print('%d.%d.%d' % sys.version_info[:3])"
    answer = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, check=False)
    return answer.returncode == 0 and answer.stdout.strip() == platform.python_version()


def _check_machine() -> None:
    """Raises SetupError for what pip would only complain about after minutes."""
    if sys.platform != "linux":
        raise SetupError(f"this is {platform.system()}, and vLLM's CPU build exists for Linux: use a Linux machine")
    free = shutil.disk_usage(ROOT).free
    if free < DISK_NEEDED_BYTES and not VENV.exists():
        raise SetupError(
            f"{free / 2**30:.1f} GB of disk are free at {ROOT}, {DISK_NEEDED_BYTES >> 30} GB are needed: free some"
        )
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise SetupError("no C++ compiler found (c++, g++ or clang++): install one, for example `apt install g++`")


def _create() -> None:
    """Makes an empty .venv in place of whatever is there."""
    if VENV.is_symlink():
        raise SetupError(f"{VENV} is a link, and what it leads to has no working Python: remove the link")
    if VENV.exists():
        _say("●", "a broken environment is here: building it anew")
        shutil.rmtree(VENV)
    made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        reason = (made.stdout + made.stderr).strip().splitlines()[:1]
        raise SetupError(
            f"`{sys.executable} -m venv` failed ({' '.join(reason)}): install the venv module, for example "
            f"`apt install python3.{sys.version_info.minor}-venv`"
        )


def _remove_half_installed() -> None:
    """Removes the metadata of packages whose files are not all there, so that pip installs them again."""
    for site in VENV.glob("lib/python3.*/site-packages"):
        for leftover in site.glob("~*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for info in site.glob("*.dist-info"):
            if not _whole(info, site=site):
                shutil.rmtree(info)


def _whole(info: Path, *, site: Path) -> bool:
    """Whether every file that a package's RECORD names is there (pip writes RECORD last)."""
    record = info / "RECORD"
    if not record.is_file():
        return False
    with record.open(newline="", encoding="utf-8") as lines:
        return all((site / row[0]).exists() for row in csv.reader(lines) if row and not row[0].endswith(".pyc"))


def _ask_venv(code: str, *arguments: str) -> str:
    """Returns what a few lines of Python print in .venv."""
    command = [str(VENV / "bin" / "python"), "-I", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _pins() -> dict[str, str]:
    """Returns name to version of every line that holds on this machine."""
    code = (
        "import sys; from pip._vendor.packaging.requirements import Requirement\n"
        "for line in open(sys.argv[1], encoding='utf-8'):\n"
        "    if line.strip() and not line.startswith('#'):\n"
        "        r = Requirement(line.strip())\n"
        "        if r.marker is None or r.marker.evaluate(): print(r.name, str(r.specifier)[2:])\n"
    )
    return dict(line.split() for line in _ask_venv(code, str(PINS)).splitlines())


def _install_torch(pins: dict[str, str], *, log: TextIO) -> None:
    """Installs torch and setuptools, on which the rest is built.

    From what pip is configured with; only if that has no CPU build, from PyTorch's own index. An extra index in every
    call would cost seconds for every package asked.
    """
    _pip(f"setuptools=={pins['setuptools']}", log=log, label="setuptools", total=1)
    torch = f"torch=={pins['torch']}"
    try:
        _pip(torch, log=log, label="torch", total=1)
    except subprocess.CalledProcessError:
        _pip("--index-url", TORCH_CPU_INDEX, torch, log=log, label="torch, from PyTorch's CPU index", total=1)


def _pip(*arguments: str, log: TextIO, label: str, total: int) -> None:
    """Runs one `pip install --no-deps`, its output in the log, its progress on the screen.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    options = ("--no-deps", "--no-compile", "--no-input", "--disable-pip-version-check", "--progress-bar", "off")
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", *options, *arguments]
    log.write(f"\n$ {' '.join(command)}\n")
    log.flush()
    num_seen, last_said, unpacking = 0, time.monotonic(), False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            num_seen += line.startswith(("Collecting ", "Requirement already satisfied"))
            if line.startswith("Installing collected packages"):
                unpacking = True
                _progress(f"{label}: unpacking")
            elif not unpacking and time.monotonic() - last_said > (1 if sys.stdout.isatty() else 15):
                last_said = time.monotonic()
                _progress(f"{label}: {num_seen} of {total} fetched")
    log.flush()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, ["pip", "install", *arguments])


def _verify(pins: dict[str, str], *, log: TextIO) -> None:
    """Checks that .venv holds every pinned version.

    Raises:
        subprocess.CalledProcessError: something is missing or of another version; the log says what.
    """
    code = (
        "from importlib.metadata import distributions\nfor d in distributions(): print(d.metadata['Name'], d.version)\n"
    )
    have = {_normal(name): version for name, version in (line.split() for line in _ask_venv(code).splitlines())}
    wrong = {name: have.get(_normal(name)) for name, version in pins.items() if have.get(_normal(name)) != version}
    if wrong:
        log.write("".join(f"{name}: have {got}, want {pins[name]}\n" for name, got in wrong.items()))
        raise subprocess.CalledProcessError(1, ["check", "of", "the", "installed", "versions"])


def _compile_ahead(log: TextIO) -> None:
    """Compiles the largest packages to bytecode on all cores; a failure costs time later, nothing else."""
    _progress("compiling")
    site = next(VENV.glob("lib/python3.*/site-packages"))
    folders = [str(site / name) for name in COMPILED_AHEAD if (site / name).is_dir()]
    command = [str(VENV / "bin" / "python"), "-I", "-m", "compileall", "-q", "-j", "0", *folders]
    subprocess.run(command, stdout=log, stderr=log, check=False)


@contextlib.contextmanager
def _only_one_build() -> Iterator[None]:
    """Waits while another `make` builds the same environment."""
    with PINS.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("●", "another `make` is building this environment: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _free_memory_bytes() -> int:
    """Returns the memory that new processes can take."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _tail(path: Path, *, num_lines: int) -> str:
    return (
        "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]) if path.exists() else ""
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _say(sign: str, text: str, *, note: str = "") -> None:
    end = "\x1b[K" if sys.stdout.isatty() else ""
    print(f"{sign} {text:<57} {note}".rstrip() + end, flush=True)


def _progress(text: str) -> None:
    """One line that the next one overwrites on a terminal, a line of its own in a log."""
    if sys.stdout.isatty():
        print(f"  {text}\x1b[K", end="\r", flush=True)
    else:
        print(f"  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
