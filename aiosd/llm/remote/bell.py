"""What ends the sleep of a core's loop: an exchange's thread that has read something, or a time that has come."""

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
        """Readable when it has rung."""
        return self._fd

    def ring(self) -> None:
        """From any thread."""
        if not self._closed:
            os.eventfd_write(self._fd, 1)

    def ring_in(self, seconds: float) -> None:
        """Unless it rings by then anyhow."""
        now = time.monotonic()
        if self._timer is not None:
            if now < self._rings_at <= now + seconds:
                return
            self._timer.cancel()
        self._rings_at = now + seconds
        self._timer = threading.Timer(seconds, self.ring)
        self._timer.daemon = True
        self._timer.start()

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def stop(self) -> None:
        """The timer rings no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def close(self) -> None:
        self._closed = True  # a thread that hangs all the same must not ring what the number stands for by then
        os.close(self._fd)
