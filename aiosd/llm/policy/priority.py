"""Calls in the order of nice values; a call becomes more urgent while it waits.

The *urgency* of a call is a number on the scale of nice values: the lower, the more urgent.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiosd.llm.policy.contract import BasePolicy, E, Entry, Quantum, SlotTurns

#: Seconds in which a call that waits becomes more urgent by one step of nice: the least urgent agent overtakes the
#: most urgent one after 80 s.
AGEING_S = 2.0


class Priority(BasePolicy):
    """Promise: the most urgent call gets the slot; at once, if the call that has it is less urgent by a step. A call
    that waits gains one step of nice per AGEING_S, so a call of nice n is overtaken only by calls of nice m < n that
    began to wait less than (n - m) × AGEING_S after it: its wait is bounded, whatever the others do. What it has gained
    it keeps until it has run for a quantum, also if it must wait again before. Of equals the first to come goes first;
    and a call that has run for a quantum gives way to an equal one that has waited for AGEING_S."""

    name = "priority"

    def __init__(self, quantum: Quantum) -> None:
        self._turns = SlotTurns(quantum)
        self._since: dict[int, float] = {}  # call → when it began to wait
        self._gained: dict[int, float] = {}  # running call → seconds waited, which count in its first quantum

    def arrive(self, call: Entry, now: float) -> None:
        self._since.setdefault(call.order, now)

    def leave(self, call: Entry, now: float) -> None:
        self._since.pop(call.order, None)
        self._gained.pop(call.order, None)
        self._turns.end(call)

    def _waits(self, call: Entry, now: float) -> tuple[float, int]:
        """The urgency of a waiting call."""
        return call.nice - (now - self._since[call.order]) / AGEING_S, call.order

    def _runs(self, call: Entry, now: float) -> tuple[float, int]:
        """The urgency of a running call."""
        if self._turns.is_over(call, now):
            self._gained.pop(call.order, None)
        return call.nice - self._gained.get(call.order, 0.0) / AGEING_S, call.order

    def evict(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        if len(waiting) <= free or not running:
            return []
        least_urgent = sorted(((*self._runs(call, now), call) for call in running), reverse=True, key=lambda x: x[:2])
        most_urgent = sorted(self._waits(call, now) for call in waiting)[free:]
        victims: list[E] = []
        for (urgency, _), (running_urgency, _, victim) in zip(most_urgent, least_urgent, strict=False):
            if urgency + 1 > running_urgency:
                break
            victims.append(victim)
        for victim in victims:
            self._since[victim.order] = now - self._gained.pop(victim.order, 0.0)
        return victims

    def admit(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        if free <= 0:
            return []
        admitted = sorted(waiting, key=lambda call: self._waits(call, now))[:free]
        for call in admitted:
            self._gained[call.order] = now - self._since[call.order]
            self._turns.begin(call, now)
        return admitted

    def order(self, pending: Sequence[E], now: float) -> list[E]:
        return sorted(pending, key=lambda call: self._runs(call, now))
