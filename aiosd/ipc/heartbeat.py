"""Signs of life: one byte a second through a pipe, from a process that is watched to the process that watches it.

    guardian ◀─ supervisor ◀─ kernel, llm cores

The supervisor and the kernel send heartbeats in their loops, so none come when a loop hangs. A core sends them from a
thread of its own, because one step of a big model may take long and is no hang. So none come when the core is stopped,
or stuck with the interpreter's lock held; and the thread stops sending when the loop has not finished a round for too
long (see `Rounds`). A process that has sent no heartbeat for `HANG_S` is killed by its watcher, and replaced. The
supervisor waits for the disk at its start and at its end: it has `START_S` until its first heartbeat, and at its end a
thread sends heartbeats for it.

On a machine with too much to do a healthy process may get no processor for seconds. Linux counts the time in which a
thread could run and had to wait (`procfs.run_delays`); that time is no silence.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from aiosd import procfs

logger = logging.getLogger("heartbeat")

BEAT_S = 1.0
HANG_S = 5.0
START_S = 60.0


class Heart:
    """The watcher's side. The writing end is `write`, for the child that is about to be forked."""

    __slots__ = ("_delays", "_excused", "_looked", "_received", "beaten", "read", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._received = self._looked = time.monotonic()
        self._delays: dict[int, int] = {}  # of the threads that are watched, when the silence began
        self._excused = False
        self.beaten = False  # at least one heartbeat has come

    def forked(self) -> None:
        """Close the writing end here: the child has it, and this one would keep the pipe open."""
        os.close(self.write)
        self.write = -1

    def close(self) -> None:
        os.close(self.read)
        if self.write >= 0:
            os.close(self.write)

    def hangs(
        self, clock: Callable[[], float] = time.monotonic, silent_s: float = HANG_S, ospid: int | None = None
    ) -> bool:
        """Whether no heartbeat came for `silent_s`; to be called about every `BEAT_S`. If the watcher itself was
        stopped, no heartbeat could be read meanwhile, which proves nothing: then the count starts anew. Nor is the time
        counted in which the process `ospid` waited for a processor, but for START_S at most."""
        now = clock()
        late = now - self._looked > 2 * BEAT_S
        self._looked = now
        received = False
        with contextlib.suppress(BlockingIOError):
            received = bool(os.read(self.read, 4096))
        self.beaten = self.beaten or received
        if received or late:
            self._received, self._delays, self._excused = now, {}, False
        silent = now - self._received
        if ospid is not None and silent > BEAT_S and not self._delays:
            self._delays = procfs.run_delays(ospid)
        if silent <= silent_s:
            return False
        return silent > max(START_S, silent_s) or not self._starved(ospid, silent, silent_s)

    def _starved(self, ospid: int | None, silent: float, silent_s: float) -> bool:
        """Whether the silence is explained by the wait for a processor."""
        if ospid is None:
            return False
        now = procfs.run_delays(ospid)
        waited = max((delay - self._delays.get(thread, delay) for thread, delay in now.items()), default=0) / 1e9
        if silent - waited > silent_s:
            return False
        if not self._excused:
            self._excused = True
            logger.warning(
                "no heartbeat of process %d for %.1f s; %.1f s of that it waited for a processor", ospid, silent, waited
            )
        return True


def beat(write: int) -> None:
    """Send one heartbeat. If the pipe is full there are enough in it; if it is closed there is no watcher."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(write, b".")


class Rounds:
    """The rounds of a service's loop, noted so that a hang can be noticed.

    How long a round may take follows from earlier rounds: ten times the longest, and at least half a minute; five
    minutes for the first ones. There is no limit while the service loads (before the first round) and while it sleeps
    without work. A round that exceeds the limit is a hang.
    """

    FACTOR, LEAST_S = 10.0, 30.0
    FIRST, FIRST_S = 20, 300.0

    __slots__ = ("_clock", "_longest", "_number", "_since")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None  # when the current round began
        self._longest = 0.0
        self._number = 0

    def begin(self) -> None:
        """A round begins; the one before it, if any, is over."""
        self.end()
        self._since = self._clock()

    def end(self) -> None:
        """The loop sleeps."""
        since, self._since = self._since, None
        if since is not None:
            self._number += 1
            self._longest = max(self._longest, self._clock() - since)

    @property
    def longest_allowed_s(self) -> float:
        return self.FIRST_S if self._number < self.FIRST else max(self.LEAST_S, self.FACTOR * self._longest)

    def stuck(self) -> bool:
        """Whether the loop hangs. Called by another thread."""
        since = self._since
        return since is not None and self._clock() - since > self.longest_allowed_s


def beat_in_background(write: int, rounds: Rounds) -> None:
    """Send heartbeats from a thread for the rest of this process's life, or until the loop hangs; then its stack is
    written to stderr, for the log."""

    def run() -> None:
        while not rounds.stuck():
            beat(write)
            time.sleep(BEAT_S)
        faulthandler.dump_traceback(sys.stderr)

    threading.Thread(target=run, name="heartbeat", daemon=True).start()
