"""Pretraining: maximum likelihood of every token (Huang et al. 2025, eq. 1), over documents or roles' demonstrations.

L = -sum_i log P(x_i | x_<i) per document, divided by the global token count for training; both are reported. In the
loop every token but a document's first is a target, the prompt's too. Where the documents are demonstrations of roles,
as in the bootstrap, a role's **own** tokens alone are: solutions inside a critic's prompt must not teach the learner.
"""

from __future__ import annotations

from cluster import config as settings
from trainers.losses import LossOutput, TokenBatch

batch = TokenBatch
reads_prompts = True
uses_reference = False


class Config(settings.Config):
    """Settings of pretraining: none."""


def loss(batch: TokenBatch, config: Config) -> LossOutput:
    """Return the mean negative log-prob (nats) per masked token; `document_nll` is the sum per document.

    Uniform logits over V tokens give log V.
    """
    total = -batch.weighted_sum()
    value = total / batch.num_tokens()
    return LossOutput(value, {"nll": value.detach(), "document_nll": total.detach() / batch.num_rows()})
