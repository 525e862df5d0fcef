"""Hearing that a process lives: one byte a second through a pipe, from whoever is watched to whoever watches.

    guardian ◀─ supervisor ◀─ kernel, llm cores

The supervisor and the kernel beat in their loops, so a loop that hangs falls silent. A core beats from a thread of
its own, because one step of a big model may take long and is no hang: a core falls silent when it is stopped, or stuck
with the interpreter's lock held. Whoever has been silent for `HANG_S` is killed by its watcher, and replaced.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

BEAT_S = 1.0
HANG_S = 5.0


class Heart:
    """The watcher's side. The writing end is `write`, for the child that is about to be forked."""

    __slots__ = ("_heard", "_looked", "read", "write")

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._heard = self._looked = time.monotonic()

    def forked(self) -> None:
        """The child has its end; ours would keep the pipe open."""
        os.close(self.write)
        self.write = -1

    def close(self) -> None:
        os.close(self.read)
        if self.write >= 0:
            os.close(self.write)

    def hangs(self, clock: Callable[[], float] = time.monotonic) -> bool:
        """To be asked about every `BEAT_S`. A watcher that was stopped itself has heard nothing meanwhile, which
        proves nothing: then the count starts anew."""
        now = clock()
        late = now - self._looked > 2 * BEAT_S
        self._looked = now
        heard = False
        with contextlib.suppress(BlockingIOError):
            heard = bool(os.read(self.read, 4096))
        if heard or late:
            self._heard = now
        return now - self._heard > HANG_S


def beat(write: int) -> None:
    """One beat. A full pipe has beats enough; a closed one has no listener."""
    with contextlib.suppress(BlockingIOError, BrokenPipeError):
        os.write(write, b".")


def beat_in_background(write: int) -> None:
    """Beat from a thread for the rest of this process's life."""

    def run() -> None:
        while True:
            beat(write)
            time.sleep(BEAT_S)

    threading.Thread(target=run, name="heartbeat", daemon=True).start()
