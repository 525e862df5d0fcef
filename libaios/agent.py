"""The one connection of this process to the kernel: over the channel if it is an agent, else over the control socket.

An agent finds its channel in its environment (`wire.ENV_CHANNEL`). A forked child of an agent has no connection: each
ring may have one writer only, and that is the parent. Calls raise ENOTCONN in the child. A process that is no agent
uses the control socket, and its forked children make connections of their own.
"""

from __future__ import annotations

import errno
import os
import threading

from libaios import wire
from libaios.channel import Channel, Side
from libaios.connection import Connection
from libaios.ring import ProtocolError


class AgentTransport(Channel):
    """An agent's channel as a transport."""

    __slots__ = ("next_id",)

    why = "aiosd is gone"
    forked = "this process was forked from an agent; the connection to the kernel is its parent's"

    def __init__(self, memfd: int, bell: int) -> None:
        super().__init__(memfd, bell, Side.AGENT)
        self.sleep_in_read()
        self.next_id = self.ids.next

    def receive(self, limit: int = 1 << 30) -> list[bytes]:
        frames = super().receive(limit)
        while self.unread:  # take all: no bell rings for what is left in the ring
            frames += super().receive(limit)
        return frames


_connection: Connection | None = None
_channel_used = False
_making = threading.Lock()


def connection() -> Connection:
    """This process's connection, made at the first use: over an agent's channel, else over the control socket of the
    system that AIOS_HOME names. Raises `client.NoKernel` (a ConnectionError) when there is no system."""
    global _connection
    if _connection is None:
        with _making:
            if _connection is None:
                _connection = _connect()
    return _connection


def connected() -> Connection | None:
    """The connection, if it exists or can be made without waiting for a kernel."""
    return connection() if _connection is not None or own_channel() is not None else None


def reset() -> None:
    """Close the process's connection; the next use makes a new one. (An agent's channel is closed for good.)"""
    global _connection
    with _making:
        if _connection is not None:
            _connection.close()
            _connection = None


def _connect() -> Connection:
    global _channel_used
    channel = own_channel()
    if channel is None:
        from libaios.client import Client

        return Client()
    _channel_used = True
    try:
        return Connection(AgentTransport(*channel))
    except ProtocolError as err:
        raise wire.error(errno.EPROTO, f"{wire.ENV_CHANNEL}: {err}") from None


def is_agent() -> bool:
    """Whether this process is an agent: it has a channel, and is not a forked child of such a process."""
    return _channel_used or own_channel() is not None


def own_channel() -> tuple[int, int] | None:
    """The descriptors of memfd and bell, if this process is an agent and has not used them yet."""
    try:
        memfd, bell, owner = map(int, os.environ.get(wire.ENV_CHANNEL, "").split(":"))
    except ValueError:
        return None
    if owner != os.getpid() or _channel_used:
        return None
    try:
        os.fstat(memfd)
        os.fstat(bell)
    except OSError:
        return None
    return memfd, bell


def _after_fork() -> None:
    global _connection, _making, _channel_used
    _making = threading.Lock()
    _channel_used = False
    if _connection is not None:
        _connection.disconnect_after_fork()
        if not isinstance(_connection.transport, AgentTransport):
            _connection = None


os.register_at_fork(after_in_child=_after_fork)
