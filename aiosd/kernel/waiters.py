"""Calls that wait for something to happen to a process: WAIT for an end, KILL for a stop or an end.

A waiter is one open call. It is checked again only when a process that it waits for stops, goes on or ends: thousands
may wait for each other.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiosd.ipc import link
from aiosd.kernel import access
from aiosd.kernel.access import Access
from aiosd.kernel.calls import CallTable
from aiosd.kernel.peer import Call
from aiosd.kernel.proc import Proc, ProcState, ProcTable
from libaios import wire


def waited(proc: Proc) -> wire.Waited:
    assert proc.status is not None
    return wire.Waited(proc.pid, proc.status, proc.budget, proc.reason, proc.denied)


@dataclass(slots=True, eq=False)
class _Condition:
    """A KILL call. An agent for which `done` was true once is removed from `left`; the call ends when `left` is
    empty."""

    call: Call
    done: Callable[[Proc], bool]
    left: set[int]


class Waiters:
    """All waiters. `collect` is called with a zombie whose exit status was given to its parent, the key of the call
    that got it, and the body of the reply."""

    def __init__(self, table: ProcTable, calls: CallTable, rights: Access) -> None:
        self._table = table
        self._calls = calls
        self._rights = rights
        self._for_exit: dict[int, dict[Call, None]] = {}  # WAIT calls for the end of this pid
        self._for_child: dict[int, dict[Call, None]] = {}  # … of any child of this pid, oldest first
        self._conditions: dict[int, dict[Call, _Condition]] = {}  # KILL calls, by each pid that they depend on
        self.collect: Callable[[Proc, link.CallKey, wire.Waited], None]

    def calls(self) -> list[Call]:
        lists: list[Iterable[Call]] = [*self._for_exit.values(), *self._for_child.values(), *self._conditions.values()]
        return [call for waiting in lists for call in waiting]

    # ── WAIT ──────────────────────────────────────────────────────────────────────────────────────────────

    def wait(self, call: Call, args: wire.Wait) -> wire.Waited | None:
        """The result when there is one already; None when the call now waits."""
        found = self._dead(call, args.pid)
        if found is not None:
            return self._take(call, found)
        if not args.block:
            return wire.Waited(0, 0)
        if args.pid:
            _enlist(self._for_exit, args.pid, call)
        else:
            _enlist(self._for_child, access.require_agent(call.peer, "waits for any child").pid, call)
        self._calls.set_timeout(call, args.timeout_s, "exit")
        return None

    def _dead(self, call: Call, pid: int) -> Proc | None:
        """A dead process whose status this call may get, else None; raises an error if there can never be one."""
        peer = call.peer
        if pid:
            proc = self._table.find(pid)
            if proc is None:
                raise wire.error(errno.ECHILD, str(self._rights.no_agent(pid).strerror))
            if not access.may_wait(peer, proc) or (peer.proc is not None and proc.state is ProcState.REAPED):
                raise wire.error(errno.ECHILD, f"{pid}: not a child of the caller")
            return None if proc.alive else proc
        parent = access.require_agent(peer, "can wait for any child; a pid is needed")
        children = self._table.children_of(parent.pid)
        if not children:
            raise wire.error(errno.ECHILD, "the caller has no children")
        return next((child for child in children if not child.alive), None)

    def _take(self, call: Call, proc: Proc) -> wire.Waited:
        result = waited(proc)
        if access.reaps(call.peer, proc):
            self.collect(proc, call.key, result)
        return result

    @staticmethod
    def _is_gone(call: Call, proc: Proc) -> bool:
        """Whether the call would have collected the status, but another call has done so."""
        return access.reaps(call.peer, proc) and proc.state is ProcState.REAPED

    def on_exit(self, proc: Proc, ppid: int) -> None:
        """Give the status to every call that may have it; the parent's first waiter collects it. `ppid`: the pid of its
        parent, which may have died at the same time."""
        for call in list(self._for_exit.get(proc.pid, ())):
            if self._is_gone(call, proc):
                self._calls.fail(call, errno.ECHILD, f"{proc.pid}: its status went to another wait")
            else:
                self._calls.finish(call, self._take(call, proc))
        # Of the calls that wait for any child only the first gets this one, and the others are not checked.
        while waiting := self._for_child.get(ppid):
            call = next(iter(waiting))
            if not self._is_gone(call, proc):
                self._calls.finish(call, self._take(call, proc))
            elif not self._table.children.get(ppid):
                self._calls.fail(call, errno.ECHILD, f"{proc.pid}: its status went to another wait")
            else:
                break
        self.on_change(proc)

    # ── KILL ──────────────────────────────────────────────────────────────────────────────────────────────

    def until(self, call: Call, procs: Iterable[Proc], done: Callable[[Proc], bool]) -> bool:
        """Whether `done` already holds for all of these agents; if not, the call is finished when it has held for each.
        `done` for one agent must depend on nothing but events of that agent, so it is checked only then, and only for
        that agent: all may be stopped at once, and there may be thousands."""
        condition = _Condition(call, done, {proc.pid for proc in procs if not done(proc)})
        if not condition.left:
            return True
        for pid in condition.left:
            self._conditions.setdefault(pid, {})[call] = condition
        call.forget = lambda: self._forget(condition)
        return False

    def _forget(self, condition: _Condition) -> None:
        for pid in condition.left:
            self._unlist(pid, condition.call)

    def _unlist(self, pid: int, call: Call) -> None:
        waiting = self._conditions[pid]
        del waiting[call]
        if not waiting:
            del self._conditions[pid]

    def on_change(self, proc: Proc) -> None:
        """The agent has stopped, goes on, stands still, or has ended."""
        for condition in list(self._conditions.get(proc.pid, {}).values()):
            if condition.done(proc):
                condition.left.discard(proc.pid)
                self._unlist(proc.pid, condition.call)
                if not condition.left:
                    self._calls.finish(condition.call, None)


def _enlist(lists: dict[int, dict[Call, None]], pid: int, call: Call) -> None:
    def forget() -> None:
        waiting = lists[pid]
        del waiting[call]
        if not waiting:
            del lists[pid]

    lists.setdefault(pid, {})[call] = None
    call.forget = forget
