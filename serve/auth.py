"""Owns the endpoint's bearer keys: made once, shown once, stored as hashes, compared in constant time.

elenchus key NAME ─► runs/NAME/keys.json (0600, SHA-256 of each) ◄─ KeyRing, which follows the file
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.durable_files import publish

KEYS_FILE = "keys.json"
PREFIX = "elk-"
LOCAL_LABEL = "this machine"
LOCAL_KEY_FILE = "api_key"
"""Holds the key that `elenchus serve` makes for the person at this machine; its owner alone can read it."""
REREAD_S = 1.0
"""A revoked key is refused after so many seconds at the latest."""
MAX_HEADER_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is kept of a key: enough to recognise it, not enough to use it."""

    key_id: str
    label: str
    sha256: str
    """Of the whole key. Keys are 256 random bits, so a slow hash would protect nothing more."""
    created: float
    """Unix seconds."""
    requests_per_minute: int
    max_concurrent: int
    """Requests of this key that may be open at once."""
    revoked: bool = False


def add_key(run_dir: Path, *, label: str, requests_per_minute: int = 600, max_concurrent: int = 64) -> tuple[str, str]:
    """Make a key and return its id and the key itself, which is stored nowhere.

    Raises:
        ValueError: a limit below 1, or an empty label.
    """
    for name, number in (("requests_per_minute", requests_per_minute), ("max_concurrent", max_concurrent)):
        if number < 1:
            raise ValueError(f"key: {name}: got {number}, wanted at least 1; to shut a key out, revoke it")
    if not label.strip():
        raise ValueError("key: label: got nothing, wanted a word that says whose key it is")
    secret = PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        key_id=secrets.token_hex(4),
        label=label,
        sha256=_digest(secret.encode()),
        created=time.time(),
        requests_per_minute=requests_per_minute,
        max_concurrent=max_concurrent,
    )
    with _locked(run_dir):
        _write(run_dir, (*read_keys(run_dir), key))
    return key.key_id, secret


def revoke_key(run_dir: Path, key_id: str) -> ApiKey:
    """Shut a key out for good and return it.

    Raises:
        ValueError: there is no such key; names those that there are.
    """
    with _locked(run_dir):
        keys = read_keys(run_dir)
        found = [key for key in keys if key.key_id == key_id]
        if not found:
            there = ", ".join(f"{key.key_id} ({key.label})" for key in keys if not key.revoked) or "none yet"
            raise ValueError(f'key: got "{key_id}", wanted one of {there}')
        _write(run_dir, tuple(replace(key, revoked=True) if key is found[0] else key for key in keys))
    return replace(found[0], revoked=True)


def read_keys(run_dir: Path) -> tuple[ApiKey, ...]:
    """Return all keys of a run, revoked ones too; none when none was made.

    Raises:
        ValueError: the file is damaged.
    """
    path = run_dir / KEYS_FILE
    try:
        return tuple(ApiKey(**key) for key in json.loads(path.read_bytes()))
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: got no list of keys ({error}); delete it and make keys anew") from None


def own_keys(run_dir: Path) -> tuple[ApiKey, ...]:
    """Return the keys that a person has made by `elenchus key` and that are not revoked."""
    return tuple(key for key in read_keys(run_dir) if not key.revoked and key.label != LOCAL_LABEL)


def ensure_local_key(run_dir: Path) -> Path:
    """Return the file with a key for this machine's user; makes the key when there is none, or it was revoked."""
    path = run_dir / LOCAL_KEY_FILE
    if path.is_file() and KeyRing(run_dir).owner(f"Bearer {path.read_text().strip()}".encode()) is not None:
        return path
    _, secret = add_key(run_dir, label=LOCAL_LABEL, requests_per_minute=60_000, max_concurrent=1_000)
    _write_private(path, (secret + "\n").encode())
    return path


class KeyRing:
    """Tells whose key a request carries; reads the file again when it has changed."""

    def __init__(self, run_dir: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run_dir = run_dir
        self._clock = clock
        self._looked = -REREAD_S
        self._seen: tuple[int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()

    def owner(self, authorization: bytes | None) -> ApiKey | None:
        """Return the key of an Authorization header; None for no key, a wrong one, or one that was revoked.

        All keys are compared, each in constant time, so that the time taken says nothing about any of them.
        """
        self._refresh()
        scheme, _, token = (authorization or b"").partition(b" ")
        if len(token) > MAX_HEADER_BYTES:
            return None
        asked = _digest(token.strip())
        found: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(asked, key.sha256):
                found = key
        return found if scheme.lower() == b"bearer" else None

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._looked < REREAD_S:
            return
        self._looked = now
        try:
            found = (self._run_dir / KEYS_FILE).stat()
        except FileNotFoundError:
            self._seen, self._keys = None, ()
            return
        if (seen := (found.st_mtime_ns, found.st_ino)) != self._seen:
            self._keys = tuple(key for key in read_keys(self._run_dir) if not key.revoked)
            self._seen = seen


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Keep two commands from writing over one another."""
    descriptor = os.open(run_dir / f".{KEYS_FILE}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(run_dir: Path, keys: tuple[ApiKey, ...]) -> None:
    text = json.dumps([asdict(key) for key in keys], indent=2) + "\n"
    _write_private(run_dir / KEYS_FILE, text.encode())


def _write_private(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
        stream.write(data)
    publish(beside, path)
