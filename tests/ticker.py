"""A coroutine that detects whether its event loop is blocked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

PAUSE_S = 0.5  # no loop may be blocked for longer
UNKNOWN_PAUSE_S = 5.0  # the same, where Linux does not report how long a thread waited for a processor


class Ticker:
    """A coroutine that ticks in the background. `turn` waits for some of its ticks; the loop must not have been blocked
    between any two. Time in which one of our threads waited for a processor does not count."""

    def __init__(self) -> None:
        self.ticks = 0
        self.longest = 0.0
        self._task = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        last, waited = time.monotonic(), _waited()
        while True:
            await asyncio.sleep(0.01)
            now, wait = time.monotonic(), _waited()
            ready_s = sum(max(0, ns - waited.get(thread, 0)) for thread, ns in wait.items()) / 1e9
            self.longest = max(self.longest, now - last - ready_s)
            last, waited = now, wait
            self.ticks += 1

    async def turn(self, ticks: int = 40) -> None:
        until = self.ticks + ticks
        while self.ticks < until:
            await asyncio.sleep(0.01)
        assert self.longest < (PAUSE_S if _waited() else UNKNOWN_PAUSE_S)

    def stop(self) -> None:
        self._task.cancel()


def _waited() -> dict[str, int]:
    """How many nanoseconds each of our threads has waited for a processor. Empty if this is unknown."""
    found = {}
    for folder in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended, or Linux does not report it
            found[folder.name] = int((folder / "schedstat").read_text().split()[1])
    return found
