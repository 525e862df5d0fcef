"""The command line and environment that Linux shows of an agent (`/proc/PID/cmdline`, `environ`, `ps`).

A forked child shows those of the process that it was forked from, so a reader of these files would see the environment
in which aiosd was started, with any secrets in it. Here they are replaced by the agent's own. If Linux does not allow
that (a kernel built without CHECKPOINT_RESTORE), the inherited strings are overwritten.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

from aiosd.kin import LIBC

PR_SET_MM = 35
PR_SET_MM_MAP = 14
_MAP = struct.Struct("=11QQII")  # struct prctl_mm_map
_NO_FILE = 0xFFFFFFFF
#: Numbers of fields in /proc/PID/stat (proc(5)), from 0.
_START_CODE, _END_CODE, _START_STACK, _START_DATA, _END_DATA, _START_BRK = 25, 26, 27, 44, 45, 46
_ARG_START, _ARG_END, _ENV_START, _ENV_END = 47, 48, 49, 50

Area = tuple[int, int]  # first address, and the one after the last

_sbrk = LIBC.sbrk
_sbrk.restype = ctypes.c_void_p


def _stat() -> list[int]:
    """The fields of this process; the name may contain blanks and brackets."""
    text = Path("/proc/self/stat").read_text(errors="replace")
    return [0, 0, *(int(field) if field.lstrip("-").isdigit() else 0 for field in text.rpartition(")")[2].split())]


#: The same in all processes forked from this one.
_fields = _stat()


def inherited() -> tuple[Area, Area]:
    """The areas that Linux shows of a process that has not called `show`."""
    return (_fields[_ARG_START], _fields[_ARG_END]), (_fields[_ENV_START], _fields[_ENV_END])


def show(command_line: Area, environment: Area) -> None:
    """Let Linux show these areas of this process's memory, which contain strings that end in NUL."""
    fields = _fields
    areas = (*command_line, *environment)
    code = (fields[_START_CODE], fields[_END_CODE], fields[_START_DATA], fields[_END_DATA])
    layout = _MAP.pack(*code, fields[_START_BRK], _sbrk(0), fields[_START_STACK], *areas, 0, 0, _NO_FILE)
    if LIBC.prctl(PR_SET_MM, PR_SET_MM_MAP, layout, len(layout), 0) != 0:
        _overwrite((fields[_ARG_START], fields[_ARG_END]), command_line)
        _overwrite((fields[_ENV_START], fields[_ENV_END]), environment)


def _overwrite(place: Area, strings: Area) -> None:
    """Overwrite the inherited strings with as many whole strings as have room."""
    size = place[1] - place[0]
    if size <= 0:
        return
    fits = ctypes.string_at(strings[0], min(strings[1] - strings[0], size))
    fits = fits[: fits.rfind(b"\0") + 1]
    ctypes.memset(place[0], 0, size)
    ctypes.memmove(place[0], fits, len(fits))
