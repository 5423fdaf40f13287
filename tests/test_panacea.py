"""Panacea: weights are affine in the preference vector, the start is the base, exports answer as the model does."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.tiny_models import write_llama
from trainers.advantages import Samples
from trainers.feedback.objectives import ObjectivesConfig, RunningScores, scalar_scores
from trainers.feedback.trade_offs import TradeOffs, draw_preference
from trainers.losses import TokenBatch, load_loss
from trainers.ranks.panacea import (
    PanaceaLinear,
    adapter_parameters,
    add_panacea,
    export_adapter,
    export_merged,
    layers_of,
    merged_parameters,
    set_preference,
)
from trainers.ranks.panacea_config import PanaceaConfig

SMALL = PanaceaConfig(rank=3, num_objectives=2, targets=("q_proj", "down_proj"))
TOKENS = torch.tensor([[5, 17, 40, 9, 88, 12]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "llama")


def base_model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def changed(directory: Path, config: PanaceaConfig = SMALL) -> Any:
    """A model whose sigma and s are no longer 0."""
    model = base_model(directory)
    add_panacea(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, layer in layers_of(model):
            layer.singular_values.copy_(torch.randn(config.rank, generator=generator) * 3)
            layer.scale.copy_(torch.randn(1, generator=generator) * 20)
    return model


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def layer_of(*, rank: int, num_objectives: int, d_in: int = 5, d_out: int = 4) -> PanaceaLinear:
    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out).double()
    config = PanaceaConfig(rank=rank, num_objectives=num_objectives, initial_deviation=0.5)
    layer = PanaceaLinear(linear, config, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.singular_values.copy_(torch.randn(rank))
        layer.scale.fill_(1.7)
    return layer


def update_at(layer: PanaceaLinear, *preference: float) -> Tensor:
    layer.preference.copy_(torch.tensor(preference))
    return layer.update()


def test_the_update_is_affine_in_the_preference() -> None:
    layer = layer_of(rank=2, num_objectives=3)
    first, second = (0.7, 0.2, 0.1), (0.0, 0.4, 0.6)
    middle = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    expected = (update_at(layer, *first) + update_at(layer, *second)) / 2
    torch.testing.assert_close(update_at(layer, *middle), expected)
    # Not constant: what is shared alone would be affine too.
    assert (update_at(layer, *first) - update_at(layer, *second)).abs().max() > 0.01


def test_the_update_is_the_product_that_it_is_said_to_be() -> None:
    layer = layer_of(rank=1, num_objectives=2, d_in=2, d_out=2)
    with torch.no_grad():
        layer.left.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
        layer.right.copy_(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        layer.singular_values.fill_(0.5)
        layer.scale.fill_(2.0)
    # diag(0.5, 2 * 0.25, 2 * 0.75): u1 v1 0.5 + u2 v2 0.5 + u3 v3 1.5
    assert update_at(layer, 0.25, 0.75).tolist() == [[0.5, 3.0], [0.5, 0.0]]
    x = torch.tensor([[1.0, 10.0]], dtype=torch.float64)
    expected = layer.base_layer(x) + torch.tensor([[30.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected)


def test_without_objectives_it_is_lora_with_singular_values() -> None:
    layer = layer_of(rank=3, num_objectives=0)
    product = layer.left @ torch.diag(layer.singular_values) @ layer.right.T
    torch.testing.assert_close(layer.update().double(), product, atol=1e-6, rtol=1e-6)
    assert layer.preference.shape == (0,)


def test_the_start_is_the_base_to_the_bit_and_only_the_adapter_is_trained(directory: Path) -> None:
    model, base = base_model(directory), base_model(directory)
    add_panacea(model, SMALL, seed=1)
    assert torch.equal(answer(model), answer(base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trained} == {"left", "right", "singular_values", "scale"}
    assert {name.rsplit(".", 2)[1] for name in trained} == set(SMALL.targets)
    set_preference(model, (0.3, 0.7))
    model(TOKENS).logits.logsumexp(-1).sum().backward()
    for _, layer in layers_of(model):
        # The diagonal is 0, so U and V move from the second step on.
        assert layer.scale.grad is not None
        assert layer.scale.grad.abs() > 0
        assert layer.singular_values.grad is not None
        assert layer.singular_values.grad.abs().max() > 0
        assert not layer.preference.requires_grad
    again = base_model(directory)
    add_panacea(again, SMALL, seed=1)
    assert all(
        torch.equal(a.left, b.left) and torch.equal(a.right, b.right)
        for (_, a), (_, b) in zip(layers_of(model), layers_of(again), strict=True)
    )


def test_a_model_answers_by_the_vector_that_is_set(directory: Path) -> None:
    model = changed(directory)
    set_preference(model, (1.0, 0.0))
    first = answer(model)
    set_preference(model, (0.0, 1.0))
    assert (answer(model) - first).abs().max() > 0.01
    set_preference(model, (1.0, 0.0))
    assert torch.equal(answer(model), first)


@pytest.mark.parametrize("vector", [(0.5, 0.6), (1.2, -0.2), (1.0,), (0.3, 0.3, 0.4)])
def test_a_vector_outside_the_simplex_is_refused(directory: Path, vector: tuple[float, ...]) -> None:
    model = changed(directory)
    with pytest.raises(ValueError, match="wanted 2 numbers, none below 0, that add up to 1"):
        set_preference(model, vector)
    with pytest.raises(ValueError, match="got a model without its layers"):
        set_preference(base_model(directory), (0.5, 0.5))


def test_a_target_that_is_no_layer_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match="wanted layers of the model's blocks"):
        add_panacea(base_model(directory), PanaceaConfig(targets=("query",)), seed=0)


def test_vectors_are_uniform_on_the_simplex_and_hang_on_seed_and_iteration_alone() -> None:
    drawn = [draw_preference(3, seed=4, iteration=i) for i in range(3_000)]
    assert drawn[7] == draw_preference(3, seed=4, iteration=7) != draw_preference(3, seed=5, iteration=7)
    assert all(sum(vector) == pytest.approx(1.0) for vector in drawn)
    for i in range(3):
        # Each entry is Beta(1, 2): mean 1/3, P(above 1/2) = 1/4.
        assert sum(vector[i] for vector in drawn) / 3_000 == pytest.approx(1 / 3, abs=0.02)
        assert sum(vector[i] > 0.5 for vector in drawn) / 3_000 == pytest.approx(0.25, abs=0.03)
    largest = Counter(max(range(3), key=lambda i: vector[i]) for vector in drawn)
    assert min(largest.values()) > 900


def test_merged_weights_have_the_bases_names_and_answer_as_the_model_does(directory: Path, tmp_path: Path) -> None:
    model = changed(directory)
    names = {name for name, _ in base_model(directory).named_parameters()}
    assert {name for name, _ in merged_parameters(model)} == names
    for vector in ((0.8, 0.2), (0.1, 0.9)):
        export_merged(model, tmp_path / "merged", vector)
        served = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        torch.testing.assert_close(answer(served), answer(model), atol=1e-4, rtol=1e-4)
    assert (answer(model) - answer(base_model(directory))).abs().max() > 0.01


def test_an_exported_adapter_is_loras_for_peft_and_answers_alike(directory: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = changed(directory)
    export_adapter(model, tmp_path / "a", (0.6, 0.4), config=SMALL, base_model=str(directory))
    served = PeftModel.from_pretrained(base_model(directory), str(tmp_path / "a")).eval()
    torch.testing.assert_close(answer(served), answer(model), atol=1e-4, rtol=1e-4)
    shapes = {name.rsplit(".", 2)[1]: tuple(tensor.shape) for name, tensor in adapter_parameters(model)}
    assert shapes["lora_A"][0] == shapes["lora_B"][1] == 5


def test_a_bandit_of_two_rewards_has_a_mean_of_the_first_that_rises_with_its_weight() -> None:
    """Five arms from all of reward 1 to all of reward 2; one model is trained with vectors drawn anew at each step.

    With a price on the divergence from the base, which draws all arms alike, the best logits are the weighted rewards
    over that price: affine in the vector, so the model can be right at all of them.
    """
    arms = torch.linspace(0, 1, 5)
    # Concave: the middle arm is worth more than half of each.
    rewards = torch.stack([(1 - arms**2).sqrt(), (1 - (1 - arms) ** 2).sqrt()], dim=1)
    torch.manual_seed(0)
    linear = nn.Linear(3, 5)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    for parameter in linear.parameters():
        parameter.requires_grad_(False)
    config = PanaceaConfig(rank=2, num_objectives=2, initial_deviation=0.3)
    policy = PanaceaLinear(linear, config, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.03)
    context = torch.ones(1, 3)
    price = 0.2
    for step in range(600):
        vector = torch.tensor(draw_preference(2, seed=1, iteration=step))
        policy.preference.copy_(vector)
        logprobs = policy(context).log_softmax(-1)[0]
        optimizer.zero_grad()
        # The exact gradient of the mean over arms.
        (-(logprobs.exp() @ (rewards @ vector - price * logprobs))).backward()
        optimizer.step()
    means = []
    for first in torch.linspace(0, 1, 11).tolist():
        policy.preference.copy_(torch.tensor([first, 1 - first]))
        with torch.no_grad():
            means.append(float((policy(context).softmax(-1)[0] @ rewards)[0]))
    assert all(later > earlier for earlier, later in pairwise(means))
    best = [float((rewards @ torch.tensor([w, 1 - w]) / price).softmax(0) @ rewards[:, 0]) for w in (0.0, 0.5, 1.0)]
    assert [means[0], means[5], means[10]] == pytest.approx(best, abs=0.03)
    assert best[0] < 0.5 < 0.85 < best[2]


@pytest.mark.parametrize(("loss", "price"), [("grpo", 1.0), ("reinforce_pp", 0.5)])
def test_a_sampled_bandit_trained_by_the_loops_own_steps_follows_the_vector(loss: str, price: float) -> None:
    """Five arms again, 64 of them sampled at each iteration's vector: one score of two, advantages, the loss, Adam."""
    arms = torch.linspace(0, 1, 5)
    rewards = torch.stack([(1 - arms**2).sqrt(), (1 - (1 - arms) ** 2).sqrt()], dim=1)
    module: Any = load_loss(loss)
    settings = module.Config(kl_coefficient=price)
    objectives, running = ObjectivesConfig(names=("verdict", "brevity"), weights=(0.5, 0.5)), RunningScores()
    trade_offs = TradeOffs(fixed=objectives.weights, seed=1)
    linear = nn.Linear(3, 5)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    policy = PanaceaLinear(
        linear.requires_grad_(False),
        PanaceaConfig(rank=2, initial_deviation=0.3),
        generator=torch.Generator().manual_seed(3),
    )
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.03)
    context, generator = torch.ones(1, 3), torch.Generator().manual_seed(5)
    reference, mask = torch.full((64, 1), -math.log(5)), torch.ones(64, 1, dtype=torch.bool)
    for iteration in range(1, 301):
        vector = trade_offs.drawn(iteration)
        assert vector is not None
        policy.preference.copy_(torch.tensor(vector))
        table = policy(context).log_softmax(-1)[0]
        chosen = torch.multinomial(table.detach().exp(), 64, replacement=True, generator=generator)
        logprobs = table[chosen][:, None]
        scores = {f"{i}": tuple(rewards[arm].tolist()) for i, arm in enumerate(chosen.tolist())}
        running.add(scores, objectives.names)
        one = scalar_scores(scores, running, trade_offs.weighed(objectives, iteration))
        samples = Samples(
            mask=mask,
            scores=torch.tensor([one[f"{i}"] for i in range(64)]),
            groups=torch.zeros(64, dtype=torch.int64),
            ended=torch.ones(64, dtype=torch.bool),
            old_logprobs=logprobs.detach(),
            reference_logprobs=reference,
        )
        batch = TokenBatch(
            logprobs=logprobs,
            mask=mask,
            old_logprobs=logprobs.detach(),
            reference_logprobs=reference,
            advantages=module.advantages(samples, settings).advantages,
        )
        optimizer.zero_grad()
        module.loss(batch, settings).loss.backward()
        optimizer.step()
    means = []
    for first in torch.linspace(0, 1, 11).tolist():
        policy.preference.copy_(torch.tensor([first, 1 - first]))
        with torch.no_grad():
            means.append(float((policy(context).softmax(-1)[0] @ rewards)[0]))
    assert all(later > earlier for earlier, later in pairwise(means)), means
    assert means[-1] - means[0] > 0.3
