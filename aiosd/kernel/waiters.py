"""Calls that wait for something to happen to a process: WAIT for an end, KILL for a stop or an end.

A waiter is one open call with a test that is asked again whenever a process stops or ends.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiosd.kernel import access
from aiosd.kernel.peer import Call
from aiosd.kernel.proc import Proc, State
from libaios import wire

if TYPE_CHECKING:
    from aiosd.kernel.loop import Kernel


def waited(proc: Proc) -> wire.Waited:
    assert proc.status is not None
    return wire.Waited(proc.pid, proc.status, proc.budget, proc.reason)


class Waiters:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._for_exit: dict[Call, int] = {}  # WAIT calls, oldest first, and the pid they wait for (0: any child)
        self._for_state: dict[Call, Callable[[], bool]] = {}  # KILL calls: done when this is true

    def calls(self) -> list[Call]:
        return [*self._for_exit, *self._for_state]

    # ── WAIT ──────────────────────────────────────────────────────────────────────────────────────────────

    def wait(self, call: Call, args: wire.Wait) -> wire.Waited | None:
        """The result when there is one already; None when the call now waits."""
        if self.kernel.born.epoch > 1:  # a kernel that died may have served this very call
            for proc in self.kernel.table.history.values():
                if proc.reaped_by == call.key:
                    return waited(proc)
        found = self._dead(call, args.pid)
        if found is not None:
            return self._take(call, found)
        if not args.block:
            return wire.Waited(0, 0)
        self._for_exit[call] = args.pid
        call.forget = lambda: self._drop(call)
        self.kernel.set_timeout(call, args.timeout_s, "exit")
        return None

    def _dead(self, call: Call, pid: int) -> Proc | None:
        """A dead process that this call may have, else None; an error when it never can have one."""
        table, peer = self.kernel.table, call.peer
        if pid:
            proc = table.find(pid)
            if proc is None:
                raise wire.error(errno.ECHILD, str(self.kernel.status.no_agent(pid).strerror))
            if not access.may_wait(peer, proc) or (peer.proc is not None and proc.state is State.REAPED):
                raise wire.error(errno.ECHILD, f"{pid}: not a child of the caller")
            return None if proc.alive else proc
        parent = access.require_agent(peer, "can wait for any child; a pid is needed")
        children = table.children_of(parent.pid)
        if not children:
            raise wire.error(errno.ECHILD, "the caller has no children")
        return next((child for child in children if not child.alive), None)

    def _take(self, call: Call, proc: Proc) -> wire.Waited:
        if access.reaps(call.peer, proc):
            self.kernel.agents.collect(proc, call.key)
        return waited(proc)

    def on_exit(self, proc: Proc) -> None:
        """Give the status to everyone who may have it; the parent's first waiter collects it."""
        for call, pid in list(self._for_exit.items()):
            mine = pid == proc.pid or (pid == 0 and call.peer.proc is not None and call.peer.proc.pid == proc.ppid)
            if not mine:
                continue
            if not (access.reaps(call.peer, proc) and proc.state is State.REAPED):
                self.kernel.finish(call, self._take(call, proc))
            elif pid or not self.kernel.table.children_of(proc.ppid):  # collected by another call of the parent
                self.kernel.fail(call, errno.ECHILD, f"{proc.pid}: its status went to another wait")
        self._look_again()

    # ── KILL ──────────────────────────────────────────────────────────────────────────────────────────────

    def until(self, call: Call, done: Callable[[], bool]) -> bool:
        """Whether `done` holds already; else the call is finished when it does."""
        if done():
            return True
        self._for_state[call] = done
        call.forget = lambda: self._drop(call)
        return False

    def until_dead(self, call: Call, procs: list[Proc], patience_s: float) -> bool:
        """As `until` all are dead, with a KILL when the patience is at an end."""

        def kill() -> None:
            for proc in procs:
                if proc.alive:
                    self.kernel.agents.deliver(proc, signal.SIGKILL)

        if self.until(call, lambda: not any(proc.alive for proc in procs)):
            return True
        call.timer = self.kernel.timers.after(patience_s, kill)
        return False

    def _drop(self, call: Call) -> None:
        self._for_exit.pop(call, None)
        self._for_state.pop(call, None)

    def on_stop(self, proc: Proc) -> None:
        self._look_again()

    def _look_again(self) -> None:
        for call, done in list(self._for_state.items()):
            if done():
                self.kernel.finish(call, None)
