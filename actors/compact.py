"""Owns how records that cross in great numbers are taken apart for pickling.

`dataclass(slots=True, frozen=True)` does it field by field in Python, which costs a driver more than all else that a
pool does with a request.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def pickled_fast(cls: type[T]) -> type[T]:
    """Have the values of a frozen, slotted dataclass of two fields or more fetched in one go (class decorator)."""
    kind: Any = cls
    values: Callable[[Any], tuple[Any, ...]] = operator.attrgetter(*(field.name for field in dataclasses.fields(kind)))
    # Its counterpart is the `__setstate__` that dataclasses make, which takes the values in the fields' order.
    kind.__getstate__ = lambda self: values(self)
    return cls
