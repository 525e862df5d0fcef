"""The functions in C that confine the calling process, and the errors for their results."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os

#: For each `step` of `native/cage.h`, in the same order.
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
    "namespaces are refused",
    "the user cannot be mapped",
    "a folder cannot be opened",
    "a folder cannot be mounted",
    "the root cannot be exchanged",
    "a network of its own is refused",
)


class Native:
    """The functions. Each raises OSError when a step fails; the process is then confined in part, and must end."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path, use_errno=True)
        self._confine, self._build = library.aios_confine, library.aios_build_cage
        self._confine.argtypes, self._confine.restype = [ctypes.c_char_p, ctypes.c_uint64], ctypes.c_int
        self._made = ctypes.c_int32 * 5
        self._build.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint32, self._made]

    def confine(self, plan: bytes) -> int:
        """Confine this process by a `plan`; returns the descriptor of the filter's listener (0: there is none)."""
        return _checked(self._confine(plan, len(plan)))

    def build_cage(self, places: bytes, count: int) -> list[int]:
        """In a process of its own: descriptors of the namespaces of a cage, as `cage.Cage` has them."""
        made = self._made()
        _checked(self._build(places, len(places), count, made))
        return list(made)


def load() -> Native | None:
    """Load the functions; None: they were not compiled."""
    spec = importlib.util.find_spec("aiosd.sandbox._confine")
    return Native(spec.origin) if spec is not None and spec.origin is not None else None


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno() or errno.EIO
        raise OSError(number, f"sandbox: {_STEPS[-result]} ({os.strerror(number)})")
    return result
