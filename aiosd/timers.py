"""Callbacks at a time, for a single-threaded loop: a heap of deadlines on the monotonic clock.

The loop sleeps at most `until_next()` seconds and then calls `run_due()`. Cancelled timers stay in the heap until they
are due or are half of it. So cancelling costs almost nothing, and a million calls with a time limit of a day that are
answered at once leave nothing behind.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from typing import Protocol

FEW = 64  # this number of cancelled timers is never removed early


class Cancellable(Protocol):
    """Something under way that may be called off."""

    def cancel(self) -> None: ...


class Timer:
    """One pending callback; `cancel()` may be called at any time, also after it ran."""

    __slots__ = ("_timers", "callback", "deadline")

    def __init__(self, timers: Timers, deadline: float, callback: Callable[[], None]) -> None:
        self._timers = timers
        self.deadline = deadline
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._timers.note_cancelled()


class Timers:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._heap: list[tuple[float, int, Timer]] = []
        self._cancelled = 0  # an upper limit of those in the heap
        self._order = itertools.count()  # timers of equal deadline run in the order in which they were set

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        return self.at(self.clock() + seconds, callback)

    def at(self, deadline: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self, deadline, callback)
        heapq.heappush(self._heap, (deadline, next(self._order), timer))
        return timer

    def __len__(self) -> int:
        """Timers in the heap, cancelled ones included."""
        return len(self._heap)

    def note_cancelled(self) -> None:
        self._cancelled += 1
        if self._cancelled > max(FEW, len(self._heap) // 2):
            self._heap = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

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
