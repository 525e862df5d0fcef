"""Bounds on processor time, on a machine that may be slow or used by others.

The processor time of the same code varies: it is longer if another hardware thread uses the same core, if a host takes
the processor away, or if Python collects garbage at that moment. So if a piece of work took too long, it is compared
with work of known cost on the same machine, and tried again. A fault of the code shows each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: Processor time of `_known_work` on the machine where the bounds of the tests were set.
KNOWN_S = 0.025
TRIES = 3


def cheap(seconds: float, act: Callable[[], object]) -> None:
    """Run `act`, which may take this processor time on the machine where the bounds were set. It is run again if it
    took more."""
    found = []
    for _ in range(TRIES):
        spent = _cost(act)
        if spent < seconds:
            return
        allowed = seconds * max(1.0, _cost(_known_work) / KNOWN_S)
        if spent < allowed:
            return
        found.append(f"{spent:.3f} of {allowed:.3f} s")
    raise AssertionError(f"it costs too much each time: {', '.join(found)}")


def _cost(act: Callable[[], object]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


def _known_work() -> None:
    table: dict[int, str] = {}
    for number in range(100_000):
        table[number % 1000] = str(number)
