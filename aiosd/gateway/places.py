"""Which field of a request an error is about: `param`, in the form of OpenAI's API (`messages[1].content`).

The kernel and its models name a place with the names of their own arguments, at the beginning of the sentence:
`tools[0].parameters must be …`, `schema: …`. Each API has other names for some of them, so each handler provides its
own translation (`HttpRequest.names`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from libaios import wire

#: Translates a place from the kernel's names to the API's.
PlaceNames = Callable[[str], str]

_ROOTS = {
    name
    for args in (wire.Generate, wire.Sampling, wire.Embed, wire.Rerank, wire.Tokenize, wire.Detokenize)
    for name in args.__struct_fields__
} | {"n"}
_PLACE = re.compile(r"(([a-z_]+)(?:\[\d+\]|\.[A-Za-z_]+)*)(?: has no (name|content)\b|(?=[:, ]))")
_STEP = re.compile(r"([a-z_]+)(.*)", re.DOTALL)


def found(message: str) -> str | None:
    """The place with which a sentence from the kernel begins."""
    match = _PLACE.match(message)
    if match is None or match[2] not in _ROOTS:
        return None
    return f"{match[1]}.{match[3]}" if match[3] else match[1]


def renamed(message: str, place: str, new: str) -> str:
    """The sentence with the API's name for the place."""
    if place == new:
        return message
    for old in (place, place.rpartition(".")[0]):  # `tools[0] has no name` is about tools[0].name
        if old and message.startswith(old):
            return (new if old == place else new.rpartition(".")[0] or new) + message[len(old) :]
    return message


def same(place: str) -> str:
    return place


def by_root(roots: Mapping[str, str]) -> PlaceNames:
    """A translation for APIs in which only the argument itself has another name."""

    def names(place: str) -> str:
        root, rest = split(place)
        return roots.get(root, root) + rest

    return names


def split(place: str) -> tuple[str, str]:
    """The argument and the rest: `messages`, `[1].content`."""
    match = _STEP.match(place)
    return (match[1], match[2]) if match is not None else (place, "")


def of_error(text: str) -> tuple[str, str]:
    """Split msgspec's message about a JSON value: the place ("" is the whole value), and what is wrong."""
    text, _, rest = text.partition(" - at `$")
    place = rest.removesuffix("`").replace("[...]", "").lstrip(".")
    missing = re.search(r"required field `(\w+)`", text)
    if missing is not None:
        return f"{place}.{missing[1]}".lstrip("."), "it is missing"
    return place, f"{text[:1].lower()}{text[1:]}"


# ── the parts of a chat ───────────────────────────────────────────────────────────────────────────────────

_OF_FUNCTION = re.compile(r"\[(\d+)\](\.(?:name|description|parameters|strict|arguments)\b.*)?\Z", re.DOTALL)


def in_function(rest: str, calls: Any) -> str:
    """`[0].parameters` is `[0].function.parameters` where the item is written like that. `calls`: the items."""
    match = _OF_FUNCTION.match(rest)
    if match is None or not match[2]:
        return rest
    item = calls[int(match[1])] if isinstance(calls, list) and int(match[1]) < len(calls) else None
    flat = isinstance(item, dict) and "function" not in item and ("name" in item or "parameters" in item)
    return rest if flat else f"[{match[1]}].function{match[2]}"
