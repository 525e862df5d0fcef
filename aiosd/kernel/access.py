"""Which caller may do what: default deny.

A client of the control socket that is aiosd's own user acts as the person at the terminal and may do
everything. An agent, and a client that descends from one, may read the process list, and act upon itself and
its descendants, and nothing else. The identity comes from the connection (see `peer`, `control`).

`check` is asked once for every call, before its handler or its service sees it. It raises OSError (EPERM, …) or returns
whether the call may go on now or later; "later" is for calls that a person has to allow first.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable
from typing import Any

from aiosd.kernel.peer import Peer
from aiosd.kernel.proc import INIT, Proc, ProcTable
from libaios import wire
from libaios.wire import Sys

#: What a service (the store) may ask of others, over the control socket. (The gateway asks in the name of an agent.)
_OF_SERVICES = (Sys.EMBED,)


class Verdict(enum.Enum):
    NOW = "now"
    LATER = "later"  # the call stays open, and is taken up again when a person has decided


class Access:
    def __init__(self, table: ProcTable, system_pids: Callable[[], set[int]]) -> None:
        self._table = table
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
        }

    def check(self, peer: Peer, row: wire.Row, args: Any) -> Verdict:
        service = getattr(peer, "service", "")
        if service and peer.proc is None and row.sys not in _OF_SERVICES:
            raise wire.error(errno.EPERM, f"{service}: a service may not call {row.name}")
        rule = self._rules.get(row.sys)
        if rule is not None:
            rule(peer, args)
        return Verdict.NOW

    def _status(self, peer: Peer, args: wire.Status) -> None:
        if args.check:  # it takes long
            require_person(peer, "have the books checked")

    def _nice(self, peer: Peer, args: wire.NiceArgs) -> None:
        if args.pid:
            self.targets(peer, args.pid)
        else:
            require_agent(peer, "has a nice value of its own")

    # ── the objects of calls ──────────────────────────────────────────────────────────────────────────────

    def known(self, pid: int) -> Proc:
        """The agent of this pid, dead ones included that are remembered. Raises OSError: ESRCH, EPERM."""
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
        """Those of many that the caller may control, without a walk up from each."""
        if peer.proc is None:
            return procs
        family = {proc.pid for proc in self._table.subtrees([peer.proc])}
        return [proc for proc in procs if proc.pid in family]

    def no_agent(self, pid: int) -> OSError:
        """What a caller gets that takes this pid for an agent's."""
        if pid in self._system_pids():
            return wire.error(errno.EPERM, f"{pid}: is part of aiosd itself, which ends by: aiosd stop")
        return wire.error(errno.ESRCH, f"{pid}: no such agent")

    def may_control(self, peer: Peer, target: Proc) -> bool:
        """Signal, renice, inspect: a person all, an agent itself and its descendants."""
        return peer.proc is None or self._table.is_ancestor(peer.proc.pid, target)

    def require_control(self, peer: Peer, target: Proc) -> None:
        if not self.may_control(peer, target):
            raise wire.error(errno.EPERM, f"{target.pid}: permission denied")


def require_person(peer: Peer, what: str) -> None:
    if peer.proc is not None:
        raise wire.error(errno.EPERM, f"an agent may not {what}")


def require_agent(peer: Peer, what: str) -> Proc:
    if peer.proc is None:
        raise wire.error(errno.EINVAL, f"only an agent {what}")
    return peer.proc


def may_wait(peer: Peer, target: Proc) -> bool:
    """A person for any agent; an agent for its children."""
    return peer.proc is None or target.ppid == peer.proc.pid


def reaps(peer: Peer, target: Proc) -> bool:
    """Whether a wait by this peer collects the exit status: only a parent's does."""
    return peer.proc is not None and target.ppid == peer.proc.pid


def parent_pid(peer: Peer) -> int:
    """The parent of what this peer spawns."""
    return INIT if peer.proc is None else peer.proc.pid
