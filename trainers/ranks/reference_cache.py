"""Owns the reference's log-probs of sequences that were computed before, by what they depend on.

A sequence's key is a hash of its token ids, the temperature, and the digest of the weights. Whatever else could change
them does so through these: another template or tokenizer gives other ids. Weights that change with every update
(`reference = "start_of_update"`) are never asked for twice, so only the run's first weights have a cache.

A value is what was computed when the sequence was first met, in the micro-batch in which it then was. Which sequences
share a micro-batch changes the last bits of a log-prob: a micro-batch is taken from the cache when all of it is there,
and otherwise computed as if there were no cache. So an update whose micro-batches are all known, or all new, has the
same bits with and without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cluster.durable_files import digest_file
from trainers.rows import Padded

MAX_VALUES = 1 << 24
"""Log-probs kept, 64 MiB; the oldest sequences go first."""
KEY_BYTES = 16


class CacheCounts(NamedTuple):
    """Sequences that were asked for, and those of them that were there."""

    asked: int
    found: int


class ReferenceCache:
    """One rank's copy; `exchange` keeps those of all ranks alike."""

    def __init__(self, *, max_values: int = MAX_VALUES) -> None:
        """Begin empty."""
        self._max_values = max_values
        self._values: dict[bytes, Tensor] = {}
        self._num_values = 0
        self._new: dict[bytes, Tensor] = {}
        self._asked = self._found = 0

    def __len__(self) -> int:
        return len(self._values)

    def find(self, padded: Padded, *, digest: str, temperature: float) -> Tensor | None:
        """Return [S, T] log-probs of all sequences, 0 behind their ends; None unless all are there."""
        keys = _keys(padded, digest=digest, temperature=temperature)
        self._asked += sum(key is not None for key in keys)
        if any(key is not None and key not in self._values for key in keys):
            return None
        found = torch.zeros(padded.token_ids.shape)
        for row, key in enumerate(keys):
            if key is not None:
                self._found += 1
                found[row, : len(self._values[key])] = self._values[key]
        return found

    def keep(self, padded: Padded, logprobs: Tensor, *, digest: str, temperature: float) -> None:
        """Note what [S, T] log-probs were computed; they are there once `exchange` has told all ranks."""
        keys = _keys(padded, digest=digest, temperature=temperature)
        for key, ids, values in zip(keys, padded.mask, logprobs.detach().float().cpu(), strict=True):
            if key is not None and key not in self._values:
                self._new[key] = values[: _end(ids)].clone()

    def new(self) -> dict[bytes, Tensor]:
        """Return what this rank has computed since the last exchange, and forget that it is new."""
        new, self._new = self._new, {}
        return new

    def add(self, parts: Sequence[Mapping[bytes, Tensor]]) -> None:
        """Take in what all ranks have computed, in the same order on each of them."""
        for part in parts:
            for key, values in part.items():
                if key not in self._values:
                    self._values[key] = values
                    self._num_values += len(values)
        while self._num_values > self._max_values:
            oldest = next(iter(self._values))
            self._num_values -= len(self._values.pop(oldest))

    def counts(self) -> CacheCounts:
        """Return this rank's counts since the last call."""
        counts = CacheCounts(asked=self._asked, found=self._found)
        self._asked = self._found = 0
        return counts

    def state(self) -> dict[str, Any]:
        """Return all that is there as plain tensors, oldest first, so that loading it runs no code."""
        keys = np.frombuffer(b"".join(self._values), dtype=np.uint8).reshape(-1, KEY_BYTES).copy()
        values = list(self._values.values())
        return {
            "keys": torch.from_numpy(keys),
            "lengths": torch.tensor([len(part) for part in values], dtype=torch.int64),
            "values": torch.cat(values) if values else torch.zeros(0),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hold what a state says, and nothing else."""
        self._values, self._num_values, self._new = {}, 0, {}
        parts = state["values"].split(state["lengths"].tolist())
        keys = [bytes(key.tolist()) for key in state["keys"]]
        self.add([dict(zip(keys, (part.clone() for part in parts), strict=True))])


def weights_digest(path: Path, *, init_seed: int | None) -> str:
    """Return a digest of the weights of a Hugging Face directory, and of the config that says how they are used."""
    files = sorted(path.glob("*.safetensors")) if init_seed is None else []
    digests = [digest_file(file, root=path).sha256 for file in (path / "config.json", *files)]
    return hashlib.sha256("/".join([*digests, str(init_seed)]).encode()).hexdigest()


def _keys(padded: Padded, *, digest: str, temperature: float) -> list[bytes | None]:
    """Return each sequence's key; None for one without targets, whose log-probs nobody reads."""
    ids, salt = padded.token_ids.numpy(), f"{digest}/{temperature!r}/".encode()
    ends = [_end(mask) for mask in padded.mask]
    return [
        hashlib.blake2b(salt + row[:end].astype("<i8").tobytes(), digest_size=KEY_BYTES).digest() if end else None
        for row, end in zip(ids, ends, strict=True)
    ]


def _end(mask: Tensor) -> int:
    """Return how many tokens a sequence has up to its last target."""
    targets = mask.nonzero()
    return int(targets[-1]) + 1 if len(targets) else 0
