"""When pieces of streams are passed on: with many streams several pieces at a time, and those of all agents in one
round of the loop. Each part that is sent costs a program, the kernel and this process more time than the token in
it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

STREAM_S, MOST_S = 0.0015, 0.03  # seconds between two parts of a stream: for each open stream, and at most


class Pacer:
    """A `libaios.pace.Pace` for all connections to the kernel. `streams`: how many replies are being sent in parts."""

    def __init__(self, streams: Callable[[], int]) -> None:
        self._streams = streams
        self._looks: list[Callable[[], None]] = []

    def wait_s(self) -> float:
        return min(MOST_S, self._streams() * STREAM_S)

    def later(self, look: Callable[[], None]) -> None:
        if not self._looks:
            asyncio.get_running_loop().call_later(self.wait_s(), self._look)
        self._looks.append(look)

    def _look(self) -> None:
        looks, self._looks = self._looks, []
        for look in looks:
            look()
