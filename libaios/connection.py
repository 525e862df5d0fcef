"""Calls to the kernel over one transport: requests out, replies in, from any thread and from asyncio.

Every call has an id and gets one final reply. Many calls may be open, and replies come in any order. There is no
thread in the background. One of the threads that wait for a reply is the *leader*: it reads the transport, gives each
reply to its call, and wakes the thread that waits for that call. The other threads that wait are *followers*. When the
leader has its own reply it wakes a follower, which becomes the next leader. A thread that waits for room in the ring
takes part in the same way. An event loop takes part, too: its reader callback leads for a moment whenever the
descriptor of the transport is readable.

    invariant: if any thread waits for a reply, one of them leads, or a follower has been woken that will lead. A
    thread that stops waiting, for any reason, wakes another one: its own wake-up may have been the one for the lead

One thread at a time sends; it holds the right to send (`_sending`). It never waits while it holds that: a thread whose
frame found no room sends it into the outbox, gives up the right, and waits until the outbox is empty. A coroutine asks
`may_send` before, and does not block its loop. `abandon` may be called by a finalizer, in any thread and at any moment,
so it must not wait for the right to send either: it puts a cancel into a queue, and the thread that has the right sends
what is in the queue.

Signal handlers may make calls of their own, and they may raise (Ctrl-C raises KeyboardInterrupt). A reply that has
arrived is not lost by that. A frame stays in `_arrived` until its reply has been given to its call, and is handed out
again if an exception came in between; `call` gives a message back unless its caller gets it. This relies on CPython: it
runs signal handlers where a function begins, where a function of C returns and where a loop goes back, nowhere else.
(Not covered: a second exception in the very moment in which a message that was given back goes to another call.) A
handler that interrupts its own thread in the middle of a send, or while it hands out replies, gets EDEADLK for a call
handler that interrupts its own thread in the middle of a send, or while it hands out replies, gets EDEADLK for a call
that it makes.
A RECV takes a message out of the mailbox. When its caller gives up (an interrupt, a task cancelled) the message may be
on its way already, and it must not be lost. So a RECV that was abandoned is remembered until its final reply is here.
That is ECANCELED, or a message, which goes to another call that waits for one, or to the next. A new kernel gets an
abandoned RECV again together with the open calls, and its cancel as well.

A forked child cannot use the connection: it is its parent's, and calls raise ENOTCONN in the child.

When the kernel was replaced (`reborn`) every open call is submitted again under its id; a stream is submitted with the
tokens that it has brought up to then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from msgspec import Struct, msgpack

from libaios import wire
from libaios.ring import ProtocolError

if TYPE_CHECKING:
    import asyncio

    from libaios.pace import Pace, PacedReader

_RECV = int(wire.Sys.RECV)
SLACK_S = 5.0  # a call with a time limit waits this much longer than the kernel, whose answer has more details


class Transport(Protocol):
    """What a connection needs of a channel or a control socket."""

    @property
    def hung_up(self) -> bool: ...
    @property
    def reborn(self) -> bool: ...
    @property
    def level_triggered(self) -> bool: ...  # `fileno` is readable as long as there is more: no second look is needed
    @property
    def outbox_bytes(self) -> int: ...  # bytes of frames that were passed to `send` and have not left this process
    @property
    def why(self) -> str: ...  # the sentence for callers when `hung_up` is true
    @property
    def forked(self) -> str: ...  # the sentence for callers in a forked child
    def fileno(self) -> int: ...
    def next_id(self) -> int: ...
    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None: ...
    def pump(self) -> bool: ...
    def receive(self) -> list[bytes]: ...  # all that is here; `fileno` becomes readable when more comes
    def take(self, frames: MutableSequence[bytes]) -> object: ...  # the same, but only `wait` notices when more comes
    def wait(self, timeout: float | None = None) -> bool: ...
    def nudge(self) -> None: ...
    def rouse(self) -> None: ...  # ends the `wait` that a signal handler interrupted, after the handler has received
    def renew(self) -> None: ...
    def shutdown(self) -> None: ...  # from any thread: wakes the one in `wait`
    def close(self) -> None: ...


class Pending(Struct, eq=False):
    """One call. `pieces` and `final` are set by the leader; `final` is set last."""

    sys: int
    args: Any
    notify: Callable[[], None] | None = None  # called by the leader after every reply
    id: int = 0
    life: int = 0  # which kernel it was sent to (`Connection._life`)
    fds: Sequence[int] = ()  # duplicates, for this kernel and the next: the caller may close its own
    pieces: deque[Any] | None = None  # made for the first one: most calls have none
    progress: wire.Progress | None = None  # of a stream: all that it has been given
    model: str = ""  # … and by which model, where it named a route
    final: wire.Reply | None = None
    gate: threading.Lock | None = None  # the lock on which a follower sleeps
    abandoned: bool = False  # a RECV whose caller has given up

    def release(self) -> None:
        """Close the descriptors: the call is over and will not be sent again."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)

    def payload(self) -> bytes:
        """The request as it is sent to a new kernel."""
        args = self.args
        if self.progress is not None and self.progress.length:
            args = msgspec.structs.replace(args, given=self.progress.given())
            if self.model:
                args = msgspec.structs.replace(args, model=self.model)
        return wire.encode((self.id, self.sys, args, True))


def _request(number: int, sys: int, args: Any) -> bytes:
    """A `wire.Request` with its arguments not yet encoded: one pass instead of two."""
    return wire.encode((number, sys, args))


def _duplicates(fds: Sequence[int]) -> list[int]:
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        for fd in copies:
            os.close(fd)
        raise
    return copies


_decode_failure = msgpack.Decoder(wire.Failure).decode
_decoders: dict[Any, Callable[[Any], Any]] = {}


def decode_body(reply: wire.Reply, result: Any) -> Any:
    """Decode the body of a final reply as `result` (None: there is none). Raises the OSError that it stands for."""
    if reply.errno:
        raise wire.error(reply.errno, _decode_failure(reply.body).message)
    if result is None:
        return None
    return decoder(result)(reply.body)


def _unreadable(err: BaseException) -> bool:
    """Whether the reply itself is what failed: if it were given back, the next call would fail on it, too."""
    return isinstance(err, msgspec.MsgspecError) or (isinstance(err, OSError) and err.errno == errno.EBADMSG)


def decoder(kind: Any) -> Callable[[Any], Any]:
    """The function that decodes the body of a reply as this type."""
    decode = _decoders.get(kind)
    if decode is None:
        decode = _decoders[kind] = msgpack.Decoder(kind).decode
    return decode


class Connection:
    """Calls over one transport; safe for threads, finalizers and signal handlers."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._open: dict[int, Pending] = {}
        self._dead = ""  # not empty: the connection has ended, and this is why
        self._closing = False
        # sending
        self._sending = threading.RLock()
        self._busy = False  # the thread that holds `_sending` is in the middle of a send
        self._blocked: set[Pending] = set()  # calls whose thread or coroutine waits for room
        self._pump_wanted = False  # a thread found room for the outbox, but another one was sending
        self._given_up: dict[int, Pending] = {}  # RECVs that were abandoned and have no final reply yet
        self._returned: deque[wire.Reply] = deque()  # messages that such calls have brought
        self._cancels: deque[int] = deque()  # ids of abandoned calls for which no CANCEL has been sent yet
        self._life = 0  # how often the kernel was replaced
        self._renewing = False  # open calls are being submitted to a new kernel
        # receiving. `_leader[0]` is the leader: (thread, …). A dict, because `setdefault` takes the lead in one step
        # that no signal handler can interrupt, and a thread can see afterwards whether it has the lead.
        self._leader: dict[int, tuple[int, object]] = {}
        self._polling = False  # the leader sleeps: a signal handler that interrupts its thread may lead in its place
        self._arrived: deque[bytes] = deque()
        self._in_hand: Pending | None = None  # the call that a reply is being given to
        self._followers: dict[int, Pending] = {}
        self._loops: dict[asyncio.AbstractEventLoop, int] = {}  # … and its own duplicate of the descriptor
        self._paced: PacedReader | None = None  # … of one that looks at a pace of its own
        self._watched = False  # a loop polls the descriptor, so the bell must ring also while no thread waits here
        self._took_only = False  # the last read was a `take`: the bell does not ring for what comes next

    # ── for callers ───────────────────────────────────────────────────────────────────────────────────────

    def call(
        self,
        sys: int,
        args: Any,
        result: Any,
        fds: Sequence[int] = (),
        timeout: float | None = None,
        convert: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Make a call and wait for its result, decoded as `result` and converted. Raises OSError as the kernel
        answered, or TimeoutError when no reply came within `timeout` seconds plus SLACK_S (so that the kernel's own
        error, which has more details, comes first)."""
        call = self.prepare(sys, args, fds) if fds else Pending(sys, args)
        try:
            self.send(call)
            if self.transport.outbox_bytes:
                self._wait_for_room(call)
            body = self.result(call, result, timeout)
            return body if convert is None else convert(body)
        except BaseException as err:  # of any kind, a signal handler's too: what it has brought is for the next call
            if not _unreadable(err):
                self.abandon(call)
            raise

    def submit(self, sys: int, args: Any, fds: Sequence[int] = (), stream: bool = False) -> Pending:
        """Send a call without waiting for its reply; when the ring is full, wait for room. The caller must take the
        `result` of the call, or `abandon` it."""
        call = self.prepare(sys, args, fds, stream) if fds or stream else Pending(sys, args)
        self.send(call)
        if self.transport.outbox_bytes:
            self._wait_for_room(call)
        return call

    def prepare(
        self,
        sys: int,
        args: Any,
        fds: Sequence[int] = (),
        stream: bool = False,
        notify: Callable[[], None] | None = None,
    ) -> Pending:
        """Make a call that is not sent yet: the caller sends it later, or abandons it."""
        call = Pending(sys, args, notify)
        if fds:
            call.fds = _duplicates(fds)
        if stream:
            call.progress = wire.Progress(args.given)
        return call

    def may_send(self, call: Pending) -> bool:
        """Whether there is room for a call that was prepared. If not, its `notify` is called when there may be some."""
        if not self.transport.outbox_bytes or self._dead:
            return True
        self._blocked.add(call)
        # Look again: when the outbox became empty before the call was in `_blocked`, `notify` was not called.
        return not self.transport.outbox_bytes or bool(self._dead)

    def send(self, call: Pending) -> None:
        """Send a call that was prepared, without waiting; a frame that finds no room is kept in memory. So a caller
        checks `may_send` before, or waits afterwards."""
        if self._blocked:
            self._blocked.discard(call)
        if call.sys == _RECV and self._serve(call):
            return
        try:
            with self._sending:
                if self._renewing:  # a handler's exception interrupted that: older calls reach the new kernel first
                    self._submit_again()
                self._send(call)
        except BaseException:  # of any kind, a signal handler's too: the kernel must not work for no caller
            self.abandon(call)
            self._after_sending()
            raise
        if self._returned:
            self._match()
        if self._pump_wanted or self._cancels:
            self._after_sending()

    def _send(self, call: Pending) -> None:
        """With the right to send."""
        if self._busy:
            raise wire.error(errno.EDEADLK, "a signal handler made a call in the middle of another one's send")
        if self._dead:
            raise wire.error(errno.ENOTCONN, self._dead)
        transport = self.transport
        try:
            self._busy = True
            call.id = number = transport.next_id()
            try:
                payload = wire.encode((number, call.sys, call.args))
            except (TypeError, ValueError, OverflowError, RecursionError) as err:
                raise wire.error(errno.EINVAL, f"an argument cannot be sent: {err}") from None
            if len(payload) > wire.MAX_FRAME:
                raise wire.error(errno.EMSGSIZE, f"a call of {len(payload)} bytes; the limit is {wire.MAX_FRAME}")
            call.life = self._life
            self._open[number] = call
            transport.send(payload, call.fds)
        finally:
            self._busy = False

    def _after_sending(self) -> None:
        """Called when the right to send is free again: do what other threads could not do because this one held it."""
        if self._pump_wanted:
            self._pump_out()
        if self._cancels:
            self._send_cancels()

    def _wait_for_room(self, call: Pending) -> None:
        """Wait until all that was sent has left the outbox. Other threads may send meanwhile."""
        transport = self.transport
        try:
            self._blocked.add(call)
            self._wait(lambda: not transport.outbox_bytes or call.final is not None or bool(self._dead), call, None)
        except BaseException:  # of any kind, a signal handler's too: the kernel must not work for no caller
            self.abandon(call)
            raise
        finally:
            self._blocked.discard(call)

    def result(self, call: Pending, result: Any, timeout: float | None = None) -> Any:
        """Wait for the final reply of a submitted call."""
        if call.final is None:
            try:
                deadline = None if timeout is None else time.monotonic() + timeout + SLACK_S
                self._wait(lambda: call.final is not None, call, deadline)
            except BaseException:  # of any kind, a signal handler's too: the kernel must not work for no caller
                self.abandon(call)
                raise
        assert call.final is not None
        return decode_body(call.final, result)

    def pieces(self, call: Pending, timeout: float | None = None) -> Iterator[wire.Piece]:
        """The partial replies of a stream, until its final reply is here. Leaving the loop early cancels the call."""
        deadline = None if timeout is None else time.monotonic() + timeout + SLACK_S
        try:
            while True:
                if call.pieces:
                    yield call.pieces.popleft()
                elif call.final is not None:
                    return
                else:
                    self._wait(lambda: bool(call.pieces) or call.final is not None, call, deadline)
        finally:
            self.abandon(call)

    def abandon(self, call: Pending) -> None:
        """Forget the call, and have the kernel stop it. Does nothing when it is over. A thread that still waits for it
        gets ECANCELED. Never blocks."""
        if self._blocked:
            self._blocked.discard(call)
        takes = call.sys == _RECV and call.id and not call.abandoned
        if takes:
            call.abandoned = True
            self._given_up[call.id] = call  # before it leaves `_open`: its reply must find it in one of these two
        if self._open.pop(call.id, None) is None:
            call.release()  # it was never sent, or is over
            if takes:
                self._take_back(call)
            return
        call.release()
        call.final = wire.Reply(call.id, errno.ECANCELED, body=_CANCELED)
        self._wake(call)
        if not self._dead:
            self._cancels.append(call.id)
            self._send_cancels()

    # ── messages for calls that were given up ──────────────────────────────────────────────────────────────

    def _take_back(self, call: Pending) -> None:
        """Take the message of a call that was abandoned and has its reply. Both may happen at once, in two threads:
        then each of them calls this, and the second call finds nothing to do."""
        final = call.final
        if final is not None and self._given_up.pop(call.id, None) is not None:
            self._return(final)

    def _came_late(self, reply: wire.Reply) -> None:
        """Handle a final reply for a call that is not open."""
        if not reply.more and self._given_up.pop(reply.id, None) is not None:
            self._return(reply)

    def _return(self, reply: wire.Reply) -> None:
        if not reply.errno:
            self._returned.append(reply)
            self._match()

    def _serve(self, call: Pending) -> bool:
        """Give the call a message that was returned, if there is one."""
        try:
            reply = self._returned.popleft()
        except IndexError:
            return False
        self._give(call, reply)
        return True

    def _give(self, call: Pending, reply: wire.Reply) -> None:
        """Give the call a reply that came for another one. The call takes the other's id, and is found under it if it
        is given up, too."""
        call.id, call.final = reply.id, reply
        call.release()
        self._signal(call)

    def _match(self) -> None:
        """Give messages that were returned to the RECVs that are open, oldest first. The kernel still has such a RECV:
        it is cancelled, and until its final reply, which may be one more message, a stand-in is kept for it."""
        waiting = [call for call in list(self._open.values()) if call.sys == wire.Sys.RECV]
        for call in sorted(waiting, key=lambda call: call.id):
            try:
                reply = self._returned.popleft()
            except IndexError:
                break
            stand_in = Pending(call.sys, call.args, id=call.id, life=call.life, abandoned=True)
            self._given_up[stand_in.id] = stand_in
            if self._open.pop(stand_in.id, None) is None:  # its own reply has come meanwhile
                self._given_up.pop(stand_in.id, None)
                self._returned.appendleft(reply)
            else:
                self._cancels.append(stand_in.id)
                self._give(call, reply)
        self._send_cancels()

    @property
    def open_calls(self) -> int:
        return len(self._open)

    def fileno(self) -> int:
        """A descriptor that becomes readable when there is something for `pump`; the same as long as the connection
        lives. Call this before the first call is made. It may hand out replies: a caller that looks at its calls, then
        calls this, then polls, would wait for what was handed out in between."""
        if not self._watched:
            self._watched = True
            self.pump()  # announces sleep, so that the bell rings from now on
        return self.transport.fileno()

    def pump(self) -> bool:
        """Hand out what has arrived, without waiting: for callers with a loop of their own. True: there was something,
        and this thread has handed it out."""
        me, found = (threading.get_ident(), None), False
        try:
            if self._leader.setdefault(0, me) is me:
                while self._read():
                    found = True
                    if self._dead or self.transport.level_triggered:
                        break
        finally:
            try:
                self._leave(me)
            except BaseException:  # of a signal handler, before it did anything: the lead must not stay with us
                self._leave(me)
                raise
        return found

    def nudge(self) -> None:
        """Ring for what the kernel has not taken: for callers that sleep elsewhere than in here. While another thread
        sends this does nothing, since that thread rings. `close` waits for it."""
        if self._sending.acquire(blocking=False):
            try:
                if not self._dead:
                    self.transport.nudge()
            finally:
                self._sending.release()
            self._after_sending()

    def close(self, why: str = "the connection was closed") -> None:
        """End the connection, from any thread. Calls that are still open get ENOTCONN."""
        if self._closing:
            return
        self._closing = True
        self._fail_all(self._dead or why)
        self.transport.shutdown()
        self._close_transport()

    # ── waiting ───────────────────────────────────────────────────────────────────────────────────────────

    def _wait(self, ready: Callable[[], bool], call: Pending, deadline: float | None) -> None:
        """Wait until `ready`: lead, or follow the thread that leads."""
        me = (threading.get_ident(), call)
        try:
            while True:  # leading and following begin with a look at `ready`
                leader = self._leader.setdefault(0, me)
                if leader is me:
                    self._lead(ready, deadline)
                    break
                if leader[0] == me[0]:
                    self._lead_inside(ready, deadline)
                    break
                self._follow(ready, call, deadline)
                if ready():
                    break
        finally:
            try:
                self._leave(me)
            except BaseException:  # of a signal handler, before it did anything: the lead must not stay with us
                self._leave(me)
                raise

    def _leave(self, me: tuple[int, object]) -> None:
        """Give up the lead, if this thread has it, and make another thread take it."""
        led = self._leader.get(0) is me
        if led:
            del self._leader[0]
        if self._followers and not self._leader:
            self._pass_lead()
        if self._closing:
            self._close_transport()
        elif led and self._watched and (self._took_only or self._arrived):
            self.pump()  # it has begun to poll after we read without asking for the bell, or we were interrupted

    def _lead(self, ready: Callable[[], bool], deadline: float | None) -> None:
        transport = self.transport
        while not ready():  # the last leader may have handed it out before the lead was ours
            # Sleep first: `wait` ends at once if something is there.
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
            if not (self._dead or self._arrived or self._renewing):
                try:
                    self._polling = True
                    transport.wait(left)
                finally:
                    self._polling = False
            self._read()

    def _lead_inside(self, ready: Callable[[], bool], deadline: float | None) -> None:
        """Lead in a signal handler that has interrupted its own thread, the leader."""
        if not self._polling:
            raise wire.error(errno.EDEADLK, "a signal handler made a call while replies were handed out")
        try:
            self._polling = False  # another handler may lead only while this one sleeps, not while it hands out
            self._lead(ready, deadline)
        finally:
            self._polling = True
            # The interrupted sleep goes on after the handler, and may be for what was handed out just now.
            self.transport.rouse()

    def _follow(self, ready: Callable[[], bool], call: Pending, deadline: float | None) -> None:
        gate = threading.Lock()
        gate.acquire()
        call.gate = gate
        number = call.id
        self._followers[number] = call
        try:
            # The leader may have left before it could see this call in `_followers`; then the lead is free.
            if ready() or not self._leader:
                return
            left = -1 if deadline is None else deadline - time.monotonic()
            if (deadline is not None and left <= 0) or not gate.acquire(timeout=left):
                raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
        finally:
            self._followers.pop(number, None)
            call.gate = None

    def _pass_lead(self) -> None:
        """Wake one follower that has no reply yet. If there is none, wake all: those have been woken for their replies
        already, so a second wake-up costs nothing."""
        followers = list(self._followers.values())
        if not any(call.final is None and self._wake(call) for call in followers):
            for call in followers:
                self._wake(call)

    @staticmethod
    def _wake(call: Pending) -> bool:
        gate = call.gate
        if gate is None:
            return False
        with contextlib.suppress(RuntimeError):  # another thread woke it already
            gate.release()
        return True

    # ── leading ───────────────────────────────────────────────────────────────────────────────────────────

    def _read(self) -> bool:
        """Hand out what has arrived; False when there was nothing."""
        transport, arrived = self.transport, self._arrived
        if self._dead:
            self._fail_all(self._dead)  # calls that were being submitted when the connection ended
            return True
        try:
            reborn = transport.reborn or self._renewing  # before reading: so all that the dead kernel has sent is read
            self._took_only = not self._watched
            if self._took_only:
                transport.take(arrived)
            else:
                arrived.extend(transport.receive())
            if transport.outbox_bytes:
                self._pump_out()
            if not arrived and not reborn:
                if transport.hung_up:
                    self._fail_all(transport.why or "aiosd is gone")
                    return True
                return transport.reborn
            while arrived:
                self._hand_out(wire.decode_reply(arrived[0]))
                del arrived[0]  # not before: see `_hand_out`
            if reborn:
                self._submit_again()
        except (ProtocolError, msgspec.MsgspecError) as err:
            self._fail_all(f"the kernel sent nonsense: {err}")
        return True

    def _pump_out(self) -> None:
        """Send from the outbox, since there may be room now. When another thread, or this one further up the stack, is
        sending, only note that (`_pump_wanted`), and the thread that sends will do it."""
        self._pump_wanted = True
        while self._pump_wanted and self._sending.acquire(blocking=False):
            try:
                if self._busy:
                    return
                self._pump_wanted = False
                if not self._dead:
                    self._pump()
            finally:
                self._sending.release()
        self._signal_room()
        if self._cancels:
            self._send_cancels()

    def _signal_room(self) -> None:
        if self._blocked and not self.transport.outbox_bytes:
            for call in list(self._blocked):
                self._signal(call)

    def _pump(self) -> None:
        """With the right to send. `_busy` meanwhile, because a finalizer that sent a cancel in the middle of this would
        send a frame twice."""
        try:
            self._busy = True
            self.transport.pump()
        finally:
            self._busy = False

    def _hand_out(self, reply: wire.Reply) -> None:
        """Give a reply to its call. A signal handler may end this anywhere by an exception: then the same reply is
        handed out once more, and `_in_hand` is the call, which may no longer be in `_open`."""
        if reply.more:
            self._hand_piece(reply)
            return
        call = self._open.get(reply.id)
        if call is not None:
            self._in_hand = call
            if self._open.pop(reply.id, None) is None:
                call = None  # another thread has just abandoned it
        elif self._in_hand is not None and self._in_hand.id == reply.id and reply.id not in self._given_up:
            call = self._in_hand
        if call is None:
            self._in_hand = None
            self._came_late(reply)  # the call was abandoned, or this is the reply to a CANCEL
            return
        if call.fds:
            call.release()
        call.final = reply
        if call.abandoned:
            self._take_back(call)
        if call.gate is not None or call.notify is not None:
            self._signal(call)
        self._in_hand = None

    def _hand_piece(self, reply: wire.Reply) -> None:
        call = self._open.get(reply.id)
        if call is None:
            return  # abandoned
        piece = decoder(wire.TABLE[call.sys].piece)(reply.body)
        if call.progress is not None:
            if reply.offset != call.progress.length:
                return  # a dead kernel has sent it, and its successor has sent the same already
            call.progress.add(piece.tokens, piece.text)
            call.model = call.model or piece.model
        if call.pieces is None:
            call.pieces = deque()
        call.pieces.append(piece)
        self._signal(call)

    def _signal(self, call: Pending) -> None:
        """Wake the thread or coroutine that waits for this call."""
        if call.gate is not None:
            self._wake(call)
        if call.notify is not None:
            try:  # noqa: SIM105  once for each token
                call.notify()
            except RuntimeError:  # its event loop is closed
                pass

    def _submit_again(self) -> None:
        """Send all open calls to a new kernel, which has no list of them: only their effects are recorded."""
        with self._sending:
            if self._busy:
                raise wire.error(errno.EDEADLK, "a signal handler waits for a call in the middle of another one's send")
            try:
                self._busy = True
                if self.transport.reborn:
                    self._renewing = True  # until all are sent, even if a signal handler raises meanwhile
                    self.transport.renew()
                    self._life += 1
                calls = [*self._open.values(), *self._given_up.values()]
                for call in sorted(calls, key=lambda call: call.id):
                    if call.life != self._life:
                        self.transport.send(call.payload(), call.fds)
                        call.life = self._life
                        if call.abandoned:
                            self._cancels.append(call.id)
                self._renewing = False
            finally:
                self._busy = False
        self._signal_room()
        self._after_sending()

    def _send_cancels(self) -> None:
        """Send a CANCEL for each call that was abandoned. If another thread is sending, it does this afterwards."""
        while self._cancels and self._sending.acquire(blocking=False):
            try:
                if self._busy:
                    return  # this very thread is sending, further up the stack
                if self._dead:
                    return  # the transport may be closed
                try:
                    self._busy = True
                    while self._cancels:
                        # The reply finds no open call and is dropped.
                        args = wire.Cancel(self._cancels.popleft())
                        self.transport.send(_request(self.transport.next_id(), wire.Sys.CANCEL, args))
                finally:
                    self._busy = False
            except (OSError, ProtocolError):
                return  # the thread that reads will find out
            finally:
                self._sending.release()
        if self._pump_wanted:
            self._pump_out()

    def _fail_all(self, why: str) -> None:
        """End every call, because the connection is over."""
        self._dead = why
        self._given_up.clear()
        reply = wire.Reply(0, errno.ENOTCONN, body=wire.raw(wire.Failure(why)))
        in_hand, self._in_hand = self._in_hand, None
        if in_hand is not None and in_hand.final is None:  # an exception came while its reply was handed out
            self._open[in_hand.id] = in_hand
        for call in list(self._open.values()):
            if self._open.pop(call.id, None) is not None:
                call.release()
                call.final = reply
                self._signal(call)
        for call in list(self._blocked):
            self._signal(call)  # those that were not sent are not in `_open`; sending fails now
        if self._loops:
            self._detach_loops()

    def _close_transport(self) -> None:
        """Close when no thread reads and none sends. If one reads, it does this when it leaves."""
        me = (threading.get_ident(), None)
        try:
            if self._leader.setdefault(0, me) is me:
                with self._sending:
                    self.transport.close()
        finally:
            if self._leader.get(0) is me:
                del self._leader[0]

    # ── asyncio ───────────────────────────────────────────────────────────────────────────────────────────

    def attach_loop(self, loop: asyncio.AbstractEventLoop, pace: Pace | None = None) -> None:
        """Let an event loop take part in leading, from its own thread, as long as it lives. `pace`: when it reads
        pieces of streams that come fast."""
        if loop in self._loops or self._dead:
            return
        for known in list(self._loops):
            if known.is_closed() and (old := self._loops.pop(known, -1)) >= 0:
                os.close(old)
        # A number of its own: were it that of the connection, another thread could close that, and the loop's next
        # socket get the number, before the loop has removed its reader.
        fd = self._loops[loop] = os.dup(self.transport.fileno())
        if pace is None:
            loop.add_reader(fd, self.pump)
        else:
            from libaios.pace import PacedReader  # no agent needs it

            self._paced = PacedReader(loop, fd, pace, self.pump, lambda: len(self._open))
        self._watched = True
        self.pump()  # announces sleep: from now on the bell rings

    def _detach_loops(self) -> None:
        """Remove the readers: the descriptor of a connection that has ended stays readable."""
        loops, self._loops = self._loops, {}
        if self._paced is not None:
            self._paced.closed = True
        for loop, fd in loops.items():
            try:
                if loop.is_running() and not _runs_here(loop):
                    loop.call_soon_threadsafe(_leave, loop, fd)
                else:
                    _leave(loop, fd)
            except RuntimeError:  # it was closed just now
                os.close(fd)

    def disconnect_after_fork(self) -> None:
        """End the connection in a forked child, since it is the parent's."""
        self._dead = self.transport.forked
        # Another thread of the parent may have been sending or leading at the fork. It does not exist in the child, and
        # would hold the right to send, or the lead, for ever.
        self._sending, self._busy = threading.RLock(), False
        self._leader.clear()
        self._followers.clear()
        for fd in self._loops.values():
            os.close(fd)
        self._loops.clear()
        self._blocked.clear()
        self._given_up.clear()
        self._returned.clear()
        reply = wire.Reply(0, errno.ENOTCONN, body=wire.raw(wire.Failure(self._dead)))
        for call in list(self._open.values()):
            call.release()
            call.final = reply  # without waking a thread: those that waited are in the parent
        self._open.clear()
        with contextlib.suppress(OSError):
            self.transport.close()


def _leave(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Remove the loop's reader and close its descriptor; runs in the loop's thread."""
    if not loop.is_closed():
        loop.remove_reader(fd)
    os.close(fd)


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    import asyncio

    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


_CANCELED = wire.raw(wire.Failure("the call was canceled"))
