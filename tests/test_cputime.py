"""Accounting of processor time: never too much, complete where parents wait for children, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.budgets.cputime import CpuMeter, ProcessSample


@dataclass(eq=False)
class Process:
    number: int
    parent: Process | None
    own: float = 0.0
    waited: float = 0.0
    ended: bool = False
    children: list[Process] = field(default_factory=list)

    def used(self) -> ProcessSample:
        return ProcessSample((self.number, 0), self.own, self.waited)


class Linux:
    """One agent and its processes."""

    def __init__(self) -> None:
        self.root = Process(1, None)
        self.all = [self.root]
        self.total = 0.0
        self.numbers = iter(range(2, 1 << 30))

    def run(self, process: Process, seconds: float) -> None:
        if not process.ended:
            process.own += seconds
            self.total += seconds

    def fork(self, process: Process) -> None:
        if not process.ended:
            child = Process(next(self.numbers), process)
            process.children.append(child)
            self.all.append(child)

    def end(self, process: Process, ignored: bool) -> None:
        """End a process. `ignored`: its parent ignores SIGCHLD, so Linux adds its time to no other process."""
        if process is self.root or process.ended:
            return
        process.ended = True
        for child in process.children:
            child.parent = self.root
        self.root.children += process.children
        process.children = []
        if ignored:
            self.remove(process)

    def wait(self, process: Process) -> None:
        if process.ended and process in self.all:
            assert process.parent is not None
            process.parent.waited += process.own + process.waited
            self.remove(process)

    def remove(self, process: Process) -> None:
        assert process.parent is not None
        process.parent.children.remove(process)
        self.all.remove(process)

    def sample(self, between: Process | None = None) -> Iterator[ProcessSample]:
        """Sample all processes, parents first. `between`: a process that is waited for after its parent was sampled."""
        seen = []
        todo = [self.root]
        for process in todo:
            seen.append(process.used())
            if between is not None and between.parent is process:
                self.wait(between)
            todo += process.children
        return iter(seen)


ACTIONS = st.lists(
    st.tuples(st.sampled_from("rrfewis"), st.integers(0, 7), st.floats(0.01, 2)),
    max_size=60,
)


def act(linux: Linux, meter: CpuMeter, kind: str, who: int, seconds: float, racing: bool) -> None:
    process = linux.all[who % len(linux.all)]
    match kind:
        case "r":
            linux.run(process, seconds)
        case "f":
            linux.fork(process)
        case "e" | "i":
            linux.end(process, ignored=kind == "i")
        case "w":
            linux.wait(process)
        case "s":
            meter.update(linux.sample(process if racing else None))


@given(ACTIONS)
def test_where_parents_wait_all_is_counted(actions: list[tuple[str, int, float]]) -> None:
    linux, meter = Linux(), CpuMeter()
    for kind, who, seconds in actions:
        if kind != "i":
            act(linux, meter, kind, who, seconds, racing=False)
    meter.update(linux.sample())
    assert meter.total_s == pytest.approx(linux.total)


@given(ACTIONS)
def test_it_is_never_more_than_was_used_and_never_less_than_before(actions: list[tuple[str, int, float]]) -> None:
    linux, meter = Linux(), CpuMeter()
    before = 0.0
    for kind, who, seconds in actions:
        act(linux, meter, kind, who, seconds, racing=True)
        assert before <= meter.total_s <= linux.total + 1e-6
        before = meter.total_s


def test_sampled_time_of_a_process_without_a_wait_stays_counted() -> None:
    linux, meter = Linux(), CpuMeter()
    linux.fork(linux.root)
    child = linux.all[1]
    linux.run(child, 3.0)
    assert meter.update(linux.sample()) == 3.0
    linux.end(child, ignored=True)
    linux.run(linux.root, 1.0)
    assert meter.update(linux.sample()) == 1.0
    assert meter.total_s == 4.0


def test_a_wait_between_two_looks_counts_nothing_twice() -> None:
    linux, meter = Linux(), CpuMeter()
    linux.fork(linux.root)
    child = linux.all[1]
    linux.run(child, 3.0)
    meter.update(linux.sample())
    linux.run(child, 0.5)
    linux.end(child, ignored=False)
    meter.update(linux.sample(child))
    meter.update(linux.sample())
    assert meter.total_s == 3.5


def test_a_successor_goes_on_where_the_dead_one_was() -> None:
    assert CpuMeter(2.0).update([ProcessSample((1, 0), 2.5, 0.25)]) == 0.75
    assert CpuMeter(2.0).update([ProcessSample((1, 0), 1.5, 0.25)]) == 0.0


def test_the_end_adds_time_after_the_last_sample() -> None:
    meter = CpuMeter()
    assert meter.end(0.7) == 0.7
    meter = CpuMeter()
    meter.update([ProcessSample((1, 0), 0.5, 0.0)])
    assert meter.end(0.7) == pytest.approx(0.2)
    assert meter.end(0.7) == 0.0
