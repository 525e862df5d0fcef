"""Who talks to the kernel, and the calls they have open.

A *peer* is an agent on its channel (`AgentPeer`) or a client on the control socket (`ClientPeer`: aios-run,
aios-ps, a notebook). Both send `wire.Request` frames and get `wire.Reply` frames; the rest of the kernel does
not know which it serves. Who a peer is follows from the descriptor it talks through, never from what it says.

A *call* is open from the moment its request was accepted until its one final reply was sent. `Kernel.finish`
and `Kernel.fail` alone close it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from aiosd.kernel.explain import explain
from aiosd.kernel.proc import Proc
from aiosd.link import Key
from aiosd.timers import Timer
from libaios import wire
from libaios.channel import Channel
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

MAX_OPEN_CALLS = 1024  # of one peer
FRAMES_PER_TURN = 32  # of one agent, before the others have their turn
ASSEMBLY_MAX = 256 << 20  # bytes of unfinished frames, of all peers together
DEEP = 400  # levels of nesting in arguments that the next reader must be able to put under its own
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
    deaths: int = 0  # of cores while it was running there
    timer: Timer | None = None
    forget: Callable[[], None] | None = None  # takes the call off whatever list it waits on

    @property
    def key(self) -> Key:
        return (self.peer.id, self.id)


class Peer:
    """Common part. `id`: an agent's pid, or a negative number for a client."""

    __slots__ = ("assembling", "calls", "gone", "id", "paused", "proc", "strange")

    def __init__(self, ident: int, proc: Proc | None) -> None:
        self.assembling = 0  # bytes of its unfinished frame, in the books of `Assembly`
        self.gone = False  # dropped: nothing it has sent is looked at any more
        self.paused = False  # streams of it stand still until it has read
        self.strange = False  # has made a call that does not exist, and the log knows
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

    __slots__ = ("channel", "serve", "turn")

    def __init__(self, proc: Proc, channel: Channel) -> None:
        super().__init__(proc.pid, proc)
        self.channel = channel
        self.turn = FRAMES_PER_TURN  # fewer when they take long
        self.serve: Callable[[int], None]  # set by `Kernel.serve`: looks at its ring

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


class Assembly:
    """How much of all peers' unfinished frames lies here: each peer alone may have one of `wire.MAX_FRAME` bytes, all
    together no more than `limit`. Whoever began first is in the way then: an honest frame is complete in a moment."""

    def __init__(self, limit: int = ASSEMBLY_MAX) -> None:
        self.limit = limit
        self.total = 0
        self._peers: dict[Peer, None] = {}  # who has an unfinished frame, oldest first

    def note(self, peer: Peer, size: int) -> Peer | None:
        """The peer holds `size` bytes now. Returns who must go, when that is too much for all."""
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


def read_request(payload: bytes) -> wire.Request:
    """What a peer sent. Raises ProtocolError when it is no request at all."""
    try:
        return wire.decode_request(payload)
    except msgspec.MsgspecError as err:
        raise ProtocolError(f"a frame that is no request: {err}") from None
    except RecursionError:
        raise ProtocolError("a frame that is no request: it is nested too deeply") from None


def read_args(request: wire.Request) -> Any:
    """The arguments of a call, None where it has none. Raises OSError (EINVAL) that says what is wrong with which.

    What is nested almost too deeply for us would be too deep for a core, or for the agent that a message is for.
    """
    decode = wire.decode_args.get(request.sys)
    if decode is None:
        return None
    args = request.args
    try:
        if len(memoryview(args)) > DEEP:  # a level costs a byte at least
            _skip(b"\x91" * DEEP + bytes(args))
        return decode(args)
    except msgspec.MsgspecError as err:
        raise wire.error(errno.EINVAL, explain(err, wire.TABLE[request.sys].args)) from None
    except UnicodeDecodeError as err:
        raise wire.error(errno.EINVAL, f"a string that is not UTF-8: {err.reason}") from None
    except RecursionError:
        raise wire.error(errno.EINVAL, "arguments are nested too deeply") from None
