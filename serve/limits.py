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
RETURNS_PER_ANSWER = 1.25
"""And how many for each that is answered: a few more than there is room for, so that none of it stays empty."""
LONGEST_RETRY_S = 30.0
WINDOW_S = 5.0
RECKON_S = 0.25
"""How often the rate of answers is reckoned anew."""


class Returns:
    """Tells those who are refused for overload when to come back: one after another, not much faster than answers end.

    All at once would cost the answers more than it brings.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = 0.0
        self._ended: deque[float] = deque(maxlen=4096)
        """When answers ended, the last of them."""
        self._per_s = RETURNS_PER_S
        self._reckoned = -RECKON_S

    def note_end(self) -> None:
        """Take in that a request has ended."""
        self._ended.append(self._clock())

    def retry_after_s(self) -> int:
        """Return when the next one is to come back, in whole seconds from now, at least one."""
        now = self._clock()
        if now - self._reckoned >= RECKON_S:
            self._reckoned = now
            while self._ended and self._ended[0] <= now - WINDOW_S:
                self._ended.popleft()
            self._per_s = max(RETURNS_PER_S, RETURNS_PER_ANSWER * len(self._ended) / WINDOW_S)
        self._next = max(now + 0.5, min(self._next + 1 / self._per_s, now + LONGEST_RETRY_S))
        return _whole(self._next - now)


class Limits:
    """Counts what is open, and fills each key's bucket at its rate; a bucket holds what ten seconds bring."""

    def __init__(self, *, max_open_samples: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_open_samples = 0
        self._max_open_samples = max_open_samples
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._returns = Returns(clock=clock)

    @contextmanager
    def entered(self, key: ApiKey) -> Iterator[None]:
        """Count a key's request as open while the body runs: from its headers on, before anything else of it is read.

        Raises:
            TooMany: the key's open requests are used up.
        """
        account = self._account(key)
        if account.num_open >= key.max_concurrent:
            raise TooMany(
                f"got a request beside {account.num_open} open ones of this key, wanted at most {key.max_concurrent}",
                retry_after_s=1,
            )
        account.num_open += 1
        try:
            yield
        finally:
            account.num_open -= 1

    @contextmanager
    def admitted(self, key: ApiKey, *, num_samples: int) -> Iterator[None]:
        """Hold places for the samples of a key's request while the body runs.

        Raises:
            TooMany: the key's rate is used up.
            Overloaded: the endpoint's places are.
        """
        account = self._account(key)
        if account.tokens < 1:
            wait_s = (1 - account.tokens) * 60 / key.requests_per_minute
            raise TooMany(
                f"got more than {key.requests_per_minute} requests a minute with this key", retry_after_s=_whole(wait_s)
            )
        if self.num_open_samples + num_samples > self._max_open_samples and self.num_open_samples:
            raise Overloaded(
                f"{self.num_open_samples} samples are open, and {self._max_open_samples} are taken at once",
                retry_after_s=self._returns.retry_after_s(),
            )
        account.tokens -= 1
        self.num_open_samples += num_samples
        try:
            yield
        finally:
            self.num_open_samples -= num_samples
            self._returns.note_end()

    def _account(self, key: ApiKey) -> _Account:
        now, burst = self._clock(), max(1.0, key.requests_per_minute / 6)
        account = self._accounts.setdefault(key.key_id, _Account(tokens=burst, at=now))
        account.tokens = min(burst, account.tokens + (now - account.at) * key.requests_per_minute / 60)
        account.at = now
        return account


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))
