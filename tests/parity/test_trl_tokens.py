"""Our SFT against TRL's own method, on random inputs; see test_trl_losses.py.

TRL 1.16 has two losses of tokens: "nll" is our sft. "dft" weighs each token's by its probability (Wu et al. 2025,
arXiv 2508.05629), over the number of tokens; our token_noise with weighting "probability" has the same numerator, and
divides by the sum of these weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.loss_batches import random_batch
from trainers.losses import TokenBatch, sft, token_noise

trl = pytest.importorskip("trl", reason="not installed: make test-parity")
pytestmark = pytest.mark.parity

SEEDS = range(3)


def batch_of(seed: int) -> TokenBatch:
    """Responses of 1 to 4 tokens behind a prompt of one."""
    batch = random_batch(TokenBatch, seed=seed, rows=6)
    assert isinstance(batch, TokenBatch)
    return replace(batch, weights=None, flagged=None)


def trls(batch: TokenBatch, *, loss_type: str, num_tokens: Tensor | None) -> Tensor:
    alone = SimpleNamespace(parallelism_config=None, num_processes=1, gather_for_metrics=lambda values: values)
    # TRL's fused head gives 0 where a label is ignored.
    kept = torch.where(batch.mask, batch.logprobs, 0.0)
    output = SimpleNamespace(
        log_probs=kept, label_mask=batch.mask, entropy=torch.zeros_like(kept), is_top1=torch.zeros_like(kept)
    )
    told = SimpleNamespace(
        accelerator=alone,
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=True),
        aux_loss_enabled=False,
        compute_loss_func=None,
        get_tp_size=lambda: 1,
        label_smoother=None,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": batch.mask.long(), "attention_mask": torch.ones_like(batch.mask), "labels": batch.mask}
    found: Tensor = trl.SFTTrainer.compute_loss(told, lambda **_: output, inputs, num_items_in_batch=num_tokens)
    return found


def assert_same(ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaf: Tensor) -> None:
    leaf.requires_grad_()
    got, wanted = ours(), theirs()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    (mine,), (its,) = torch.autograd.grad(got, leaf), torch.autograd.grad(wanted, leaf)
    torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
    assert mine.any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("is_whole", [True, False])
def test_sft_is_trls_mean_over_response_tokens(is_whole: bool, seed: int) -> None:
    """A micro-batch that is the whole step divides by its own tokens, another by those of the step."""
    batch = batch_of(seed)
    num_tokens = None if is_whole else torch.tensor(40)
    ours = batch if is_whole else replace(batch, global_tokens=40.0)
    assert_same(
        lambda: sft.loss(ours, sft.Config()).loss,
        lambda: trls(batch, loss_type="nll", num_tokens=num_tokens),
        batch.logprobs,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_weighed_by_their_probability_are_trls_dft_up_to_what_the_sum_is_divided_by(seed: int) -> None:
    batch = batch_of(seed)
    weights = torch.where(batch.mask, batch.logprobs.detach().exp(), 0.0).sum()
    assert_same(
        lambda: token_noise.loss(batch, token_noise.Config(weighting="probability")).loss * weights / batch.mask.sum(),
        lambda: trls(batch, loss_type="dft", num_tokens=None),
        batch.logprobs,
    )
