"""Connections whose agent is not known yet (*strangers*).

A silent connection has little time, and if there are many the oldest are closed: so silent connections, however many,
keep no agent out. A connection whose request is being identified keeps its place, and so does a new one: when many
agents connect at once none of their connections is lost.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

SILENT = 128  # that may stay for longer than YOUNG_S,
YOUNG_S = 1.0
SILENT_S = 20.0  # … and for how long
MOST = 2048  # silent ones and those whose requests are being identified


class Connected(Protocol):
    def abort(self) -> None: ...


class Strangers:
    def __init__(self) -> None:
        self._silent: dict[Connected, tuple[float, asyncio.TimerHandle]] = {}  # since when; oldest first
        self._pending: dict[Connected, None] = {}

    def add(self, one: Connected) -> None:
        """The connection is new, or its request was shown to come from no agent."""
        self.forget(one)
        loop = asyncio.get_running_loop()
        now = loop.time()
        if len(self) >= MOST:
            self._end(next(iter(self._silent or self._pending)))
        while len(self._silent) >= SILENT:
            oldest, (since, _) = next(iter(self._silent.items()))
            if now - since < YOUNG_S:
                break
            self._end(oldest)
        self._silent[one] = now, loop.call_later(SILENT_S, one.abort)

    def identifying(self, one: Connected) -> None:
        """A request of the connection is being identified; that ends by itself."""
        if one in self._silent:
            self.forget(one)
            self._pending[one] = None

    def refused(self, one: Connected) -> None:
        """The request was refused."""
        if one in self._pending:
            self.add(one)

    def forget(self, one: Connected) -> None:
        """The connection's agent is known, or the connection is closed."""
        self._pending.pop(one, None)
        _, timer = self._silent.pop(one, (0.0, None))
        if timer is not None:
            timer.cancel()

    def _end(self, one: Connected) -> None:
        self.forget(one)
        one.abort()

    def __len__(self) -> int:
        return len(self._silent) + len(self._pending)
