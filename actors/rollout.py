"""Owns the learner's side of the loop: sampled answers to queries, and greedy answers for evaluation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from actors.generation import Completion, GenerationRequest
from actors.records import Message, Query, Response, draw_seed, lineage_id
from cluster.config import Config

if TYPE_CHECKING:
    from cluster.pool import Pool


class RolloutConfig(Config):
    """How the learner is sampled."""

    num_samples: int = Field(default=8, ge=2)
    """Answers to each query."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Sampling temperature."""
    max_tokens: int = Field(default=48, gt=0)
    """Longest answer, in tokens."""


class Rollout:
    """Samples the current learner."""

    def __init__(
        self, pool: Pool[GenerationRequest, Completion], *, config: RolloutConfig, run: str, seed: int
    ) -> None:
        self._pool = pool
        self._config = config
        self._run = run
        self._seed = seed

    @property
    def num_samples(self) -> int:
        """Answers to each query."""
        return self._config.num_samples

    def expected(self, query: Query) -> list[str]:
        """Return the ids of the answers that a query is to get, by sample index."""
        return [
            lineage_id(
                self._run, iteration=query.iteration, stage="responses", parents=[query.query_id], sample_index=i
            )
            for i in range(self._config.num_samples)
        ]

    async def respond(self, queries: Sequence[Query], *, known: Iterable[str] = ()) -> AsyncIterator[list[Response]]:
        """Yield the answers to queries as they are finished; answers whose ids are `known` are not asked for again."""
        have = set(known)
        asked: dict[str, tuple[Query, int]] = {
            response_id: (query, i)
            for query in queries
            for i, response_id in enumerate(self.expected(query))
            if response_id not in have
        }
        requests = [
            GenerationRequest(
                request_id=response_id,
                messages=query.messages,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                seed=draw_seed(self._seed, "responses", query.iteration, query.sample_index, i),
            )
            for response_id, (query, i) in asked.items()
        ]
        async for chunk in self._pool.route(requests):
            yield [_response(completion, *asked[completion.request_id]) for completion in chunk]

    async def answer_greedily(self, prompts: Mapping[str, tuple[Message, ...]]) -> dict[str, str]:
        """Return the greedy answer to each prompt, by the prompts' keys, unique among running requests."""
        requests = [
            GenerationRequest(request_id=key, messages=messages, max_tokens=self._config.max_tokens, temperature=0.0)
            for key, messages in prompts.items()
        ]
        answers: dict[str, str] = {}
        async for chunk in self._pool.route(requests):
            answers.update({completion.request_id: completion.text for completion in chunk})
        return answers


def _response(completion: Completion, query: Query, sample_index: int) -> Response:
    return Response(
        response_id=completion.request_id,
        query_id=query.query_id,
        sample_index=sample_index,
        text=completion.text,
        prompt_token_ids=completion.prompt_token_ids,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        policy_version=completion.weight_spans[0][0] if completion.weight_spans else completion.weight_version,
        finish_reason=completion.finish_reason,
    )
