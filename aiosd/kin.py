"""What a process asks of Linux about its parent and its descendants.

No process of aiosd outlives the one that started it: it gets a signal at its parent's death, and those that start
others adopt what these leave behind.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

LIBC = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int = 0, number: int = signal.SIGKILL) -> None:
    """Request a signal at the parent's death, and send it if the parent is already dead. `parent`: its pid; 0: the
    process that has started this one, which is dead if pid 1 has adopted this process."""
    known = parent or os.getppid()
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != known or (not parent and known == 1):
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Become the parent of all processes below this one whose own parent dies: none gets out of its sight."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, argument: int) -> None:
    if LIBC.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
