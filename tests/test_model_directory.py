"""What is said of every kind of bad model directory, by `elenchus run`, before Ray or an engine starts.

`vocab.json` with merges and `tokenizer.model` are not counted against the embedding: only tokenizer.json is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import elenchus
from actors import model_directory
from actors.model_directory import (
    check_model_directory,
    check_weights,
    context_length,
    expected_shapes,
    fingerprint,
    num_parameters,
)
from cluster.durable_files import digest_directory
from cluster.store import RunStore
from tests.tiny_models import write_gpt2, write_qwen2
from trainers.base_model import BaseModelConfig, write_base_model
from trainers.loop_state import STAGES
from trainers.run_config import RunConfig

EMBEDDING = "model.embed_tokens.weight"
"""[105, 128]: the vocabulary of the base model, and its width."""


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a model directory that has nothing wrong with it."""
    return write_base_model(tmp_path_factory.mktemp("models") / "m", BaseModelConfig(), seed=0)


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """Give a copy of it to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "m"))


def edited(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    found = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None or k not in values}))


def told_of(model: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what `elenchus run` says of a model directory, with its parent's name left out."""
    flags = [f"learner.model={model}", f"rollouts.engine.model={model}", f"runs_dir={model.parent / 'runs'}"]
    assert elenchus.main(["run", *flags]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert not (model.parent / "runs").exists()
    return [line.replace(f"{model.parent}/", "") for line in told.err.splitlines()]


SPOILS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda path: path.rename(path.with_name("n")),
        "m: no directory of this name, wanted a Hugging Face model directory",
    ),
    "a file": (
        lambda path: (shutil.rmtree(path), path.touch()),
        "m: got a file, wanted a Hugging Face model directory: name the folder that holds it",
    ),
    "no config.json": (
        lambda path: (path / "config.json").unlink(),
        "m: got no config.json, wanted a directory written by save_pretrained()",
    ),
    "no JSON": (
        lambda path: (path / "config.json").write_text("{"),
        "m/config.json: got no JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)), "
        "wanted the file as it was saved: copy it again",
    ),
    "JSON of another kind": (
        lambda path: (path / "config.json").write_text("[]"),
        "m/config.json: got a JSON list, wanted an object: copy the file again",
    ),
    "unknown architecture": (
        lambda path: edited(path / "config.json", model_type="lama"),
        'm/config.json: got model_type "lama", wanted a causal language model that this transformers knows '
        "(178 of them); did you mean llama?",
    ),
    "no language model": (
        lambda path: edited(path / "config.json", architectures=["LlamaForSequenceClassification"]),
        'm/config.json: got architecture "LlamaForSequenceClassification", wanted LlamaForCausalLM: '
        "a causal language model of this model_type",
    ),
    "no model_type": (
        lambda path: edited(path / "config.json", model_type=None),
        "m/config.json: got no model_type, wanted that of a causal language model, such as llama or qwen2",
    ),
    "no architectures": (
        lambda path: edited(path / "config.json", architectures=None),
        "m/config.json: got no architectures, wanted the model's class, such as LlamaForCausalLM",
    ),
    "auto_map": (
        lambda path: edited(path / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"}),
        "m/config.json: got auto_map, which names code to run, wanted none of it (trust_remote_code is off): "
        "remove the key, transformers has this model itself",
    ),
    "auto_map of a tokenizer": (
        lambda path: edited(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.T", None]}),
        "m/tokenizer_config.json: got auto_map, which names code to run, wanted none of it (trust_remote_code is off): "
        "use a model that transformers has",
    ),
    "no tokenizer": (
        lambda path: (path / "tokenizer.json").unlink(),
        "m: got no tokenizer, wanted one of tokenizer.json, tokenizer.model, vocab.json: "
        "save it there by tokenizer.save_pretrained()",
    ),
    "vocabulary": (
        lambda path: edited(path / "config.json", vocab_size=100),
        "m/tokenizer.json: got 105 token ids, wanted at most vocab_size = 100, the rows of the model's embedding: "
        "save the tokenizer that the model was trained with, or resize the embedding",
    ),
    "no chat template": (
        lambda path: (path / "chat_template.jinja").unlink(),
        "m: has no chat template, wanted chat_template.jinja or `chat_template` in tokenizer_config.json: "
        "set tokenizer.chat_template and save the tokenizer there",
    ),
    "symlink": (
        lambda path: (
            (path / "model.safetensors").rename(path.parent / "elsewhere"),
            (path / "model.safetensors").symlink_to(path.parent / "elsewhere"),
        ),
        "m/model.safetensors: got a link to elsewhere, wanted a file inside m: "
        "copy the file, or name the directory that holds it",
    ),
    "only .bin": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        "m: got pytorch_model.bin alone, wanted model.safetensors: what is pickled runs code when it is loaded; "
        "convert it where that is harmless, by model.save_pretrained()",
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        "m: got no weights, wanted model.safetensors, or shards and model.safetensors.index.json: "
        "save it by model.save_pretrained()",
    ),
    "weights of another name": (
        lambda path: (path / "model.safetensors").rename(path / "adapter_model.safetensors"),
        "m: got adapter_model.safetensors without model.safetensors.index.json, wanted model.safetensors, or shards "
        "and model.safetensors.index.json: save it by model.save_pretrained()",
    ),
    "truncated": (
        lambda path: cut(path / "model.safetensors", num_bytes=1000),
        "m/model.safetensors: got 1,368,144 bytes, wanted 1,369,144 as its header says: "
        "the file was cut short, copy it again",
    ),
    "damaged header": (
        lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 64),
        "m/model.safetensors: got a damaged header (64 bytes in the file), wanted safetensors: copy the file again",
    ),
    "missing shard": (
        lambda path: (sharded(path), (path / "model-00002-of-00002.safetensors").unlink()),
        "m: got 1 of 2 shards, wanted model-00002-of-00002.safetensors too (model.safetensors.index.json): "
        "copy what is missing",
    ),
    "tensor that is not in its shard": (
        lambda path: (sharded(path), placed(path, "model.norm.weight", "model-00001-of-00002.safetensors")),
        "m/model-00001-of-00002.safetensors: got no model.norm.weight, wanted it here (model.safetensors.index.json): "
        "copy it again",
    ),
    "shapes": (
        lambda path: reshaped(path, EMBEDDING, (105, 64)),
        f"m/model.safetensors: got {EMBEDDING} [105, 64] for [105, 128], wanted the second shapes, which are "
        "config.json's: config and weights are of two models",
    ),
    "shapes of a config": (
        lambda path: edited(path / "config.json", intermediate_size=512),
        "m/model.safetensors: got model.layers.0.mlp.down_proj.weight [128, 256] for [128, 512], "
        "model.layers.0.mlp.gate_proj.weight [256, 128] for [512, 128], "
        "model.layers.0.mlp.up_proj.weight [256, 128] for [512, 128] and 3 more, wanted the second shapes, which are "
        "config.json's: config and weights are of two models",
    ),
    "NaN": (
        lambda path: with_value(path, EMBEDDING, np.nan),
        f"m/model.safetensors: got NaN or infinity in {EMBEDDING}, wanted finite weights: take an earlier checkpoint",
    ),
}


def cut(file: Path, *, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:-num_bytes])


def reshaped(path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {name: np.zeros(shape, dtype=np.float32)}, path / "model.safetensors")


def with_value(path: Path, name: str, value: float) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, path / "model.safetensors")


def sharded(path: Path) -> None:
    """Cut model.safetensors into two, the second with the norm alone."""
    tensors = load_file(path / "model.safetensors")
    second = {"model.norm.weight": tensors.pop("model.norm.weight")}
    (path / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": second}
    for name, part in files.items():
        save_file(part, path / name)
    index = {"weight_map": {tensor: name for name, part in files.items() for tensor in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def placed(path: Path, name: str, shard: str) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = shard
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", SPOILS)
def test_a_bad_directory_is_answered_in_one_line(model: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    spoil, message = SPOILS[kind]
    spoil(model)
    assert told_of(model, capsys) == [f"✗ command line: learner.model: {message}"]


def test_all_that_is_wrong_with_a_directory_is_told_at_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited(model / "config.json", model_type="lama", vocab_size=100)
    (model / "chat_template.jinja").unlink()
    told = told_of(model, capsys)
    assert [line.split(": ", 3)[2] for line in told] == ["m/config.json", "m/tokenizer.json", "m"]


def test_a_name_of_the_hub_is_answered_with_how_to_fetch_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["learner.model=Qwen/Qwen2.5-0.5B", "rollouts.engine.model=Qwen/Qwen2.5-0.5B"]
    assert elenchus.main(["run", *flags]) == 2
    assert capsys.readouterr().err == (
        "✗ command line: learner.model: Qwen/Qwen2.5-0.5B: no directory of this name, wanted a Hugging Face model "
        "directory: nothing is fetched while a run starts; fetch it before by `hf download Qwen/Qwen2.5-0.5B "
        "--local-dir Qwen/Qwen2.5-0.5B`\n"
    )


def test_a_directory_of_nearly_the_name_is_suggested(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.rename(model.with_name("qwen2.5"))
    (line,) = told_of(model.with_name("qwen25"), capsys)
    assert line.endswith("; did you mean qwen2.5?")


def test_a_role_beyond_the_models_own_context_is_told_with_both(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(model / "config.json", max_position_embeddings=40)
    (line,) = told_of(model, capsys)
    assert line == (
        "✗ rollouts.sampling.max_tokens: got 48, wanted less than the model's context, 40, "
        "which prompt and answer share"
    )


# ------------------------------------------------------------------------------------------------------------- sound


def test_sound_directories_pass(model: Path, tmp_path: Path) -> None:
    sharded(model)
    for path in (model, write_qwen2(tmp_path / "q", tied=True), write_gpt2(tmp_path / "g")):
        check_model_directory(path)
        check_weights(path)


def test_names_without_the_prefix_of_the_whole_model_are_checked_too(tmp_path: Path) -> None:
    path = write_gpt2(tmp_path / "g")
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(path / "model.safetensors").items()
    }
    save_file(tensors, path / "model.safetensors")
    check_weights(path)
    save_file(tensors | {"wpe.weight": np.zeros((8, 64), dtype=np.float32)}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"wpe\.weight \[8, 64\] for \[512, 64\]"):
        check_weights(path)


def test_packed_weights_are_not_held_against_the_configs_shapes(model: Path) -> None:
    reshaped(model, EMBEDDING, (105, 64))
    edited(model / "config.json", quantization_config={"quant_method": "awq"})
    check_weights(model)


def test_a_config_that_makes_no_model_is_told_with_what_transformers_says(model: Path) -> None:
    edited(model / "config.json", hidden_size=-1)
    with pytest.raises(ValueError, match=r"m/config\.json: got what transformers builds no model from \(.+\), wanted"):
        check_weights(model)


def test_a_huggingface_caches_links_to_its_own_blobs_are_let_be(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    check_model_directory(snapshot)
    check_weights(snapshot)
    (snapshot / "config.json").unlink()
    shutil.copy(blobs / "config.json", tmp_path / "config.json")
    (snapshot / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json: got a link to .*, wanted a file inside .*models--org--name"):
        check_model_directory(snapshot)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_no_number_is_found_in_every_type(
    sound: Path, tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(sound, tmp_path / "m"))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors")
    check_weights(path)
    tensors[EMBEDDING][0, 0] = torch.finfo(dtype).max
    tensors[EMBEDDING][52, 7] = value
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"got NaN or infinity in model\.embed_tokens\.weight"):
        check_weights(path)


def test_of_a_model_beyond_the_bound_every_tensor_is_read_in_part(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (model / "model.safetensors").stat().st_size
    monkeypatch.setattr(model_directory, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(model_directory, "MAX_READ_BYTES", size // 4)
    before = fingerprint(model)
    with_value(model, EMBEDDING, np.nan)  # in the last of its blocks, which is passed over
    check_weights(model)
    for name in expected_shapes(str(model)):
        spoilt = Path(shutil.copytree(model, model.with_name(name)))
        tensors = load_file(spoilt / "model.safetensors")
        tensors[name].reshape(-1)[0] = np.nan
        save_file(tensors, spoilt / "model.safetensors")
        with pytest.raises(ValueError, match=f"in {name}"):
            check_weights(spoilt)
        assert fingerprint(spoilt) != before or name != EMBEDDING


def test_a_models_size_and_context_are_read_from_its_files(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert num_parameters(model) == sum(parameter.numel() for parameter in loaded.parameters())
    assert context_length(model) == 256
    edited(model / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert context_length(model) == 1024
    edited(model / "config.json", max_position_embeddings=None)
    assert context_length(model) is None


def test_a_fingerprint_names_what_changed(model: Path, sound: Path) -> None:
    before = fingerprint(model)
    assert before == fingerprint(sound)
    with_value(model, "model.norm.weight", 2.0)
    edited(model / "config.json", rms_norm_eps=1e-5, transformers_version="9")
    after = fingerprint(model)
    assert sorted(key for key in before if before[key] != after[key]) == [
        "config.json rms_norm_eps",
        "model.safetensors",
    ]


# --------------------------------------------------------------------------------------------------- a run's own hashes


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Give the policy v0 of a run that has committed it."""
    config = RunConfig(name="x", runs_dir=tmp_path)
    id_columns = {stage: column for stage, (_, column) in STAGES.items()}
    with RunStore.create(config.run_dir, config=config.model_dump(mode="json"), id_columns=id_columns) as store:
        path = write_base_model(store.policy_dir(0), config.base_model, seed=0)
        store.commit(0, state={}, policy=digest_directory(path, root=store.path))
    return path


def test_a_committed_policy_passes_and_a_changed_one_is_refused(policy: Path, tmp_path: Path) -> None:
    check_weights(policy)
    with_value(policy, EMBEDDING, 0.5)
    with pytest.raises(ValueError, match="SHA-256") as caught:
        check_weights(policy)
    first, rest = str(caught.value).split(" got SHA-256 ")
    assert first == f"{tmp_path}/x/policies/v000000/model.safetensors:"
    assert rest.endswith("; restore the file from a copy, or take another version")
    assert ", wanted " in rest


def test_a_policy_that_was_never_committed_is_refused(policy: Path, tmp_path: Path) -> None:
    policy.rename(policy.with_name("v000001"))
    with pytest.raises(ValueError, match=f'^{tmp_path}/x: got version "v000001", wanted one of v0$'):
        check_weights(policy.with_name("v000001"))
