"""inotify, which Python's library does not have: one descriptor that reports changes in watched folders."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from typing import Any

MODIFY, ATTRIB, CLOSE_WRITE = 0x2, 0x4, 0x8
MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
Q_OVERFLOW, IGNORED = 0x4000, 0x8000
ONLYDIR, EXCL_UNLINK, ISDIR = 0x01000000, 0x04000000, 0x40000000
CHANGES = MODIFY | ATTRIB | CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF

_HEAD = struct.Struct("iIII")
_BUFFER = 64 << 10


@dataclass(frozen=True, slots=True)
class InotifyEvent:
    watch: int
    mask: int
    name: bytes


class Inotify:
    """One instance of inotify. Raises OSError."""

    def __init__(self) -> None:
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise _last_error()

    def watch(self, folder_fd: int) -> int:
        """Watch an open folder; returns the number of its watch. The path is one in /proc, since the folder's own path
        may lead elsewhere by now."""
        path = f"/proc/self/fd/{folder_fd}".encode()
        found: int = self._libc.inotify_add_watch(self.fd, path, CHANGES | ONLYDIR | EXCL_UNLINK)
        if found < 0:
            raise _last_error()
        return found

    def forget(self, watch: int) -> None:
        self._libc.inotify_rm_watch(self.fd, watch)  # EINVAL: the folder is gone, and the watch with it

    def read(self) -> list[InotifyEvent]:
        """The events that have come; [] if there are none."""
        try:
            data = os.read(self.fd, _BUFFER)
        except BlockingIOError:
            return []
        events = []
        at = 0
        while at < len(data):
            watch, mask, _, length = _HEAD.unpack_from(data, at)
            at += _HEAD.size
            events.append(InotifyEvent(watch, mask, data[at : at + length].rstrip(b"\0")))
            at += length
        return events

    def close(self) -> None:
        os.close(self.fd)


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
