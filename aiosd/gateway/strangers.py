"""Connections of which it is not known yet whose they are.

A silent one has little time, and where there are many the oldest make room: so silent connections, however many, keep
no agent out. One whose request is being looked at keeps its place, and so does one that has just come: a crowd of
agents that all connect at once loses none.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

SILENT = 128  # that may stay for longer than YOUNG_S,
YOUNG_S = 1.0
SILENT_S = 20.0  # … and for how long
MOST = 2048  # with those whose requests are looked at


class Connected(Protocol):
    def abort(self) -> None: ...


class Strangers:
    def __init__(self) -> None:
        self._silent: dict[Connected, tuple[float, asyncio.TimerHandle]] = {}  # since when; oldest first
        self._asking: dict[Connected, None] = {}

    def add(self, one: Connected) -> None:
        """It has connected, or its request was shown to be no agent's."""
        self.forget(one)
        loop = asyncio.get_running_loop()
        now = loop.time()
        if len(self) >= MOST:
            self._end(next(iter(self._silent or self._asking)))
        while len(self._silent) >= SILENT:
            oldest, (since, _) = next(iter(self._silent.items()))
            if now - since < YOUNG_S:
                break
            self._end(oldest)
        self._silent[one] = now, loop.call_later(SILENT_S, one.abort)

    def asks(self, one: Connected) -> None:
        """A request of it is looked at: that ends by itself."""
        if one in self._silent:
            self.forget(one)
            self._asking[one] = None

    def answered(self, one: Connected) -> None:
        """… and was refused."""
        if one in self._asking:
            self.add(one)

    def forget(self, one: Connected) -> None:
        """It is known, or gone."""
        self._asking.pop(one, None)
        _, timer = self._silent.pop(one, (0.0, None))
        if timer is not None:
            timer.cancel()

    def _end(self, one: Connected) -> None:
        self.forget(one)
        one.abort()

    def __len__(self) -> int:
        return len(self._silent) + len(self._asking)
