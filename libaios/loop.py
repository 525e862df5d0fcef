"""The loop of an agent with tools: call the model, make its tool calls, add their results, until it answers.

`steps` is the loop itself, and makes no call: it yields each call that is to be made, and its driver sends the result
back into it. The drivers are `libaios.llm.run` and `libaios.aio.llm.run`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from libaios import wire
from libaios.generate import Result, objects
from libaios.tool import result_text
from libaios.wire import ToolCall

__all__ = ["Finished", "Think", "local", "observation", "steps"]

#: Errors of a call that concern the agent and not the tool: they end the loop.
FATAL = frozenset((errno.ECANCELED, errno.EDQUOT, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE, errno.ESHUTDOWN))


class Finished:
    """What `run` returns. `text`: the answer; `messages`: the whole conversation, with every call and its result;
    `calls`: the number of calls that were made; `usage`: of all turns together. `finish_reason`: that of the last
    answer, or "steps": the model still wanted to make calls after `max_steps` turns."""

    __slots__ = ("calls", "finish_reason", "messages", "text", "usage")

    def __init__(self, messages: list[dict[str, Any]], results: Sequence[Result], finish_reason: str) -> None:
        self.messages = messages
        self.text = results[-1].text
        self.calls = sum(message["role"] == "tool" for message in messages)
        self.finish_reason = finish_reason
        usages = [result.usage for result in results]
        names = (
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
            "queue_s",
            "prefill_s",
            "decode_s",
            "preemptions",
            "reasoning_tokens",
        )
        sums: dict[str, Any] = {name: sum(getattr(usage, name) for usage in usages) for name in names}
        self.usage = wire.Usage(**sums, context_left=usages[-1].context_left)

    def __repr__(self) -> str:
        return f"Finished({self.text!r}, finish_reason={self.finish_reason!r}, calls={self.calls})"


class Think(Struct, frozen=True):
    """Call the model; the driver sends back the `Result`."""

    messages: list[dict[str, Any]]


def steps(messages: Sequence[Mapping[str, Any]], max_steps: int) -> Generator[Think | ToolCall, Any, Finished]:
    """Yields what is to be done: a `Think`, or a `ToolCall`, whose result the driver sends back as a text."""
    if max_steps < 1:
        raise wire.error(errno.EINVAL, "max_steps: at least 1")
    conversation = objects(messages, "messages")
    results: list[Result] = []
    for _ in range(max_steps):
        result: Result = yield Think(list(conversation))
        results.append(result)
        conversation.append(_as_message(result))
        if not result.tool_calls:
            return Finished(conversation, results, result.finish_reason)
        for call in result.tool_calls:
            text = yield call
            conversation.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text})
    return Finished(conversation, results, "steps")


def local(functions: Mapping[str, Callable[..., Any]], call: ToolCall) -> str:
    """Call a function of the agent itself."""
    try:
        return result_text(functions[call.name](**call.arguments))
    except Exception as err:  # the model gets the error of the function, and decides what to do
        return f"error: {type(err).__name__}: {err}"


def observation(err: OSError) -> str:
    """The text that the model gets for a call that failed. Raises the error again if it concerns the agent itself."""
    if err.errno in FATAL:
        raise err
    return f"error: {err.strerror or err}"


def _as_message(result: Result) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": result.text}
    if result.reasoning:
        message["reasoning"] = result.reasoning
    if result.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in result.tool_calls
        ]
    return message
