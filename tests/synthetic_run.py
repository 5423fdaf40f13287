"""Builds a small run directory out of records and metrics, as a run would have left it; no engine, no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from actors.records import (
    Critique,
    EvaluationAnswer,
    Issue,
    Message,
    PreferencePair,
    Proposal,
    Query,
    Response,
    Verdict,
    to_table,
)
from trainers.statistics import agreement, paired_gain
from trainers.summary import (
    AgreementMetrics,
    BeforeAfter,
    CellCounts,
    CountedBeforeAfter,
    GainSummary,
    Gold,
    IterationMetrics,
    Summary,
    WallSeconds,
    summarise_agreement,
    summarise_experts,
    summarise_pairs,
)

RIGHT = "7+5+0=12 8+6+1=15 157"
WRONG = "7+5+0=12 8+6+1=14 147"


def make_row(
    iteration: int, *, probe_accuracy: float = 0.5, good_passed: int = 90, live: float | None = 0.4
) -> IterationMetrics:
    """Return a row whose critic passes `good_passed` of 100 good answers and fails 95 of 100 bad ones."""
    truth = [True] * 100 + [False] * 100
    passed = [i < good_passed for i in range(100)] + [i < 5 for i in range(100)]
    return IterationMetrics(
        iteration=iteration,
        policy_version=f"v{iteration}",
        live_attack_success=live,
        num_attacks=96,
        probe_accuracy=probe_accuracy,
        num_probe=240,
        critic_agreement=AgreementMetrics.of(agreement(truth, passed), auroc=0.97, num_unjudged=3),
        experts_asked=12,
        num_verdicts=384,
        pairs_trained=60,
        pairs_dropped={"all_pass": 20, "all_fail": 10 + iteration, "margin": 6},
        proposals={"accepted": 96, "invalid": 3},
        cells=(
            CellCounts(facets=("+", "3", "2"), num_pass=30, num_fail=10),
            CellCounts(facets=("-", "3", "1"), num_pass=0, num_fail=0),
        ),
        seconds={"queries": 2.5, "responses": 6.0, "training": 4.0},
        wall_s=14.5,
        tokens_per_s={"rollout": 5200.0, "critic": 4100.0},
        parity_max_abs_diff=3e-7,
        training={"loss": 0.61, "grad_norm": 1.2},
    )


def make_summary(rows: list[IterationMetrics], *, run: str = "demo") -> Summary:
    """Return the summary of a finished run with these rows: 40 of 100 sealed problems right before, 70 after."""
    gain = paired_gain([i < 40 for i in range(100)], [5 <= i < 75 for i in range(100)])
    return Summary(
        run=run,
        sealed_accuracy=GainSummary.of(gain),
        sealed_accuracy_well_formed=GainSummary.of(gain),
        well_formed=BeforeAfter(before=0.99, after=1.0),
        ood_accuracy=CountedBeforeAfter(before=0.1, after=0.2, n=216),
        attack_success=CountedBeforeAfter(before=0.6, after=0.25, n=500),
        live_attack_success={row.iteration: row.live_attack_success for row in rows},
        critic_agreement=summarise_agreement(rows),
        experts=summarise_experts(rows),
        gold=Gold(learner_bootstrap=9000, critic_bootstrap=12000, expert=36, calibration=0, canaries=0),
        regime="critic_expert",
        policy_version=rows[-1].policy_version,
        parity_max_abs_diff=3e-7,
        pairs=summarise_pairs(rows),
        wall_s=WallSeconds(bootstrap=120.0, start=40.0, iterations=130.0, total=300.0),
        tokens_per_s={"attacker": 900.0, "rollout": 5200.0, "critic": 4100.0},
        seed=1,
        commit="0123456789abcdef",
    )


START = {
    "sealed": [False, False, True, True],
    "out_of_distribution": [False, False],
    "attack_set": [False, False, True],
    "probe": [True, False, False],
}
"""Which evaluation problems are answered rightly before training."""
END = {
    "sealed": [True, True, True, False],
    "out_of_distribution": [False, False],
    "attack_set": [True, False, True],
    "probe": [True, True, False],
}
"""And after the last iteration."""


def write_start(run_dir: Path) -> None:
    """Write iteration 0's tables: the evaluation sets, answered before training."""
    _write(run_dir, 0, {"evaluations": (_evaluations(START, iteration=0), EvaluationAnswer)})


def write_journal(
    run_dir: Path,
    *,
    iteration: int,
    num_queries: int = 6,
    question: str = "87+75",
    wrong: str = WRONG,
    is_last: bool = False,
    keeps_agreement: bool = True,
) -> None:
    """Write one iteration's tables: per query a right and a wrong answer, judged by a critic that is sometimes wrong.

    Of every three queries the critic fails the wrong answer of the first and of the second, and passes that of the
    third with P(good) 0.6; that one goes to the expert, who fails it. Each query gives a pair. Truth was asked about
    every answer, unless the run is of a version that kept no list of them.
    """
    queries, responses, critiques, verdicts, pairs, kept = [], [], [], [], [], []
    for number in range(num_queries):
        query = _query(f"q{iteration}-{number}", question=question, iteration=iteration, carries=2 - number % 3)
        queries.append(query)
        answers = [
            _response(f"{query.query_id}-r{i}", query.query_id, text=text, sample=i, version=f"v{iteration - 1}")
            for i, text in enumerate((RIGHT, wrong))
        ]
        responses += answers
        pairs.append(_pair(query, *answers))
        for answer in answers:
            fooled = answer.sample_index == 1 and number % 3 == 2
            score = 0.6 if fooled else 0.98 if answer.sample_index == 0 else 0.03
            critiques.append(_critique(answer.response_id, query.query_id, text=answer.text, score=score))
            verdicts.append(_verdict(answer.response_id, query.query_id, score=score, overruled=fooled))
            kept.append(_kept(query, answer, item=len(kept)))
    sets = END if is_last else {"probe": END["probe"]}
    evaluations = _evaluations(sets, iteration=iteration) + (kept if keeps_agreement else [])
    _write(
        run_dir,
        iteration,
        {
            "proposals": (_proposals(iteration), Proposal),
            "queries": (queries, Query),
            "responses": (responses, Response),
            "critiques": (critiques, Critique),
            "verdicts": (verdicts, Verdict),
            "pairs": (pairs, PreferencePair),
            "evaluations": (evaluations, EvaluationAnswer),
        },
    )


def _write(run_dir: Path, iteration: int, stages: dict[str, tuple[list[Any], type]]) -> None:
    directory = run_dir / "journal" / f"iteration={iteration:06d}"
    directory.mkdir(parents=True)
    for name, (rows, kind) in stages.items():
        pq.write_table(to_table(rows, kind), directory / f"{name}.parquet")
    (directory / "COMMIT.json").write_text("{}")


def _evaluations(sets: dict[str, list[bool]], *, iteration: int) -> list[EvaluationAnswer]:
    return [
        EvaluationAnswer(
            answer_id=f"{name}-{iteration}-{item}",
            set_name=name,
            iteration=iteration,
            item=item,
            query=f"{item}1+11",
            facets=("+", "2", "0"),
            text=RIGHT if correct else WRONG,
            correct=correct,
            well_formed=True,
            policy_version=f"v{iteration}",
        )
        for name, grades in sets.items()
        for item, correct in enumerate(grades)
    ]


def _kept(query: Query, answer: Response, *, item: int) -> EvaluationAnswer:
    return EvaluationAnswer(
        answer_id=answer.response_id,
        set_name="agreement",
        iteration=query.iteration,
        item=item,
        query=query.messages[-1].content,
        facets=query.facets,
        text=answer.text,
        correct=answer.sample_index == 0,
        well_formed=True,
        policy_version=answer.policy_version,
    )


def _proposals(iteration: int) -> list[Proposal]:
    outcomes = ("accepted", "invalid", "wrong_split", "invalid")
    return [
        Proposal(
            proposal_id=f"p{iteration}-{i}",
            iteration=iteration,
            sample_index=i,
            text=f"{i}+?",
            target=("+", "2", "0"),
            outcome=outcome,
            query_id=f"q{iteration}-0" if outcome == "accepted" else None,
        )
        for i, outcome in enumerate(outcomes)
    ]


def _pair(query: Query, chosen: Response, rejected: Response) -> PreferencePair:
    return PreferencePair(
        pair_id=f"pair-{query.query_id}",
        query_id=query.query_id,
        prompt=query.messages,
        chosen=chosen.text,
        rejected=rejected.text,
        prompt_token_ids=chosen.prompt_token_ids,
        chosen_token_ids=chosen.token_ids,
        rejected_token_ids=rejected.token_ids,
        margin=0.95,
        weight=1.0,
        noise=0.0,
        source="critic",
        chosen_id=chosen.response_id,
        rejected_id=rejected.response_id,
        iteration=query.iteration,
        age=0,
        chosen_logprobs=chosen.logprobs,
        rejected_logprobs=rejected.logprobs,
        other_margins=None,
    )


def _query(query_id: str, *, question: str, iteration: int, carries: int) -> Query:
    return Query(
        query_id=query_id,
        sample_index=int(query_id.rsplit("-", 1)[-1]),
        messages=(Message(role="user", content=question),),
        domain="arithmetic",
        facets=("+", "3", str(carries)),
        canonical=question,
        attack="quality_diversity",
        parent_id=None,
        iteration=iteration,
        attacker_version="v0",
        split="train",
    )


def _response(response_id: str, query_id: str, *, text: str, sample: int, version: str) -> Response:
    return Response(
        response_id=response_id,
        query_id=query_id,
        sample_index=sample,
        text=text,
        prompt_token_ids=(1, 2, 3),
        token_ids=(4, 5, 6),
        logprobs=(-0.1, -0.2, -0.3),
        policy_version=version,
        finish_reason="stop",
    )


def _critique(response_id: str, query_id: str, *, text: str, score: float) -> Critique:
    flaw = Issue(
        start=0, end=8, quote=text[:8], severity=2, category="step", explanation="recomputed otherwise", fix=""
    )
    return Critique(
        critique_id=f"c-{response_id}",
        query_id=query_id,
        response_ids=(response_id,),
        mode="pointwise",
        text=f"{text[:8]}?{text[:8]}{'y' if score >= 0.5 else 'n'}{'P' if score >= 0.5 else 'F'}",
        issues=() if score >= 0.5 else (flaw,),
        verdict="pass" if score >= 0.5 else "fail",
        score=score,
        label_logprobs=(-0.01,),
        order="single",
        critic_version="v0",
        parse_ok=True,
        num_dropped_issues=0,
        cost_tokens=20,
    )


def _verdict(response_id: str, query_id: str, *, score: float, overruled: bool) -> Verdict:
    return Verdict(
        verdict_id=f"j-{response_id}",
        query_id=query_id,
        response_id=response_id,
        label="fail" if overruled or score < 0.5 else "pass",
        score=0.0 if overruled else score,
        confidence=1.0 if overruled else max(score, 1 - score),
        source="expert" if overruled else "critic",
        escalated=overruled,
        drawn=False,
        flaw_end=None,
    )
