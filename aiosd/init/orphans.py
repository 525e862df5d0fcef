"""What dead agents leave behind: processes that they had started, and that are the supervisor's children now.

A process that outlives its agent has nobody left that pays for it or stops it, so it is killed. It is killed at once,
as `setsid` children of a closed terminal are not, unless its agent was told to end by TERM: then what belongs to it was
told so, too (`sh -c 'server; true'` is a shell around a server), and has `grace_s` to end in order. With `orphans =
"term"` in the settings every orphan gets TERM first, and that time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable

from aiosd import procfs
from aiosd.init.signals import signal_descendants
from aiosd.timers import Timer, Timers

logger = logging.getLogger("supervisor")

COST_SHARE = 0.05  # of the time, at most, goes into looking for orphans


class Orphans:
    """`known` gives the Linux pids of all children that are no orphans."""

    def __init__(self, timers: Timers, known: Callable[[], set[int]], grace_s: float, term_first: bool) -> None:
        self._timers = timers
        self._known = known
        self._grace_s = grace_s
        self._term_first = term_first
        self._spared: dict[int, float] = {}  # orphans that have time to end, until when
        self._told: dict[int, float] = {}  # sessions of agents that ended after a TERM, and until when that counts
        self._due: Timer | None = None  # the next look
        self._deadline: Timer | None = None  # when the first of those that have time has had it
        self._cost_s = 0.0  # of the last look

    def agent_ended(self, ospid: int, told_to_end: bool) -> None:
        """An agent has ended; what it left behind is our child now. Every agent has a session of its own."""
        if told_to_end:
            self._told[ospid] = self._timers.clock() + self._grace_s
        self._look_after(self._cost_s / COST_SHARE)

    def ended(self) -> None:
        """An orphan has ended; what it left behind, or forked while it was being killed, is our child now."""
        self._look_after(self._cost_s / COST_SHARE)

    def any(self) -> bool:
        """Whether one still has time to end, as far as that is known already."""
        return bool(self._spared) or self._due is not None

    def _look_after(self, seconds: float) -> None:
        """With thousands of children a look takes long, and one serves for many deaths."""
        if self._due is None:
            self._due = self._timers.after(seconds, self._look)

    def _look(self) -> None:
        self._due = None
        began = self._timers.clock()
        self._told = {session: until for session, until in self._told.items() if until > began}
        orphans = set(procfs.children(os.getpid())) - self._known()
        self._spared = {ospid: until for ospid, until in self._spared.items() if ospid in orphans}
        for ospid in sorted(orphans):
            self._deal_with(ospid, began)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._spared:
            self._deadline = self._timers.at(min(self._spared.values()), lambda: self._look_after(0.0))
        self._cost_s = self._timers.clock() - began

    def _deal_with(self, ospid: int, now: float) -> None:
        until = self._spared.get(ospid)
        if until is None:
            until = self._first_seen(ospid, now)
        if until is not None and now < until:
            self._spared[ospid] = until
            return
        self._spared.pop(ospid, None)
        _kill(ospid)

    def _first_seen(self, ospid: int, now: float) -> float | None:
        """Until when it has time to end; None: none."""
        stat = procfs.read_stat(ospid)
        if stat is None or stat.state in ("Z", "X"):
            return None
        told = self._told.get(stat.session)
        if told is None and stat.session == ospid and self._told:  # it made a session of its own
            told = max(self._told.values())
        if told is not None:
            return told
        if self._term_first:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(ospid, signal.SIGTERM)
            signal_descendants(ospid, signal.SIGTERM)
            return now + self._grace_s
        logger.info("process %d (%s) was left behind by its agent and is killed", ospid, procfs.name(ospid))
        return None


def _kill(ospid: int) -> None:
    """A child of ours: its number cannot be another's."""
    signal_descendants(ospid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(ospid, signal.SIGKILL)
