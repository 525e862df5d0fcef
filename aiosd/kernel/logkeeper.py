"""Keeps the logs of agents within their limits: samples sizes, makes room, removes logs of forgotten agents; and writes
down their names, so that a person finds the logs of earlier boots.

Once a second the kernel looks at the size of each log (one stat), and writes it to the log's index if it changed. Work
that may wait for a disk is done by a separate thread, which exists only while there is work, so that the kernel's loop
never waits. A log belongs to the loop or to the thread, never to both (`_busy`).

Making room (`rotate`). Only the agent writes to its log, and only at the end, so the existing part does not change. It
is copied to `7.log.1`, and then the beginning of the log is cut off, by fallocate(2) with COLLAPSE_RANGE: what the
agent writes meanwhile stays in the log, and nothing is lost. ext4 and xfs can do that, in whole blocks; the rest of a
block stays in the log. On other file systems (btrfs, tmpfs, network ones) copying continues until it has caught up
with the agent, and the log is truncated: what the agent writes between the last read and the truncation (some
microseconds) is lost.

The process table decides which dead agents are remembered (keep_dead). Logs of earlier boots count as dead agents too:
they are removed, the oldest first, when more recent dead agents need their places (`forget`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from pathlib import Path

from aiosd import threads
from aiosd.logs.agentlog import (
    NAMES,
    RECORD,
    LogIndex,
    Record,
    index_path,
    read_index,
    read_names,
    remove,
    rotated_path,
)

logger = logging.getLogger("kernel")

COLLAPSE_RANGE = 0x08  # of fallocate(2)
COPY_BYTES = 1 << 20
SPARE_NAMES = 1024  # lines without a log in the file of names, beyond which it is written again
INDEX_RECORDS = 1 << 16  # most records of one index; then every second record of the older half is dropped
LOCK_PATIENCE_S = 1.0  # how long to wait for a reader that holds the lock: it may have been stopped
NEW = ".new"  # suffix of an incomplete copy


class LogKeeper:
    """Called by the kernel's loop alone."""

    def __init__(self, folder: Path, size: int, keep: int, keep_dead: int) -> None:
        """`size`: 0 means that there is no limit."""
        self._folder = folder
        self._limit, self._keep = size, keep
        self._keep_dead = keep_dead
        self._old: deque[int] = deque()  # agents of earlier boots whose logs are kept, the oldest first
        self._names: dict[int, str] = {}  # of all agents whose logs are kept
        self._lines = 0  # in the file of names
        self._sizes: dict[str, int] = {}  # as last written to the indexes
        self._busy: set[str] = set()  # logs that belong to the thread
        self._refused: set[str] = set()  # logs that could not be cut, already reported
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # guards `_jobs` and `_worker`
        self._worker: threading.Thread | None = None

    def begun(self, pid: int, name: str) -> None:
        """An agent with a log has begun. If the disk refuses, its log is only found by its pid after this boot."""
        if self._names.get(pid) == name:
            return
        self._names[pid] = name
        self._lines += 1
        with contextlib.suppress(OSError):
            if self._lines > 2 * len(self._names) + SPARE_NAMES:
                self._write_names()
            else:
                _append_line(self._folder / NAMES, _line(pid, name))

    def _write_names(self) -> None:
        path = self._folder / NAMES
        path.with_suffix(NEW).write_bytes(b"".join(_line(pid, name) for pid, name in self._names.items()))
        os.replace(path.with_suffix(NEW), path)
        self._lines = len(self._names)

    def sample(self, log: str) -> None:
        """Write the log's size to its index if it changed, and make room if needed. If the disk refuses, only times are
        lost, never output."""
        if log in self._busy:
            self._work_on()
            return
        with contextlib.suppress(OSError):
            size = os.stat(log).st_size
            if size != self._sizes.get(log, 0):
                note(log, size)
                self._sizes[log] = size
            if self._limit and size > self._limit:
                self._busy.add(log)
                self._do(lambda: self._make_room(log))

    def close(self, log: str) -> None:
        """The last sample, at the agent's end."""
        self.sample(log)
        if log in self._busy:
            self._do(lambda: self.close(log))
        else:
            self._sizes.pop(log, None)
            self._refused.discard(log)

    def start(self, known: Container[int], dead: int) -> None:
        """Find the logs of agents that are not `known`: those of earlier boots. `dead`: how many dead agents are
        remembered. Incomplete copies of a kernel that died, and indexes without a log, are removed."""
        pids = {int(path.stem) for path in self._folder.glob("*.log") if path.stem.isdecimal()}
        self._old = deque(sorted(pid for pid in pids if pid not in known))
        with contextlib.suppress(OSError):
            names = read_names(str(self._folder))
            self._names = {pid: name for pid, name in names.items() if pid in pids}
            if names:
                self._write_names()  # without those that have gone, and with the end of a line that was cut off
        self._do(self._sweep)
        self.forget([], dead)

    def forget(self, pids: Iterable[int], dead: int) -> None:
        """Remove the logs of these agents; `dead`: how many dead agents are still remembered. Old logs may use the rest
        of `keep_dead`."""
        old = [self._old.popleft() for _ in range(min(len(self._old), len(self._old) + dead - self._keep_dead))]
        for pid in (*pids, *old):
            self._names.pop(pid, None)
            log = str(self._folder / f"{pid}.log")
            self._do(partial(_remove, log))

    def wait(self, timeout: float) -> None:
        """Wait until all requested work is done."""
        worker = self._worker
        if worker is not None:
            worker.join(timeout)

    # ── the thread ────────────────────────────────────────────────────────────────────────────────────────

    def _do(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._jobs.append(job)
        self._work_on()

    def _work_on(self) -> None:
        """Have a thread for the jobs. If none can be started, they wait for the next call."""
        with self._lock, contextlib.suppress(OSError):
            if self._jobs and self._worker is None:
                self._worker = threads.start(self._work, "logs")

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._worker = None
                    return
                job = self._jobs.popleft()
            job()

    def _make_room(self, log: str) -> None:
        try:
            rotate(log, self._limit, self._keep)
            self._refused.discard(log)
        except FileNotFoundError:
            pass  # it was removed meanwhile
        except OSError as err:
            if log not in self._refused:
                self._refused.add(log)
                logger.warning("%s has more than its %d bytes, and cannot be cut: %s", log, self._limit, err.strerror)
        finally:
            with contextlib.suppress(OSError):
                records = read_index(index_path(log)).records
                self._sizes[log] = records[-1][1] if records else 0
            self._busy.discard(log)

    def _sweep(self) -> None:
        for path in (*self._folder.glob(f"*{NEW}"), *self._folder.glob("*.idx")):
            if path.suffix == NEW or not path.with_suffix(".log").exists():
                path.unlink(missing_ok=True)


def _line(pid: int, name: str) -> bytes:
    """A line of the file of names; a name has no blanks and no line ends (`wire.Name`)."""
    return b"%d %b\n" % (pid, os.fsencode(name))


def _append_line(path: Path, line: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)  # half the time of `open`
    try:
        os.write(fd, line)
    finally:
        os.close(fd)


def _remove(log: str) -> None:
    try:
        remove(log)
    except OSError as err:
        logger.warning("%s cannot be removed: %s", log, err.strerror)


# ── the index ─────────────────────────────────────────────────────────────────────────────────────────────


def note(log: str, size: int) -> None:
    """Append a record to the log's index."""
    path = index_path(log)
    with open(path, "ab") as file:
        file.write(RECORD.pack(time.time(), size))
        full = file.tell() >= INDEX_RECORDS * RECORD.size
    if full:
        cut, records = read_index(path)
        half = len(records) // 2
        write_index(path, LogIndex(cut, [*records[:half:2], *records[half:]]))


def write_index(path: str, index: LogIndex) -> None:
    head = [(0.0, index.cut)] if index.cut else []
    with open(path + NEW, "wb") as file:
        file.write(b"".join(RECORD.pack(*record) for record in [*head, *index.records]))
    os.replace(path + NEW, path)


def cut_index(index: LogIndex, start: int, end: int) -> LogIndex:
    """The part of an index for the bytes from `start` to `end`, as the index of a log with only these bytes."""
    records: list[Record] = []
    for moment, size in index.records:
        if size > start:
            records.append((moment, min(size, end) - start))
            if size >= end:
                break
    return LogIndex(index.cut + start, records)


# ── making room ───────────────────────────────────────────────────────────────────────────────────────────


def rotate(log: str, limit: int, keep: int) -> None:
    """Move the oldest bytes of a log with more than `limit` bytes to full files of that size, of which `keep` are kept.
    Raises OSError, and leaves the log unchanged, when there is no room for the copies."""
    with open(log, "r+b", buffering=0) as file:
        size, chunk = os.fstat(file.fileno()).st_size, _whole_blocks(file.fileno(), limit)
        # The last byte stays: a range that reaches the end of a file cannot be cut off.
        starts = range(0, (size - 1) // chunk * chunk, chunk)[-keep:]
        copies = [(start, start + chunk) for start in starts]
        if not copies:
            return
        try:
            for number, (start, upto) in enumerate(copies):
                _copy(file.fileno(), start, upto, _copy_path(log, number))
            with _locked(file.fileno()):
                _publish(log, file.fileno(), copies, keep)
        except OSError:
            for number in range(len(copies)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_copy_path(log, number))
            raise


def _copy_path(log: str, number: int) -> str:
    return f"{log}.{number}{NEW}"


def _whole_blocks(fd: int, limit: int) -> int:
    """The largest part of the limit that can be cut off: whole blocks of the file system."""
    return limit - limit % max(os.fstatvfs(fd).f_frsize, 1) or limit


def _copy(source: int, start: int, end: int, path: str) -> None:
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _append(source, start, end, target)
    finally:
        os.close(target)


def _append(source: int, start: int, end: int, target: int) -> int:
    """Copy the bytes from `start` to `end`, or to the end of the source; returns where the copy ended."""
    while start < end:
        copied = os.sendfile(target, source, start, min(COPY_BYTES, end - start))
        if copied == 0:
            break
        start += copied
    return start


def _publish(log: str, fd: int, copies: list[tuple[int, int]], keep: int) -> None:
    """Make the copies the newest full files; then cut their content from the log. In that order, so that a death in
    between leaves something twice, and loses nothing."""
    index = read_index(index_path(log))
    end = copies[-1][1]
    for number, (start, upto) in enumerate(copies):
        _shift(log, keep)
        write_index(index_path(rotated_path(log, 1)), cut_index(index, start, upto))
        os.replace(_copy_path(log, number), rotated_path(log, 1))
    if not _collapse(fd, end):
        target = os.open(rotated_path(log, 1), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.lseek(target, 0, os.SEEK_END)
            end = _append(fd, end, 1 << 62, target)
        finally:  # also on a full disk: else all of it would be copied again a second later
            os.ftruncate(fd, 0)
            os.close(target)
        write_index(index_path(rotated_path(log, 1)), cut_index(index, copies[-1][0], end))
    write_index(index_path(log), cut_index(index, end, 1 << 62))


def _shift(log: str, keep: int) -> None:
    """`.1` becomes `.2`, and so on; the last one is removed."""
    count = 1
    while os.path.exists(rotated_path(log, count)):
        count += 1
    for number in range(count - 1, 0, -1):
        path = rotated_path(log, number)
        older = rotated_path(log, number + 1)
        for old, new in ((path, older), (index_path(path), index_path(older))):
            with contextlib.suppress(FileNotFoundError):
                if number < keep:
                    os.replace(old, new)
                else:
                    os.unlink(old)


def _collapse(fd: int, end: int) -> bool:
    """Cut off the first `end` bytes; False if the file system cannot do that."""
    import ctypes

    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return bool(fallocate(fd, COLLAPSE_RANGE, 0, end) == 0)


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[None]:
    """Take the lock, so that no reader reads meanwhile. A reader that keeps its lock too long may read something
    twice."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
