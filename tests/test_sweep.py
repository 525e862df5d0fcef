"""Ending all descendants of a process, also those that KILL does not end. Each test has a process of its own, so that
it ends only its own descendants, and its change of `os.kill` affects no other test."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

import pytest

from aiosd.birth.fork import fork
from aiosd.init import sweep
from aiosd.kin import adopt_orphans
from tests.conftest import eventually

kill = os.kill


class Log(logging.Handler):
    """The messages of `sweep`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        sweep.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def in_a_subreaper(body: Callable[[], None]) -> None:
    """Run `body` in a child; the test fails if it fails or does not end."""

    def child() -> int:
        adopt_orphans()
        body()
        return 0

    ospid = fork(child)
    status: int | None = None

    def ended() -> bool:
        nonlocal status
        collected, status = os.waitpid(ospid, os.WNOHANG)
        return collected == ospid

    if not eventually(ended, timeout=30.0):
        kill(ospid, signal.SIGKILL)  # its children end by the parent-death signal
        os.waitpid(ospid, 0)
        pytest.fail("waits for a process that does not end")
    assert status == 0, "see the traceback on stderr"


def sleeper() -> int:
    while True:
        signal.pause()


def fork_spinner() -> int:
    """Fork a process that spins; returns when it does."""
    reading, writing = os.pipe()

    def child() -> int:
        os.write(writing, b"!")
        while True:
            pass

    ospid = fork(child)
    os.read(reading, 1)
    return ospid


def end(ospid: int) -> None:
    kill(ospid, signal.SIGKILL)
    os.waitpid(ospid, 0)


def refused(ospid: int, number: int) -> None:
    raise PermissionError


def without_effect(ospid: int, number: int) -> None:
    """Let a signal have no effect, as on a process in state D."""


@pytest.mark.parametrize(
    ("start", "killing"),
    [
        (lambda: fork(sleeper), refused),
        (fork_spinner, refused),
        (lambda: fork(sleeper), without_effect),
    ],
    ids=["another user's", "another user's, busy", "uninterruptible"],
)
def test_a_process_that_cannot_be_killed_is_given_up_and_named(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[], int], killing: Callable[[int, int], None]
) -> None:
    def body() -> None:
        log = Log()
        fork(sleeper)
        hopeless = start()

        def fake_kill(ospid: int, number: int) -> None:
            (killing if ospid == hopeless else kill)(ospid, number)

        monkeypatch.setattr(os, "kill", fake_kill)
        sweep.sweep(patience_s=0.2)
        assert len(log.lines) == 1
        assert f"{hopeless} (" in log.lines[0]
        assert os.waitid(os.P_PID, hopeless, os.WEXITED | os.WNOHANG) is None  # alive
        end(hopeless)

    in_a_subreaper(body)


def test_a_process_that_dies_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, a core with a large model needs long to free its memory."""

    def body() -> None:
        log = Log()
        slow = fork_spinner()
        kills: list[int] = []

        def late_kill(ospid: int, number: int) -> None:
            kills.append(ospid)
            if kills.count(slow) > 20:
                kill(ospid, number)

        monkeypatch.setattr(os, "kill", late_kill)
        sweep.sweep(patience_s=0.2)
        assert log.lines == []
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    in_a_subreaper(body)


def test_nothing_is_left_and_the_callers_own_work_is_done_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        log = Log()
        reading, writing = os.pipe()

        def parent() -> int:
            fork(sleeper)
            os.write(writing, b"!")
            return sleeper()

        fork(parent)
        os.read(reading, 1)

        reading, writing = os.pipe()

        def patient() -> int:
            os.close(writing)
            os.read(reading, 1)
            return 0

        foreign = fork(patient)  # ends when the caller permits it

        def fake_kill(ospid: int, number: int) -> None:
            (refused if ospid == foreign else kill)(ospid, number)

        def meanwhile() -> None:
            if not closed:
                os.close(writing)
                closed.append(True)

        closed: list[bool] = []
        monkeypatch.setattr(os, "kill", fake_kill)
        sweep.sweep(patience_s=60.0, meanwhile=meanwhile)
        assert (log.lines, closed) == ([], [True])
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    in_a_subreaper(body)
