"""Two processes' way to talk: a segment with two rings, and a pipe as doorbell.

Frames go through the rings (`ring`); the pipe carries single bytes that say "look", and its end says that the other
side is gone. A bell is rung only when the other side has announced that it sleeps (or waits for room), so that a busy
pair talks without a system call.

`send` never blocks: what finds no room waits in an outbox here, whose size the owner watches (`outbox_bytes`).
`receive` never blocks either and returns whole frames. Unless it says that there is `more` to do, sleep has been
announced, and the bell (`fileno`) becomes readable with the next frame, and when there is room for the outbox. `more`
is also said when the bell that `receive` has drained was about room: so pump, receive, look at `more`, sleep. `wait`
sleeps on the bell, with a back-stop, because a side that died in the middle of ringing must not be waited for in vain.
Who waits at the back-stop rings again if what it sent still lies in the ring: its own ring may have been lost to an
exception from a signal handler.

Who has more to do than to listen takes `receive` apart, and saves the other side its rings: `take` reads, `filled`
looks, and neither announces anything; sleep is announced in `wait`, or for many channels at once in `restless`. In the
same way `post` makes one ring of many frames.

Before it sleeps, `wait` looks on for a moment (`Patience`): two that answer each other within microseconds then need
no bell at all. Nothing depends on it: sleep is announced after the last look, and looked again after that.

A raised epoch (a new kernel) makes `reborn` true; the owner first receives what the dead kernel had published, then
calls `renew`, which drops the outbox, and submits its open calls again under the new epoch. A side that attaches to
a channel on which others have lived before rings, so that nobody sleeps on without noticing.

One thread at a time may send (`send`, `pump`, `renew`) and one may receive; the SDK holds locks for that, the kernel
has but one thread. Signal handlers may raise anywhere in here (KeyboardInterrupt): each step leaves the channel in
order, and at worst a frame that is sent in several fragments is begun anew.
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
from collections.abc import MutableSequence, Sequence
from typing import Protocol

from libaios import ring
from libaios.ring import ProtocolError, raise_epoch

__all__ = ["Channel", "ProtocolError", "Side", "make_channel", "raise_epoch"]

_EPOCH = ring.EPOCH
BACKSTOP_S = 1.0
RINGS_LEFT = 32  # in a bell, before they are drained; it holds some 270
LOOKS = 1500  # before sleep, some 40 µs: one who has to be woken on a core of its own, and answers at once
RESTS = 255  # sleeps that begin without them, at most
BELL_BYTES = 448  # all rings that a bell can hold, in an object that Python takes from its small ones


class Side(enum.Enum):
    """AGENT submits and gets completions; KERNEL the reverse."""

    AGENT = "agent"
    KERNEL = "kernel"


def make_channel(sub_size: int = 1 << 16, comp_size: int = 1 << 16) -> tuple[int, int, int]:
    """(memfd, the kernel's end of the bell, the agent's end): three descriptors that the caller owns."""
    import multiprocessing  # here: the commands, which make no channel, start faster without

    memfd = ring.create(sub_size, comp_size)
    try:
        ends = multiprocessing.Pipe(duplex=True)
    except BaseException:
        os.close(memfd)
        raise
    bells = []
    for end in ends:
        bells.append(os.dup(end.fileno()))
        end.close()
        os.set_blocking(bells[-1], False)
    return memfd, bells[0], bells[1]


class Items(Protocol):
    """The numbers of a segment's header."""

    def __getitem__(self, item: int, /) -> int: ...


class Patience:
    """Whether it pays to look a little longer before going to sleep.

    Falling asleep and being woken takes two system calls and two changes of process, 15 µs on a busy core and 40 µs on
    one that has to be woken itself; many answers are there sooner. So one looks on, `LOOKS` times, and finds most of
    them without any of that. Where it is in vain (the answer takes long, or whoever gives it waits for this very core)
    it costs that time; so each failure doubles how many sleeps are begun at once, up to `RESTS`, and each success
    halves it. In the long run that is less than 0.2 µs for a sleep, or next to always worth it."""

    __slots__ = ("_failed", "_rest")

    def __init__(self) -> None:
        self._rest = 0  # sleeps to begin at once
        self._failed = 0

    def look(self, items: Items, item: int, value: int, looks: int) -> bool:
        """Whether the item changes from `value` while we look."""
        if self._rest:
            self._rest -= 1
            return False
        for _ in range(looks):
            if items[item] != value:
                self._failed >>= 1
                return True
        self._rest = self._failed = min(2 * self._failed + 1, RESTS)
        return False


class Channel:
    """One side of a channel; owns both descriptors from now on, and has closed them when it raises ProtocolError for a
    bad segment."""

    __slots__ = (
        "_agent",
        "_bell",
        "_blocking",
        "_consumer",
        "_frames",
        "_items",
        "_memfd",
        "_outbox",
        "_patience",
        "_producer",
        "_rings",
        "_segment",
        "epoch",
        "hung_up",
        "ids",
        "more",
        "outbox_bytes",
        "unread",
    )

    def __init__(self, memfd: int, bell: int, side: Side) -> None:
        self._memfd, self._bell = memfd, bell
        self._blocking = False  # the bell was made for `wait`
        self._rings = 0  # heard and left in the bell
        self._patience = Patience()
        self._outbox: deque[tuple[bytes, int]] = deque()  # frames, and how much of each is in the ring
        self._frames: list[bytes] = []  # received by a `receive` that was interrupted
        self.outbox_bytes = 0
        self.unread = False  # the last receive left something in the ring
        self.more = False  # … or there may be room for the outbox: come back before sleeping
        self.hung_up = False  # the other side closed its end of the bell
        self._agent = agent = side is Side.AGENT
        try:
            self._segment = ring.Segment(memfd)
            self._items = self._segment.items
            self.epoch = self._segment.epoch
            self._producer = ring.Producer(self._segment, agent, self.epoch)
            self._consumer = ring.Consumer(self._segment, not agent, self.epoch)
            self.ids = ring.CallIds(self._segment)
        except BaseException:
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
        del self._producer, self._consumer, self.ids
        self._segment.close()

    def sleep_in_read(self) -> None:
        """Have `wait` sleep in a read of the bell, one system call instead of two. For an owner that waits for nothing
        else: the bell is no longer non-blocking."""
        bell = _socket.socket(fileno=os.dup(self._bell))  # without enums: no agent should write to theirs
        try:
            bell.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, _timeval(BACKSTOP_S))
            # A bell full of rings is no reason to sleep.
            bell.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, _timeval(1e-6))
        finally:
            bell.close()
        os.set_blocking(self._bell, True)
        self._blocking = True

    def rouse(self) -> None:
        """For a signal handler that has broken into `wait`, and received in its place: Python begins that read anew,
        with all its time, and what it waits for has been taken. Now it finds nothing, and `wait` returns. (Where
        `wait` polls, for less than the back-stop, Python goes on with the time that is left.)"""
        if self._blocking:
            with contextlib.suppress(OSError):
                os.set_blocking(self._bell, False)

    def shutdown(self) -> None:
        """Hang up: both sides wake from their sleep. Any thread may call this, also while another is in `wait`."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._bell)) as bell:
            bell.shutdown(socket.SHUT_RDWR)

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────────

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Put a frame into the ring, or into the outbox behind those that wait there. (`fds`: a channel carries no
        descriptors, they are ignored.)"""
        producer = self._producer
        if not self._outbox and producer.put_whole((payload,)):
            ring.fence()
            if self._items[producer.sleeps]:
                self._ring(producer.sleeps)
        else:
            self._queue(payload)

    def post(self, payloads: Sequence[bytes]) -> None:
        """Send them all, in order; the other side is told of all with one ring."""
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
        """Move the outbox into the ring; True when it is empty. Else the bell will ring when there is room."""
        outbox, producer = self._outbox, self._producer
        moved = False
        while outbox:
            payload, offset = outbox[0]
            total = len(payload)
            try:
                done = producer.put(payload, offset)
            except BaseException:
                outbox[0] = (payload, 0)  # unknown how far it came; the consumer takes a first fragment as a new start
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
        """What does not add up in rings and outbox; "" when all does."""
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
        """Ring if the other side has set this flag, once. No call stands between clearing it and ringing: there an
        interrupt could come in between, and nobody would ever ring again."""
        items = self._items
        if items[flag]:
            try:
                items[flag] = 0
                os.write(self._bell, b"\0")
            except BlockingIOError:
                pass  # the pipe is full of rings: it is awake
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
        """The other side is gone, or has ruined its bell, which is the same. But in an agent a signal handler may have
        raised that OSError, and then the bell says nothing of an end. (In aiosd's own processes no handler raises, and
        what an agent does to its bell must not raise either.)"""
        if self._agent and self._bell >= 0:
            poll = select.poll()
            poll.register(self._bell, 0)  # POLLHUP, POLLERR and POLLNVAL are always told
            if not poll.poll(0):
                raise
        self.hung_up = True

    def nudge(self) -> None:
        """Ring for what the other side has not taken, whatever its flag says: the way out of a ring that was lost."""
        if self._producer.unread():
            self._write_bell()

    # ── receiving ─────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, limit: int = 64) -> list[bytes]:
        """Up to `limit` whole frames, and no more than one ring of bytes: a peer that writes as fast as we read must
        not hold us here. `more`: do not sleep yet. ProtocolError when the other side wrote nonsense."""
        self.drain_bell()
        consumer, frames, items = self._consumer, self._frames, self._items
        stop = consumer.read + consumer.size
        while True:
            consumer.gather(frames, limit)
            if (len(frames) >= limit or consumer.read >= stop) and not consumer.empty():
                self.unread = True  # without having announced sleep: the owner comes back by itself
                break
            if consumer.sleep():
                self.unread = False
                break
        self._ring(consumer.waits)
        self.more = self.unread or (bool(self._outbox) and not items[self._producer.waits])
        self._frames = []
        return frames

    def take(self, frames: MutableSequence[bytes], limit: int = 1 << 30) -> int:
        """Append what is here to `frames`, until there are `limit` of them. Returns `assembling`."""
        consumer = self._consumer
        if self._frames:
            frames += self._frames
            self._frames = []
        consumer.gather(frames, limit)
        if self._items[consumer.waits]:  # without a fence: whoever announces sleep looks again
            self._ring(consumer.waits)
        return consumer.assembling

    def filled(self) -> bool:
        """Whether there may be something to take."""
        consumer = self._consumer
        return self._items[consumer.written_item] != consumer.read

    def fall_asleep(self, looks: int) -> bool:
        """Look once more, or where that has paid so many times, then announce sleep. False: something has come, or the
        outbox may have room."""
        consumer, items = self._consumer, self._items
        written, read = consumer.written_item, consumer.read
        if items[written] != read or self._patience.look(items, written, read, looks):
            return False
        items[consumer.sleeps] = 1
        ring.fence()
        return self.settled()

    def settled(self) -> bool:
        """After sleep was announced: True when there is nothing to take nor to pump, and the bell will tell."""
        consumer, items = self._consumer, self._items
        if items[consumer.waits]:
            self._ring(consumer.waits)
        return items[consumer.written_item] == consumer.read and (not self._outbox or bool(items[self._producer.waits]))

    def drain_bell(self) -> None:
        """Take the rings that have come. What they were about must be looked at afterwards."""
        self._rings = 0
        if self._blocking and not _readable(self._bell, 0):
            return
        self._read_bell()

    def heard(self) -> bool:
        """As `drain_bell`, for an owner who is told of every ring even if older ones are still in the bell (EPOLLET):
        they are drained now and then, long before there are so many that a new one finds no room. True for the first
        that is left there."""
        self._rings = rings = self._rings + 1
        if rings >= RINGS_LEFT:
            self.drain_bell()
        return rings == 1

    def _read_bell(self) -> bool:
        """False: there was nothing to read."""
        try:
            if not os.read(self._bell, BELL_BYTES):
                self.hung_up = True
        except BlockingIOError:
            return False
        except OSError:
            self._on_bell_error()
        return True

    @property
    def reborn(self) -> bool:
        """Whether the epoch was raised since the channel was made or renewed."""
        return self._items[_EPOCH] & 0xFFFFFFFF != self.epoch

    def renew(self) -> None:
        """From now on what is sent is for the new kernel; what waited in the outbox was for the dead one."""
        self.epoch = self._segment.epoch
        self._producer.enter(self.epoch)
        self._outbox.clear()
        self.outbox_bytes = 0

    def ready(self) -> bool:
        """Whether `receive` would bring something new, without looking at the bell."""
        return not self._consumer.empty() or self.reborn or bool(self._frames)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until there may be something to receive or to pump, or the other side is gone; at most `timeout`
        seconds and at most the back-stop, so call it in a loop. False: nothing of the kind."""
        consumer, items = self._consumer, self._items
        written, read = consumer.written_item, consumer.read
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
        if self._blocking and (timeout is None or timeout >= BACKSTOP_S):
            if self._read_bell():
                return True
            os.set_blocking(self._bell, True)  # if we were roused; a handler between asking and this might rouse again
        elif _readable(self._bell, BACKSTOP_S if timeout is None else max(0.0, min(BACKSTOP_S, timeout))):
            self._read_bell()
            return True
        self.nudge()
        return False


def restless(channels: Sequence[Channel]) -> list[Channel]:
    """Announce sleep on all of these: from now on the other sides ring for what they send. Returns those that must be
    looked at first, because something has come just now."""
    for channel in channels:
        channel._items[channel._consumer.sleeps] = 1
    ring.fence()
    return [channel for channel in channels if not channel.settled()]


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()  # not kept: a signal handler may come here while another `wait` of this thread sleeps
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _timeval(seconds: float) -> bytes:
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
