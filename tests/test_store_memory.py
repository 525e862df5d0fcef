"""Notes: the contract of the manager itself. (test_store_system tests a real system.)"""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw, msgpack

from aiosd.access.deed import Deed
from aiosd.errors import WorldError
from aiosd.ipc import link
from aiosd.ipc.service import Lasting
from aiosd.store.database import VERSION, Database
from aiosd.store.memory import NoteStore
from aiosd.store.room import DiskReserve
from libaios import wire

ME = link.Caller(7, 1000, "me", True, "default")
SCRIPT = link.Caller(8, 1000, "me", False, "default")
OTHER = link.Caller(9, 1000, "other", True, "default")
STRANGER = link.Caller(10, 1000, "me", True, "web")


class Store:
    def __init__(self, folder: Path, ram: int = 1 << 20, quota: int = 1 << 20) -> None:
        self.now = 1000.0
        self.calls = 0
        self.database = Database(folder, DiskReserve(folder, wal=0, ballast=0))
        self.database.begin_system("one")
        self.memory = NoteStore(self.database, ram, quota, lambda: self.now)

    def ask(self, caller: link.Caller, again: bool = False) -> link.Ask:
        self.calls += 0 if again else 1
        return link.Ask((caller.pid, self.calls), caller, 0, Raw(b"\x90"), again)

    def __call__(self, name: str, args: Any, caller: link.Caller = ME, again: bool = False) -> Any:
        found = getattr(self.memory, name)(self.ask(caller, again), args)
        if isinstance(found, Generator):  # it need not wait, because there is no embedder
            found = drain(found)
        if isinstance(found, Lasting):
            return found.body
        return msgpack.decode(found) if isinstance(found, Raw) else found


def drain(call: Generator[Any, None, Any]) -> Any:
    try:
        while True:
            next(call)
    except StopIteration as end:
        return end.value


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    made.database.close()


def refused(code: int, act: Any) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        act()
    assert caught.value.errno == code


def texts(found: list[Any]) -> list[str]:
    return [one.note.text if isinstance(one, wire.Found) else one.text for one in found]


def test_add_adds_and_a_key_replaces(store: Store) -> None:
    first = store("add", wire.MemAdd("tea", key="drink", tags=["a"]))
    store("add", wire.MemAdd("tea"))
    store("add", wire.MemAdd("tea"))
    assert store("add", wire.MemAdd("coffee", key="drink", metadata={"n": 1})) == first
    note = store("get", wire.MemGet("drink"))
    assert (note.id, note.text, note.version, note.tags, note.metadata) == (first, "coffee", 2, [], {"n": 1})
    assert texts(store("list", wire.MemList())) == ["tea", "tea", "coffee"]
    assert texts(store("search", wire.MemSearch("tea"))) == ["tea", "tea"], "the replaced text is found no more"


def test_update_checks_the_version(store: Store) -> None:
    note = store("add", wire.MemAdd("one", tags=["a"]))
    assert store("update", wire.MemUpdate(note, "two", if_version=1)) == 2
    refused(errno.EAGAIN, lambda: store("update", wire.MemUpdate(note, "three", if_version=1)))
    got = store("get", wire.MemGet(note))
    assert (got.text, got.tags, got.version) == ("two", ["a"], 2)


def test_a_removed_note_is_found_nowhere(store: Store) -> None:
    note = store("add", wire.MemAdd("secret word"))
    store("remove", wire.MemGet(note))
    refused(errno.ENOENT, lambda: store("get", wire.MemGet(note)))
    refused(errno.ENOENT, lambda: store("remove", wire.MemGet(note)))
    assert store("search", wire.MemSearch("secret")) == []
    assert store.database.row("SELECT count(*) FROM note_words") == (0,)
    assert store("stats_of", wire.MemStats())["bytes"] == 0


def test_others_notes_seem_not_to_exist(store: Store) -> None:
    note = store("add", wire.MemAdd("mine", key="k"))
    for other in (SCRIPT, OTHER, STRANGER):
        for name, args in (
            ("get", wire.MemGet(note)),
            ("get", wire.MemGet("k")),
            ("update", wire.MemUpdate(note, "x")),
            ("remove", wire.MemGet(note)),
        ):
            refused(errno.ENOENT, lambda name=name, args=args, other=other: store(name, args, other))
        assert store("search", wire.MemSearch("mine"), other) == store("list", wire.MemList(), other) == []


def test_a_shared_note_is_the_groups(store: Store) -> None:
    note = store("add", wire.MemAdd("for all", shared=True))
    assert store("get", wire.MemGet(note), OTHER).shared
    assert texts(store("search", wire.MemSearch("all"), SCRIPT)) == ["for all"]
    refused(errno.ENOENT, lambda: store("get", wire.MemGet(note), STRANGER))
    store("clear", wire.NoArgs())
    assert texts(store("list", wire.MemList(), OTHER)) == ["for all"]


def test_overwriting_a_groups_note_of_another_author_needs_an_approval(store: Store) -> None:
    asked: list[Deed] = []
    store.memory.consent.require = lambda ask, deed: asked.append(deed)
    note = store("add", wire.MemAdd("first", key="k", shared=True))
    store("add", wire.MemAdd("second", key="k", shared=True))
    store("update", wire.MemUpdate("k", "third"), msgspec.structs.replace(ME, pid=99))  # the same agent, started again
    store("add", wire.MemAdd("own", key="k"), OTHER)
    store("update", wire.MemUpdate("k", "own again"), OTHER)
    assert asked == []
    store("update", wire.MemUpdate(note, "theirs"), OTHER)
    assert asked[0].default == "what belongs to others, too, is not overwritten without asking"
    assert dict(asked[0].details)["writes text"] == "theirs"
    assert ("there is version 3, by me", "third") in asked[0].details
    store("update", wire.MemUpdate(note, "theirs again"), OTHER)
    store("add", wire.MemAdd("mine", key="k", shared=True))
    store("remove", wire.MemGet(note), SCRIPT)
    assert [deed.what for deed in asked] == ["mem_update", "mem_add", "mem_remove"]
    assert len({deed.digest for deed in asked}) == 3
    assert store.database.row("SELECT count(*) FROM note_authors") == (0,)


def test_overwriting_a_note_of_an_unknown_author_needs_an_approval(store: Store) -> None:
    asked: list[Deed] = []
    store.memory.consent.require = lambda ask, deed: asked.append(deed)
    store("add", wire.MemAdd("old", key="k", shared=True))
    store.database.do("DELETE FROM note_authors")
    store("update", wire.MemUpdate("k", "new"))
    assert ("there is version 1, by an unknown owner", "old") in asked[0].details


def test_notes_without_an_explicit_name_end_with_the_agent(store: Store) -> None:
    kept, lost = store("add", wire.MemAdd("kept")), store("add", wire.MemAdd("lost"), SCRIPT)
    for pid in (ME.pid, SCRIPT.pid):
        store.memory.owner_gone(pid)
    assert store("get", wire.MemGet(kept)).text == "kept"
    refused(errno.ENOENT, lambda: store("get", wire.MemGet(lost), SCRIPT))
    store("add", wire.MemAdd("lost"), SCRIPT)
    store.memory.only_alive([ME.pid])
    assert store("list", wire.MemList(), SCRIPT) == []


def test_the_quota_refuses_and_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, quota=1000)
    store("add", wire.MemAdd("x" * 300, key="k"))
    refused(errno.EDQUOT, lambda: store("add", wire.MemAdd("y" * 500)))
    refused(errno.EDQUOT, lambda: store("update", wire.MemUpdate("k", "z" * 900)))
    assert texts(store("list", wire.MemList())) == ["x" * 300]
    store("add", wire.MemAdd("y" * 500), OTHER)
    store("remove", wire.MemGet("k"))
    store("add", wire.MemAdd("y" * 500))
    store.database.close()


def test_a_ttl_ends(store: Store) -> None:
    note = store("add", wire.MemAdd("soon over", ttl_s=10, key="k"))
    store.now += 11
    refused(errno.ENOENT, lambda: store("get", wire.MemGet(note)))
    assert store("search", wire.MemSearch("over")) == store("list", wire.MemList()) == []
    assert store("add", wire.MemAdd("new", key="k")) != note
    assert store("stats_of", wire.MemStats())["bytes"] < 250


def test_filters_come_before_the_limit(store: Store) -> None:
    store("add", wire.MemAdd("word", tags=["t", "u"], metadata={"n": 1, "ok": True}))
    for _ in range(50):
        store("add", wire.MemAdd("word word word"))
    for filters in (
        wire.NoteFilters(["t"]),
        wire.NoteFilters(metadata={"n": 1}),
        wire.NoteFilters(metadata={"ok": True}),
    ):
        assert texts(store("search", wire.MemSearch("word", 1, filters))) == ["word"]
        assert texts(store("list", wire.MemList(filters, 1))) == ["word"]
    assert store("list", wire.MemList(wire.NoteFilters(since=1001.0))) == []


@given(st.text() | st.sampled_from(["own:own1 OR text:the", "NEAR(a b)", '"', "a* ^b", "{owner}:x", "-", "_", "²"]))
def test_a_query_is_words_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, query: str) -> None:
    store = Store(tmp_path_factory.mktemp("s"))
    store("add", wire.MemAdd("the own1 OR text a b x"), OTHER)
    store("search", wire.MemSearch(query), OTHER)
    assert store("search", wire.MemSearch(query)) == []
    store.database.close()


def test_notes_in_memory_are_only_copies(tmp_path: Path) -> None:
    store = Store(tmp_path, ram=2000)
    notes = [store("add", wire.MemAdd("t" * 100 + str(number))) for number in range(20)]
    for number, note in enumerate(notes):
        assert store("get", wire.MemGet(note)).text == "t" * 100 + str(number)
    stats = store.memory.cache.stats()
    assert stats["bytes"] <= 1600
    assert stats["evictions"] > 0
    assert stats["faults"] > 0
    assert store("stats_of", wire.MemStats())["ram_bytes"] <= 400, "one owner has a quarter of it"
    store.memory = NoteStore(store.database, 2000, 1 << 20, owner_ram=1000)
    for note in notes:
        store("get", wire.MemGet(note))
    assert 400 < store("stats_of", wire.MemStats())["ram_bytes"] <= 800
    store.database.close()


def test_a_call_that_is_submitted_again_takes_effect_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    note = store("add", wire.MemAdd("x"))
    store.database.close()
    again = Store(tmp_path)  # a successor in the same system
    again.calls = 1
    assert again("add", wire.MemAdd("x"), again=True) == note
    assert len(again("list", wire.MemList())) == 1
    assert again.database.begin_system("two"), "another system: its calls may have the same keys"
    assert again("add", wire.MemAdd("x"), again=True) != note
    again.database.close()


def test_the_file_belongs_to_one_process_and_pages_are_checked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(WorldError, match="another process has it open"):
        Database(tmp_path)
    for number in range(200):
        store("add", wire.MemAdd(f"{number} " * 300))
    store.database.close()
    path = tmp_path / "store.db"
    raw = bytearray(path.read_bytes())
    for page in range(40 * 4096, len(raw), 4096):
        raw[page + 2000] ^= 1
    path.write_bytes(raw)
    store = Store(tmp_path)
    listed = store("list", wire.MemList(limit=1000))
    assert [note.id for note in listed] == list(range(200, 0, -1))
    lost = [note.id for note in listed if note.damaged]
    assert lost
    refused(errno.EIO, lambda: store("get", wire.MemGet(lost[0])))
    store.database.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.db.pragma("user_version", VERSION + 1)
    database.close()
    before = (tmp_path / "store.db").read_bytes()
    with pytest.raises(WorldError, match="newer aiosd"):
        Database(tmp_path)
    assert (tmp_path / "store.db").read_bytes() == before
    assert apsw.apswversion()


def test_a_key_leads_to_the_note_that_has_it_now(store: Store) -> None:
    """Even if another note was found by the key before."""
    first = store("add", wire.MemAdd("mine", key="k"))
    group = store("add", wire.MemAdd("the group's", key="k", shared=True), OTHER)
    assert [store("get", wire.MemGet("k"), who).id for who in (ME, ME, OTHER, OTHER)] == [first, first, group, group]
    store("update", wire.MemUpdate("k", "changed"))
    assert store("get", wire.MemGet("k")).text == "changed"
    store("remove", wire.MemGet(first))
    assert store("get", wire.MemGet("k")).id == group
    again = store("add", wire.MemAdd("again", key="k", ttl_s=10))
    assert store("get", wire.MemGet("k")).id == again
    store.now += 11
    assert store("get", wire.MemGet("k")).id == group
    refused(errno.ENOENT, lambda: store("get", wire.MemGet("k"), STRANGER))


def test_any_character_may_be_in_a_note(store: Store) -> None:
    """Also NUL, in every field of a note, quotes, and characters that SQL and JSON escape."""
    odd = "a\0b \"c' \u2028 %_\\ {x}"
    note = store("add", wire.MemAdd(odd, key=odd, tags=[odd, "a"], metadata={odd: odd, "a": None}))
    for filters in (wire.NoteFilters([odd]), wire.NoteFilters(metadata={odd: odd})):
        assert [one.id for one in store("list", wire.MemList(filters))] == [note]
        assert texts(store("search", wire.MemSearch(odd, filters=filters))) == [odd]
    for filters in (wire.NoteFilters(["a\0"]), wire.NoteFilters(metadata={odd: "a"})):
        assert store("list", wire.MemList(filters)) == []
    found = store("get", wire.MemGet(odd))
    assert (found.text, found.tags, found.metadata) == (odd, [odd, "a"], {odd: odd, "a": None})
    store("remove", wire.MemGet(odd))
    for table in ("notes", "note_tags", "note_fields", "wordless", "note_words", "note_sums"):
        assert store.database.row(f"SELECT count(*) FROM {table}") == (0,)
