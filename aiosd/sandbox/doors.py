"""Doors: how a confined agent, and the processes that it starts, reach aiosd's control socket and no other.

With the right to connect Unix sockets an agent would reach those of the user's other programs, many of which obey every
client (docker, an SSH agent); Landlock does not guard sockets by their paths. So the seccomp program of an agent sends
aiosd a request whenever a Unix socket is made: the kernel answers through the agent's door with a socket that is
already connected to the kernel. A `connect` of this socket fails with EISCONN, whatever its path, and the SDK handles
that.

An agent without a network also requests sockets of the internet here. The kernel refuses these, and so learns of the
denial, which Linux reports to the program alone.

Linux delivers a request once, and the process that sent it waits until it is answered. So a kernel writes what it has
received into the ledger, where the next kernel finds and answers it.

Only processes under an agent's seccomp program can send requests at its door: so it is certain which agent they belong
to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from typing import NamedTuple

_RECEIVE, _SEND, _ADD_FD = 0xC0502100, 0xC0182101, 0xC0182103  # SECCOMP_IOCTL_NOTIF_…
_ADD_FD_AND_ANSWER = 2
_ID_MASK = (1 << 64) - 1
LOST = 64  # requests after the last known one that may have been received: processes that had ended count, too
_QUESTION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags; number, arch, address, arguments
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_NEW_FD = struct.Struct("=QIIII")  # struct seccomp_notif_addfd


class DoorRequest(NamedTuple):
    """A request that was received."""

    id: int  # Linux counts on from a random number, for each door
    ospid: int
    family: int
    type: int


def receive(door: int) -> DoorRequest:
    """Receive a request. Raises OSError when the process that sent it has ended meanwhile."""
    buffer = bytearray(_QUESTION.size)
    fcntl.ioctl(door, _RECEIVE, buffer)
    fields = _QUESTION.unpack(buffer)
    family, kind = fields[6] & 0xFFFFFFFF, fields[7]  # arguments; Linux ignores the other half of the first one
    return DoorRequest(fields[0], fields[1], family, kind)


def refuse_lost(door: int, last: int) -> None:
    """Refuse requests that a kernel received after the one with the id `last`, and did not write down: it has died.
    (Requests that were not received yet stay.)"""
    for number in range(last + 1, last + 1 + LOST):
        with contextlib.suppress(OSError):  # ENOENT: there is no such request; EINPROGRESS: it was not received
            fcntl.ioctl(door, _SEND, _ANSWER.pack(number & _ID_MASK, 0, -errno.ECONNRESET, 0))


class Question:
    """A request that has to be answered: a process waits in `socket()`. If it was answered already, or the process has
    ended, answers have no effect."""

    def __init__(self, door: int, received: DoorRequest) -> None:
        self._door = door
        self._id, self.ospid, self.family, self._type = received

    def connect(self) -> socket.socket | None:
        """Give the process one end of a new pair of sockets; returns the other end. None: it has ended meanwhile."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            theirs.setblocking(not self._type & socket.SOCK_NONBLOCK)
            flags = os.O_CLOEXEC if self._type & socket.SOCK_CLOEXEC else 0
            try:
                add = _NEW_FD.pack(self._id, _ADD_FD_AND_ANSWER, theirs.fileno(), 0, flags)
                fcntl.ioctl(self._door, _ADD_FD, add)
            except OSError:
                ours.close()
                return None
        ours.setblocking(False)
        return ours

    def refuse(self, number: int) -> None:
        """Make its `socket()` fail with this errno."""
        with contextlib.suppress(FileNotFoundError):  # the process has ended meanwhile
            fcntl.ioctl(self._door, _SEND, _ANSWER.pack(self._id, 0, -number, 0))
