"""From generations to a reply: whole, or in parts as they come.

A `Form` defines how the parts look; this file decides when they are sent. The head of a stream is sent with its first
part, so an error before that still has an HTTP status of its own. While nothing comes (the agent is parked, or waits in
the queue), a comment every few seconds keeps the program from giving up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from aiosd.gateway.calls import RequestCalls, all_over
from aiosd.gateway.web import COMMENT_S, Counters, HttpRequest, Left
from libaios import wire
from libaios.connection import Pending, decode_body
from libaios.generate import Piece, Pieces, Result
from libaios.wire import Sys

EVENTS = b"text/event-stream; charset=utf-8"
COMMENT = b": waiting\n\n"


class Form(Protocol):
    """How the parts of a stream are written. `comment`: bytes that readers skip; b"": the form has no comments."""

    @property
    def kind(self) -> bytes:
        """Its content type."""

    @property
    def comment(self) -> bytes: ...

    def begin(self, model: str) -> bytes:
        """The bytes before all parts. `model`: the model that answers (of a route it is known only now); "": as
        requested."""

    def piece(self, index: int, piece: Piece) -> bytes:
        """A piece of the choice with this number; the last piece of a choice has its `finish_reason`."""

    def end(self, usages: Sequence[wire.Usage]) -> bytes:
        """The bytes after all parts, with the usage of each choice."""


def total(usages: Sequence[wire.Usage], per_prompt: int = 0) -> wire.Usage:
    """The usage of all choices together. A prompt counts once for its `per_prompt` choices (0: all have one prompt)."""
    firsts = usages[:: per_prompt or len(usages)]
    return wire.Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
        cached_tokens=sum(usage.cached_tokens for usage in firsts),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )


async def results(request: HttpRequest, args: Sequence[wire.Generate]) -> list[Result]:
    """Generate all of these and return the results. Raises OSError, Left."""
    async with RequestCalls(request.account.connection) as calls:
        pending = [await calls.submit(Sys.GENERATE, one) for one in args]
        async with Leaving(request, calls.bell.set) as leaving:
            while not all_over(pending):
                await calls.rung()
                leaving.check()
        found = [Result(_body(call)) for call in pending]
        _count(request, [result.usage for result in found])
        return found


async def stream(request: HttpRequest, args: Sequence[wire.Generate], form: Form) -> None:
    """Generate all of these, and send each piece as it comes. Raises OSError, Left."""
    async with RequestCalls(request.account.connection) as calls, _counted(request.app.counters):
        pending = [await calls.submit(Sys.GENERATE, one, stream=True) for one in args]
        begun = False
        readers = [ChoiceStream(index, call) for index, call in enumerate(pending)]
        async with Leaving(request, calls.bell.set) as leaving, Comments(calls.bell.set) as comments:
            while not all(reader.usage is not None for reader in readers):
                await calls.rung()
                leaving.check()
                pieces = [(reader.index, piece) for reader in readers for piece in reader.pieces()]
                front = b""
                if pieces and not begun:
                    front, begun = form.begin(next((piece.model for _, piece in pieces if piece.model), "")), True
                parts = front + b"".join([form.piece(index, piece) for index, piece in pieces])
                if parts:
                    await request.stream(parts, form.kind)
                    comments.sent()
                elif comments.due and form.comment:
                    await request.stream(form.comment, form.kind)
                    comments.sent()
        usages = [reader.usage for reader in readers if reader.usage is not None]
        _count(request, usages)
        await request.stream(form.end(usages), form.kind, last=True)


class ChoiceStream:
    """One choice of a stream. `usage` is set when it is over."""

    def __init__(self, index: int, call: Pending) -> None:
        self.usage: wire.Usage | None = None
        self.index, self._call = index, call
        self._pieces = Pieces()

    def pieces(self) -> list[Piece]:
        """The pieces that have come since the last call. Raises OSError."""
        call, come = self._call, []
        if call.pieces:
            come.append(self._pieces.piece(_joined(call.pieces)))
            call.pieces.clear()
        if call.final is not None and self.usage is None:
            last = self._pieces.piece(_body(call))
            come.append(last)
            self.usage = last.usage
        return come


@asynccontextmanager
async def _counted(counters: Counters) -> AsyncIterator[None]:
    """Counts a stream while it is open."""
    counters.streams += 1
    try:
        yield
    finally:
        counters.streams -= 1


def _joined(pieces: Sequence[wire.Piece]) -> wire.Piece:
    """Several pieces as one."""
    if len(pieces) == 1:
        return pieces[0]
    chances = [one for piece in pieces for one in piece.logprobs or ()]
    tokens = [token for piece in pieces for token in piece.tokens]
    model = next((piece.model for piece in pieces if piece.model), "")  # the first piece of a stream names it
    return wire.Piece("".join([piece.text for piece in pieces]), tokens, chances or None, model)


def _body(call: Pending) -> wire.Generated:
    assert call.final is not None
    generated: wire.Generated = decode_body(call.final, wire.Generated)
    return generated


def _count(request: HttpRequest, usages: Sequence[wire.Usage]) -> None:
    request.app.counters.prompt_tokens += sum(usage.prompt_tokens for usage in usages)
    request.app.counters.completion_tokens += sum(usage.completion_tokens for usage in usages)


class Leaving:
    """Rings the bell when the program has closed the connection."""

    def __init__(self, request: HttpRequest, ring: Callable[[], None]) -> None:
        self._request, self._ring = request, ring
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> Leaving:
        self._task = asyncio.create_task(self._request.left())
        self._task.add_done_callback(lambda task: self._ring())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._task.cancel()

    def check(self) -> None:
        if self._task.done():
            raise Left


class Comments:
    """Rings the bell when a stream has been silent for too long."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self.due = False
        self._ring = ring
        self._sent = False  # something was sent since the last check
        self._timer: asyncio.TimerHandle

    async def __aenter__(self) -> Comments:
        self._wait()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._timer.cancel()

    def sent(self) -> None:
        self._sent, self.due = True, False

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(COMMENT_S, self._look)

    def _look(self) -> None:
        if not self._sent:
            self.due = True
            self._ring()
        self._sent = False
        self._wait()
