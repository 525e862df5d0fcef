"""Heartbeats on a fake clock."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from aiosd import procfs
from aiosd.ipc.heartbeat import BEAT_S, HANG_S, START_S, Heart, Rounds, beat, beat_in_background
from tests.conftest import eventually


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


class Waiting:
    """A fake process whose threads wait for a processor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        self.waited_s = {1: 7.0, 2: 0.5}  # by thread, since it was made
        monkeypatch.setattr(procfs, "run_delays", lambda ospid: {t: int(s * 1e9) for t, s in self.waited_s.items()})

    def looks(self, heart: Heart, seconds: int, share: float, beaten: bool = False) -> int | None:
        """The seconds until it counts as hung, if one of its threads waits for this share of the time."""
        for s in range(1, seconds):
            self.now += 1
            self.waited_s[2] += share
            if beaten:
                beat(heart.write)
            if heart.hangs(lambda: self.now, ospid=1):
                return s
        return None


def test_a_process_that_waits_for_a_processor_does_not_hang(heart: Heart, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Waiting(monkeypatch)
    assert process.looks(heart, 40, 0.95) is None
    assert process.looks(heart, 5, 0.0, beaten=True) is None
    assert process.looks(heart, 40, 0.0) == HANG_S + 1  # earlier waiting no longer counts


def test_with_half_a_processor_half_of_the_time_counts(heart: Heart, monkeypatch: pytest.MonkeyPatch) -> None:
    assert HANG_S + 1 < Waiting(monkeypatch).looks(heart, 40, 0.5) <= 2 * HANG_S + 1


def test_waiting_for_a_processor_is_excused_for_a_limited_time(heart: Heart, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Waiting(monkeypatch).looks(heart, 100, 1.0) in (START_S, START_S + 1)


def test_linux_counts_the_wait_of_each_thread() -> None:
    """Two threads spin on one processor, so each waits about half of the time."""
    spin = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
    spinning = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    try:
        assert eventually(lambda: all(sum(procfs.run_delays(one.pid).values()) > 1e8 for one in spinning))
    finally:
        for one in spinning:
            one.kill()
            one.wait()
    assert procfs.run_delays(spinning[0].pid) == {}


def test_a_beat_starts_the_count_anew(heart: Heart) -> None:
    start = time.monotonic()
    for n in range(1, 20):
        beat(heart.write)
        assert not heart.hangs(lambda n=n: start + n * BEAT_S)


def test_a_watcher_that_was_not_running_kills_no_process(heart: Heart) -> None:
    start = time.monotonic()
    assert not heart.hangs(lambda: start + 1)
    assert not heart.hangs(lambda: start + 1000)
    assert not heart.hangs(lambda: start + 1001)


def test_a_beat_does_not_wait_for_a_watcher_that_does_not_read(heart: Heart) -> None:
    for _ in range(100_000):
        beat(heart.write)
    assert not heart.hangs()


# ── a loop that hangs while a thread sends heartbeats ─────────────────────────────────────────────────────


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


def test_a_core_that_sleeps_or_loads_is_not_stuck() -> None:
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
