"""The kernel's link to the supervisor."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable

from aiosd.ipc import link
from aiosd.kernel.events import Events
from libaios.stream import FrameSocket


class Uplink:
    """Messages go out in order and are never lost while the supervisor lives. When the supervisor is gone, the system
    ends."""

    def __init__(
        self, sock: socket.socket, events: Events, on_message: Callable[[link.FromSupervisor, list[int]], None]
    ) -> None:
        self._frames = FrameSocket(sock, max_outbox=1 << 62)  # `Lifecycle.fork` keeps it small
        self._events = events
        self._on_message = on_message
        self._source = events.watch(sock.fileno(), self._on_event)
        self._watches_output = False

    @property
    def pending(self) -> int:
        """Bytes that the supervisor has not read."""
        return self._frames.pending

    def send(self, message: link.ToSupervisor, fds: tuple[int, ...] = ()) -> None:
        self._frames.send(link.encode(message), fds)
        self._watch()

    def _watch(self) -> None:
        waits = bool(self._frames.pending)
        if waits is not self._watches_output:
            self._events.modify(self._source, select.EPOLLIN | (select.EPOLLOUT if waits else 0))
            self._watches_output = waits

    def _on_event(self, mask: int) -> None:
        try:
            self._frames.flush()
            frames = self._frames.receive()
        except (EOFError, OSError):
            os._exit(1)  # the supervisor is gone, and with it the system
        for payload, fds in frames:
            self._on_message(link.decode_from_supervisor(payload), fds)
        self._watch()
