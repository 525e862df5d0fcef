"""Conversations whose state stays with the model between calls, can be forked, and saved under a name.

    ctx = aios.llm.context([{"role": "system", "content": "…"}])
    r = ctx.chat("What is 37 * 91?")            # appends the question and the answer
    twins = [ctx.fork() for _ in range(64)]     # independent from now on; what they share is computed once
    ctx.save("research")                        # survives a restart of aiosd
    ctx = aios.llm.restore("research")

A context is its messages. The state that the model has computed for them lies in the model's cache, in memory or on
disk, and is found again by the tokens. If that state is lost, because the model's process died for instance, only time
is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from libaios import wire
from libaios.generate import Piece, Result, Stream, generate, generate_args, objects
from libaios.plan import Plan, run, syscall
from libaios.wire import SavedContext, Sys

__all__ = ["Context", "Conversation", "SavedContext", "forget", "restored", "saved"]


class Conversation:
    """Messages, and the options that each call has (tools, model, LoRA adapter)."""

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]] = (),
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        model: str | None = None,
        lora: str | None = None,
    ) -> None:
        self.messages = objects(messages, "messages")
        self.tools = None if tools is None else objects(tools, "tools")
        self.model = model
        self.lora = lora

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.messages)} messages>"

    def __len__(self) -> int:
        return len(self.messages)

    def _with(self, more: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages and the new ones behind them. `_keep` stores them when the answer is here."""
        new = [{"role": "user", "content": more}] if isinstance(more, str) else objects(more, "messages")
        return [*self.messages, *new]

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"tools": self.tools, "model": self.model, "lora": self.lora, **options}

    def _keep(
        self, messages: list[dict[str, Any]], text: str, calls: Sequence[wire.ToolCall], reasoning: str = ""
    ) -> None:
        answer: dict[str, Any] = {"role": "assistant", "content": text}
        if reasoning:  # the model's template decides which of it the model sees again
            answer["reasoning"] = reasoning
        if calls:
            answer["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        self.messages = [*messages, answer]

    def _save(self, name: str) -> Plan[SavedContext]:
        return Plan(Sys.CTX_SAVE, wire.SaveContext(name, self.messages, self.tools, self.model, self.lora))

    def _close(self) -> Plan[None]:
        return Plan(Sys.CTX_CLOSE, wire.CloseContext(self.messages, self.tools, self.model, self.lora))


class Context(Conversation):
    """A conversation in plain calls; see the top of this module. Only one thread at a time may use it."""

    def chat(self, more: str | Sequence[Mapping[str, Any]] = (), **options: Any) -> Result | Stream:
        """Add messages and get the answer; both are part of the context from then on. `more` is the text of a user's
        message, or a list of messages (results of tools, for instance). Options as for `llm.chat`. The answer of a
        stream is added when the stream has been read to its end. When the call fails the context does not change."""
        messages = self._with(more)
        n = options.pop("n", 1)
        result: Result | Stream = generate(generate_args(messages, None, **self._options(options)), n)
        if isinstance(result, Stream):
            return _KeptStream(result, lambda *answer: self._keep(messages, *answer))
        self._keep(messages, result.text, result.tool_calls, result.reasoning)
        return result

    def fork(self) -> Context:
        """Another context with the same messages. It costs nothing until it is used, and then a copy of the state, not
        a prefill."""
        return Context(self.messages, tools=self.tools, model=self.model, lora=self.lora)

    def save(self, name: str) -> SavedContext:
        """Keep it on disk under a name. The agent's group has its own names; a context with the same name is replaced.
        Raises OSError: ENOSPC when the disk is full (the older context is still there then), EINVAL for a name that is
        not allowed."""
        return run(self._save(name))

    def close(self) -> None:
        """Let the model drop what it keeps for this context alone. The messages stay, so it can be used again, for some
        time of computing."""
        if self.messages:
            run(self._close())

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _KeptStream(Stream):
    """A stream that calls `keep` with its whole text when it ends."""

    def __init__(self, stream: Stream, keep: Any) -> None:
        self._connection, self._call = stream._connection, stream._call
        self._pieces = _keeping(stream, keep)


def _keeping(stream: Stream, keep: Any) -> Iterator[Piece]:
    text = reasoning = ""
    for piece in stream:
        text, reasoning = text + piece.text, reasoning + piece.reasoning
        if piece.finish_reason is not None:
            keep(text, piece.tool_calls, reasoning)
        yield piece


def restored(name: str, model: str | None = None) -> Plan[wire.RestoredContext]:
    return Plan(Sys.CTX_RESTORE, wire.NamedContext(name, model))


@syscall
def saved(model: str | None = None) -> Plan[list[SavedContext]]:
    """The saved contexts of the caller's group: name, tokens, bytes, created (Unix time)."""
    return Plan(Sys.CTX_LIST, wire.ListContexts(model))


@syscall
def forget(name: str, model: str | None = None) -> Plan[bool]:
    """Remove a saved context. False: there was none."""
    return Plan(Sys.CTX_REMOVE, wire.NamedContext(name, model))
