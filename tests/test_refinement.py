"""Only what is flagged is criticised, only what is criticised is mended, and a revision adds nothing unsupported."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from actors.claim_revision import Candidate, Revision, preferred_revisions, revise_claims
from actors.generation import Completion, GenerationRequest
from actors.records import lineage_id
from actors.refinement import (
    Document,
    Generate,
    Refinement,
    answered_by,
    detect_critique_refine,
    refined_pair,
    sentences,
)
from tests.fake_pool import FakePool, spoken
from tests.small_records import make_query, make_response

FACTS = ("The bridge was opened in 1932.", "It is 503 metres long.", "Trains and cars cross it.", "Its colour is grey.")
"""The source of the fixture; a sentence is borne out when it is one of these."""
SOURCE = " ".join(FACTS)


class Model:
    """Answers by a function of what it is told, and remembers the requests."""

    def __init__(self, write: Any) -> None:
        self._write = write
        self.asked: list[GenerationRequest] = []

    async def __call__(self, requests: Sequence[GenerationRequest]) -> Mapping[str, Completion]:
        self.asked += requests
        texts = {request.request_id: self._write(request.messages[0].content) for request in requests}
        return {name: spoken(text, request_id=name) for name, text in texts.items() if text is not None}


def detect(prompt: str) -> str:
    sentence = prompt.partition("Sentence:\n")[2].partition("\n\n")[0]
    return "Yes." if sentence in FACTS else "no"


def criticise(prompt: str) -> str:
    sentence = prompt.partition("by the source:\n")[2].partition("\n\n")[0]
    # The fact that begins alike says what is right.
    right = next(fact for fact in FACTS if fact.split()[:2] == sentence.split()[:2])
    wrong, fix = next((a, b) for a, b in zip(sentence.split(), right.split(), strict=True) if a != b)
    return "Sure: " + json.dumps({"span": wrong, "reason": "The source says otherwise.", "fix": fix})


def mend(prompt: str) -> str:
    response = prompt.partition("Response:\n")[2].partition("\n\nMend")[0]
    for line in prompt.partition("as it is:\n")[2].partition("\n\nAnswer")[0].splitlines():
        span, fix = line.split('"')[1], line.rpartition("Write: ")[2]
        response = response.replace(span, fix)
    return response


def refined(
    *responses: str, detector: Any = detect, critic: Any = criticise, refiner: Any = mend
) -> tuple[list[Refinement], dict[str, Model]]:
    models = {"detector": Model(detector), "critic": Model(critic), "refiner": Model(refiner)}
    documents = [Document(document_id=f"d{i}", source=SOURCE, response=text) for i, text in enumerate(responses)]
    found = asyncio.run(
        detect_critique_refine(
            documents, detector=models["detector"], critic=models["critic"], refiner=models["refiner"]
        )
    )
    return found, models


# ------------------------------------------------------------------------------------------- detect, critique, refine


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "no." Then he left.\n\n- A list\n', ['He said "no."', "Then he left.", "- A list"]),
        ("It is 3.5 m long", ["It is 3.5 m long"]),
        ("  \n ", []),
    ],
)
def test_a_text_is_split_where_sentences_end(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


def test_a_clean_response_is_returned_byte_for_byte_and_nobody_but_the_detector_is_asked() -> None:
    text = f"  {FACTS[0]}\n\n{FACTS[1]} \n"
    (found,), models = refined(text)
    assert found.refined == text
    assert (found.flagged, found.critiques, found.num_unread, found.num_dropped) == ((), (), 0, 0)
    assert [len(models[name].asked) for name in ("detector", "critic", "refiner")] == [2, 0, 0]


def test_each_flagged_sentence_is_criticised_once_and_all_are_mended_in_one_go() -> None:
    wrong = "The bridge was opened in 1923. It is 503 metres long. Trains and ships cross it. Its colour is grey."
    (found, clean), models = refined(wrong, SOURCE)
    assert found.flagged == (0, 2)
    assert [(c.sentence, c.span, c.fix) for c in found.critiques] == [(0, "1923.", "1932."), (2, "ships", "cars")]
    # Critique calls = flagged sentences; one refinement of the one response that has any.
    assert [len(models[name].asked) for name in ("detector", "critic", "refiner")] == [8, 2, 1]
    assert found.refined == SOURCE == clean.refined
    # What was right is still there, word for word.
    assert {sentence for sentence in sentences(wrong) if sentence in FACTS} <= set(sentences(found.refined))


def test_of_many_injected_errors_each_is_edited_and_what_was_right_is_kept() -> None:
    def spoilt(fact: str) -> str:
        return fact.replace(fact.split()[-1], "wrong.")

    responses = [" ".join(spoilt(fact) if i == k else fact for i, fact in enumerate(FACTS)) for k in range(4)]
    found, _ = refined(*responses)
    for k, one in enumerate(found):
        assert one.flagged == (k,)
        mended, kept = sentences(one.refined), [fact for i, fact in enumerate(FACTS) if i != k]
        assert "wrong." not in one.refined
        assert sum(fact in mended for fact in kept) / len(kept) >= 0.95


def test_a_short_sentence_passes_unasked() -> None:
    (found,), models = refined(f"Of course. {FACTS[0]}")
    assert len(models["detector"].asked) == 1
    assert found.flagged == ()


def test_what_can_not_be_read_is_missing_and_counted_never_a_flaw() -> None:
    wrong = "The bridge was opened in 1923. Trains and ships cross it."
    (unread,), models = refined(wrong, detector=lambda prompt: "perhaps")
    assert (unread.refined, unread.flagged, unread.num_unread) == (wrong, (), 2)
    assert not models["critic"].asked
    for said in (
        "it is wrong",
        '{"span": "1066", "reason": "r", "fix": "f"}',
        '{"span": 3}',
        "[]",
        "}{",
        '{"span": ""}',
    ):
        (dropped,), models = refined(wrong, critic=lambda prompt, said=said: said)
        assert (dropped.refined, dropped.flagged, dropped.critiques, dropped.num_dropped) == (wrong, (0, 1), (), 2)
        assert not models["refiner"].asked
    (lost,), _ = refined(wrong, refiner=lambda prompt: None)
    assert lost.refined == wrong


def test_a_pool_answers_requests() -> None:
    pool = FakePool(lambda request: request.request_id, arrival_seed=2)
    generate: Generate = answered_by(pool)  # type: ignore[arg-type]
    requests = [GenerationRequest(request_id=f"r{i}", messages=(), max_tokens=4) for i in range(6)]
    found = asyncio.run(generate(requests))
    assert {name: completion.text for name, completion in found.items()} == {f"r{i}": f"r{i}" for i in range(6)}
    assert asyncio.run(generate([])) == {}


def test_a_refined_response_is_preferred_to_the_original_but_not_to_itself() -> None:
    query, response = make_query("q"), make_response("r", text="2+2=5")

    def pair(text: str) -> Any:
        return refined_pair(
            query,
            response,
            text,
            token_ids=[*map(ord, text), 0],
            refined_id="m",
            margin=0.7,
            source="critic",
            run="test",
        )

    found = pair("2+2=4")
    assert (found.chosen, found.rejected, found.margin, found.source) == ("2+2=4", "2+2=5", 0.7, "critic")
    assert found.chosen_token_ids == (*map(ord, "2+2=4"), 0)
    assert found.rejected_token_ids == response.token_ids
    assert (found.chosen_id, found.rejected_id) == ("m", "r")
    # As of pairs of answers: by what is compared, so that no other record has its name.
    assert found.pair_id == lineage_id("test", iteration=query.iteration, stage="pairs", parents=["m", "r"])
    assert (found.age, found.chosen_logprobs) == (None, None)
    assert pair("2+2=5") is None


# ------------------------------------------------------------------------------------------------------ claim by claim


async def look_up(claim: str) -> Sequence[str]:
    return [fact for fact in FACTS if fact.split()[:2] == claim.split()[:2]]


def evaluate(prompt: str) -> str:
    evidence, claim = (part.partition("\n\n")[0] for part in (prompt.partition("Evidence:\n")[2],
                                                                prompt.partition("Claim:\n")[2]))  # fmt: skip
    return f"The evidence says: {evidence}\n{'Supported' if claim == evidence else 'unsupported.'}"


def revise(prompt: str) -> str:
    return prompt.partition("Evidence:\n")[2].partition("\n\n")[0] or "DELETE"


def revised(*texts: str, reviser: Any = revise, evaluator: Any = evaluate, min_recall: float = 0.5) -> list[Revision]:
    candidates = [Candidate(candidate_id=f"c{i}", group="g", text=text) for i, text in enumerate(texts)]
    return asyncio.run(
        revise_claims(
            candidates, evidence=look_up, evaluator=Model(evaluator), reviser=Model(reviser), min_recall=min_recall
        )
    )


MIXED = "The bridge was opened in 1923. It is 503 metres long. Nobody knows who built it. Its colour is grey."


def test_unsupported_claims_are_corrected_by_the_evidence_or_deleted() -> None:
    (found,) = revised(MIXED)
    # Two of four are supported; then the first is corrected, and the third, of which there is no evidence, deleted.
    assert found.score_before == pytest.approx(2 / 4)
    assert found.score == pytest.approx(3 / 3)
    assert found.revised == "The bridge was opened in 1932. It is 503 metres long. Its colour is grey."
    assert [claim.revised for claim in found.claims] == [FACTS[0], FACTS[1], "", FACTS[3]]
    # Nothing but the original's claims and what the evidence supports.
    assert set(sentences(found.revised)) <= set(sentences(MIXED)) | set(FACTS)


def test_a_correction_that_the_evidence_does_not_support_is_not_taken() -> None:
    (found,) = revised(MIXED, reviser=lambda prompt: "It was built by giants in 1700.")
    assert found.revised == "It is 503 metres long. Its colour is grey."
    assert "giants" not in found.revised
    assert found.score == 1.0


def test_a_candidate_that_would_lose_most_of_its_claims_stays_as_it_is() -> None:
    text = "Nobody knows who built it. Some say it is cursed. All of them are wrong. Its colour is grey."
    (found,) = revised(text)
    assert found.revised == text
    assert found.score == pytest.approx(1 / 4)
    (found,) = revised(text, min_recall=0.25)
    assert (found.revised, found.score) == (FACTS[3], 1.0)


def test_a_supported_text_stays_as_it_is_white_space_and_all() -> None:
    text = f"{FACTS[0]}\n\n{FACTS[1]}"
    (found,) = revised(text)
    assert (found.revised, found.score_before, found.score) == (text, 1.0, 1.0)


def test_a_claim_whose_evaluation_can_not_be_read_counts_neither_way() -> None:
    def mumble(prompt: str) -> str:
        return "who knows" if "grey" in prompt.partition("Claim:\n")[2] else evaluate(prompt)

    (found,) = revised(f"{FACTS[0]} Nobody knows who built it. {FACTS[3]}", evaluator=mumble)
    assert found.num_unread == 1
    assert found.score_before == pytest.approx(1 / 2)
    assert found.revised == f"{FACTS[0]} {FACTS[3]}"
    (unread,) = revised(FACTS[0], evaluator=lambda prompt: "")
    assert (unread.score, unread.revised) == (None, FACTS[0])


def test_the_best_revision_of_a_group_is_preferred_to_its_worst() -> None:
    unmended = "Nobody knows who built it. Some say it is cursed. Its colour is grey."
    found = revised(MIXED, unmended, FACTS[1])
    # 3/3, 1/3 (two of three would go), and 1/1.
    assert [one.score for one in found] == [1.0, pytest.approx(1 / 3), 1.0]
    ((better, worse),) = preferred_revisions(found)
    assert (better.candidate.candidate_id, worse.candidate.candidate_id) == ("c0", "c1")
    assert preferred_revisions(found, margin=0.7) == []
    assert preferred_revisions(found[:1]) == []
