"""Owns the files of a rank's checkpoints and exports: written beside their place, durable, digested, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from cluster.durable_files import FileDigest, digest_file, sync_path

MANIFEST = "MANIFEST.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


class CorruptCheckpoint(ValueError):
    """A checkpoint's files are not those that were saved, or belong to another topology; nothing was loaded."""


def files_of(directory: Path) -> list[Path]:
    """Return all files below a directory, in the order of their paths."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def synced_digest(path: Path, root: Path) -> FileDigest:
    """Make a file durable and return its digest, under its path from the root."""
    sync_path(path)
    return digest_file(path, root=root)


def read_manifest(directory: Path) -> list[FileDigest]:
    """Return the digests that a checkpoint was saved with.

    Raises:
        CorruptCheckpoint: there is no readable manifest.
    """
    try:
        return [FileDigest(**entry) for entry in json.loads((directory / MANIFEST).read_text())["files"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{directory}: no readable {MANIFEST} ({error}), wanted a saved checkpoint") from error


def listing_problems(directory: Path, wanted: dict[str, FileDigest]) -> list[str]:
    """Return which files a checkpoint lacks, and which it has too many."""
    here = {path.relative_to(directory).as_posix() for path in files_of(directory) if path.name != MANIFEST}
    missing = [f"{name} is missing" for name in sorted(set(wanted) - here)]
    # DeepSpeed finds files by pattern: one that nobody vouches for must not be there to be unpickled.
    return missing + [f"{name} is not in the manifest" for name in sorted(here - set(wanted))]


def digest_problem(path: Path, root: Path, wanted: dict[str, FileDigest]) -> str | None:
    """Return what is wrong with a file's bytes; None when nothing is."""
    got = digest_file(path, root=root)
    expected = wanted.get(got.path)
    if expected is None or got == expected:
        return None
    return f"{got.path} has SHA-256 {got.sha256[:12]}… ({got.size_bytes} bytes), wanted {expected.sha256[:12]}…"


def fresh_beside(target: Path) -> Path:
    """Return an empty directory beside the target, on the same file system."""
    beside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def publish_directory(beside: Path, target: Path) -> None:
    """Make a directory durable and give it its name; what had the name before is removed."""
    for path in (*files_of(beside), *(p for p in beside.rglob("*") if p.is_dir()), beside):
        sync_path(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(beside, target)
    sync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy what a Hugging Face directory has beside its weights."""
    files: Iterable[Path] = {path for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}
    for path in files:
        shutil.copyfile(path, target / path.name)
