"""Long work in short pieces, so that no other caller waits for it: listings of thousands, samples of memory.

A job is a generator. It runs for about `SLICE_S` at a time, one job after the other, between the rounds of the loop;
each `yield` is a place where it may be interrupted. An object that may be gone after a `yield` must be looked up again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

SLICE_S = 0.001


class Jobs:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.waiting: deque[Iterator[None]] = deque()

    def start(self, job: Iterator[None]) -> None:
        """Begin a job now; most jobs are over within their first slice."""
        if self._goes_on(job):
            self.waiting.append(job)

    def run(self) -> None:
        """Run one slice of the job that has waited longest."""
        if self.waiting:
            job = self.waiting.popleft()
            if self._goes_on(job):
                self.waiting.append(job)

    def _goes_on(self, job: Iterator[None]) -> bool:
        until = self._clock() + SLICE_S
        return any(self._clock() >= until for _ in job)
