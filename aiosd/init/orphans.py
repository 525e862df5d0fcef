"""Orphans: processes that a dead agent had started, and that are children of the supervisor now.

An orphan is killed, because no agent is charged for it any more, and no signal to an agent stops it. It is killed at
once (unlike `setsid` children of a closed terminal), unless its agent was ended by TERM: then the agent's other
processes got TERM, too (`sh -c 'server; true'` is a shell around a server), and have `grace_s` to end in order. With
`orphans = "term"` in the settings every orphan first gets TERM and `grace_s`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable

from aiosd import procfs
from aiosd.init.signals import signal_descendants
from aiosd.timers import Timer, Timers

logger = logging.getLogger("supervisor")

FEW = 5  # orphans that the log names one by one
COST_SHARE = 0.05  # at most this part of the time is spent on searches for orphans


class Orphans:
    """`known`: the Linux pids of all children that are no orphans."""

    def __init__(self, timers: Timers, known: Callable[[], set[int]], grace_s: float, term_first: bool) -> None:
        self._timers = timers
        self._known = known
        self._grace_s = grace_s
        self._term_first = term_first
        self._spared: dict[int, float] = {}  # orphans that still have time to end, each with its deadline
        self._terminated: dict[int, float] = {}  # sessions of agents that ended after a TERM, and until when
        self._due: Timer | None = None  # the next search
        self._deadline: Timer | None = None  # when the time of the first spared orphan is over
        self._cost_s = 0.0  # processor seconds of the last search
        self._left: list[tuple[int, str]] = []  # killed in this search: Linux pid and name

    def agent_ended(self, ospid: int, got_term: bool) -> None:
        """An agent has ended; the processes it left are children of the supervisor now. Every agent has its own
        session."""
        if got_term:
            self._terminated[ospid] = self._timers.clock() + self._grace_s
        self._look_after(self._cost_s / COST_SHARE)

    def ended(self) -> None:
        """An orphan has ended; processes that it left, or forked while it was killed, are children of the supervisor
        now."""
        self._look_after(self._cost_s / COST_SHARE)

    def any(self) -> bool:
        """Whether there is an orphan that still has time to end."""
        return bool(self._spared) or self._due is not None

    def _look_after(self, seconds: float) -> None:
        """Schedule one search for several deaths, because with thousands of children a search takes long."""
        if self._due is None:
            self._due = self._timers.after(seconds, self._look)

    def _look(self) -> None:
        self._due = None
        began = self._timers.clock()
        self._terminated = {session: until for session, until in self._terminated.items() if until > began}
        orphans = set(procfs.children(os.getpid())) - self._known()
        self._spared = {ospid: until for ospid, until in self._spared.items() if ospid in orphans}
        for ospid in sorted(orphans):
            self._deal_with(ospid, began)
        self._log_left()
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
        """The time until which a new orphan may end by itself; None: kill it now."""
        stat = procfs.read_stat(ospid)
        if stat is None or stat.state in ("Z", "X"):
            return None
        until = self._terminated.get(stat.session)
        if until is None and stat.session == ospid and self._terminated:  # it has made its own session
            until = max(self._terminated.values())
        if until is not None:
            return until
        if self._term_first:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(ospid, signal.SIGTERM)
            signal_descendants(ospid, signal.SIGTERM)
            return now + self._grace_s
        self._left.append((ospid, procfs.name(ospid)))
        return None

    def _log_left(self) -> None:
        """A line for each of a few; one for all that a fork bomb leaves."""
        left, self._left = self._left, []
        if len(left) > FEW:
            names = Counter(name for _, name in left).most_common(FEW)
            shown = ", ".join(f"{number} {name}" for name, number in names)
            logger.info("%d processes (%s) were left behind by agents and are killed", len(left), shown)
            return
        for ospid, name in left:
            logger.info("process %d (%s) was left behind by its agent and is killed", ospid, name)


def _kill(ospid: int) -> None:
    """Kill a child of the supervisor: its number cannot have been given to another process."""
    signal_descendants(ospid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(ospid, signal.SIGKILL)
