"""Mailboxes: messages between agents, accepted once and delivered once, whatever dies in between (`journal`).

The bytes that one sender may have in mailboxes are limited, and so is the size of all mailboxes together: a new kernel
reads all of it again, and must have done so long before the supervisor would take it for hung.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec import Raw

from aiosd.ipc.link import CallKey
from aiosd.kernel.calls import CallTable
from aiosd.kernel.journal import Journal, Sent
from aiosd.kernel.peer import Call
from aiosd.kernel.proc import INIT, Proc
from libaios import wire

MAILBOX_MESSAGES = 1000
MAILBOX_BYTES = 4 << 20
SENDER_BYTES = 16 << 20  # of one sender, in all mailboxes; a person's programs are one sender
ALL_BYTES = 128 << 20  # in all mailboxes


class Message(NamedTuple):
    """One message in a mailbox; `seq` is its number in the journal, `size` that of its bytes."""

    seq: int
    sender: int
    obj: Raw
    size: int

    @classmethod
    def of(cls, sent: Sent) -> Message:
        return cls(sent.seq, sent.sender, sent.obj, len(memoryview(sent.obj)))


@dataclass(slots=True, eq=False)
class Mailbox:
    messages: deque[Message] = field(default_factory=deque)
    size: int = 0  # bytes of the messages
    receivers: deque[Call] = field(default_factory=deque)  # open RECV calls, first come first served


class Mail:
    """All mailboxes, by pid; an agent gets one with the first message or the first receiver."""

    def __init__(self, journal: Journal, calls: CallTable) -> None:
        self.journal = journal
        self._calls = calls
        self._boxes: dict[int, Mailbox] = {}
        self._sent: dict[int, int] = {}  # bytes that lie in mailboxes, by sender
        self._total = 0

    def box(self, pid: int) -> Mailbox:
        """The agent's mailbox; if it has none, an empty one that is not kept."""
        return self._boxes.get(pid) or Mailbox()

    def boxes(self) -> Iterator[tuple[int, Mailbox]]:
        yield from self._boxes.items()

    @property
    def total(self) -> int:
        """Bytes in all mailboxes, as counted along the way."""
        return self._total

    def adopt(self, is_alive: dict[int, Proc]) -> None:
        """After a kernel's death: put messages that were accepted and not taken into mailboxes again. Dead agents have
        none."""
        for sent in self.journal.waiting():
            if sent.to in is_alive:
                self._put(sent.to, Message.of(sent))
            else:
                self.journal.forget(sent.to, [sent.seq])

    def send(self, call: Call, to: Proc, obj: Raw) -> None:
        """Accept a message. Raises OSError: EMSGSIZE, EAGAIN."""
        sender = call.peer.proc.pid if call.peer.proc is not None else 0
        self._accept(call.key, to, sender, bytes(obj))

    def _accept(self, key: CallKey, to: Proc, sender: int, data: bytes) -> None:
        size = len(data)
        self._check_room(to.pid, sender, size)
        obj = Raw(data)
        receivers = self._put(to.pid, Message(self.journal.sent(key, to.pid, sender, obj), sender, obj, size)).receivers
        if receivers:
            receiver = receivers[0]
            self._calls.finish(receiver, self._take(receiver, to.pid))

    def post(self, to: Proc, obj: Raw) -> None:
        """Post a message from aiosd itself; no call waits for its result. Raises OSError: EAGAIN."""
        self._accept((INIT, 0), to, INIT, bytes(obj))

    def _check_room(self, to: int, sender: int, size: int) -> None:
        if size > MAILBOX_BYTES:
            raise wire.error(errno.EMSGSIZE, f"a message of {size} bytes; at most {MAILBOX_BYTES} fit into a mailbox")
        box = self._boxes.get(to)
        if box is not None and (len(box.messages) >= MAILBOX_MESSAGES or box.size + size > MAILBOX_BYTES):
            raise wire.error(errno.EAGAIN, f"{to}: mailbox is full ({len(box.messages)} messages)")
        if self._sent.get(sender, 0) + size > SENDER_BYTES:
            raise wire.error(errno.EAGAIN, f"more than {SENDER_BYTES} bytes of this sender have not been received yet")
        if self._total + size > ALL_BYTES:
            raise wire.error(errno.EAGAIN, f"all mailboxes hold more than {ALL_BYTES} bytes")

    def has_message(self, pid: int) -> bool:
        box = self._boxes.get(pid)
        return box is not None and bool(box.messages)

    def receive(self, call: Call, me: Proc) -> wire.Received | None:
        """The oldest message; None: there is none, and the call waits for one."""
        box = self._own(me.pid)
        if box.messages:
            return self._take(call, me.pid)
        box.receivers.append(call)
        call.forget = lambda: self._forget_receiver(me.pid, box, call)
        return None

    def _forget_receiver(self, pid: int, box: Mailbox, call: Call) -> None:
        box.receivers.remove(call)
        self._drop_if_empty(pid, box)

    def _own(self, pid: int) -> Mailbox:
        """The agent's mailbox, a new one if it has none."""
        box = self._boxes.get(pid)
        if box is None:
            box = self._boxes[pid] = Mailbox()
        return box

    def _put(self, pid: int, message: Message) -> Mailbox:
        box = self._own(pid)
        box.messages.append(message)
        box.size += message.size
        self._total += message.size
        self._sent[message.sender] = self._sent.get(message.sender, 0) + message.size
        return box

    def _take(self, call: Call, pid: int) -> wire.Received:
        box = self._boxes[pid]
        message = box.messages.popleft()
        box.size -= message.size
        self._lift(message)
        self.journal.taken(call.key, message.seq)
        self._drop_if_empty(pid, box)
        return wire.Received(message.sender, message.obj)

    def _lift(self, message: Message) -> None:
        """Count off a message that was taken out of a mailbox."""
        self._total -= message.size
        left = self._sent[message.sender] - message.size
        if left:
            self._sent[message.sender] = left
        else:
            del self._sent[message.sender]

    def _drop_if_empty(self, pid: int, box: Mailbox) -> None:
        if not box.messages and not box.receivers and self._boxes.get(pid) is box:
            del self._boxes[pid]

    def forget(self, pid: int) -> None:
        """Drop the mailbox of a dead agent. Its receivers were closed before."""
        box = self._boxes.pop(pid, None)
        if box is not None:
            for message in box.messages:
                self._lift(message)
            self.journal.forget(pid, [message.seq for message in box.messages])
