"""Finds all processes that have the other end of a TCP connection open, for many connections in one scan of /proc.

If a program has sent a token, one process that has the connection is enough. If the connection alone has to prove its
agent, all of them count: a socket that processes of two agents have belongs to neither.

A scan takes milliseconds, and every local program can cause one: with a connection, and a request without a token. So
there is one scan at a time, it serves all connections that wait when it begins, and scans take one part in COST of one
processor, apart from what BURST_S allows at once. A thousand connections cost no more than one, and none waits for
longer than two scans and a pause.

Some processes are not found: those whose descriptors aiosd may not read, and those that have the socket in a queue, in
io_uring, in the descriptor table of a single thread, or after their first MOST_DESCRIPTORS descriptors. To misuse that,
a process needs a connection in common with an agent; `owners` shows which ways there are to that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from aiosd import procfs, threads
from aiosd.gateway.identity import SocketAddress, other_end

logger = logging.getLogger("gateway")

COST = 4  # seconds that must pass for each second of a processor; without a pause up to
BURST_S = 4.0  # … this much of it
MOST_DESCRIPTORS = 4096  # of one process; those in a sandbox have no more

Ends = tuple[SocketAddress, SocketAddress]  # theirs and ours


class SocketHolder(NamedTuple):
    pid: int
    started: int  # see `procfs.Stat`
    parent: int
    inode: int  # of the socket


class Holders:
    """The scans, in a thread, for the event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "holders")
        self._asked: dict[Ends, asyncio.Future[list[SocketHolder]]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._even_at = 0.0  # when enough time has passed for all scans until now

    async def of(self, theirs: SocketAddress, ours: SocketAddress) -> list[SocketHolder]:
        """Empty if the other end is no longer connected, or belongs to another user. Raises OSError (EAGAIN) if no
        thread can be started."""
        loop = asyncio.get_running_loop()
        answer = self._asked.setdefault((theirs, ours), loop.create_future())
        if self._looking is None:
            self._looking = loop.create_task(self._look())
        return await asyncio.shield(answer)

    async def _look(self) -> None:
        """Scan as long as connections wait."""
        while self._asked:
            await asyncio.sleep(self._even_at - time.monotonic() - BURST_S)
            asked, self._asked = self._asked, {}
            began = time.monotonic()
            try:
                found, cpu_s = await asyncio.wrap_future(threads.submit(self._thread, partial(_timed, list(asked))))
            except OSError as err:
                for answer in asked.values():
                    answer.set_exception(err)
                continue
            self._even_at = max(self._even_at, began) + COST * cpu_s
            for ends, answer in asked.items():
                answer.set_result(found.get(ends, []))
        self._looking = None


def _timed(asked: list[Ends]) -> tuple[dict[Ends, list[SocketHolder]], float]:
    """What a scan found, and the seconds of processor time that it took."""
    began = time.thread_time()
    found = {}
    try:
        found = look(asked)
    except Exception:  # no descriptors left, for example: nothing is proved then
        logger.exception("/proc could not be scanned for the processes of a connection")
    return found, time.thread_time() - began


def look(asked: Iterable[Ends]) -> dict[Ends, list[SocketHolder]]:
    """The processes that have the other end of each connection, for connections that aiosd's own user has made."""
    wanted = {}
    for ends in asked:
        with contextlib.suppress(OSError):  # an address that Linux cannot look up: that costs this connection alone
            inode, uid = other_end(*ends)
            if inode and uid == os.getuid():
                wanted[f"socket:[{inode}]"] = ends, inode
    found: dict[Ends, list[SocketHolder]] = {ends: [] for ends, _ in wanted.values()}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()] if wanted else []:
        has, stat = _held(pid, wanted)
        for ends, inode in map(wanted.__getitem__, has):
            if stat is not None:
                found[ends].append(SocketHolder(pid, stat.started, stat.ppid, inode))
    return found


def roots(holders: list[SocketHolder]) -> list[SocketHolder]:
    """Without processes whose parent is one of them, too: they belong to the same agent as their parent, since no
    agent's process is below another agent's."""
    pids = {one.pid for one in holders}
    return [one for one in holders if one.parent not in pids]


def _held(pid: int, wanted: Container[str]) -> tuple[set[str], procfs.Stat | None]:
    """Which of these sockets a process has open, and its stat. Both are read through one folder of /proc, and so from
    one and the same process."""
    with contextlib.suppress(OSError):  # it has ended, or does not let us
        folder = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in itertools.islice(entries, MOST_DESCRIPTORS)]
            found = {target for name in names if (target := _target(name, folder)) in wanted}
            return found, procfs.read_stat_beside(folder) if found else None
        finally:
            os.close(folder)
    return set(), None


def _target(name: str, folder: int) -> str:
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:  # closed meanwhile
        return ""
