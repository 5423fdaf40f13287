"""Owns how records that cross in great numbers are taken apart for pickling.

`dataclass(slots=True, frozen=True)` does it field by field in Python, which costs a driver more than all else that a
pool does with a request.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def pickled_fast(cls: type[T]) -> type[T]:
    """Have the values of a frozen, slotted dataclass of two fields or more fetched and put in one go (class decorator).

    The pickles are those that the dataclass itself would make: its fields' values, in their order.
    """
    kind: Any = cls
    names = [field.name for field in dataclasses.fields(kind)]
    values: Callable[[Any], tuple[Any, ...]] = operator.attrgetter(*names)
    # A slot's own descriptor knows nothing of `frozen`.
    slots = [kind.__dict__[name].__set__ for name in names]

    def restore(self: Any, state: Sequence[Any]) -> None:
        for put, value in zip(slots, state, strict=True):
            put(self, value)

    kind.__getstate__ = lambda self: values(self)
    kind.__setstate__ = restore
    return cls
