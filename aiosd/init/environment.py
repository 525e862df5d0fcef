"""Hides the environment in which aiosd was started from agents.

There are secrets in it, such as the user's API keys, and every agent begins as a copy of the supervisor's memory. So
the supervisor writes the environment to a memfd, and overwrites all variables that it does not need and that are no
settings of aiosd: in Python's objects and in the strings of the C library. The kernel and the services, which pass
variables on to agents that start with the system and to programs that they run, read them again from the memfd.
"""

from __future__ import annotations

import ctypes
import os
from fnmatch import fnmatchcase

from aiosd.kin import LIBC
from aiosd.sandbox.box import VARIABLES

#: Variables that stay, besides those that any confined agent gets.
_KEPT = (*VARIABLES, "HOME", "TMPDIR", "XDG_*", "NOTIFY_SOCKET", "LD_PRELOAD", "SSL_CERT_*")
_LENGTH = 4  # bytes, before each name and value
_BYTES_HEAD = bytes.__basicsize__ - 1  # of a bytes object, before its content

_environ = ctypes.POINTER(ctypes.c_void_p).in_dll(LIBC, "environ")


def hide() -> int:
    """Keep the environment in a memfd, which is returned, and erase it here. No copy of a value is made."""
    fd = os.memfd_create("aios-environment")
    values: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
    for name, value in values.items():
        os.writev(fd, [part for word in (name, value) for part in (len(word).to_bytes(_LENGTH, "little"), word)])
    hidden = {name for name in values if not _is_kept(os.fsdecode(name))}
    _overwrite_strings(hidden)
    for name in hidden:
        if len(values[name]) > 1:  # values of one byte are shared by all of Python, and are no secrets
            _overwrite(id(values[name]) + _BYTES_HEAD, len(values[name]))
        os.unsetenv(name)
        del values[name]
    return fd


def restore(fd: int) -> None:
    """Restore the whole environment, in one of aiosd's own processes."""
    content = os.pread(fd, os.fstat(fd).st_size, 0)
    words, at = [], 0
    while at < len(content):
        end = at + _LENGTH + int.from_bytes(content[at : at + _LENGTH], "little")
        words.append(content[at + _LENGTH : end])
        at = end
    os.environb.update(zip(words[::2], words[1::2], strict=True))


def _is_kept(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _KEPT)


def _overwrite_strings(names: set[bytes]) -> None:
    """Overwrite the values in the C library's array of `NAME=value`, and where Linux put them at the start."""
    at = 0
    while address := _environ[at]:
        entry = ctypes.string_at(address, _length_of_name(address))
        if entry in names:
            start = address + len(entry) + 1
            _overwrite(start, LIBC.strlen(ctypes.c_void_p(start)))
        at += 1


def _length_of_name(address: int) -> int:
    length = 0
    while ctypes.c_char.from_address(address + length).value not in (b"=", b"\0"):
        length += 1
    return length


def _overwrite(address: int, size: int) -> None:
    if size:
        ctypes.memset(address, 0, size)
