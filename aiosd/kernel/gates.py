"""Passes the gates of agents that reach single hosts on, from the supervisor to the proxy.

The kernel knows which hosts an agent may reach; the proxy serves the agent's gates (`birth.gates`). Both processes may
die: a new kernel gets the gates from the supervisor, and sends all of them to every new proxy.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiosd.ipc import link, passage
from aiosd.ipc.passage import Closed, Gate, GatesKept
from aiosd.kernel.audit import Audit
from aiosd.kernel.measure import Measure
from aiosd.kernel.proc import Proc
from aiosd.kernel.service import Service
from aiosd.timers import Timers

AGAIN_S = 0.05  # pause after the passage was full
_SIOCGSKNS = 0x894C  # a descriptor of the network that a socket belongs to


class Gates:
    """`sock`: the passage to the proxy; None: there is no proxy. `used`: an earlier kernel may have sent gates through
    it."""

    def __init__(self, sock: socket.socket | None, timers: Timers, used: bool) -> None:
        self._sock = sock
        self._used = used
        self._timers = timers
        self._open: dict[int, tuple[Gate, tuple[int, ...]]] = {}  # with their descriptors, by pid
        self._waiting: deque[Gate | Closed | GatesKept] = deque()
        self._due = False  # a timer will send the gates that wait

    def open(self, proc: Proc, fds: Sequence[int]) -> None:
        """Take over the gates of an agent, and own their descriptors."""
        self.close(proc)
        gates = tuple(fds)
        if not gates or proc.box is None:
            return
        self._used = True
        proc.network = _network_of(gates[0])
        self._open[proc.pid] = Gate(proc.pid, proc.restarts, proc.box.net), gates
        self._send(self._open[proc.pid][0])

    def close(self, proc: Proc) -> None:
        """Close the gates of an agent whose process has ended."""
        proc.network = 0
        known = self._open.pop(proc.pid, None)
        if known is not None:
            for fd in known[1]:
                os.close(fd)
            self._send(Closed(proc.pid))

    def descriptors(self) -> int:
        return sum(len(fds) for _, fds in self._open.values())

    def begin(self) -> None:
        """There is a new proxy, or it has a new kernel: send it all gates. While there was no gate it gets no message,
        so that it need not load anything."""
        if not self._used:
            return
        self._waiting.clear()
        self._send(GatesKept(list(self._open)))
        for gate, _ in list(self._open.values()):
            self._send(gate)

    def _send(self, message: Gate | Closed | GatesKept) -> None:
        self._waiting.append(message)
        if not self._due:
            self._flush()

    def _flush(self) -> None:
        self._due = False
        while self._waiting and self._sock is not None:
            message = self._waiting[0]
            fds: tuple[int, ...] = ()
            if isinstance(message, Gate):
                gate, fds = self._open.get(message.pid, (None, ()))
                if gate is not message:  # the agent has ended meanwhile
                    self._waiting.popleft()
                    continue
            try:
                passage.send(self._sock, message, fds)
            except OSError:  # the proxy does not keep up, or there is none
                self._due = True
                self._timers.after(AGAIN_S, self._flush)
                return
            self._waiting.popleft()


def _network_of(sock: int) -> int:
    """The inode of the socket's network, unique while the socket is open; 0: Linux does not report it."""
    with contextlib.suppress(OSError):
        fd = fcntl.ioctl(sock, _SIOCGSKNS)
        try:
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)
    return 0


@dataclass(slots=True, eq=False, kw_only=True)
class ProxyService(Service):
    """The kernel's side of the proxy."""

    gates: Gates
    audit: Audit
    agent: Callable[[int], Proc | None]
    measure: Measure

    def on_ready(self) -> None:
        Service.on_ready(self)
        self.gates.begin()

    def handle(self, message: link.FromService) -> None:
        if isinstance(message, link.ProxyUse):
            self.measure.proxy_used(message)
            return
        if not isinstance(message, link.Denied):
            Service.handle(self, message)
            return
        proc = self.agent(message.pid)
        if proc is not None:
            proc.denied = message.why
            about = {"name": proc.name, "group": proc.group}
            what = f"net {message.host}:{message.port}"
            self.audit.note("denied", message.pid, **about, what=what, by=message.why)
