"""How an event loop reads a connection on which pieces of streams come fast: several at a time instead of each at
once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio


class Pace(Protocol):
    def wait_s(self) -> float:
        """How many seconds pieces may wait in the connection. Pieces that come less often than that are handed out at
        once."""

    def later(self, look: Callable[[], None]) -> None:
        """Have `look` called after about `wait_s` seconds."""


class PacedReader:
    """Reads one connection for an event loop. The loop polls the descriptor until something comes less than `wait_s`
    after the last time; from then on the pace decides when to look, until a look finds nothing or a call ends. So
    pieces that come fast cost neither an event nor a change of the set of polled descriptors. `pump` hands out what has
    come, and returns whether there was something; `num_open`: the number of calls that have no final reply."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        pace: Pace,
        pump: Callable[[], bool],
        num_open: Callable[[], int],
    ) -> None:
        self._loop, self._fd, self._pace = loop, fd, pace
        self._pump, self._num_open = pump, num_open
        self._last = 0.0  # when something came last
        self.closed = False  # the connection has ended
        loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        before, now = self._num_open(), self._loop.time()
        self._pump()
        fast = now - self._last <= self._pace.wait_s() and self._num_open() >= before
        self._last = now
        if fast and not self.closed:
            self._loop.remove_reader(self._fd)
            self._pace.later(self._look)

    def _look(self) -> None:
        if self.closed:
            return
        before = self._num_open()
        if self._pump():
            self._last = self._loop.time()
            if self._num_open() >= before and not self.closed:
                self._pace.later(self._look)
                return
        if not self.closed:
            self._loop.add_reader(self._fd, self._readable)
