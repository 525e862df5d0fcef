"""Round robin: every agent has its turn.

Calls stand in one queue. A call whose turn is over goes to the end of it, and keeps its slot only if its turn comes up
again at once. Turns go round the *agents*: the first calls of all agents come before all second ones, so that an agent
with ten open calls does not get ten turns in a round, as long as there are agents enough to fill the slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count

from aiosd.llm.policy.contract import BasePolicy, E, Entry, Quantum, SlotTurns


class RoundRobin(BasePolicy):
    """Promise: while agents have one call each, they get their turns in an order that repeats: between two turns of
    a call, every other call that waited all the time has one. A turn lasts a quantum, and longer only while no call
    waits that would get the slot. With n calls on k slots the longest wait is that for ceil(n/k) turns."""

    name = "rr"

    def __init__(self, quantum: Quantum) -> None:
        self._turns = SlotTurns(quantum)
        self._places: dict[int, int] = {}  # call → its place in the queue
        self._end = count()

    def arrive(self, call: Entry, now: float) -> None:
        self._places.setdefault(call.order, next(self._end))

    def leave(self, call: Entry, now: float) -> None:
        self._places.pop(call.order, None)
        self._turns.end(call)

    def evict(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        if len(waiting) <= free:
            return []
        over = sorted((call for call in running if self._turns.is_over(call, now)), key=self._place)
        if not over:
            return []
        for call in over:
            self._places[call.order] = next(self._end)
            self._turns.begin(call, now)
        rest = {call.order for call in running} - {call.order for call in over}
        queue = [call for call in self._queue([*waiting, *running]) if call.order not in rest]
        out = {call.order for call in queue[free + len(over) :]}
        return [call for call in over if call.order in out]

    def admit(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        if free <= 0:
            return []
        have = {call.order for call in running}
        admitted = [call for call in self._queue([*waiting, *running]) if call.order not in have][:free]
        for call in admitted:
            self._turns.begin(call, now)
        return admitted

    def _place(self, call: Entry) -> int:
        return self._places[call.order]

    def _queue(self, calls: Sequence[E]) -> list[E]:
        """All first calls of their agents by place, then all second ones, and so on."""
        seen: Counter[int] = Counter()
        rows: list[tuple[int, E]] = []
        for call in sorted(calls, key=self._place):
            rows.append((seen[call.peer], call))
            seen[call.peer] += 1
        rows.sort(key=lambda row: row[0])  # stable: places keep their order within a row
        return [call for _, call in rows]

    def order(self, pending: Sequence[E], now: float) -> list[E]:
        return sorted(pending, key=self._place)
