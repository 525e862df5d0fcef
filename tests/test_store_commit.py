"""Group commit: the calls of a turn share a transaction, and each gets its own answer."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import Raw, msgpack

from aiosd.ipc import link
from aiosd.kernel.calls import CallTable
from aiosd.kernel.peer import Call, Peer
from aiosd.kernel.service import Owner, Service, ServiceCall, _settled
from aiosd.store import memos, roots
from aiosd.store.database import FILE, Database
from aiosd.store.grouping import GroupServer
from aiosd.store.memory import NoteStore
from aiosd.store.pages import PAGE, Pages
from aiosd.store.room import DiskReserve
from libaios import wire
from libaios.channel import Channel
from libaios.connection import Connection
from libaios.ring import Work
from libaios.wire import Sys


def caller(pid: int) -> link.Caller:
    return link.Caller(pid, 1000, f"w{pid}", True, "default")


class FakeChannel:
    def __init__(self) -> None:
        self.sent: list[link.FromService] = []
        self.work = Work(SimpleNamespace(items=[0] * 100))  # type: ignore[arg-type]  # of a segment it needs no more

    def send(self, payload: bytes) -> None:
        self.sent.append(link.decode_from_service(payload))

    send_silently = send


class Store:
    """Database, memory manager and server. `turn` gives calls to the server, and returns its answers."""

    def __init__(self, folder: Path, boot: str = "one", room: DiskReserve | None = None) -> None:
        self.database = Database(folder, room or DiskReserve(folder, wal=0, ballast=0))
        self.database.begin_system(boot)
        self.memory = NoteStore(self.database, 1 << 20, 1 << 30)
        self.database.undone.append(self.memory.cache.clear)
        self.channel = FakeChannel()
        self.server = GroupServer(cast(Channel, self.channel), self.memory.handlers(), group=self.database)

    def turn(self, *messages: link.ToService) -> list[Any]:
        begin = len(self.channel.sent)
        self.server._turn(list(messages))
        while self.server._under_way:
            for key in list(self.server._under_way):
                self.server._step(key)
        answers = [one for one in self.channel.sent[begin:] if isinstance(one, link.Answered | link.Failed)]
        assert [one.key for one in answers] == [one.key for one in messages if isinstance(one, link.Ask)]
        return [msgpack.decode(one.body) if isinstance(one, link.Answered) else one.errno for one in answers]

    def close(self) -> None:
        self.database.close()

    def texts(self) -> list[str]:
        return [text for (text,) in self.database.rows("SELECT text FROM notes ORDER BY id")]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    made.database.close()


def ask(call: int, sys: int, args: Any, pid: int = 7, **also: Any) -> link.Ask:
    return link.Ask((pid, call), caller(pid), sys, Raw(wire.encode(args)), **also)


def add(call: int, text: str, pid: int = 7, key: str | None = None, **also: Any) -> link.Ask:
    return ask(call, Sys.MEM_ADD, wire.MemAdd(text, key=key), pid, **also)


def leaf_of(path: Path, table: str, rowid: int) -> int:
    """The page that has this row."""
    pages = Pages(path)
    leaves = list(pages._leaves(roots.read(path).roots[table], []))
    pages.close()
    return next(number for number, first, last in leaves if first <= rowid <= last)


def flip(path: Path, page: int) -> None:
    """Change one bit of a page."""
    with open(path, "r+b") as file:
        file.seek(page * PAGE - 100)
        byte = file.read(1)[0]
        file.seek(page * PAGE - 100)
        file.write(bytes([byte ^ 1]))


def test_the_calls_of_a_turn_share_a_commit_and_their_answers_wait_for_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered_before = []
    commit = store.database.commit

    def watched() -> None:
        answered_before.append([one for one in store.channel.sent if isinstance(one, link.Answered)])
        commit()

    monkeypatch.setattr(store.database, "commit", watched)
    before = store.database.counts["commits"]
    assert store.turn(*(add(call, f"note {call}", pid=call) for call in range(1, 33))) == list(range(1, 33))
    assert store.database.counts["commits"] == before + 1
    assert answered_before == [[]]


def test_a_call_that_fails_undoes_itself_alone(store: Store) -> None:
    store.memory.quota = 1000
    assert store.turn(add(1, "one"), add(2, "x" * 2000), add(3, "three")) == [1, errno.EDQUOT, 2]
    assert store.texts() == ["one", "three"]


def test_what_a_failing_call_has_done_already_is_undone(store: Store) -> None:
    database = store.database

    def effect() -> None:
        database.do("UPDATE notes SET text = 'half'")
        raise wire.error(errno.EDQUOT, "no more")

    store.turn(add(1, "one"))
    database.begin()
    database.once(add(2, "two"), lambda: database.do("UPDATE notes SET version = 5"))
    with pytest.raises(OSError, match="no more"):
        database.once(add(3, "three"), effect)
    database.commit()
    assert database.rows("SELECT text, version FROM notes") == [("one", 5)]


def test_when_there_is_no_room_each_call_gets_its_own_answer(store: Store) -> None:
    """SQLite then undoes the whole transaction. The removal is done, the additions are not, and none is half done."""
    store.turn(*(add(call, f"{call} " + "x" * 3000) for call in range(1, 41)))
    store.database.db.pragma("max_page_count", store.database.db.pragma("page_count") + 1)
    big = "y" * 500_000
    answers = store.turn(add(50, "small"), add(51, big), ask(52, Sys.MEM_REMOVE, wire.MemGet(1)), add(53, big))
    assert answers == [41, errno.ENOSPC, None, errno.ENOSPC]
    assert [text[:5] for text in store.texts()][-1] == "small"
    assert len(store.texts()) == 40
    assert store.turn(ask(54, Sys.MEM_GET, wire.MemGet(1))) == [errno.ENOENT]


def test_a_page_that_cannot_be_read_costs_its_own_call_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.turn(*(add(call, f"{call} " + "x" * 3500) for call in range(1, 61)))
    store.close()
    flip(tmp_path / FILE, leaf_of(tmp_path / FILE, "notes", 30))
    store = Store(tmp_path, "two")
    damaged = ask(2, Sys.MEM_GET, wire.MemGet(30))
    assert store.turn(add(1, "before"), damaged, add(3, "after")) == [61, errno.EIO, 62]
    answers = store.turn(*(ask(call + 10, Sys.MEM_GET, wire.MemGet(call)) for call in range(1, 63)))
    assert [number for number, one in enumerate(answers, 1) if one == errno.EIO] == [30]
    assert [one["id"] for one in answers if one != errno.EIO] == [*range(1, 30), *range(31, 63)]
    store.close()


def test_what_was_made_in_memory_of_a_lost_transaction_is_dropped(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.turn(add(1, "old", key="k"))

    def fails() -> None:
        raise wire.error(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(store.database.memos, "write", fails)
        get = (ask(call, Sys.MEM_GET, wire.MemGet(1)) for call in (3, 4))
        before, lost, after = store.turn(next(get), add(2, "new", key="k"), next(get))
    assert (before["text"], lost, after["text"]) == ("old", errno.EIO, "old"), "nothing that was lost was given out"
    (note,) = store.turn(ask(5, Sys.MEM_GET, wire.MemGet(1)))
    assert note["text"] == "old"


def test_a_reply_is_remembered_with_its_effect_and_no_longer(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.turn(add(1, "one"), add(2, "two", settled=1), add(1, "other", pid=8)) == [1, 2, 3]
    store.close()  # the store dies before its answers arrive
    store = Store(tmp_path)
    again = [add(1, "one", again=True), add(2, "two", again=True, settled=1), add(1, "other", pid=8, again=True)]
    assert store.turn(*again) == [1, 2, 3]
    assert store.texts() == ["one", "two", "other"]
    store.turn(add(3, "three", settled=3))
    assert memo_ids(store) == {7: [3], 8: [1]}
    store.close()


def memo_ids(store: Store) -> dict[int, list[int]]:
    rows = store.database.rows("SELECT peer, calls FROM replies")
    return {peer: sorted(msgpack.decode(calls, strict=False, type=dict[int, bytes])) for peer, calls in rows}


def test_a_call_of_another_life_is_another_call(tmp_path: Path) -> None:
    """The call ids of an agent that is started again begin from 1 again."""
    store = Store(tmp_path)
    store.turn(add(1, "one"), add(2, "two"))
    assert store.turn(add(1, "first of the new life", life=1, again=True)) == [3], "not the answer of the old life's 1"
    store.close()
    store = Store(tmp_path)
    assert store.turn(add(2, "second of the new life", life=1, again=True)) == [4]
    store.close()


def test_the_server_itself_distinguishes_lives(store: Store) -> None:
    """It keeps answers in memory, too, which are looked up before memos."""
    store.turn(add(1, "one"), add(2, "two"))
    assert store.turn(ask(2, Sys.MEM_GET, wire.MemGet(1), life=1, again=True))[0]["text"] == "one"


def test_answers_of_calls_that_only_read_are_not_kept(store: Store) -> None:
    """Reading a gigabyte leaves nothing in memory. A call that is submitted again is done again."""
    large = "x" * 10_000
    store.turn(add(1, large), add(2, "small"))
    asks = [ask(3, Sys.MEM_GET, wire.MemGet(1)), ask(4, Sys.MEM_GET, wire.MemGet(2))]
    assert [note["text"] for note in store.turn(*asks)] == [large, "small"]
    assert [call for _, call in store.server._answers] == [1, 2]
    assert store.server._bytes < 100
    assert store.turn(ask(3, Sys.MEM_GET, wire.MemGet(1), again=True))[0]["text"] == large


def test_a_peer_that_settles_nothing_is_refused_at_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memos, "MEMOS", 5)
    assert store.turn(*(add(call, "x") for call in range(1, 8))) == [1, 2, 3, 4, 5, errno.EAGAIN, errno.EAGAIN]
    assert store.turn(add(8, "x", settled=8)) == [6]


def test_memos_end_with_their_agents(store: Store) -> None:
    store.turn(*(add(1, "x", pid=pid) for pid in (7, 8, 9, -3)))
    with store.database.transaction():
        store.database.memos.gone(7)
        store.database.memos.only([8])
    assert sorted(memo_ids(store)) == [-3, 8], "a client that is not there may come back"


def test_another_system_begins_without_memos_even_if_theirs_are_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.turn(add(1, "one"))
    store.close()
    for name in ("replies", "system"):
        flip(tmp_path / FILE, roots.read(tmp_path / FILE).roots[name])
    store = Store(tmp_path, "two")
    assert store.turn(add(1, "two", again=True)) == [2]
    assert store.texts() == ["one", "two"]
    store.close()


# ── which calls are settled ───────────────────────────────────────────────────────────────────────────────


def test_settled_is_what_has_its_reply() -> None:
    service = Service("store", "store", "store", cast(CallTable, None), cast(Owner, None))
    peer = SimpleNamespace(id=7, outbox_bytes=0, calls={})

    def opened(call: int, sys: int, given: bool = True) -> Call:
        made = peer.calls[call] = Call(cast(Peer, peer), call, wire.TABLE[sys])
        if given:
            service.calls[made.key] = ServiceCall(made, ask(call, sys, wire.NoArgs()))
        return made

    opened(3, Sys.RECV, given=False)  # a call of another service
    opened(4, Sys.MEM_GET)  # a call without an effect
    opened(5, Sys.MEM_ADD, given=False)  # waits for something before it is given to the store
    opened(6, Sys.MEM_ADD)
    last = opened(9, Sys.MEM_ADD, given=False)
    assert _settled(last, service) == 6
    del service.calls[7, 6]
    assert _settled(last, service) == 9
    peer.outbox_bytes = 1
    assert _settled(last, service) == 0, "a reply in the outbox would be lost with the kernel"


class Transport:
    """Records what is sent; `broken`: the id at which a signal handler raises."""

    hung_up, reborn, outbox_bytes, why, forked = False, False, 0, "", ""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.ids = iter(range(1, 100))
        self.broken = 0

    def next_id(self) -> int:
        return next(self.ids)

    def send(self, payload: bytes, fds: Any = ()) -> None:
        request = wire.decode_request(payload)
        if request.id == self.broken:
            self.broken = 0
            raise KeyboardInterrupt
        self.sent.append(request.id)

    def take(self, frames: Any) -> None:
        pass

    def renew(self) -> None:
        self.reborn = False


def test_a_new_kernel_gets_old_calls_before_new_ones() -> None:
    """Also when a signal handler interrupts this. Otherwise a newer call would settle an older one."""
    transport = Transport()
    connection = Connection(cast(Any, transport))
    for _ in range(3):
        connection.send(connection.prepare(Sys.MEM_ADD, wire.MemAdd("x")))
    transport.sent, transport.reborn, transport.broken = [], True, 2
    with pytest.raises(KeyboardInterrupt):
        connection.pump()
    assert transport.sent == [1]
    connection.send(connection.prepare(Sys.MEM_ADD, wire.MemAdd("x")))
    assert transport.sent == [1, 2, 3, 4]
