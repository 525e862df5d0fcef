"""Answers that the kernel gives again, because the store has promised to report changes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from aiosd.ipc import link
from aiosd.kernel import copies
from aiosd.kernel.access import Access
from aiosd.kernel.calls import CallTable
from aiosd.kernel.copies import Copies
from aiosd.kernel.dispatch import Dispatcher
from aiosd.kernel.peer import AgentPeer, Call, ClientPeer, Peer
from aiosd.kernel.service import Asker, Owner, Service, Services
from aiosd.store import owners
from aiosd.store.database import Database
from aiosd.store.grouping import GroupServer
from aiosd.store.memory import NoteStore
from aiosd.store.promises import Promises
from aiosd.store.room import DiskReserve
from aiosd.store.storage import Storage
from libaios import mem, sto, wire
from libaios.channel import Channel
from libaios.plan import plan_of, steps_of
from libaios.stream import FrameSocket
from libaios.wire import Sys
from tests.test_store_commit import FakeChannel

#: By pid: two agents that share a name, one of another name in their group, and one of another group.
CALLERS = {
    7: link.Caller(7, 1000, "me", True, "default"),
    8: link.Caller(8, 1000, "me", True, "default"),
    9: link.Caller(9, 1000, "other", True, "default"),
    10: link.Caller(10, 1000, "me", True, "web"),
}
READING = (Sys.MEM_GET, Sys.STO_READ)


class Kernel:
    """The kernel's side of a channel: it keeps promised answers. They must be right whenever a change is reported, and
    when no call runs."""

    def __init__(self, folder: Path) -> None:
        self.database = database = Database(folder, DiskReserve(folder, wal=0, ballast=0, floor=0))
        database.begin_system("one")
        self.storage = Storage(database, folder, 1 << 20, 3)
        self.memory = NoteStore(database, 1 << 20, 1 << 20)
        database.undone += [self.memory.cache.clear, self.storage.undone]
        promises = self.memory.promises = self.storage.files.promises
        handlers = self.memory.handlers() | self.storage.handlers()
        self.server = GroupServer(cast(Channel, self), handlers, group=database, on_used=self.memory.used)
        promises.take_back = self.server.take_back
        self.server.ahead = {Sys.MEM_GET: self.memory.get_ahead, Sys.STO_READ: self.storage.read_at_once}
        self.ahead = False  # whether it keeps copies of what was just written
        self.copies = Copies()
        self.peers = {pid: Peer(pid, None) for pid in CALLERS}
        self.asked: dict[link.CallKey, link.Ask] = {}
        self.number = 0
        self.given = 0
        self.work = FakeChannel().work
        self.sent: list[link.FromService] = []

    def ask(self, pid: int, sys: Sys, args: Any) -> link.Ask:
        self.number += 1
        made = link.Ask((pid, self.number), CALLERS[pid], sys, Raw(wire.encode(args)), ahead=self.ahead)
        self.asked[made.key] = made
        return made

    def send(self, payload: bytes) -> None:
        self.sent.append(link.decode_from_service(payload))

    send_silently = send

    def turn(self, *asks: link.Ask, told: bool = True) -> None:
        self.server._turn(list(asks))
        self.take(told)
        self.check()

    def made(self, pid: int, sys: Sys, args: Any, copies: bool) -> None:
        """An agent makes a call: there is a copy of its answer, or it goes to the store."""
        copy = self.peers[pid].copies.get((sys, wire.encode(args))) if copies else None
        if copy is not None:
            copy.used[copy.promise] = copy.used.get(copy.promise, 0) + 1
            return
        self.report_used()
        self.server._turn([self.ask(pid, sys, args)])
        self.take(told=False)

    def report_used(self) -> None:
        self.server._turn([link.CopiesUsed(dict(self.copies.used))])
        self.copies.used.clear()

    def take(self, told: bool) -> None:
        sent, self.sent = self.sent, []
        for message in sent:
            if isinstance(message, link.Stale):
                self.copies.stale(message.promises)
            elif isinstance(message, link.Answered):
                ask, ahead = self.asked[message.key], message.ahead
                if ahead is not None:
                    assert self.ahead
                    assert ahead.sys in READING
                    assert ask.sys not in READING
                    assert len(ahead.body) <= link.LARGEST_COPY
                    self.copies.keep(self.peers[ask.key[0]], (ahead.sys, ahead.args), ahead.promise, ahead.body)
                if message.promise:
                    assert ask.sys in READING
                    key = ask.sys, bytes(ask.args)
                    self.copies.keep(self.peers[ask.key[0]], key, message.promise, message.body)
                elif ask.sys not in READING and told:
                    self.check()

    def check(self) -> None:
        for pid, peer in self.peers.items():
            for (sys, args), copy in peer.copies.items():
                ask = link.Ask((pid, 0), CALLERS[pid], sys, Raw(args))
                found = self.server.handlers[sys](ask, wire.decode_args[sys](args))
                assert wire.encode(getattr(found, "body", found)) == bytes(copy.body)
                self.given += 1

    def close(self) -> None:
        self.storage.mounts.close()
        self.database.close()


KEYS = st.sampled_from(("a", "b"))
NOTES = st.one_of(KEYS, st.integers(1, 4))
CALLS = st.one_of(
    st.tuples(st.just(Sys.MEM_GET), st.builds(wire.MemGet, NOTES)),
    st.tuples(st.just(Sys.MEM_GET), st.builds(wire.MemGet, NOTES)),
    st.tuples(st.just(Sys.MEM_ADD), st.builds(wire.MemAdd, st.just("x"), KEYS, shared=st.booleans())),
    st.tuples(st.just(Sys.MEM_UPDATE), st.builds(wire.MemUpdate, NOTES, st.sampled_from(("y", "z")))),
    st.tuples(st.just(Sys.MEM_REMOVE), st.builds(wire.MemGet, NOTES)),
    st.tuples(st.just(Sys.MEM_CLEAR), st.just(wire.NoArgs())),
    st.tuples(st.just(Sys.STO_READ), st.builds(wire.StoRead, KEYS, version=st.sampled_from((None, 1)))),
    st.tuples(st.just(Sys.STO_WRITE), st.builds(wire.StoWrite, KEYS, st.sampled_from((b"1", b"2")))),
    st.tuples(st.just(Sys.STO_REMOVE), st.builds(wire.StoPath, KEYS)),
    st.tuples(st.just(Sys.STO_ROLLBACK), st.builds(wire.StoRollback, KEYS, version=st.just(1))),
    st.tuples(st.just("gone"), st.none()),
)
TURNS = st.lists(
    st.tuples(st.booleans(), st.lists(st.tuples(st.sampled_from(list(CALLERS)), CALLS), max_size=6)), min_size=2
)


@settings(deadline=None, max_examples=20)
@given(TURNS, st.booleans())
def test_answers_in_the_kernel_are_those_of_the_store(turns: Any, ahead: bool) -> None:
    with TemporaryDirectory() as folder:
        kernel = Kernel(Path(folder))
        kernel.ahead = ahead
        try:
            for fails, calls in turns:
                for pid, (sys, _) in calls:
                    if sys == "gone":
                        kernel.memory.owner_gone(pid)
                write = kernel.database.memos.write
                broken = iter([fails])

                def written(broken: Any = broken, write: Any = write) -> None:
                    if next(broken, False):
                        raise wire.error(5, "the disk is gone")
                    write()

                kernel.database.memos.write = written  # type: ignore[method-assign]
                asks = [kernel.ask(pid, sys, args) for pid, (sys, args) in calls if sys != "gone"]
                kernel.turn(*asks, told=not fails)
                kernel.database.memos.write = write  # type: ignore[method-assign]
        finally:
            kernel.close()


@pytest.fixture
def kernel(tmp_path: Path) -> Any:
    made = Kernel(tmp_path)
    yield made
    made.close()


def test_after_a_change_each_agent_reads_the_new_note(kernel: Kernel) -> None:
    kernel.turn(
        kernel.ask(7, Sys.MEM_ADD, wire.MemAdd("one", "k")),
        kernel.ask(7, Sys.STO_WRITE, wire.StoWrite("f", b"1")),
    )
    read = (Sys.MEM_GET, wire.MemGet("k")), (Sys.MEM_GET, wire.MemGet(1)), (Sys.STO_READ, wire.StoRead("f"))
    kernel.turn(*(kernel.ask(pid, *call) for pid in (7, 8) for call in read))
    assert [len(kernel.peers[pid].copies) for pid in (7, 8)] == [3, 3]
    kernel.turn(kernel.ask(8, Sys.MEM_UPDATE, wire.MemUpdate("k", "two")))
    assert [len(kernel.peers[pid].copies) for pid in (7, 8)] == [1, 1]
    kernel.turn(kernel.ask(8, Sys.STO_WRITE, wire.StoWrite("f", b"2")))
    assert kernel.copies.bytes == 0
    assert [peer.copied_bytes for peer in kernel.peers.values()] == [0] * 4


def key_of(plan: Any) -> tuple[int, bytes]:
    """The key of a copy for this call of the SDK."""
    request = wire.decode_request(wire.encode((1, plan.sys, plan.args)))
    return request.sys, bytes(request.args)


def test_what_an_agent_has_just_written_is_kept_for_it_alone(kernel: Kernel) -> None:
    kernel.ahead = True
    kernel.turn(
        kernel.ask(7, Sys.MEM_ADD, wire.MemAdd("one", "k")),
        kernel.ask(8, Sys.MEM_ADD, wire.MemAdd("two")),
        kernel.ask(8, Sys.STO_WRITE, wire.StoWrite("f", b"1")),
    )
    by_key, by_id = (key_of(plan_of(mem.get)(which)) for which in ("k", 2))
    file = key_of(next(steps_of(sto.read)("f")))
    assert [list(kernel.peers[pid].copies) for pid in (7, 8, 9)] == [[by_key], [by_id, file], []]
    kernel.turn(
        kernel.ask(8, Sys.MEM_ADD, wire.MemAdd("newer", "k")),
        kernel.ask(7, Sys.MEM_UPDATE, wire.MemUpdate(2, "newer")),
        kernel.ask(7, Sys.STO_WRITE, wire.StoWrite("f", b"2")),
    )
    assert [list(kernel.peers[pid].copies) for pid in (7, 8, 9)] == [[by_id, file], [by_key], []]


def test_of_two_writers_in_one_turn_both_get_what_is_there_after_it(kernel: Kernel) -> None:
    kernel.ahead = True
    kernel.turn(*(kernel.ask(pid, Sys.MEM_ADD, wire.MemAdd(f"of {pid}", "k")) for pid in (7, 8)))
    bodies = [copy.body for pid in (7, 8) for copy in kernel.peers[pid].copies.values()]
    assert [msgspec.msgpack.decode(body, type=wire.Note).text for body in bodies] == ["of 8", "of 8"]
    kernel.turn(kernel.ask(7, Sys.MEM_ADD, wire.MemAdd("again", "k")), kernel.ask(8, Sys.MEM_REMOVE, wire.MemGet("k")))
    assert kernel.copies.bytes == 0


@pytest.mark.parametrize(
    ("sys", "args"),
    [
        (Sys.MEM_ADD, wire.MemAdd("ends", "e", ttl_s=1000.0)),
        (Sys.MEM_UPDATE, wire.MemUpdate("shared", "by key")),
        (Sys.MEM_ADD, wire.MemAdd("x" * (16 << 10), "long")),
        (Sys.MEM_ADD, wire.MemAdd("é" * (12 << 10), "long in bytes")),
        (Sys.STO_WRITE, wire.StoWrite("f", b"more", append=True)),
        (Sys.STO_WRITE, wire.StoWrite("of all", b"1", of="group")),
        (Sys.STO_WRITE, wire.StoWrite("long", b"x" * (16 << 10))),
        (Sys.STO_WRITE, wire.StoWrite("empty", b"")),
    ],
)
def test_what_is_not_kept_for_its_writer(kernel: Kernel, sys: Sys, args: Any) -> None:
    kernel.turn(kernel.ask(7, Sys.MEM_ADD, wire.MemAdd("of all", "shared", shared=True)))
    kernel.ahead = True
    kernel.turn(kernel.ask(7, sys, args))
    assert not kernel.peers[7].copies


def test_a_rule_about_reading_files_holds_for_what_was_just_written(kernel: Kernel) -> None:
    kernel.ahead = True
    kernel.storage.consent.ruled = lambda call: call == "sto_read"
    kernel.turn(kernel.ask(7, Sys.STO_WRITE, wire.StoWrite("f", b"1")))
    assert not kernel.peers[7].copies


def test_no_copy_is_made_of_what_was_not_committed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise wire.error(5, "the disk is gone")

    kernel.ahead = True
    monkeypatch.setattr(kernel.database.memos, "write", lost)
    kernel.turn(kernel.ask(7, Sys.MEM_ADD, wire.MemAdd("one", "k")), told=False)
    assert (len(kernel.copies._kept), len(kernel.memory.promises)) == (0, 0)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(KEYS, st.booleans()), min_size=1))
def test_reads_are_counted_alike_wherever_they_are_answered(steps: Any) -> None:
    """By the store alone, and with copies of what was read and written."""
    counted = []
    for ahead in (False, True):
        with TemporaryDirectory() as folder:
            kernel = Kernel(Path(folder))
            kernel.ahead = ahead
            try:
                for key, writes in steps:
                    args = wire.MemAdd("x", key) if writes else wire.MemGet(key)
                    kernel.made(7, Sys.MEM_ADD if writes else Sys.MEM_GET, args, copies=ahead)
                kernel.report_used()
                own = kernel.memory.cache.stats_of(owners.own(CALLERS[7]))
                counted.append((own, kernel.memory.cache.stats(), kernel.memory.cache.clock))
            finally:
                kernel.close()
    assert counted[0] == counted[1]


def test_answers_that_may_change_without_a_call_are_not_promised(kernel: Kernel) -> None:
    """A note with a ttl; and a group's note found by its key, which a note of the agent's own may replace."""
    kernel.turn(
        kernel.ask(7, Sys.MEM_ADD, wire.MemAdd("ends", "e", ttl_s=1000.0)),
        kernel.ask(9, Sys.MEM_ADD, wire.MemAdd("of all", "k", shared=True)),
    )
    kernel.turn(kernel.ask(7, Sys.MEM_GET, wire.MemGet("e")), kernel.ask(7, Sys.MEM_GET, wire.MemGet("k")))
    assert not kernel.peers[7].copies
    kernel.turn(kernel.ask(7, Sys.MEM_GET, wire.MemGet(2)))
    assert len(kernel.peers[7].copies) == 1


def test_without_room_the_oldest_answers_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, one, other = Copies(), Peer(1, None), Peer(2, None)
    monkeypatch.setattr(copies, "OF_ALL_BYTES", 56_004)
    for number in range(copies.OF_PEER + 2):
        kept.keep(one, (81, b"%d" % number), number + 1, b"x")
    assert next(iter(one.copies)) == (81, b"2")
    assert len(one.copies) == copies.OF_PEER
    kept.keep(one, (81, b"large"), 100, b"x" * link.LARGEST_COPY)
    assert (81, b"large") not in one.copies
    for number in range(5):
        kept.keep(other, (81, b"%d" % number), number + 1, b"x" * 14_000)
    assert not one.copies
    assert kept.bytes == one.copied_bytes + other.copied_bytes <= 56_004
    kept.stale([3])
    assert (81, b"2") not in other.copies
    kept.forget(other)
    assert (kept.bytes, kept._kept, kept._promised) == (0, {}, {})


@pytest.mark.parametrize("why", ["", "a rule names the call", "the store has a call of this agent", "other arguments"])
def test_a_copy_is_given_only_where_the_call_would_be_done_at_once(why: str) -> None:
    asked = []
    calls = CallTable(cast(Any, None), cast(Any, None), cast(Any, None))
    approvals = SimpleNamespace(concerns=lambda call: bool(why) and "rule" in why, judge=lambda *_: True)
    rights = Access(cast(Any, None), set, cast(Any, approvals), cast(Any, None))
    asker = SimpleNamespace(ask=lambda call, args, raw: asked.append(args.note))
    dispatcher = Dispatcher(calls, rights, cast(Asker, asker), {}, lambda key: None)
    peer = Peer(7, cast(Any, SimpleNamespace(row=[0] * 20, calls=0)))
    kept = Copies()
    kept.keep(peer, (Sys.MEM_GET, wire.encode(wire.MemGet(1))), 5, wire.encode("one"))
    if "has a call" in why:
        peer.calls[1] = Call(peer, 1, wire.TABLE[Sys.MEM_UPDATE])
    answer = dispatcher.answer(peer, wire.encode((2, Sys.MEM_GET, wire.MemGet(2 if "arguments" in why else 1))))
    if why:
        assert (answer, len(asked), kept.used) == (None, 1, {})
    else:
        assert answer is not None
        assert (bytes(wire.decode_reply(answer).body), asked, kept.used) == (wire.encode("one"), [], {5: 1})


def test_an_agent_that_only_writes_gets_few_copies_until_it_reads_one() -> None:
    calls = cast(CallTable, SimpleNamespace(finish=lambda call, body: None, set_timeout=lambda *_: None))
    service = Service("store", "store", "store", calls, cast(Owner, None))
    services = Services()
    services.add(service)
    asker = Asker(services, calls, lambda call: CALLERS[7], {})
    proc = cast(Any, SimpleNamespace(pid=7, restarts=0, row=[0] * 20, calls=0))
    peer = AgentPeer(proc, cast(Channel, SimpleNamespace(outbox_bytes=0)))
    person = ClientPeer(cast(FrameSocket, SimpleNamespace(pending=0)), 0, None, lambda: None)

    def asked(peer: Peer, sys: Sys, args: Any, promise: int = 0, number: int = 1) -> bool:
        """Whether the store may send a copy with its answer. It does, if so."""
        call = Call(peer, number, wire.TABLE[sys])
        asker.ask(call, args, wire.raw(args))
        ask = service.calls[call.key].message
        assert isinstance(ask, link.Ask)
        ahead = link.Ahead(Sys.MEM_GET, wire.encode(wire.MemGet("k")), b"1", 5) if ask.ahead and not promise else None
        service.on_message(link.Answered(call.key, b"1", 0, promise, ahead))
        return ask.ahead

    def writes(count: int) -> list[bool]:
        return [asked(peer, Sys.MEM_ADD, wire.MemAdd("x", "k")) for _ in range(count)]

    most = copies.MOST_UNREAD
    assert writes(most + 2) == [True] * most + [False] * 2
    assert not asked(peer, Sys.MEM_GET, wire.MemGet("other"), promise=6)
    rights = SimpleNamespace(is_free=lambda row: True)
    dispatcher = Dispatcher(cast(Any, None), cast(Access, rights), asker, {}, lambda key: None)
    assert dispatcher.answer(peer, wire.encode((2, Sys.MEM_GET, wire.MemGet("other")))) is not None
    assert writes(1) == [False], "a copy of what it has read itself does not count"
    assert asked(peer, Sys.MEM_ADD, wire.MemAdd("x", "k"), number=copies.PROBED)
    assert dispatcher.answer(peer, wire.encode((3, Sys.MEM_GET, wire.MemGet("k")))) is not None
    assert writes(most + 2) == [True] * most + [False] * 2
    assert not asked(person, Sys.MEM_ADD, wire.MemAdd("x", "k"))


def test_promises_are_bounded_and_their_uses_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiosd.store.promises.MOST", 2)
    promises, taken = Promises(), list[int]()
    promises.take_back = taken.extend
    first, second = promises.make("a"), promises.make("b")
    assert promises.make("a") == first
    third = promises.make("c")
    assert taken == [first]
    promises.broken("b")
    promises.broken("nothing")
    assert taken == [first, second]
    assert promises.of({first: 1, third: 5}) == [("c", 5)]
    assert promises.make("b") not in (first, second, third)
