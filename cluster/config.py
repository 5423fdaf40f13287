"""Owns how settings are read: TOML files laid over one another, then flags, then checked all at once.

`${NAME}` in a text value is replaced by that environment variable. Secrets are refused, and shown in no message.
Knows nothing of what is configured. Every message is one line: where it came from, what was found, what was wanted.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import json
import os
import pkgutil
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError, create_model
from pydantic_core import ErrorDetails, PydanticUndefined

C = TypeVar("C", bound="Config")
Key = tuple[str, ...]

MAX_DEPTH = 32
"""Tables and lists inside one another; no settings need as many, and what reads them is recursive."""
MAX_SHOWN = 60
"""Characters of a value, or of a key, in a message."""
MAX_LISTED = 240
"""Characters of a list of what there is, in a message."""

VARIABLE = re.compile(r"\$\{(\w+)\}")
SECRET_KEY = re.compile(r"(?i)(?:^|_)(?:api_?key|token|secret|password|passwd|credentials?)$")
"""Keys that a secret would be written under; none of ours is called so."""
SECRET_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|AKIA[A-Z0-9]{16}"
    r"|xox[abeprs]-[\w-]{10,}|sk-(?=[\w-]*\d)[\w-]{20,})|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""Tokens of well-known services, by their own prefixes: stricter than what a log redacts, for this refuses a run."""


class Config(BaseModel):
    """Base of every config section and of every plug-in's settings."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ConfigError(ValueError):
    """What the user's settings have wrong, all of it, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Raw settings and where each came from."""

    values: dict[str, Any] = field(default_factory=dict)
    """Nested tables, as TOML gives them."""
    origins: dict[Key, str] = field(default_factory=dict)
    """Where a key was last set: `file.toml:12` or `command line`."""


def read_settings(path: Path) -> Settings:
    """Return the settings of one TOML file.

    Raises:
        ConfigError: there is no such file, it can't be read, or it is not TOML (with line and column).
    """
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file, wanted a TOML file{_nearest_file(path)}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: can't be read ({error.strerror}), wanted a TOML file"]) from None
    except UnicodeDecodeError as error:
        bad = f"0x{error.object[error.start]:02x}"
        raise ConfigError([f"{path}: byte {error.start}: got {bad}, wanted UTF-8: save the file as UTF-8"]) from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_message(path, text, str(error))]) from None
    except RecursionError:
        raise ConfigError([f"{path}: got tables or lists nested hundreds deep, wanted a run's settings"]) from None
    except ValueError:
        # Python itself refuses to read such a number, without saying where it stands.
        raise ConfigError([f"{path}: got a number of thousands of digits, wanted one of 64 bits"]) from None
    return Settings(values=values, origins={key: f"{path}:{line}" for key, line in _key_lines(text)})


def layered(settings: Iterable[Settings]) -> Settings:
    """Return settings laid over one another, the later over the earlier, table by table.

    A table that names another `kind` (of plug-in) replaces the one below it: their other keys have nothing in common.
    """
    values: dict[str, Any] = {}
    origins: dict[Key, str] = {}
    for one in settings:
        values = _merged(values, one.values)
        origins |= one.origins
    return Settings(values=values, origins=origins)


def flag_settings(key: str, text: str) -> Settings:
    """Return the settings that one `--section.key text` makes; text is a TOML value, or else a plain string.

    >>> flag_settings("critic.replicas", "6").values
    {'critic': {'replicas': 6}}
    >>> flag_settings("learner.model", "models/qwen").values
    {'learner': {'model': 'models/qwen'}}
    """
    path = tuple(key.replace("-", "_").split("."))
    value: Any = _flag_value(text)
    for part in reversed(path):
        value = {part: value}
    return Settings(values=value, origins={path: "command line"})


def validated(model: type[C], settings: Settings) -> C:
    """Return the config that the settings describe.

    Raises:
        ConfigError: with every problem there is, the checks across fields included.
    """
    settings, refused = _usable(settings)
    lines = list(refused.values())
    try:
        config = _validate(model, settings.values)
    except ValidationError as error:
        # A refused key stands at its class's default here, and a default may be a path, which JSON has not.
        found = [
            details
            for details in error.errors(include_url=False)
            if _path_in_values(details["loc"], settings.values) not in refused
        ]
        lines += [line for details in found for line in _lines_of(details, model=model, settings=settings)]
        lines += _problems_beyond(found, model=model, settings=settings, refused=refused)
    if lines:
        raise ConfigError(sorted(set(lines), key=_by_place))
    return config


def located(problems: Iterable[str], *, settings: Settings) -> list[str]:
    """Return lines that begin with a key, each with the place that set it in front, in the order of the places."""
    lines = []
    for line in problems:
        key = tuple(line.split(":", 1)[0].split("."))
        place = _where(key, line, settings)
        lines.append(line if place == "settings" else f"{place}: {line}")
    return sorted(lines, key=_by_place)


def _validate(model: type[C], values: dict[str, Any]) -> C:
    # By way of JSON: strict there means that "6" is no number but that a list is a tuple and a string is a path.
    return model.model_validate_json(json.dumps(values, default=str), strict=True)


def _problems_beyond(
    found: list[ErrorDetails], *, model: type[C], settings: Settings, refused: Iterable[Key]
) -> list[str]:
    """Return what the checks across fields say when the fields in error are left at their defaults."""
    removed = {_path_in_values(details["loc"], settings.values) for details in found} | set(refused)
    if () in removed:
        return []
    values = copy.deepcopy(settings.values)
    for path in removed:
        _remove(values, path)
    try:
        _validate(model, values)
    except ValidationError as error:
        lines = [
            line
            for details in error.errors(include_url=False)
            if details["loc"] == ()
            for line in _lines_of(details, model=model, settings=settings)
        ]
        names = [".".join(path) for path in removed]
        return [line for line in lines if not any(name in line for name in names)]
    return []


# ---------------------------------------------------------------------- values


def _usable(settings: Settings) -> tuple[Settings, dict[Key, str]]:
    """Return the settings with variables put in and without the keys that no config may hold, and a line for each."""
    values = dict(settings.values)
    refused: dict[Key, str] = {}
    # By hand, not by recursion: how deep the tables are is one of the things to be checked.
    waiting: list[tuple[Key, dict[str, Any]]] = [((), values)]
    while waiting:
        prefix, table = waiting.pop()
        for name, value in list(table.items()):
            path = (*prefix, name)
            if isinstance(value, dict) and len(path) < MAX_DEPTH:
                table[name] = dict(value)
                waiting.append((path, table[name]))
                continue
            try:
                _refuse_secret(name, value)
                table[name] = _plain_value(value, depth=len(path))
            except ValueError as error:
                del table[name]
                refused[path] = f"{_where(path, '', settings)}: {_dotted(path)}: {error}"
    return Settings(values=values, origins=settings.origins), refused


def _plain_value(value: Any, *, depth: int) -> Any:
    """Return a value with variables put in.

    Raises:
        ValueError: what no config may hold, with what was got and wanted; the caller says where.
    """
    if depth >= MAX_DEPTH and isinstance(value, dict | list):
        raise ValueError(f"got tables or lists nested {MAX_DEPTH} deep, wanted a run's settings")
    if isinstance(value, list):
        return [_plain_value(item, depth=depth + 1) for item in value]
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_secret(name, item)
        return {name: _plain_value(item, depth=depth + 1) for name, item in value.items()}
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("got a whole number beyond 64 bits, wanted a smaller one")
    if not isinstance(value, str):
        return value
    unset = sorted({name for name in VARIABLE.findall(value) if name not in os.environ})
    if unset:
        raise ValueError(
            f"got {shown(value)}, wanted a variable of the environment, {unset[0]} is not set: export {unset[0]}=…, "
            "or write the value itself"
        )
    whole = VARIABLE.fullmatch(value)
    expanded = VARIABLE.sub(lambda found: os.environ[found[1]], value)
    if SECRET_VALUE.search(expanded):
        raise ValueError(_INLINE_SECRET)
    marks = [mark for mark in expanded if ord(mark) < 32 or ord(mark) == 127]
    if marks:
        raise ValueError(f"got text with the control character U+{ord(marks[0]):04X}, wanted one line of plain text")
    # A value that is one variable and nothing else may be a number, as a flag's text may be.
    return _flag_value(expanded) if whole else expanded


_INLINE_SECRET = (
    "got a secret written out (not shown), wanted it in a file that a key ending in _path names, or in the "
    "environment: take it out of here, and revoke it if this was shared"
)


def _refuse_secret(name: str, value: Any) -> None:
    if isinstance(value, str) and value and SECRET_KEY.search(name) and not VARIABLE.fullmatch(value):
        raise ValueError(_INLINE_SECRET)


# ---------------------------------------------------------------------- plug-ins

if TYPE_CHECKING:

    class PluginConfig(Config):
        """Settings of one plug-in: its own `Config`, and `kind`, its file's name."""

        kind: str


def plugin_names(package: str) -> list[str]:
    """Return the names of a package's plug-ins: its files."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__))


def load_plugin(package: str, kind: str, *, where: str) -> Any:
    """Return the module of a plug-in: the file called `kind` in a package.

    Raises:
        ValueError: there is no such file; the message begins with `where`, the key that named it.
    """
    names = plugin_names(package)
    if kind not in names:
        raise ValueError(f"{where}: got {shown(kind)}, wanted one of {_listed(names)}{_did_you_mean(kind, names)}")
    return importlib.import_module(f"{package}.{kind}")


def plugin_config(package: str, *, default: str) -> Any:
    """Return the type of a section whose `kind` names a file of `package` and whose other keys are that file's Config.

    The instance is one of the plug-in's own `Config`, with a field `kind` besides.
    """
    members = [Annotated[_plugin_model(package, name), Tag(name)] for name in plugin_names(package)]

    def tag(value: Any) -> Any:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", None)

    return Annotated[Union[tuple(members)], Discriminator(tag)]  # noqa: UP007 - the members are known at run time only


def plugin_settings(package: str, kind: str, *, values: Mapping[str, Any] | None = None) -> PluginConfig:
    """Return the settings of one plug-in, with its defaults where `values` says nothing."""
    settings: PluginConfig = _plugin_model(package, kind).model_validate(values or {})
    return settings


@cache
def _plugin_model(package: str, name: str) -> type[PluginConfig]:
    fields: dict[str, Any] = {"kind": (Literal[name], name)}
    model: type[PluginConfig] = create_model(
        f"{name}.Config", __base__=load_plugin(package, name, where=package).Config, **fields
    )

    # No import finds a class that was made at run time; without this its instances can't travel to an actor.
    def reduce(self: Config) -> tuple[Callable[..., Config], tuple[Any, ...]]:
        return _restored_plugin, (package, name, self.model_dump())

    model.__reduce__ = reduce  # type: ignore[assignment, method-assign]
    return model


def _restored_plugin(package: str, name: str, values: dict[str, Any]) -> Config:
    return _plugin_model(package, name).model_validate(values)


# ---------------------------------------------------------------------- messages


def _lines_of(details: ErrorDetails, *, model: type[Config], settings: Settings) -> list[str]:
    """Return the lines that tell of one of pydantic's errors."""
    path = _path_in_values(details["loc"], settings.values, ends_in_tag=details["type"] == "value_error")
    if details["type"] == "value_error":
        messages = str(details["ctx"]["error"]).splitlines()
        # A section's own check names its field first, "dtype: got …": with the section that is the key.
        prefix = _dotted(path) + ("." if re.match(r"\w+: got ", messages[0]) else ": ") if path else ""
        return [f"{_where(path, prefix + message, settings)}: {prefix}{message}" for message in messages]
    if details["type"] == "json_invalid":
        return [f"settings: {details['msg']}"]
    return [f"{_where(path, '', settings)}: {_dotted(path)}: {_found_and_wanted(details, path, model=model)}"]


def _found_and_wanted(details: ErrorDetails, path: Key, *, model: type[Config]) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, details["loc"], model=model)
    if kind == "missing":
        return "got nothing, wanted a value: it has no default"
    got = shown(details["input"])
    if kind == "union_tag_invalid":
        tag = str(context["tag"])
        names = [name.strip().strip("'") for name in str(context["expected_tags"]).split(",")]
        return f"got kind = {shown(tag)}, wanted one of {_listed(names)}{_did_you_mean(tag, names)}"
    if kind == "literal_error":
        wanted = str(context["expected"]).replace(" or ", ", ").replace("'", "")
        near = _did_you_mean(str(details["input"]), wanted.split(", "))
        return f"got {got}, wanted {'one of ' if ',' in wanted else ''}{wanted}{near}"
    return f"got {got}, wanted {_wanted(kind, context) or _cut(details['msg'].removeprefix('Input should be '))}"


def _wanted(kind: str, context: dict[str, Any]) -> str | None:
    """Return the plain words for what a kind of pydantic error wants, or None where pydantic's own must do."""
    bounds = {
        "greater_than": ("more than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
        "multiple_of": ("a multiple of", "multiple_of"),
    }
    if kind in bounds:
        words, bound = bounds[kind]
        return f"{words} {context[bound]:g}"
    if kind == "string_pattern_mismatch":
        return f"text of the form {context['pattern']}"
    return {
        "bool_type": "true or false",
        "dict_type": "a table",
        "finite_number": "a finite number",
        "float_type": "a number",
        "int_from_float": "a whole number",
        "int_type": "a whole number",
        "list_type": "a list",
        "model_type": "a table",
        "path_type": "a path",
        "string_type": "text",
        "tuple_type": "a list",
        "union_tag_not_found": "a table",
    }.get(kind)


def _unknown_key(path: Key, loc: Sequence[int | str], *, model: type[Config]) -> str:
    """Return the words for a key that does not exist, with the nearest that does."""
    known = _keys_beside(loc, model=model)
    prefix = path[:-1]
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
    if nearest:
        return f"unknown key, did you mean {_dotted((*prefix, nearest[0]))}?"
    elsewhere = [key for key in _keys(model) if key.split(".")[-1] == path[-1] and key != ".".join(path)]
    if elsewhere:
        return f"unknown key, did you mean {' or '.join(elsewhere)}?"
    return f"unknown key, wanted one of {_listed(known)}"


@cache
def _keys(model: type[Config]) -> tuple[str, ...]:
    # Plug-ins of one kind may have keys of one name.
    return tuple(dict.fromkeys(doc.key for doc in describe(model)))


def _keys_beside(loc: Sequence[int | str], *, model: type[Config]) -> list[str]:
    """Return the keys of the table that the last part of a location stands in."""
    here: Any = model
    for part in loc[:-1]:
        members = _models_of(here)
        tagged = [member for member in members if member.__name__ == f"{part}.Config"]
        if tagged:
            here = tagged[0]
        else:
            here = next((m.model_fields[str(part)] for m in members if part in m.model_fields), None)
    return [name for member in _models_of(here) for name in member.model_fields]


def _models_of(here: Any) -> list[type[Config]]:
    """Return the config classes that a class or a field of one stands for."""
    if isinstance(here, type) and issubclass(here, Config):
        return [here]
    annotation = getattr(here, "annotation", here)
    inner = getattr(annotation, "__args__", ()) if not isinstance(annotation, type) else (annotation,)
    return [model for part in inner if part is not here for model in _models_of(part)] if inner else []


def _path_in_values(loc: Sequence[int | str], values: dict[str, Any], *, ends_in_tag: bool = False) -> Key:
    """Return the key that a location of pydantic's means: without the tags of unions and the indices of lists.

    The last part may be a tag too where a section of a union complains of itself; else it is a key of the section.
    """
    path: list[str] = []
    here: Any = values
    last = len(loc) - (0 if ends_in_tag else 1)
    for position, part in enumerate(loc):
        if isinstance(part, int):
            break
        if isinstance(here, dict) and part not in here and here.get("kind", part) == part and position < last:
            continue
        path.append(part)
        here = here.get(part, {}) if isinstance(here, dict) else {}
    return tuple(path)


def _where(path: Key, message: str, settings: Settings) -> str:
    """Return the place that set a key, or the nearest table around it or in it, or a key that the message names."""
    named = [key for key in settings.origins if re.search(rf"(?<![\w.]){re.escape('.'.join(key))}(?!\w)", message)]
    if named:
        return settings.origins[max(named, key=lambda key: (message.startswith(".".join(key)), len(key)))]
    for length in range(len(path), 0, -1):
        if path[:length] in settings.origins:
            return settings.origins[path[:length]]
    inside = [key for key in settings.origins if path and key[: len(path)] == path]
    if inside:
        return settings.origins[inside[0]]
    return "settings"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _nearest_file(path: Path) -> str:
    siblings = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    nearest = difflib.get_close_matches(str(path), siblings, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def shown(value: Any) -> str:
    """Return a value as TOML would show it, cut to what fits a line."""
    if isinstance(value, dict):
        return "a table"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return _cut("".join(mark if mark.isprintable() else f"\\u{ord(mark):04x}" for mark in text))


def _dotted(path: Key) -> str:
    """Return a key as TOML writes it: what is more than letters, digits, _ and - in quotes."""
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", part) else shown(part) for part in path)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _listed(names: Sequence[str]) -> str:
    """Return names as a list, the first of them where all would not fit a line."""
    kept = [name for i, name in enumerate(names) if len(", ".join(names[: i + 1])) <= MAX_LISTED]
    left = len(names) - len(kept)
    return ", ".join(kept) + (f" and {left} more" if left else "")


def _by_place(line: str) -> tuple[str, int]:
    place = re.match(r"(.*?):(\d+)", line)
    return (place[1], int(place[2])) if place else (line, 0)


# ---------------------------------------------------------------------- documentation


class KeyDoc(NamedTuple):
    """One key that a config knows."""

    key: str
    """Dotted, as a flag has it."""
    default: str
    """As TOML would show it; empty when the key must be set."""
    meaning: str
    """The field's docstring, in one line."""


def describe(model: type[Config], *, defaults: Mapping[str, Any] | None = None) -> list[KeyDoc]:
    """Return every key of a config in the order of its fields, with the defaults given or else those of its classes."""
    return list(_describe(model, prefix=(), defaults=defaults or {}))


def _describe(model: type[Config], *, prefix: Key, defaults: Mapping[str, Any]) -> Iterator[KeyDoc]:
    for name, info in model.model_fields.items():
        key, meaning = ".".join((*prefix, name)), " ".join((info.description or "").split())
        sections = _models_of(info)
        default = defaults.get(name, info.get_default(call_default_factory=True))
        if not sections:
            yield KeyDoc(key=key, default="" if default is PydanticUndefined else shown(default), meaning=meaning)
        elif all("kind" in section.model_fields for section in sections) and isinstance(default, dict):
            kind = default.get("kind")
            yield KeyDoc(key=f"{key}.kind", default=shown(kind), meaning=meaning)
            for section in sections:
                for doc in _describe(section, prefix=(*prefix, name), defaults={}):
                    if not doc.key.endswith(".kind"):
                        yield doc._replace(meaning=f"({section.model_fields['kind'].default}) {doc.meaning}")
        else:
            inner = default if isinstance(default, dict) else {}
            for section in sections:
                yield from _describe(section, prefix=(*prefix, name), defaults=inner)


# ---------------------------------------------------------------------- TOML


def _flag_value(text: str) -> Any:
    """Return what a flag's text stands for: a TOML value where it is one, a number as people write it, or text."""
    word = text.strip().lower()
    if word in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(word)
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        # Not TOML; or a number of so many digits that Python does not read it.
        parsed = {}
    # More than one key: the text held a line break and a statement of its own.
    if set(parsed) == {"value"}:
        return parsed["value"]
    try:
        return float(text)
    except ValueError:
        # Bytes that are no UTF-8 reach us as lone surrogates, which no JSON carries.
        return text.encode(errors="replace").decode()


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = value
        if isinstance(under, dict) and isinstance(value, dict):
            same_kind = value.get("kind", under.get("kind")) == under.get("kind")
            merged[key] = _merged(under, value) if same_kind else value
    return merged


def _remove(values: dict[str, Any], path: Key) -> None:
    here: Any = values
    for part in path[:-1]:
        here = here.get(part) if isinstance(here, dict) else None
    if isinstance(here, dict):
        here.pop(path[-1], None)


def _syntax_message(path: Path, text: str, message: str) -> str:
    """Return one line for a TOML syntax error: `file:line:column: what`."""
    found = re.search(r"\(at line (\d+), column (\d+)\)", message)
    if found:
        line, column = int(found[1]), int(found[2])
    else:
        lines = text.splitlines() or [""]
        line, column = len(lines), len(lines[-1]) + 1
    reason = re.sub(r"\s*\(at .*\)$", "", message, flags=re.DOTALL)
    return f"{path}:{line}:{column}: not TOML: {_cut(reason[:1].lower() + reason[1:])}"


_STATEMENT = re.compile(r"[ \t]*(?:(?P<table>\[\[?)|(?P<skip>#[^\n]*|))")
_KEY_PART = re.compile(r"[ \t]*(?:\"((?:[^\"\\\n]|\\.)*)\"|'([^'\n]*)'|([A-Za-z0-9_-]+))[ \t]*(\.)?")
_BASIC_END = re.compile(r'(?:\\.|[^\\])*?"{3,5}', re.DOTALL)
_LITERAL_END = re.compile(r".*?'{3,5}", re.DOTALL)
_TOKEN = re.compile(r'"""|\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}\n]|[^"\'#\[\]{}\n]+')


def _key_lines(text: str) -> Iterator[tuple[Key, int]]:
    """Yield each key of a valid TOML text with the number of its line, since tomllib does not keep it."""
    position = 0
    table: Key = ()
    while position < len(text):
        start = _STATEMENT.match(text, position)
        assert start is not None, "every part of the pattern may be empty"
        line = text.count("\n", 0, position) + 1
        position = start.end()
        path, position = _read_key(text, position)
        if start["table"]:
            table = path
            yield table, line
        elif path:
            yield table + path, line
        position = _skip_value(text, position)


def _read_key(text: str, position: int) -> tuple[Key, int]:
    path: list[str] = []
    while part := _KEY_PART.match(text, position):
        path.append(next(group for group in part.groups()[:3] if group is not None))
        position = part.end()
        if not part[4]:
            break
    return tuple(path), position


def _skip_value(text: str, position: int) -> int:
    """Return the position after the statement's last line, over strings and brackets that span lines."""
    depth = 0
    while token := _TOKEN.match(text, position):
        position = token.end()
        if token[0] in ('"""', "'''"):
            end = (_BASIC_END if token[0] == '"""' else _LITERAL_END).match(text, position)
            position = end.end() if end else len(text)
        elif token[0] in ("[", "{"):
            depth += 1
        elif token[0] in ("]", "}"):
            # A table's header closes a bracket that this statement's value did not open.
            depth = max(depth - 1, 0)
        elif token[0] == "\n" and depth == 0:
            break
    return position if token else len(text)
