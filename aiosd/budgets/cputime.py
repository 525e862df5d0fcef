"""The processor time of some processes (an agent's, a worker's), from samples of those that live.

Linux adds the usage of a process to its parent's account when the parent waits for it. So the time of a process that
lived between two samples is not lost, if its parent waited; time that a sample has shown is never lost. Pure: no clock,
no /proc.

    counted = growth of each process's own time + growth of what their parents were given − what was seen of the ended
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class ProcessSample(NamedTuple):
    """One process in a sample. `process`: identifies it for ever. `waited_s`: of children that it has waited for."""

    process: tuple[int, int]
    own_s: float
    waited_s: float


class CpuMeter:
    """The meter. `counted_s`: the time that an earlier meter has counted for the same processes."""

    def __init__(self, counted_s: float = 0.0) -> None:
        self.total_s = counted_s
        self._first = True
        self._seen: dict[tuple[int, int], ProcessSample] = {}
        self._ended: dict[tuple[int, int], ProcessSample] = {}  # processes of the last sample that have ended since

    def update(self, sample: Iterable[ProcessSample]) -> float:
        """Take a sample; returns the seconds used since the last one."""
        now = {used.process: used for used in sample}
        if self._first:
            self._first = False
            self._seen = now
            return self._count(sum(used.own_s + used.waited_s for used in now.values()) - self.total_s)
        known = self._seen | {key: used for key, used in self._ended.items() if key in now}
        own = waited = 0.0
        for key, used in now.items():
            before = known.get(key)
            own += used.own_s - (before.own_s if before is not None else 0.0)
            waited += used.waited_s - (before.waited_s if before is not None else 0.0)
        ended = {key: used for key, used in self._seen.items() if key not in now}
        # The parent may have been sampled before it waited: then its growth is in the next sample.
        late = {key: used for key, used in self._ended.items() if key not in now}
        credit = sum(used.own_s + used.waited_s for used in (*ended.values(), *late.values()))
        excess = min(waited, credit)
        self._seen, self._ended = now, self._left(ended, late, excess)
        return self._count(own + waited - excess)

    @staticmethod
    def _left(
        ended: dict[tuple[int, int], ProcessSample], late: dict[tuple[int, int], ProcessSample], excess: float
    ) -> dict[tuple[int, int], ProcessSample]:
        """Ended processes whose time no parent has got yet; if it is missing a second time it will not come."""
        for used in late.values():
            excess -= used.own_s + used.waited_s
        left = {}
        for key, used in ended.items():
            seconds = used.own_s + used.waited_s
            if excess < seconds:
                left[key] = used
            excess -= seconds
        return left

    def end(self, seconds: float) -> float:
        """The agent has ended; Linux reports its usage, with the children that it had waited for. Returns the seconds
        that were not counted yet."""
        return self._count(seconds - self.total_s)

    def _count(self, seconds: float) -> float:
        seconds = max(seconds, 0.0)
        self.total_s += seconds
        return seconds
