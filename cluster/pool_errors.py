"""Owns how a pool says that requests have no answer; light to import, for those that only catch it."""

from __future__ import annotations


class PoolExhausted(RuntimeError):
    """Requests that no replica answered within the allowed attempts; they are lost, not failed judgements."""

    def __init__(self, message: str, *, reasons: dict[str, str]) -> None:
        super().__init__(message)
        self.reasons = reasons
        """Request id to what happened at its last attempt."""


class PoolFailed(RuntimeError):
    """The pool could not bring up its replicas, or has been shut down."""
