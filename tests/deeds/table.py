"""The table of deeds, and common code. It runs in a sandbox, so it imports only the standard library."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

Stage = dict[str, Any]  # from stage.py, as JSON
Deed = Callable[[Stage], object]

DEEDS: dict[str, Deed] = {}

_libc = ctypes.CDLL(None, use_errno=True)


def deed(function: Deed) -> Deed:
    DEEDS[function.__name__] = function
    return function


def call(number: int, *args: object) -> int:
    """Make a system call; raises OSError."""
    result = _libc.syscall(number, *[ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def prctl(option: int, *args: int) -> int:
    result = _libc.prctl(option, *[ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4]])
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)
