"""Mailboxes against a simple model: quotas, order, and the state that a new kernel reads."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec import Raw

from aiosd.kernel import books, mail
from aiosd.kernel.journal import Journal
from aiosd.kernel.mail import Mail
from aiosd.kernel.peer import Call
from libaios import wire

PIDS = st.integers(2, 5)


class FakeCalls:
    """Closes calls, and records the result of each."""

    def __init__(self) -> None:
        self.got: list[tuple[int, wire.Received]] = []

    def finish(self, call: Call, body: wire.Received) -> None:
        if call.forget is not None:
            forget, call.forget = call.forget, None
            forget()
        self.got.append((call.id, body))


def call_of(pid: int, number: int) -> Any:
    peer: Any = SimpleNamespace(id=pid, proc=SimpleNamespace(pid=pid) if pid else None)
    return Call(peer, number, wire.TABLE[wire.Sys.SEND])


class Mailboxes(RuleBasedStateMachine):
    """Small limits, so that each is reached. The model is a list of (to, sender, bytes) in the order of sending."""

    LIMITS: ClassVar = {"MAILBOX_MESSAGES": 4, "MAILBOX_BYTES": 100, "SENDER_BYTES": 130, "ALL_BYTES": 250}

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for name, value in self.LIMITS.items():
            self.patch.setattr(mail, name, value)
        self.alive = {2, 3, 4, 5}
        self.fds = os.memfd_create("a"), os.memfd_create("b")
        self.numbers = iter(range(1, 1 << 30))
        self.model: list[tuple[int, int, bytes]] = []
        self.waiting: list[tuple[int, Call]] = []
        self.expected: list[tuple[int, wire.Received]] = []
        self.calls = FakeCalls()
        self.mail = self.made()

    def made(self) -> Mail:
        calls: Any = self.calls
        return Mail(Journal(self.fds, lambda pid: pid in self.alive, compact_at=400), calls)

    def teardown(self) -> None:
        self.patch.undo()
        for fd in self.fds:
            os.close(fd)

    def why_not(self, to: int, sender: int, size: int) -> int:
        boxed = [len(obj) for one, _, obj in self.model if one == to]
        if size > 100:
            return errno.EMSGSIZE
        full = len(boxed) >= 4 or sum(boxed) + size > 100
        sent = sum(len(obj) for _, one, obj in self.model if one == sender)
        everything = sum(len(obj) for _, _, obj in self.model)
        return errno.EAGAIN if full or sent + size > 130 or everything + size > 250 else 0

    @rule(to=PIDS, sender=st.integers(0, 5), size=st.integers(2, 110))
    def send(self, to: int, sender: int, size: int) -> None:
        if to not in self.alive:
            return
        obj = wire.encode(bytes([sender]) * (size - 2))
        target: Any = SimpleNamespace(pid=to)
        call = call_of(sender, next(self.numbers))
        if code := self.why_not(to, sender, size):
            with pytest.raises(OSError, match=r"message|mailbox|bytes") as caught:
                self.mail.send(call, target, Raw(obj))
            assert caught.value.errno == code
            return
        self.mail.send(call, target, Raw(obj))
        receiver = next((one for one in self.waiting if one[0] == to), None)
        if receiver is None:
            self.model.append((to, sender, obj))
        else:
            self.waiting.remove(receiver)
            self.expected.append((receiver[1].id, wire.Received(sender, Raw(obj))))

    @rule(me=PIDS)
    def receive(self, me: int) -> None:
        if me not in self.alive:
            return
        call = call_of(me, next(self.numbers))
        proc: Any = SimpleNamespace(pid=me)
        got = self.mail.receive(call, proc)
        first = next((one for one in self.model if one[0] == me), None)
        if first is None:
            assert got is None
            self.waiting.append((me, call))
        else:
            self.model.remove(first)
            assert got is not None
            assert (got.sender, bytes(got.obj)) == first[1:]

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 100))
    def give_up(self, which: int) -> None:
        """Cancel a RECV, or let its time end."""
        _, call = self.waiting.pop(which % len(self.waiting))
        assert call.forget is not None
        call.forget()

    @rule(pid=PIDS)
    def die(self, pid: int) -> None:
        if len(self.alive) == 1 or pid not in self.alive:
            return
        self.alive.discard(pid)
        for one in [one for one in self.waiting if one[0] == pid]:
            self.waiting.remove(one)
            assert one[1].forget is not None
            one[1].forget()
        self.mail.forget(pid)
        self.model = [one for one in self.model if one[0] != pid]

    @rule()
    def new_kernel(self) -> None:
        self.mail = self.made()
        procs: Any = dict.fromkeys(self.alive)
        self.mail.adopt(procs)
        self.waiting.clear()

    @invariant()
    def balances(self) -> None:
        assert list(books.mailboxes(self)) == []  # type: ignore[arg-type]
        assert self.mail.total == sum(len(obj) for _, _, obj in self.model)
        for pid in self.alive:
            held = [(message.sender, bytes(message.obj)) for message in self.mail.box(pid).messages]
            assert held == [one[1:] for one in self.model if one[0] == pid]
        assert [(number, bytes(got.obj)) for number, got in self.calls.got] == [
            (number, bytes(got.obj)) for number, got in self.expected
        ]
        senders = {one for _, one, _ in self.model}
        assert set(self.mail._sent) == senders, "nothing is kept of those that have nothing lying there"


TestMailboxes = Mailboxes.TestCase
TestMailboxes.settings = settings(max_examples=60, stateful_step_count=40)


def test_what_all_mailboxes_hold_is_read_again_in_time() -> None:
    """A new kernel reads the whole journal before its first heartbeat, in far less than its time for that."""
    assert mail.SENDER_BYTES <= mail.ALL_BYTES <= 256 << 20
    assert mail.MAILBOX_BYTES <= mail.SENDER_BYTES
