"""Who may do what: default deny.

A client of the control socket that is aiosd's own user acts as the person at the terminal and may do
everything. An agent — and a client that descends from one — may read the process list, and act upon itself,
its descendants, and nothing else. The identity comes from the connection (see `peer`).
"""

from __future__ import annotations

import errno

from aiosd.kernel.peer import Peer
from aiosd.kernel.proc import INIT, Proc, ProcTable
from libaios import wire


def require_person(peer: Peer, what: str) -> None:
    if peer.proc is not None:
        raise wire.error(errno.EPERM, f"an agent may not {what}")


def require_agent(peer: Peer, what: str) -> Proc:
    if peer.proc is None:
        raise wire.error(errno.EINVAL, f"only an agent {what}")
    return peer.proc


def may_control(table: ProcTable, peer: Peer, target: Proc) -> bool:
    """Signal, renice, inspect the limits of: a person all, an agent itself and its descendants."""
    return peer.proc is None or table.is_ancestor(peer.proc.pid, target)


def require_control(table: ProcTable, peer: Peer, target: Proc) -> None:
    if not may_control(table, peer, target):
        raise wire.error(errno.EPERM, f"{target.pid}: permission denied")


def may_wait(peer: Peer, target: Proc) -> bool:
    """A person for anybody; an agent for its children."""
    return peer.proc is None or target.ppid == peer.proc.pid


def reaps(peer: Peer, target: Proc) -> bool:
    """Whether a wait by this peer collects the exit status: only a parent's does."""
    return peer.proc is not None and target.ppid == peer.proc.pid


def parent_pid(peer: Peer) -> int:
    """The parent of what this peer spawns."""
    return INIT if peer.proc is None else peer.proc.pid
