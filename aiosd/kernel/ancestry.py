"""Finds whether a connection comes from a descendant of an agent, or from another process of the user.

Linux gives the process that made the connection, and a pidfd of it. From there this code follows the parents upwards,
to an agent, or to the top of the process tree. Agents are subreapers and children of the supervisor, another subreaper;
so a process that an agent starts has that agent or the supervisor above it, however often it forks and detaches.

Only a complete and consistent result counts. A process that has ended has no parents to follow; if a parent ends in the
meantime, the path is inconsistent, and is followed again from the start. A connection that cannot be shown to come from
outside is refused.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from aiosd import procfs

SO_PEERPIDFD = 77  # Linux 6.5
TRIES = 20  # at most this often a path is followed again because it changed

A = TypeVar("A")


class Unproven(Exception):
    """The origin of this connection cannot be shown; the message gives the reason."""


class Unsettled(Unproven):
    """It descends from a child of the supervisor: perhaps from an agent that this kernel does not know yet."""


class Origin(NamedTuple):
    ospid: int
    uid: int
    pidfd: int  # the caller closes it


def peer_of(sock: socket.socket) -> Origin:
    """The process that made this connection. Raises Unproven."""
    ospid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if ospid <= 0:
        raise Unproven("a process of another PID namespace")
    try:
        pidfd = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4))[0]
    except OSError as err:
        if err.errno != errno.ENOPROTOOPT:
            raise Unproven("the process that connected has ended") from None
        pidfd = _open_pidfd(ospid)
    return Origin(ospid, uid, pidfd)


def _open_pidfd(ospid: int) -> int:
    """For an older Linux. Here a process that connects and ends could be mistaken for a later one with the same number;
    but Linux uses all other numbers before it uses one again."""
    try:
        return os.pidfd_open(ospid)
    except OSError:
        raise Unproven("the process that connected has ended") from None


def agent_above(origin: Origin, agents: Mapping[int, A], supervisor: int) -> A | None:
    """The agent (by Linux pid in `agents`) that the process is or descends from; None: it comes from outside. Raises
    Unproven."""
    for _ in range(TRIES):
        way = _way_up(origin.ospid, agents, supervisor)
        if has_ended(origin.pidfd):
            raise Unproven("the process that connected has ended")
        if way is not None and way == _way_up(origin.ospid, agents, supervisor) and not has_ended(origin.pidfd):
            top = way[-1][0]
            if top == supervisor:
                raise Unsettled("an orphan of an agent")
            return agents.get(top)
    raise Unproven("its ancestors change too fast to be followed")


def agent_above_all(processes: Iterable[tuple[int, int]], agents: Mapping[int, A], supervisor: int) -> A:
    """The one agent that all of these processes (Linux pid, start time) are or descend from. Raises Unproven, also
    where it is not one agent, or a process comes from outside.

    When a process loses its parent, another ancestor takes its place. So what descends from an agent now has done so
    as long as it has lived.
    """
    found = [_agent_above_named(ospid, started, agents, supervisor) for ospid, started in processes]
    if not found or found[0] is None or any(one is not found[0] for one in found):
        raise Unproven("not of one agent")
    return found[0]


def _agent_above_named(ospid: int, started: int, agents: Mapping[int, A], supervisor: int) -> A | None:
    origin = Origin(ospid, os.getuid(), _open_pidfd(ospid))
    try:
        if not procfs.is_there(ospid, started):
            raise Unproven("the process that connected has ended")
        return agent_above(origin, agents, supervisor)
    finally:
        os.close(origin.pidfd)


def is_child(origin: Origin, supervisor: int) -> bool:
    """Whether the process is a live child of the supervisor, as every service is."""
    stat = procfs.read_stat(origin.ospid)
    return stat is not None and stat.ppid == supervisor and not has_ended(origin.pidfd)


def _way_up(ospid: int, agents: Mapping[int, A], supervisor: int) -> list[tuple[int, int]] | None:
    """(Linux pid, start time) from the process up to an agent, the supervisor, or the top; None: the path broke off."""
    way: list[tuple[int, int]] = []
    while True:
        stat = procfs.read_stat(ospid)
        if stat is None or stat.state in ("Z", "X"):
            return None
        way.append((ospid, stat.started))
        if ospid in agents or ospid == supervisor or stat.ppid == 0:
            return way
        ospid = stat.ppid


def has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
