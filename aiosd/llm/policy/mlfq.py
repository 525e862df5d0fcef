"""Multi-level feedback queue over the service that agents have had.

An agent, not a single call, is what waits (Autellix): an agent's calls all count together, so an agent that makes a
hundred short calls is placed by the service of all hundred. It begins at level 0 and sinks as it is served; each level
lasts twice as long as the one above, and so do the turns on it. Short agents finish on the upper levels; on the lower
ones calls change slots seldom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from aiosd.llm.policy.contract import PROMPT_WEIGHT, BasePolicy, E, Entry, Quantum, SlotTurns

#: Levels. The last one has no end: with 64 tokens a quantum it begins at 1,984.
LEVELS = 6

#: After this number of seconds all agents begin again at the top.
BOOST_S = 30.0

#: Seconds without a call after which half of an agent's service is forgotten.
HALF_LIFE_S = 10.0


@dataclass(slots=True)
class _MlfqAgent:
    attained: float = 0.0  # tokens, since the last boost
    calls: int = 0  # open
    idle_since: float = 0.0


class Mlfq(BasePolicy):
    """Promise: a slot goes to the agent on the highest level, at once if the agent that has it stands lower; on one
    level calls take turns of a quantum × 2^level. Every BOOST_S all begin at the top again, in the order in which they
    have waited; so a call waits at most BOOST_S, one turn of level 0 for each round of the calls that stand before it,
    and those that come new in that time."""

    name = "mlfq"

    def __init__(self, quantum: Quantum) -> None:
        self._quantum = quantum
        self._turns = SlotTurns(quantum)
        self._agents: dict[int, _MlfqAgent] = {}
        self._places: dict[int, int] = {}  # call → its place among those of its level
        self._end = count()
        self._boosted: float | None = None

    def arrive(self, call: Entry, now: float) -> None:
        if call.order in self._places:
            return
        self._boost(now)
        self._places[call.order] = next(self._end)
        agent = self._agents.setdefault(call.peer, _MlfqAgent())
        if not agent.calls:
            agent.attained *= 0.5 ** ((now - agent.idle_since) / HALF_LIFE_S)
        agent.calls += 1

    def leave(self, call: Entry, now: float) -> None:
        if self._places.pop(call.order, None) is None:
            return
        self._turns.end(call)
        agent = self._agents[call.peer]
        agent.calls -= 1
        agent.idle_since = now

    def charge(self, calls: Sequence[Entry], tokens: int, now: float) -> None:
        agents = self._agents
        for call in calls:
            agents[call.peer].attained += tokens

    def charge_prompt(self, call: Entry, tokens: int, now: float) -> None:
        self._agents[call.peer].attained += tokens * PROMPT_WEIGHT

    def _boost(self, now: float) -> None:
        if self._boosted is None:
            self._boosted = now
        if now - self._boosted < BOOST_S:
            return
        self._boosted = now
        self._agents = {peer: agent for peer, agent in self._agents.items() if agent.calls}
        for agent in self._agents.values():
            agent.attained = 0.0

    def _level(self, call: Entry) -> int:
        """Level i ends at quantum × (2^(i+1) - 1): the turns of levels 0 to i together."""
        quanta = int(self._agents[call.peer].attained / self._quantum.tokens)
        return min((quanta + 1).bit_length(), LEVELS) - 1

    def _key(self, call: Entry) -> tuple[int, int]:
        return self._level(call), self._places[call.order]

    def evict(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        self._boost(now)
        if len(waiting) <= free or not running:
            return []
        lowest = sorted((self._worth(call, now) for call in running), key=lambda worth: worth[:2], reverse=True)
        victims: list[E] = []
        for key, (level, over, victim) in zip(sorted(map(self._key, waiting))[free:], lowest, strict=False):
            if not (level > key[0] or (level == key[0] and over)):
                break
            victims.append(victim)
        for victim in victims:
            self._places[victim.order] = next(self._end)
        for _, over, call in lowest[len(victims) :]:
            if over:  # no call waits that would get the slot: else the one that left just now would get it again
                self._turns.begin(call, now)
        return victims

    def _worth(self, call: E, now: float) -> tuple[int, bool, E]:
        """The level, and whether the call's turn there is over: the greater, the sooner the call gives up its slot."""
        level = self._level(call)
        return level, self._turns.is_over(call, now, 1 << level), call

    def admit(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        self._boost(now)
        if free <= 0:
            return []
        admitted = sorted(waiting, key=self._key)[:free]
        for call in admitted:
            self._turns.begin(call, now)
        return admitted

    def order(self, pending: Sequence[E], now: float) -> list[E]:
        return sorted(pending, key=self._key)
