"""Agent pids: small numbers from 1 up, never used twice in one home.

The highest number that may have been given out is kept in a file, ahead of use and in blocks, so that a spawn
seldom waits for the disk and a crash wastes numbers but never repeats one.
"""

from __future__ import annotations

import os
from pathlib import Path

BLOCK = 256


class PidCounter:
    """`next()` raises OSError when the disk refuses a new block; no number is lost or doubled then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = max(1, self._read())  # 1 is aiosd itself
        self._reserved = self._last

    def _read(self) -> int:
        try:
            return int(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return 1

    def next(self) -> int:
        if self._last >= self._reserved:
            self._reserve(self._last + BLOCK)
        self._last += 1
        return self._last

    def release(self) -> None:
        """At a clean end: the unused rest of the block may be given out by the next boot."""
        self._reserve(self._last)

    def _reserve(self, upto: int) -> None:
        new = self._path.with_suffix(".new")
        with open(new, "w") as file:
            file.write(str(upto))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._path)
        self._reserved = upto
