"""FIFO keeps its promise; a fake engine and a fake clock, no model."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from aiosd.llm.policy import Fifo


@dataclass(frozen=True)
class Call:
    order: int
    arrived: float = 0.0
    peer: int = 1
    nice: int = 0
    group: str = ""
    num_generated: int = 0
    num_pending: int = 0


@given(st.lists(st.integers(min_value=0, max_value=1000), unique=True), st.integers(min_value=-1, max_value=40))
def test_the_first_come_get_the_slots(orders: list[int], free: int) -> None:
    admitted = Fifo().admit([Call(order) for order in orders], [], free, now=0.0)
    assert [call.order for call in admitted] == sorted(orders)[: max(free, 0)]


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), min_size=1, max_size=30), st.integers(1, 4))
def test_nobody_is_overtaken_and_everybody_served(arrivals: list[tuple[float, int]], slots: int) -> None:
    """Arrivals in time, each needing some steps; admission happens in the order of arrival."""
    policy = Fifo()
    todo = [(time, Call(order, time), steps) for order, (time, steps) in enumerate(sorted(arrivals))]
    waiting: list[Call] = []
    running: dict[Call, int] = {}
    admitted: list[int] = []
    need = {call: steps for _, call, steps in todo}
    now = 0.0
    while todo or waiting or running:
        while todo and todo[0][0] <= now:
            waiting.append(todo.pop(0)[1])
        assert policy.evict(waiting, list(running), slots - len(running), now) == []
        for call in policy.admit(waiting, list(running), slots - len(running), now):
            waiting.remove(call)
            running[call] = need[call]
            admitted.append(call.order)
        assert len(running) <= slots
        assert not waiting or len(running) == slots
        running = {call: left - 1 for call, left in running.items() if left > 1}
        now += 1.0
    assert admitted == sorted(admitted)
    assert len(admitted) == len(arrivals)


def test_prompts_are_computed_in_the_order_of_arrival() -> None:
    assert [c.order for c in Fifo().order([Call(3), Call(1), Call(2)], 0.0)] == [1, 2, 3]
