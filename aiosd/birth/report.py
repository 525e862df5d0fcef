"""The report of a forked child to the supervisor, before it runs its program: whether it can be this agent.

Folder and program of an agent are looked up in the agent's own process, because a name may lead to a file system that
never replies, and the supervisor must not wait for that. The child has one end of a socket pair. When nothing but the
program itself can fail any more, the child rings the kernel's bell (the kernel then answers the spawn), reports that to
the supervisor, and closes its end. (Before the exec of another program it does not report: Linux closes the end.) A
confined agent first sends its door (see `sandbox.doors`), and its gates, if it has a network of its own (see
`birth.gates`). If it cannot start, it sends an errno and a descriptor, and exits. Behind the descriptor is a sentence,
which may name the agent's files: the supervisor passes it on to the kernel and does not read it (see
`aiosd.ipc.letter`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from array import array
from contextlib import suppress

from aiosd.ipc import letter

#: Exit codes of an agent that could not be started, as in a shell.
CANNOT_EXECUTE = 126
NOT_FOUND = 127

SHOWN = 4096  # characters of a reason at most

_ERRNO = struct.Struct("=i")
Refusal = tuple[int, int]  # errno, and a descriptor with the reason
#: Sent instead of the errno: the descriptors are the agent's door, or its gates.
DOOR, GATES = 0, -1
#: Sent instead of the errno, without a descriptor: the agent has rung.
RUNG = -2
MOST = 8  # descriptors of a report


class Report:
    """The child's end of the socket pair."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def ready(self, bell: int) -> None:
        """Report that the agent runs. `bell`: the agent's. The kernel gets this at once, and the supervisor when it has
        time."""
        with suppress(OSError):  # if that fails the supervisor answers the spawn
            os.write(bell, b"\0")
            os.write(self.fd, _ERRNO.pack(RUNG))
        os.close(self.fd)

    def door(self, fd: int) -> None:
        """Send the door, and close it here."""
        self._send(DOOR, [fd])

    def gates(self, fds: list[int]) -> None:
        """Send the gates, and close them here."""
        self._send(GATES, fds)

    def _send(self, what: int, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
        with socket.socket(fileno=os.dup(self.fd)) as sock:
            sock.sendmsg([_ERRNO.pack(what)], rights)
        for fd in fds:
            os.close(fd)

    def refuse(self, err: OSError, words: str) -> int:
        """Report that the agent cannot start. `words`: the reason, beginning with its subject. Returns the exit code
        for this process."""
        number = err.errno or errno.EIO
        shown = words.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        reason = letter.write_text(shown[:SHOWN])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [reason]))]
        with socket.socket(fileno=self.fd) as sock:
            sock.sendmsg([_ERRNO.pack(number)], rights)
        os.close(reason)
        return CANNOT_EXECUTE


def read(sock: socket.socket) -> tuple[int, list[int]] | None:
    """In the supervisor, read a report: why a child cannot start, or its door, or its gates, with descriptors that the
    caller closes, or that it has rung; None: it runs, or has died. Raises BlockingIOError if there is no report yet."""
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        payload, ancillary, _, _ = sock.recvmsg(_ERRNO.size, socket.CMSG_SPACE(MOST * 4), flags)
    except ConnectionError:
        return None
    if not payload:
        return None
    what: int = _ERRNO.unpack(payload)[0]
    if what == RUNG:
        return RUNG, []
    if not ancillary:  # this process has no descriptor left
        return None
    return what, list(array("i", ancillary[0][2]))
