"""Calls work that is done between calls, a little at a time: when it is due, and when there is a reason."""

from __future__ import annotations

from collections.abc import Callable

from aiosd.timers import Timer, Timers


class Ticker:
    """The timer. `work` does a little work, and returns the seconds until its next call."""

    def __init__(self, timers: Timers, work: Callable[[], float]) -> None:
        self._timers, self._work = timers, work
        self._next: Timer = timers.after(0.0, self.now)

    def now(self) -> None:
        self._next.cancel()
        self._next = self._timers.after(self._work(), self.now)
