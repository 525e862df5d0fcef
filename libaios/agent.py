"""This process's connection to the kernel: calls out, replies in, from any thread and from asyncio.

Every call has an id and waits for its one final reply; many may be open, and replies come in any order. There is no
thread in the background. Of the threads that wait, one is the *leader*: it reads the connection, hands every reply to
the call it belongs to, and wakes whoever waits for that; when its own reply is there it passes the lead on. An event
loop takes part in the same way: its reader callback leads for a moment whenever the connection becomes readable.

    invariant: if any call is open and waited for, somebody leads, or is about to (a follower that was woken)

After a fork the child has no connection (its parent's ring must have one writer); calls raise ENOTCONN there.
When the kernel was replaced (`reborn`) every open call is submitted again under its id, a stream with the tokens that
it has brought so far.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from msgspec import Struct, msgpack

from libaios import wire
from libaios.channel import Channel, Side
from libaios.ring import ProtocolError

if TYPE_CHECKING:
    import asyncio

SLACK_S = 5.0  # how much longer than the kernel we wait for an answer that has a time limit


class Transport(Protocol):
    """What a connection needs of a channel or a control socket."""

    @property
    def hung_up(self) -> bool: ...
    @property
    def reborn(self) -> bool: ...
    def fileno(self) -> int: ...
    def next_id(self) -> int: ...
    def send_wait(self, payload: bytes, fds: Sequence[int] = ()) -> None: ...
    def receive(self) -> list[bytes]: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    def renew(self) -> None: ...
    def close(self) -> None: ...


class AgentTransport:
    """An agent's channel as a transport."""

    def __init__(self, memfd: int, bell: int) -> None:
        self._channel = channel = Channel(memfd, bell, Side.AGENT)
        # Bound here: these are on the way of every call.
        self.wait = channel.wait
        self.fileno = channel.fileno
        self.next_id = channel.ids.next
        self.renew = channel.renew
        self.close = channel.close

    def receive(self) -> list[bytes]:
        return self._channel.receive(1 << 30)  # all: what is left in the ring would ring no bell

    @property
    def reborn(self) -> bool:
        return self._channel.reborn

    @property
    def hung_up(self) -> bool:
        return self._channel.hung_up

    def send_wait(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        self._channel.send_wait(payload)


class _Outgoing(Struct, array_like=True):
    """`wire.Request` with its arguments not yet encoded: one pass instead of two."""

    id: int
    sys: int
    args: Any


class Call:
    """One open call. `pieces` and `final` are set by the leader; `final` last."""

    __slots__ = ("args", "fds", "final", "gate", "id", "notify", "pieces", "sys", "tokens")

    def __init__(self, number: int, sys: int, args: Any, fds: Sequence[int]) -> None:
        self.id = number
        self.sys = sys
        self.args = args
        self.fds = fds
        self.pieces: deque[wire.Piece] = deque()
        self.tokens: list[int] | None = None  # of a stream: all that it has brought
        self.final: wire.Reply | None = None
        self.gate: threading.Lock | None = None  # a follower sleeps on it
        self.notify: Callable[[], None] | None = None  # called by the leader after every reply

    def payload(self) -> bytes:
        args = self.args
        if self.tokens:
            args = msgspec.structs.replace(args, given=[*args.given, *self.tokens])
        return wire.encode(_Outgoing(self.id, self.sys, args))


_decode_piece = msgpack.Decoder(wire.Piece).decode
_decode_failure = msgpack.Decoder(wire.Failure).decode
_decoders: dict[Any, Callable[[Any], Any]] = {}


def decode_body(reply: wire.Reply, result: Any) -> Any:
    """The body of a final reply as `result` (None: no body wanted), or the OSError that it stands for."""
    if reply.errno:
        raise wire.error(reply.errno, _decode_failure(reply.body).message)
    if result is None:
        return None
    decode = _decoders.get(result)
    if decode is None:
        decode = _decoders[result] = msgpack.Decoder(result).decode
    return decode(reply.body)


class Connection:
    """Calls over one transport; safe for threads."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._open: dict[int, Call] = {}
        self._sending = threading.Lock()
        self._leading = threading.Lock()
        self._followers: dict[int, Call] = {}
        self._loops: set[asyncio.AbstractEventLoop] = set()
        self._dead = ""

    # ── for callers ───────────────────────────────────────────────────────────────────────────────────────

    def call(
        self, sys: int, args: Any, result: Any, fds: Sequence[int] = (), timeout: float | None = None
    ) -> Any:
        """Make a call and wait for its result, decoded as `result`. Raises OSError as the kernel answered,
        TimeoutError when no answer came within `timeout` seconds (and some slack: the kernel's word comes first)."""
        call = self.submit(sys, args, fds)
        return self.result(call, result, timeout)

    def submit(
        self, sys: int, args: Any, fds: Sequence[int] = (), stream: bool = False, notify: Callable[[], None] | None = None
    ) -> Call:
        """Send a call without waiting. The caller must take its `result`, or `abandon` it."""
        if self._dead:
            raise wire.error(errno.ENOTCONN, self._dead)
        with self._sending:
            call = Call(self.transport.next_id(), sys, args, fds)
            if stream:
                call.tokens = []
            call.notify = notify
            payload = call.payload()
            if len(payload) > wire.MAX_FRAME:
                raise wire.error(errno.EMSGSIZE, f"a call of {len(payload)} bytes; the limit is {wire.MAX_FRAME}")
            self._open[call.id] = call
            try:
                self.transport.send_wait(payload, fds)
            except BaseException:
                self._open.pop(call.id, None)
                raise
        return call

    def result(self, call: Call, result: Any, timeout: float | None = None) -> Any:
        """Wait for the final reply of a submitted call."""
        deadline = None if timeout is None else time.monotonic() + timeout + SLACK_S
        try:
            self._wait(lambda: call.final is not None, call, deadline)
        except BaseException:
            self.abandon(call)
            raise
        assert call.final is not None
        return decode_body(call.final, result)

    def pieces(self, call: Call, timeout: float | None = None) -> Iterator[wire.Piece]:
        """The partial replies of a stream, until its final one is there. Leaving early cancels the call."""
        deadline = None if timeout is None else time.monotonic() + timeout + SLACK_S
        try:
            while True:
                if not call.pieces:
                    if call.final is not None:
                        return
                    self._wait(lambda: bool(call.pieces) or call.final is not None, call, deadline)
                    continue
                yield call.pieces.popleft()
        finally:
            if call.final is None:
                self.abandon(call)

    def abandon(self, call: Call) -> None:
        """Nobody waits for the call any more: forget it, and have the kernel stop it."""
        if self._open.pop(call.id, None) is None or self._dead:
            return
        with contextlib.suppress(OSError, ProtocolError), self._sending:
            number = self.transport.next_id()  # its reply finds nobody, and is dropped
            self.transport.send_wait(wire.encode(_Outgoing(number, wire.Sys.CANCEL, wire.Cancel(call.id))))

    @property
    def open_calls(self) -> int:
        return len(self._open)

    def fileno(self) -> int:
        return self.transport.fileno()

    def pump(self) -> None:
        """Handle whatever has arrived, without waiting: for callers with a loop of their own."""
        if self._leading.acquire(blocking=False):
            try:
                self._read()
            finally:
                self._leading.release()
            self._pass_lead()

    def close(self, why: str = "the connection was closed") -> None:
        """End it here; whoever still waits gets ENOTCONN."""
        if self._dead and self._dead != why:
            return
        self._fail_all(why)
        for loop in list(self._loops):
            with contextlib.suppress(RuntimeError, OSError):
                loop.remove_reader(self.transport.fileno())
        self.transport.close()

    # ── waiting ───────────────────────────────────────────────────────────────────────────────────────────

    def _wait(self, ready: Callable[[], bool], call: Call, deadline: float | None) -> None:
        """Until `ready`: lead, or follow whoever leads."""
        while not ready():
            if self._leading.acquire(blocking=False):
                try:
                    self._lead(ready, deadline)
                finally:
                    self._leading.release()
                self._pass_lead()
            else:
                self._follow(ready, call, deadline)

    def _lead(self, ready: Callable[[], bool], deadline: float | None) -> None:
        while not ready():
            if self._read():
                continue
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
            self.transport.wait(left)

    def _follow(self, ready: Callable[[], bool], call: Call, deadline: float | None) -> None:
        gate = call.gate = threading.Lock()
        gate.acquire()
        self._followers[call.id] = call
        try:
            # The leader may have left before it could see us; then the lead is ours to take.
            if ready() or not self._leading.locked():
                return
            left = -1 if deadline is None else deadline - time.monotonic()
            if (deadline is not None and left <= 0) or not gate.acquire(timeout=left):
                raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
        finally:
            self._followers.pop(call.id, None)
            call.gate = None

    def _pass_lead(self) -> None:
        for call in list(self._followers.values()):
            if call.final is None and self._wake(call):
                return

    @staticmethod
    def _wake(call: Call) -> bool:
        gate = call.gate
        if gate is None:
            return False
        with contextlib.suppress(RuntimeError):  # somebody woke it already
            gate.release()
        return True

    # ── leading ───────────────────────────────────────────────────────────────────────────────────────────

    def _read(self) -> bool:
        """Hand out what has arrived; False when there was nothing."""
        transport = self.transport
        if self._dead:
            return True
        try:
            frames = transport.receive()
        except ProtocolError as err:
            self._fail_all(f"the kernel sent nonsense: {err}")
            return True
        for payload in frames:
            self._hand_out(wire.decode_reply(payload))
        if frames:
            return True
        if transport.reborn:
            self._submit_again()
            return True
        if transport.hung_up:
            self._fail_all(getattr(transport, "why", "") or "aiosd is gone")
            return True
        return False

    def _hand_out(self, reply: wire.Reply) -> None:
        call = self._open.get(reply.id)
        if call is None:
            return  # abandoned, or the answer to a CANCEL
        if reply.more:
            piece = _decode_piece(reply.body)
            if call.tokens is not None:
                if reply.offset != len(call.args.given) + len(call.tokens):
                    return  # sent by a dead kernel after what its successor has given us already
                call.tokens.extend(piece.tokens)
            call.pieces.append(piece)
        else:
            del self._open[reply.id]
            call.final = reply
        self._wake(call)
        if call.notify is not None:
            call.notify()

    def _submit_again(self) -> None:
        """A new kernel: it knows nothing of our open calls but what they did."""
        with self._sending:
            self.transport.renew()
            for call in sorted(self._open.values(), key=lambda call: call.id):
                self.transport.send_wait(call.payload(), call.fds)

    def _fail_all(self, why: str) -> None:
        self._dead = why
        reply = wire.Reply(0, errno.ENOTCONN, body=wire.raw(wire.Failure(why)))
        for call in list(self._open.values()):
            self._open.pop(call.id, None)
            call.final = reply
            self._wake(call)
            if call.notify is not None:
                call.notify()

    # ── asyncio ───────────────────────────────────────────────────────────────────────────────────────────

    def attach_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let an event loop take part in leading, from its own thread, as long as it lives."""
        if loop in self._loops:
            return
        self._loops = {known for known in self._loops if not known.is_closed()}
        self._loops.add(loop)
        loop.add_reader(self.transport.fileno(), self.pump)
        self.pump()  # announces sleep: from now on the bell rings

    def disconnect_after_fork(self) -> None:
        """In a forked child: the connection is the parent's."""
        self._dead = "this process was forked from an agent; the connection to the kernel is its parent's"
        self._open.clear()
        self._sending, self._leading = threading.Lock(), threading.Lock()
        with contextlib.suppress(OSError):
            self.transport.close()


# ── the process's one connection ──────────────────────────────────────────────────────────────────────────

_connection: Connection | None = None
_making = threading.Lock()


def connection() -> Connection:
    """This process's connection, made at the first use: an agent's channel, else the control socket of the system
    that AIOS_HOME names. Raises `client.NoKernel` (a ConnectionError) when there is no system."""
    global _connection
    if _connection is None:
        with _making:
            if _connection is None:
                _connection = _connect()
    return _connection


def reset() -> None:
    """Close the process's connection; the next use makes a new one."""
    global _connection
    with _making:
        if _connection is not None:
            _connection.close()
            _connection = None


def _connect() -> Connection:
    channel = _own_channel()
    if channel is not None:
        return Connection(AgentTransport(*channel))
    from libaios.client import Client

    return Client()


def _own_channel() -> tuple[int, int] | None:
    """memfd and bell of this process, if it is an agent and not the child of one."""
    try:
        memfd, bell, owner = map(int, os.environ.get(wire.ENV_CHANNEL, "").split(":"))
    except ValueError:
        return None
    if owner != os.getpid():
        return None
    try:
        os.fstat(memfd)
        os.fstat(bell)
    except OSError:
        return None
    return memfd, bell


def _after_fork() -> None:
    global _making
    _making = threading.Lock()
    if _connection is not None:
        _connection.disconnect_after_fork()


os.register_at_fork(after_in_child=_after_fork)
