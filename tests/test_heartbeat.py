"""Heartbeats on a fake clock."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from aiosd.ipc.heartbeat import BEAT_S, HANG_S, Heart, Rounds, beat, beat_in_background


@pytest.fixture
def heart() -> Iterator[Heart]:
    made = Heart()
    yield made
    made.close()


def test_silence_is_a_hang_only_after_a_while(heart: Heart) -> None:
    start = time.monotonic()
    for s in (1.0, 2.0, 3.0, 4.0, HANG_S - 0.1):
        assert not heart.hangs(lambda s=s: start + s)
    assert heart.hangs(lambda: start + HANG_S + 0.1)
    assert heart.hangs(lambda: start + HANG_S + 1.0)
    assert not heart.hangs(lambda: start + HANG_S + 1.0, silent_s=2 * HANG_S)


def test_a_beat_starts_the_count_anew(heart: Heart) -> None:
    start = time.monotonic()
    for n in range(1, 20):
        beat(heart.write)
        assert not heart.hangs(lambda n=n: start + n * BEAT_S)


def test_a_watcher_that_slept_judges_no_process(heart: Heart) -> None:
    start = time.monotonic()
    assert not heart.hangs(lambda: start + 1)
    assert not heart.hangs(lambda: start + 1000)
    assert not heart.hangs(lambda: start + 1001)


def test_a_beat_does_not_wait_for_a_listener_that_does_not_listen(heart: Heart) -> None:
    for _ in range(100_000):
        beat(heart.write)
    assert not heart.hangs()


# ── a loop that hangs behind a heart that beats ───────────────────────────────────────────────────────────


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rounds_of(seconds: float, number: int) -> tuple[Rounds, Clock]:
    clock = Clock()
    rounds = Rounds(clock)
    for _ in range(number):
        rounds.begin()
        clock.now += seconds
        rounds.end()
    return rounds, clock


@pytest.mark.parametrize(
    ("seconds", "number", "allowed"),
    [(0.0, 0, 300.0), (60.0, 19, 300.0), (0.1, 20, 30.0), (2.9, 1000, 30.0), (8.0, 20, 80.0)],
)
def test_a_round_may_take_ten_times_as_long_as_any_before_it(seconds: float, number: int, allowed: float) -> None:
    rounds, clock = rounds_of(seconds, number)
    rounds.begin()
    clock.now += allowed
    assert not rounds.stuck()
    clock.now += 0.1
    assert rounds.stuck()
    rounds.begin()
    assert not rounds.stuck()


def test_who_sleeps_or_loads_is_not_stuck() -> None:
    rounds, clock = rounds_of(1.0, 30)
    clock.now += 1e6
    assert not rounds.stuck()
    fresh = Rounds(clock)
    clock.now += 1e6
    assert not fresh.stuck()


def test_the_heart_stops_when_the_loop_is_stuck(heart: Heart, capfd: pytest.CaptureFixture[str]) -> None:
    rounds, clock = rounds_of(0.1, 30)
    rounds.begin()
    clock.now += 31
    before = set(threading.enumerate())
    beat_in_background(heart.write, rounds)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()
    with pytest.raises(BlockingIOError):
        os.read(heart.read, 1)
    assert "test_the_heart_stops_when_the_loop_is_stuck" in capfd.readouterr().err  # where it was stuck
