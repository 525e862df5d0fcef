"""A coroutine that shows whether its event loop stands still."""

from __future__ import annotations

import asyncio
import time

PAUSE_S = 0.2  # longer than this no loop may stand still


class Ticker:
    """A coroutine that does something else meanwhile. `turn` waits for some of its ticks; the loop must not have
    stood still between any two."""

    def __init__(self) -> None:
        self.ticks = 0
        self.longest = 0.0
        self._task = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now
            self.ticks += 1

    async def turn(self, ticks: int = 40) -> None:
        until = self.ticks + ticks
        while self.ticks < until:
            await asyncio.sleep(0.01)
        assert self.longest < PAUSE_S

    def stop(self) -> None:
        self._task.cancel()
