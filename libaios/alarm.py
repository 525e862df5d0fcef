"""A timer that is a descriptor: it becomes readable at its time, so whatever polls descriptors can wait for it.

Python has none before 3.13 (`os.timerfd_create`), so this calls the C library. ctypes is loaded at the first alarm, not
at import: most processes never need one.
"""

from __future__ import annotations

import os
import struct
import time


class Alarm:
    """One timer. Only `close` needs care: no other thread may use the alarm at that moment."""

    def __init__(self) -> None:
        import ctypes

        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def fileno(self) -> int:
        return self._fd

    def ring_in(self, seconds: float) -> None:
        """Become readable after this time, and stay readable until the next call. So an owner that is interrupted
        before it has done what was due finds the alarm still readable."""
        nanoseconds = max(1, int(seconds * 1e9))  # 0 would turn the alarm off
        setting = struct.pack("@4l", 0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
        self._libc.timerfd_settime(self._fd, 0, setting, None)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
