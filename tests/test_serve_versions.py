"""Which version is served: the book of versions, a swap under running answers, turns of pinned versions, the files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.engine_config import EngineConfig
from actors.engine_thread import Finished, Sample
from cluster.weights import ParityFailed, ParityProbe, WeightManifest, Weights
from serve.learner_engine import LearnerEngine, Outgoing, PieceStream, ServedSample
from serve.learner_replica import Turns, joined
from serve.publisher import SILENT_S, Outcome, VersionBook, previous_version, want_version, wanted_version
from serve.wire import AnswerLost, Piece, Sampling, ServedRequest
from tests.served_run import commit_version, make_run


def weights(version: str, *, logprob: float = -1.0) -> Weights:
    """Return a version without tensors, whose publisher gives every probed token one log-prob."""
    probe = ParityProbe(token_ids=((1, 2, 3),), logprobs=((logprob, logprob),), bound=1e-4)
    return WeightManifest(version=version, tensors=(), buckets=()), probe


def took(version: str) -> Outcome:
    return Outcome(version=version, max_abs_diff=1e-6)


def failed(version: str) -> Outcome:
    return Outcome(version=version, max_abs_diff=None, reason="parity")


# ----------------------------------------------------------------------------------------------------------- the book


@pytest.fixture
def book() -> VersionBook:
    """A book whose three replicas hold v0."""
    book = VersionBook(weights("v0"))
    for replica in "abc":
        offer = book.offer(replica)
        assert offer is not None
        assert offer.is_promoted
        book.hear(replica, took("v0"))
        assert book.offer(replica) is None
    return book


def offered(book: VersionBook, replica: str) -> str | None:
    offer = book.offer(replica)
    return None if offer is None else offer.weights[0].version


def test_a_version_is_tried_on_one_replica_before_the_others_have_it(book: VersionBook) -> None:
    book.nominate(weights("v1"))
    assert offered(book, "b") == "v1"
    assert [offered(book, replica) for replica in "ac"] == [None, None]
    assert book.version == "v0"
    book.hear("b", took("v1"))
    assert book.version == "v1"
    assert [offered(book, replica) for replica in "abc"] == ["v1", None, "v1"]
    assert book.history == ["v0", "v1"]


def test_a_version_that_fails_on_two_replicas_is_refused_for_good(book: VersionBook) -> None:
    book.nominate(weights("v1"))
    assert offered(book, "a") == "v1"
    book.hear("a", failed("v1"))
    assert offered(book, "b") == "v1"
    book.hear("b", failed("v1"))
    assert (book.version, list(book.refused)) == ("v0", ["v1"])
    assert "replica a: parity; replica b: parity" in book.refused["v1"]
    assert [offered(book, replica) for replica in "abc"] == [None] * 3
    assert not book.wants("v1")
    assert book.wants("v2")


def test_one_replica_that_fails_does_not_condemn_a_version(book: VersionBook) -> None:
    book.nominate(weights("v1"))
    assert offered(book, "a") == "v1"
    book.hear("a", failed("v1"))
    assert offered(book, "c") == "v1"
    book.hear("c", took("v1"))
    assert (book.version, book.refused) == ("v1", {})
    assert offered(book, "a") == "v1"


def test_a_replica_that_falls_silent_on_a_trial_is_not_waited_for() -> None:
    now = [0.0]
    book = VersionBook(weights("v0"), clock=lambda: now[0])
    for replica in "ab":
        book.hear(replica, took("v0"))
    book.nominate(weights("v1"))
    assert offered(book, "a") == "v1"
    now[0] += SILENT_S - 1
    assert offered(book, "b") is None
    now[0] += 2
    assert offered(book, "b") == "v1"
    book.hear("b", took("v1"))
    assert book.version == "v1"


def test_a_later_replica_starts_with_the_current_version(book: VersionBook) -> None:
    book.nominate(weights("v1"))
    assert offered(book, "a") == "v1"
    assert offered(book, "late") == "v0", "v1 is not proved yet"
    book.hear("a", took("v1"))
    assert offered(book, "later") == "v1"


def test_a_newer_version_takes_the_place_of_one_that_is_tried(book: VersionBook) -> None:
    book.nominate(weights("v1"))
    assert offered(book, "a") == "v1"
    book.nominate(weights("v2"))
    book.hear("a", took("v1"))
    assert book.version == "v0"
    assert offered(book, "a") == "v0", "v1 was never promoted"
    assert offered(book, "b") == "v2"


# ----------------------------------------------------------------------------------------------------------- a swap


class GrowingEngine:
    """An engine that gives every answer a token a step, named after its weights; probes get the weights' log-prob."""

    max_model_len = 64

    def __init__(self, logprobs: Mapping[str, float]) -> None:
        self.outgoing = Outgoing()
        self.version = ""
        self.loads: list[str] = []
        self._logprobs = logprobs
        self._open: dict[str, tuple[Sample, list[str]]] = {}

    def add(self, name: str, sample: Sample, *, priority: int) -> None:
        self._open[name] = (sample, [])

    def abort(self, names: list[str]) -> None:
        for name in names:
            del self._open[name]

    def is_busy(self) -> bool:
        return bool(self._open)

    def step(self) -> list[tuple[str, Finished]]:
        done = []
        for name, (sample, tokens) in list(self._open.items()):
            tokens.append(self.version)
            wanted = sample.asked.sampling.max_tokens if isinstance(sample, ServedSample) else 1
            last = len(tokens) == wanted
            if isinstance(sample, ServedSample):
                piece = Piece(index=0, text=self.version + " ", num_tokens=1, finish_reason="length" if last else None)
                self.outgoing.push(sample.stream, piece)
            if last:
                del self._open[name]
                logprob = self._logprobs[self.version]
                done.append((name, _finished(tokens, prompt_logprobs=(logprob, logprob))))
        self.outgoing.step_ends()
        return done

    def load_weights(self, manifest: WeightManifest) -> None:
        self.loads.append(manifest.version)
        self.version = manifest.version


def _finished(tokens: list[str], *, prompt_logprobs: tuple[float, ...]) -> Finished:
    return Finished(
        token_ids=(1,) * len(tokens),
        logprobs=(),
        mark_positions=(),
        label_logprobs=(),
        weight_spans=(),
        finish_reason="length",
        prompt_logprobs=prompt_logprobs,
    )


def request(*, max_tokens: int) -> ServedRequest:
    sampling = Sampling(max_tokens=max_tokens)
    return ServedRequest(request_id="r", prompts=((1, 2),), sampling=sampling, version=None, stream=True)


async def collected(stream: PieceStream) -> str:
    """Return all text of a stream, to its end or its error."""
    text = ""
    while True:
        await stream.arrived.wait()
        pieces = stream.take()
        text += "".join(piece.text for piece in pieces)
        if stream.error is not None:
            raise stream.error
        if any(piece.finish_reason for piece in pieces):
            return text


@asynccontextmanager
async def serving(logprobs: Mapping[str, float]) -> AsyncIterator[tuple[LearnerEngine, GrowingEngine, list[Any]]]:
    fake, deaths = GrowingEngine(logprobs), list[Any]()
    engine = LearnerEngine(
        EngineConfig(model="x"), seed=0, on_fatal=deaths.append, make_engine=lambda config, seed: fake, expected={}
    )
    await engine.started()
    yield engine, fake, deaths  # type: ignore[misc]


def test_a_swap_changes_the_weights_under_a_running_answer() -> None:
    async def story() -> None:
        async with serving({"v0": -1.0, "v1": -2.0}) as (engine, _, deaths):
            assert await engine.take(weights("v0")) == 0.0
            stream = engine.begin(request(max_tokens=200_000))
            await stream.arrived.wait()
            await engine.take(weights("v1", logprob=-2.0))
            text = await collected(stream)
            assert set(text.split()) == {"v0", "v1"}
            assert len(text.split()) == 200_000
            assert deaths == []

    asyncio.run(story())


def test_weights_that_fail_the_probe_are_taken_out_again_and_no_token_of_theirs_leaves() -> None:
    async def story() -> None:
        async with serving({"v0": -1.0, "v1": -2.5}) as (engine, fake, deaths):
            await engine.take(weights("v0"))
            stream = engine.begin(request(max_tokens=10**9))
            await stream.arrived.wait()
            seen = "".join(piece.text for piece in stream.take())
            with pytest.raises(ParityFailed, match=r"max \|Δ log-prob\| is 0.5 nats"):
                await engine.take(weights("v1", logprob=-2.0))
            while stream.error is None:
                await stream.arrived.wait()
                seen += "".join(piece.text for piece in stream.take())
            assert isinstance(stream.error, AnswerLost)
            assert str(stream.error) == "v1 was refused while this was answered"
            assert "v1" not in seen
            assert fake.loads == ["v0", "v1", "v0"]
            assert await collected(engine.begin(request(max_tokens=2))) == "v0 v0 "
            assert engine.weights is not None
            assert engine.weights[0].version == "v0"
            assert deaths == []

    asyncio.run(story())


def test_without_weights_before_a_failed_probe_ends_the_replica() -> None:
    async def story() -> None:
        async with serving({"v0": -1.5}) as (engine, _, deaths):
            with pytest.raises(ParityFailed):
                await engine.take(weights("v0"))
            assert [type(error) for error in deaths] == [ParityFailed]

    asyncio.run(story())


def test_an_answer_that_nobody_wants_any_more_leaves_the_engine() -> None:
    async def story() -> None:
        async with serving({"v0": -1.0}) as (engine, fake, _):
            await engine.take(weights("v0"))
            stream = engine.begin(request(max_tokens=10**9))
            await stream.arrived.wait()
            engine.abort(stream)
            async with asyncio.timeout(5):
                while fake.is_busy():
                    await asyncio.sleep(0.01)
            await engine.check(timeout_s=5.0)

    asyncio.run(story())


# ----------------------------------------------------------------------------------------------------- pinned versions


def test_requests_of_one_version_run_together_and_another_waits_for_them() -> None:
    log: list[str] = []

    async def change(state: str) -> None:
        log.append(f"load {state}")
        await asyncio.sleep(0.01)

    async def use(turns: Turns, name: str, state: str) -> None:
        async with turns.of(state, change):
            log.append(f"{name} in")
            await asyncio.sleep(0.05)
            log.append(f"{name} out")

    async def story() -> None:
        turns = Turns()
        # c comes after b, though its version is held: else b might wait for ever.
        uses = (("a1", "v1"), ("a2", "v1"), ("b", "v2"), ("c", "v1"))
        await asyncio.gather(*(use(turns, name, state) for name, state in uses))

    asyncio.run(story())
    assert log[:3] == ["load v1", "a1 in", "a2 in"]
    assert sorted(log[3:5]) == ["a1 out", "a2 out"]
    assert log[5:] == ["load v2", "b in", "b out", "load v1", "c in", "c out"]


def test_a_change_that_fails_or_is_given_up_leaves_the_turn_to_the_next() -> None:
    async def change(state: str) -> None:
        if state == "bad":
            raise ValueError("no such version")
        if state == "slow":
            await asyncio.Event().wait()

    async def use(turns: Turns, state: str) -> str:
        async with turns.of(state, change):
            return state

    async def story() -> None:
        turns = Turns()
        with pytest.raises(ValueError, match="no such version"):
            await use(turns, "bad")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await use(turns, "slow")
        assert await use(turns, "v1") == "v1"

    asyncio.run(story())


def test_pieces_that_come_together_travel_together() -> None:
    pieces = [
        Piece(index=1, text="a", num_tokens=1),
        Piece(index=0, text="x", num_tokens=1),
        Piece(index=1, text="b", num_tokens=2, finish_reason="stop", weight_spans=(("v1", 0, 3),)),
    ]
    assert joined(pieces) == [
        Piece(index=1, text="ab", num_tokens=3, finish_reason="stop", weight_spans=(("v1", 0, 3),)),
        Piece(index=0, text="x", num_tokens=1),
    ]


# -------------------------------------------------------------------------------------------------------------- files


def test_the_newest_commit_is_served_until_a_person_names_a_version(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_versions=3)
    assert wanted_version(run) == "v2"
    assert want_version(run, "v1") == "v1"
    commit_version(run, 3)
    assert wanted_version(run) == "v1"
    assert want_version(run, "newest") == "v3"


def test_a_version_that_is_not_there_or_damaged_is_not_promoted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_versions=2)
    with pytest.raises(ValueError, match='got version "v7", wanted one of v0, v1'):
        want_version(run, "v7")
    with (run / "policies" / "v000001" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        want_version(run, "v1")
    assert wanted_version(run) == "v1", "nothing was written; the publisher itself looks at hashes"


def test_a_rollback_names_the_version_before(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_versions=1)
    with pytest.raises(ValueError, match="a rollback and no version that was served before"):
        previous_version(run)
    (run / "served.json").write_text(json.dumps({"current": "v4", "history": ["v1", "v3", "v4"]}))
    assert previous_version(run) == "v3"


def test_a_run_without_a_commit_can_not_be_served(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_versions=0)
    with pytest.raises(ValueError, match="got no committed policy, wanted at least v0; go on by `elenchus resume run`"):
        wanted_version(run)
