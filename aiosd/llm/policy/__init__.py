"""Which calls run next: pure decisions over records and a clock; no tensors, no llama.cpp, no I/O.

`contract.py` defines the calls from the engine, and what a policy may know. There is one file for each policy, with its
promise at the top; tests check the promises.

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
    """A new policy of that name. `shares`: the shares of groups, each as a number of agents of nice 0 (only `fair` uses
    groups). Raises ValueError for a name that is not in NAMES."""
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
