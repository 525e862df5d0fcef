"""MCP servers, from the toolbox's side: requested here, and forked by the supervisor (see `aiosd.init.servers`).

A server gets its settings in a memfd; its stdin and stdout are pipes. It lives as long as the worker that has the other
ends of these pipes and its *lease*, a descriptor that closes with the worker (`tools.bridge`). The worker itself ends
when its connection to the toolbox closes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from random import SystemRandom

import msgspec
from msgspec.structs import replace

from aiosd.ipc import link
from aiosd.tools.spec import McpServer

ANSWER_BYTES = 4096


class McpLauncher:
    """All servers. `wanted`: their settings by name. `sock`: the socket to the supervisor (-1: there is none, and no
    server starts). Earlier toolboxes have used the same socket, so numbers are random."""

    def __init__(
        self, wanted: Mapping[str, McpServer], sock: int, watch: Callable[[int, Callable[[], None]], None]
    ) -> None:
        self.wanted = wanted
        self._ospids: dict[int, int] = {}  # of running servers, by number
        self._asked: set[int] = set()
        self._sock = socket.socket(fileno=sock) if sock >= 0 else None
        if self._sock is not None:
            self._sock.setblocking(False)
            watch(self._sock.fileno(), self._answered)

    @property
    def running(self) -> int:
        return len(self._ospids)

    def ospid(self, number: int) -> int:
        """The Linux pid of a server; 0: it does not run."""
        return self._ospids.get(number, 0)

    def start(self, name: str, env: Mapping[str, str]) -> tuple[int, list[int]]:
        """Request a server. Returns its number and the descriptors for its worker, which the caller closes: the writing
        end of its stdin, the reading ends of its stdout and of the message why it cannot start, and its lease. `env`:
        its environment, besides that of its settings. Raises OSError."""
        if self._sock is None:
            raise OSError("MCP servers cannot be started here")
        server = self.wanted[name]
        number = SystemRandom().getrandbits(63)
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as sent:

            def pipe() -> tuple[int, int]:
                return os.pipe2(os.O_CLOEXEC)

            ends: list[int] = []
            theirs = [os.memfd_create("aios-mcp")]
            sent.callback(os.close, theirs[0])
            os.write(theirs[0], msgspec.msgpack.encode(replace(server, env={**env, **server.env})))
            for ours_writes in (True, False, False, True):  # stdin, stdout, the reason of a failure, the lease
                reading, writing = pipe()
                ours, other = (writing, reading) if ours_writes else (reading, writing)
                undo.callback(os.close, ours)
                sent.callback(os.close, other)
                ends.append(ours)
                theirs.append(other)
            message = link.encode(link.StartServer(number, name))
            self._sock.setblocking(True)
            try:
                socket.send_fds(self._sock, [message], theirs)
            finally:
                self._sock.setblocking(False)
            undo.pop_all()
        self._asked.add(number)
        return number, ends

    def _answered(self) -> None:
        assert self._sock is not None
        try:
            answer = msgspec.msgpack.decode(self._sock.recv(ANSWER_BYTES), type=link.ServerIs)
        except (OSError, msgspec.MsgspecError):
            return
        if answer.number not in self._asked:  # the answer is for an earlier toolbox
            return
        if answer.ospid:
            self._ospids[answer.number] = answer.ospid
        else:
            self._ospids.pop(answer.number, None)
            self._asked.discard(answer.number)
