"""System calls for coroutines, over the connection of one agent.

The event loop has one thread, so a reply only has to wake the task that waits. Several calls can share one `ReplyBell`,
for example the choices of one request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from libaios.connection import Connection, Pending, decode_body

ReplyBell = asyncio.Event


class RequestCalls:
    """Open calls of one request. Leaving the `async with` ends calls that are still open, in whatever state: in the
    queue, in the prompt, or in the middle of the text."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.bell = ReplyBell()  # rings at every reply
        self._open: list[Pending] = []

    async def __aenter__(self) -> RequestCalls:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for call in self._open:
            self._connection.abandon(call)

    async def submit(self, sys: int, args: Any, stream: bool = False) -> Pending:
        """Send one more call. Raises OSError."""
        call = self._connection.prepare(sys, args, stream=stream, notify=self.bell.set)
        self._open.append(call)
        while not self._connection.may_send(call):
            await self.rung()
        self._connection.send(call)
        return call

    async def rung(self) -> None:
        """Wait for the next reply to any of the calls."""
        await self.bell.wait()
        self.bell.clear()


async def ask(connection: Connection, sys: int, args: Any, result: Any) -> Any:
    """Make one call and wait for its result. Raises OSError."""
    async with RequestCalls(connection) as calls:
        call = await calls.submit(sys, args)
        while call.final is None:
            await calls.rung()
        return decode_body(call.final, result)


def all_over(calls: Sequence[Pending]) -> bool:
    return all(call.final is not None for call in calls)
