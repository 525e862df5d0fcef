"""Doing something in a process of its own, so that nothing of it stays in this process's memory.

What a Python process has read once is found in its memory for long, in freed blocks too. The settings name secrets of
agents that start with the system, and all agents begin with a copy of the memory of aiosd's first processes. So these
let a child read them.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import TypeVar

from aiosd.errors import Bug

T = TypeVar("T")


def run(make: Callable[[], T]) -> T:
    """What `make` returns in a forked child, or raises there; both must be picklable."""
    fd = os.memfd_create("aios-apart")
    try:
        child = os.fork()
        if child == 0:
            try:
                os.write(fd, pickle.dumps(_outcome(make)))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        content = os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)
    if not content:
        raise Bug("a process that was to read the settings has ended without a word")
    returned, value = pickle.loads(content)
    if not returned:
        raise value
    return value  # type: ignore[no-any-return]


def _outcome(make: Callable[[], object]) -> tuple[bool, object]:
    try:
        return True, make()
    except BaseException as err:
        try:
            pickle.loads(pickle.dumps(err))
        except Exception:  # an exception that cannot be sent: its traceback can
            return False, Bug(traceback.format_exc())
        return False, err
