"""Runs a function in a process of its own, so that none of its data stay in this process's memory.

Data that a Python process has read stay in its memory for long, in freed blocks, too. The settings contain secrets of
agents that start with the system, and all agents begin with a copy of the memory of aiosd's first processes. So these
processes let a child read the settings.
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
    """Run `make` in a forked child; returns its result, or raises its exception. Both must be picklable."""
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
        except Exception:  # if the exception cannot be sent, its traceback is
            return False, Bug(traceback.format_exc())
        return False, err
