"""Spares: processes forked before they are needed, while many agents are being started.

An agent shares its memory with the supervisor until one of them writes to it. Between two forks the supervisor writes
to about 0.8 MB of pages (mostly reference counts), which costs every agent a copy of these. The agents of a batch,
forked with nothing done in between, share these pages; and the next spawns need not wait for a fork.

A spare waits at a socket for the agent that it becomes, and holds no other descriptor but the cage's; through the same
socket it then reports whether it can start (`report`). The first of many spawns is forked alone, the second forks a
small batch, and each later batch is larger. Spares that are not used for a while exit.
"""

from __future__ import annotations

import array
import errno
import socket
import struct
from collections import deque

from msgspec import msgpack

from aiosd import link
from aiosd.birth import heap, modules
from aiosd.birth.agent import Descriptors, become_agent
from aiosd.birth.fork import fork, keep_only, name_process
from aiosd.sandbox import cage
from aiosd.timers import Timers

BATCH = (4, 64)  # the first one and the largest; each is twice the one before
HURRY_S = 0.1  # after two spawns within this time, more are likely to follow
IDLE_S = 0.5
PID = struct.Struct("=i")  # of a spare, as a template reports it
LARGEST = 64 << 10  # bytes of a message that a new socket always takes at once

_decode = msgpack.Decoder(tuple[link.Fork, int, str]).decode


class Spares:
    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._waiting: deque[tuple[int, socket.socket]] = deque()
        self._last = float("-inf")  # when an agent was started
        self._batch = BATCH[0]

    def ospids(self) -> list[int]:
        return [ospid for ospid, _ in self._waiting]

    def start(
        self, spec: link.Fork, pid: int, home: str, stdio: tuple[int, int, int], memfd: int, bell: int, letter: int
    ) -> tuple[int, socket.socket]:
        """Turn a spare or a new process into the agent `spec`, what it runs is in `letter`; returns its Linux pid and
        the socket of its report. Raises OSError when Linux cannot create a process."""
        modules.hide()
        now = self._timers.clock()
        hurry, self._last = now - self._last < HURRY_S, now
        payload = msgpack.encode((spec, pid, home))
        if len(payload) <= LARGEST:
            if hurry and not self._waiting:
                self._fork_batch()
            while self._waiting:
                ospid, sock = self._waiting.popleft()
                try:
                    _send(sock, payload, (*stdio, memfd, bell, letter))
                    return ospid, sock
                except OSError:
                    sock.close()  # it was killed, or no descriptor is left: the next attempt shows which
        ours, theirs = pair()
        try:
            fds = Descriptors(stdio, memfd, bell, letter, theirs.fileno())
            return fork(lambda: become_agent(spec, pid, home, fds)), ours
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()

    def _fork_batch(self) -> None:
        if self._batch == BATCH[0]:
            self._timers.after(IDLE_S, self._look)
        size, self._batch = self._batch, min(2 * self._batch, BATCH[1])
        pairs = []
        heap.tidy()
        try:
            for _ in range(size):
                pairs.append(pair())
            for ours, theirs in pairs:
                self._waiting.append((fork(lambda theirs=theirs: become(theirs)), ours))  # type: ignore[misc]
        except OSError:  # fewer then, or none: the spawn raises the error
            for ours, _ in pairs[len(self._waiting) :]:
                ours.close()
        finally:
            for _, theirs in pairs:
                theirs.close()

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
            self._waiting.popleft()[1].close()


def pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end, and that of the process that becomes an agent."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def tell(
    sock: socket.socket, spec: link.Fork, pid: int, home: str, stdio: tuple[int, int, int], channel: tuple[int, ...]
) -> None:
    """Tell a process that waits in `become` which agent it is. `channel`: memfd, bell, letter. Raises OSError."""
    payload = msgpack.encode((spec, pid, home))
    if len(payload) > LARGEST:
        raise OSError(errno.E2BIG, "what is known of this agent is too long")
    _send(sock, payload, (*stdio, *channel))


def _send(sock: socket.socket, payload: bytes, fds: tuple[int, ...]) -> None:
    rights = array.array("i", fds)
    sock.sendmsg([payload], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_DONTWAIT)


def become(sock: socket.socket, keeps_library: bool = False) -> int:
    """In the spare: wait for the agent that it becomes. `keeps_library`: see `become_agent`."""
    keep_only((sock.fileno(), *cage.descriptors()))
    name_process("aios:spare")
    payload, ancillary, _, _ = sock.recvmsg(LARGEST, socket.CMSG_SPACE(6 * 4))
    if not payload:
        return 0
    stdin, stdout, stderr, memfd, bell, letter = array.array("i", ancillary[0][2])
    spec, pid, home = _decode(payload)
    fds = Descriptors((stdin, stdout, stderr), memfd, bell, letter, sock.detach())
    return become_agent(spec, pid, home, fds, keeps_library)
