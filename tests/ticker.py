"""A coroutine that shows whether its event loop stands still."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

PAUSE_S = 0.5  # longer than this no loop may stand still
UNKNOWN_PAUSE_S = 5.0  # … where Linux does not tell how long a thread had to wait for a processor


class Ticker:
    """A coroutine that does something else meanwhile. `turn` waits for some of its ticks; the loop must not have
    stood still between any two. That no processor was free for one of our threads is not the loop's fault, and does not
    count."""

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
    """For how many nanoseconds each of our threads was ready to run, and did not. Empty where that is unknown."""
    found = {}
    for folder in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended, or Linux does not say
            found[folder.name] = int((folder / "schedstat").read_text().split()[1])
    return found
