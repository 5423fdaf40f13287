"""Owns where log lines go: everything into the run's file, warnings of our own to the terminal, secrets nowhere."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

OUR_PACKAGES = ("cluster", "actors", "trainers", "serve", "elenchus")

QUIET_LIBRARIES = ("vllm", "deepspeed", "DeepSpeed", "ray", "transformers", "torch", "asyncio", "urllib3")
"""Loggers that come with handlers of their own, which would write to the terminal."""

SECRET_PATTERNS = (
    re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"),
    re.compile(
        r"(?i)([\w-]*(?:api[_-]?key|auth[_-]?token|access[_-]?token|secret|password)[\"']?\s*[=:]\s*[\"']?)[^\s\"',;}]{6,}"
    ),
    re.compile(r"\b((?:sk|hf|ghp|xox[bp])[-_])[A-Za-z0-9_-]{12,}"),
)

SECRET_VARIABLES = re.compile(r"(?i)(api_?key|token|secret|password)$")
"""Environment variables whose values are secrets."""


class Redaction(logging.Filter):
    """Takes secrets out of a record: values of secret-looking environment variables, and what looks like a key."""

    def __init__(self) -> None:
        super().__init__()
        self._values = sorted(
            (v for k, v in os.environ.items() if SECRET_VARIABLES.search(k) and len(v) >= 8), key=len, reverse=True
        )

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the record's message by the redacted one; every record passes."""
        record.msg, record.args = self.redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = self.redact(logging.Formatter().formatException(record.exc_info))
        return True

    def redact(self, text: str) -> str:
        """Return the text without secrets.

        >>> Redaction().redact("Authorization: Bearer abcdefgh12345678")
        'Authorization: Bearer [redacted]'
        """
        for value in self._values:
            text = text.replace(value, "[redacted]")
        for pattern in SECRET_PATTERNS:
            text = pattern.sub(r"\1[redacted]", text)
        return text


class OurWarnings(logging.Filter):
    """Lets only our own packages through."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record comes from one of our packages."""
        return record.name.split(".", 1)[0] in OUR_PACKAGES


@dataclass(slots=True)
class RunLog:
    """A run's log file while it is open."""

    path: Path
    _handlers: list[logging.Handler] = field(default_factory=list)
    _root_level: int = logging.WARNING

    def close(self) -> None:
        """Flush the file and put the root logger back as it was."""
        root = logging.getLogger()
        for handler in self._handlers:
            root.removeHandler(handler)
            handler.close()
        self._handlers = []
        root.setLevel(self._root_level)
        logging.captureWarnings(False)


def start_log(path: Path, *, level: int = logging.INFO, console_level: int | None = logging.WARNING) -> RunLog:
    """Append all log lines of this process to a file, and only our own from `console_level` on to stderr.

    Third-party libraries lose the handlers that they made for themselves; what they say goes to the file. Python's
    warnings go there too. `console_level=None` leaves the terminal alone, for a live display.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    log = RunLog(path=path, _root_level=root.level)
    file_handler = logging.FileHandler(path, encoding="utf-8")
    file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"))
    file_handler.setLevel(level)
    log._handlers.append(file_handler)
    if console_level is not None:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        console.setLevel(console_level)
        console.addFilter(OurWarnings())
        log._handlers.append(console)
    for handler in log._handlers:
        handler.addFilter(Redaction())
        root.addHandler(handler)
    root.setLevel(level)
    quiet_libraries()
    logging.captureWarnings(True)
    warnings.filterwarnings("default", category=DeprecationWarning, module=r"(cluster|actors|trainers|serve)\b")
    return log


def quiet_libraries() -> None:
    """Send the lines of chatty libraries through the root logger alone; call it again after importing one of them."""
    for name in list(logging.Logger.manager.loggerDict):
        if name.split(".", 1)[0] in QUIET_LIBRARIES:
            library = logging.getLogger(name)
            for handler in list(library.handlers):
                if not isinstance(handler, logging.NullHandler):
                    library.removeHandler(handler)
            library.propagate = True
