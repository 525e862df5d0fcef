"""Doors: how a confined agent, and the processes that it starts, reach aiosd's control socket and no other.

With the right to connect Unix sockets an agent would reach those of the user's other programs, many of which obey every
client (docker, an SSH agent); Landlock does not guard sockets by their paths. So the seccomp program of an agent sends
aiosd a request whenever a Unix socket is made: the kernel answers through the agent's door with a socket that is
already connected to the kernel. A `connect` of this socket fails with EISCONN, whatever its path, and the SDK handles
that.

An agent without a network also requests sockets of the internet here. The kernel refuses these, and so learns of the
denial, which Linux reports to the program alone.

Only processes under an agent's seccomp program can send requests at its door: so it is certain which agent they belong
to.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

_RECEIVE, _SEND, _ADD_FD = 0xC0502100, 0xC0182101, 0xC0182103  # SECCOMP_IOCTL_NOTIF_…
_ADD_FD_AND_ANSWER = 2
_QUESTION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags; number, arch, address, arguments
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_NEW_FD = struct.Struct("=QIIII")  # struct seccomp_notif_addfd


class Question:
    """A request: a process waits in `socket()`."""

    def __init__(self, door: int) -> None:
        """Read the request. Raises OSError when the process that sent it has ended meanwhile."""
        buffer = bytearray(_QUESTION.size)
        fcntl.ioctl(door, _RECEIVE, buffer)
        fields = _QUESTION.unpack(buffer)
        self._door, self._id = door, fields[0]
        self.ospid: int = fields[1]
        self.family = fields[6] & 0xFFFFFFFF  # the first argument; Linux ignores its other half
        self._type: int = fields[7]  # the second argument

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
