"""The calls from the engine to a policy, and what a policy may know when it answers.

The engine reports every call to a policy: `arrive` when it can begin to wait, `leave` when it cannot go on any more:
finished, cancelled, or **parked**. (A parked call arrives again when it may go on; otherwise the counters of an agent
that was stopped for an hour would entitle it to an hour's service at once.) `charge` and `charge_prompt` count what the
model did for each call. Then, in every step, the engine calls:

    evict   which running calls give up their slot to waiting ones       ┐ only while calls wait
    admit   which waiting calls take the slots that are free now         ┘
    order   in which order prompts are computed
    select  which of those that are ready get their next token in this step

Promises that all policies keep, so that the engine can rely on them:

- A call gives up its slot only for another that `admit` chooses next, with the same `now`; never for nothing.
- A change of calls costs time (a state is saved, another restored: 5 ms for some hundred tokens of a small model), so
  it must be paid for: either the victim has run for a quantum (`Quantum.of`: longer where states are large), or the
  call it makes room for has just arrived and is the more urgent one.
- Every step gets on: `select` of a list that is not empty returns one that is not empty; `order` may leave prompts
  out for the sake of one that decodes, but never twice without a `select` between.
- What is kept about agents is bounded: an agent without calls is forgotten in the end.

All times come through `now`, in seconds on any steady clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

#: The cost of a prompt token, in generated ones. A prompt is computed in wide batches, limited by arithmetic and not by
#: memory: 2,000 tokens/s on the machine where 60 sequences decode at 800, and one at 200.
PROMPT_WEIGHT = 1 / 8


@dataclass(frozen=True, slots=True)
class Quantum:
    """How long a call keeps its slot while another waits: until the first of the two limits."""

    tokens: int = 64
    seconds: float = 10.0

    def of(self, call: Entry) -> Quantum:
        """The quantum of this call: longer where its state is large (`Entry.least_turn`), but never more than LONGER
        quanta, so that other calls do not wait too long."""
        least = call.least_turn
        if least is ANY_TURN:
            return self
        tokens, seconds = min(least.tokens, LONGER * self.tokens), min(least.seconds, LONGER * self.seconds)
        return Quantum(max(self.tokens, tokens), max(self.seconds, seconds))


#: How many quanta the turn of a call with a large state may last.
LONGER = 8

#: The least turn of a call whose state is small.
ANY_TURN = Quantum(0, 0.0)


class Entry(Protocol):
    """What a policy may know of a call. One call is always the same object."""

    @property
    def peer(self) -> int: ...  # the agent that made the call
    @property
    def nice(self) -> int: ...  # of the agent, -20 to 19
    @property
    def group(self) -> str: ...  # privilege group of the agent
    @property
    def order(self) -> int: ...  # arrival number, unique
    @property
    def arrived(self) -> float: ...  # clock at arrival
    @property
    def num_generated(self) -> int: ...
    @property
    def num_pending(self) -> int: ...  # prompt tokens that are not in the cache yet
    @property
    def least_turn(self) -> Quantum: ...  # how long it should keep its slot, because moving its state takes time


E = TypeVar("E", bound=Entry)


class SchedulingPolicy(Protocol):
    """See the head of the file. Calls in the lists are in no particular order."""

    name: str

    def arrive(self, call: Entry, now: float) -> None:
        """A call came, or a parked one may go on. Its agent may be new, or was idle before."""
        ...

    def leave(self, call: Entry, now: float) -> None:
        """The call is finished, cancelled or parked. A call that is not known is ignored."""
        ...

    def renice(self, call: Entry, now: float) -> None:
        """The nice value of this call's agent has changed."""
        ...

    def charge(self, calls: Sequence[Entry], tokens: int, now: float) -> None:
        """Each of `calls` got `tokens` tokens in the step just done."""
        ...

    def charge_prompt(self, call: Entry, tokens: int, now: float) -> None:
        """`tokens` tokens of its prompt were computed for this call."""
        ...

    def evict(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        """Those of `running` that give up their slot; they wait again, and keep their tokens."""
        ...

    def admit(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        """Those of `waiting` that take a slot now, at most `free`, the most urgent first."""
        ...

    def order(self, pending: Sequence[E], now: float) -> list[E]:
        """`pending` (calls whose prompt is not in place) in the order in which they are computed."""
        ...

    def select(self, decoding: list[E], now: float) -> list[E]:
        """Those of `decoding` (calls whose prompt is in place) that get a token in this step, in the same order.
        The same list object when all do."""
        ...


class BasePolicy:
    """Methods that most policies share. They decode all calls that are ready: the larger the batch, the more tokens per
    second, and if a ready call had to wait for a later batch, the others would gain little."""

    def arrive(self, call: Entry, now: float) -> None:
        pass

    def leave(self, call: Entry, now: float) -> None:
        pass

    def renice(self, call: Entry, now: float) -> None:
        pass

    def charge(self, calls: Sequence[Entry], tokens: int, now: float) -> None:
        pass

    def charge_prompt(self, call: Entry, tokens: int, now: float) -> None:
        pass

    def select(self, decoding: list[E], now: float) -> list[E]:
        return decoding


class SlotTurns:
    """Since when, and since which of its tokens, each call has had its slot."""

    def __init__(self, quantum: Quantum) -> None:
        self._quantum = quantum
        self._began: dict[int, tuple[int, float]] = {}

    def begin(self, call: Entry, now: float) -> None:
        self._began[call.order] = (call.num_generated, now)

    def end(self, call: Entry) -> None:
        self._began.pop(call.order, None)

    def is_over(self, call: Entry, now: float, times: int = 1) -> bool:
        """Has it run for a quantum (or `times` quanta)? The turn of a call that got its slot under another policy
        begins with the first call of this method."""
        tokens, seconds = self._began.setdefault(call.order, (call.num_generated, now))
        quantum = self._quantum.of(call)
        return call.num_generated - tokens >= quantum.tokens * times or now - seconds >= quantum.seconds * times
