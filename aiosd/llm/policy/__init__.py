"""Who runs next: pure decisions over records and a clock; no tensors, no llama.cpp, no I/O.

`contract.py` has what the engine asks, and what a policy may know. One file for each policy, with its promise at the
top; the tests hold it to that.

    fifo        in the order of arrival, to the end
    rr          turns of one quantum, round the agents
    priority    by nice value; a call becomes more urgent while it waits
    mlfq        the agent that has had least comes first; in levels, with growing quanta
    fair        shares by nice value and group; an agent that has slept may run ahead (the default)
"""

from __future__ import annotations

from collections.abc import Mapping

from aiosd.llm.policy.contract import PROMPT_WEIGHT, E, Entry, Quantum, SchedulingPolicy
from aiosd.llm.policy.fair import Fair
from aiosd.llm.policy.fifo import Fifo
from aiosd.llm.policy.mlfq import Mlfq
from aiosd.llm.policy.priority import Priority
from aiosd.llm.policy.rr import RoundRobin

__all__ = [
    "NAMES",
    "PROMPT_WEIGHT",
    "E",
    "Entry",
    "Fair",
    "Fifo",
    "Mlfq",
    "Priority",
    "Quantum",
    "RoundRobin",
    "SchedulingPolicy",
    "make",
]

NAMES = (Fifo.name, RoundRobin.name, Priority.name, Mlfq.name, Fair.name)


def make(name: str, quantum: Quantum | None = None, shares: Mapping[str, float] | None = None) -> SchedulingPolicy:
    """The policy of that name, fresh. `shares`: what a group as a whole gets, in agents of nice 0 (`fair` alone
    knows groups). Raises ValueError for a name that is none of NAMES."""
    quantum = quantum or Quantum()
    if name == Fifo.name:
        return Fifo()
    if name == RoundRobin.name:
        return RoundRobin(quantum)
    if name == Priority.name:
        return Priority(quantum)
    if name == Mlfq.name:
        return Mlfq(quantum)
    if name == Fair.name:
        return Fair(quantum, shares)
    raise ValueError(f"{name!r} is none of {', '.join(NAMES)}")
