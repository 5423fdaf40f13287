"""Owns reading an OpenAI-style request: bytes in, checked numbers and messages out, or what is wrong with them.

    body ─► parse_json ─► chat_call / completion_call ─► messages or prompts + Sampling

Denies by default: a parameter that is not read is refused by name. Knows neither HTTP nor tokens.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from actors.records import Message
from serve.wire import Sampling

ROLES = ("system", "user", "assistant")
IGNORED = ("user", "metadata", "store", "parallel_tool_calls", "service_tier")
"""Parameters that clients send and that change no answer."""
MAX_MESSAGES = 1024
MAX_PROMPTS = 16
MAX_STOPS = 4
MAX_STOP_CHARS = 64
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_SCHEMA_NODES = 128
MAX_SCHEMA_DEPTH = 8
MAX_SCHEMA_WORDS = 4096
"""Characters of all names and constants of a schema together."""
MAX_REPEATS = 32
"""Items of a list under a schema."""
SCHEMA_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
SCHEMA_KEYS = frozenset(
    {"type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "enum", "const"}
    | {"anyOf", "title", "description", "minLength", "maxLength"}
)
MAX_TEXT_LENGTH = 256
MAX_SHOWN = 60


class BadRequest(ValueError):
    """What the caller wrote can't be run; `param` names the parameter."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What both kinds of request have in common."""

    model: str
    sampling: Sampling
    stream: bool
    include_usage: bool
    """The stream is to end with an event that has the token counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall(Call):
    """A conversation to be continued."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall(Call):
    """Texts to be continued."""

    prompts: tuple[str, ...]


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        BadRequest: it is not UTF-8, not JSON (NaN and Infinity are not), nested too deeply, or no object.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise BadRequest(f"body: got bytes that are not UTF-8 at offset {error.start}, wanted JSON in UTF-8") from None
    except RecursionError:
        raise BadRequest("body: got JSON that is nested too deeply, wanted a chat or completion request") from None
    except ValueError as error:
        raise BadRequest(f"body: got no JSON ({cut(str(error))}), wanted a JSON object") from None
    if not isinstance(found, dict):
        raise BadRequest(f"body: got {shown(found)}, wanted a JSON object")
    return found


def chat_call(body: dict[str, Any]) -> ChatCall:
    """Return a checked chat request.

    Raises:
        BadRequest: names the first parameter that is wrong.
    """
    fields = _Fields(body)
    model = fields.text("model")
    messages = _messages(fields.take("messages"))
    wants_logprobs = fields.flag("logprobs")
    top = fields.whole("top_logprobs", low=0, high=MAX_TOP_LOGPROBS, default=None)
    if top is not None and not wants_logprobs:
        raise BadRequest("top_logprobs: got it without logprobs = true, wanted both or neither", param="top_logprobs")
    sampling = _sampling(fields, num_top_logprobs=(top or 0) if wants_logprobs else None)
    stream, include_usage = _streaming(fields)
    fields.end()
    return ChatCall(model=model, sampling=sampling, stream=stream, include_usage=include_usage, messages=messages)


def completion_call(body: dict[str, Any]) -> CompletionCall:
    """Return a checked completion request.

    Raises:
        BadRequest: names the first parameter that is wrong.
    """
    fields = _Fields(body)
    model = fields.text("model")
    prompts = _prompts(fields.take("prompt"))
    top = fields.whole("logprobs", low=0, high=MAX_TOP_LOGPROBS, default=None)
    sampling = _sampling(fields, num_top_logprobs=top)
    if len(prompts) * sampling.num_samples > MAX_CHOICES:
        raise BadRequest(
            f"n: got {len(prompts)} prompts × {sampling.num_samples}, wanted at most {MAX_CHOICES} choices", param="n"
        )
    stream, include_usage = _streaming(fields)
    fields.end()
    return CompletionCall(model=model, sampling=sampling, stream=stream, include_usage=include_usage, prompts=prompts)


def shown(value: Any) -> str:
    """Return a JSON value as a message shows it: short, and of lists and objects the kind alone."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    return cut(json.dumps(value))


class _Fields:
    """The parameters of a body, each taken once; what nobody took is refused."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if name not in IGNORED}
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        self._known.append(name)
        return self._left.pop(name, None)

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            _refuse(name, value, "text")
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool | None):
            _refuse(name, value, "true or false")
        return bool(value)

    def whole(self, name: str, *, low: int, high: int, default: int | None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            _refuse(name, value, "a whole number")
        if not low <= value <= high:
            _refuse(name, value, f"{low} to {high}")
        return value

    def number(self, name: str, *, low: float, high: float, default: float, above: bool = False) -> float:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            _refuse(name, value, "a number")
        if not low <= value <= high or (above and value == low) or not math.isfinite(value):
            _refuse(name, value, f"{'more than ' if above else ''}{low:g} {'and at most' if above else 'to'} {high:g}")
        return float(value)

    def end(self) -> None:
        """Refuse what was not taken."""
        for name in self._left:
            near = difflib.get_close_matches(name[:MAX_SHOWN], self._known, n=1, cutoff=0.6)
            remedy = f"did you mean {near[0]}?" if near else "leave it out"
            raise BadRequest(f"{cut(name)}: unknown parameter, {remedy}", param=cut(name))


def _sampling(fields: _Fields, *, num_top_logprobs: int | None) -> Sampling:
    max_tokens = fields.whole("max_tokens", low=1, high=1_000_000, default=None)
    newer = fields.whole("max_completion_tokens", low=1, high=1_000_000, default=None)
    num_samples = fields.whole("n", low=1, high=MAX_CHOICES, default=1)
    assert num_samples is not None, "it has a default"
    return Sampling(
        max_tokens=max_tokens if newer is None else newer,
        temperature=fields.number("temperature", low=0.0, high=2.0, default=1.0),
        top_p=fields.number("top_p", low=0.0, high=1.0, default=1.0, above=True),
        num_samples=num_samples,
        seed=fields.whole("seed", low=-(2**63), high=2**63 - 1, default=None),
        stop=_stops(fields.take("stop")),
        presence_penalty=fields.number("presence_penalty", low=-2.0, high=2.0, default=0.0),
        frequency_penalty=fields.number("frequency_penalty", low=-2.0, high=2.0, default=0.0),
        num_top_logprobs=num_top_logprobs,
        json_schema=_json_schema(fields.take("response_format")),
    )


def _streaming(fields: _Fields) -> tuple[bool, bool]:
    stream, options = fields.flag("stream"), fields.take("stream_options")
    if options is None:
        return stream, False
    if not isinstance(options, dict) or not stream:
        _refuse("stream_options", options, "an object, beside stream = true")
    unknown = [name for name in options if name not in ("include_usage", "include_obfuscation")]
    if unknown:
        raise BadRequest(f"stream_options: unknown key {cut(unknown[0])}, wanted include_usage", param="stream_options")
    wanted = options.get("include_usage")
    if not isinstance(wanted, bool | None):
        _refuse("stream_options.include_usage", wanted, "true or false")
    return stream, bool(wanted)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        _refuse("messages", value, "a list of messages")
    if not 1 <= len(value) <= MAX_MESSAGES:
        _refuse("messages", value, f"1 to {MAX_MESSAGES} messages")
    messages = tuple(_message(f"messages[{i}]", message) for i, message in enumerate(value))
    if messages[-1].role == "assistant":
        raise BadRequest(
            "messages: ends with the assistant's, wanted a last message that it can answer", param="messages"
        )
    return messages


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        _refuse(where, value, "an object with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        _refuse(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    for name in value:
        if name not in ("role", "content", "name"):
            raise BadRequest(f"{where}.{cut(name)}: unknown key, wanted role and content", param="messages")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) < len(content) or not all(isinstance(part.get("text"), str) for part in parts):
            _refuse(f"{where}.content", content, 'text, or parts of {"type": "text", "text": …}')
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        _refuse(f"{where}.content", content, "text")
    return Message(role=str(role), content=_spelt(f"{where}.content", content))


def _prompts(value: Any) -> tuple[str, ...]:
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        _refuse("prompt", value, "text, or a list of texts (token ids are not taken)")
    if not 1 <= len(prompts) <= MAX_PROMPTS or not all(prompts):
        _refuse("prompt", value, f"1 to {MAX_PROMPTS} texts, none of them empty")
    return tuple(_spelt("prompt", prompt) for prompt in prompts)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        _refuse("stop", value, "text, or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARS for stop in stops):
        _refuse("stop", value, f"at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters")
    return tuple(_spelt("stop", stop) for stop in stops)


def _spelt(where: str, text: str) -> str:
    """Refuse half of a surrogate pair, which no UTF-8 carries and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"{where}: got a lone surrogate at character {error.start}, wanted whole characters",
            param=where.partition(".")[0].partition("[")[0],
        ) from None
    return text


# ------------------------------------------------------------------------------------------------------------- schemas


def _json_schema(value: Any) -> str | None:
    """Return the schema of a response_format as JSON text; None for plain text.

    Only what compiles to a small grammar is taken: no patterns, no references, no counts beyond `MAX_REPEATS`.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    if kind != "json_schema":
        _refuse("response_format", value if kind is None else kind, "a type of text, json_object or json_schema")
    named = value.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        _refuse("response_format.json_schema.schema", schema, "an object")
    num_chars = 0
    for number, (where, node) in enumerate(_nodes(schema)):
        num_chars += _check_node(where, node)
        if number >= MAX_SCHEMA_NODES or num_chars > MAX_SCHEMA_WORDS:
            _refuse_schema(
                "schema", f"got more than {MAX_SCHEMA_NODES} parts or {MAX_SCHEMA_WORDS} characters of names in it"
            )
    return json.dumps(schema)


def _nodes(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every schema within a schema with the place where it stands, without recursion."""
    waiting: list[tuple[str, Any, int]] = [("schema", schema, 1)]
    while waiting:
        where, node, depth = waiting.pop()
        if depth > MAX_SCHEMA_DEPTH:
            _refuse_schema(where, f"is nested more than {MAX_SCHEMA_DEPTH} deep")
        yield where, node
        properties, items, options = node.get("properties", {}), node.get("items"), node.get("anyOf", [])
        waiting += [(f"{where}.{cut(str(name))}", inner, depth + 1) for name, inner in properties.items()]
        waiting += [(f"{where}.anyOf", inner, depth + 1) for inner in options]
        if items is not None:
            waiting.append((f"{where}.items", items, depth + 1))


def _check_node(where: str, node: Any) -> int:
    """Check one schema and return the number of characters of its names and constants."""
    if not isinstance(node, dict):
        _refuse_schema(where, f"is {shown(node)}, wanted an object")
    unknown = sorted(set(node) - SCHEMA_KEYS)
    if unknown:
        _refuse_schema(where, f"has {cut(str(unknown[0]))}, wanted only {', '.join(sorted(SCHEMA_KEYS))}")
    if not isinstance(node.get("properties", {}), dict) or not isinstance(node.get("anyOf", []), list):
        _refuse_schema(where, "has properties or anyOf that are no object or list")
    kind = node.get("type")
    if kind is None and not node.keys() & {"enum", "const", "anyOf"}:
        _refuse_schema(where, f"has no type, wanted one of {', '.join(SCHEMA_TYPES)}")
    if kind is not None and kind not in SCHEMA_TYPES:
        _refuse_schema(where, f"has type {shown(kind)}, wanted one of {', '.join(SCHEMA_TYPES)}")
    if "anyOf" in node and not node["anyOf"]:
        _refuse_schema(where, "has an empty anyOf, wanted one schema or more")
    _check_counts(where, node, "minItems", "maxItems", most=MAX_REPEATS)
    _check_counts(where, node, "minLength", "maxLength", most=MAX_TEXT_LENGTH)
    if not isinstance(node.get("additionalProperties", False), bool):
        _refuse_schema(where, "has additionalProperties that are no true or false")
    required, properties = node.get("required", []), node.get("properties", {})
    if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
        _refuse_schema(where, "requires what is not among its properties")
    constants = [*_constants(where, node.get("enum", [])), *([node["const"]] if "const" in node else [])]
    if not all(isinstance(constant, str | int | float | bool | None) for constant in constants):
        _refuse_schema(where, "has an enum or const that is no text, number, true, false or null")
    if "enum" in node and not constants:
        _refuse_schema(where, "has an empty enum, wanted one value or more")
    return sum(len(str(word)) for word in [*properties, *constants])


def _constants(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        _refuse_schema(where, "has an enum that is no list")
    return value


def _check_counts(where: str, node: dict[str, Any], low: str, high: str, *, most: int) -> None:
    counts = [node.get(low, 0), node.get(high, most)]
    if not all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= most for count in counts):
        _refuse_schema(where, f"has a {low} or {high} beyond 0 to {most}")
    if counts[0] > counts[1]:
        _refuse_schema(where, f"has a {low} above its {high}")


def _refuse_schema(where: str, problem: str) -> NoReturn:
    raise BadRequest(
        f"response_format: {where} {problem}; wanted a schema that compiles at once", param="response_format"
    )


# ------------------------------------------------------------------------------------------------------------ messages


def _refuse(name: str, value: Any, wanted: str) -> NoReturn:
    param = name.partition(".")[0].partition("[")[0]
    got = "nothing" if value is None else shown(value)
    raise BadRequest(f"{name}: got {got}, wanted {wanted}", param=param)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def cut(text: str) -> str:
    """Return text as a message can carry it: short, printable ASCII."""
    printable = "".join(mark if mark.isprintable() and mark.isascii() else "?" for mark in text[: MAX_SHOWN + 1])
    return printable if len(text) <= MAX_SHOWN else printable[:MAX_SHOWN] + "..."
