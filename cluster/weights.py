"""Owns a version of the weights as bytes: tensors in buckets of the object store, where each lies, what proves it.

    put_weights ──► WeightManifest ──► iter_tensors, as views          ParityProbe ──► WeightAnswer ──► parity
    (one ray.put per bucket)           (checked by bucket)             (the publisher's log-probs against a replica's)

Knows neither pools nor engines: what a replica does with the tensors is its own business. torch is imported where
tensors are made: a pool whose replicas have no weights does not pay its second and a half.

The buckets live as long as the process that called `put_weights`: when it dies they are gone (`OwnerDiedError`), and a
replica that restarts cannot take them any more until the next publish.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import ray

if TYPE_CHECKING:
    import torch

Bytes: TypeAlias = npt.NDArray[np.uint8]

CHECKSUM_COLUMNS = 64


class CorruptBucket(ValueError):
    """The bytes of a bucket are not those that were put, or a tensor does not lie inside it."""


class ParityFailed(ValueError):
    """A replica's answer to new weights is not what the publisher of the weights expects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Where one tensor lies."""

    name: str
    dtype: str
    """torch's name without the module: "float32", "bfloat16"."""
    shape: tuple[int, ...]
    bucket: int
    """Index into `WeightManifest.buckets`."""
    part: int
    """Index into the bucket's list."""
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A list of flat uint8 NumPy arrays, one for each tensor, in the Ray object store."""

    ref: ray.ObjectRef[list[Bytes]]
    size_bytes: int
    checksum: int
    """`checksum` of each array's bytes, chained in their order."""
    node_id: str
    """Ray's id of the node in whose memory they were put."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """A version of the weights: small enough to travel as an argument."""

    version: str
    """For example "v7"."""
    tensors: tuple[TensorSpec, ...]
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityProbe:
    """Fixed sequences and what the publisher's own model says of them."""

    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    """Nats, for each sequence of n tokens those of tokens 2..n: n - 1 values."""
    bound: float
    """Greatest allowed |difference| in nats; 1e-4 in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightAnswer:
    """What a replica reports after it took new weights."""

    version: str
    logprobs: tuple[tuple[float, ...], ...]
    """Nats, shaped as `ParityProbe.logprobs`."""


Weights: TypeAlias = tuple[WeightManifest, ParityProbe]


def put_weights(
    named: Iterable[tuple[str, torch.Tensor]], *, version: str, bucket_bytes: int = 256 << 20
) -> WeightManifest:
    """Copy tensors into buckets in the object store, one `ray.put` per bucket, and return where each lies.

    A tensor is held, and must stay as it is, until its bucket is put: Ray then copies it straight into shared memory.
    Who gives tensors that will be freed or overwritten (gathered ZeRO-3 parameters) gives copies. A bucket is closed
    before the tensor that would carry it over `bucket_bytes`; a larger tensor has a bucket of its own.

    Raises:
        ValueError: two tensors with one name, no tensor at all, or `bucket_bytes` < 1.
    """
    import torch

    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes: got {bucket_bytes}, wanted at least 1; the default is 256 MiB")
    specs: list[TensorSpec] = []
    buckets: list[Bucket] = []
    names: set[str] = set()
    parts: list[Bytes] = []
    used = 0
    for name, tensor in named:
        if name in names:
            raise ValueError(f"weights {version}: two tensors are named {name!r}; names must be unique")
        names.add(name)
        size = tensor.numel() * tensor.element_size()
        if used and used + size > bucket_bytes:
            buckets.append(_put_bucket(parts))
            parts, used = [], 0
        specs.append(
            TensorSpec(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                bucket=len(buckets),
                part=len(parts),
                size_bytes=size,
            )
        )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        parts.append(flat.view(torch.uint8).numpy() if size else np.empty(0, dtype=np.uint8))
        used += size
    if not specs:
        raise ValueError(f"weights {version}: got no tensors, wanted at least one")
    buckets.append(_put_bucket(parts))
    return WeightManifest(version=version, tensors=tuple(specs), buckets=tuple(buckets))


def checksum(data: Bytes, before: int = 0) -> int:
    """Return the CRC-32 of the sums of a buffer's 8-byte words in 64 columns, and of what is left at its end.

    `before` is the checksum of what comes before it.

    It notices what an object store may do to bytes: a flipped bit, a torn or shifted or zeroed range. Reading at the
    speed of memory, it costs a tenth of a CRC of all bytes. No defence against whoever means to forge one.
    """
    line = 8 * CHECKSUM_COLUMNS
    whole = data.size // line * line
    sums = data[:whole].view(np.uint64).reshape(-1, CHECKSUM_COLUMNS).sum(axis=0, dtype=np.uint64)
    return zlib.crc32(data[whole:].tobytes(), zlib.crc32(sums.tobytes(), before))


def iter_tensors(manifest: WeightManifest, *, verified: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor as a view of the object store, without a copy; **read them, never write into them**.

    Every replica of the node shares these bytes. A bucket that came from another node is checked before its first
    tensor is given, so a reader that must not stop half-way goes through all of them first, and says `verified` the
    second time; on the node where it was put its bytes are those of the memory they were written to. Blocks on
    `ray.get`: not for an event loop's thread.

    Raises:
        CorruptBucket: bytes differ from what was put; the message names the bucket.
    """
    held: dict[int, list[Bytes]] = {}
    for spec in manifest.tensors:
        if spec.bucket not in held:
            held = {spec.bucket: _bucket(manifest, spec.bucket, verified=verified)}
        yield spec.name, _view(held[spec.bucket], spec=spec, version=manifest.version)


def parity(answer: WeightAnswer, *, version: str, probe: ParityProbe) -> float:
    """Return max |Δ log-prob| in nats between a replica's answer and the probe.

    Raises:
        ParityFailed: another version, another shape, a value that is not finite, or a difference above the bound.
    """
    if answer.version != version:
        raise ParityFailed(f"the replica holds version {answer.version!r}, wanted {version!r}")
    got, wanted = [len(row) for row in answer.logprobs], [len(row) for row in probe.logprobs]
    if got != wanted:
        raise ParityFailed(f"{version}: the replica answered {got} log-probs per probe sequence, wanted {wanted}")
    rows = zip(answer.logprobs, probe.logprobs, strict=True)
    pairs = [(a, b) for row, expected in rows for a, b in zip(row, expected, strict=True)]
    if not all(math.isfinite(a) for a, _ in pairs):
        raise ParityFailed(f"{version}: the replica answered log-probs that are not finite")
    worst = max((abs(a - b) for a, b in pairs), default=0.0)
    if not worst <= probe.bound:
        raise ParityFailed(f"{version}: max |Δ log-prob| is {worst:.3g} nats, wanted at most {probe.bound:.3g}")
    return worst


def _put_bucket(parts: list[Bytes]) -> Bucket:
    size_bytes = sum(part.size for part in parts)
    return Bucket(ref=ray.put(parts), size_bytes=size_bytes, checksum=_chained(parts), node_id=_node_id())


def _node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def _chained(parts: Iterable[Bytes]) -> int:
    total = 0
    for part in parts:
        total = checksum(part, total)
    return total


def _bucket(manifest: WeightManifest, index: int, *, verified: bool) -> list[Bytes]:
    bucket = manifest.buckets[index]
    parts: list[Bytes] = ray.get(bucket.ref)
    where = f"weights {manifest.version}: bucket {index} of {len(manifest.buckets)}"
    size_bytes = sum(part.size for part in parts)
    if size_bytes != bucket.size_bytes:
        raise CorruptBucket(f"{where} has {size_bytes} bytes, wanted {bucket.size_bytes}; publish the weights again")
    if not verified and bucket.node_id != _node_id() and (found := _chained(parts)) != bucket.checksum:
        raise CorruptBucket(
            f"{where} has checksum {found:08x}, wanted {bucket.checksum:08x}; publish the weights again"
        )
    return parts


def _view(parts: list[Bytes], *, spec: TensorSpec, version: str) -> torch.Tensor:
    import torch

    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CorruptBucket(f"weights {version}: {spec.name} has the unknown dtype {spec.dtype!r}")
    wanted = math.prod(spec.shape) * dtype.itemsize
    there = parts[spec.part].size if 0 <= spec.part < len(parts) else None
    if spec.size_bytes != wanted or there != wanted:
        raise CorruptBucket(
            f"weights {version}: {spec.name} {list(spec.shape)} {spec.dtype} needs {wanted} bytes; the manifest says "
            f"{spec.size_bytes} in part {spec.part} of bucket {spec.bucket}, which has {there}"
        )
    if not wanted:
        return torch.empty(spec.shape, dtype=dtype)
    flat = torch.from_numpy(np.asarray(_Unlocked(parts[spec.part])))
    return flat.view(dtype).view(spec.shape)


class _Unlocked:
    """A read-only array offered as a writable one, without a copy.

    torch has no read-only tensors and warns for every one that it makes from a read-only array; silencing the warning
    is not safe in threads. NumPy keeps this object, and with it the array, alive as the base of what it makes of it.
    """

    def __init__(self, data: Bytes) -> None:
        self.data = data
        interface = dict(data.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
