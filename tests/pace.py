"""What a piece of work may cost, on a machine that may be slow, busy, or someone else's in part.

Processor time is no property of the code alone: a processor that another one shares its core with, or that a host gives
to others meanwhile, takes longer for the same work, and a collection of the garbage of a whole test run counts where it
happens to fall. So what took too long is compared with work of known cost on the same machine, and is tried again: a
fault of the code is there each time."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Processor time of `_known_work` on the machine where the bounds of the tests were set.
KNOWN_S = 0.025
TRIES = 3


def cheap(seconds: float, act: Callable[[], object]) -> None:
    """Do this, which may cost so much processor time on the machine where the bounds were set. It is done again if it
    cost more."""
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
