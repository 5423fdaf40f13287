"""Owns which version of the learner is served: it follows the commits, offers weights, and counts who took them.

    COMMIT.json ─┐                         ┌─► one replica first: loads, proves it ─► promoted ─► all others
    promote ─────┴─► hashes ─► object store┤
    (serving.json)   probe                 └─► refused, with the reason; the version before goes on serving

A Ray actor with a name; replicas and the gateway ask it and wait (long polls), so that one which starts later, or
again, needs no list of who was there. Promoted = committed, and the parity probe passed on a replica.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.commits import CorruptRun, committed_iterations, committed_policy, read_commit
from cluster.durable_files import write_json_atomic
from cluster.log import start_log
from cluster.weights import ParityProbe, WeightManifest, Weights, put_weights
from serve.wire import Catalog, ServedVersion

logger = logging.getLogger(__name__)

WANTED_FILE = "serving.json"
"""What a person wants to be served: {"wanted": "v7"}; without it, or with "newest", the newest commit."""
STATE_FILE = "served.json"
"""What is served, what was, and what was refused; written by the publisher."""
NEWEST = "newest"
NUM_PROBES = 8
PROBE_TOKENS = 32
LOOK_S = 0.5
"""How often the run directory is looked at."""
POLL_S = 10.0
"""How long an answer to a poll may wait for news."""
SILENT_S = 60.0
"""A replica that was offered a version and has said nothing for so long is not waited for."""
MAX_TRIALS = 2
"""Replicas on which a version must fail, or fall silent, before it is refused."""
METRICS = ("probe_accuracy", "live_attack_success", "parity_max_abs_diff")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a replica says of the version that it was offered."""

    version: str
    max_abs_diff: float | None
    """Nats; None when it did not take the version."""
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a replica is to load."""

    weights: Weights
    is_promoted: bool
    """False: this replica is the first to try it."""


@dataclass(slots=True)
class _Candidate:
    weights: Weights
    asked: str | None = None
    """The replica that tries it."""
    asked_at: float = 0.0
    failures: list[str] = field(default_factory=list)


class VersionBook:
    """Which version is served, which is tried and which were refused. Knows neither files nor Ray."""

    def __init__(self, first: Weights, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.current = first
        self.history: list[str] = [first[0].version]
        """Versions in the order in which they were promoted."""
        self.refused: dict[str, str] = {}
        self.holding: dict[str, str] = {}
        """Replica to the version that it holds."""
        self._clock = clock
        self._candidate: _Candidate | None = None

    @property
    def version(self) -> str:
        """The promoted version."""
        return self.current[0].version

    def wants(self, version: str) -> bool:
        """Return whether a version is news: neither served, nor tried, nor refused."""
        tried = self._candidate is not None and self._candidate.weights[0].version == version
        return version != self.version and not tried and version not in self.refused

    def nominate(self, weights: Weights) -> None:
        """Have a version tried, in the place of another that is being tried."""
        self._candidate = _Candidate(weights)

    def refuse(self, version: str, reason: str) -> None:
        """Serve a version never."""
        logger.error("%s is refused, %s goes on: %s", version, self.version, reason)
        self.refused[version] = reason

    def offer(self, replica: str) -> Offer | None:
        """Return what a replica is to load now; None when it has what it should."""
        candidate, now = self._candidate, self._clock()
        if self.holding.get(replica) != self.version and not (candidate and candidate.asked == replica):
            return Offer(weights=self.current, is_promoted=True)
        if candidate is None:
            return None
        if candidate.asked is not None and candidate.asked != replica and now - candidate.asked_at > SILENT_S:
            self._failed(candidate, f"replica {candidate.asked} fell silent")
        if self._candidate is None or candidate.asked not in (None, replica):
            return None
        if candidate.asked is None:
            candidate.asked, candidate.asked_at = replica, now
            return Offer(weights=candidate.weights, is_promoted=False)
        return None

    def hear(self, replica: str, outcome: Outcome) -> None:
        """Take what a replica says of what it was offered."""
        took = outcome.max_abs_diff is not None
        if took:
            self.holding[replica] = outcome.version
        candidate = self._candidate
        if candidate is None or candidate.weights[0].version != outcome.version:
            return
        if took:
            self.current, self._candidate = candidate.weights, None
            self.history.append(outcome.version)
            logger.info("%s is promoted: max |Δ| %.3g nats on replica %s", self.version, outcome.max_abs_diff, replica)
        else:
            self._failed(candidate, f"replica {replica}: {outcome.reason}")

    def _failed(self, candidate: _Candidate, reason: str) -> None:
        candidate.failures.append(reason)
        candidate.asked = None
        if len(candidate.failures) >= MAX_TRIALS:
            self.refuse(candidate.weights[0].version, "; ".join(candidate.failures))
            self._candidate = None


class Publisher:
    """The actor."""

    def __init__(self, run_dir: str, *, parity_bound: float, log_path: str | None = None) -> None:
        if log_path is not None:
            start_log(Path(log_path), console_level=None)
        self._run_dir = Path(run_dir)
        self._parity_bound = parity_bound
        self._news = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._book: VersionBook | None = None
        self._pinned: dict[str, Weights] = {}
        self._metrics = _Metrics(self._run_dir)

    async def start(self) -> str:
        """Begin, or do nothing the second time; return the version that is served."""
        async with self._starting:
            if self._book is None:
                version = wanted_version(self._run_dir)
                self._book = VersionBook(await asyncio.to_thread(self._weights, version))
                self._book.history = [v for v in read_state(self._run_dir).get("history", []) if v != version]
                self._book.history.append(version)
                self._write_state()
                self._watcher = asyncio.create_task(self._watch())
                self._watcher.add_done_callback(_end_when_failed)
        return self._book.version

    async def poll(self, replica: str, outcome: Outcome | None) -> Offer | None:
        """Return what a replica is to load, as soon as there is something; None after a while without news."""
        await self.start()
        assert self._book is not None, "start has made it"
        if outcome is not None:
            before = self._book.version
            self._book.hear(replica, outcome)
            if self._book.version != before or outcome.max_abs_diff is None:
                self._write_state()
            self._tell()
        ends_by = time.monotonic() + POLL_S
        while (offer := self._book.offer(replica)) is None and (left := ends_by - time.monotonic()) > 0:
            await self._wait(left)
        return offer

    async def weights(self, version: str) -> Weights:
        """Return a kept version, for a replica that serves pinned ones.

        Raises:
            ValueError: there is no such version, or its files are damaged.
        """
        await self.start()
        assert self._book is not None, "start has made it"
        if version == self._book.version:
            return self._book.current
        if version not in self._pinned:
            found = await asyncio.to_thread(self._weights, version)
            self._pinned = dict([*self._pinned.items(), (version, found)][-2:])
        return self._pinned[version]

    async def catalog(self, seen: Catalog | None) -> Catalog:
        """Return what can be asked, as soon as it differs from what was seen, or after a while."""
        await self.start()
        ends_by = time.monotonic() + POLL_S
        while (catalog := self._catalog()) == seen and (left := ends_by - time.monotonic()) > 0:
            await self._wait(left)
        return catalog

    async def holding(self) -> dict[str, str]:
        """Return which version each replica that ever asked holds."""
        await self.start()
        assert self._book is not None, "start has made it"
        return dict(self._book.holding)

    async def _watch(self) -> None:
        """Follow the run directory for ever."""
        assert self._book is not None, "start has made it"
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                version = wanted_version(self._run_dir)
            except ValueError as error:
                logger.error("%s", error)
                continue
            if self._book.wants(version):
                try:
                    self._book.nominate(await asyncio.to_thread(self._weights, version))
                except (ValueError, OSError) as error:
                    self._book.refuse(version, str(error))
                    self._write_state()
            self._tell()

    def _weights(self, version: str) -> Weights:
        begin = time.monotonic()
        commit = committed_policy(self._run_dir, version)
        directory = (self._run_dir / commit.policy[0].path).parent
        weights = policy_weights(directory, version=version, bound=self._parity_bound)
        logger.info("%s is in the object store after %.2f s", version, time.monotonic() - begin)
        return weights

    def _catalog(self) -> Catalog:
        assert self._book is not None, "start has made it"
        measured = self._metrics.read()
        versions = tuple(
            ServedVersion(version=f"v{i}", created=_created(self._run_dir, i), metrics=measured.get(f"v{i}", {}))
            for i in committed_iterations(self._run_dir)
        )
        return Catalog(current=self._book.version, versions=versions, refused=dict(self._book.refused))

    def _write_state(self) -> None:
        assert self._book is not None, "start has made it"
        book = self._book
        state = {"current": book.version, "history": book.history[-100:], "refused": book.refused, "time": time.time()}
        write_json_atomic(self._run_dir / STATE_FILE, state)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _wait(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return


def policy_weights(directory: Path, *, version: str, bound: float) -> Weights:
    """Return a policy directory's parameters in the object store, with what transformers says of probe sequences.

    Raises:
        ValueError: a parameter is not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, trust_remote_code=False).eval()
    named = list(model.named_parameters())
    for name, tensor in named:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{version}: {name} holds NaN or infinity, wanted finite weights: promote another version")
    manifest: WeightManifest = put_weights(named, version=version)
    generator = torch.Generator().manual_seed(0)
    text_config = model.config.get_text_config()
    longest = min(PROBE_TOKENS, int(getattr(text_config, "max_position_embeddings", PROBE_TOKENS)) - 1)
    rows = torch.randint(0, int(text_config.vocab_size), (NUM_PROBES, longest), generator=generator)
    with torch.inference_mode():
        table = model(rows).logits.float().log_softmax(-1)
    logprobs = table[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1)
    probe = ParityProbe(
        token_ids=tuple(tuple(row) for row in rows.tolist()),
        logprobs=tuple(tuple(row) for row in logprobs.tolist()),
        bound=bound,
    )
    return manifest, probe


# --------------------------------------------------------------------------------------------------------------- files


def wanted_version(run_dir: Path) -> str:
    """Return the version that is to be served: the one that a person named, or else the newest commit.

    Raises:
        ValueError: nothing is committed yet.
    """
    iterations = committed_iterations(run_dir)
    if not iterations:
        raise ValueError(
            f"{run_dir}: got no committed policy, wanted at least v0; go on by `elenchus resume {run_dir.name}`"
        )
    named = _read_object(run_dir / WANTED_FILE).get("wanted", NEWEST)
    return f"v{iterations[-1]}" if named == NEWEST else str(named)


def want_version(run_dir: Path, version: str) -> str:
    """Have a version served, or the newest from now on; return which one that is now.

    Raises:
        ValueError: there is no such version, or its files are damaged.
    """
    if version != NEWEST:
        try:
            version = f"v{committed_policy(run_dir, version).iteration}"
        except CorruptRun as error:
            raise ValueError(str(error)) from None
    write_json_atomic(run_dir / WANTED_FILE, {"wanted": version})
    return wanted_version(run_dir)


def previous_version(run_dir: Path) -> str:
    """Return the version that was served before the one that is.

    Raises:
        ValueError: there was none.
    """
    state = read_state(run_dir)
    before = [version for version in state.get("history", []) if version != state.get("current")]
    if not before:
        raise ValueError(
            f"{run_dir}: got a rollback and no version that was served before, wanted two promotions: name the version "
            f"by `elenchus promote {run_dir.name} vN`"
        )
    return str(before[-1])


def read_state(run_dir: Path) -> dict[str, Any]:
    """Return what the publisher wrote last; nothing when none ever ran."""
    return _read_object(run_dir / STATE_FILE)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got no JSON object, wanted it as it was written: delete it")
    return found


class _Metrics:
    """What the run has measured of each version; read again when it has grown."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._seen: tuple[int, int] | None = None
        self._found: dict[str, dict[str, float]] = {}

    def read(self) -> dict[str, dict[str, float]]:
        """Return the metrics by version."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return {}
        if (seen := (stat.st_mtime_ns, stat.st_size)) != self._seen:
            rows = [json.loads(line) for line in self._path.read_text().splitlines() if line.endswith("}")]
            self._found = {
                str(row.get("policy_version")): {
                    name: float(row[name]) for name in METRICS if isinstance(row.get(name), int | float)
                }
                for row in rows
            }
            self._seen = seen
        return self._found


def _end_when_failed(watcher: asyncio.Task[None]) -> None:
    """End the process, which Ray starts anew, rather than follow nothing in silence."""
    if not watcher.cancelled() and watcher.exception() is not None:
        logger.critical("the publisher's watcher failed", exc_info=watcher.exception())
        logging.shutdown()
        os._exit(1)


_TIMES: dict[tuple[Path, int], float] = {}


def _created(run_dir: Path, iteration: int) -> float:
    if (run_dir, iteration) not in _TIMES:
        _TIMES[run_dir, iteration] = read_commit(run_dir, iteration).time
    return _TIMES[run_dir, iteration]
