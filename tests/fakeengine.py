"""An engine without a model, on a fake clock: it calls a policy as the real engine does, in the same order.

Times are those of a small model on one core: a step takes 3 ms, and 1.2 ms for each sequence; a prompt token half a
millisecond, a switch 5 ms. After every step it checks the guarantees of all policies (`contract.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from aiosd.llm.policy import Quantum, SchedulingPolicy
from aiosd.llm.policy.contract import ANY_TURN

STEP_S, ROW_S, PROMPT_S, SWITCH_S = 0.003, 0.0012, 0.0005, 0.005
CHUNK = 512  # prompt tokens in a step

ENDLESS = 1 << 40


@dataclass(slots=True, eq=False)
class Call:
    peer: int
    order: int
    nice: int = 0
    group: str = ""
    arrived: float = 0.0
    num_generated: int = 0
    num_pending: int = 0
    todo: int = ENDLESS
    parked: bool = False
    finished: float | None = None
    waits: list[tuple[float, float]] = field(default_factory=list)  # from, to
    since: float = 0.0
    least_turn: Quantum = ANY_TURN


@dataclass(frozen=True, slots=True)
class Turn:
    """A call of an agent, and the time between its last answer and this call."""

    think: float = 0.0
    prompt: int = 64
    generate: int = ENDLESS


@dataclass(slots=True)
class Agent:
    peer: int
    turns: Iterator[Turn]
    nice: int = 0
    group: str = ""
    service: float = 0.0  # tokens, generated and (by weight) of prompts
    calls: list[Call] = field(default_factory=list)


class FakeEngine:
    def __init__(self, policy: SchedulingPolicy, slots: int) -> None:
        self.policy, self.slots = policy, slots
        self.now = 0.0
        self.waiting: list[Call] = []
        self.running: list[Call] = []
        self.agents: dict[int, Agent] = {}
        self.steps: list[tuple[int, int]] = []  # by step: how many calls were ready, how many were decoded
        self.evictions: list[tuple[float, Call]] = []
        self.admissions: list[Call] = []
        self.num_arrived = 0
        self._due: list[tuple[float, int, Agent, Turn]] = []
        self._pushed = 0
        self._held_back = False

    def agent(self, peer: int, turns: Iterable[Turn] = (Turn(),), nice: int = 0, group: str = "") -> Agent:
        agent = self.agents[peer] = Agent(peer, iter(turns), nice, group)
        self._next_turn(agent)
        return agent

    def call(self, agent: Agent, generate: int = ENDLESS, prompt: int = 0) -> Call:
        """Make a call that arrives now."""
        self.num_arrived += 1
        call = Call(agent.peer, self.num_arrived, agent.nice, agent.group, self.now, 0, prompt, generate)
        call.since = self.now
        agent.calls.append(call)
        self.waiting.append(call)
        self.policy.arrive(call, self.now)
        return call

    def renice(self, agent: Agent, nice: int) -> None:
        agent.nice = nice
        for call in self.open_calls:
            if call.peer == agent.peer:
                call.nice = nice
                self.policy.renice(call, self.now)

    def park(self, call: Call, parked: bool) -> None:
        if call.parked != parked and call.finished is None:
            call.parked = parked
            (self.policy.leave if parked else self.policy.arrive)(call, self.now)

    @property
    def open_calls(self) -> list[Call]:
        return [*self.waiting, *self.running]

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end and (self._due or any(not call.parked for call in self.open_calls)):
            self.step()

    def finish_all(self, most: float = 1e5) -> None:
        self.run(most)
        assert not self.open_calls
        assert not self._due

    def step(self) -> None:
        if not any(not call.parked for call in self.open_calls) and self._due:
            self.now = max(self.now, self._due[0][0])
        while self._due and self._due[0][0] <= self.now:
            _, _, agent, turn = heappop(self._due)
            self.call(agent, turn.generate, turn.prompt)
        self._plan()
        spent = self._prefill()
        spent += self._decode()
        self.now += spent + STEP_S
        for call in [call for call in self.running if call.num_generated >= call.todo]:
            self._finish(call)

    def cancel(self, call: Call) -> None:
        (self.waiting if call in self.waiting else self.running).remove(call)
        call.finished = self.now
        self.policy.leave(call, self.now)

    def _next_turn(self, agent: Agent) -> None:
        turn = next(agent.turns, None)
        if turn is not None:
            self._pushed += 1
            heappush(self._due, (self.now + turn.think, self._pushed, agent, turn))

    def _finish(self, call: Call) -> None:
        self.cancel(call)
        self._next_turn(self.agents[call.peer])

    def _plan(self) -> None:
        waiting = [call for call in self.waiting if not call.parked]
        if not waiting:
            return
        for call in [call for call in self.running if call.parked]:
            self._take_off(call)
        moved: set[Call] = set()
        for _ in range(3):
            victims = self._exchange()
            assert not moved & set(victims), "to and fro"
            moved.update(victims)
            if not victims:
                break
        assert not victims, "no end of switches"
        self.now += SWITCH_S * len(moved)

    def _exchange(self) -> list[Call]:
        waiting = [call for call in self.waiting if not call.parked]
        if not waiting:
            return []
        free = self.slots - len(self.running)
        victims = self.policy.evict(waiting, self.running[::-1], free, self.now)
        assert len(set(victims)) == len(victims) <= max(len(waiting) - free, 0), "evicted for nothing"
        for call in victims:
            self._take_off(call)
            self.evictions.append((self.now, call))
        waiting += victims
        free += len(victims)
        admitted = self.policy.admit(waiting[::-1], self.running, free, self.now)
        assert len(set(admitted)) == len(admitted) == min(free, len(waiting)), "slots left empty"
        assert not set(admitted) & set(victims), "evicted, and admitted in its own place"
        for call in admitted:
            self.waiting.remove(call)
            self.running.append(call)
            self.admissions.append(call)
            call.waits.append((call.since, self.now))
        return victims

    def _take_off(self, call: Call) -> None:
        self.running.remove(call)
        self.waiting.append(call)
        call.since = self.now

    def _prefill(self) -> float:
        pending = [call for call in self.running if call.num_pending and not call.parked]
        if not pending:
            return 0.0
        ordered = self.policy.order(pending, self.now)
        assert set(ordered) <= set(pending)
        assert len(set(ordered)) == len(ordered)
        assert ordered or not self._held_back, "prompts left out twice without a select between"
        self._held_back = not ordered
        budget = CHUNK
        for call in ordered:
            tokens = min(call.num_pending, budget)
            if tokens:
                budget -= tokens
                call.num_pending -= tokens
                self.agents[call.peer].service += tokens / 8
                self.policy.charge_prompt(call, tokens, self.now)
        return PROMPT_S * (CHUNK - budget)

    def _decode(self) -> float:
        ready = [call for call in self.running if not call.num_pending and not call.parked]
        if not ready:
            return 0.0
        before = list(ready)
        chosen = self.policy.select(ready, self.now)
        self._held_back = False
        assert ready == before
        assert chosen == [call for call in ready if call in set(chosen)], "in the same order"
        assert chosen, "no call goes on"
        assert chosen is ready or len(chosen) < len(ready), "the same list when all do"
        for call in chosen:
            call.num_generated += 1
            self.agents[call.peer].service += 1
        self.policy.charge(chosen, 1, self.now)
        self.steps.append((len(ready), len(chosen)))
        return ROW_S * len(chosen)


def crowd(
    engine: FakeEngine, agents: int, shared: int = 512, private: int = 64, turns: int = 4, gap: float = 0.001
) -> None:
    """Workload W(n): the first computes the shared prompt; turns of 32 generated tokens, 32 tool tokens between."""
    for peer in range(1, agents + 1):
        first = Turn(0.0, private + (shared if peer == 1 else 0), 32)
        engine.agent(peer, [first, *[Turn(gap, 32, 32)] * (turns - 1)])
