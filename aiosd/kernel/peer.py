"""Who talks to the kernel, and the calls they have open.

A *peer* is an agent on its channel (`AgentPeer`) or a client on the control socket (`ClientPeer`: aios-run,
aios-ps, a notebook). Both send `wire.Request` frames and get `wire.Reply` frames; the rest of the kernel does
not know which it serves. Who a peer is follows from the descriptor it talks through, never from what it says.

A *call* is open from the moment its request was accepted until its one final reply was sent. `Kernel.finish`
and `Kernel.fail` alone close it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from aiosd.kernel.proc import Proc
from aiosd.link import Key
from aiosd.timers import Timer
from libaios import wire
from libaios.channel import Channel
from libaios.stream import FrameSocket

MAX_OPEN_CALLS = 1024  # of one peer
OUTBOX_PAUSE = 256 << 10  # bytes a peer has not read before its streams are paused at their source,
OUTBOX_RESUME = 64 << 10  # … and go on,
OUTBOX_MAX = 64 << 20  # … and before it is taken for dead


@dataclass(slots=True, eq=False)
class Generation:
    """What the kernel remembers of a generation, enough to start it again on a new core."""

    request: wire.Generate
    model: str
    tokens: list[int]  # all that were given out, those of `request.given` included
    texts: list[str] = field(default_factory=list)  # what a caller that does not stream has to come
    new_from: int = 0  # tokens before this index were there before this kernel knew the call
    budget: int | None = None  # tokens left when it was submitted, and used since
    used: int = 0
    started: bool = False
    ending: bool = False  # its final word is here
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ctx_tokens: int = 0
    deaths: int = 0  # of cores while it was running
    paused: bool = False  # its reader is slow
    resyncing: bool = False  # the core was asked to tell again what we have not got


@dataclass(slots=True, eq=False)
class Call:
    """One open system call."""

    peer: Peer
    id: int
    sys: int
    generation: Generation | None = None
    core: str = ""  # the model whose core has it
    timer: Timer | None = None
    forget: Callable[[], None] | None = None  # takes the call off whatever list it waits on

    @property
    def key(self) -> Key:
        return (self.peer.id, self.id)


class Peer:
    """Common part. `id`: an agent's pid, or a negative number for a client."""

    __slots__ = ("calls", "id", "proc")

    def __init__(self, ident: int, proc: Proc | None) -> None:
        self.id = ident
        self.proc = proc  # whose rights it has; None: a client of aiosd's own user
        self.calls: dict[int, Call] = {}

    def send(self, payload: bytes) -> None:
        raise NotImplementedError

    @property
    def outbox_bytes(self) -> int:
        raise NotImplementedError

    def fileno(self) -> int:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class AgentPeer(Peer):
    """An agent on its rings."""

    __slots__ = ("channel",)

    def __init__(self, proc: Proc, channel: Channel) -> None:
        super().__init__(proc.pid, proc)
        self.channel = channel

    def send(self, payload: bytes) -> None:
        self.channel.send(payload)

    @property
    def outbox_bytes(self) -> int:
        return self.channel.outbox_bytes

    def fileno(self) -> int:
        return self.channel.fileno()

    def close(self) -> None:
        self.channel.close()


class ClientPeer(Peer):
    """A client on the control socket. Until its Hello it has no id and may not call."""

    __slots__ = ("fds", "ospid", "socket", "uid", "welcome")

    def __init__(self, socket: FrameSocket, uid: int, ospid: int, proc: Proc | None) -> None:
        super().__init__(0, proc)
        self.socket = socket
        self.uid = uid
        self.ospid = ospid
        self.welcome = False
        self.fds: list[int] = []  # those that came with the frame now being handled

    def send(self, payload: bytes) -> None:
        self.socket.send(payload)

    @property
    def outbox_bytes(self) -> int:
        return self.socket.pending

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()


def reply(call_id: int, body: object) -> bytes:
    return wire.encode(wire.Reply(call_id, body=wire.raw(body)))


def failure(call_id: int, errno: int, message: str) -> bytes:
    return wire.encode(wire.Reply(call_id, errno, body=wire.raw(wire.Failure(message))))
