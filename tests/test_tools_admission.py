"""Which call of a tool begins next: the guarantees at the top of `aiosd.tools.admission`, with random calls."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.tools.admission import OVERTAKES, Admission, Requirements

KEYS = ("a", "b", "c")

needs = st.builds(
    Requirements,
    tool=st.sampled_from(("t", "u", "v")),
    limit=st.just(2),
    reads=st.frozensets(st.sampled_from(KEYS), max_size=2),
    writes=st.frozensets(st.sampled_from(KEYS), max_size=2),
)
calls = st.lists(st.tuples(st.integers(1, 4), needs), max_size=60)


class Crowd:
    """Runs an admission to its end, and checks the invariants at every step."""

    def __init__(self, workers: int) -> None:
        self.admission: Admission[int] = Admission(workers)
        self.workers = workers
        self.running: dict[int, Requirements] = {}
        self.begun: list[int] = []
        self.all: dict[int, tuple[int, Requirements]] = {}

    def submit(self, agent: int, wanted: Requirements) -> None:
        number = len(self.all)
        self.all[number] = agent, wanted
        self.admission.submit(number, agent, wanted)
        self.go_on()

    def end(self, number: int) -> None:
        del self.running[number]
        self.admission.end(number)
        self.go_on()

    def go_on(self) -> None:
        for key in self.admission.begin():
            self.running[key] = self.all[key][1]
            self.begun.append(key)
            self.check()

    def check(self) -> None:
        assert len(self.running) <= self.workers
        tools = Counter(one.tool for one in self.running.values())
        assert all(number <= 2 for number in tools.values())
        users = [(number, key, write) for number, one in self.running.items() for write in (False, True)
                 for key in (one.writes if write else one.reads)]  # fmt: skip
        for number, key, write in users:
            assert not any(other != number and key == its and (write or writes) for other, its, writes in users)


@settings(max_examples=200, deadline=None)
@given(calls, st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_call_begins_once_and_holds_its_locks_alone(
    calls: list[tuple[int, Requirements]], workers: int, rng: random.Random
) -> None:
    crowd = Crowd(workers)
    for agent, wanted in calls:
        crowd.submit(agent, wanted)
        if crowd.running and rng.random() < 0.5:
            crowd.end(rng.choice(sorted(crowd.running)))
    while crowd.running:
        crowd.end(rng.choice(sorted(crowd.running)))
    assert sorted(crowd.begun) == list(range(len(calls)))
    for agent in {agent for agent, _ in calls}:  # in order within an agent and a tool
        for tool in ("t", "u", "v"):
            mine = [n for n in crowd.begun if crowd.all[n][0] == agent and crowd.all[n][1].tool == tool]
            assert mine == sorted(mine)


def test_agents_take_turns() -> None:
    admission: Admission[tuple[int, int]] = Admission(workers=1)
    one = Requirements("t", limit=1)
    for agent, number in ((1, 10), (2, 3), (3, 1)):
        for i in range(number):
            admission.submit((agent, i), agent, one)
    order = []
    while begun := admission.begin():
        order += [key[0] for key in begun]
        admission.end(begun[0])
    assert order == [1, 2, 3, 1, 2, 1, 2, *[1] * 7]


def test_many_calls_sent_at_once_do_not_pass_those_of_others() -> None:
    """Each agent sends all its calls at once, one agent after the other."""
    admission: Admission[tuple[int, int]] = Admission(workers=8)
    for agent in range(64):
        for number in range(6):
            admission.submit((agent, number), agent, Requirements("t"))
    served: Counter[int] = Counter(dict.fromkeys(range(64), 0))
    while begun := admission.begin():
        served[begun[0][0]] += 1
        assert max(served.values()) - min(served.values()) <= 1
        admission.end(begun[0])
    assert set(served.values()) == {6}


def test_an_agent_that_calls_much_else_is_not_passed_over() -> None:
    """Agent 1 makes many calls of another tool; its one call of the shared tool still has its turn."""
    admission: Admission[Any] = Admission(workers=2)
    admission.submit("shared-0", 2, Requirements("shared"))
    admission.submit("mine", 1, Requirements("shared"))
    begun, late = admission.begin(), []
    for step in range(1, 60):
        for agent, tool in ((1, "own"), (2, "shared")):
            admission.submit(f"{tool}-{step}", agent, Requirements(tool))
        for key in begun:
            admission.end(key)
        begun = admission.begin()
        late.append(step)
        if "mine" in begun:
            break
    assert len(late) <= OVERTAKES + 2


def test_a_call_that_is_given_up_costs_no_turn() -> None:
    admission: Admission[Any] = Admission(workers=1)
    admission.submit("running", 9, Requirements("t"))
    admission.begin()
    for key, agent in (("a1", 1), ("a2", 1), ("b1", 2)):
        admission.submit(key, agent, Requirements("t"))
    admission.end("a1")
    admission.end("running")
    assert admission.begin() == ["a2"]


def test_a_call_of_many_locks_is_overtaken_a_bounded_number_of_times() -> None:
    """A stream of small calls, of which at least one always runs, cannot block a call that needs both keys."""
    admission: Admission[Any] = Admission(workers=4)
    small = [Requirements("s", 100, writes=frozenset(key)) for key in "ab"]
    for i in range(2):
        admission.submit(("small", i), i, small[i])
    assert len(admission.begin()) == 2
    admission.submit("both", 9, Requirements("b", 1, writes=frozenset("ab")))
    for i in range(2, 200):
        admission.submit(("small", i), i, small[i % 2])
        admission.end(("small", i - 2))
        if "both" in admission.begin():
            break
    assert OVERTAKES <= i <= OVERTAKES + 4
    assert admission.running == 1


def test_a_call_is_overtaken_only_by_those_that_use_the_same() -> None:
    admission: Admission[Any] = Admission(workers=4)
    admission.submit("a1", 1, Requirements("t", 9, writes=frozenset("a")))
    admission.begin()
    admission.submit("a2", 2, Requirements("t", 9, writes=frozenset("a")))
    for i in range(100):
        admission.submit(i, 3, Requirements("other", 9))
        assert admission.begin() == [i]
        admission.end(i)
    assert admission.position("a2") == {"before": 0, "overtaken": 0}


def test_a_call_that_is_given_up_holds_nothing() -> None:
    admission: Admission[Any] = Admission(workers=4)
    for key in ("x", "y", "z"):
        admission.submit(key, 1, Requirements("t"))
    assert admission.begin() == ["x"]
    admission.end("y")
    admission.end("y")
    admission.end("x")
    assert admission.begin() == ["z"]
