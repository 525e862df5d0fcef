"""The fields of chats and completions from which the kernel's arguments were made, for errors (see `places`)."""

from __future__ import annotations

import re
from typing import Any

from msgspec import UNSET, Struct

from aiosd.gateway.openai import fields
from aiosd.gateway.places import PlaceNames, in_function, split

#: For each argument of a kernel call, the fields that it may come from.
SOURCES = {
    "prompt": ("prompt", "messages"),
    "max_tokens": ("max_completion_tokens", "max_tokens", "n_predict"),
    "repeat_penalty": ("repeat_penalty", "repetition_penalty"),
    "stop_tokens": ("stop_token_ids",),
    "grammar": ("grammar", "guided_grammar"),
    "schema": ("response_format", "json_schema", "guided_json"),
    "dry_breakers": ("dry_sequence_breakers",),
    "tools": ("tools", "functions"),
    "tool_choice": ("tool_choice", "function_call"),
    "template_args": ("chat_template_kwargs", "reasoning_effort"),
    "texts": ("input",),
    "text": ("prompt", "content"),
}
_CALLS = re.compile(r"\[(\d+)\]\.tool_calls(.*)\Z", re.DOTALL)
_ITEM = re.compile(r"\[(\d+)\](.*)\Z", re.DOTALL)


def source(asked: Struct, argument: str) -> str:
    """The field of this request that the argument came from."""
    there = [name for name in SOURCES.get(argument, (argument,)) if name in asked.__struct_fields__]
    given = [name for name in there if getattr(asked, name) is not None and getattr(asked, name) is not UNSET]
    return next(iter(given or there), argument)


def of(asked: Struct) -> PlaceNames:
    """The names of a request's fields."""

    def names(place: str) -> str:
        root, rest = split(place)
        field = source(asked, root)
        # One text although a list is possible; pairs, which have numbers in the kernel's arguments only.
        whole = field == "logit_bias" or isinstance(getattr(asked, field, None), str)
        return field if whole else field + rest

    return names


def of_chat(asked: fields.ChatRequest) -> PlaceNames:
    plain = of(asked)

    def names(place: str) -> str:
        root, rest = split(place)
        if root == "tools" and rest:
            return _tool(asked, rest)
        if root == "messages" and rest and isinstance(asked.messages, list):
            return "messages" + _message(asked.messages, rest)
        return plain(place)

    return names


def _tool(asked: fields.ChatRequest, rest: str) -> str:
    match = _ITEM.match(rest)
    order = fields.order_of_tools(asked)
    if match is None or int(match[1]) >= len(order):
        return "response_format"  # the tool that is the answer
    rest = f"[{order[int(match[1])]}]{match[2]}"
    return f"functions{rest}" if asked.functions is not None else f"tools{in_function(rest, asked.tools)}"


def _message(messages: list[dict[str, Any]], rest: str) -> str:
    """The rest of a place after `messages`."""
    match = _CALLS.match(rest)
    if match is None or int(match[1]) >= len(messages):
        return rest
    message, calls = messages[int(match[1])], match[2]
    if not message.get("tool_calls") and "function_call" in message:
        return f"[{match[1]}].function_call{calls.removeprefix('[0]')}"
    return f"[{match[1]}].tool_calls{in_function(calls, message.get('tool_calls'))}"
