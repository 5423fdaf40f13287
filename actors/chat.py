"""Owns turning chat messages into token ids: the model's own chat template, through which no user text gains control.

Knows nothing of engines; rollouts, trainers and serving encode the same messages to the same ids by calling it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from actors.records import Message

Tokenizer: TypeAlias = Any
"""A `transformers.PreTrainedTokenizerBase`; untyped, and too slow to import for its name alone."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a model directory; nothing is fetched and no code of the directory is run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> tuple[int, ...]:
    """Return the token ids of a conversation under the tokenizer's chat template.

    Text of a message is never a control token: a message that spells one is inserted into the rendered template
    verbatim, as ordinary text.

    Raises:
        ValueError: no messages, the template refuses them, or a message cannot be written without a control token.
    """
    if not messages:
        raise ValueError("messages: got none, wanted at least one")
    control = _control_ids(tokenizer)
    unknown = tokenizer.unk_token
    hostile: dict[str, str] = {}
    rendered_messages = []
    for message in messages:
        content = message.content
        if control.intersection(_ids(tokenizer, content)) or (unknown and unknown in content):
            # The template's literal text and the message must be told apart after rendering; no user knows the nonce.
            nonce = f"x{secrets.token_hex(12)}x"
            hostile[nonce] = content
            content = nonce
        rendered_messages.append({"role": message.role, "content": content})
    rendered = _render(tokenizer, rendered_messages, add_generation_prompt=add_generation_prompt)
    if not hostile:
        return tuple(_ids(tokenizer, rendered))
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(hostile)})", rendered):
        ids += _ids_of_text(tokenizer, hostile[piece], control=control) if piece in hostile else _ids(tokenizer, piece)
    return tuple(ids)


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the token ids of plain text, of which none is a control token.

    Raises:
        ValueError: the text cannot be written without one.
    """
    return tuple(_ids_of_text(tokenizer, text, control=_control_ids(tokenizer)))


def label_token_id(tokenizer: Tokenizer, label: str) -> int:
    """Return the id of the one token that spells a label.

    Raises:
        ValueError: the vocabulary spells it with several tokens, or not at all.
    """
    ids = _ids(tokenizer, label)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"labels: {label!r} is {len(ids)} tokens of this vocabulary ({tokenizer.convert_ids_to_tokens(ids)}), "
            "wanted exactly one known token; choose a label that is one token"
        )
    return int(ids[0])


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of sampled tokens, without control tokens."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text


def _control_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that no text may become; not that of unknown text, unless (as in GPT-2) it also ends sequences."""
    control = set(tokenizer.all_special_ids)
    control |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        control.discard(tokenizer.unk_token_id)
    return control


def num_tokens_spanning(tokenizer: Tokenizer, token_ids: Sequence[int], *, num_chars: int) -> int:
    """Return how many of the tokens it takes to spell the first `num_chars` characters of their text.

    All of them when the text is shorter. The text of a prefix of tokens grows with the prefix, so bisection finds it.
    """
    low, high = 0, len(token_ids)
    while low < high:
        middle = (low + high) // 2
        if len(decode(tokenizer, token_ids[:middle])) >= num_chars:
            high = middle
        else:
            low = middle + 1
    return low


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(f"messages: the model's chat template refuses the roles {roles}: {error}") from error
    return rendered


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _ids_of_text(tokenizer: Tokenizer, text: str, *, control: set[int]) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    found = control.intersection(ids)
    if found:
        raise ValueError(
            f"messages: the tokenizer reads control tokens {tokenizer.convert_ids_to_tokens(sorted(found))} in "
            "a message's text and cannot split them; remove them from the text"
        )
    return ids
