"""Spares: processes forked before they are needed, while many agents are being started.

An agent shares its memory with the supervisor until one of them writes to it. Between two forks the supervisor writes
to about 0.8 MB of pages (mostly reference counts), which costs every agent a copy of these. The agents of a batch,
forked with nothing done in between, share these pages; and the next spawns need not wait for a fork.

A batch is forked by a brooder: a child of the supervisor that forks the spares, reports their pids, and ends, whereupon
Linux makes them children of the supervisor. So the supervisor goes on meanwhile, and does not fork 64 times in a row.

    supervisor ──fork──▶ brooder ──fork──▶ spare, spare, …     the pids come through a pipe
               ◀──────── ends              spare becomes an agent

A spare waits at a socket for the agent that it becomes, and has no other descriptors but those with which it would
confine itself: the cage's, and those that its brooder has opened (`confinement.open_common`). Through the same socket
it then reports whether it can start (`report`). The first of many spawns is forked alone, the second orders a small
batch, and each later batch is larger; the next is ordered when a quarter of one is used. (When it was half of one,
every eighth agent came before its batch was there, and was forked alone: on two cores that are busy with the spawns the
brooder gets a small part of the time.) Spares that are not used for a while exit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
from array import array
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import msgpack

from aiosd.birth import confinement, heap, modules
from aiosd.birth.agent import Descriptors, become_agent, prepare
from aiosd.birth.fork import fork, fork_again, keep_only, name_process
from aiosd.ipc import link
from aiosd.kin import die_with_parent
from aiosd.sandbox import cage
from aiosd.timers import Timers

BATCH = (4, 64)  # the first one and the largest; each is twice the one before
HURRY_S = 0.1  # after two spawns within this time, more are likely to follow
IDLE_S = 0.5
FRESH_S = 2.0  # a spare that has waited longer is not used: files that its brooder has opened may have been replaced
PID = struct.Struct("=i")  # of a spare, as brooders and templates report it
LARGEST = 64 << 10  # bytes of a message that a new socket always takes at once

_decode = msgpack.Decoder(tuple[link.Fork, int, str]).decode


class Spare(NamedTuple):
    ospid: int
    sock: socket.socket  # the supervisor's end
    since: float  # when it was ready


@dataclass(slots=True)
class Brooder:
    ospid: int
    socks: list[socket.socket]  # the supervisor's ends, one for each spare
    pipe: int  # the pipe through which the pids come


class Spares:
    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._waiting: deque[Spare] = deque()  # the oldest first
        self._brooder: Brooder | None = None
        self._born: list[int] = []  # its spares; 0 for one that has ended
        self._leaving: set[int] = set()  # those that have been dismissed
        self._last = float("-inf")  # when an agent was started
        self._batch = BATCH[0]

    def ospids(self) -> set[int]:
        """The Linux pids of the brooder, and of spares that are no agents yet, or will never be."""
        found = {spare.ospid for spare in self._waiting} | self._leaving
        if self._brooder is not None:
            found |= {self._brooder.ospid, *self._read(self._brooder)}
        return found

    def start(
        self, spec: link.Fork, pid: int, home: str, stdio: tuple[int, int, int], memfd: int, bell: int, letter: int
    ) -> tuple[int, socket.socket]:
        """Turn a spare or a new process into the agent `spec`, what it runs is in `letter`; returns its Linux pid and
        the socket of its report. Raises OSError when Linux cannot create a process."""
        modules.hide()
        now = self._timers.clock()
        hurry, self._last = now - self._last < HURRY_S, now
        started = self._turn_spare(msgpack.encode((spec, pid, home)), (*stdio, memfd, bell, letter))
        if hurry and self._brooder is None and len(self._waiting) <= self._batch - self._batch // 4:
            self._order()
        if started is not None:
            return started
        ours, theirs = pair()
        try:
            fds = Descriptors(stdio, memfd, bell, letter, theirs.fileno())
            return fork(lambda: _begin(spec, pid, home, fds)), ours
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()

    def _turn_spare(self, payload: bytes, fds: tuple[int, ...]) -> tuple[int, socket.socket] | None:
        while self._waiting and len(payload) <= LARGEST:
            spare = self._waiting.popleft()
            if self._timers.clock() - spare.since <= FRESH_S:
                with contextlib.suppress(OSError):  # it was killed, or no descriptor is left: the next one shows which
                    _send(spare.sock, payload, fds)
                    return spare.ospid, spare.sock
            self._leave(spare)
        return None

    def _order(self) -> None:
        """Fork a brooder, if Linux can: else there are fewer spares."""
        if self._batch == BATCH[0]:
            self._timers.after(IDLE_S, self._look)
        size, self._batch = self._batch, min(2 * self._batch, BATCH[1])
        supervisor = os.getpid()
        pairs: list[tuple[socket.socket, socket.socket]] = []
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            pipe, reports = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            opened.callback(os.close, pipe)
            try:
                for _ in range(size):
                    pairs.append(pair())
                    opened.enter_context(pairs[-1][0])
                ospid = fork(lambda: _brood([theirs for _, theirs in pairs], reports, supervisor))
            finally:
                os.close(reports)
                for _, theirs in pairs:
                    theirs.close()
            opened.pop_all()
            self._brooder = Brooder(ospid, [ours for ours, _ in pairs], pipe)

    def ended(self, ospid: int) -> bool:
        """A child has ended; returns whether it was a spare or brooder."""
        if self._brooder is not None:
            born = self._read(self._brooder)
            if ospid == self._brooder.ospid:
                self._take(self._brooder, born)
                return True
            if ospid in born:
                born[born.index(ospid)] = 0
                return True
        for waiting in self._waiting:
            if waiting.ospid == ospid:
                self._waiting.remove(waiting)
                waiting.sock.close()
                return True
        if ospid in self._leaving:
            self._leaving.remove(ospid)
            return True
        return False

    def _take(self, brooder: Brooder, born: list[int]) -> None:
        """The brooder has ended, so its spares are children of the supervisor."""
        for number, sock in enumerate(brooder.socks):
            ospid = born[number] if number < len(born) else 0  # fewer: Linux had no more processes
            if ospid:
                self._waiting.append(Spare(ospid, sock, self._timers.clock()))
            else:
                sock.close()
        os.close(brooder.pipe)
        self._brooder, self._born = None, []
        if self._batch == BATCH[0]:
            self.dismiss()  # the others have been dismissed since it was ordered

    def _read(self, brooder: Brooder) -> list[int]:
        with contextlib.suppress(BlockingIOError):
            while report := os.read(brooder.pipe, BATCH[1] * PID.size):
                self._born += [ospid for (ospid,) in PID.iter_unpack(report)]
        return self._born

    def _look(self) -> None:
        left_s = self._last + IDLE_S - self._timers.clock()
        if left_s <= 0:
            self.dismiss()
        else:
            self._timers.after(left_s, self._look)

    def dismiss(self) -> None:
        """Close their sockets; then the spares exit."""
        self._batch = BATCH[0]
        while self._waiting:
            self._leave(self._waiting.popleft())

    def _leave(self, spare: Spare) -> None:
        self._leaving.add(spare.ospid)
        spare.sock.close()


def _brood(ends: list[socket.socket], reports: int, supervisor: int) -> int:
    """Runs in the brooder. `ends`: one for each spare."""
    keep_only((reports, *(end.fileno() for end in ends), *cage.descriptors()))
    name_process("aios:spare")
    confinement.open_common()
    heap.tidy()
    born: list[int] = []
    with contextlib.suppress(OSError):  # fewer then, or none
        for end in ends:
            born.append(fork_again(lambda end=end: become(end, supervisor)))  # type: ignore[misc]
    os.write(reports, b"".join(map(PID.pack, born)))  # less than a page, so it is written completely or not at all
    return 0


def _begin(spec: link.Fork, pid: int, home: str, fds: Descriptors) -> int:
    """Runs in a child that the supervisor has forked for one agent. It has copies of all descriptors of the supervisor,
    among them stdio of agents that are spawned at the same moment: as long as it looks up its own program, which may
    take long, their readers would wait for their end."""
    keep_only((*fds.stdio, fds.memfd, fds.bell, fds.letter, fds.report, *cage.descriptors()))
    prepare()
    return become_agent(spec, pid, home, fds)


def pair() -> tuple[socket.socket, socket.socket]:
    """A socket pair: the supervisor's end, and that of the process that becomes an agent."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def assign(
    sock: socket.socket, spec: link.Fork, pid: int, home: str, stdio: tuple[int, int, int], channel: tuple[int, ...]
) -> None:
    """Send a process that waits in `become` the agent that it becomes. `channel`: memfd, bell, letter. Raises
    OSError."""
    payload = msgpack.encode((spec, pid, home))
    if len(payload) > LARGEST:
        raise OSError(errno.E2BIG, "what is known of this agent is too long")
    _send(sock, payload, (*stdio, *channel))


def _send(sock: socket.socket, payload: bytes, fds: tuple[int, ...]) -> None:
    rights = array("i", fds)
    sock.sendmsg([payload], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_DONTWAIT)


def become(sock: socket.socket, supervisor: int = 0, keeps_library: bool = False) -> int:
    """Runs in the spare: wait for the agent that it becomes. `supervisor`: its parent by then; it dies with that.
    `keeps_library`: see `become_agent`."""
    keep_only((sock.fileno(), *confinement.descriptors()))
    prepare()
    payload, ancillary, _, _ = sock.recvmsg(LARGEST, socket.CMSG_SPACE(6 * 4))
    if not payload:
        return 0
    if supervisor:
        die_with_parent(supervisor, signal.SIGKILL)
    stdin, stdout, stderr, memfd, bell, letter = array("i", ancillary[0][2])
    spec, pid, home = _decode(payload)
    fds = Descriptors((stdin, stdout, stderr), memfd, bell, letter, sock.detach())
    return become_agent(spec, pid, home, fds, keeps_library)
