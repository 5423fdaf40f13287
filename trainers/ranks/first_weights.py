"""Owns the weights that a group was opened with, as a reference: one rank's, which needs no other rank to compute.

They are read again from where they came from whenever something must be computed by them, and let go after it: between
updates they take no memory. Under ZeRO 3 too each rank then holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainers.ranks.reference_cache import ReferenceCache


class FirstWeights:
    """A model that is loaded when it is first called, and the log-probs that it gave before."""

    training = False

    def __init__(self, *, load: Callable[[], Any], digest: Callable[[], str]) -> None:
        """Describe the weights; nothing is read yet.

        Args:
            load: return the model, on the rank's device.
            digest: return a digest of its weights, the same on all ranks; called once, when it is first needed.
        """
        self.cache = ReferenceCache()
        self._load, self._make_digest = load, digest
        self._digest: str | None = None
        self._model: Any = None

    @property
    def digest(self) -> str:
        """Return the digest of the weights."""
        if self._digest is None:
            self._digest = self._make_digest()
        return self._digest

    def eval(self) -> None:
        """Do nothing: it is never trained."""

    def __call__(self, **inputs: Any) -> Any:
        """Return what the model gives, as an engine would."""
        if self._model is None:
            self._model = self._load().eval().requires_grad_(False)
        return self._model(**inputs)

    def let_go(self) -> None:
        """Give the model's memory back."""
        self._model = None
