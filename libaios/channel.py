"""How two processes exchange frames: a segment with two rings, and a pipe as a doorbell.

Frames go through the rings (`ring`). A byte in the pipe (the *bell*) means "look into the ring"; the end of the pipe
means that the other side is gone. A side rings only if the other one has announced that it sleeps, or that it waits for
room. So two busy sides exchange frames without a system call.

`send` never blocks. What finds no room waits in an outbox here, and the owner watches its size (`outbox_bytes`).

`receive` never blocks, either; it returns whole frames. After that the channel has announced sleep, unless `more` is
true: the bell (`fileno`) becomes readable with the next frame, and when there is room for the outbox. `more` is true,
too, when the bell that `receive` has read may have rung for room. So an owner pumps, receives, looks at `more`, and
sleeps.

`wait` sleeps on the bell, for no longer than the back-stop (BACKSTOP_S): the other side may have died just before it
rang. At the back-stop it also rings again, if what it has sent still lies in the ring: its own ring may not have taken
place, because a signal handler raised. Each sleep that ends there makes the next one twice as long, up to LONGEST_S: of
thousands of agents most wait for a long time, and nothing is lost while nothing is sent.

An owner with many channels uses the parts of `receive`: `take` reads the ring and `filled` looks at it, and neither
announces sleep, so the other sides need not ring. `wait` announces it, or `restless` for many channels at once. In the
same way `post` rings once for many frames.

Before it sleeps, `wait` looks at the ring for some microseconds (`Patience`): two sides that reply to each other at
once then need no bell. Correctness does not depend on it: sleep is announced after the last of these looks, and then
the ring is looked at once more.

A new kernel shows as a raised epoch: `reborn` becomes true. The owner first receives what the dead kernel had
published, then calls `renew`, which empties the outbox, and submits its open calls again in the new epoch. A side that
attaches to a channel that had a kernel before rings, so that the other side wakes and notices.

One thread at a time may send (`send`, `pump`, `renew`), and one may receive. The SDK holds locks for that; the kernel
has one thread only. A signal handler may raise anywhere in here (KeyboardInterrupt): each step leaves the channel in
order, and at worst a frame that goes in several fragments is begun again.
"""

from __future__ import annotations

import _socket
import contextlib
import enum
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, MutableSequence, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from libaios import ring
from libaios.ring import ProtocolError, raise_epoch

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["Channel", "ProtocolError", "Side", "make_channel", "raise_epoch"]

_EPOCH = ring.EPOCH
BACKSTOP_S = 4.0
LONGEST_S = 64.0
RINGS_LEFT = 32  # unread bytes in a bell at which it is read; it can hold about 270
LOOKS = 1500  # looks at the ring before sleep, about 40 µs: enough for a process on another core to wake and reply
RESTS = 255  # at most this many sleeps begin without a look after failures
BELL_BYTES = 448  # more than a bell can hold; small enough for Python's allocator of small objects


#: `multiprocessing.connection.Pipe`, once it is imported.
_pipe: Callable[[bool], tuple[Connection[Any, Any], Connection[Any, Any]]] | None = None


class Side(enum.Enum):
    """AGENT writes submissions and reads completions; KERNEL does the reverse."""

    AGENT = "agent"
    KERNEL = "kernel"


def make_channel(sub_size: int = 1 << 16, comp_size: int = 1 << 16) -> tuple[int, int, int]:
    """Three descriptors, which the caller owns: memfd, the kernel's end of the bell, the agent's end."""
    global _pipe
    if _pipe is None:
        from multiprocessing.connection import Pipe  # here: commands, which make no channel, start faster without

        _pipe = Pipe

    memfd = ring.create(sub_size, comp_size)
    try:
        ends = _pipe(True)
    except BaseException:  # of any kind, an interrupt too: undo, and raise it again
        os.close(memfd)
        raise
    bells = []
    for end in ends:
        bells.append(os.dup(end.fileno()))
        end.close()
        os.set_blocking(bells[-1], False)
    return memfd, bells[0], bells[1]


class Items(Protocol):
    """The numbers in the header of a segment."""

    def __getitem__(self, item: int, /) -> int: ...


class Patience:
    """Decides whether to look at the ring for a moment before going to sleep.

    To sleep and be woken takes two system calls and two changes of process: 15 µs on a busy core, and 40 µs on a core
    that sleeps itself. Many replies are there sooner. So `look` reads the counter up to `LOOKS` times, and most of them
    are found without a system call. The time is lost when the reply takes longer, or when the process that is to reply
    waits for this very core. Therefore each failure doubles the number of sleeps that begin without a look, up to
    `RESTS`, and each success halves it. In the long run failures then cost less than 0.2 µs for each sleep."""

    __slots__ = ("_failed", "_rest")

    def __init__(self) -> None:
        self._rest = 0  # the number of next sleeps that begin without a look
        self._failed = 0  # what `_rest` was after the last failure, halved by each success

    def look(self, items: Items, item: int, value: int, looks: int) -> bool:
        """True when the item differs from `value` within `looks` looks. False at once while looks do not pay."""
        if self._rest:
            self._rest -= 1
            return False
        for _ in range(looks):
            if items[item] != value:
                self._failed >>= 1
                return True
        self.failed()
        return False

    def willing(self) -> bool:
        """Whether to look before this sleep. To be called once before each sleep."""
        if self._rest:
            self._rest -= 1
            return False
        return True

    def paid(self) -> None:
        self._failed >>= 1

    def failed(self) -> None:
        self._rest = self._failed = min(2 * self._failed + 1, RESTS)


class Channel:
    """One side of a channel. It owns both descriptors from now on; when it raises ProtocolError, for a bad segment, it
    has closed them."""

    __slots__ = (
        "_agent",
        "_backstop_s",
        "_bell",
        "_blocking",
        "_consumer",
        "_frames",
        "_items",
        "_longest_read_s",
        "_memfd",
        "_outbox",
        "_patience",
        "_producer",
        "_rings",
        "_segment",
        "epoch",
        "fragmented",
        "hung_up",
        "ids",
        "more",
        "outbox_bytes",
        "unread",
        "work",
    )

    def __init__(self, memfd: int, bell: int, side: Side) -> None:
        self._memfd, self._bell = memfd, bell
        self._blocking = False  # reading the bell blocks: see `sleep_in_read`
        self._backstop_s = BACKSTOP_S  # of the next sleep
        self._longest_read_s = 0.0  # the limit of a read that was set with Linux; 0: none
        self._rings = 0  # bytes that were noticed and left in the bell: see `count_ring`
        self._patience = Patience()
        self._outbox: deque[tuple[bytes, int]] = deque()  # frames, and the bytes of each that are in the ring
        self._frames: list[bytes] = []  # received by a `receive` that was interrupted
        self.outbox_bytes = 0
        self.unread = False  # the last `receive` has left something in the ring
        self.more = False  # … or there may be room for the outbox: call `pump` and `receive` before you sleep
        self.fragmented = False  # the last `take` stopped after `ring.FRAGMENTS` fragments: more may be left
        self.hung_up = False  # the other side closed its end of the bell
        self._agent = agent = side is Side.AGENT
        try:
            self._segment = ring.Segment(memfd)
            self._items = self._segment.items
            self.epoch = self._segment.epoch
            self._producer = ring.Producer(self._segment, agent, self.epoch)
            self._consumer = ring.Consumer(self._segment, not agent, self.epoch)
            self.ids = ring.CallIds(self._segment)
            self.work = ring.Work(self._segment)
        except BaseException:  # of any kind, an interrupt too: undo, and raise it again
            os.close(memfd)
            os.close(bell)
            self._bell = -1
            raise
        if self.epoch > 1:
            self._write_bell()

    def fileno(self) -> int:
        return self._bell

    def close(self) -> None:
        """Unmap, and close both descriptors. Twice is once."""
        bell, self._bell = self._bell, -1
        if bell < 0:
            return
        os.close(bell)
        os.close(self._memfd)
        del self._producer, self._consumer, self.ids, self.work
        self._segment.close()

    def sleep_in_read(self) -> None:
        """Let `wait` sleep in a read of the bell: one system call instead of two. For an owner that waits for nothing
        else, since reading the bell may block from now on."""
        self._limit_reads(BACKSTOP_S)
        os.set_blocking(self._bell, True)
        self._blocking = True

    def _limit_reads(self, seconds: float) -> None:
        """Let a read of the bell last no longer than this."""
        self._longest_read_s = 0.0  # a signal handler may raise in here
        # `_socket`, since importing `socket` makes enums: an agent would write to pages that it shares with others.
        bell = _socket.socket(fileno=os.dup(self._bell))
        try:
            bell.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, _timeval(seconds))
            # Writing into a full bell must not block: then the other side will wake anyhow.
            bell.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, _timeval(1e-6))
        finally:
            bell.close()
        self._longest_read_s = seconds

    def rouse(self) -> None:
        """For a signal handler that has interrupted `wait` and has received in its place. After the handler Python
        resumes the read of the bell, for the whole back-stop, although the frame for which `wait` sleeps has been
        received. This makes the bell non-blocking, so that the read ends at once and `wait` returns. (Where `wait`
        polls instead, Python resumes the poll with the time that is left.)"""
        if self._blocking:
            with contextlib.suppress(OSError):
                os.set_blocking(self._bell, False)

    def shutdown(self) -> None:
        """Hang up; both sides wake. Any thread may call this, also while another one is in `wait`."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._bell)) as bell:
            bell.shutdown(socket.SHUT_RDWR)

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────────

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Put a frame into the ring, or behind those that wait in the outbox. (`fds` are ignored: a channel carries no
        descriptors.)"""
        producer = self._producer
        if not self._outbox and producer.put_whole((payload,)):
            ring.fence()
            if self._items[producer.sleeps]:
                self._ring(producer.sleeps)
        else:
            self._queue(payload)

    def send_silently(self, payload: bytes) -> None:
        """As `send`, but without ringing the bell: for a frame that the other side need not read before the next
        one."""
        if self._outbox or not self._producer.put_whole((payload,)):
            self._queue(payload)

    def post(self, payloads: Sequence[bytes]) -> None:
        """Send all of these, in order, with one ring of the bell."""
        producer, done = self._producer, 0
        if not self._outbox:
            done = producer.put_whole(payloads)
            ring.fence()
            if self._items[producer.sleeps]:
                self._ring(producer.sleeps)
        for payload in payloads[done:]:
            self._queue(payload)

    def _queue(self, payload: bytes) -> None:
        self._outbox.append((payload, 0))
        self.outbox_bytes += len(payload)
        self.pump()

    def pump(self) -> bool:
        """Move frames from the outbox into the ring. True: it is empty. Else the bell rings when there is room."""
        outbox, producer = self._outbox, self._producer
        moved = False
        while outbox:
            payload, offset = outbox[0]
            total = len(payload)
            try:
                done = producer.put(payload, offset)
            except BaseException:  # of any kind, mostly a signal handler's
                # A signal handler raised, and the number of bytes written is unknown. To the consumer a first fragment
                # is a new start.
                outbox[0] = (payload, 0)
                raise
            if done == total:
                outbox.popleft()
                self.outbox_bytes -= total
                moved = True
            elif done > offset:
                outbox[0] = (payload, done)
                moved = True
            elif producer.wait_for_room():
                break
        if moved:
            ring.fence()
            self._ring(producer.sleeps)
        return not outbox

    def unbalanced(self) -> str:
        """What is wrong with the counters of rings and outbox; "" if nothing is."""
        waiting = sum(len(payload) for payload, _ in self._outbox)
        if waiting != self.outbox_bytes:
            return f"{waiting} bytes in the outbox, {self.outbox_bytes} in the books"
        try:
            self._producer.unread()
            self._consumer.empty()
        except ProtocolError as err:
            return str(err)
        return ""

    @property
    def assembling(self) -> int:
        """Bytes held here of a large frame that is not complete yet."""
        return self._consumer.assembling

    def _ring(self, flag: int) -> None:
        """Ring once, if the other side has set this flag. Between clearing the flag and ringing no function is called:
        a signal handler that raised there would leave the flag cleared, and the bell would never ring again."""
        items = self._items
        if items[flag]:
            try:
                items[flag] = 0
                os.write(self._bell, b"\0")
            except BlockingIOError:
                pass  # the pipe is full, so the other side is awake
            except OSError:
                self._on_bell_error()

    def _write_bell(self) -> None:
        try:
            os.write(self._bell, b"\0")
        except BlockingIOError:
            pass
        except OSError:
            self._on_bell_error()

    def _on_bell_error(self) -> None:
        """Handle an OSError of the bell: the other side is gone, or has damaged its end, which is treated alike. But in
        an agent a signal handler may have raised that OSError: then poll reports no error of the bell, and the OSError
        is raised again. (In aiosd's own processes no handler raises, and what an agent does to its bell must not raise
        there.)"""
        if self._agent and self._bell >= 0:
            poll = select.poll()
            poll.register(self._bell, 0)  # POLLHUP, POLLERR and POLLNVAL are always reported
            if not poll.poll(0):
                raise
        self.hung_up = True

    def nudge(self) -> None:
        """Ring, whatever the flag is, if the other side has not taken all: an earlier ring may have been lost."""
        if self._producer.unread():
            self._write_bell()

    # ── receiving ─────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, limit: int = 64) -> list[bytes]:
        """Up to `limit` whole frames, and about as many bytes as the ring can hold: a peer that writes as fast as this
        side reads must not keep it here. Afterwards look at `more`. Raises ProtocolError when the other side broke the
        protocol."""
        self.drain_bell()
        consumer, frames, items = self._consumer, self._frames, self._items
        stop = consumer.read + consumer.size
        while True:
            consumer.gather(frames, limit)
            if (len(frames) >= limit or consumer.read >= stop) and not consumer.empty():
                self.unread = True  # sleep is not announced: the owner calls again without a bell
                break
            if consumer.sleep():
                self.unread = False
                break
        self._ring(consumer.waits)
        self.more = self.unread or (bool(self._outbox) and not items[self._producer.waits])
        self._frames = []
        return frames

    def take(self, frames: MutableSequence[bytes], limit: int = 1 << 30) -> int:
        """Append the frames that are here to `frames`, until there are `limit` of them. Returns `assembling`."""
        consumer = self._consumer
        if self._frames:
            frames += self._frames
            self._frames = []
        self.fragmented = consumer.gather(frames, limit)
        if self._items[consumer.waits]:  # without a fence: it is looked at again when sleep is announced
            self._ring(consumer.waits)
        return consumer.assembling

    def filled(self) -> bool:
        """Whether there is something to take."""
        consumer = self._consumer
        return self._items[consumer.written_item] != consumer.read

    def look(self, looks: int) -> bool:
        """Look at the ring, up to `looks` times where that has paid before. True: something has come. Sleep is not
        announced."""
        consumer, items = self._consumer, self._items
        written, read = consumer.written_item, consumer.read
        return items[written] != read or self._patience.look(items, written, read, looks)

    def settled(self) -> bool:
        """After sleep was announced: True when there is nothing to take or to pump. The bell rings when there is."""
        consumer, items = self._consumer, self._items
        if items[consumer.waits]:
            self._ring(consumer.waits)
        return items[consumer.written_item] == consumer.read and (not self._outbox or bool(items[self._producer.waits]))

    def drain_bell(self) -> None:
        """Empty the bell. Look at rings and outbox after this, not before."""
        self._rings = 0
        if self._blocking and not _readable(self._bell, 0):
            return
        self._read_bell()

    def count_ring(self) -> bool:
        """As `drain_bell`, for an owner that polls edge-triggered (EPOLLET): it gets an event for each ring, even if
        the bytes of older ones are still in the bell. So the bell is read only at every RINGS_LEFT-th ring, long before
        it is full. True for the first ring whose byte is left in the bell."""
        self._rings = rings = self._rings + 1
        if rings >= RINGS_LEFT:
            self.drain_bell()
        return rings == 1

    def _read_bell(self) -> bool:
        """Read the bell. False: it was empty."""
        try:
            if not os.read(self._bell, BELL_BYTES):
                self.hung_up = True
        except BlockingIOError:
            return False
        except OSError:
            self._on_bell_error()
        return True

    @property
    def level_triggered(self) -> bool:
        """Of `connection.Transport`. False: once the bell was read, `fileno` does not show what lies in the ring."""
        return False

    @property
    def reborn(self) -> bool:
        """Whether the epoch was raised since the channel was made or renewed."""
        return self._items[_EPOCH] & 0xFFFFFFFF != self.epoch

    def renew(self) -> None:
        """Send in the new epoch from now on, and drop what waited in the outbox for the dead kernel."""
        self.epoch = self._segment.epoch
        self._producer.enter(self.epoch)
        self._outbox.clear()
        self.outbox_bytes = 0

    def ready(self) -> bool:
        """Whether `receive` would return something, or `reborn` is true, without a look at the bell."""
        return not self._consumer.empty() or self.reborn or bool(self._frames)

    def wait(self, timeout: float | None = None, also: Sequence[int] = ()) -> bool:
        """Sleep until there may be something to receive or to pump, or the other side is gone; then return True. False
        after `timeout` seconds, or after the back-stop, whichever comes first; so call it in a loop. `also`:
        descriptors that end the sleep, too, when they can be read."""
        consumer, items = self._consumer, self._items
        written, read = consumer.written_item, consumer.read
        seconds, self._backstop_s = self._backstop_s, BACKSTOP_S
        if items[written] != read or self._frames or self.hung_up:
            return True
        if self._patience.look(items, written, read, LOOKS):
            return True
        items[consumer.sleeps] = 1
        ring.fence()
        if items[written] != read or items[_EPOCH] & 0xFFFFFFFF != self.epoch:
            return True
        if items[consumer.waits]:
            self._ring(consumer.waits)
        if self._blocking and not also and (timeout is None or timeout >= seconds):
            if seconds != self._longest_read_s:
                self._limit_reads(seconds)
            if self._read_bell():
                return True
            os.set_blocking(self._bell, True)  # after a `rouse`; a test for that could miss another handler
            self._backstop_s = min(2 * seconds, LONGEST_S)
        elif found := _readable(
            self._bell, BACKSTOP_S if timeout is None else max(0.0, min(BACKSTOP_S, timeout)), also
        ):
            if self._bell in found:
                self._read_bell()
            return True
        self.nudge()
        return False


def look(channels: Sequence[Channel], looks: int) -> bool:
    """`Channel.look` at several rings at once, `looks` times in all while that pays for one of them."""
    willing = [channel for channel in channels if channel._patience.willing()]
    rings = [(each._items, each._consumer.written_item, each._consumer.read, each) for each in channels]
    for _ in range(looks // len(rings) if willing else 1):
        for items, written, read, channel in rings:
            if items[written] != read:
                if channel in willing:
                    channel._patience.paid()
                return True
    for channel in willing:
        channel._patience.failed()
    return False


def restless(channels: Sequence[Channel]) -> list[Channel]:
    """Announce sleep on all of these: from now on the other sides ring for what they send. Returns the channels to look
    at before sleeping, because something has come in the meantime."""
    for channel in channels:
        channel._items[channel._consumer.sleeps] = 1
    ring.fence()
    return [channel for channel in channels if not channel.settled()]


def _readable(fd: int, seconds: float, also: Sequence[int] = ()) -> list[int]:
    """Wait until one of these can be read or is hung up; return all for which that is so."""
    poll = select.poll()  # a new one each time: a signal handler may call this while its thread polls, further up
    for each in (fd, *also):
        poll.register(each, select.POLLIN)
    return [ready for ready, _ in poll.poll(seconds * 1000)]


def _timeval(seconds: float) -> bytes:
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
