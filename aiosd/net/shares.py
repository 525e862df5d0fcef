"""Divides the proxy's processor time among agents: the time used since the last sample, in proportion to the work that
was done for each agent meanwhile. Measuring the time of each step would cost more than the step.

A connection or a refusal counts as `CONNECTION` reads; a read counts as one, and one more for each `PIECE` bytes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

CONNECTION = 16
PIECE = 1 << 14
LOOK_S = 0.1

#: Calls a function after a time in seconds.
After = Callable[[float, Callable[[], None]], object]


class Shares:
    """The division. `charge` is called with agents and microseconds. `used`: processor seconds of this process."""

    def __init__(
        self, after: After, charge: Callable[[int, int], None], used: Callable[[], float] = time.process_time
    ) -> None:
        self._after = after
        self._charge = charge
        self._used = used
        self._work: Counter[int] = Counter()  # by agent, since the last sample
        self._since = 0.0

    def connected(self, pid: int) -> None:
        self._note(pid, CONNECTION)

    def read(self, pid: int, count: int) -> None:
        self._note(pid, 1 + count // PIECE)

    def _note(self, pid: int, work: int) -> None:
        if not self._work:  # time that was used while no agent was served is charged to none
            self._since = self._used()
            self._after(LOOK_S, self._look)
        self._work[pid] += work

    def _look(self) -> None:
        spent = self._used() - self._since
        work, self._work = self._work, Counter()
        for pid, part in work.items():
            self._charge(pid, round(spent * 1e6 * part / work.total()))
