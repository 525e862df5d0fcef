"""Callbacks at a time, for a single-threaded loop: a heap of deadlines on the monotonic clock.

The loop sleeps at most `until_next()` seconds and then calls `run_due()`. Cancelled timers stay in the heap
until they come up, so cancelling costs nothing.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable


class Timer:
    """One pending callback; `cancel()` may be called at any time, also after it ran."""

    __slots__ = ("callback", "deadline")

    def __init__(self, deadline: float, callback: Callable[[], None]) -> None:
        self.deadline = deadline
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Timers:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()  # timers of equal deadline run in the order in which they were set

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        return self.at(self.clock() + seconds, callback)

    def at(self, deadline: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(deadline, callback)
        heapq.heappush(self._heap, (deadline, next(self._order), timer))
        return timer

    def until_next(self) -> float | None:
        """Seconds to the next live timer (0 when it is due), None without one."""
        while self._heap and self._heap[0][2].callback is None:
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - self.clock()) if self._heap else None

    def run_due(self) -> None:
        now = self.clock()
        while self._heap and self._heap[0][0] <= now:
            timer = heapq.heappop(self._heap)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
