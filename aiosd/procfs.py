"""Data about processes, read from /proc.

Processes may end while they are read. Every function here then returns "nothing" (None, an empty list, 0) instead of
raising, because for its callers a process that has ended is not an error.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Stat(NamedTuple):
    """The part of /proc/PID/stat that aiosd uses."""

    state: str  # R, S, D, T, Z, …
    ppid: int
    pgid: int
    session: int
    cpu_s: float  # user + system seconds, waited-for children not included
    started: int  # in ticks since the machine's boot: with the pid it names one process for ever
    waited_s: float = 0.0  # user + system seconds of the children that it has waited for, and theirs
    rss_bytes: int = 0  # resident, shared pages in full


def read_stat(ospid: int) -> Stat | None:
    try:
        with open(f"/proc/{ospid}/stat", "rb") as file:
            return _parsed(file.read())
    except OSError:
        return None


def read_stat_beside(folder: int) -> Stat | None:
    """Of the process in whose folder of /proc this one lies. Linux gives nothing of a later process that has the same
    number: a folder that was opened stays that of the process for which it was opened."""
    try:
        fd = os.open("../stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
        with open(fd, "rb") as file:
            return _parsed(file.read())
    except OSError:
        return None


def _parsed(data: bytes) -> Stat:
    # The name in parentheses may hold anything, so fields count from its end.
    fields = data[data.rindex(b")") + 2 :].split()
    own, waited = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    return Stat(
        fields[0].decode(),
        int(fields[1]),
        int(fields[2]),
        int(fields[3]),
        own / _TICKS,
        int(fields[19]),
        waited / _TICKS,
        int(fields[21]) * _PAGE,
    )


def is_there(ospid: int, started: int) -> bool:
    """Whether this very process exists and has not ended."""
    stat = read_stat(ospid)
    return stat is not None and stat.started == started and stat.state not in ("Z", "X")


def is_stopped(ospid: int, started: int) -> bool:
    """Whether this very process exists and is stopped (by Ctrl-Z, for example)."""
    stat = read_stat(ospid)
    return stat is not None and stat.started == started and stat.state in ("T", "t")


def name(ospid: int) -> str:
    """Its name of at most 15 bytes."""
    try:
        with open(f"/proc/{ospid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def children(ospid: int) -> list[int]:
    """Children of all threads of a process."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{ospid}/task")
    except OSError:
        return found
    for task in tasks:
        try:
            with open(f"/proc/{ospid}/task/{task}/children", "rb") as file:
                found.extend(map(int, file.read().split()))
        except OSError:
            continue
    return found


def descendants(ospid: int) -> list[int]:
    """All descendants, parents before children."""
    found = children(ospid)
    for pid in found:  # grows during the loop: breadth first
        found.extend(children(pid))
    return found


def tree(ospid: int) -> dict[int, Stat]:
    """A process and all its descendants, each read before its children."""
    found: dict[int, Stat] = {}
    pids = [ospid]
    for pid in pids:  # grows during the loop
        stat = read_stat(pid)
        if stat is not None and pid not in found:
            found[pid] = stat
            pids.extend(children(pid))
    return found


def threads_below(ospid: int, most: int) -> int:
    """The number of threads of a process and all its descendants; counting stops above `most`."""
    count, pids = 0, [ospid]
    for pid in pids:  # grows during the loop
        if count > most:
            break
        count += _threads(pid)
        pids.extend(children(pid))
    return count


def _threads(ospid: int) -> int:
    try:
        return max(0, os.stat(f"/proc/{ospid}/task").st_nlink - 2)
    except OSError:
        return 0


def run_delays(ospid: int) -> dict[int, int]:
    """For each thread of a process the nanoseconds in which it could have run and had to wait for a processor, since it
    was made; a wait is counted when it ends. Empty if the process is gone, or if Linux does not count this."""
    found = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for thread in os.listdir(f"/proc/{ospid}/task"):
            with open(f"/proc/{ospid}/task/{thread}/schedstat", "rb") as file:
                found[int(thread)] = int(file.read().split()[1])
    return found


def threads_of_machine() -> int:
    """The number of all threads of the machine, of all users."""
    try:
        with open("/proc/loadavg", "rb") as file:
            return int(file.read().split()[3].partition(b"/")[2])
    except OSError:
        return 0


def descends(ospid: int, ancestor: int) -> bool | None:
    """Whether a process is, or descends from, another. None: unknown, because one of them has ended."""
    while ospid != ancestor:
        stat = read_stat(ospid)
        if stat is None:
            return None
        if stat.ppid == 0:
            return False
        ospid = stat.ppid
    return True


def pss_bytes(ospid: int) -> int:
    """Proportional set size: private memory plus a fair share of shared memory."""
    try:
        with open(f"/proc/{ospid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def measured_pss_bytes(ospid: int) -> int | None:
    """The same; None: it cannot be read, because the process is another user's, or has made itself unreadable."""
    try:
        with open(f"/proc/{ospid}/smaps_rollup", "rb") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(b"Pss:")), 0)
    except PermissionError:
        return None
    except OSError:
        return 0


def memfds(ospid: int) -> dict[tuple[int, int], int] | None:
    """The memfds that a process holds, by device and inode, with their bytes. None: they cannot be read."""
    found = {}
    folder = f"/proc/{ospid}/fd"
    try:
        for fd in os.listdir(folder):
            path = f"{folder}/{fd}"
            try:
                if os.readlink(path).startswith("/memfd:"):
                    stat = os.stat(path)
                    found[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
            except FileNotFoundError:
                continue  # closed meanwhile
    except PermissionError:
        return None
    except OSError:
        return {}
    return found
