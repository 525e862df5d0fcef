"""Ending everything below a process: the last act of guardian and supervisor, so that nothing outlives aiosd."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable

from aiosd import procfs

logger = logging.getLogger("sweep")

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.05


def sweep(patience_s: float = 5.0, meanwhile: Callable[[], None] = lambda: None) -> None:
    """KILL everything below this process until nothing is left, and reap it. A killed process may have forked before
    its death, and its children become children of this process, a subreaper: hence the loop. `meanwhile` is called in
    each round.

    KILL does not end every process: not one of another user (setuid), nor one blocked in a driver or by a dead disk.
    When only such processes are left for `patience_s`, they are given up and named in the log: waiting for them would
    keep the lock and the socket for an unlimited time."""
    pause_s = waited_s = 0.0  # time slept, not clock time: while this process was stopped, nothing could be reaped
    while True:
        killed = [victim for victim in procfs.descendants(os.getpid()) if _kill(victim)]
        if any(map(_runs, killed)):  # a process is ending, which may take long: a model has many pages to free
            waited_s = 0.0
        meanwhile()
        try:
            collected = _collect()
        except ChildProcessError:
            return
        if waited_s >= patience_s:
            left = ", ".join(f"{ospid} ({procfs.name(ospid)})" for ospid in procfs.descendants(os.getpid()))
            logger.error("cannot be killed and left behind: %s", left)
            return
        pause_s = SHORTEST_PAUSE_S if collected else min(max(2 * pause_s, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
        time.sleep(pause_s)
        waited_s += pause_s


def _kill(ospid: int) -> bool:
    """Send KILL; returns whether that was allowed."""
    try:
        os.kill(ospid, signal.SIGKILL)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True


def _runs(ospid: int) -> bool:
    """Whether one of the process's threads is running or ready to run; the first thread may have ended before
    others."""
    try:
        threads = os.listdir(f"/proc/{ospid}/task")
    except OSError:
        return False
    return any((stat := procfs.read_stat(int(thread))) is not None and stat.state == "R" for thread in threads)


def _collect() -> bool:
    """Reap the dead; returns whether there were any. ChildProcessError when no child is left."""
    any_dead = False
    while os.waitpid(-1, os.WNOHANG)[0]:
        any_dead = True
    return any_dead
