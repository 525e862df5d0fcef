"""How a process becomes a client of the kernel: connect to the control socket, send Hello, receive Welcome.

A `Greeting` is one attempt, in steps that never wait. `greet` makes one and waits for its end. A client that has lost
its kernel takes the steps itself, each when its event loop (or whatever waits for it) reports that the next is due.

The supervisor holds the listening socket over the death of a kernel. So a connection can be made while there is no
kernel: it waits in the socket's queue, and its Welcome comes when the new kernel runs. When connecting is refused there
is no supervisor, and no kernel will come.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time

import msgspec

from libaios import wire
from libaios.home import Home
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

GREETING_S = 10.0  # for how long one attempt may last
FULL_QUEUE_S = 0.01  # before the next try to connect when the socket's queue is full


class NoKernel(ConnectionError):
    """No aiosd answers (any more); the message names the socket that was tried. Its errno is ECONNREFUSED."""


class Gone(NoKernel):
    """No aiosd will answer any more: another attempt is useless."""


class Refused(NoKernel):
    """The kernel answers, and refuses this client: another attempt is useless."""


class NotYet(NoKernel):
    """It answers that it does not know yet who this client is: another attempt, soon, may help."""


def _no_kernel(message: str, kind: type[NoKernel] = NoKernel) -> NoKernel:
    return kind(errno.ECONNREFUSED, message)


def connect(home: Home) -> socket.socket | None:
    """Connect to the control socket, however long its path is. None: its queue is full just now. Raises NoKernel."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    if _is_connected(sock):
        return sock
    try:
        place, name = os.path.split(_socket_path(home))
        folder = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not home.explicit and os.fstat(folder).st_uid not in (os.getuid(), 0):
                raise _no_kernel(f"{place} belongs to another user")
            # A socket's path is limited to 107 bytes; through /proc any folder is short enough.
            sock.connect(f"/proc/self/fd/{folder}/{name}")
        finally:
            os.close(folder)
    except BlockingIOError:
        sock.close()
        return None
    except BaseException as err:  # of any kind: the socket must not stay open
        sock.close()
        if not isinstance(err, OSError) or isinstance(err, NoKernel):
            raise
        if err.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            message = f"no aiosd is running (no socket at {home.texts['socket']}); start one with: aiosd -d"
            raise _no_kernel(message, Gone) from None
        raise _no_kernel(f"{home.texts['socket']}: {err.strerror or err}") from None
    return sock


def _is_connected(sock: socket.socket) -> bool:
    """Whether the socket is connected already. In a sandbox it is made connected, since aiosd's path may be hidden
    there."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _socket_path(home: Home) -> str:
    """The path of the control socket. A cron job, or a login by su, may have another runtime folder than the aiosd
    of the same user; so aiosd leaves a link to its socket in its data folder."""
    path = home.texts["socket"]
    if not home.explicit and not os.path.exists(path):
        with contextlib.suppress(OSError):
            return os.readlink(os.path.join(home.texts["root"], os.path.basename(path)))
    return path


class Greeting:
    """One attempt. Call `step` until it returns the Welcome; `frames` is the connection then, and the caller's."""

    def __init__(self, home: Home, client: int = 0, boot: str = "", token: str = "") -> None:
        """`client` and `boot`: the identity to have again, from an earlier Welcome. `token`: see `wire.Hello`."""
        self.home = home
        self._token = token
        self._client, self._boot = client, boot
        self._deadline = time.monotonic() + GREETING_S
        self.frames: FrameSocket | None = None  # None: not connected yet

    def step(self) -> wire.Welcome | None:
        """Go on without waiting. None: call again when `wait_s` has passed, or `frames` is readable. Raises NoKernel
        when the attempt has failed."""
        try:
            welcome = self._advance()
            if welcome is None and self.wait_s() <= 0:
                raise TimeoutError("no answer in time")
        except NoKernel:
            self.close()
            raise
        except (OSError, EOFError, ProtocolError) as err:
            self.close()
            raise _no_kernel(f"{self.home.texts['socket']}: aiosd does not answer ({err})") from None
        return welcome

    def wait_s(self) -> float:
        """Seconds until `step` has something to do, unless `frames` becomes readable before."""
        left = self._deadline - time.monotonic()
        return left if self.frames is not None else min(left, FULL_QUEUE_S)

    def close(self) -> None:
        if self.frames is not None:
            self.frames.close()

    def _advance(self) -> wire.Welcome | None:
        if self.frames is None:
            sock = connect(self.home)
            if sock is None:
                return None
            frames = FrameSocket(sock, max_outbox=1 << 62)  # limits are the caller's: see `Connection.submit`
            frames.send(wire.encode(wire.Hello(wire.VERSION, self._client, self._boot, self._token)))
            self.frames = frames
        received = self.frames.receive(1)
        return self._read(received[0][0]) if received else None

    def _read(self, payload: bytes) -> wire.Welcome:
        try:
            welcome = msgspec.msgpack.decode(payload, type=wire.Welcome)
        except msgspec.MsgspecError:
            raise _refusal(payload, self.home) from None
        if self._boot and welcome.boot != self._boot:
            raise _no_kernel("aiosd was started anew meanwhile; what ran in the old one is gone", Gone)
        return welcome


def _refusal(payload: bytes, home: Home) -> NoKernel:
    try:
        reply = wire.decode_reply(payload)
        message = msgspec.msgpack.decode(reply.body, type=wire.Failure).message
    except msgspec.MsgspecError:
        return _no_kernel(f"{home.texts['socket']}: something that is no aiosd answers")
    return _no_kernel(message, {errno.EACCES: Refused, errno.EAGAIN: NotYet}.get(reply.errno, NoKernel))


def greet(home: Home, token: str = "") -> tuple[FrameSocket, wire.Welcome]:
    """Become a client, waiting for it. Raises NoKernel."""
    greeting = Greeting(home, token=token)
    try:
        while (welcome := greeting.step()) is None:
            poll = select.poll()
            if greeting.frames is not None:
                poll.register(greeting.frames.fileno(), select.POLLIN)
            poll.poll(greeting.wait_s() * 1000)
    except BaseException:  # of any kind, an interrupt too: the socket must not stay open
        greeting.close()
        raise
    assert greeting.frames is not None
    return greeting.frames, welcome
