"""Round robin: every agent has its turn.

Calls stand in one queue. Who has had its turn and is wanted elsewhere goes to the end of it. Turns go round the
*agents*: of those that wait, one whose agent holds fewer slots comes first, so that an agent with ten calls open does
not get ten turns in a round, as long as there are agents enough to fill the slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from aiosd.llm.policy.contract import Base, E, Entry, Quantum, Turns


class RoundRobin(Base):
    """Promise: while agents have one call each, they get their turns in an order that repeats: between two turns of
    a call, everyone who waited all the time has one. A turn lasts a quantum, and longer only while nobody is there
    who would get the slot. With n calls on k slots the longest wait is that for ceil(n/k) turns."""

    name = "rr"

    def __init__(self, quantum: Quantum) -> None:
        self._turns = Turns(quantum)
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
        over = [call for call in running if self._turns.is_over(call, now)]
        if not over:
            return []
        held = Counter(call.peer for call in running)
        victims: list[E] = []
        for number, call in enumerate(self._queue(waiting, held, free + len(over))):
            victim = self._victim(call, over, held) if number >= free else None
            if victim is not None:
                over.remove(victim)
                held[victim.peer] -= 1
                victims.append(victim)
            elif number >= free:
                continue
            held[call.peer] += 1
        for victim in victims:
            self._places[victim.order] = next(self._end)
        return victims

    def _victim(self, call: E, over: list[E], held: Counter[int]) -> E | None:
        """Who makes room for `call`: one whose turn is over, of an agent that will still hold as many slots as the
        agent of `call`, or of that agent itself; the one whose turn began first."""
        fits = [v for v in over if v.peer == call.peer or held[v.peer] > held[call.peer]]
        return min(fits, key=lambda v: (-held[v.peer], self._places[v.order]), default=None)

    def admit(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        if free <= 0:
            return []
        admitted = self._queue(waiting, Counter(call.peer for call in running), free)
        for call in admitted:
            self._turns.begin(call, now)
        return admitted

    def _queue(self, waiting: Sequence[E], held: Counter[int], most: int) -> list[E]:
        """The first of `waiting`: by the slots that their agents hold, with those they got just now, then by place."""
        held = Counter(held)
        heap = [(held[call.peer], self._places[call.order], number) for number, call in enumerate(waiting)]
        heapify(heap)
        queue: list[E] = []
        while heap and len(queue) < most:
            slots, place, number = heappop(heap)
            call = waiting[number]
            if slots < held[call.peer]:  # its agent has got one since
                heappush(heap, (held[call.peer], place, number))
                continue
            held[call.peer] += 1
            queue.append(call)
        return queue

    def order(self, pending: Sequence[E], now: float) -> list[E]:
        return sorted(pending, key=lambda call: self._places[call.order])
