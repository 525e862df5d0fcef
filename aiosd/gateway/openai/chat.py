"""POST /v1/chat/completions."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from aiosd import __version__
from aiosd.gateway.openai import fields, generation, named
from aiosd.gateway.web import HttpRequest, encode
from libaios import wire
from libaios.generate import CallPiece, Piece, Result
from libaios.wire import ToolCall

FINGERPRINT = f"aiosd-{__version__}"
FINISH = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "limit": "length"}
DONE = b"data: [DONE]\n\n"


def new_id(kind: str) -> str:
    return f"{kind}-{os.urandom(12).hex()}"


async def complete(request: HttpRequest) -> None:
    asked_for = fields.read(request, await request.json(), fields.ChatRequest)
    request.names = named.of_chat(asked_for)
    model = await fields.model_for(request, asked_for.model)
    asked = fields.chat(asked_for, model)
    head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model.name}
    if asked_for.stream:
        form = ChatForm(head, asked, fields.wants_usage(asked_for))
        await generation.stream(request, asked.args, form)
        return
    fields.wants_usage(asked_for)
    found = await generation.results(request, asked.args)
    await request.reply(
        {
            **head,
            "model": found[0].model or model.name,  # of a route, the model that answered
            "object": "chat.completion",
            "system_fingerprint": FINGERPRINT,
            "choices": [_choice(i, result, asked) for i, result in enumerate(found)],
            "usage": usage(generation.total([result.usage for result in found])),
        }
    )


def usage(used: wire.Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
    }


def _choice(index: int, result: Result, asked: fields.ChatGeneration) -> dict[str, Any]:
    calls = [call for call in result.tool_calls if call.name != asked.answer_tool]
    answers = [arguments(call) for call in result.tool_calls if call.name == asked.answer_tool]
    text = result.text + "".join(answers)
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if result.reasoning:
        message["reasoning_content"] = result.reasoning
    if calls and asked.functions:
        message["function_call"] = {"name": calls[0].name, "arguments": arguments(calls[0])}
    elif calls:
        message["tool_calls"] = [tool_call(call) for call in calls]
    return {
        "index": index,
        "message": message,
        "logprobs": None if result.logprobs is None else {"content": logprobs(result.logprobs), "refusal": None},
        "finish_reason": finish_reason(result.finish_reason, bool(calls), asked),
    }


def finish_reason(reason: str, calls: bool, asked: fields.ChatGeneration) -> str:
    if reason != "tool_calls":
        return FINISH.get(reason, "stop")
    if not calls:
        return "stop"  # only the tool that gives the answer was called
    return "function_call" if asked.functions else "tool_calls"


def arguments(call: ToolCall) -> str:
    return encode(call.arguments).decode()


def tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments(call)}}


def logprobs(found: wire.Logprobs) -> list[dict[str, Any]]:
    return [
        {**_logprob(one), "top_logprobs": [_logprob(other) for other in one.top]} for one in found if one is not None
    ]


def _logprob(one: wire.Logprob | wire.Alternative) -> dict[str, Any]:
    return {"token": one.piece.decode("utf-8", "replace"), "logprob": one.logprob, "bytes": list(one.piece)}


class ChatForm:
    """Parts of a streamed chat. Nearly every part is a text with the same bytes before and after it."""

    kind, comment = generation.EVENTS, generation.COMMENT

    def __init__(self, head: dict[str, Any], asked: fields.ChatGeneration, with_usage: bool) -> None:
        self._head = {**head, "object": "chat.completion.chunk", "system_fingerprint": FINGERPRINT}
        self._front = b""
        self._back = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self._with_usage = with_usage
        self._asked = asked
        self._calls = [Written(asked) for _ in asked.args]

    def begin(self, model: str) -> bytes:
        head = {**self._head, "model": model or self._head["model"]}
        self._front = b"data: " + encode(head)[:-1] + b',"choices":['
        first = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._delta(index, encode(first)) for index in range(len(self._calls)))

    def piece(self, index: int, piece: Piece) -> bytes:
        made = []
        if piece.reasoning:
            made.append(self._delta(index, b'{"reasoning_content":' + encode(piece.reasoning) + b"}"))
        if piece.text or piece.logprobs:
            chances = b"null"
            if piece.logprobs:
                chances = encode({"content": logprobs(piece.logprobs), "refusal": None})
            made.append(self._delta(index, b'{"content":' + encode(piece.text) + b"}", chances))
        calls = self._calls[index]
        made += [self._delta(index, encode(delta)) for delta in calls.deltas(piece.calls)]
        if piece.finish_reason is not None:
            made += [self._delta(index, encode(delta)) for delta in calls.rest(piece.tool_calls)]
            reason = finish_reason(piece.finish_reason, calls.any, self._asked)
            made.append(self._delta(index, b"{}", reason=encode(reason)))
        return b"".join(made)

    def _delta(self, index: int, delta: bytes, chances: bytes = b"null", reason: bytes = b"null") -> bytes:
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._front, index, delta, chances, reason, self._back,
        )  # fmt: skip

    def end(self, usages: Sequence[wire.Usage]) -> bytes:
        if not self._with_usage:
            return DONE
        return self._front + b'],"usage":' + encode(usage(generation.total(usages))) + b"}\n\n" + DONE


class Written:
    """The tool calls of one streamed choice: id and name once, then the arguments in pieces. If the model writes calls
    in a form that cannot be parsed piece by piece, each call comes whole at the end."""

    def __init__(self, asked: fields.ChatGeneration) -> None:
        self.any = False  # a call of one of the program's own tools
        self._asked = asked
        self._seen: set[int] = set()
        self._answers: set[int] = set()  # numbers of calls that are the answer
        self._numbers: dict[int, int] = {}  # the new numbers of the other calls

    def deltas(self, pieces: Sequence[CallPiece]) -> list[dict[str, Any]]:
        return [self._delta(piece.index, piece.id, piece.name, piece.arguments) for piece in pieces]

    def rest(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        return [
            self._delta(i, call.id, call.name, arguments(call)) for i, call in enumerate(calls) if i not in self._seen
        ]

    def _delta(self, index: int, id_: str | None, name: str | None, text: str) -> dict[str, Any]:
        if name is not None:
            self._seen.add(index)
            if name == self._asked.answer_tool:
                self._answers.add(index)
            else:
                self.any = True
                self._numbers[index] = len(self._numbers)
        if index in self._answers:
            return {"content": text}
        function = {"arguments": text} if name is None else {"name": name, "arguments": text}
        if self._asked.functions:
            return {"function_call": function}
        call: dict[str, Any] = {"index": self._numbers.get(index, index), "function": function}
        return {"tool_calls": [call if name is None else {**call, "id": id_, "type": "function"}]}
