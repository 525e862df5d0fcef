"""The report of a forked child to the supervisor, before it runs its program: whether it can be this agent.

Folder and program of an agent are looked up in the agent's own process, because a name may lead to a file system that
never replies, and the supervisor must not wait for that. The child has one end of a socket pair. When nothing but the
program itself can fail any more, it closes that end (or Linux does, when another program is executed). If it cannot
start, it sends the reason and exits.
"""

from __future__ import annotations

import errno
import os
import socket

from msgspec import msgpack

#: Exit codes of an agent that could not be started, as in a shell.
CANNOT_EXECUTE = 126
NOT_FOUND = 127

_LARGEST = 64 << 10
_decode = msgpack.Decoder(tuple[int, str]).decode


class Report:
    """The child's end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def ready(self) -> None:
        os.close(self.fd)

    def refuse(self, err: OSError, words: str) -> int:
        """`words`: the reason, beginning with its subject. Returns the exit code for this process."""
        number = err.errno or errno.EIO
        shown = words.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        os.write(self.fd, msgpack.encode((number, shown[:4096])))
        return CANNOT_EXECUTE


def read(sock: socket.socket) -> tuple[int, str] | None:
    """In the supervisor: the errno and reason of a child that cannot start; None: it runs, or has died. Raises
    BlockingIOError when there is no report yet."""
    try:
        payload = sock.recv(_LARGEST, socket.MSG_DONTWAIT)
    except ConnectionError:
        return None
    return _decode(payload) if payload else None
