"""Owns the critic: a critique and a verdict for every response, from the critic's own model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Iterable, Sequence

from pydantic import Field

from actors.generation import Generates, GenerationRequest
from actors.records import Critique, Query, Response, draw_seed, lineage_id
from actors.rubrics import Rubric
from cluster.config import Config


class CriticConfig(Config):
    """How the critic is asked."""

    max_tokens: int = Field(default=96, gt=0)
    """Longest critique, in tokens."""
    num_critiques: int = Field(default=1, ge=1)
    """Critiques per response (K); their P(good) is averaged. The first is greedy."""
    temperature: float = Field(default=0.7, gt=0.0)
    """Sampling temperature of the critiques after the first."""


class Critic:
    """Writes critiques."""

    def __init__(
        self,
        pool: Generates,
        *,
        rubric: Rubric,
        config: CriticConfig,
        run: str,
        seed: int,
    ) -> None:
        self._pool = pool
        self._rubric = rubric
        self._config = config
        self._run = run
        self._seed = seed

    async def judge(
        self, items: Sequence[tuple[Query, Response]], *, known: Iterable[str] = ()
    ) -> AsyncIterator[list[Critique]]:
        """Yield the critiques of responses as they are finished; ids in `known` are there already."""
        have = set(known)
        asked: dict[str, tuple[Query, Response, float]] = {}
        requests = []
        for query, response in items:
            messages = self._rubric.render(query, response)
            for k in range(self._config.num_critiques):
                critique_id = critique_id_of(self._run, query, response, k)
                if critique_id in have:
                    continue
                temperature = 0.0 if k == 0 else self._config.temperature
                asked[critique_id] = (query, response, temperature)
                requests.append(
                    GenerationRequest(
                        request_id=critique_id,
                        messages=messages,
                        max_tokens=self._config.max_tokens,
                        temperature=temperature,
                        seed=None if k == 0 else draw_seed(self._seed, "critiques", *_place(query, response), k),
                        labels=self._rubric.labels,
                    )
                )
        async for chunk in self._pool.route(requests):
            critiques = []
            for completion in chunk:
                query, response, temperature = asked[completion.request_id]
                critiques.append(
                    self._rubric.parse(completion.request_id, query, response, completion, temperature=temperature)
                )
            yield critiques

    def num_missing(self, items: Sequence[tuple[Query, Response]], *, known: Container[str]) -> int:
        """Return how many critiques of responses are not there."""
        numbers = range(self._config.num_critiques)
        return sum(critique_id_of(self._run, *item, k) not in known for item in items for k in numbers)


def critique_id_of(run: str, query: Query, response: Response, k: int) -> str:
    """Return the id of a response's critique number k, from 0; the first is greedy."""
    return lineage_id(run, iteration=query.iteration, stage="critiques", parents=[response.response_id], sample_index=k)


def _place(query: Query, response: Response) -> tuple[int, int, int]:
    return query.iteration, query.sample_index, response.sample_index
