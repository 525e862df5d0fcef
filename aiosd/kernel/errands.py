"""Errands: system calls that a service makes while it serves a call, in the name of that call's agent.

The toolbox has tools that are system calls: keeping a note, reading a stored file. It has no rights of its own. So it
sends an errand that names the call that it works on, and the kernel makes the system call as if that agent had made it:
with the same rights, the same limits, the same owner in the store. Only calls that the store answers can be errands.

Each errand has a peer (`ErrandPeer`): the agent's identity, and the service as the reader of the reply. All errands of
a service have one space of ids, which is named by the service's pid. An errand ends with the call that it is for.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec import Raw

from aiosd.ipc import link
from aiosd.kernel.measure import Measure
from aiosd.kernel.peer import Call, Peer, failure
from aiosd.kernel.proc import Proc
from aiosd.kernel.service import Service, ServiceCall
from aiosd.kernel.toolfiles import FilesOfTools
from libaios import wire

ALLOWED = frozenset(row.sys for row in wire.TABLE.values() if row.by == "store")


class ErrandPeer(Peer):
    """Acts for the agent `proc` (None: for the person at the terminal). `calls`: the calls of all errands of the
    service."""

    __slots__ = ("_service",)

    def __init__(self, service: Service, proc: Proc | None, calls: dict[int, Call]) -> None:
        super().__init__(service.pid, proc)
        self._service = service
        self.calls = calls

    def send(self, payload: bytes) -> None:
        number = wire.decode_reply(payload).id
        self._service.send(link.ErrandDone(number, payload))

    @property
    def outbox_bytes(self) -> int:
        channel = self._service.channel
        return channel.outbox_bytes if channel is not None else 0

    def close(self) -> None:
        pass


@dataclass(slots=True, eq=False, kw_only=True)
class Errander(Service):
    """A service that may send errands, and reports what its calls use. `dispatch`: makes a system call for a peer."""

    dispatch: Callable[[Peer, bytes], None]
    measure: Measure
    tool_files: FilesOfTools
    errands: dict[int, Call] = field(default_factory=dict)  # the open ones, by number
    of: dict[link.CallKey, set[int]] = field(default_factory=dict)  # numbers of open errands, by their call

    def handle(self, message: link.FromService) -> None:
        if isinstance(message, link.Errand):
            self._errand(message)
        elif isinstance(message, link.ToolUse):
            self.measure.tools_used(message)
        elif isinstance(message, link.ToolFiles):
            self.tool_files.loaded(message)
        else:
            Service.handle(self, message)

    def _errand(self, message: link.Errand) -> None:
        opened = self.calls.get(message.key)
        if opened is None:
            return  # its call is over; the service gets that message in a moment
        if message.sys not in ALLOWED:
            self.send(link.ErrandDone(message.number, failure(message.number, errno.EPERM, "no errand does this")))
            return
        peer = ErrandPeer(self, opened.call.peer.proc, self.errands)
        self.of.setdefault(message.key, set()).add(message.number)
        request = wire.Request(message.number, message.sys, Raw(bytes(message.args)), message.again)
        self.dispatch(peer, wire.encode(request))

    def died(self, reason: str) -> None:
        Service.died(self, reason)
        self.measure.tools_ended()

    def cancel(self, call: Call) -> None:
        Service.cancel(self, call)
        self._drop(call.key)

    def _take(self, key: link.CallKey) -> ServiceCall | None:
        self._drop(key)
        return Service._take(self, key)

    def _lost(self, opened: ServiceCall, message: str) -> None:
        self._drop(opened.call.key)
        Service._lost(self, opened, message)

    def _drop(self, key: link.CallKey) -> None:
        """End the errands of a call that is over."""
        for number in self.of.pop(key, ()):
            call = self.errands.get(number)
            if call is not None:
                self.calls_of_all.close(call)
