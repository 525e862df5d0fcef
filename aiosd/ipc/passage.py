"""Passages carry descriptors from one of aiosd's own processes to another.

A channel (`libaios.channel`) carries none. A passage is a pair of sockets, made before anything is forked and kept by
the supervisor, so messages in it outlive the processes at both ends. There are two:

    kernel ──gates──▶ proxy      listening sockets in agents' own networks (`birth.gates`), and the hosts of each
    proxy ──guests──▶ gateway    connections that were accepted at the gates of the gateway, with the agent of each
"""

from __future__ import annotations

import array
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec import Struct, msgpack

if TYPE_CHECKING:
    import asyncio  # the kernel, which sends only, has none

BYTES = 256 << 10  # of a message
AT_ONCE = 64  # messages, before the loop does something else
MOST_FDS = 16


class Gate(Struct, array_like=True, frozen=True, tag=True):
    """Serve this agent. With descriptors: its gates. `life`: how often the agent was started again."""

    pid: int
    life: int
    net: str


class Closed(Struct, array_like=True, frozen=True, tag=True):
    """The agent's process has ended."""

    pid: int


class GatesKept(Struct, array_like=True, frozen=True, tag=True):
    """These agents have gates, and no others; each gate will be sent, perhaps once more."""

    pids: list[int]


class Guest(Struct, array_like=True, frozen=True, tag=True):
    """A connection of this agent, with its descriptor."""

    pid: int


PassageMessage = Gate | Closed | GatesKept | Guest

_encode = msgpack.Encoder().encode
_decode = msgpack.Decoder(PassageMessage).decode


@dataclass(frozen=True, slots=True)
class Passages:
    """The ends of both passages: descriptors."""

    kernel: int
    gates: int  # the proxy's end
    proxy: int
    guests: int  # the gateway's end


def make() -> Passages:
    return Passages(*_pair(), *_pair())


def _pair() -> tuple[int, int]:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    return first.detach(), second.detach()


def send(sock: socket.socket, message: PassageMessage, fds: list[int] | tuple[int, ...] = ()) -> None:
    """Send a message. Raises OSError when that is not possible now: BlockingIOError, or too many descriptors on their
    way."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([_encode(message)], rights, socket.MSG_DONTWAIT)


def receive(sock: socket.socket) -> tuple[PassageMessage, list[int]]:
    """Receive a message. Raises BlockingIOError when there is none, EOFError when the other end is gone."""
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    payload, ancillary, _, _ = sock.recvmsg(BYTES, socket.CMSG_SPACE(MOST_FDS * 4), flags)
    if not payload:
        raise EOFError
    fds = [fd for _, _, data in ancillary for fd in array.array("i", data[: len(data) // 4 * 4])]
    return _decode(payload), fds


def watch(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, handle: Callable[[PassageMessage, list[int]], None]
) -> None:
    """Call `handle` with each message until the supervisor, which keeps both ends, is gone: then there are no more."""

    def take() -> None:
        try:
            for _ in range(AT_ONCE):
                handle(*receive(sock))
        except BlockingIOError:
            pass
        except (EOFError, ConnectionError):
            # The channel reports the end too, perhaps later, and an end of file can be read again and again.
            loop.remove_reader(sock)

    loop.add_reader(sock, take)
