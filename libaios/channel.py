"""Two processes' way to talk: a segment with two rings, and a pipe as doorbell.

Frames go through the rings (`ring`); the pipe carries single bytes that say "look", and its end says that the other
side is gone. A bell is rung only when the other side has announced that it sleeps (or waits for room), so that a busy
pair talks without a system call.

`send` never blocks: what finds no room waits in an outbox here, whose size the owner watches (`outbox_bytes`).
`receive` never blocks either and returns whole frames. When it returns fewer than asked for, sleep has been announced
and the bell (`fileno`) becomes readable with the next frame. `wait` sleeps on the bell, with a back-stop, because a
side that died in the middle of ringing must not be waited for in vain.

A raised epoch (a new kernel) makes `reborn` true; the owner first receives what the dead kernel had published, then
calls `renew`, which drops the outbox, and submits its open calls again under the new epoch.

One thread at a time may send (`send`, `pump`, `renew`) and one may receive; the SDK holds locks for that, the kernel
has but one thread.
"""

from __future__ import annotations

import enum
import multiprocessing
import os
import select
import time
from collections import deque

from libaios import ring
from libaios.ring import ProtocolError, raise_epoch

__all__ = ["Channel", "ProtocolError", "Side", "make_channel", "raise_epoch"]

BACKSTOP_S = 1.0


class Side(enum.Enum):
    """AGENT submits and gets completions; KERNEL the reverse."""

    AGENT = "agent"
    KERNEL = "kernel"


def make_channel(sub_size: int = 1 << 16, comp_size: int = 1 << 16) -> tuple[int, int, int]:
    """(memfd, the kernel's end of the bell, the agent's end): three descriptors that the caller owns."""
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


class Channel:
    """One side of a channel; owns both descriptors from now on. Raises ProtocolError for a bad segment."""

    __slots__ = (
        "_bell",
        "_consumer",
        "_memfd",
        "_outbox",
        "_producer",
        "_segment",
        "epoch",
        "hung_up",
        "ids",
        "more",
        "outbox_bytes",
    )

    def __init__(self, memfd: int, bell: int, side: Side) -> None:
        self._memfd, self._bell = memfd, bell
        self._segment = ring.Segment(memfd)
        agent = side is Side.AGENT
        self.epoch = self._segment.epoch
        self._producer = ring.Producer(self._segment, agent, self.epoch)
        self._consumer = ring.Consumer(self._segment, not agent, self.epoch)
        self.ids = ring.CallIds(self._segment)
        self._outbox: deque[tuple[bytes, int]] = deque()  # frames, and how much of each is in the ring
        self.outbox_bytes = 0
        self.more = False  # the last receive stopped at its limit
        self.hung_up = False  # the other side closed its end of the bell

    def fileno(self) -> int:
        return self._bell

    def close(self) -> None:
        """Unmap, and close both descriptors. Twice is once."""
        if self._bell < 0:
            return
        del self._producer, self._consumer, self.ids
        self._segment.close()
        os.close(self._memfd)
        os.close(self._bell)
        self._bell = self._memfd = -1

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────────

    def send(self, payload: bytes) -> None:
        """Put a frame into the ring, or into the outbox behind those that wait there."""
        small = len(payload) <= self._producer.size // 4  # goes in whole or not at all
        if small and not self._outbox and self._producer.put(payload) == len(payload):
            if self._producer.must_ring():
                self._ring()
            return
        self._outbox.append((payload, 0))
        self.outbox_bytes += len(payload)
        self.pump()

    def pump(self) -> bool:
        """Move the outbox into the ring; True when it is empty. Else the bell will ring when there is room."""
        outbox, producer = self._outbox, self._producer
        moved = False
        while outbox:
            payload, offset = outbox[0]
            done = producer.put(payload, offset)
            if done == len(payload):
                outbox.popleft()
                self.outbox_bytes -= len(payload)
                moved = True
            elif done > offset:
                outbox[0] = (payload, done)
                moved = True
            elif producer.wait_for_room():
                break
        if moved and producer.must_ring():
            self._ring()
        return not outbox

    def _ring(self) -> None:
        try:
            os.write(self._bell, b"\0")
        except BlockingIOError:
            pass  # the pipe is full of rings: it is awake
        except OSError:
            self.hung_up = True

    # ── receiving ─────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, limit: int = 64) -> list[bytes]:
        """Up to `limit` whole frames. ProtocolError when the other side wrote nonsense."""
        self._drain_bell()
        consumer = self._consumer
        frames: list[bytes] = []
        while True:
            while len(frames) < limit:
                frame = consumer.get()
                if frame is None:
                    break
                frames.append(frame)
            self.more = not consumer.empty()
            if self.more and len(frames) >= limit:
                break
            if not self.more and consumer.sleep():
                break
        if consumer.must_ring():
            self._ring()
        return frames

    def _drain_bell(self) -> None:
        try:
            if not os.read(self._bell, 4096):
                self.hung_up = True
        except BlockingIOError:
            pass
        except OSError:
            self.hung_up = True

    @property
    def reborn(self) -> bool:
        """Whether the epoch was raised since the channel was made or renewed."""
        return self._segment.epoch != self.epoch

    def renew(self) -> None:
        """From now on what is sent is for the new kernel; what waited in the outbox was for the dead one."""
        self.epoch = self._producer.epoch = self._segment.epoch
        self._outbox.clear()
        self.outbox_bytes = 0

    def ready(self) -> bool:
        """Whether `receive` would bring something new, without looking at the bell."""
        return not self._consumer.empty() or self.reborn

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until there is something to receive, to pump, or the other side is gone; False: timeout (s)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        while not self.ready() and not self.hung_up:
            left = BACKSTOP_S if deadline is None else min(BACKSTOP_S, deadline - time.monotonic())
            if left <= 0:
                return False
            if poll.poll(left * 1000):
                return True
        return True

    def send_wait(self, payload: bytes, timeout: float | None = None) -> None:
        """As `send`, but wait for room: back-pressure. TimeoutError after `timeout` seconds, BrokenPipeError when
        the other side is gone; a frame that was begun stays in the outbox then and is not torn."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.send(payload)
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        while self._outbox and not self.pump():
            if self.hung_up:
                raise BrokenPipeError("the other side is gone")
            left = BACKSTOP_S if deadline is None else min(BACKSTOP_S, deadline - time.monotonic())
            if left <= 0:
                raise TimeoutError("no room in the ring")
            poll.poll(left * 1000)
            self._drain_bell()
