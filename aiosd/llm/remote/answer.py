"""The chunks of a streamed answer, converted to what a core sends: text with marks between its parts (`libaios.parts`),
tool calls, usage, finish reason. Data from an endpoint is not trusted: `BadAnswer` names the fault.

Only the fields that are named here are read; all else in a chunk is skipped without being built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Raw, Struct

from aiosd.llm.remote import chances
from libaios import parts
from libaios.wire import Logprob, ToolCall, Usage

_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}
MOST_CHARACTERS = 2 << 20
MOST_CALLS = 128
MOST_NAME = 256  # characters of a tool's name, or of a call's id
MOST_CHANCES = 6 << 20  # bytes of log probabilities: they go into one message with the text
MOST_DEPTH = 64  # of the values in arguments: other processes must be able to decode them, too
_UNBUILT = (msgspec.DecodeError, RecursionError)


class BadAnswer(Exception):
    """The endpoint's answer is not valid."""


# ── the fields of a chunk ─────────────────────────────────────────────────────────────────────────────────


class _Function(Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _CallPiece(Struct):
    index: int | None = None
    id: str | int | None = None
    function: _Function | None = None


class _ContentPart(Struct):
    text: str | None = None


class _Message(Struct):
    content: str | list[_ContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_CallPiece] | None = None


class _Choice(Struct):
    delta: _Message | None = None
    message: _Message | None = None  # if the answer does not stream
    text: str | None = None  # of a completion
    logprobs: Raw = Raw()
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: Raw = Raw()
    error: Raw = Raw()


class _Details(Struct):
    cached_tokens: Any = 0
    reasoning_tokens: Any = 0


class _UsageFields(Struct):
    prompt_tokens: Any = 0
    completion_tokens: Any = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


# ── one attempt ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _CallParts:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass
class StreamedAnswer:
    """The result of one attempt so far. `num_top`: how many alternatives to each token were requested; None: no log
    probabilities were, and those that come are ignored."""

    num_top: int | None = None
    text: list[str] = field(default_factory=list)  # pieces, with marks
    usage: Usage | None = None
    reason: str = ""
    length: int = 0  # characters of all of it
    chunks: int = 0  # the number of chunks with content: about as many as tokens
    chances: list[Logprob] = field(default_factory=list)  # of the last event
    num_chances: int = 0
    _size_of_chances: int = 0
    _part: str = parts.TEXT
    _calls: list[_CallParts] = field(default_factory=list)
    _by_index: dict[int | None, _CallParts] = field(default_factory=dict)

    def take(self, data: bytes) -> str:
        """Take one event of the stream; returns the text that it adds. Raises BadAnswer."""
        try:
            chunk = _decode(data)
        except msgspec.ValidationError as error:
            raise BadAnswer(f"a chunk that is none: {error}") from None
        except _UNBUILT:
            raise BadAnswer(f"a chunk that is no JSON: {data[:80]!r}") from None
        if bytes(chunk.error) not in (b"", b"null"):
            raise BadAnswer(f"an error in the stream: {sentence(loosely(chunk.error))}")
        self.usage = _usage(chunk.usage) or self.usage
        self.chances = []
        added = "".join(self._choice(choice) for choice in (chunk.choices or ())[:1])
        if added:
            self.text.append(added)
            self.length += len(added)
        if self.length > MOST_CHARACTERS:
            raise BadAnswer(f"more than {MOST_CHARACTERS} characters")
        return added

    def _choice(self, choice: _Choice) -> str:
        if choice.finish_reason:
            self.reason = _REASONS.get(choice.finish_reason, "stop")
        if self.num_top is not None:
            self._take_chances(choice.logprobs, self.num_top)
        message = choice.delta or choice.message or _Message(content=choice.text)
        thoughts = self._written(parts.REASONING, message.reasoning_content or message.reasoning)
        added = thoughts + self._written(parts.TEXT, _content(message.content))
        calls = message.tool_calls or []
        if added or calls:
            self.chunks += 1
        for place, piece in enumerate(calls):
            self._call(piece, place)
        return added

    def _take_chances(self, given: Raw, num_top: int) -> None:
        try:
            self.chances = chances.of_chunk(given, num_top)
        except ValueError as error:
            raise BadAnswer(str(error)) from None
        self.num_chances += len(self.chances)
        self._size_of_chances += chances.size(self.chances)
        if self._size_of_chances > MOST_CHANCES:
            raise BadAnswer(f"more than {MOST_CHANCES} bytes of log probabilities")

    def _written(self, part: str, text: str | None) -> str:
        if not text:
            return ""
        mark = part if part != self._part else ""
        self._part = part
        return mark + parts.cleaned(text)

    def _call(self, piece: _CallPiece, place: int) -> None:
        """Take a piece of a tool call. Some endpoints give calls no index, or all of them the same one: so a new id or
        a new name begins a call, too."""
        function = piece.function or _Function()
        index = place if piece.index is None else piece.index
        name, id_ = function.name or "", "" if piece.id is None else str(piece.id)
        call = self._by_index.get(index)
        if call is None or (name and call.name and ((id_ and id_ != call.id) or (piece.index is None and not id_))):
            if len(self._calls) >= MOST_CALLS:
                raise BadAnswer(f"more than {MOST_CALLS} tool calls")
            call = self._by_index[index] = _CallParts()
            self._calls.append(call)
        call.id = call.id or id_[:MOST_NAME]
        call.name = call.name or name[:MOST_NAME]
        arguments = function.arguments or ""
        text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        call.arguments.append(text)
        self.length += len(text) + 1

    @property
    def has_calls(self) -> bool:
        return bool(self._calls)

    def calls(self, tools: Mapping[str, dict[str, Any]], default_id: str) -> list[ToolCall]:
        """The tool calls, each checked against its tool. Raises BadAnswer."""
        found = []
        for number, call in enumerate(self._calls):
            if call.name not in tools:
                raise BadAnswer(f"a call of {call.name!r:.80}, which is none of the tools")
            arguments = parsed("".join(call.arguments) or "{}", f"arguments of {call.name}")
            if not isinstance(arguments, dict):
                raise BadAnswer(f"arguments of {call.name} that are no object")
            check(arguments, tools[call.name], f"arguments of {call.name}")
            found.append(ToolCall(call.id or f"{default_id}{number}", call.name, arguments))
        return found

    def spoken(self) -> str:
        """The answer without thoughts."""
        return parts.Splitter().split("".join(self.text))[0]


def _content(content: str | list[_ContentPart] | None) -> str | None:
    if not isinstance(content, list):
        return content
    return "".join(part.text or "" for part in content)


# ── checks ────────────────────────────────────────────────────────────────────────────────────────────────


def parsed(text: str, what: str) -> Any:
    """JSON whose value every process on the way to the agent can carry. Raises BadAnswer."""
    try:
        value = msgspec.json.decode(text)
    except _UNBUILT:
        raise BadAnswer(f"{what} that are no JSON" if what.startswith("arg") else f"{what} that is no JSON") from None
    level = [value]
    for _ in range(MOST_DEPTH):
        if any(isinstance(one, int) and not -(1 << 63) <= one < 1 << 64 for one in level):
            raise BadAnswer(f"{what} with a number of more than 64 bits")
        level = [inner for one in level if isinstance(one, dict | list) for inner in _inside(one)]
        if not level:
            return value
    raise BadAnswer(f"{what} of more than {MOST_DEPTH} levels")


def _inside(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def check(value: Any, schema: dict[str, Any] | bool, what: str) -> None:
    """Check a value. Raises BadAnswer with the place. A schema that cannot be used checks nothing, since the endpoint
    has accepted it. `offline`: an agent's schema must not make this process fetch what its references name."""
    import jsonschema_rs  # only where there is a schema: 15 MB

    try:
        validator = jsonschema_rs.validator_for(schema, offline=True)
    except Exception:  # of any kind: its references, its patterns
        return
    try:
        error = next(iter(validator.iter_errors(value)), None)
    except Exception as found:  # of any kind: an answer that cannot be checked
        raise BadAnswer(f"{what} that cannot be checked: {found!s:.200}") from None
    if error is not None:
        place = "".join(f"[{each!r}]" for each in error.instance_path)
        raise BadAnswer(f"{what}{place}: {error.message:.200}")


def check_text(text: str, schema: dict[str, Any] | bool) -> None:
    """Check an answer that must be JSON of this schema."""
    check(parsed(text, "an answer"), schema, "the answer")


def _usage(given: Raw) -> Usage | None:
    if bytes(given) in (b"", b"null"):
        return None
    try:
        fields = msgspec.json.decode(given, type=_UsageFields)
    except _UNBUILT:
        return None
    prompt, completion = _count(fields.prompt_tokens), _count(fields.completion_tokens)
    cached = _count((fields.prompt_tokens_details or _Details()).cached_tokens)
    thoughts = _count((fields.completion_tokens_details or _Details()).reasoning_tokens)
    return Usage(prompt, min(cached, prompt), completion, reasoning_tokens=min(thoughts, completion))


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 40 else 0


def loosely(data: bytes | Raw) -> Any:
    """The body of an endpoint's error: JSON, or else a text."""
    try:
        return msgspec.json.decode(data)
    except _UNBUILT:
        return bytes(data)[:300].decode(errors="replace")


def sentence(found: Any) -> str:
    """The message in an error of the endpoint."""
    error = found.get("error", found) if isinstance(found, dict) else found
    message = error.get("message", error) if isinstance(error, dict) else error
    return safe_line(str(message) if isinstance(message, str | int | float) else f"{message!r:.300}")


def safe_line(text: str) -> str:
    """The text without control characters: an endpoint must not control logs and terminals."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text[:2000].split()))[:300]
