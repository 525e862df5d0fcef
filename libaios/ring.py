"""Two rings of bytes in one shared segment: how a frame gets from one process into another.

A segment is a memfd that both sides map; its size is sealed, so neither side can change it. It begins with a header of
one page, and two data areas follow. Every number in it is a native, aligned 8-byte integer.

    offset   field                      written by
         0   magic                      creator, once
         8   version                    creator, once
        16   bytes of submissions       creator, once; a power of two
        24   bytes of completions       creator, once; a power of two
        64   epoch                      supervisor (pwrite), one more for each new kernel
       128   next call id               agent; here because they must survive its exec
       136   lowest open call id        agent
       192   submissions: written       producer (agent)
       256     read                     consumer (kernel)
       320     consumer sleeps          consumer sets; the side that rings the bell clears
       384     producer waits           producer sets, consumer clears and rings
       448   completions: the same four, producer kernel, consumer agent
       704   work: peer                 a service: the call that it works on alone,
       712     call                     … and 0: none
      4096   data of submissions, then data of completions

The counters `written` and `read` only grow, and `0 <= written - read <= size` always. Byte number n of a ring lies at n
modulo size. Each side has its own counter in private memory and only publishes it here, so a peer that overwrites it
harms itself alone.

A *fragment* in the ring is a head, a payload, and padding to a multiple of 8. The head is one number:

    bits  0 – 29   length of the payload
              30   LAST
              31   FIRST
         32 – 63   epoch of its producer

A frame is one fragment (FIRST and LAST are set) or several. Through fragments a frame may be larger than the ring, and
needs no second shared object. The consumer puts it together, up to `wire.MAX_FRAME` bytes.

Epochs separate a new kernel from a dead one. A consumer drops fragments that are older than the epoch in which it
attached, and a frame of which it has not seen the first fragment. So a new kernel needs to know nothing about the state
in which the dead one left a ring: the agent submits its open calls again in the new epoch, and what it had submitted in
the old one is skipped.

The other side may be hostile. Each counter and length is read once, checked, and then used. The same goes for this
side's own counter when it attaches, since the peer may have overwritten it. A value that breaks these rules raises
ProtocolError. A peer cannot disturb this side in any other way, because the size is sealed. Only the last fragment of a
frame may be short (less than a quarter of the ring), so that a peer cannot make the consumer keep a million tiny ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from _thread import allocate_lock
from collections.abc import MutableSequence, Sequence

from libaios import wire

MAGIC = int.from_bytes(b"aiosring", "little")
HEADER = 4096
MIN_RING, MAX_RING = 1 << 12, 1 << 26

#: How many fragments a consumer takes in one call. An honest peer puts no more than five into a ring at a time.
FRAGMENTS = 32

HEAD_BYTES = 8
FIRST, LAST = 1 << 31, 1 << 30
_WHOLE = FIRST | LAST
_LENGTH = LAST - 1
_EPOCH_SHIFT = 32

# Indices of 8-byte items.
_MAGIC, _VERSION, _SUB_SIZE, _COMP_SIZE = 0, 1, 2, 3
EPOCH = 64 // 8
_NEXT_ID, _LOWEST_OPEN = 128 // 8, 136 // 8
_SUB, _COMP = 192 // 8, 448 // 8
_WORK_PEER, _WORK_CALL = 704 // 8, 712 // 8
_WRITTEN, _READ, _SLEEPS, _WAITS = 0, 8, 16, 24  # relative to a ring's first item

_MAX_COUNT = 1 << 62  # no honest counter gets there
_WORD = (1 << 64) - 1

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class ProtocolError(Exception):
    """The other side broke the protocol; the message has the details."""


def fence() -> None:
    """A full memory barrier: other processes see what was written before it, before anything after it is read.

    Without a barrier the processor may read the other side's flag before it publishes its own counter, and a wake-up is
    lost. Python has no barrier of its own, but taking a lock is one. Each call takes a new lock: a common one would
    stay locked for ever if a signal handler raised, or a finalizer sent a frame, between acquire and release.
    """
    allocate_lock().acquire()


def create(sub_size: int, comp_size: int) -> int:
    """A new sealed segment; returns its memfd (close-on-exec). Sizes in bytes, powers of two."""
    for size in (sub_size, comp_size):
        if not MIN_RING <= size <= MAX_RING or size & (size - 1):
            raise ValueError(f"a ring of {size} bytes")
    memfd = os.memfd_create("aios-channel", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(memfd, HEADER + sub_size + comp_size)
        os.pwrite(memfd, struct.pack("=4Q", MAGIC, wire.VERSION, sub_size, comp_size), 0)
        os.pwrite(memfd, struct.pack("=Q", 1), EPOCH * 8)
        os.pwrite(memfd, struct.pack("=2Q", 1, 1), _NEXT_ID * 8)
        for ring in (_SUB, _COMP):  # no consumer is there yet: the first frame rings the bell
            os.pwrite(memfd, struct.pack("=Q", 1), (ring + _SLEEPS) * 8)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:  # of any kind, an interrupt too: undo, and raise it again
        os.close(memfd)
        raise
    return memfd


def raise_epoch(memfd: int) -> None:
    """Begin the life of a new kernel on this segment, without mapping it."""
    (epoch,) = struct.unpack("=Q", os.pread(memfd, 8, EPOCH * 8))
    os.pwrite(memfd, struct.pack("=Q", (epoch + 1) & 0xFFFFFFFF), EPOCH * 8)


class Segment:
    """One side's mapping of a segment. Raises ProtocolError when it is no segment, or one of another version."""

    __slots__ = ("items", "map", "memory", "sizes")

    def __init__(self, memfd: int) -> None:
        try:
            seals = fcntl.fcntl(memfd, fcntl.F_GET_SEALS)
        except OSError as err:
            raise ProtocolError(f"no shared segment: {err.strerror}") from None
        if seals & _SEALS != _SEALS:
            raise ProtocolError("the segment is not sealed")
        length = os.fstat(memfd).st_size
        if not HEADER <= length <= HEADER + 2 * MAX_RING:
            raise ProtocolError(f"a segment of {length} bytes")
        self.map = mmap.mmap(memfd, length)  # for slices: a slice of it is a copy, and cheaper than one of a view
        self.memory = memoryview(self.map)
        self.items = self.memory.cast("Q")
        try:
            self.sizes = self._check(length)
        except ProtocolError:
            self.close()
            raise

    def _check(self, length: int) -> tuple[int, int]:
        items = self.items
        if items[_MAGIC] != MAGIC:
            raise ProtocolError("not a channel of aiosd")
        if items[_VERSION] != wire.VERSION:
            raise ProtocolError(f"a channel of version {items[_VERSION]}; this is version {wire.VERSION}")
        sizes = (items[_SUB_SIZE], items[_COMP_SIZE])
        for size in sizes:
            if not MIN_RING <= size <= MAX_RING or size & (size - 1):
                raise ProtocolError(f"a ring of {size} bytes")
        if HEADER + sum(sizes) != length:
            raise ProtocolError(f"a segment of {length} bytes for rings of {sizes}")
        return sizes

    @property
    def epoch(self) -> int:
        return self.items[EPOCH] & 0xFFFFFFFF

    def close(self) -> None:
        """Unmap. If a thread was in the middle of the ring at a fork, its slice keeps the mapping in the child."""
        self.items.release()
        self.memory.release()
        with contextlib.suppress(BufferError):
            self.map.close()


class CallIds:
    """The agent's call ids, in the header so that they go on after an exec."""

    __slots__ = ("_items",)

    def __init__(self, segment: Segment) -> None:
        self._items = segment.items

    def next(self) -> int:
        number = self._items[_NEXT_ID]
        self._items[_NEXT_ID] = number + 1
        return number

    def note_lowest(self, number: int) -> None:
        self._items[_LOWEST_OPEN] = number


class Work:
    """The call on which a service works alone. It is stored in the header, so that it can still be read when the
    service is dead; writing it costs the other side nothing."""

    __slots__ = ("_items",)

    def __init__(self, segment: Segment) -> None:
        self._items = segment.items

    def begin(self, peer: int, call: int) -> None:
        items = self._items
        items[_WORK_CALL] = 0  # a service that is killed in between has announced nothing
        items[_WORK_PEER] = peer & _WORD
        items[_WORK_CALL] = call

    def end(self) -> None:
        self._items[_WORK_CALL] = 0

    @property
    def call(self) -> tuple[int, int] | None:
        """Peer and call id; None: no call is announced."""
        peer, call = self._items[_WORK_PEER], self._items[_WORK_CALL]
        return (peer - (peer >> 63 << 64), call) if call else None


class Producer:
    """The writing end of one ring. One thread at a time."""

    __slots__ = (
        "_end",
        "_head",
        "_items",
        "_map",
        "_read_item",
        "_start",
        "_written",
        "_written_item",
        "size",
        "sleeps",
        "small",
        "waits",
    )

    def __init__(self, segment: Segment, submissions: bool, epoch: int) -> None:
        base, self._start, self.size = _place(segment, submissions)
        self._end = self._start + self.size
        self.small = self.size // 4  # a frame of up to this many bytes is never divided by `put_whole`
        self._map, self._items = segment.map, segment.items
        self._written_item, self._read_item = base + _WRITTEN, base + _READ
        self.sleeps = base + _SLEEPS  # item: set when the consumer is to be woken
        self.waits = base + _WAITS  # item: set by us, cleared by a consumer that rings for room
        self._written = _own_counter(self._items[self._written_item])
        self.enter(epoch)
        self._free()

    def enter(self, epoch: int) -> None:
        """Write in this epoch from now on."""
        self._head = epoch << _EPOCH_SHIFT

    def _free(self) -> int:
        used = self._written - self._items[self._read_item]
        if not 0 <= used <= self.size or used & 7:
            raise ProtocolError(f"the reader's counter claims that {used} bytes of {self.size} are unread")
        return self.size - used

    def put_whole(self, payloads: Sequence[bytes]) -> int:
        """Write one fragment for each of `payloads`, and publish them together. Stops at the first for which there is
        no room now, or that is larger than `small`; returns the number of fragments written. Nearly all frames go this
        way, so it calls no other function."""
        items, data, size = self._items, self._map, self.size
        start, last, small = self._start, self._end, self.small
        mask, head = size - 1, self._head | _WHOLE
        written = self._written
        free = size - written + items[self._read_item]
        if not 0 <= free <= size or free & 7:
            free = self._free()  # raises, with the figures
        done = 0
        for payload in payloads:
            length = len(payload)
            padded = (HEAD_BYTES + length + 7) & ~7
            if padded > free or length > small:
                break
            at = start + (written & mask)
            items[at >> 3] = head | length  # heads are aligned: they never wrap
            at += HEAD_BYTES
            end = at + length
            if end <= last:
                data[at:end] = payload
            else:
                data[at:last] = payload[: last - at]
                data[start : start + end - last] = payload[last - at :]
            written += padded
            free -= padded
            done += 1
        self._written = items[self._written_item] = written
        return done

    def put(self, payload: bytes, offset: int = 0) -> int:
        """Write as much of `payload` from `offset` on as there is room for. Returns the new offset, which is
        `len(payload)` when all is in the ring. An empty payload is a frame, too: -1 when there is no room for it."""
        total = len(payload)
        while True:
            free = self._free()
            whole = (HEAD_BYTES + total - offset + 7) & ~7
            if whole <= free:
                self._fragment(payload[offset:] if offset else payload, FIRST * (not offset) | LAST)
                return total
            # A frame that fits into half of the ring waits for enough room; a larger one is divided.
            room = free - HEAD_BYTES
            if whole <= self.size // 2 or room < self.size // 4:
                return offset if total else -1
            self._fragment(payload[offset : offset + room], FIRST * (not offset))
            offset += room

    def _fragment(self, piece: bytes, flags: int) -> None:
        start, last, data = self._start, self._end, self._map
        length = len(piece)
        at = start + (self._written & (self.size - 1))
        self._items[at >> 3] = self._head | length | flags
        at += HEAD_BYTES
        end = at + length
        if end <= last:
            data[at:end] = piece
        else:
            data[at:last] = piece[: last - at]
            data[start : start + end - last] = piece[last - at :]
        self._written = written = self._written + ((HEAD_BYTES + length + 7) & ~7)
        self._items[self._written_item] = written

    def unread(self) -> bool:
        """Whether there is something that the consumer has not taken."""
        return self._free() < self.size

    def wait_for_room(self) -> bool:
        """Ask the consumer to ring when there is room. False: there is room now, so do not sleep."""
        self._items[self.waits] = 1
        fence()
        return self._free() < self.size // 2


class Consumer:
    """The reading end of one ring. One thread at a time."""

    __slots__ = (
        "_end",
        "_head",
        "_items",
        "_map",
        "_partial",
        "_read_item",
        "_start",
        "assembling",
        "born",
        "max_frame",
        "read",
        "size",
        "sleeps",
        "waits",
        "written_item",
    )

    def __init__(self, segment: Segment, submissions: bool, born: int, max_frame: int = wire.MAX_FRAME) -> None:
        base, self._start, self.size = _place(segment, submissions)
        self._end = self._start + self.size
        self._map, self._items = segment.map, segment.items
        self.written_item = base + _WRITTEN  # item: differs from `read` when there is something
        self._read_item = base + _READ
        self.sleeps = base + _SLEEPS  # item: set by us, cleared by a producer that rings
        self.waits = base + _WAITS  # item: set by a producer that waits for room, cleared by us when we ring
        self.read = _own_counter(self._items[self._read_item])
        self.born = born  # the epoch in which it attached: fragments of older ones are dropped
        self._head = born << _EPOCH_SHIFT | _WHOLE  # the head of a whole frame as they come now, with length 0
        self.max_frame = max_frame
        self._partial: list[bytes] | None = None  # fragments of a frame of which the last one has not come
        self.assembling = 0  # the bytes of these fragments
        self._available()

    def _available(self) -> int:
        available = self._items[self.written_item] - self.read
        if not 0 <= available <= self.size or available & 7:
            raise ProtocolError(f"the writer's counter claims {available} bytes of {self.size}")
        return available

    def get(self) -> bytes | None:
        """The next whole frame. None: the ring is empty, or what is in it completes no frame. (The caller may have
        other peers to serve, so this does not wait.)"""
        frames: list[bytes] = []
        self.gather(frames, 1)
        return frames[0] if frames else None

    def gather(self, frames: MutableSequence[bytes], limit: int) -> bool:
        """Append the whole frames that are here now to `frames`, until it has `limit` of them. If a signal handler
        raises meanwhile, each frame is either in `frames` or still in the ring. True: it stopped after `FRAGMENTS`
        fragments, since fragments cost time even when they complete no frame."""
        items, data, head = self._items, self._map, self._head
        start, last = self._start, self._end
        mask, longest = self.size - 1, self.max_frame
        read, whole = self.read, self._partial is None
        available, fragments = self._available(), 0
        while available and len(frames) < limit and fragments < FRAGMENTS:
            at = start + (read & mask)
            # Read the head once. XOR removes epoch, FIRST and LAST if they are as expected, and leaves the length.
            # If one of them differs, a high bit remains: the number is larger than any ring, and `_take` looks closer.
            length = items[at >> 3] ^ head
            at += HEAD_BYTES
            end = at + length
            padded = (HEAD_BYTES + length + 7) & ~7
            if whole and padded <= available and length <= longest and end <= last:
                # Nearly every frame. Between keeping it and counting it as read no function is called, so no signal
                # handler can come in between.
                frames += (data[at:end],)
                self.read = read = read + padded
                available -= padded
            else:
                frame = self._take(available)
                if frame is not None:
                    frames += (frame,)
                fragments += 1
                available -= self.read - read
                read, whole, head = self.read, self._partial is None, self._head
        items[self._read_item] = read
        return fragments == FRAGMENTS

    def _take(self, available: int) -> bytes | None:
        """Consume one fragment. Returns the frame, if this was its last fragment."""
        start, last, data = self._start, self._end, self._map
        at = start + (self.read & (self.size - 1))
        head = self._items[at >> 3]
        length, epoch = head & _LENGTH, head >> _EPOCH_SHIFT
        padded = (HEAD_BYTES + length + 7) & ~7
        if padded > available:
            raise ProtocolError(f"a fragment of {length} bytes where {available} are written")
        if length < self.size // 4 and not head & LAST:
            raise ProtocolError(f"a fragment of {length} bytes that does not end its frame")
        at += HEAD_BYTES
        end = at + length
        piece = data[at:end] if end <= last else data[at:last] + data[start : start + end - last]
        if epoch < self.born:
            self.read += padded
            return None
        self._head = epoch << _EPOCH_SHIFT | _WHOLE  # the next ones will be of this epoch, too
        if head & FIRST:
            self._partial, self.assembling = [], 0  # the process that began an unfinished frame is dead
        partial = self._partial
        if partial is None:
            self.read += padded
            return None
        if self.assembling + length > self.max_frame:
            raise ProtocolError(f"a frame of more than {self.max_frame} bytes")
        # As in `gather`: from here on, a function is called only while nothing has been changed.
        if head & LAST:
            frame = b"".join((*partial, piece)) if partial else piece
            self._partial, self.assembling = None, 0
            self.read += padded
            return frame
        partial += (piece,)
        self.assembling += length
        self.read += padded
        return None

    def empty(self) -> bool:
        return self._available() == 0

    def sleep(self) -> bool:
        """Announce sleep. False: something has come meanwhile, so do not sleep."""
        self._items[self.sleeps] = 1
        fence()
        return self._available() == 0


def _own_counter(value: int) -> int:
    """Check this side's own counter as the header has it when this side attaches."""
    if value & 7 or value > _MAX_COUNT:
        raise ProtocolError(f"a counter of {value}")
    return value


def _place(segment: Segment, submissions: bool) -> tuple[int, int, int]:
    """The place of one ring: the first item of its counters, the offset of its data, its size in bytes."""
    sub, comp = segment.sizes
    return (_SUB, HEADER, sub) if submissions else (_COMP, HEADER + sub, comp)
