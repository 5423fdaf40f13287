"""`elenchus export`: a committed learner at any trade-off between its objectives, merged or as an adapter."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import elenchus
from cluster.durable_files import digest_directory
from cluster.store import RunStore
from tests.tiny_models import char_tokenizer, write_llama
from trainers.loop_state import STAGES
from trainers.ranks.adapters import Panacea, with_layers
from trainers.ranks.lora import base_checksum
from trainers.ranks.panacea import add_panacea, layers_of, merged_parameters, set_preference
from trainers.ranks.panacea_config import PanaceaConfig
from trainers.run_config import RunConfig

PANACEA = PanaceaConfig(rank=3, targets=("q_proj", "down_proj"))
SETTINGS = {
    "loss": {"kind": "grpo"},
    "objectives": {"names": ["verdict", "brevity"], "weights": [0.6, 0.4]},
    "learner": {"training": {"panacea": PANACEA.model_dump(mode="json")}},
}
TOKENS = torch.tensor([[5, 17, 40, 9, 88, 12]])


def answer(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of two committed policies, and the model that the second is of."""
    home = tmp_path_factory.mktemp("runs")
    model = loaded(write_llama(home.parent / "base", tied=True))
    base = base_checksum(model)
    add_panacea(model, PANACEA, seed=1)
    config = RunConfig.model_validate({"name": "x", "runs_dir": str(home), **SETTINGS})
    id_columns = {stage: column for stage, (_, column) in STAGES.items()}
    with RunStore.create(config.run_dir, config=config.model_dump(mode="json"), id_columns=id_columns) as store:
        for iteration in range(2):
            if iteration:
                generator = torch.Generator().manual_seed(2)
                with torch.no_grad():
                    for _, layer in layers_of(model):
                        layer.singular_values.copy_(torch.randn(PANACEA.rank, generator=generator) * 3)
                        layer.scale.copy_(torch.randn(1, generator=generator) * 20)
            set_preference(model, (0.6, 0.4))
            policy = store.policy_dir(iteration)
            model.save_pretrained(policy, state_dict=dict(merged_parameters(model)))
            char_tokenizer().save_pretrained(policy)
            Panacea(PANACEA).write(model, policy, whole=nullcontext, base=base)
            store.commit(iteration, state={}, policy=digest_directory(policy, root=store.path))
    return config.run_dir, model


def export(home: Path, *words: str) -> int:
    return elenchus.main(["export", "x", "--runs-dir", str(home), *words])


def test_a_model_directory_answers_as_the_learner_does_at_the_vector(
    made: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = made
    for first in (0.7, 0.0):
        out = tmp_path / f"at-{first}"
        assert export(run.parent, "--preference", str(first), str(1 - first), "--out", str(out)) == 0
        set_preference(model, (first, 1 - first))
        torch.testing.assert_close(answer(loaded(out)), answer(model), atol=1e-4, rtol=1e-4)
        assert (out / "tokenizer.json").is_file()
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}/at-0.7: model of x v1 at verdict 0.7, brevity 0.3"
    assert (answer(loaded(tmp_path / "at-0.7")) - answer(loaded(tmp_path / "at-0.0"))).abs().max() > 0.01
    # At the config's own weights it is the committed policy.
    assert export(run.parent, "--preference", "0.6", "0.4", "--out", str(tmp_path / "own")) == 0
    assert torch.equal(answer(loaded(tmp_path / "own")), answer(loaded(run / "policies" / "v000001")))
    # An older version; the first is the base.
    assert export(run.parent, "--preference", "1", "0", "--out", str(tmp_path / "v0"), "--version", "v0") == 0
    assert torch.equal(answer(loaded(tmp_path / "v0")), answer(loaded(run / "policies" / "v000000")))


def test_an_adapter_answers_on_the_runs_base_as_the_learner_does(made: tuple[Path, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    run, model = made
    assert export(run.parent, "--preference", "0.2", "0.8", "--out", str(tmp_path / "a"), "--adapter") == 0
    served = PeftModel.from_pretrained(loaded(run / "policies" / "v000000"), str(tmp_path / "a")).eval()
    set_preference(model, (0.2, 0.8))
    torch.testing.assert_close(answer(served), answer(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--preference 0.7 0.4", "--preference: got 0.7 0.4, wanted 2 numbers, none below 0, that add up to 1: the "
         "weights of verdict, brevity"),
        ("--preference 1.0", "--preference: got 1, wanted 2 numbers, none below 0, that add up to 1: the weights of "
         "verdict, brevity"),
        ("--preference 0.5 nan", "--preference: got 0.5 nan, wanted 2 numbers, none below 0, that add up to 1: the "
         "weights of verdict, brevity"),
        ("--preference 0.5 0.5 --version v9", '{run}: got version "v9", wanted one of v0, v1'),
        ("--preference 0.5 0.5 --out {run}", "--out: got {run}, which exists, wanted a directory that does not"),
        ("--preferences 0.5 0.5", "elenchus export: unknown flag --preferences; did you mean --preference?"),
    ],
)  # fmt: skip
def test_what_can_not_be_exported_is_told_in_a_line(
    made: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    run, _ = made
    words = words.format(run=run)
    given = words.split() if "--out" in words else [*words.split(), "--out", str(tmp_path / "out")]
    assert export(run.parent, *given) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"✗ {said.format(run=run)}"
    assert not (tmp_path / "out").exists()


def test_a_run_of_one_trade_off_says_where_its_policies_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(name="x", runs_dir=tmp_path)
    RunStore.create(config.run_dir, config=config.model_dump(mode="json"), id_columns={}).close()
    assert export(tmp_path, "--preference", "1", "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err == (
        "✗ x: got a run without learner.training.panacea, wanted one whose learner is trained for all trade-offs; this "
        f"one's policies are in {tmp_path}/x/policies\n"
    )


def test_layers_of_another_base_are_refused(made: tuple[Path, Any], tmp_path: Path) -> None:
    run, _ = made
    other = write_llama(tmp_path / "other", tied=True, seed=8)
    with pytest.raises(ValueError, match="got a model of checksum"):
        with_layers(run / "policies" / "v000001", base=other)
    with pytest.raises(ValueError, match=r"wanted a policy of learner\.training\.panacea"):
        with_layers(other, base=other)
