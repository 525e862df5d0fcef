"""The C function that confines the calling process, and what its result means."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
from collections.abc import Callable

_STEPS = (
    "",
    "the plan is wrong",
    "capabilities cannot be dropped",
    "no_new_privs is refused",
    "Landlock is refused",
    "a file cannot be opened",
    "a rule of Landlock is refused",
    "Landlock cannot be put in force",
    "seccomp is refused",
)

Confine = Callable[[bytes], int]


def load() -> Confine | None:
    """The function; None: it was not compiled. It returns the descriptor of the filter's listener (0: there is none),
    and raises OSError when the process could not be confined as planned."""
    spec = importlib.util.find_spec("aiosd.sandbox._confine")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin, use_errno=True)
    call = library.aios_confine
    call.argtypes, call.restype = [ctypes.c_char_p, ctypes.c_uint64], ctypes.c_int

    def confine(plan: bytes) -> int:
        result = call(plan, len(plan))
        if result < 0:
            number = ctypes.get_errno() or errno.EIO
            raise OSError(number, f"sandbox: {_STEPS[-result]} ({os.strerror(number)})")
        return int(result)

    return confine
