"""A file is replaced whole or not at all, and named by what it holds."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.durable_files import (
    EXIT_SYNC_FAILED,
    FileDigest,
    digest_directory,
    digest_file,
    write_bytes_atomic,
    write_json_atomic,
)

REPOSITORY = Path(__file__).resolve().parent.parent


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"gain": 0.2})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"gain": float("inf")})
    assert json.loads(path.read_text()) == {"gain": 0.2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_the_new_bytes_are_written_leaves_the_old_file_and_the_next_write_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_bytes_atomic(path, b"old")
    script = """
import resource, signal, sys
from pathlib import Path
from cluster.durable_files import write_bytes_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write beyond four bytes kills
resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))
write_bytes_atomic(Path(sys.argv[1]), b"half of the new")
"""
    done = run_python(script, str(path))
    assert done.returncode == -signal.SIGXFSZ
    assert (tmp_path / ".summary.json.tmp").read_bytes() == b"half"
    assert path.read_bytes() == b"old"
    write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_sync_ends_the_process_before_the_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(b"old")
    script = """
import os, sys
from pathlib import Path
from cluster import durable_files
def fail(descriptor):
    raise OSError(5, "Input/output error")
os.fsync = fail
durable_files.write_bytes_atomic(Path(sys.argv[1]), b"new")
print("acknowledged", flush=True)
"""
    done = run_python(script, str(path))
    assert (done.returncode, done.stdout) == (EXIT_SYNC_FAILED, "")
    assert "fsync failed" in done.stderr
    assert path.read_bytes() == b"old"


def test_digests_are_sorted_named_from_the_root_and_refuse_what_lies_outside(tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "policies" / "v1").mkdir(parents=True)
    (root / "policies" / "b").write_bytes(b"bb")
    (root / "policies" / "v1" / "a").write_bytes(b"")
    assert digest_directory(root / "policies", root=root) == (
        FileDigest(path="policies/b", size_bytes=2, sha256=hashlib.sha256(b"bb").hexdigest()),
        FileDigest(path="policies/v1/a", size_bytes=0, sha256=hashlib.sha256(b"").hexdigest()),
    )
    (tmp_path / "outside").write_bytes(b"x")
    with pytest.raises(ValueError, match="outside"):
        digest_file(tmp_path / "outside", root=root)


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
