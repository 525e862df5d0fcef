"""Which call of a tool may begin. Pure: no process, no clock.

A call needs an instance of its tool and its locks: keys that it reads or writes. Readers of a key run together, a
writer runs alone. The promise:

    * All or nothing: a call begins with everything it needs, or holds nothing. So there is no deadlock.
    * Calls of one agent to one tool begin in the order in which they came. The first of them stands in line since it
      came, or since the one before it began, whichever is later.
    * Agents take turns: of those with a call that can begin, the one that has waited longest is first: since its last
      call began, or since this one stands in line.
    * Bounded overtaking: at most OVERTAKES calls that stand in line for less long begin while one waits for something
      that they use. Then everything that this call needs is reserved for it, and it is first. So every call begins,
      provided that running calls end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

OVERTAKES = 16


@dataclass(frozen=True, slots=True)
class Requirements:
    """The locks and the instance that a call uses while it runs. `limit`: how many calls of the tool may run at a
    time."""

    tool: str
    limit: int = 1
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()

    def conflicts(self, other: Requirements) -> bool:
        """Whether one of the two may have to wait for something that the other uses."""
        if self.tool == other.tool and self.limit < 1 << 30:
            return True
        return bool(self.writes & (other.writes | other.reads) or self.reads & other.writes)


@dataclass(slots=True, eq=False)
class _Waiting(Generic[K]):
    key: K
    agent: int
    needs: Requirements
    number: int  # its place in the order of arrival
    since: int = 0  # when it became the first of its agent's calls to this tool
    overtaken: int = 0

    @property
    def line(self) -> tuple[int, str]:
        return self.agent, self.needs.tool


@dataclass(slots=True)
class _Held:
    """Everything that is in use by running calls or reserved for waiting ones."""

    tools: Counter[str] = field(default_factory=Counter)
    readers: Counter[str] = field(default_factory=Counter)
    writers: Counter[str] = field(default_factory=Counter)

    def fits(self, needs: Requirements) -> bool:
        return (
            self.tools[needs.tool] < needs.limit
            and not any(self.readers[key] or self.writers[key] for key in needs.writes)
            and not any(self.writers[key] for key in needs.reads)
        )

    def change(self, needs: Requirements, by: int) -> None:
        for counter, keys in ((self.tools, (needs.tool,)), (self.readers, needs.reads), (self.writers, needs.writes)):
            for key in keys:
                counter[key] += by
                if not counter[key]:
                    del counter[key]

    def copy(self) -> _Held:
        return _Held(Counter(self.tools), Counter(self.readers), Counter(self.writers))


class Admission(Generic[K]):
    """`submit` a call, take the calls that may run now from `begin`, `end` each. `running` is limited by `workers`.
    `K`: the type of the calls' keys."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._waiting: dict[K, _Waiting[K]] = {}  # in order of arrival
        self._lines: dict[tuple[int, str], deque[_Waiting[K]]] = {}  # the same by agent and tool; none is empty
        self._running: dict[K, Requirements] = {}
        self._held = _Held()
        self._turns: dict[int, int] = {}  # when each agent with waiting calls began one last
        self._clock = count(1)  # ticks with each arrival and each beginning

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def position(self, key: K) -> Mapping[str, int] | None:
        """For a waiting call: how many came before it, and how many have overtaken it. None: it does not wait."""
        call = self._waiting.get(key)
        if call is None:
            return None
        before = sum(other.number < call.number for other in self._waiting.values())
        return {"before": before, "overtaken": call.overtaken}

    def submit(self, key: K, agent: int, needs: Requirements) -> None:
        now = next(self._clock)
        call = self._waiting[key] = _Waiting(key, agent, needs, now)
        line = self._lines.setdefault(call.line, deque())
        line.append(call)
        if len(line) == 1:
            call.since = now

    def begin(self) -> list[K]:
        """The calls that begin now, in this order. They hold what they need until `end`."""
        begun: list[K] = []
        while len(self._running) < self.workers:
            call = next(self._able(), None)
            if call is None:
                break
            self._begin(call)
            begun.append(call.key)
        return begun

    def end(self, key: K) -> None:
        """The call is over or cancelled. May be called again."""
        waiting = self._waiting.get(key)
        if waiting is not None:
            line = self._leave(waiting)
            if line and line[0].since == 0:  # it was the first, and the next one takes its place
                line[0].since = max(line[0].number, waiting.since)
        needs = self._running.pop(key, None)
        if needs is not None:
            self._held.change(needs, -1)

    def _able(self) -> Iterator[_Waiting[K]]:
        """The first calls of all lines that can begin, the one whose turn it is first."""
        held = self._held.copy()
        able = []
        for call in sorted((line[0] for line in self._lines.values()), key=lambda call: call.since):
            if held.fits(call.needs):
                able.append(call)
            elif call.overtaken >= OVERTAKES:
                held.change(call.needs, 1)  # reserved for it: no later call takes any of this
        yield from sorted(able, key=lambda call: (call.overtaken < OVERTAKES, self._turn(call), call.number))

    def _turn(self, call: _Waiting[K]) -> int:
        return max(call.since, self._turns.get(call.agent, 0))

    def _begin(self, call: _Waiting[K]) -> None:
        now = next(self._clock)
        behind = self._leave(call)
        if behind:
            behind[0].since = now
        if any(agent == call.agent for agent, _ in self._lines):
            self._turns[call.agent] = now
        for line in self._lines.values():
            if line[0].since < call.since and line[0].needs.conflicts(call.needs):
                line[0].overtaken += 1
        self._running[call.key] = call.needs
        self._held.change(call.needs, 1)

    def _leave(self, call: _Waiting[K]) -> deque[_Waiting[K]]:
        """Remove a waiting call from its line; returns the line."""
        del self._waiting[call.key]
        line = self._lines[call.line]
        line.remove(call)
        if not line:
            del self._lines[call.line]
            if not any(agent == call.agent for agent, _ in self._lines):
                self._turns.pop(call.agent, None)  # its next call stands in line from its own arrival on
        return line
