"""Owns how a config names the nodes that a role may be on: "label=value". Imports no Ray."""

from __future__ import annotations

from cluster.config import shown


def checked_labels(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return labels as they are.

    Raises:
        ValueError: one is no "label=value", or a label stands twice.
    """
    for label in labels:
        name, sign, value = label.partition("=")
        if not (name and sign and value):
            raise ValueError(f'got {shown(label)}, wanted "label=value"')
    names = [label.partition("=")[0] for label in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'got {twice[0]} twice, wanted each label once; several values are "{twice[0]}=in(a,b)"')
    return labels


def label_selector(labels: tuple[str, ...]) -> dict[str, str]:
    """Return labels as Ray wants them.

    >>> label_selector(("ray.io/node-group=critic", "zone=in(a,b)"))
    {'ray.io/node-group': 'critic', 'zone': 'in(a,b)'}
    """
    return {name: value for name, _, value in (label.partition("=") for label in labels)}


def selects(wanted: str, value: str | None) -> bool:
    """Whether a node whose label has a value, or None, is one of those that are wanted; Ray's own operators.

    >>> [selects(wanted, "b") for wanted in ("b", "!b", "in(a,b)", "!in(a,b)")]
    [True, False, True, False]
    >>> selects("b", None), selects("!b", None)
    (False, True)
    """
    plain = wanted.removeprefix("!")
    values = plain[3:-1].split(",") if plain.startswith("in(") and plain.endswith(")") else [plain]
    return (value in values) != wanted.startswith("!")
