"""The journal: messages that the kernel has accepted, recorded where they survive its death.

A message that was accepted must be delivered once, also when the kernel dies between any two instructions; and a call
that is submitted again after that must get the result of its first submission. So before SEND and RECV are answered, a
record of them is written to the journal: a memfd that the supervisor created and every kernel inherits. A new kernel
replays it. The journal does not outlive aiosd, as no agent does.

    memfd    u64 magic, u64 version, u64 edition, u64 bytes of records, records
    record   u32 length, msgpack: Sent or Taken

A record is valid when the byte count includes it. The count is written after the record, so a death in between leaves
no half record. There are two memfds. When the one in use is larger than `COMPACT_BYTES`, the records that are still
needed are written to the other one, whose edition is set last; the memfd with the higher edition is valid. A
journal of another version is refused.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

from msgspec import Raw, Struct, msgpack

from aiosd.errors import WorldError
from aiosd.ipc.link import CallKey
from libaios import wire

COMPACT_BYTES = 2 << 20  # a new kernel reads that in about 0.1 s
REMEMBER = 4096  # served calls: in practice far more than are open when a kernel dies

REMEMBER_BYTES = 16 << 20  # … and this number of bytes of their results

MAGIC = int.from_bytes(b"aiosjrnl", "little")
VERSION = 1  # of the layout and of the records

_HEADER = struct.Struct("=4Q")
_EDITION, _BYTES = 2, 3  # indices of the numbers in the header
_LENGTH = struct.Struct("=I")


class Sent(Struct, array_like=True, frozen=True, tag=True):
    """A message was accepted from call `key` for the mailbox of `to`."""

    key: CallKey
    seq: int
    to: int
    sender: int
    obj: Raw


class Taken(Struct, array_like=True, frozen=True, tag=True):
    """Message `seq` was given to call `key`."""

    key: CallKey
    seq: int


_decode = msgpack.Decoder(Sent | Taken).decode


def _size(message: Sent) -> int:
    return len(memoryview(message.obj))


def _map(fd: int) -> memoryview:
    """The four numbers of a memfd's header, in shared memory: setting a number needs no system call and is atomic."""
    return memoryview(mmap.mmap(fd, _HEADER.size)).cast("B").cast("Q")


class Journal:
    """One kernel's journal. `served`: calls that a dead kernel served, with their results: None for a SEND, the message
    for a RECV. Raises WorldError when it has another version, or is no journal."""

    def __init__(self, fds: tuple[int, int], is_alive: Callable[[int], bool], compact_at: int = COMPACT_BYTES) -> None:
        self._fds = fds
        self._is_alive = is_alive
        self._compact_at = self._limit = compact_at
        self._next_seq = 1
        self._waiting: OrderedDict[int, Sent] = OrderedDict()  # by seq: accepted, not taken
        self._recent: deque[tuple[Sent, CallKey]] = deque()  # recently taken messages, each with the call that took it
        self._recent_bytes = 0
        self.served: dict[CallKey, wire.Received | None] = {}
        edition = max(self._edition(fd) for fd in fds)
        self._at = 0 if self._edition(fds[0]) == edition else 1
        self._edition_now = edition
        self._size = 0
        self._replay()

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────

    def sent(self, key: CallKey, to: int, sender: int, obj: Raw) -> int:
        """Record that a message was accepted; returns its number."""
        message = Sent(key, self._next_seq, to, sender, obj)
        self._next_seq += 1
        self._waiting[message.seq] = message
        self._append(message)
        self._keep_small()
        return message.seq

    def taken(self, key: CallKey, seq: int) -> None:
        """Record that a message goes to the RECV call `key`."""
        message = self._waiting.pop(seq)
        self._remember(message, key)
        self._append(Taken(key, seq))
        self._keep_small()

    def _remember(self, message: Sent, key: CallKey) -> None:
        size = _size(message)
        self._recent.append((message, key))
        self._recent_bytes += size
        while len(self._recent) > REMEMBER or self._recent_bytes > max(REMEMBER_BYTES, size):
            self._recent_bytes -= _size(self._recent.popleft()[0])

    def _keep_small(self) -> None:
        if self._size > self._limit:
            self._compact()

    def forget(self, pid: int, seqs: Iterable[int]) -> None:
        """Drop the messages of a dead agent's mailbox."""
        for seq in seqs:
            self._waiting.pop(seq, None)

    def waiting(self) -> list[Sent]:
        """Messages accepted and not taken, oldest first: a new kernel puts them into the mailboxes."""
        return list(self._waiting.values())

    def _append(self, record: Sent | Taken) -> None:
        payload = wire.encode(record)
        data = _LENGTH.pack(len(payload)) + payload
        os.pwrite(self._fds[self._at], data, _HEADER.size + self._size)
        self._size += len(data)
        self._header[_BYTES] = self._size

    def _begin(self, edition: int) -> None:
        """Begin an empty journal in the other memfd, which is used from now on."""
        fd = self._fds[self._at]
        os.ftruncate(fd, 0)
        os.pwrite(fd, _HEADER.pack(MAGIC, VERSION, edition, 0), 0)
        self._size = 0
        self._header = _map(fd)

    # ── reading and compacting ────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def _edition(fd: int) -> int:
        """The edition of a memfd; 0: nothing has been written to it."""
        head = os.pread(fd, _HEADER.size, 0)
        if not head:
            return 0
        if len(head) < _HEADER.size:
            raise WorldError(f"a journal of {len(head)} bytes")
        magic, version, edition, _ = _HEADER.unpack(head)
        if magic != MAGIC:
            raise WorldError("what should be a journal of messages is none")
        if version != VERSION:
            raise WorldError(f"a journal of version {version}; this is version {VERSION}")
        return int(edition)

    def _replay(self) -> None:
        fd = self._fds[self._at]
        if not self._edition_now:
            self._edition_now = 1
            self._begin(edition=1)
            return
        self._header = _map(fd)
        self._size = self._header[_BYTES]
        data = os.pread(fd, self._size, _HEADER.size)
        at = 0
        while at < len(data):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size + length
            self._apply(_decode(data[at - length : at]))

    def _apply(self, record: Sent | Taken) -> None:
        if isinstance(record, Sent):
            self._next_seq = max(self._next_seq, record.seq + 1)
            self._waiting[record.seq] = Sent(record.key, record.seq, record.to, record.sender, Raw(bytes(record.obj)))
            self.served[record.key] = None
            return
        message = self._waiting.pop(record.seq, None)
        if message is not None:
            self._remember(message, record.key)
            self.served[record.key] = wire.Received(message.sender, message.obj)

    def _compact(self) -> None:
        """Write the records that are still needed to the other memfd, and use that one from now on."""
        self._waiting = OrderedDict((seq, m) for seq, m in self._waiting.items() if self._is_alive(m.to))
        self._at = 1 - self._at
        self._begin(edition=0)
        for message, key in self._recent:
            if self._is_alive(message.to) or self._is_alive(message.sender):
                self._append(message)
                self._append(Taken(key, message.seq))
        for message in self._waiting.values():
            self._append(message)
        self._edition_now += 1
        self._header[_EDITION] = self._edition_now
        self._limit = max(self._compact_at, 2 * self._size)  # the records that are needed may already exceed the limit
