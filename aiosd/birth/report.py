"""What a forked child reports to the supervisor before it runs anything: whether it can be the agent it should be.

Folder and program of an agent are looked up in the agent's own process: a name may lead to a file system that never
answers, and the supervisor must not wait for that. The child has one end of a socket pair. It closes it (Linux does,
when another program is executed) as soon as nothing but the program itself can go wrong, or sends why it cannot start
and leaves.
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
        """`words` begin with what they are about. Returns the exit code to leave with."""
        number = err.errno or errno.EIO
        shown = words.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        os.write(self.fd, msgpack.encode((number, shown[:4096])))
        return CANNOT_EXECUTE


def read(sock: socket.socket) -> tuple[int, str] | None:
    """In the supervisor, when something is there: errno and words of a child that cannot start; None: it runs, or died.
    Raises BlockingIOError when nothing is there."""
    try:
        payload = sock.recv(_LARGEST, socket.MSG_DONTWAIT)
    except ConnectionError:
        return None
    return _decode(payload) if payload else None
