"""The two kinds of peer, and the calls they have open.

A *peer* is an agent on its channel (`AgentPeer`) or a client on the control socket (`ClientPeer`: aios-run, aios-ps, a
notebook). Both send `wire.Request` frames and get `wire.Reply` frames; the rest of the kernel does not know which kind
it serves. The identity of a peer follows from the descriptor of its connection, never from what it sends.

A *call* is open from the moment its request was accepted until its one final reply was sent. `calls.CallTable`
alone opens and closes calls.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw

from aiosd.ipc.link import CallKey
from aiosd.ipc.service import GATEWAY
from aiosd.kernel.events import EventSource
from aiosd.kernel.explain import explain
from aiosd.kernel.generation import OpenGeneration
from aiosd.kernel.proc import Proc
from aiosd.timers import Timer
from libaios import wire
from libaios.channel import Channel
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

FRAMES_PER_TURN = 32  # of one agent, before the others have their turn
ASSEMBLY_MAX = 256 << 20  # bytes of unfinished frames, of all peers together
DEEP = 400  # levels of nesting in arguments; receivers add levels of their own to them
OUTBOX_PAUSE = 256 << 10  # unread bytes at which a peer's streams are paused at their source,
OUTBOX_RESUME = 64 << 10  # … at which they go on,
OUTBOX_MAX = 64 << 20  # … and at which the peer is taken for dead

#: The row of a call that no table has: it is answered with ENOSYS.
UNKNOWN = wire.Row(-1, wire.NoArgs)


@dataclass(slots=True, eq=False)
class Call:
    """One open system call."""

    peer: Peer
    id: int
    row: wire.Row
    size: int = 0  # bytes of its request
    again: bool = False  # it was sent before, to a kernel that has died since
    generation: OpenGeneration | None = None
    timer: Timer | None = None
    forget: Callable[[], None] | None = None  # removes the call from the list on which it waits
    allowed: bool = False  # a person has allowed it although it raises rights

    @property
    def key(self) -> CallKey:
        return (self.peer.id, self.id)


#: The number of a system call, and its arguments as they were sent.
CopyKey = tuple[int, bytes]


class Copy(NamedTuple):
    """The body of an answer that stays right while its service's promise lasts."""

    body: Raw
    promise: int
    size: int
    used: dict[int, int]  # by promise: how often copies were given
    ahead: bool  # its peer had not made the call


class Peer:
    """Common part. `id`: an agent's pid, or a negative number for a client."""

    __slots__ = (
        "assembling",
        "calls",
        "copied_bytes",
        "copies",
        "gone",
        "id",
        "open_bytes",
        "paused",
        "proc",
        "source",
        "strange",
        "unread",
    )

    def __init__(self, ident: int, proc: Proc | None) -> None:
        self.assembling = 0  # bytes of its unfinished frame, as `Assembly` counts it
        self.gone = False  # dropped: nothing that it has sent is handled any more
        self.paused = False  # its streams are paused until it has read
        self.strange = False  # has made a call that does not exist, and the log has a line about it
        self.id = ident
        self.proc = proc  # the agent whose rights it has; None: a client of aiosd's own user
        self.calls: dict[int, Call] = {}
        self.open_bytes = 0  # bytes of the requests of its open calls
        self.source: EventSource | None = None  # while the kernel polls it
        self.copies: dict[CopyKey, Copy] = {}  # copies of answers that it has got, see `copies`
        self.copied_bytes = 0
        self.unread = 0  # copies made ahead for it since it has last read one

    def send(self, payload: bytes) -> None:
        raise NotImplementedError

    @property
    def outbox_bytes(self) -> int:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class AgentPeer(Peer):
    """An agent, connected by its rings."""

    __slots__ = ("channel", "rung", "turn")

    def __init__(self, proc: Proc, channel: Channel) -> None:
        super().__init__(proc.pid, proc)
        self.channel = channel
        self.turn = FRAMES_PER_TURN  # fewer when its requests take long
        self.rung = False  # its bell holds rings since the last beat

    def send(self, payload: bytes) -> None:
        self.channel.send(payload)

    @property
    def outbox_bytes(self) -> int:
        return self.channel.outbox_bytes

    def close(self) -> None:
        self.channel.close()


class ClientPeer(Peer):
    """A client on the control socket. Until its Hello it has no id and may not call."""

    __slots__ = ("fds", "on_pending", "ospid", "service", "socket", "welcome")

    def __init__(
        self, socket: FrameSocket, ospid: int, proc: Proc | None, on_pending: Callable[[], None], service: str = ""
    ) -> None:
        super().__init__(0, proc)
        self.service = service  # the name of a process of aiosd itself
        self.socket = socket
        self.ospid = ospid
        self.on_pending = on_pending  # called when something could not be sent at once
        self.welcome = False
        self.fds: list[int] = []  # those that came with the frame now being handled

    @property
    def of_gateway(self) -> bool:
        """Whether the gateway has made it: then it acts for the agent that its Hello names."""
        return self.service == GATEWAY

    def send(self, payload: bytes) -> None:
        self.socket.send(payload)
        if self.socket.pending:
            self.on_pending()

    @property
    def outbox_bytes(self) -> int:
        return self.socket.pending

    def close(self) -> None:
        self.socket.close()


class Assembly:
    """Counts the bytes of all peers' unfinished frames: each peer alone may have one of `wire.MAX_FRAME` bytes, all
    together no more than `limit`. Beyond that the oldest one is dropped: an honest frame is complete in a moment."""

    def __init__(self, limit: int = ASSEMBLY_MAX) -> None:
        self.limit = limit
        self.total = 0
        self._peers: dict[Peer, None] = {}  # those with an unfinished frame, oldest first

    def note(self, peer: Peer, size: int) -> Peer | None:
        """The peer has `size` bytes now. Returns the peer that must be dropped if all together have too much."""
        if size < peer.assembling or not size:  # that frame is complete; this is another one
            self._peers.pop(peer, None)
        if size:
            self._peers.setdefault(peer)
        self.total += size - peer.assembling
        peer.assembling = size
        return next(iter(self._peers)) if self.total > self.limit else None


def reply(call_id: int, body: object) -> bytes:
    """A `wire.Reply` with its body not yet encoded: one pass instead of two."""
    return wire.encode((call_id, 0, False, 0, body))


def failure(call_id: int, errno: int, message: str) -> bytes:
    return wire.encode(wire.Reply(call_id, errno, body=wire.raw(wire.Failure(message))))


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────

_skip = msgspec.msgpack.Decoder(msgspec.Raw).decode


def no_request(err: msgspec.MsgspecError | RecursionError) -> ProtocolError:
    """The error for a frame that could not be decoded as a request."""
    why = "it is nested too deeply" if isinstance(err, RecursionError) else err
    return ProtocolError(f"a frame that is no request: {why}")


def read_args(row: wire.Row, args: Any) -> Any:
    """The arguments of a call. Raises OSError (EINVAL) that names the argument and its fault.

    Arguments nested almost too deeply for the kernel would be too deep for a service, or for the receiver of a message.
    """
    try:
        if len(memoryview(args)) > DEEP:  # a level costs a byte at least
            _skip(b"\x91" * DEEP + bytes(args))
        return wire.decode_args[row.sys](args)
    except msgspec.MsgspecError as err:
        raise wire.error(errno.EINVAL, explain(err, row.args)) from None
    except UnicodeDecodeError as err:
        raise wire.error(errno.EINVAL, f"a string that is not UTF-8: {err.reason}") from None
    except RecursionError:
        raise wire.error(errno.EINVAL, "arguments are nested too deeply") from None
