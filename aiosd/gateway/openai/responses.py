"""POST /v1/responses: the newer form of a chat. Input items become messages, and the result becomes output items.
Earlier responses, which `previous_response_id` names, are in `kept`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from aiosd.gateway.calls import ask
from aiosd.gateway.openai import chat as chats
from aiosd.gateway.openai import fields, generation, kept
from aiosd.gateway.openai.chat import arguments, logprobs
from aiosd.gateway.openai.kept import Item
from aiosd.gateway.places import split
from aiosd.gateway.web import HttpRequest, Problem, encode, renaming
from libaios import wire
from libaios.generate import Piece, Result
from libaios.wire import Sys, ToolCall

CUT = ("length", "limit")  # finish reasons after which the answer may be incomplete


class TextOptions(Struct):
    format: dict[str, Any] | None = None
    verbosity: Any = None


class Reasoning(Struct):
    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None


class Responses(Struct, kw_only=True):
    input: str | list[Item] | UnsetType = UNSET
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: Any = None
    tools: list[Item] | None = None
    tool_choice: str | Item | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    seed: int | None = None
    # these change no answer
    user: Any = None
    truncation: Any = None  # nothing is truncated here: a prompt that is too long is an error
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    max_tool_calls: Any = None  # counts tools that a server runs; there are none
    context_management: Any = None
    access_programs: Any = None
    background_options: Any = None  # without `background` they have no effect
    image: Any = None  # there are none
    # these would change it
    background: Any = None
    conversation: Any = None
    moderation: Any = None
    prompt: Any = None


NEUTRAL = {"background": (None, False), "conversation": (None,), "prompt": (None,)}


async def create(request: HttpRequest) -> None:
    asked = await _read(request)
    model = await fields.model_for(request, asked.model)
    items = _items(asked)
    messages, chat = _chat(request, asked, items, model)
    answer = ResponseBuilder(asked, model.name, chat)
    if asked.stream:
        await generation.stream(request, chat.args, ResponseForm(answer))
    else:
        (result,) = await generation.results(request, chat.args)
        answer.take(result)
        await request.reply(answer.shown())
    if asked.store is not False:
        kept.keep(request, answer.id, [*messages, answer.message()], [_shown(item) for item in items], answer.shown())


async def count(request: HttpRequest) -> None:
    """POST /v1/responses/input_tokens: how long the prompt of such a response would be. Nothing is computed."""
    asked = await _read(request)
    model = await fields.model_for(request, asked.model)
    _, chat = _chat(request, asked, _items(asked), model)
    args = wire.Tokenize("", model.name, call=chat.args[0])
    ids = await ask(request.account.connection, Sys.TOKENIZE, args, list[int])
    await request.reply({"object": "response.input_tokens", "input_tokens": len(ids)})


# ── the request ───────────────────────────────────────────────────────────────────────────────────────────


async def _read(request: HttpRequest) -> Responses:
    asked = fields.read(request, await request.json(), Responses)
    for name, allowed in NEUTRAL.items():
        if getattr(asked, name) not in allowed:
            raise Problem(400, f"{name}: this server cannot do that", param=name, code="unsupported_parameter")
    return asked


def _chat(
    request: HttpRequest, asked: Responses, items: list[Item], model: wire.ModelInfo
) -> tuple[list[Item], fields.ChatGeneration]:
    """The messages without the instructions, and the call."""
    conversation = _conversation(request, asked, items)
    request.names = lambda place: _name(conversation, asked, place)
    with renaming(request.names):
        return conversation.messages, fields.chat(_as_chat(asked, conversation.messages), model)


def _as_chat(asked: Responses, messages: list[Item]) -> fields.ChatRequest:
    for i, tool in enumerate(asked.tools or []):
        if tool.get("type") != "function":
            message = f"tools[{i}].type: only functions, not {tool.get('type')!r:.60}"
            raise Problem(400, message, param=f"tools[{i}].type", code="unsupported_parameter")
    wants = "message.output_text.logprobs" in (asked.include or []) or bool(asked.top_logprobs)
    instructions = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    return fields.ChatRequest(
        messages=[*instructions, *messages],
        max_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        logprobs=wants,
        top_logprobs=asked.top_logprobs,
        seed=asked.seed,
        stream=asked.stream,
        tools=asked.tools,
        tool_choice=asked.tool_choice,
        parallel_tool_calls=asked.parallel_tool_calls,
        response_format=asked.text.format if asked.text is not None else None,
        reasoning_effort=asked.reasoning.effort if asked.reasoning is not None else None,
    )


def _items(asked: Responses) -> list[Item]:
    """The items of this request; after an earlier response there may be none."""
    if isinstance(asked.input, UnsetType) or asked.input == []:
        if asked.previous_response_id is None:
            raise Problem(400, "input: it is missing, and there is no previous_response_id", param="input")
        return []
    return [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else asked.input


def _shown(item: Item) -> Item:
    """The item as a later listing shows it."""
    kind = item.get("type", "message")
    prefix = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}.get(kind, "item")
    shown: Item = {"id": new_id(prefix), "type": kind, "status": "completed", **item}
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        shown["content"] = [{"type": part, "text": item["content"]}]
    return shown


def _conversation(request: HttpRequest, asked: Responses, items: list[Item]) -> ItemMessages:
    """The conversation without the instructions, which belong to one call only."""
    before = asked.previous_response_id
    conversation = ItemMessages(kept.messages_of(request, before) if before is not None else [])
    for i, item in enumerate(items):
        conversation.add(item, "input" if isinstance(asked.input, str) else f"input[{i}]")
    return conversation


class ItemMessages:
    """Messages made of items. `places` and `calls`: the item from which a message, or a tool call of it, was made."""

    def __init__(self, messages: list[Item]) -> None:
        self.messages = messages
        self.places = ["previous_response_id"] * len(messages)
        self.calls: dict[tuple[int, int], str] = {}

    def add(self, item: Item, where: str) -> None:
        """Put an item at its end."""
        match item.get("type", "message"):
            case "message":
                self._message(item.get("role"), _content(item.get("content"), where), where)
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
                call = {"id": str(item.get("call_id", "")), "type": "function", "function": function}
                self._call(call, where)
            case "function_call_output":
                output = _content(item.get("output"), where)
                self._append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": output}, where)
            case "reasoning":
                parts = item.get("content") or item.get("summary") or []
                text = "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
                self._append({"role": "assistant", "content": "", "reasoning": text}, where)
            case other:
                raise Problem(400, f"{where}.type: {other!r:.60} is not supported", param=f"{where}.type")

    def _append(self, message: Item, where: str) -> None:
        self.messages.append(message)
        self.places.append(where)

    def _message(self, role: Any, content: Any, where: str) -> None:
        """Add a message; an assistant's message is joined with the reasoning before it."""
        last = self.messages[-1] if self.messages else {}
        if role == "assistant" == last.get("role") and not last["content"] and "tool_calls" not in last:
            last["content"] = content
            self.places[-1] = where
        else:
            self._append({"role": role, "content": content}, where)

    def _call(self, call: Item, where: str) -> None:
        """Add a tool call to the assistant's message before it."""
        if not self.messages or self.messages[-1].get("role") != "assistant":
            self._append({"role": "assistant", "content": ""}, where)
        calls = self.messages[-1].setdefault("tool_calls", [])
        self.calls[len(self.messages) - 1, len(calls)] = where
        calls.append(call)


# ── its names ─────────────────────────────────────────────────────────────────────────────────────────────

_NAMES = {
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "schema": "text.format.schema",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "template_args": "reasoning.effort",
    "logprobs": "include",
}
_MESSAGE = re.compile(r"\[(\d+)\](?:\.tool_calls\[(\d+)\])?(.*)\Z", re.DOTALL)


def _name(conversation: ItemMessages, asked: Responses, place: str) -> str:
    root, rest = split(place)
    if root != "messages":
        return _NAMES.get(root, root) + (rest if root not in _NAMES else "")
    match = _MESSAGE.match(rest)
    if match is None:
        return "input"
    number = int(match[1]) - bool(asked.instructions)
    if not 0 <= number < len(conversation.places):
        return "instructions" if number < 0 else "input"
    where = conversation.places[number]
    if match[2] is not None:
        where = conversation.calls.get((number, int(match[2])), where)
    if where in ("input", "previous_response_id"):
        return where
    output = conversation.messages[number]["role"] == "tool"
    return where + (".output" if output and match[3] == ".content" else match[3])


_TEXTS = ("input_text", "output_text", "text", "refusal")


def _content(content: Any, where: str) -> Any:
    """The content with the names that parts have in a chat. The kernel refuses parts that are no text."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in _TEXTS:
            parts.append({"type": "text", "text": str(part.get("text", part.get("refusal", "")))})
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            raise Problem(400, f"{where}.content: {kind!r:.60} is not supported, only text", param=f"{where}.content")
    return parts


# ── the reply ─────────────────────────────────────────────────────────────────────────────────────────────


def new_id(kind: str) -> str:
    """A new id in the form of this API."""
    return chats.new_id(kind).replace("-", "_")


class ResponseBuilder:
    """A response as it grows."""

    def __init__(self, asked: Responses, model: str, chat: fields.ChatGeneration) -> None:
        self.id = new_id("resp")
        self.chat = chat
        self.items: list[Item] = []
        self.status = "in_progress"
        self.usage: wire.Usage | None = None
        self.model = model
        self._asked = asked
        self._created = int(time.time())

    def take(self, result: Result) -> None:
        """Take the whole result at once."""
        self.model = result.model or self.model  # of a route, the model that answered
        if result.reasoning:
            self.items.append(reasoning_item(result.reasoning))
        mine = [call for call in result.tool_calls if call.name != self.chat.answer_tool]
        answers = [arguments(call) for call in result.tool_calls if call.name == self.chat.answer_tool]
        text = result.text + "".join(answers)
        if text or not mine:
            self.items.append(message_item(text, result.logprobs))
        self.items += [call_item(call) for call in mine]
        self.finish(result.finish_reason, result.usage)

    def finish(self, reason: str, usage: wire.Usage) -> None:
        self.status = "incomplete" if reason in CUT else "completed"
        if self.items:
            self.items[-1]["status"] = self.status
        self.usage = usage

    def message(self) -> Item:
        """The answer as a message, for continuing the conversation."""
        message: Item = {"role": "assistant", "content": ""}
        for item in self.items:
            if item["type"] == "message":
                message["content"] += item["content"][0]["text"]
            elif item["type"] == "reasoning":
                message["reasoning"] = item["content"][0]["text"]
            else:
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                message.setdefault("tool_calls", []).append(call)
        return message

    def shown(self) -> dict[str, Any]:
        asked, used = self._asked, self.usage
        text = asked.text.format if asked.text is not None and asked.text.format is not None else {"type": "text"}
        effort = asked.reasoning.effort if asked.reasoning is not None else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": self.status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.model,
            "output": self.items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": effort, "summary": None},
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": {"format": text},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None if used is None else _usage(used),
            "user": None,
            "metadata": asked.metadata or {},
        }


def _usage(used: wire.Usage) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.prompt_tokens + used.completion_tokens,
    }


def message_item(text: str, chances: wire.Logprobs | None = None) -> Item:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs(chances or [])}
    return {"type": "message", "id": new_id("msg"), "status": "completed", "role": "assistant", "content": [part]}


def reasoning_item(text: str) -> Item:
    parts = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": new_id("rs"), "summary": [], "content": parts, "status": "completed"}


def call_item(call: ToolCall) -> Item:
    return _call_item(call.id, call.name, arguments(call))


def _call_item(ident: str, name: str, text: str) -> Item:
    return {
        "type": "function_call",
        "id": new_id("fc"),
        "call_id": ident,
        "name": name,
        "arguments": text,
        "status": "completed",
    }


# ── in parts ──────────────────────────────────────────────────────────────────────────────────────────────


NAMES = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}


class OpenItem:
    """The item that is being written: its kind, its content so far, and the events around its text."""

    def __init__(self, key: str | int, item: Item) -> None:
        self.key = key  # "message", "reasoning", or the number of a call
        self.item = item
        self.text = ""
        self.chances: wire.Logprobs = []

    @property
    def name(self) -> str:
        return NAMES[self.item["type"]]


class ResponseForm:
    """The events of a streamed response, in the order that OpenAI documents: each item is added, gets its text, and is
    done before the next one is added."""

    kind, comment = generation.EVENTS, generation.COMMENT

    def __init__(self, answer: ResponseBuilder) -> None:
        self._answer = answer
        self._number = 0
        self._open: OpenItem | None = None
        self._seen: set[int] = set()  # calls that have been written piece by piece
        self._answers: set[int] = set()

    def begin(self, model: str) -> bytes:
        self._answer.model = model or self._answer.model
        shown = self._answer.shown()
        return self._event("response.created", response=shown) + self._event("response.in_progress", response=shown)

    def piece(self, index: int, piece: Piece) -> bytes:
        return b"".join(self._events(piece))

    def end(self, usages: Any) -> bytes:
        return self._event(f"response.{self._answer.status}", response=self._answer.shown())

    def _events(self, piece: Piece) -> Iterator[bytes]:
        if piece.reasoning:
            yield from self._write("reasoning", reasoning_item(""), piece.reasoning)
        if piece.text:
            yield from self._write("message", message_item(""), piece.text, piece.logprobs)
        for part in piece.calls:
            yield from self._call(part.index, part.id, part.name, part.arguments)
        if piece.finish_reason is None or piece.usage is None:
            return
        for i, call in enumerate(piece.tool_calls):
            if i not in self._seen:
                yield from self._call(i, call.id, call.name, arguments(call))
        if self._open is None and not self._answer.items:
            yield from self._write("message", message_item(""), "")
        yield from self._close("incomplete" if piece.finish_reason in CUT else "completed")
        self._answer.finish(piece.finish_reason, piece.usage)

    def _call(self, index: int, ident: str | None, name: str | None, text: str) -> Iterator[bytes]:
        if name is not None:
            self._seen.add(index)
            if name == self._answer.chat.answer_tool:
                self._answers.add(index)
        if index in self._answers:
            yield from self._write("message", message_item(""), text)
        else:
            yield from self._write(index, _call_item(ident or "", name or "", ""), text)

    def _write(self, key: str | int, item: Item, text: str, chances: wire.Logprobs | None = None) -> Iterator[bytes]:
        """Add to the open item, or open this one."""
        if self._open is None or self._open.key != key:
            yield from self._close()
            self._open = OpenItem(key, item)
            yield from self._added(self._open)
        one = self._open
        one.text += text
        one.chances += chances or []
        if text:
            extra = {"logprobs": logprobs(chances or [])} if one.name == "output_text" else {}
            yield self._event(f"response.{one.name}.delta", **self._place(one), delta=text, **extra)

    def _added(self, one: OpenItem) -> Iterator[bytes]:
        bare = {**one.item, "status": "in_progress"}
        if "content" in bare:
            bare["content"] = []
        yield self._event("response.output_item.added", output_index=self._index, item=bare)
        if "content" in one.item:
            yield self._event("response.content_part.added", **self._place(one), part=one.item["content"][0])

    def _close(self, status: str = "completed") -> Iterator[bytes]:
        one, self._open = self._open, None
        if one is None:
            return
        one.item["status"] = status
        place, item = self._place(one), one.item
        if "content" in item:
            part = item["content"][0] = {**item["content"][0], "text": one.text}
            extra = {}
            if one.name == "output_text":
                part["logprobs"] = extra["logprobs"] = logprobs(one.chances)
            yield self._event(f"response.{one.name}.done", **place, text=one.text, **extra)
            yield self._event("response.content_part.done", **place, part=part)
        else:
            item["arguments"] = one.text
            yield self._event(f"response.{one.name}.done", **place, name=item["name"], arguments=one.text)
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self._answer.items.append(item)

    @property
    def _index(self) -> int:
        return len(self._answer.items)

    def _place(self, one: OpenItem) -> dict[str, Any]:
        place = {"item_id": one.item["id"], "output_index": self._index}
        return place | {"content_index": 0} if "content" in one.item else place

    def _event(self, kind: str, **values: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(event))
