"""The choice of threads is right beside busy neighbours, takes bounded time, and reports how reliable it is."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from aiosd.llm import llama, threads
from aiosd.llm.threads import Threads


class Fake:
    """A context with a fake clock, whose steps take a time that a script computes from the threads and the step."""

    def __init__(self, seconds: Callable[[int, int], float], others: float = 0.0) -> None:
        self.now, self.steps, self.threads = 0.0, 0, 0
        self._seconds, self._others = seconds, others
        self.cleared: list[int] = []

    def set_threads(self, number: int) -> None:
        self.threads = number

    def decode(self, batch: llama.BatchBuffer) -> int:
        self.now += self._seconds(self.threads, self.steps)
        self.steps += 1
        return llama.OK

    def logits(self, rows: int) -> None:
        pass

    def cut(self, slot: int, length: int) -> None:
        self.cleared.append(slot)

    def measure(self) -> Threads:
        return threads.measure(
            self,  # type: ignore[arg-type]
            [3, 4],
            clock=lambda: self.now,
            busy=lambda: self._others * self.now,
        )


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})


@pytest.mark.parametrize(("gain", "chosen"), [(1.0, 1), (1.2, 1), (1.8, 4)])
def test_more_threads_only_for_a_clear_gain(gain: float, chosen: int) -> None:
    fake = Fake(lambda n, step: 0.01 / (1 if n == 1 else (gain if n == 4 else 1.1)))
    found = fake.measure()
    assert (found.number, found.again) == (chosen, False)
    assert "measured on a quiet machine" in found.why
    assert fake.cleared == [3, 4]


def test_a_neighbour_that_comes_and_goes_changes_nothing() -> None:
    """Two steps of three, chosen at random, are ten times as long."""
    fake = Fake(lambda n, step: 0.004 / n * (1 if step % 3 == 0 else 10), others=1.5)
    found = fake.measure()
    assert found.number == 4
    assert found.again
    assert "while others used 1.5 of 4 cores" in found.why


@pytest.mark.parametrize("step", [0.001, 0.1, 0.19, 2.0, 20.0])
def test_it_takes_bounded_time(step: float) -> None:
    """Each candidate is measured, whatever the time of the others."""
    fake = Fake(lambda n, _: step)
    found = fake.measure()
    assert fake.now <= max(2 * 3 * step, threads.MEASURE_S + step) if step < 0.2 else fake.now == 2 * step
    assert found.why.startswith("assumed" if step > 0.2 else "measured")
    assert found.number == (4 if step > 0.2 else 1)


def test_a_large_model_on_many_cores_is_not_tried_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    fake = Fake(lambda n, _: 5.0 / n)
    found = fake.measure()
    assert found.number == 64
    assert fake.now < 3
    assert "measured" in found.why


def test_one_long_step_is_no_large_model() -> None:
    found = Fake(lambda n, step: 3.0 if step == 0 else 0.01 / n).measure()
    assert (found.number, found.why[:8]) == (4, "measured")


def test_how_much_others_work_is_seen() -> None:
    before = threads.busy_for_others()
    assert before > 0
    sum(i * i for i in range(2_000_000))  # this process itself is not "others"
    assert threads.busy_for_others() >= before - 0.1
