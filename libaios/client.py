"""The control socket: how a process that is no agent (aios-run, aios-ps, a notebook) talks to the kernel.

`ControlSocket` is a `Transport` for `connection.Connection`, as an agent's channel is. When the kernel dies the socket
is closed at its other end. The client then connects again, under the identity that it had, and `reborn` becomes true
when the new kernel has answered; the connection submits its open calls again under their ids.

Of these methods only `wait` blocks. Connecting again is a series of steps (`greeting`), and each `receive` takes the
next step. The descriptor (`fileno`) is an epoll over the socket and an alarm: it becomes readable when there is a step
to take. So an event loop goes on with its other work while there is no kernel, and threads sleep in `wait`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import time
from collections.abc import MutableSequence, Sequence
from typing import Any

from libaios import wire
from libaios.alarm import Alarm
from libaios.channel import BACKSTOP_S
from libaios.connection import Connection, Pending
from libaios.greeting import Gone, Greeting, NoKernel, Refused, greet
from libaios.home import Home
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

RECONNECT_S = 15.0  # how long to wait for the successor of a kernel that died
RETRY_S, RETRY_MAX_S = 0.01, 0.5  # pause after the first attempt that failed; doubled after each, up to the second
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.ENOTCONN)  # the errors of sending to a dead kernel


class Search:
    """The way from a dead kernel to its successor: attempts, pauses between them, and an end after RECONNECT_S."""

    def __init__(self, home: Home, client: int, boot: str, token: str = "") -> None:
        self._home, self._client, self._boot, self._token = home, client, boot, token
        self._give_up_at = time.monotonic() + RECONNECT_S
        self._next_at, self._pause = 0.0, RETRY_S
        self.alarm = Alarm()  # rings when `step` has something to do
        self._attempt: Greeting | None = None

    @property
    def frames(self) -> FrameSocket | None:
        """The socket of this attempt; when it is readable there is a step to take, too."""
        return self._attempt.frames if self._attempt is not None else None

    def step(self) -> bool:
        """Go on without waiting; True when the new kernel has answered. Raises NoKernel when there will be none."""
        now = time.monotonic()
        if self._attempt is None and now >= self._next_at:
            self._attempt = Greeting(self._home, self._client, self._boot, self._token)
        try:
            if self._attempt is not None and self._attempt.step() is not None:
                return True
        except (Gone, Refused):
            raise
        except NoKernel:
            if now >= self._give_up_at:
                raise
            self._attempt = None
            self._next_at, self._pause = now + self._pause, min(2 * self._pause, RETRY_MAX_S)
        self.alarm.ring_in(self._next_at - now if self._attempt is None else self._attempt.wait_s())
        return False

    def close(self) -> None:
        """Close what is open, except for the socket of an attempt that has succeeded: that is the caller's."""
        self.alarm.close()


class ControlSocket:
    """A connection to the control socket that survives the kernel. One thread may send (`send`, `pump`, `renew`) while
    another receives; `shutdown` may be called in any."""

    forked = "this process was forked; this connection to aiosd is its parent's"

    def __init__(self, home: Home, token: str = "", greeted: tuple[FrameSocket, wire.Welcome] | None = None) -> None:
        """Connect, waiting for it, unless that was done (`greeted`). `token`: see `wire.Hello`. Raises NoKernel."""
        self.home = home
        self._token = token
        self.reborn = False
        self.hung_up = False
        self.why = ""  # the sentence for callers once it has hung up
        self._ids = itertools.count(1)
        self._frames, welcome = greeted or greet(home, token)
        self.client, self.boot, self.release = welcome.client, welcome.boot, welcome.release
        self._search: Search | None = None  # not None: the kernel that `_frames` led to is dead
        self._ended = False
        self._epoll = select.epoll()
        self._wake = -1  # an eventfd, once a signal handler has received
        self._roused = False
        self._watch(self._frames)

    # ── the face of a channel ─────────────────────────────────────────────────────────────────────────────

    def next_id(self) -> int:
        return next(self._ids)

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def level_triggered(self) -> bool:
        return self._search is None and not self.reborn

    @property
    def outbox_bytes(self) -> int:
        return self._frames.pending if self._search is None else 0

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        if self._search is not None:
            return  # to the dead; after `renew` it is sent again
        try:
            self._frames.send(payload, fds)
        except OSError as err:
            if err.errno not in _GONE:
                raise
            return  # the thread that receives finds out, and what was sent is sent again
        if self._frames.pending:
            self._look_for(select.EPOLLIN | select.EPOLLOUT)

    def pump(self) -> bool:
        if not self.outbox_bytes:
            return True
        try:
            if not self._frames.flush():
                return False
        except OSError:
            return True
        self._look_for(select.EPOLLIN)
        return True

    def _look_for(self, events: int) -> None:
        with contextlib.suppress(OSError, ValueError):  # it was closed, or the thread that receives has left it
            self._epoll.modify(self._frames.fileno(), events)

    def receive(self) -> list[bytes]:
        if self._roused:
            self._roused = False
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        if self._search is None:
            try:
                frames = self._frames.receive()
            except (EOFError, OSError, ProtocolError):
                self._lose()
            else:
                for _, fds in frames:
                    for fd in fds:
                        os.close(fd)
                return [payload for payload, _ in frames]
        if not self.reborn and not self.hung_up:
            self._seek()
        return []

    def take(self, frames: MutableSequence[bytes]) -> None:
        frames.extend(self.receive())

    def wait(self, timeout: float | None = None) -> bool:
        if self.reborn or self.hung_up:
            return True
        return bool(self._epoll.poll(BACKSTOP_S if timeout is None else min(BACKSTOP_S, timeout)))

    def nudge(self) -> None:
        """Nothing to do: a socket loses no wake-up."""

    def rouse(self) -> None:
        """End the `wait` that a signal handler has interrupted, or else the next one, at once."""
        with contextlib.suppress(OSError):  # no descriptor left: it ends at the back-stop
            if self._wake < 0:
                self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._epoll.register(self._wake, select.EPOLLIN)
            if not self._roused:
                os.eventfd_write(self._wake, 1)
                self._roused = True

    def renew(self) -> None:
        """Send to the new kernel from now on; drop what the dead one has not taken."""
        search, old = self._search, self._frames
        if search is not None and search.frames is not None:
            self._frames = search.frames
            self._search = None
            search.close()
            old.close()
        self.reborn = False

    def shutdown(self) -> None:
        self._ended = True
        search = self._search
        for frames in (self._frames, search.frames if search is not None else None):
            if frames is not None:
                frames.shutdown()
        if search is not None:
            search.alarm.ring_in(0)

    def close(self) -> None:
        self._frames.close()
        if self._search is not None:
            if self._search.frames is not None:
                self._search.frames.close()
            self._search.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        self._epoll.close()

    # ── a kernel that died, and the next ──────────────────────────────────────────────────────────────────

    def _lose(self) -> None:
        """The kernel hung up. (A signal handler may raise in here: then the end of the socket is found once more.)"""
        # First of all: it may raise EMFILE, and then this is done again.
        search = Search(self.home, self.client, self.boot, self._token)
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(self._frames.fileno())  # it would stay readable
        self._search = search

    def _seek(self) -> None:
        """Take the next step on the way to the new kernel."""
        search = self._search
        assert search is not None
        self._watch(search.alarm)
        try:
            self.reborn = search.step()
        except NoKernel as err:
            self._give_up("aiosd is gone" if isinstance(err, Gone) else str(err.strerror))
            return
        if search.frames is not None:
            self._watch(search.frames)
        if self._ended:  # asked last: `shutdown` may have missed the socket that was made meanwhile
            self._give_up("the connection was closed")

    def _give_up(self, why: str) -> None:
        self.why = why
        self.reborn, self.hung_up = False, True

    def _watch(self, what: FrameSocket | Alarm) -> None:
        with contextlib.suppress(FileExistsError):  # since an earlier step
            self._epoll.register(what.fileno(), select.EPOLLIN)


class Client(Connection):
    """What the commands use: a `Connection` over the control socket. Raises NoKernel when there is none."""

    def __init__(self, home: Home | None = None) -> None:
        self.socket = ControlSocket(home if home is not None else Home())
        super().__init__(self.socket)

    @property
    def release(self) -> str:
        return self.socket.release

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


__all__ = ["Client", "ControlSocket", "Home", "NoKernel", "Pending"]


def call(sys: int, args: Any, result: type[Any] | Any, home: Home | None = None) -> Any:
    """One call over a connection of its own."""
    with Client(home) as client:
        return client.call(sys, args, result)
