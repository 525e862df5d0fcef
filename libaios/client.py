"""The control socket: how a process that is no agent (aios-run, aios-ps, a notebook) talks to the kernel.

`ControlSocket` has the face of a `Channel` as far as `agent.Connection` uses one: send, receive, wait, and `reborn`
when a new kernel has taken over. The kernel's death shows as a hang-up; the socket then connects again under the same
identity, and the connection submits its open calls once more under their ids.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from libaios import wire
from libaios.agent import Call, Connection
from libaios.home import Home
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

RECONNECT_S = 15.0  # for how long a kernel that died is waited for
GREETING_S = 10.0


class NoKernel(ConnectionError):
    """No aiosd answers (any more); the message says where it was looked for."""


def connect(home: Home, timeout: float = GREETING_S) -> socket.socket:
    """Connect to the control socket, however long its path is. Raises NoKernel."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout)
    try:
        folder = os.open(home.socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # A socket's path is limited to 107 bytes; through /proc any folder is short enough.
            sock.connect(f"/proc/self/fd/{folder}/{home.socket.name}")
        finally:
            os.close(folder)
    except OSError as err:
        sock.close()
        if err.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            raise NoKernel(f"no aiosd is running (no socket at {home.socket}); start one with: aiosd") from None
        raise NoKernel(f"{home.socket}: {err.strerror or err}") from None
    sock.settimeout(None)
    return sock


class ControlSocket:
    """A connection to the control socket that survives the kernel."""

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

    def _greet(self) -> FrameSocket:
        frames = FrameSocket(connect(self.home))
        try:
            frames.send(wire.encode(wire.Hello(wire.VERSION, self.client, self.boot)))
            payload, _ = frames.recv_blocking(GREETING_S)
            welcome = msgspec.msgpack.decode(payload, type=wire.Welcome)
        except (OSError, EOFError, ProtocolError) as err:
            frames.close()
            raise NoKernel(f"{self.home.socket}: aiosd does not answer ({err or 'it hung up'})") from None
        except msgspec.MsgspecError:
            frames.close()
            raise NoKernel(_refusal(payload, self.home)) from None
        if self.boot and welcome.boot != self.boot:
            frames.close()
            raise NoKernel("aiosd was started anew meanwhile; what ran in the old one is gone")
        self.client, self.boot, self.release = welcome.client, welcome.boot, welcome.release
        return frames

    # ── the face of a channel ─────────────────────────────────────────────────────────────────────────────

    def next_id(self) -> int:
        return next(self._ids)

    def fileno(self) -> int:
        return self._frames.fileno()

    def send_wait(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        try:
            self._frames.send(payload, fds)
            while not self._frames.flush():
                select.select([], [self._frames.fileno()], [])
        except OSError:
            self._lost()

    def receive(self) -> list[bytes]:
        try:
            return [payload for payload, _ in self._frames.receive()]
        except (EOFError, OSError, ProtocolError):
            self._lost()
            return []

    def wait(self, timeout: float | None = None) -> bool:
        if self.reborn or self.hung_up:
            return True
        poll = select.poll()
        poll.register(self._frames.fileno(), select.POLLIN)
        return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))

    def renew(self) -> None:
        self.reborn = False

    def close(self) -> None:
        self._frames.close()

    def _lost(self) -> None:
        """The kernel hung up: wait for its successor, or give up for good."""
        old, deadline, pause = self._frames, time.monotonic() + RECONNECT_S, 0.01
        while not self.hung_up:
            try:
                self._frames = self._greet()
            except NoKernel as err:
                # Without a listener there is no supervisor that could fork a new kernel.
                gone = "no aiosd is running" in str(err) or "started anew" in str(err)
                if gone or time.monotonic() > deadline:
                    self.hung_up, self.why = True, "aiosd is gone" if gone else str(err)
                    return
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
            else:
                self.reborn = True
                old.close()
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
