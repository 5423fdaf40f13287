"""Owns how a pool says what went wrong; light to import, for those that only catch it."""

from __future__ import annotations


class PoolExhausted(RuntimeError):
    """Requests that no replica answered within the allowed attempts; they are lost, not failed judgements."""

    def __init__(self, message: str, *, reasons: dict[str, str]) -> None:
        super().__init__(message)
        self.reasons = reasons
        """Request id to what happened at its last attempt."""


class PoolFailed(RuntimeError):
    """The pool could not bring up its replicas, or has been shut down."""


def first_line(error: Exception) -> str:
    """Return what happened in one line: of a remote exception its own words, of a death Ray's reason."""
    cause = getattr(error, "cause", None)
    shown = cause if isinstance(cause, Exception) else error
    lines = [line.strip() for line in str(shown).strip().splitlines() if line.strip()]
    return f"{type(shown).__name__}: {lines[0]}" if lines else type(shown).__name__


def last_lines(error: Exception, *, num_lines: int = 3) -> str:
    """Return the end of an error's text, where Ray puts the exception of a constructor that failed."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " / ".join(lines[-num_lines:])
