"""Owns what a model directory must be before anything is loaded from it: a Hugging Face directory, whole and harmless.

    check_model_directory   config, architecture, tokenizer, chat template, links: what any engine needs; milliseconds
    check_weights           safetensors: shards, headers, shapes, values, a run's own hashes; seconds, once before a run

Files are read here as what they are, JSON and bytes: nothing is unpickled, no code of the directory runs, and only the
shapes that an architecture wants are asked of transformers. Values are read whole up to `MAX_READ_BYTES`; of larger
models evenly spaced blocks of every tensor are.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

MAX_READ_BYTES = 1 << 30
"""How much of a model's values is read to look for NaN and to recognise it again: about a second each."""
BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
"""As safetensors itself has it."""
MAX_NAMED = 3
"""Tensors that one message names."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of the types whose values are looked at."""


class StoredTensor(NamedTuple):
    """A tensor as the header of a safetensors file has it."""

    file: Path
    name: str
    dtype: str
    """As safetensors writes it: F32, BF16."""
    shape: tuple[int, ...]
    begin: int
    """Its first byte in the file, and the one after its last."""
    end: int


def check_model_directory(path: str | Path) -> None:
    """Check that a directory holds a config of a known architecture, a fitting tokenizer and a chat template.

    Raises:
        ValueError: one line for everything that is wrong: the file, what was found, what was wanted, the remedy.
    """
    _raise_all(_directory_problems(Path(path)))


def check_weights(path: str | Path) -> None:
    """Check that a model directory's weights are safetensors, whole, of the shapes of its config, and finite.

    Raises:
        ValueError: one line for everything that is wrong.
    """
    _raise_all(_weight_problems(Path(path)))


def context_length(path: str | Path) -> int | None:
    """Return the longest sequence that a model directory's config speaks of, in tokens; None where it says nothing."""
    config = _text_config(_read_object(Path(path) / "config.json"))
    lengths = [config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)]
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    # Whether the length has the scaling in it differs from model to model: the longer reading refuses nothing good.
    return int(lengths[0] * max(1.0, factor if isinstance(factor, int | float) else 1.0)) if lengths else None


def num_parameters(path: str | Path) -> int:
    """Return the number of stored values of a model directory.

    Raises:
        ValueError: its weights can't be read.
    """
    return sum(math.prod(tensor.shape) for tensor in _stored_tensors(Path(path)))


def fingerprint(path: str | Path) -> dict[str, Any]:
    """Return what makes a model directory the model that it is: its config by key, its other files by hash.

    Of weights beyond `MAX_READ_BYTES` the header and evenly spaced blocks are hashed.
    """
    directory = Path(path)
    found: dict[str, Any] = {
        f"config.json {key}": value
        for key, value in sorted(_read_object(directory / "config.json").items())
        if key not in ("_name_or_path", "transformers_version")
    }
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "chat_template.jinja")
    for name in names:
        if (directory / name).is_file():
            found[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()[:16]
    files = sorted(directory.glob("*.safetensors"))
    step = _block_step(sum(file.stat().st_size for file in files))
    for file in files:
        digest = hashlib.sha256(str(file.stat().st_size).encode())
        with file.open("rb") as stream:
            for begin in range(0, file.stat().st_size, step):
                stream.seek(begin)
                digest.update(stream.read(BLOCK_BYTES))
        found[file.name] = digest.hexdigest()[:16]
    return found


@cache
def expected_shapes(model: str) -> Mapping[str, tuple[int, ...]]:
    """Return name and shape of every parameter that an update must bring: `named_parameters()` of the model directory.

    A tied head is not among them.
    """
    return {name: tuple(parameter.shape) for name, parameter in empty_model(model).named_parameters()}


def empty_model(model: str) -> Any:
    """Return the causal language model of a model directory's config without memory: nothing is loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config)


def _raise_all(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        raise ValueError("\n".join(found))


# ---------------------------------------------------------------------------------------------------------- directory


def _directory_problems(directory: Path) -> Iterator[str]:
    if not directory.is_dir():
        yield _absent(directory)
        return
    if not (directory / "config.json").is_file():
        yield f"{directory}: got no config.json, wanted a directory written by save_pretrained()"
        return
    try:
        config = _read_object(directory / "config.json")
        yield from _code_problems(directory, config)
        yield from _architecture_problems(directory, config)
        if not any((directory / name).is_file() for name in TOKENIZER_FILES):
            yield (
                f"{directory}: got no tokenizer, wanted one of {', '.join(TOKENIZER_FILES)}: "
                "save it there by tokenizer.save_pretrained()"
            )
        else:
            yield from _vocabulary_problems(directory, config)
            if not _has_chat_template(directory):
                yield (
                    f"{directory}: has no chat template, wanted chat_template.jinja or `chat_template` in "
                    "tokenizer_config.json: set tokenizer.chat_template and save the tokenizer there"
                )
    except ValueError as error:
        yield str(error)
    yield from _link_problems(directory)


def _absent(directory: Path) -> str:
    name = str(directory)
    if directory.exists():
        return f"{name}: got a file, wanted a Hugging Face model directory: name the folder that holds it"
    siblings = [other.name for other in directory.parent.iterdir()] if directory.parent.is_dir() else []
    near = difflib.get_close_matches(directory.name, siblings, n=1, cutoff=0.7)
    if near:
        return (
            f"{name}: no directory of this name, wanted a Hugging Face model directory; "
            f"did you mean {directory.parent / near[0]}?"
        )
    remedy = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        remedy = f": nothing is fetched while a run starts; fetch it before by `hf download {name} --local-dir {name}`"
    return f"{name}: no directory of this name, wanted a Hugging Face model directory{remedy}"


def _code_problems(directory: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files that name Python code of the directory, to be run in place of the library's."""
    named = {"config.json": config}
    if (directory / "tokenizer_config.json").is_file():
        named["tokenizer_config.json"] = _read_object(directory / "tokenizer_config.json")
    for name, values in named.items():
        if "auto_map" in values:
            native = values.get("model_type") in _architectures()
            remedy = (
                "remove the key, transformers has this model itself" if native else "use a model that transformers has"
            )
            yield (
                f"{directory / name}: got auto_map, which names code to run, wanted none of it "
                f"(trust_remote_code is off): {remedy}"
            )


def _architecture_problems(directory: Path, config: Mapping[str, Any]) -> Iterator[str]:
    known = _architectures()
    where = directory / "config.json"
    model_type, named = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str):
        yield f"{where}: got no model_type, wanted that of a causal language model, such as llama or qwen2"
        return
    if not isinstance(named, list) or not named:
        yield f"{where}: got no architectures, wanted the model's class, such as LlamaForCausalLM"
        return
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield (
            f'{where}: got model_type "{model_type}", wanted a causal language model that this transformers knows '
            f"({len(known)} of them){hint}"
        )
    elif named[0] not in known.values():
        yield (
            f'{where}: got architecture "{named[0]}", wanted {known[model_type]}: '
            "a causal language model of this model_type"
        )


@cache
def _architectures() -> dict[str, str]:
    """Return the class of the causal language model for every model_type that transformers knows.

    Read from its source: importing it imports torch, seconds before the first mistake could be told.
    """
    found = importlib.util.find_spec("transformers")
    assert found is not None, "a dependency"
    assert found.submodule_search_locations, "it is a package"
    source = Path(found.submodule_search_locations[0]) / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if names == ["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"]:
                return {str(kind): str(name) for kind, name in ast.literal_eval(node.value.args[0])}
    raise AssertionError(f"{source} has no MODEL_FOR_CAUSAL_LM_MAPPING_NAMES (transformers 5 has)")


def _vocabulary_problems(directory: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield where the tokenizer has ids that the model has no embedding for."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return
    tokenizer = _read_object(file)
    model = tokenizer.get("model")
    vocabulary = model.get("vocab", {}) if isinstance(model, dict) else {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token["id"] for token in tokenizer.get("added_tokens") or [] if isinstance(token, dict) and "id" in token]
    num_rows = _text_config(config).get("vocab_size")
    num_ids = max((number for number in ids if isinstance(number, int)), default=-1) + 1
    if isinstance(num_rows, int) and num_ids > num_rows:
        yield (
            f"{file}: got {num_ids} token ids, wanted at most vocab_size = {num_rows}, the rows of the model's "
            "embedding: save the tokenizer that the model was trained with, or resize the embedding"
        )


def _link_problems(directory: Path) -> Iterator[str]:
    """Yield the links that lead out of the directory; a Hugging Face cache's lead to the blobs of the same model."""
    root = directory.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            yield (
                f"{path}: got a link to {path.resolve()}, wanted a file inside {root}: "
                "copy the file, or name the directory that holds it"
            )


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return True
    config = directory / "tokenizer_config.json"
    return config.is_file() and bool(_read_object(config).get("chat_template"))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model: of models that also see, a table of its own."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

    Raises:
        ValueError: the file can't be read, is not JSON, or holds something else.
    """
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: can't be read ({error.strerror}), wanted a JSON file") from None
    except (ValueError, RecursionError) as error:
        what = " ".join(str(error).split())[:80]
        raise ValueError(f"{file}: got no JSON ({what}), wanted the file as it was saved: copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: got a JSON {type(found).__name__}, wanted an object: copy the file again")
    return found


# ------------------------------------------------------------------------------------------------------------ weights


def _weight_problems(directory: Path) -> Iterator[str]:
    try:
        tensors = _stored_tensors(directory)
    except ValueError as error:
        yield str(error)
        return
    yield from _shape_problems(directory, tensors)
    yield from _value_problems(tensors)
    yield from _commit_problems(directory)


def _stored_tensors(directory: Path) -> list[StoredTensor]:
    """Return all stored tensors of a model directory.

    Raises:
        ValueError: there are no safetensors, a shard or a part of one is missing, or a header is damaged; one line for
            each.
    """
    if not (directory / INDEX).is_file():
        if not (directory / WEIGHTS).is_file():
            raise ValueError(_no_weights(directory))
        return read_header(directory / WEIGHTS)
    placed = _read_object(directory / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{directory / INDEX}: got no weight_map, wanted the shard of every tensor: copy it again")
    shards = sorted(set(placed.values()))
    absent = [name for name in shards if "/" in name or not (directory / name).is_file()]
    if absent:
        raise ValueError(
            f"{directory}: got {len(shards) - len(absent)} of {len(shards)} shards, wanted {_some(absent)} too "
            f"({INDEX}): copy what is missing"
        )
    tensors: list[StoredTensor] = []
    problems = []
    for name in shards:
        try:
            found = read_header(directory / name)
        except ValueError as error:
            problems.append(str(error))
            continue
        missing = sorted({tensor for tensor, shard in placed.items() if shard == name} - {one.name for one in found})
        if missing:
            problems.append(f"{directory / name}: got no {_some(missing)}, wanted it here ({INDEX}): copy it again")
        tensors += found
    _raise_all(problems)
    return tensors


def _no_weights(directory: Path) -> str:
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        return (
            f"{directory}: got {_some(pickled)} alone, wanted {WEIGHTS}: what is pickled runs code when it is loaded; "
            "convert it where that is harmless, by model.save_pretrained()"
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    got = f"{_some(others)} without {INDEX}" if others else "no weights"
    return f"{directory}: got {got}, wanted {WEIGHTS}, or shards and {INDEX}: save it by model.save_pretrained()"


def read_header(file: Path) -> list[StoredTensor]:
    """Return the tensors of one safetensors file, from its header.

    Raises:
        ValueError: the header is damaged, or the file does not have the length that the header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 0 < length <= min(MAX_HEADER_BYTES, size - 8) else b""
    damaged = f"{file}: got a damaged header ({size:,} bytes in the file), wanted safetensors: copy the file again"
    try:
        header = json.loads(text)
        tensors = [
            StoredTensor(
                file, name, entry["dtype"], tuple(entry["shape"]), *(8 + length + n for n in entry["data_offsets"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(damaged) from None
    if not all(
        isinstance(number, int) and number >= 0 for one in tensors for number in (*one.shape, one.begin, one.end)
    ):
        raise ValueError(damaged)
    wanted = max((tensor.end for tensor in tensors), default=8 + length)
    if size != wanted:
        raise ValueError(
            f"{file}: got {size:,} bytes, wanted {wanted:,} as its header says: "
            + ("the file was cut short, copy it again" if size < wanted else "copy it again")
        )
    wide = [one for one in tensors if one.end - one.begin != math.prod(one.shape) * FLOATS.get(one.dtype, 0)]
    if any(tensor.dtype in FLOATS for tensor in wide):
        raise ValueError(damaged)
    return tensors


def _shape_problems(directory: Path, tensors: list[StoredTensor]) -> Iterator[str]:
    """Yield the tensors that have other shapes than the config gives them; names that it does not give are let be."""
    if "quantization_config" in _read_object(directory / "config.json"):
        return  # packed, each method in its own way
    _name_accelerator()
    from huggingface_hub.errors import StrictDataclassError

    refusals = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError)
    try:
        expected = expected_shapes(str(directory))
    except refusals as error:
        what = " ".join(str(error).split())[:160]
        yield f"{directory / 'config.json'}: got what transformers builds no model from ({what}), wanted a sound config"
        return
    # A body saved on its own (as GPT-2 was) leaves out the prefix that it has inside the whole model.
    by_name = {name: shape for full, shape in expected.items() for name in (full.split(".", 1)[-1], full)}
    wrong = [one for one in tensors if one.name in by_name and by_name[one.name] != one.shape]
    if wrong:
        shown = ", ".join(f"{one.name} {list(one.shape)} for {list(by_name[one.name])}" for one in wrong[:MAX_NAMED])
        more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        yield (
            f"{wrong[0].file}: got {shown}{more}, wanted the second shapes, which are config.json's: "
            "config and weights are of two models"
        )


def _name_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU, before transformers imports it: otherwise it says so on stdout."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _value_problems(tensors: list[StoredTensor]) -> Iterator[str]:
    """Yield the files with values that are no numbers."""
    step = _block_step(sum(tensor.end - tensor.begin for tensor in tensors))
    bad: dict[Path, list[str]] = {}
    for tensor in tensors:
        if tensor.dtype in FLOATS and not _is_finite(tensor, step=step):
            bad.setdefault(tensor.file, []).append(tensor.name)
    for file, names in bad.items():
        yield f"{file}: got NaN or infinity in {_some(names)}, wanted finite weights: take an earlier checkpoint"


def _is_finite(tensor: StoredTensor, *, step: int) -> bool:
    import numpy as np

    exponents = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
    kind = np.dtype(f"<u{FLOATS[tensor.dtype]}")
    # A number whose exponent is all ones is NaN or infinite, in every one of these types.
    exponent = kind.type(exponents[tensor.dtype])
    with tensor.file.open("rb") as stream:
        for begin in range(tensor.begin, tensor.end, step):
            stream.seek(begin)
            block = np.frombuffer(stream.read(min(BLOCK_BYTES, tensor.end - begin)), dtype=kind)
            if np.any((block & exponent) == exponent):
                return False
    return True


def _block_step(size_bytes: int) -> int:
    """Return how far apart the blocks are that are read of so many bytes: side by side while all may be read."""
    return BLOCK_BYTES * max(1, math.ceil(size_bytes / MAX_READ_BYTES))


def _commit_problems(directory: Path) -> Iterator[str]:
    """Yield what is wrong with a policy of one of our runs: its commit has the hash of each of its files."""
    policy = directory.resolve()
    run = policy.parent.parent
    if policy.parent.name != "policies" or not (run / "store.json").is_file():
        return
    from cluster.commits import committed_policy

    try:
        committed_policy(run, policy.name)
    except ValueError as error:
        yield str(error)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
