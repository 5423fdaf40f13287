"""Owns talking to a run's newest learner in this process, without engines: one question, one greedy answer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.chat import Tokenizer, decode, encode_chat, load_tokenizer
from actors.domains import Domain, domain_called
from cluster.commits import committed_policy, last_commit
from trainers.run_config import read_resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalLearner:
    """A committed policy, loaded."""

    version: str
    model: Any
    tokenizer: Tokenizer
    domain: Domain

    def answer(self, question: str, *, max_tokens: int) -> str:
        """Return the greedy answer to a question put as the run puts its queries."""
        import torch

        token_ids = encode_chat(self.tokenizer, self.domain.learner_messages(question))
        room = getattr(self.model.config, "max_position_embeddings", len(token_ids) + max_tokens) - len(token_ids)
        if room < 1:
            return f"(the question has {len(token_ids)} tokens, more than the model takes: ask a shorter one)"
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([token_ids]), max_new_tokens=min(max_tokens, room), do_sample=False
            )
        return decode(self.tokenizer, output[0, len(token_ids) :].tolist())


def load_learner(run_dir: Path, *, version: str | None = None) -> LocalLearner:
    """Return the newest committed policy of a run, or the version that is asked for ("v3").

    Raises:
        ValueError: the run has committed nothing yet, or not this version; names those that there are.
    """
    commit = last_commit(run_dir) if version is None else committed_policy(run_dir, version)
    if commit is None or not commit.policy:
        raise ValueError(
            f"{run_dir}: got no committed policy, wanted at least v0; go on by `elenchus resume {run_dir.name}`"
        )
    directory = (run_dir / commit.policy[0].path).parent
    config = read_resolved(run_dir / "resolved.json")
    # transformers imports DeepSpeed where it is installed, which would announce on stdout what it found out about GPUs.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers import AutoModelForCausalLM

    domain = domain_called(config.domain.kind, config.domain)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return LocalLearner(
        version=f"v{commit.iteration}", model=model.eval(), tokenizer=load_tokenizer(directory), domain=domain
    )
