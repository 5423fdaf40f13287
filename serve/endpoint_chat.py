"""Owns talking to a run's endpoint: one question, the answer as it grows, and the version that made it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx

from actors.domains import Domain, domain_called
from serve.auth import LOCAL_KEY_FILE
from serve.openai_answers import LEARNER
from serve.serving_commands import living_endpoint
from trainers.run_config import read_resolved

TIMEOUT_S = 300.0


class EndpointLearner:
    """The learner behind an endpoint."""

    def __init__(self, *, url: str, key: str, domain: Domain, version: str | None) -> None:
        self.version: str | None = None
        """That of the last answer; of several, the last token's."""
        self._model = LEARNER if version is None else f"{LEARNER}@{version}"
        self._domain = domain
        self._client = httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT_S)

    def answer(self, question: str, *, max_tokens: int) -> Iterator[str]:
        """Yield the greedy answer to a question, put as the run puts its queries, as it comes.

        Raises:
            ValueError: what the endpoint says against it.
        """
        messages = [{"role": m.role, "content": m.content} for m in self._domain.learner_messages(question)]
        body = {"model": self._model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        try:
            with self._client.stream("POST", "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ValueError(_said(response.read()))
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        yield self._part(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError as error:
            raise ValueError(f"{self._client.base_url}: the endpoint does not answer ({error}); try again") from None

    def _part(self, event: dict[str, object]) -> str:
        if "error" in event:
            raise ValueError(_said(json.dumps(event).encode()))
        self.version = str(event["weight_version"]) if event.get("weight_version") else self.version
        choices = event["choices"]
        assert isinstance(choices, list), "as the endpoint writes it"
        return "".join(choice["delta"].get("content") or "" for choice in choices)


def endpoint_learner(run_dir: Path, *, version: str | None = None) -> EndpointLearner | None:
    """Return the learner behind a run's endpoint on this machine; None when none runs or its local key is not there."""
    endpoint = living_endpoint(run_dir)
    key_file = run_dir / LOCAL_KEY_FILE
    if endpoint is None or not key_file.is_file():
        return None
    config = read_resolved(run_dir / "resolved.json")
    domain = domain_called(config.domain.kind, config.domain)
    return EndpointLearner(url=endpoint.url, key=key_file.read_text().strip(), domain=domain, version=version)


def _said(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the endpoint answered {body[:100]!r}"
