"""Which processes have the other end of a connection open? All that can be seen, for all connections that ask.

To find one holder is enough where a program has shown a token. Where the connection alone is to tell whose it is, all
of them count: a socket that processes of two agents have is nobody's.

One look through /proc costs milliseconds, and anybody on this machine can have one made: it takes a connection and a
request without a token. So there is one look at a time, it answers all that have asked until it began, and of all time
looks take no more than the COST-th part, apart from what BURST_S allows at once. A thousand connections cost no more
than one, and keep no other waiting for longer than two looks and a pause.

What hides is not seen: a process that does not let its descriptors be looked at, a descriptor that lies in a queue, in
io_uring or in the table of a single thread, and what a process has beyond its first MOST_DESCRIPTORS. To hide so an
accomplice needs a connection in common with an agent, and no agent gets a descriptor that it did not take (`whose`).
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
from typing import NamedTuple

from aiosd import procfs
from aiosd.gateway.identity import SocketAddress, other_end

logger = logging.getLogger("gateway")

COST = 4  # seconds for each second of looking
BURST_S = 4.0  # that may be owed before there is a pause
MOST_DESCRIPTORS = 4096  # of one process; those in a sandbox have no more

Ends = tuple[SocketAddress, SocketAddress]  # theirs and ours


class Holder(NamedTuple):
    pid: int
    started: int  # see `procfs.Stat`
    parent: int
    inode: int  # of the socket


class Holders:
    """Answers whoever asks, in an event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "holders")
        self._asked: dict[Ends, asyncio.Future[list[Holder]]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._even_at = 0.0  # when the looks until now will be paid for

    async def of(self, theirs: SocketAddress, ours: SocketAddress) -> list[Holder]:
        """None, where the other end is not connected any more, or is another user's."""
        loop = asyncio.get_running_loop()
        answer = self._asked.setdefault((theirs, ours), loop.create_future())
        if self._looking is None:
            self._looking = loop.create_task(self._look())
        return await asyncio.shield(answer)

    async def _look(self) -> None:
        """As long as anybody asks."""
        while self._asked:
            await asyncio.sleep(self._even_at - time.monotonic() - BURST_S)
            asked, self._asked = self._asked, {}
            began = time.monotonic()
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._thread, look, list(asked))
            except Exception:  # out of descriptors, say: nothing is shown
                logger.exception("who has connected was not found out")
                found = {}
            self._even_at = max(self._even_at, began) + COST * (time.monotonic() - began)
            for ends, answer in asked.items():
                answer.set_result(found.get(ends, []))
        self._looking = None


def look(asked: Iterable[Ends]) -> dict[Ends, list[Holder]]:
    """Those that have the other end of each connection; only of connections that a process of our own user has made."""
    wanted = {}
    for ends in asked:
        inode, uid = other_end(*ends)
        if inode and uid == os.getuid():
            wanted[f"socket:[{inode}]"] = ends, inode
    found: dict[Ends, list[Holder]] = {ends: [] for ends, _ in wanted.values()}
    for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()] if wanted else []:
        has, stat = _held(pid, wanted)
        for ends, inode in map(wanted.__getitem__, has):
            if stat is not None:
                found[ends].append(Holder(pid, stat.started, stat.ppid, inode))
    return found


def roots(holders: list[Holder]) -> list[Holder]:
    """Without those whose parent is a holder, too: they are of the same agent, since no agent is below another. This
    must be known of the parents."""
    pids = {one.pid for one in holders}
    return [one for one in holders if one.parent not in pids]


def _held(pid: int, wanted: Container[str]) -> tuple[set[str], procfs.Stat | None]:
    """Which of these a process has open, and what it is. All is read through one folder, so all is of one process."""
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
