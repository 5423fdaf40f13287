"""Owns who may come in now: a rate and a number of open requests for each key, and a number of open samples for all.

Knows neither HTTP nor engines. One event loop calls it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve.auth import ApiKey


class TooMany(Exception):
    """A key has asked for more than it may; the caller should come back after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(TooMany):
    """The endpoint as a whole has as much open as it takes."""


@dataclass(slots=True)
class _Account:
    tokens: float
    at: float
    num_open: int = 0


RETURNS_PER_S = 5.0
"""How many of those who were refused for overload are told to come back in a second, at least."""
LONGEST_RETRY_S = 30.0
WINDOW_S = 5.0


class Limits:
    """Counts what is open, and fills each key's bucket at its rate; a bucket holds what ten seconds bring.

    Whoever is refused for overload is told to come back after those who were refused before, twice as many a second as
    are answered: all at once would cost the answers more than it brings.
    """

    def __init__(self, *, max_open_samples: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_open_samples = 0
        self._max_open_samples = max_open_samples
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._next_return = 0.0
        self._ended: deque[float] = deque(maxlen=4096)
        """When requests ended, the last of them."""

    @contextmanager
    def admitted(self, key: ApiKey, *, num_samples: int) -> Iterator[None]:
        """Hold a place for a request of a key while the body runs.

        Raises:
            TooMany: the key's rate or its open requests are used up.
            Overloaded: the endpoint's are.
        """
        account = self._account(key)
        if account.num_open >= key.max_concurrent:
            raise TooMany(
                f"got a request beside {account.num_open} open ones of this key, wanted at most {key.max_concurrent}",
                retry_after_s=1,
            )
        if account.tokens < 1:
            wait_s = (1 - account.tokens) * 60 / key.requests_per_minute
            raise TooMany(
                f"got more than {key.requests_per_minute} requests a minute with this key", retry_after_s=_whole(wait_s)
            )
        if self.num_open_samples + num_samples > self._max_open_samples and self.num_open_samples:
            raise Overloaded(
                f"{self.num_open_samples} samples are open, and {self._max_open_samples} are taken at once",
                retry_after_s=self._return_s(),
            )
        account.tokens -= 1
        account.num_open += 1
        self.num_open_samples += num_samples
        try:
            yield
        finally:
            account.num_open -= 1
            self.num_open_samples -= num_samples
            self._ended.append(self._clock())

    def _return_s(self) -> int:
        now = self._clock()
        num_ended = sum(at > now - WINDOW_S for at in self._ended)
        returns_per_s = max(RETURNS_PER_S, 2 * num_ended / WINDOW_S)
        self._next_return = max(now + 0.5, min(self._next_return + 1 / returns_per_s, now + LONGEST_RETRY_S))
        return _whole(self._next_return - now)

    def _account(self, key: ApiKey) -> _Account:
        now, burst = self._clock(), max(1.0, key.requests_per_minute / 6)
        account = self._accounts.setdefault(key.key_id, _Account(tokens=burst, at=now))
        account.tokens = min(burst, account.tokens + (now - account.at) * key.requests_per_minute / 60)
        account.at = now
        return account


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))
