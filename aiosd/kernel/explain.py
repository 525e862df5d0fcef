"""Turns the error of a failed decoding into a sentence that names the argument as callers know it.

msgspec names a place by positions, `$[5][1]`, because arguments travel as arrays; callers know names.
"""

from __future__ import annotations

import re
import typing

import msgspec

from libaios import wire

#: Patterns and lengths in msgspec's messages, and their meaning in plain words.
PLAIN = {
    f"Expected `str` matching regex {wire.NAME_PATTERN!r}": "no blanks, control characters or '/' are allowed",
    "Expected `str` of length >= 1": "it is empty",
}


def explain(err: msgspec.MsgspecError, args: type[msgspec.Struct]) -> str:
    """The message of a failed decoding after the name of the argument: `top_p: expected …`."""
    message = str(err)
    match = re.search(r" - at `\$((?:\[[^\]]*\]|\.\w+)*)`", message)
    if match is None:
        return message
    text = message[: match.start()]
    for raw, words in PLAIN.items():
        text = text.replace(raw, words)
    text = re.sub(r"Expected `str` of length <= (\d+)", r"at most \1 characters are allowed", text)
    return f"{_name(match[1], args)}: {text[:1].lower()}{text[1:]}"


def _name(path: str, args: type[msgspec.Struct]) -> str:
    """The innermost field on a path, with the rest of the path: `[8][0]` of Sampling is `stop[0]`."""
    kind: type[msgspec.Struct] | None = args
    name, rest = "arguments", ""
    for step in re.findall(r"\[[^\]]*\]|\.\w+", path):
        index = int(step[1:-1]) if step[1:-1].isdigit() else None
        if kind is None or index is None or index >= len(kind.__struct_fields__):
            rest += step
            continue
        name, rest = kind.__struct_fields__[index], ""
        kind = _struct_in(typing.get_type_hints(kind)[name])
    return name + rest


def _struct_in(hint: object) -> type[msgspec.Struct] | None:
    """The struct that a field of this type holds, if it holds one directly."""
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            return option
    return None
