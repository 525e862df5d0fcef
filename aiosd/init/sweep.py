"""The end of everything below a process: what guardian and supervisor do last, so that nothing outlives aiosd."""

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
    """KILL everything below this process until nothing is left, and collect it. What is killed may have forked
    meanwhile, and what that made falls to us as subreaper: hence the loop. `meanwhile` is called in each round.

    Some processes KILL does not end: one that has become another user's (setuid), one that a driver or a dead disk
    holds. They are given up, and named in the log, when for `patience_s` there has been nothing else: waiting for
    them would keep the lock and the socket for as long as they please."""
    pause_s = waited_s = 0.0  # what was slept, not what a clock says: while we were stopped ourselves nobody could die
    while True:
        killed = [victim for victim in procfs.descendants(os.getpid()) if _kill(victim)]
        if any(map(_runs, killed)):  # on its way out, however long that takes: a model is many pages to give back
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
    """Whether KILL may be sent to it."""
    try:
        os.kill(ospid, signal.SIGKILL)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True


def _runs(ospid: int) -> bool:
    """Whether a thread of it is on a processor, or would like to be; the first thread may have ended before others."""
    try:
        threads = os.listdir(f"/proc/{ospid}/task")
    except OSError:
        return False
    return any((stat := procfs.read_stat(int(thread))) is not None and stat.state == "R" for thread in threads)


def _collect() -> bool:
    """Collect the dead; whether there were any. ChildProcessError when no child is left."""
    any_dead = False
    while os.waitpid(-1, os.WNOHANG)[0]:
        any_dead = True
    return any_dead
