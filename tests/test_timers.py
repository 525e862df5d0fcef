"""Timers on a fake clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiosd.timers import Timers


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_timers_run_in_the_order_of_deadlines_and_then_of_setting() -> None:
    clock, ran = Clock(), []
    timers = Timers(clock)
    for name, delay in (("late", 2.0), ("first", 1.0), ("second", 1.0)):
        timers.after(delay, lambda name=name: ran.append(name))
    assert timers.until_next() == 1.0
    clock.now += 1.0
    timers.run_due()
    assert ran == ["first", "second"]
    clock.now += 5.0
    timers.run_due()
    assert ran == ["first", "second", "late"]
    assert timers.until_next() is None


def test_cancelled_timers_do_not_run_and_are_not_waited_for() -> None:
    clock, ran = Clock(), []
    timers = Timers(clock)
    timer = timers.after(1.0, lambda: ran.append("no"))
    timers.after(3.0, lambda: ran.append("yes"))
    timer.cancel()
    assert timers.until_next() == 3.0
    clock.now += 3.0
    timers.run_due()
    timer.cancel()
    assert ran == ["yes"]


def test_a_timer_set_by_a_timer_waits_for_its_own_time() -> None:
    clock, ran = Clock(), []
    timers = Timers(clock)

    def again() -> None:
        ran.append(clock.now)
        timers.after(1.0, again)

    again()
    for _ in range(3):
        clock.now += 1.0
        timers.run_due()
    assert ran == [100.0, 101.0, 102.0, 103.0]


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans())))
def test_everything_not_cancelled_runs_once(spec: list[tuple[float, bool]]) -> None:
    clock, ran = Clock(), []
    timers = Timers(clock)
    for number, (delay, cancel) in enumerate(spec):
        timer = timers.after(delay, lambda number=number: ran.append(number))
        if cancel:
            timer.cancel()
    while (wait := timers.until_next()) is not None:
        clock.now += wait + 1e-9
        timers.run_due()
    assert sorted(ran) == [number for number, (_, cancel) in enumerate(spec) if not cancel]


def test_cancelled_timers_do_not_pile_up() -> None:
    clock = Clock()
    timers = Timers(clock)
    ran: list[int] = []
    kept = [timers.after(1e6, lambda n=n: ran.append(n)) for n in range(10)]
    for _ in range(10_000):
        timers.after(1e6, lambda: None).cancel()
    assert len(timers) < 200
    kept[0].cancel()
    kept[0].cancel()
    clock.now += 1e6
    timers.run_due()
    assert ran == list(range(1, 10))
    assert len(timers) == 0
