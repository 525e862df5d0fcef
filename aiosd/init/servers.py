"""MCP servers, from the supervisor's side: each is forked for the toolbox, and ended with the worker that uses it.

The toolbox sends requests over a socket that all toolboxes of this system share (`theirs`). A request has descriptors
of the server's settings, which are not read here, of the pipes that become its stdin and stdout, and of the end of a
*lease*: a pipe whose other end only the toolbox's worker for this server has (`tools.bridge`). When that worker ends,
by whatever cause, the lease hangs up, and the server is killed with all processes that it has started.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from aiosd.birth import fork, server
from aiosd.birth.server import House
from aiosd.init.signals import signal_tree
from aiosd.ipc import link

logger = logging.getLogger("supervisor")

MOST = 64
FDS = 5  # of a request: settings, stdin, stdout, the pipe for a failure, the lease
REQUEST_BYTES = 4096


@dataclass(slots=True, eq=False)
class ServerProcess:
    number: int  # the toolbox's number for it
    name: str
    ospid: int
    lease: int
    pid: int  # its number for people
    started: float  # Unix time


class McpServerPool:
    """All servers. `children`: the supervisor's map of live children. `house` is made when the first server is
    requested. `new_pid` returns the number for a new one; `changed` is called when servers have begun or ended."""

    def __init__(
        self,
        epoll: select.epoll,
        children: dict[int, Any],
        house: Callable[[], House],
        new_pid: Callable[[], int],
        changed: Callable[[list[link.ServerShown]], None],
    ) -> None:
        self._epoll, self._children, self._house = epoll, children, house
        self._new_pid, self._changed = new_pid, changed
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._by_lease: dict[int, ServerProcess] = {}
        epoll.register(self._ours.fileno(), select.EPOLLIN)

    def look(self, fd: int) -> bool:
        """Handle an event of this descriptor; returns whether it belongs here."""
        if fd == self._ours.fileno():
            self._requested()
            return True
        held = self._by_lease.get(fd)
        if held is None:
            return False
        self._drop_lease(held)
        signal_tree(held.ospid, signal.SIGKILL)
        return True

    def _requested(self) -> None:
        try:
            room = socket.CMSG_SPACE(FDS * 4)
            payload, ancillary, _, _ = self._ours.recvmsg(REQUEST_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return
        fds = [fd for _, _, data in ancillary for fd in array.array("i", data)]
        try:
            wanted = msgspec.msgpack.decode(payload, type=link.StartServer)
            if len(fds) == FDS:
                self._start(wanted, fds)
        except (msgspec.MsgspecError, OSError) as err:  # the worker notices the end of its pipes
            logger.error("an MCP server cannot be started: %s", err)
        finally:
            for fd in fds:
                if fd not in self._by_lease:
                    os.close(fd)

    def _start(self, wanted: link.StartServer, fds: list[int]) -> None:
        if len(self._by_lease) >= MOST:
            raise OSError(f"there are {MOST} already")
        *given, lease = fds
        ospid = fork.fork(lambda: server.become(wanted.name, given, self._house()))
        one = ServerProcess(wanted.number, wanted.name, ospid, lease, self._new_pid(), time.time())
        self._children[ospid] = self._by_lease[lease] = one
        self._epoll.register(lease, 0)  # a hang-up is always reported
        self._changed(self.shown())
        self._answer(link.ServerIs(wanted.number, ospid))

    def ended(self, one: ServerProcess, why: str) -> None:
        """A server's process has ended, and was reaped."""
        if self._by_lease.get(one.lease) is one:  # else it is closed, and another descriptor may have its number
            logger.debug("the MCP server %s ended: %s", one.name, why)
            self._drop_lease(one)
        self._answer(link.ServerIs(one.number, 0))
        self._changed(self.shown())

    def shown(self) -> list[link.ServerShown]:
        """The servers whose process has not ended."""
        return [
            link.ServerShown(one.name, one.pid, one.ospid, one.started)
            for one in self._children.values()
            if isinstance(one, ServerProcess)
        ]

    def _drop_lease(self, one: ServerProcess) -> None:
        del self._by_lease[one.lease]
        self._epoll.unregister(one.lease)
        os.close(one.lease)

    def _answer(self, message: link.ServerIs) -> None:
        with contextlib.suppress(OSError):  # no toolbox reads: it has just died, and its servers end
            self._ours.send(link.encode(message))
