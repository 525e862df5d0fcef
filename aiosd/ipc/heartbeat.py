"""Signs of life: one byte a second through a pipe, from a process that is watched to the process that watches it.

    guardian ◀─ supervisor ◀─ kernel, llm cores

The supervisor and the kernel beat in their loops, so a loop that hangs falls silent. A core beats from a thread of
its own, because one step of a big model may take long and is no hang: a core falls silent when it is stopped, or stuck
with the interpreter's lock held; and its thread stops beating when the loop has not come round for too long (`Rounds`
has how long that is). A process that has been silent for `HANG_S` is killed by its watcher, and replaced. The
supervisor waits for the disk twice, at its start and at its end: until its first beat it has `START_S`, and at its end
a thread beats for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

BEAT_S = 1.0
HANG_S = 5.0
START_S = 60.0


class Heart:
    """The watcher's side. The writing end is `write`, for the child that is about to be forked."""

    __slots__ = ("_heard", "_looked", "beaten", "read", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._heard = self._looked = time.monotonic()
        self.beaten = False  # at least once

    def forked(self) -> None:
        """The child has its end; ours would keep the pipe open."""
        os.close(self.write)
        self.write = -1

    def close(self) -> None:
        os.close(self.read)
        if self.write >= 0:
            os.close(self.write)

    def hangs(self, clock: Callable[[], float] = time.monotonic, silent_s: float = HANG_S) -> bool:
        """Whether no beat came for `silent_s`; to be asked about every `BEAT_S`. A watcher that was stopped itself has
        received nothing meanwhile, which proves nothing: then the count starts anew."""
        now = clock()
        late = now - self._looked > 2 * BEAT_S
        self._looked = now
        heard = False
        with contextlib.suppress(BlockingIOError):
            heard = bool(os.read(self.read, 4096))
        self.beaten = self.beaten or heard
        if heard or late:
            self._heard = now
        return now - self._heard > silent_s


def beat(write: int) -> None:
    """One beat. A full pipe has beats enough; a closed one has no listener."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(write, b".")


class Rounds:
    """What the loop of a service notes for its heart: that it comes round.

    How long a round may take follows from the rounds before it: ten times the longest, and never less than half a
    minute; the first ones, of which nothing is known, five minutes. While it loads (before the first round) and while
    it sleeps without work nothing is asked of it. A round that exceeds this is a hang.
    """

    FACTOR, LEAST_S = 10.0, 30.0
    FIRST, FIRST_S = 20, 300.0

    __slots__ = ("_clock", "_longest", "_number", "_since")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None  # when the round under way began
        self._longest = 0.0
        self._number = 0

    def begin(self) -> None:
        """Another round; the one before it, if any, is over."""
        self.end()
        self._since = self._clock()

    def end(self) -> None:
        """It sleeps."""
        since, self._since = self._since, None
        if since is not None:
            self._number += 1
            self._longest = max(self._longest, self._clock() - since)

    @property
    def longest_allowed_s(self) -> float:
        return self.FIRST_S if self._number < self.FIRST else max(self.LEAST_S, self.FACTOR * self._longest)

    def stuck(self) -> bool:
        """Asked by another thread."""
        since = self._since
        return since is not None and self._clock() - since > self.longest_allowed_s


def beat_in_background(write: int, rounds: Rounds) -> None:
    """Beat from a thread for the rest of this process's life, or until the loop is stuck; then its stack goes to
    stderr, for the reader of the log."""

    def run() -> None:
        while not rounds.stuck():
            beat(write)
            time.sleep(BEAT_S)
        faulthandler.dump_traceback(sys.stderr)

    threading.Thread(target=run, name="heartbeat", daemon=True).start()
