"""The audit: decisions about agents' deeds, as JSON lines in a file that only aiosd's user can open.

A line has the time, the agent (pid, name, group), the subject of the decision, its result, and the rule or person that
made it. It has the digest of the deed, but no arguments, because these may be secrets. A deed that is allowed because
no rule is against it has no line.

A thread writes, because a disk may hang, and the kernel does not wait for disks. So the last lines before the kernel is
killed may be missing. An agent that is denied again and again gets LINES_PER_S lines a second, and then one line with
the number of the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import json

from aiosd import threads

logger = logging.getLogger("kernel.audit")

FILE_BYTES = 8 << 20  # of a file, before the next begins,
FILES = 8  # … and how many full ones are kept
LINES_PER_S = 20  # of one agent
WAITING = 10_000  # lines that have not been written yet

_NEW = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Audit:
    """`note` a decision. The thread begins with the first."""

    def __init__(self, path: Path, size: int = FILE_BYTES, keep: int = FILES, clock: Callable[[], float] = time.time):
        self.path = path
        self._size, self._keep, self._clock = size, keep, clock
        self._lines: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._second = 0
        self._counts: dict[int, int] = {}  # lines of each agent in this second
        self._lost = 0
        self._failed = False  # the last line could not be written

    def note(self, event: str, pid: int = 0, **fields: Any) -> None:
        """Record a decision about agent `pid` (0: about no agent)."""
        now = self._clock()
        if int(now) != self._second:
            self._report_rest()
            self._second = int(now)
        count = self._counts[pid] = self._counts.get(pid, 0) + 1
        if not pid or count <= LINES_PER_S:
            self._write({"time": _iso(now), "event": event, **({"pid": pid} if pid else {}), **fields})

    def close(self) -> None:
        """Write all lines that wait. For tests and the end of the kernel."""
        self._report_rest()
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join()
            self._thread = None
        while not self._lines.empty():  # lines for which there was no thread
            self._record(self._lines.get() or b"")

    def _report_rest(self) -> None:
        for pid, count in self._counts.items():
            if pid and count > LINES_PER_S:
                self._write({"time": _iso(self._clock()), "event": "more", "pid": pid, "lines": count - LINES_PER_S})
        self._counts.clear()

    def _write(self, line: dict[str, Any]) -> None:
        if self._thread is None:
            with contextlib.suppress(OSError):  # no thread can be started: the line waits for the next one, or the end
                self._thread = threads.start(self._run, "audit")
        if self._lost:
            line["lost_before"] = self._lost
        try:
            self._lines.put_nowait(json.encode(line) + b"\n")
            self._lost = 0
        except queue.Full:
            self._lost += 1

    # ── in the thread ─────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._record(line)

    def _record(self, line: bytes) -> None:
        try:
            self._append(line)
            self._failed = False
        except OSError as err:
            if not self._failed:
                logger.error("the audit cannot be written: %s", err)
            self._failed = True

    def _append(self, line: bytes) -> None:
        fd = os.open(self.path, _NEW, 0o600)
        try:
            if os.fstat(fd).st_size + len(line) > self._size:
                os.close(fd)
                self._rotate()
                fd = os.open(self.path, _NEW, 0o600)
            os.fchmod(fd, 0o600)
            os.write(fd, line)
        finally:
            os.close(fd)

    def _rotate(self) -> None:
        """audit.jsonl.1 is the newest of the full ones."""
        for number in range(self._keep, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number - 1}") if number > 1 else self.path
            with contextlib.suppress(FileNotFoundError):
                os.replace(older, self.path.with_name(f"{self.path.name}.{number}"))


def _iso(now: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
