"""Messages between agents.

A message is anything that msgpack can carry: None, booleans, numbers, strings, bytes, lists, dicts. Each agent has one
mailbox; messages of one sender arrive in the order in which they were sent.
"""

from __future__ import annotations

import errno
from typing import Any

import msgspec

from libaios import wire
from libaios.plan import Plan, syscall
from libaios.wire import Sys

__all__ = ["recv", "send"]


@syscall
def send(pid: int, obj: Any) -> Plan[None]:
    """Put a message into the mailbox of agent `pid`, which may be the caller's own. Does not wait for the receiver.

    Raises TypeError when msgpack cannot carry `obj`, ProcessLookupError without such an agent, BlockingIOError
    (EAGAIN) when its mailbox is full.
    """
    try:
        body = wire.raw(obj)
    except (TypeError, OverflowError) as err:
        raise TypeError(f"obj: a message cannot hold this: {err}") from None
    return Plan(Sys.SEND, wire.Send(pid, body))


@syscall
def recv(timeout: float | None = None) -> Plan[tuple[int, Any]]:
    """Take the oldest message from the mailbox, waiting for one: (pid of the sender, object).

    A sender outside any agent has pid 0. Raises TimeoutError after `timeout` seconds, OSError (EBADMSG) for bytes that
    msgpack cannot decode (a sender without this SDK may send such).
    """
    return Plan(Sys.RECV, wire.Recv(timeout), _open, timeout)


def _open(received: wire.Received) -> tuple[int, Any]:
    try:
        return received.sender, msgspec.msgpack.decode(received.obj)
    except (ValueError, RecursionError) as err:
        raise wire.error(errno.EBADMSG, f"agent {received.sender} sent what cannot be read: {err}") from None
