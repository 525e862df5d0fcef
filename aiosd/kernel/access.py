"""The rights of each caller. What is not allowed here is denied.

A client of the control socket that is aiosd's own user acts as the person at the terminal and may do
everything. An agent, and a client that descends from one, may read the process list, and act upon itself and
its descendants, and nothing else. The identity comes from the connection (see `peer`, `control`).

`check` is called once for every call, before its handler or its service gets it. It raises OSError (EPERM, …) or
returns whether the call may go on now or later; "later" is for calls that a person has to allow first. This file
decides what an agent may do at all; `approvals` applies rules and the answers of people to that. A person may allow an
agent once to raise its rights, which it may not do otherwise (`Call.allowed`).
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable
from typing import Any

from aiosd.access.deed import Deed
from aiosd.kernel import deeds
from aiosd.kernel.approvals import Approvals
from aiosd.kernel.peer import Call, Peer
from aiosd.kernel.proc import INIT, Proc, ProcTable
from libaios import wire
from libaios.wire import Sys

#: The calls that a service (the store) may make over the control socket. (The gateway calls in the name of an agent.)
_OF_SERVICES = (Sys.EMBED,)


class Clearance(enum.Enum):
    NOW = "now"
    LATER = "later"  # the call stays open, and goes on when a person has decided


class Access:
    """The check of rights. `raised` returns in which way a new agent would have more rights than its parent, or ""."""

    def __init__(
        self,
        table: ProcTable,
        system_pids: Callable[[], set[int]],
        approvals: Approvals,
        raised: Callable[[wire.Spawn, Proc], str],
    ) -> None:
        self._table = table
        self._approvals = approvals
        self._raised = raised
        self._system_pids = system_pids  # of aiosd's own processes
        self._rules: dict[int, Callable[[Peer, Any], object]] = {
            Sys.KILL: lambda peer, args: self.targets(peer, args.pid),
            Sys.NICE: self._nice,
            Sys.INSPECT: lambda peer, args: self.require_control(peer, self.known(args.pid)),
            Sys.RECV: lambda peer, args: require_agent(peer, "has a mailbox"),
            Sys.STATUS: self._status,
            Sys.SHUTDOWN: lambda peer, args: require_person(peer, "stop the system"),
            Sys.TOKEN_NEW: lambda peer, args: require_person(peer, "make tokens"),
            Sys.TOKEN_LIST: lambda peer, args: require_person(peer, "list tokens"),
            Sys.SET: lambda peer, args: require_person(peer, "change settings"),
            Sys.STO_EMPTY: lambda peer, args: require_person(peer, "empty the trash"),
            Sys.STORE_SNAPSHOT: lambda peer, args: require_person(peer, "copy what all agents keep"),
            Sys.ASK_LIST: lambda peer, args: require_person(peer, "see what is asked of people"),
            Sys.ASK_WATCH: lambda peer, args: require_person(peer, "see what is asked of people"),
            Sys.ASK_ANSWER: lambda peer, args: require_person(peer, "answer what is asked of a person"),
            Sys.RULES: lambda peer, args: require_person(peer, "see all rules"),
            Sys.ALWAYS_LIST: lambda peer, args: require_person(peer, "see what is allowed for all times"),
            Sys.ALWAYS_REVOKE: lambda peer, args: require_person(peer, "revoke what is allowed"),
        }
        # Calls whose arguments an agent's rights depend on. (The rule about RECV is for others: each agent may.)
        self._looked_at = {*self._rules, Sys.SPAWN} - {Sys.RECV}

    def check(self, call: Call, args: Any, go_on: Callable[[], None]) -> Clearance:
        """Check one call; see the top of this file. `go_on` is called when a call for which LATER was returned is
        allowed."""
        peer, row = call.peer, call.row
        try:
            self._check_identity(peer, row, args)
        except PermissionError as err:
            if peer.proc is not None:
                self._approvals.denied(peer.proc, Deed(row.name), err.strerror or "not its own")
            raise
        if peer.proc is None or row.sys in deeds.OF_SERVICES or row.sys in deeds.FREE:
            return Clearance.NOW
        deed = self._deed(peer.proc, row, args)
        if deed is None or self._approvals.judge(call, deed, go_on):
            call.allowed = deed is not None
            return Clearance.NOW
        return Clearance.LATER

    def is_free(self, row: wire.Row) -> bool:
        """Whether every agent may make this call now, whatever its arguments."""
        return row.sys not in self._looked_at and not self._ruled(row)

    def is_at_once(self, call: Call) -> bool:
        """Whether `check` would return NOW: a fast answer for most calls; False: it is not known."""
        return call.peer.proc is not None and self.is_free(call.row)

    def _deed(self, proc: Proc, row: wire.Row, args: Any) -> Deed | None:
        """The deed that has to be decided about; None: there is nothing to decide, as for almost every call."""
        if row.sys == Sys.SPAWN:
            raised = self._raised(args, proc)
            return deeds.spawned(args, raised) if raised or self._ruled(row) else None
        if row.sys == Sys.NICE:
            target = proc if not args.pid else self.known(args.pid)
            new = new_nice(target, args)
            if new < target.nice:
                return deeds.renice(args, target, new)
        if not self._ruled(row):
            return None
        if row.sys == Sys.KILL:
            return deeds.signalled(args, self._meant(args.pid, proc))
        target_of = self._table.find(args.pid) if row.sys in (Sys.NICE, Sys.INSPECT, Sys.SEND) else None
        return deeds.concerning(row, args, target_of) if target_of is not None else deeds.plain(row, args)

    def _ruled(self, row: wire.Row) -> bool:
        return self._approvals.concerns(row)

    def _meant(self, pid: int, proc: Proc) -> list[Proc]:
        if pid > 0:
            return [self._table.procs[pid]]
        members = self._table.members(-pid or proc.pgid)
        family = {one.pid for one in self._table.subtrees([proc])}
        return [member for member in members if member.pid in family]

    def _check_identity(self, peer: Peer, row: wire.Row, args: Any) -> None:
        service = getattr(peer, "service", "")
        if service and peer.proc is None and row.sys not in _OF_SERVICES:
            raise wire.error(errno.EPERM, f"{service}: a service may not call {row.name}")
        rule = self._rules.get(row.sys)
        if rule is not None:
            rule(peer, args)

    def _status(self, peer: Peer, args: wire.Status) -> None:
        if args.check:  # it takes long
            require_person(peer, "have the books checked")

    def _nice(self, peer: Peer, args: wire.NiceArgs) -> None:
        if args.pid:
            self.targets(peer, args.pid)
        else:
            require_agent(peer, "has a nice value of its own")

    def asks_of(self, proc: Proc) -> list[dict[str, str]]:
        """The open asks of an agent."""
        return self._approvals.of(proc)

    # ── the objects of calls ──────────────────────────────────────────────────────────────────────────────

    def known(self, pid: int) -> Proc:
        """The agent of this pid, or a dead one of which there is still a record. Raises OSError: ESRCH, EPERM."""
        proc = self._table.find(pid)
        if proc is None:
            raise self.no_agent(pid)
        return proc

    def targets(self, peer: Peer, pid: int) -> list[Proc]:
        """The agents meant by `pid`, all of which the caller may control; a negative pid means a process group. Raises
        OSError: ESRCH, EPERM."""
        if pid <= 0:
            pgid = -pid or require_agent(peer, "has a process group of its own").pgid
            members = self._table.members(pgid)
            if not members:
                raise wire.error(errno.ESRCH, f"{-pgid}: no such process group")
            allowed = self._controlled(peer, members)
            if not allowed:
                raise wire.error(errno.EPERM, f"{-pgid}: permission denied")
            return allowed
        proc = self._table.get(pid)
        if proc is None:
            raise self.no_agent(pid)
        self.require_control(peer, proc)
        return [proc]

    def _controlled(self, peer: Peer, procs: list[Proc]) -> list[Proc]:
        """Those of many agents that the caller may control; faster than following the parents of each."""
        if peer.proc is None:
            return procs
        family = {proc.pid for proc in self._table.subtrees([peer.proc])}
        return [proc for proc in procs if proc.pid in family]

    def no_agent(self, pid: int) -> OSError:
        """The error for a caller that takes this pid for an agent's."""
        if pid in self._system_pids():
            return wire.error(errno.EPERM, f"{pid}: is part of aiosd itself (see aiosd status, aiosd stop)")
        return wire.error(errno.ESRCH, f"{pid}: no such agent")

    def may_control(self, peer: Peer, target: Proc) -> bool:
        """Whether it may signal, renice and inspect the target: a person may for all, an agent for itself and its
        descendants."""
        return peer.proc is None or self._table.is_ancestor(peer.proc.pid, target)

    def require_control(self, peer: Peer, target: Proc) -> None:
        if not self.may_control(peer, target):
            raise wire.error(errno.EPERM, f"{target.pid}: permission denied")


def new_nice(target: Proc, args: wire.NiceArgs) -> int:
    """The nice value that the call would set."""
    if args.value is None:
        return target.nice
    return max(-20, min(19, target.nice + args.value if args.relative else args.value))


def require_person(peer: Peer, what: str) -> None:
    if peer.proc is not None:
        raise wire.error(errno.EPERM, f"an agent may not {what}")


def require_agent(peer: Peer, what: str) -> Proc:
    if peer.proc is None:
        raise wire.error(errno.EINVAL, f"only an agent {what}")
    return peer.proc


def may_wait(peer: Peer, target: Proc) -> bool:
    """Whether it may wait for the target: a person may for any agent, an agent for its children."""
    return peer.proc is None or target.ppid == peer.proc.pid


def reaps(peer: Peer, target: Proc) -> bool:
    """Whether a wait by this peer collects the exit status: only a parent's does."""
    return peer.proc is not None and target.ppid == peer.proc.pid


def parent_pid(peer: Peer) -> int:
    """The parent of agents that this peer spawns."""
    return INIT if peer.proc is None else peer.proc.pid
