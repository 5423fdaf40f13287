"""Keys: made once, kept as hashes, known again, shut out."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from serve import auth
from serve.auth import KeyRing, add_key, ensure_local_key, read_keys, revoke_key
from serve.limits import Limits, Overloaded


def bearer(secret: str) -> bytes:
    return f"Bearer {secret}".encode()


def test_a_key_is_stored_as_its_hash_in_a_file_of_its_owner(tmp_path: Path) -> None:
    key_id, secret = add_key(tmp_path, label="ann")
    file = tmp_path / "keys.json"
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (kept,) = read_keys(tmp_path)
    assert (kept.key_id, kept.label, len(kept.sha256)) == (key_id, "ann", 64)


def test_each_key_is_known_by_its_own_secret_alone(tmp_path: Path) -> None:
    made = [add_key(tmp_path, label=label) for label in ("ann", "bob", "cleo")]
    ring = KeyRing(tmp_path)
    for (key_id, secret), label in zip(made, ("ann", "bob", "cleo"), strict=True):
        owner = ring.owner(bearer(secret))
        assert owner is not None
        assert (owner.key_id, owner.label) == (key_id, label)
    for wrong in (None, b"", b"Bearer", b"Bearer " + b"x" * 100_000, bearer(made[0][1][:-1]), made[0][1].encode()):
        assert ring.owner(wrong) is None


def test_every_key_is_compared_whatever_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [add_key(tmp_path, label=str(i))[1] for i in range(4)]
    compared: list[str] = []

    def compare(a: str, b: str) -> bool:
        compared.append(b)
        return a == b

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    ring = KeyRing(tmp_path)
    for secret in (secrets[0], secrets[3], "elk-none"):
        compared.clear()
        ring.owner(bearer(secret))
        assert compared == [key.sha256 for key in read_keys(tmp_path)]


def test_a_ring_follows_new_and_revoked_keys(tmp_path: Path) -> None:
    now = [0.0]
    ring = KeyRing(tmp_path, clock=lambda: now[0])
    key_id, secret = add_key(tmp_path, label="ann")
    assert ring.owner(bearer(secret)) is not None
    revoke_key(tmp_path, key_id)
    now[0] += 0.5
    assert ring.owner(bearer(secret)) is not None, "not looked yet"
    now[0] += 0.6
    assert ring.owner(bearer(secret)) is None
    assert [key.revoked for key in read_keys(tmp_path)] == [True]


def test_the_local_key_is_made_once_and_again_after_it_was_revoked(tmp_path: Path) -> None:
    path = ensure_local_key(tmp_path)
    secret = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_local_key(tmp_path).read_text() == secret
    revoke_key(tmp_path, read_keys(tmp_path)[0].key_id)
    assert ensure_local_key(tmp_path).read_text() != secret


def test_those_refused_for_overload_are_told_to_come_back_one_after_another(tmp_path: Path) -> None:
    add_key(tmp_path, label="ann", requests_per_minute=10**6, max_concurrent=10**3)
    (owner,) = read_keys(tmp_path)
    now = [0.0]
    limits = Limits(max_open_samples=1, clock=lambda: now[0])

    def refused() -> int:
        with pytest.raises(Overloaded) as caught, limits.admitted(owner, num_samples=1):
            pass
        return caught.value.retry_after_s

    with limits.admitted(owner, num_samples=1):
        # 5 a second, from half a second on: at 0.5, 0.7, 0.9, 1.1 s.
        assert [refused() for _ in range(4)] == [1, 1, 1, 2]
        assert [refused() for _ in range(28)][-1] == 7  # 0.5 + 31 / 5 = 6.7
        assert [refused() for _ in range(1000)][-1] == 30
        now[0] = 100.0
        assert refused() == 1
    # 500 ended within five seconds, so that 125 a second come back.
    for _ in range(499):
        with limits.admitted(owner, num_samples=1):
            pass
    with limits.admitted(owner, num_samples=1):
        now[0] += 0.25  # how long the rate stands
        assert [refused() for _ in range(60)][-1] == 1  # 0.5 + 59 / 125 = 0.97
        assert [refused() for _ in range(10)][-1] == 2  # 0.5 + 69 / 125 = 1.05


def test_what_can_not_be_a_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="requests_per_minute: got 0, wanted at least 1"):
        add_key(tmp_path, label="x", requests_per_minute=0)
    with pytest.raises(ValueError, match="label: got nothing"):
        add_key(tmp_path, label=" ")
    add_key(tmp_path, label="ann")
    with pytest.raises(ValueError, match=r'key: got "zz", wanted one of [0-9a-f]{8} \(ann\)'):
        revoke_key(tmp_path, "zz")
    (tmp_path / "keys.json").write_text(json.dumps([{"x": 1}]))
    with pytest.raises(ValueError, match="got no list of keys"):
        read_keys(tmp_path)
