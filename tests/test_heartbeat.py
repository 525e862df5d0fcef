"""Heartbeats on a fake clock."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from aiosd.heartbeat import BEAT_S, HANG_S, Heart, beat


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


def test_a_beat_starts_the_count_anew(heart: Heart) -> None:
    start = time.monotonic()
    for n in range(1, 20):
        beat(heart.write)
        assert not heart.hangs(lambda n=n: start + n * BEAT_S)


def test_a_watcher_that_slept_judges_nobody(heart: Heart) -> None:
    start = time.monotonic()
    assert not heart.hangs(lambda: start + 1)
    assert not heart.hangs(lambda: start + 1000)
    assert not heart.hangs(lambda: start + 1001)


def test_nobody_waits_for_a_listener_that_does_not_listen(heart: Heart) -> None:
    for _ in range(100_000):
        beat(heart.write)
    assert not heart.hangs()
