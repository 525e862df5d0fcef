"""The chunks of a streamed answer, as what a core sends: text with marks between its parts (`libaios.parts`), tool
calls, usage, and why it ended. What an endpoint sends is not trusted: `Wrong` says what does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from libaios import parts
from libaios.wire import ToolCall, Usage

_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}
MOST_CHARACTERS = 2 << 20
MOST_CALLS = 128


class Wrong(Exception):
    """The endpoint's answer is not one."""


@dataclass
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass
class Answer:
    """What has come of one attempt."""

    text: list[str] = field(default_factory=list)  # pieces, with marks
    usage: Usage | None = None
    reason: str = ""
    length: int = 0
    chunks: int = 0  # those with something in them: about as many as there are tokens
    _part: str = parts.TEXT
    _calls: dict[int, _Call] = field(default_factory=dict)

    def take(self, data: bytes) -> str:
        """One event of the stream; the text that it adds. Raises Wrong."""
        try:
            chunk = msgspec.json.decode(data)
        except msgspec.DecodeError:
            raise Wrong(f"a chunk that is no JSON: {data[:80]!r}") from None
        if not isinstance(chunk, dict):
            raise Wrong("a chunk that is no object")
        if chunk.get("error"):
            raise Wrong(f"an error in the stream: {sentence(chunk)}")
        if isinstance(chunk.get("usage"), dict):
            self.usage = _usage(chunk["usage"])
        choices = chunk.get("choices") or []
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise Wrong("choices that are none")
        added = "".join(self._choice(choice) for choice in choices[:1])
        if added:
            self.text.append(added)
            self.length += len(added)
        if self.length > MOST_CHARACTERS:
            raise Wrong(f"more than {MOST_CHARACTERS} characters")
        return added

    def _choice(self, choice: dict[str, Any]) -> str:
        if choice.get("finish_reason"):
            self.reason = _REASONS.get(str(choice["finish_reason"]), "stop")
        delta = choice.get("delta") or choice.get("message")  # the second where it does not stream
        if not isinstance(delta, dict):
            delta = {"content": choice.get("text")}
        thoughts = self._said(parts.REASONING, delta.get("reasoning_content") or delta.get("reasoning"))
        added = thoughts + self._said(parts.TEXT, delta.get("content"))
        calls = delta.get("tool_calls") or []
        if added or calls:
            self.chunks += 1
        for number, call in enumerate(calls if isinstance(calls, list) else []):
            self._call(call, number)
        return added

    def _said(self, part: str, text: object) -> str:
        if not isinstance(text, str) or not text:
            return ""
        mark = part if part != self._part else ""
        self._part = part
        return mark + parts.cleaned(text)

    def _call(self, piece: Any, number: int) -> None:
        if not isinstance(piece, dict) or not isinstance(piece.get("index", number), int):
            raise Wrong("a tool call that is none")
        index, function = piece.get("index", number), piece.get("function") or {}
        if not 0 <= index < MOST_CALLS or not isinstance(function, dict):
            raise Wrong("a tool call that is none")
        call = self._calls.setdefault(index, _Call())
        call.id = call.id or str(piece.get("id") or "")
        call.name = call.name or str(function.get("name") or "")
        call.arguments.append(str(function.get("arguments") or ""))
        self.length += len(call.arguments[-1])

    def calls(self, tools: Mapping[str, dict[str, Any]], default_id: str) -> list[ToolCall]:
        """The tool calls, each checked against its tool. Raises Wrong."""
        found = []
        for index, call in sorted(self._calls.items()):
            if call.name not in tools:
                raise Wrong(f"a call of {call.name!r:.80}, which is none of the tools")
            try:
                arguments = json.loads("".join(call.arguments) or "{}")
            except ValueError:
                raise Wrong(f"arguments of {call.name} that are no JSON") from None
            check(arguments, tools[call.name], f"arguments of {call.name}")
            if not isinstance(arguments, dict):
                raise Wrong(f"arguments of {call.name} that are no object")
            found.append(ToolCall(call.id or f"{default_id}{index}", call.name, arguments))
        return found

    def said(self) -> str:
        """The answer without thoughts."""
        return parts.Splitter().split("".join(self.text))[0]


def check(value: Any, schema: dict[str, Any] | bool, what: str) -> None:
    """Raises Wrong with the place. A schema that cannot be used checks nothing: the endpoint has taken it."""
    import jsonschema_rs  # only where there is a schema: 15 MB

    try:
        validator = jsonschema_rs.validator_for(schema)
    except Exception:  # of any kind: its references, its patterns
        return
    for error in validator.iter_errors(value):
        place = "".join(f"[{each!r}]" for each in error.instance_path)
        raise Wrong(f"{what}{place}: {error.message:.200}")


def check_text(text: str, schema: dict[str, Any] | bool) -> None:
    """An answer that must be JSON of this schema."""
    try:
        value = json.loads(text)
    except ValueError:
        raise Wrong("an answer that is no JSON") from None
    check(value, schema, "the answer")


def _usage(given: dict[str, Any]) -> Usage:
    details = given.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
    prompt = _count(given.get("prompt_tokens"))
    return Usage(prompt, min(cached, prompt), _count(given.get("completion_tokens")))


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value <= 1 << 40 else 0


def sentence(found: Any) -> str:
    """The message in an error of the endpoint."""
    error = found.get("error", found) if isinstance(found, dict) else found
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]
