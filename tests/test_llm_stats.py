"""The engine's counts and times."""

from __future__ import annotations

from aiosd.llm.stats import WINDOW, EngineMeter


def test_tokens_per_second_are_those_of_the_window_and_none_after_it() -> None:
    now = 100.0
    meter = EngineMeter(lambda: now)
    for _ in range(50):  # five seconds of work, 20 tokens a second
        meter.begin()
        now += 0.1
        meter.end(2)
    assert 18 <= meter.stats()["tokens_per_s"] <= 22
    now += 2 * WINDOW
    assert meter.stats()["tokens_per_s"] == 0
