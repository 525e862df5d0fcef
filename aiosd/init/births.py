"""Births under way: agents that are forked, and have not reported yet whether they can start.

A child looks up its folder and its program itself (see `birth.report` for the reason), which takes as long as the file
system needs. The supervisor does not wait; the report is an event of its loop like any other. A child that has not
reported after `PATIENCE_S` is killed, and its spawn fails. A child that is stopped has more time: it may have been
stopped between its ring, after which any process can signal it, and its report.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from aiosd.birth import report
from aiosd.birth.report import Refusal
from aiosd.init.records import Agent
from aiosd.ipc import letter
from aiosd.timers import Timer, Timers

logger = logging.getLogger("supervisor")

PATIENCE_S = 30.0


@dataclass(slots=True)
class Birth:
    agent: Agent
    report: socket.socket
    epoch: int  # of the kernel at its beginning; a later one has inherited the agent
    claimed: int = 0  # the epoch of the kernel that sent the request again, and waits for a reply
    rung: bool = False  # the agent runs, and has rung for the kernel at its beginning
    refusal: Refusal | None = None  # if the agent cannot start; its descriptor is open during `over`
    timer: Timer | None = None


class Births:
    def __init__(self, epoll: select.epoll, timers: Timers, over: Callable[[Birth], None]) -> None:
        self._epoll = epoll
        self._timers = timers
        self._over = over
        self._by_fd: dict[int, Birth] = {}

    def expect(self, birth: Birth) -> None:
        fd = birth.report.fileno()
        self._by_fd[fd] = birth
        self._epoll.register(fd, select.EPOLLIN)
        self._be_patient(birth)

    def claim(self, agent: Agent, epoch: int) -> bool:
        """Whether the birth is still under way; if so, the reply goes to the kernel of this epoch."""
        for birth in self._by_fd.values():
            if birth.agent is agent:
                birth.claimed = epoch
                return True
        return False

    def look(self, fd: int) -> None:
        """Read the report of the child at this descriptor, if there is one."""
        birth = self._by_fd.get(fd)
        if birth is None:
            return
        with contextlib.suppress(BlockingIOError):
            while (found := report.read(birth.report)) is not None:
                what, fds = found
                if what == report.RUNG:
                    birth.rung = True
                elif what == report.DOOR:
                    birth.agent.door = fds[0]
                elif what == report.GATES:
                    birth.agent.gates = tuple(fds)
                else:
                    self._end(birth, (what, fds[0]))
                    return
            self._end(birth, None)

    def ended(self, agent: Agent) -> None:
        """Its process has ended: there will be no more reports than it has sent before. (The end of its socket may be
        noticed later: a process that was forked at the same time has a copy until it first runs.)"""
        for fd, birth in list(self._by_fd.items()):
            if birth.agent is agent:
                self.look(fd)
                if self._by_fd.get(fd) is birth:
                    self._end(birth, None)

    def _be_patient(self, birth: Birth) -> None:
        birth.timer = self._timers.after(PATIENCE_S, lambda: self._give_up(birth))

    def _give_up(self, birth: Birth) -> None:
        if birth.agent.stopped:
            self._be_patient(birth)
            return
        with contextlib.suppress(PermissionError):  # it now belongs to another user
            os.kill(birth.agent.ospid, signal.SIGKILL)
        words = f"{birth.agent.spec.name}: its folder or program could not be looked up in {PATIENCE_S:.0f} s"
        logger.warning("agent %d killed: %s", birth.agent.pid, words)
        self._end(birth, (errno.ETIMEDOUT, letter.write_text(words)))

    def _end(self, birth: Birth, refusal: Refusal | None) -> None:
        fd = birth.report.fileno()
        del self._by_fd[fd]
        self._epoll.unregister(fd)
        birth.report.close()
        if birth.timer is not None:
            birth.timer.cancel()
        birth.refusal = refusal
        try:
            self._over(birth)
        finally:
            if refusal is not None:
                os.close(refusal[1])
