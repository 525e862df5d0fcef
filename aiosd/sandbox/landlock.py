"""Landlock: rights on files, by the folder below which they lie (landlock(7)).

A ruleset has a set of governed rights; of these, whatever no rule grants is denied. A kernel that knows fewer rights
gets a smaller ruleset. `ABI` numbers are Landlock's own versions: 5.13 has 1, 6.2 has 3, 6.7 has 4, 6.10 has 5, 6.12
has 6.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_CREATE_RULESET = 444
_WANT_VERSION = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = (1 << bit for bit in range(4))
TRUNCATE, IOCTL_DEVICE = 1 << 14, 1 << 15

#: The rights that a rule may grant below a folder.
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = READ | sum(1 << bit for bit in range(1, 15))  # all but ioctl on devices
DEVICE = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEVICE

_FILES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}  # from 5 on the same
_NET = 3  # from 4 on: bind and connect of TCP
_SCOPED = 3  # from 6 on: abstract Unix sockets, signals

#: The rights that there are on a file that is no folder; a rule about one may have no others.
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEVICE
MAKE_DEVICES = 1 << 6 | 1 << 11  # character and block devices: no rule grants these


@dataclass(frozen=True, slots=True)
class Ruleset:
    """The rights that this Linux can govern."""

    files: int
    net: int
    scoped: int
    size: int  # bytes of the C struct that this Linux knows


def abi() -> int:
    """Landlock's version; 0: there is none, or it is switched off."""
    version = ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, 0, _WANT_VERSION)
    return max(0, int(version))


def ruleset(version: int) -> Ruleset:
    size = 8 if version < 4 else 16 if version < 6 else 24
    return Ruleset(_FILES[min(version, 5)], _NET if version >= 4 else 0, _SCOPED if version >= 6 else 0, size)
