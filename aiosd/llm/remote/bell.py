"""Wakes the loop of a core: rung by an exchange's thread that has read something, or at a set time."""

from __future__ import annotations

import contextlib
import os
import threading
import time


class Bell:
    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        self._timer: threading.Timer | None = None
        self._rings_at = 0.0

    def fileno(self) -> int:
        """A descriptor that is readable when the bell has rung."""
        return self._fd

    def ring(self) -> None:
        """Ring, from any thread."""
        if not self._closed:
            os.eventfd_write(self._fd, 1)

    def ring_in(self, seconds: float) -> None:
        """Ring after this time, unless it will ring before anyhow."""
        now = time.monotonic()
        if self._timer is not None:
            if now < self._rings_at <= now + seconds:
                return
            self._timer.cancel()
        self._rings_at = now + seconds
        self._timer = threading.Timer(seconds, self.ring)
        self._timer.daemon = True
        try:
            self._timer.start()
        except RuntimeError:  # no thread can be started: the core's sleep ends by itself after some seconds
            self._timer = None

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def close(self) -> None:
        self._closed = True  # a thread that still runs must not write to another file with the same number
        os.close(self._fd)
