"""The control socket: how a process that is no agent (aios-run, aios-ps, a notebook) talks to the kernel.

`ControlSocket` has the face of a `Channel` as far as `agent.Connection` uses one: send, receive, wait, and `reborn`
when a new kernel has taken over. The kernel's death shows as a hang-up; the socket then connects again under the same
identity, and the connection submits its open calls once more under their ids.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import socket
import time
from collections.abc import MutableSequence, Sequence
from pathlib import Path
from typing import Any

import msgspec

from libaios import wire
from libaios.channel import BACKSTOP_S
from libaios.connection import Call, Connection
from libaios.home import Home
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

RECONNECT_S = 15.0  # for how long a kernel that died is waited for
GREETING_S = 10.0
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.ENOTCONN)  # what sending to a dead kernel brings


class NoKernel(ConnectionError):
    """No aiosd answers (any more); the message says where it was looked for. Its errno is ECONNREFUSED."""


def no_kernel(message: str) -> NoKernel:
    return NoKernel(errno.ECONNREFUSED, message)


def connect(home: Home, timeout: float = GREETING_S) -> socket.socket:
    """Connect to the control socket, however long its path is. Raises NoKernel."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    deadline, pause = time.monotonic() + timeout, 0.001
    try:
        path = _socket_path(home)
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not home.explicit and os.fstat(folder).st_uid not in (os.getuid(), 0):
                raise no_kernel(f"{path.parent} belongs to another user")
            while True:
                try:
                    # A socket's path is limited to 107 bytes; through /proc any folder is short enough.
                    sock.connect(f"/proc/self/fd/{folder}/{path.name}")
                    return sock
                except BlockingIOError:  # so many connect at this moment that the queue is full
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(pause)
                    pause = min(2 * pause, 0.1)
        finally:
            os.close(folder)
    except BaseException as err:
        sock.close()
        if not isinstance(err, OSError) or isinstance(err, NoKernel):
            raise
        if err.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            raise no_kernel(f"no aiosd is running (no socket at {home.socket}); start one with: aiosd -d") from None
        raise no_kernel(f"{home.socket}: {err.strerror or err}") from None


def _socket_path(home: Home) -> Path:
    """A cron job, or a login by su, may have another runtime folder than the aiosd of its user, which leaves a link
    to its socket where its data lie."""
    if not home.explicit and not home.socket.exists():
        with contextlib.suppress(OSError):
            return Path(os.readlink(home.root / home.socket.name))
    return home.socket


class ControlSocket:
    """A connection to the control socket that survives the kernel. One thread may send (`send`, `pump`, `renew`) while
    another receives; `shutdown` is for any. `fileno` is an epoll around the socket, and so the same after a reconnect.
    """

    forked = "this process was forked; this connection to aiosd is its parent's"

    def __init__(self, home: Home) -> None:
        self.home = home
        self.client = 0
        self.boot = ""
        self.release = ""
        self.reborn = False
        self.hung_up = False
        self.why = ""  # the sentence for callers once it has hung up
        self._ids = itertools.count(1)
        self._frames = self._greet()
        self._next: FrameSocket | None = None  # connected to the new kernel; in use from `renew` on
        self._ended = False
        self._epoll = select.epoll()
        self._epoll.register(self._frames.fileno(), select.EPOLLIN)

    def _greet(self) -> FrameSocket:
        frames = FrameSocket(connect(self.home), max_outbox=1 << 62)
        try:
            frames.send(wire.encode(wire.Hello(wire.VERSION, self.client, self.boot)))
            payload, _ = frames.recv_blocking(GREETING_S)
            welcome = msgspec.msgpack.decode(payload, type=wire.Welcome)
        except (OSError, EOFError, ProtocolError) as err:
            frames.close()
            raise no_kernel(f"{self.home.socket}: aiosd does not answer ({err or 'it hung up'})") from None
        except msgspec.MsgspecError:
            frames.close()
            raise no_kernel(_refusal(payload, self.home)) from None
        except BaseException:
            frames.close()
            raise
        if self.boot and welcome.boot != self.boot:
            frames.close()
            raise no_kernel("aiosd was started anew meanwhile; what ran in the old one is gone")
        self.client, self.boot, self.release = welcome.client, welcome.boot, welcome.release
        return frames

    # ── the face of a channel ─────────────────────────────────────────────────────────────────────────────

    def next_id(self) -> int:
        return next(self._ids)

    def fileno(self) -> int:
        return self._epoll.fileno()

    @property
    def outbox_bytes(self) -> int:
        return self._frames.pending

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        try:
            self._frames.send(payload, fds)
        except OSError as err:
            if err.errno not in _GONE:
                raise
            return  # who receives finds out, and what was sent is sent again
        if self._frames.pending:
            self._watch(self._frames, select.EPOLLIN | select.EPOLLOUT)

    def pump(self) -> bool:
        if not self._frames.pending:
            return True
        try:
            if not self._frames.flush():
                return False
        except OSError:
            return True
        self._watch(self._frames, select.EPOLLIN)
        return True

    def _watch(self, frames: FrameSocket, events: int) -> None:
        with contextlib.suppress(OSError, ValueError):  # it was closed
            self._epoll.modify(frames.fileno(), events)

    def receive(self) -> list[bytes]:
        try:
            frames = self._frames.receive()
        except (EOFError, OSError, ProtocolError):
            self._lost()
            return []
        for _, fds in frames:
            for fd in fds:
                os.close(fd)
        return [payload for payload, _ in frames]

    def take(self, frames: MutableSequence[bytes]) -> None:
        frames.extend(self.receive())

    def wait(self, timeout: float | None = None) -> bool:
        if self.reborn or self.hung_up:
            return True
        return bool(self._epoll.poll(BACKSTOP_S if timeout is None else min(BACKSTOP_S, timeout)))

    def nudge(self) -> None:
        """A socket loses nothing."""

    def rouse(self) -> None:
        """Nor does its `wait` begin anew: it ends at the back-stop."""

    def renew(self) -> None:
        old, new, self._next = self._frames, self._next, None
        self.reborn = False
        if new is not None:
            self._frames = new
            self._epoll.register(new.fileno(), select.EPOLLIN)
            old.close()

    def shutdown(self) -> None:
        self._ended = True
        for frames in (self._frames, self._next):
            if frames is not None:
                frames.shutdown()

    def close(self) -> None:
        self._frames.close()
        if self._next is not None:
            self._next.close()
        self._epoll.close()

    def _lost(self) -> None:
        """The kernel hung up: wait for its successor, or give up for good."""
        if self.reborn:
            return
        deadline, pause = time.monotonic() + RECONNECT_S, 0.01
        while not self.hung_up:
            try:
                self._next = self._greet()
            except NoKernel as err:
                # Without a listener there is no supervisor that could fork a new kernel.
                words = str(err.strerror)
                gone = "no aiosd is running" in words or "started anew" in words
                if gone or self._ended or time.monotonic() > deadline:
                    self.why = "aiosd is gone" if gone else words
                    self.hung_up = True
                    return
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
            else:
                self.reborn = True
                return


def _refusal(payload: bytes, home: Home) -> str:
    try:
        reply = wire.decode_reply(payload)
        return msgspec.msgpack.decode(reply.body, type=wire.Failure).message
    except msgspec.MsgspecError:
        return f"{home.socket}: something that is no aiosd answers"


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


__all__ = ["Call", "Client", "ControlSocket", "Home", "NoKernel", "connect"]


def call(sys: int, args: Any, result: type[Any] | Any, home: Home | None = None) -> Any:
    """One call over a connection of its own."""
    with Client(home) as client:
        return client.call(sys, args, result)
