"""The log of a detached agent: its files, the index beside them, and reading them in order.

    7.log               what agent 7 writes to, through a descriptor of its own
    7.idx               the sizes of 7.log over time
    7.log.1  7.idx.1    earlier output; .2 is older than .1, and so on
    names               the name of each agent that has, or had, a log: `7 planner`, in the order in which they began

The agent writes straight into 7.log, so its lines carry no time. The index has a record of 16 bytes (Unix time as
float64, size of the log in bytes as uint64, little-endian) for each sample that found the log larger, or smaller, than
before. The kernel samples once a second (`aiosd.kernel.logkeeper`), so --since and --until are exact to about a second.

The agent's descriptor cannot be replaced. So a log is shortened at its beginning: the first bytes are copied to another
file, and then cut off (see `aiosd.kernel.logkeeper`). The index of a log that was cut begins with a record of the time
0, whose size is the number of all bytes cut off so far. So every byte that an agent has written has a permanent number,
and a reader finds its place again after a cut. A lock (flock) on 7.log is held during a cut, and by a reader while it
checks the files and reads a block.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

NAMES = "names"
RECORD = struct.Struct("<dQ")  # Unix time, size of the log then
BLOCK = 1 << 16

Record = tuple[float, int]


def index_path(log: str) -> str:
    """The path of the index of `7.log` or `7.log.1`."""
    stem, _, number = log.rpartition(".log")
    return f"{stem}.idx{number}"


def rotated_path(log: str, number: int) -> str:
    return f"{log}.{number}"


def read_names(folder: str) -> dict[int, str]:
    """The names of agents, in the order in which they began. Lines that no keeper wrote are left out."""
    names: dict[int, str] = {}
    try:
        with open(os.path.join(folder, NAMES), "rb") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return names
    for line in lines:
        pid, _, name = line.partition(b" ")
        if name and pid.isdigit() and len(pid) < 20:
            names[int(pid)] = os.fsdecode(name)
    return names


def remove(log: str) -> None:
    """Remove a log with all its files. A missing file is no error."""
    number = 0
    while _unlink(log if number == 0 else rotated_path(log, number)) or number == 0:
        _unlink(index_path(log if number == 0 else rotated_path(log, number)))
        number += 1


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


# ── the index ─────────────────────────────────────────────────────────────────────────────────────────────


class LogIndex(NamedTuple):
    """The content of one index."""

    cut: int = 0  # bytes that were written before the log begins
    records: list[Record] = []  # noqa: RUF012 # never changed


def read_index(path: str) -> LogIndex:
    """Read all whole records; none if there is no index."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return LogIndex()
    records = list(RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size]))
    if records and records[0][0] == 0.0:
        return LogIndex(records[0][1], records[1:])
    return LogIndex(0, records)


def _read_cut(path: str) -> int:
    """How many bytes were cut off from the log, without reading all of its index."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        head = file.read(RECORD.size)
        if len(head) == RECORD.size:
            moment, cut = RECORD.unpack(head)
            return int(cut) if moment == 0.0 else 0
    return 0


def written_before(records: list[Record], when: float, size: int) -> int | None:
    """How much of a log of `size` bytes had been written at `when`, at most; None: the index does not go back so far.
    A log that was truncated since then (it was smaller afterwards) has nothing left of that time: 0."""
    found = None
    last = 0
    for moment, there in [*records, (float("inf"), size)]:
        if there < last:
            found = 0 if found is not None else None
        if moment < when:
            found = there
        last = there
    return found


def written_until(records: list[Record], when: float, size: int) -> int:
    """How much of it had been written at `when`, at least; all of it if the index has no later record."""
    return next((min(there, size) for moment, there in records if moment >= when), size)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────


class LogPart(NamedTuple):
    """One file of a log, which holds the bytes from number `start` to `end`."""

    path: str
    start: int
    end: int


class LogReader:
    """Reads a log from a place on, across its files, while they change. `read` returns the next bytes, b"" at the
    end."""

    def __init__(self, log: str) -> None:
        """Raises FileNotFoundError."""
        self.log = log
        self._file = open(log, "rb")  # noqa: SIM115 # open as long as the reader is
        self._at = 0  # the number of the byte that is read next
        self._end: int | None = None  # where to stop

    def close(self) -> None:
        self._file.close()

    def seek(self, since: float | None = None, until: float | None = None, tail: int | None = None) -> None:
        """Go to the beginning; or to the output since a moment; or to the last `tail` lines of that. `until`: stop at
        the output of that moment."""
        with self._locked():
            parts = self._parts()
            start = parts[0].start if since is None else _start(parts, since)
            end = parts[-1].end if until is None else max(start, _written_by(parts, until))
            self._at = start if tail is None else start_of_tail(parts, tail, start, end)
            self._end = None if until is None else end

    def read(self, limit: int = BLOCK) -> bytes:
        if self._end is not None:
            limit = min(limit, self._end - self._at)
        if limit <= 0:
            return b""
        with self._locked():
            parts = self._parts()
            if self._at < parts[0].start:  # the next bytes were removed
                self._at = parts[0].start
            if self._at > parts[-1].end:  # truncated by another program: the content is new
                self._at = parts[-1].start
            data = pread(parts, limit, self._at)
        self._at += len(data)
        return data

    def _parts(self) -> list[LogPart]:
        """All files of the log, the oldest first, the current one last."""
        start = _read_cut(index_path(self.log))
        found = [LogPart(self.log, start, start + os.fstat(self._file.fileno()).st_size)]
        with contextlib.suppress(FileNotFoundError):
            while True:
                path = rotated_path(self.log, len(found))
                start = found[-1].start
                found.append(LogPart(path, start - os.stat(path).st_size, start))
        return found[::-1]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def pread(parts: list[LogPart], size: int, start: int) -> bytes:
    """Up to `size` bytes from number `start` on, as long as the files do not change; fewer at the end."""
    found = b""
    for part in parts:
        if len(found) < size and part.start <= start < part.end:
            with open(part.path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), min(size - len(found), part.end - start), start - part.start)
            found += data
            start += len(data)
    return found


def _start(parts: list[LogPart], since: float) -> int:
    """The number of the first byte written after `since`, from the newest index that goes back so far."""
    for part in reversed(parts):
        size = part.end - part.start
        before = written_before(read_index(index_path(part.path)).records, since, size)
        if before is not None:
            return part.start + min(before, size)
    return parts[0].start


def _written_by(parts: list[LogPart], until: float) -> int:
    """The number of the byte after the last one written by `until`, from the first file whose index has a later
    record."""
    for part in parts:
        size = part.end - part.start
        upto = written_until(read_index(index_path(part.path)).records, until, size)
        if upto < size:
            return part.start + upto
    return parts[-1].end


def start_of_tail(parts: list[LogPart], lines: int, start: int, end: int) -> int:
    """The place where the last `lines` lines before `end` begin, at `start` or after it. A last line without newline
    counts as one."""
    if lines == 0:
        return end
    position = end
    newlines = 0
    while position > start:
        step = min(BLOCK, position - start)
        position -= step
        block = pread(parts, step, position)
        searched = len(block) - 1 if position + step == end and block.endswith(b"\n") else len(block)
        while (searched := block.rfind(b"\n", 0, searched)) >= 0:
            newlines += 1
            if newlines == lines:
                return position + searched + 1
    return start
