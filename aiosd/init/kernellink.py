"""The supervisor's link to the current kernel."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator

from aiosd.init.records import SystemProcess
from aiosd.ipc import link
from libaios.stream import FrameSocket


class KernelLink:
    """The link. While there is no kernel nothing that is sent is lost, because the next one inherits the records. A
    kernel that has just died may have left messages, so the link stays open until all of them are read."""

    def __init__(self, epoll: select.epoll, kernel: SystemProcess) -> None:
        self._epoll = epoll
        self._kernel = kernel
        self._frames: FrameSocket | None = None
        self._watches_output = False
        self.epoch = 0  # how many kernels there have been

    @property
    def is_open(self) -> bool:
        return self._frames is not None

    def is_at(self, fd: int) -> bool:
        return self._frames is not None and fd == self._frames.fileno()

    def open(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._frames = FrameSocket(sock)
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        self._watches_output = False

    def send(self, message: link.FromSupervisor, fds: tuple[int, ...] = ()) -> None:
        if self._frames is None or not self._kernel.ospid:
            return
        try:
            self._frames.send(link.encode(message), fds)
            self._watch()
        except (BrokenPipeError, ConnectionError):
            pass  # it has just died

    def receive(self) -> Iterator[tuple[link.ToSupervisor, list[int]]]:
        """The messages that have come. The caller must close the descriptors that come with them."""
        frames = self._frames
        if frames is None:
            return
        with contextlib.suppress(OSError):  # the kernel died; its messages are still handled
            if self._kernel.ospid:
                frames.flush()
        try:
            received = frames.receive()
        except (OSError, EOFError):
            self._close(frames)
            return
        for payload, fds in received:
            yield link.decode_to_supervisor(payload), fds
        self._watch()

    def _watch(self) -> None:
        if self._frames is None:
            return
        waits = bool(self._frames.pending)
        if waits is not self._watches_output:
            self._epoll.modify(self._frames.fileno(), select.EPOLLIN | (select.EPOLLOUT if waits else 0))
            self._watches_output = waits

    def _close(self, frames: FrameSocket) -> None:
        self._epoll.unregister(frames.fileno())
        frames.close()
        self._frames = None
