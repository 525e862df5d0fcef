"""The words of notes are indexed in the background: what is found when, and how the queue is worked on."""

from __future__ import annotations

import errno
import random
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.store import words
from aiosd.store.database import FILE, MIGRATIONS, Database, connect
from aiosd.store.main import MOST_WORDLESS, SHARE, Chores
from aiosd.store.room import DiskReserve
from aiosd.store.storage import Storage
from libaios import wire
from libaios.wire import Sys
from tests.test_store_commit import Store as GroupStore
from tests.test_store_commit import add, ask
from tests.test_store_memory import ME, OTHER, Store, drain, texts

Found = list[str]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path, quota=1 << 30)
    yield made
    made.database.close()


def found(store: Store, query: str, k: int = 5, caller: Any = ME, **more: Any) -> Found:
    return texts(store("search", wire.MemSearch(query, k, **more), caller))


def places(store: Store) -> tuple[set[int], set[int], set[int]]:
    """Numbers of notes in the queue, in the index of words, and in that of texts."""
    tables = ("SELECT note FROM wordless", "SELECT rowid FROM note_words", "SELECT note FROM note_sums")
    queued, worded, summed = ({row[0] for row in store.database.rows(sql)} for sql in tables)
    return queued, worded, summed


def test_an_agent_finds_at_once_what_it_has_written(store: Store) -> None:
    store("add", wire.MemAdd("oolong tea"))
    store("add", wire.MemAdd("green tea"), OTHER)
    assert places(store) == ({1, 2}, set(), set())
    assert store("stats_of", wire.MemStats())["pending"] == 1
    assert found(store, "tea") == ["oolong tea"]
    assert places(store) == ({2}, {1}, {1}), "a search does what is its own caller's"
    assert store("stats_of", wire.MemStats())["pending"] == 0
    assert store.memory.words.work() == 0.0
    assert places(store) == (set(), {1, 2}, {1, 2})
    assert store.memory.words.work() > 0, "there is no more to do"


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(["add", "key", "update", "remove", "work", "search"]), st.integers(0, 9))))
def test_a_live_note_is_in_the_indexes_or_in_the_queue(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    """And removed notes and old texts are in neither."""
    store = Store(tmp_path_factory.mktemp("words"))
    model: dict[int, str] = {}
    for number, (what, which) in enumerate(steps):
        text = f"w{number} word"
        if what == "add" or (what == "key" and which):
            model[store("add", wire.MemAdd(text, key=f"k{which % 3}" if what == "key" else None))] = text
        elif what == "work":
            store.memory.words.work()
        elif what == "search":
            assert found(store, "word", 50) == list(dict(sorted(model.items(), reverse=True)).values())
        elif model:
            note = sorted(model)[which % len(model)]
            if what == "remove":
                store("remove", wire.MemGet(note))
                del model[note]
            else:
                model[note] = text
                store("update", wire.MemUpdate(note, text))
        queued, worded, summed = places(store)
        assert worded == summed
        assert not queued & worded
        assert queued | worded == set(model)
    for text in model.values():
        assert found(store, text.split()[0], 50) == [text]
        assert found(store, text, 1) == [text]
    assert all(
        found(store, f"w{number}") == [] for number in range(len(steps)) if f"w{number} word" not in model.values()
    )
    store.database.close()


def test_a_search_waits_for_words_and_not_for_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """After this time it finds indexed notes by words, others by their whole text. Filters come before the limit."""
    monkeypatch.setattr(words, "SLICE", 2)
    now = [0.0]
    store.memory.words._clock = lambda: now[0]
    for number in range(12):
        store("add", wire.MemAdd(f"note {number}", tags=["odd"] * (number % 2)))
    for _ in range(3):
        store("add", wire.MemAdd("same", tags=["rare"]))
        store("add", wire.MemAdd("same"))
    call = store.memory.search(store.ask(ME), wire.MemSearch("note", 50))
    assert isinstance(call, Generator), "more waits than is done at once"
    next(call)
    now[0] += words.WAIT_S
    assert texts(drain(call)) == ["note 3", "note 2", "note 1", "note 0"]
    monkeypatch.setattr(words, "WAIT_S", 0.0)
    assert found(store, "note 11", 1) == ["note 11"], "a live note is found by its own text, always"
    rare = store("search", wire.MemSearch("same", 3, filters=wire.NoteFilters(["rare"])))
    assert [one.note.tags for one in rare] == [["rare"]] * 3
    assert places(store)[0], "some are in the queue still"


def test_without_room_on_the_disk_search_works(tmp_path: Path) -> None:
    room = DiskReserve(tmp_path, wal=0, ballast=0)
    store = Store(tmp_path)
    store.database.room = room
    store("add", wire.MemAdd("first tea"))
    found(store, "tea")
    store("add", wire.MemAdd("second tea"))
    room.floor = 1 << 60  # more than any disk has
    assert found(store, "tea") == ["first tea"]
    assert found(store, "second tea") == ["second tea", "first tea"]
    with pytest.raises(OSError, match="nearly full") as caught:
        store.memory.words.work()
    assert caught.value.errno == errno.ENOSPC
    room.floor = 0
    assert store.memory.words.work() == 0.0
    assert found(store, "tea") == ["second tea", "first tea"]
    store.database.close()


def test_a_note_that_cannot_be_read_delays_no_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("one tea", "two tea", "three tea"):
        store("add", wire.MemAdd(text))
    row = store.database.row

    def damaged(sql: str, *values: Any) -> Any:
        if sql == "SELECT text FROM notes WHERE id = ?" and values == (2,):
            raise wire.error(errno.EIO, "damaged")
        return row(sql, *values)

    monkeypatch.setattr(store.database, "row", damaged)
    assert store.memory.words.work() == 0.0
    assert places(store) == (set(), {1, 3}, {1, 3})


def test_the_queue_outlives_the_store_and_a_lost_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = GroupStore(tmp_path)
    first.turn(add(1, "one"), add(2, "two"))
    words_of = first.memory.words
    assert words_of.waiting == 2

    def fails() -> None:
        raise wire.error(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(first.database.memos, "write", fails)
        first.turn(add(3, "three"), add(4, "four"))
    assert words_of.waiting == 2, "counted anew"
    first.close()
    second = GroupStore(tmp_path, "two")
    assert second.memory.words.waiting == 2
    second.memory.words.work()
    assert second.database.row("SELECT count(*) FROM note_words") == (2,)
    second.close()


def test_a_call_without_a_savepoint_that_fails_in_the_middle_costs_no_other(tmp_path: Path) -> None:
    store = GroupStore(tmp_path)
    added = store.memory.words.added

    def fails(note: int, owner: int) -> None:
        added(note, owner)
        if store.database.row("SELECT 1 FROM notes WHERE id = ? AND text = 'bad'", note):
            raise wire.error(errno.EIO, "in the middle")

    store.memory.words.added = fails  # type: ignore[method-assign]
    assert store.turn(add(1, "one"), add(2, "bad"), add(3, "three")) == [1, errno.EIO, 2]
    assert store.texts() == ["one", "three"]
    assert store.database.row("SELECT note_bytes FROM owners") == (2 * 200 + 2 * 2 + len("onethree"),)
    store.close()


def test_a_quota_that_is_used_up_loses_no_transaction(tmp_path: Path) -> None:
    """So an agent that is refused again and again costs others nothing, even if it is a new owner."""
    store = GroupStore(tmp_path)
    store.memory.quota = 500
    assert store.turn(add(1, "x" * 600, pid=9), add(2, "one"), add(3, "x" * 400)) == [errno.EDQUOT, 1, errno.EDQUOT]
    assert store.database.counts["undone"] == 0
    assert store.database.row("SELECT count(*) FROM owners") == (1,)
    store.close()


def test_expired_notes_free_their_part_of_the_quota(store: Store) -> None:
    store.memory.quota = 500
    store("add", wire.MemAdd("x" * 200, ttl_s=10))
    with pytest.raises(OSError, match="quota"):
        store("add", wire.MemAdd("y" * 200))
    store.now += 11
    store("add", wire.MemAdd("y" * 200))
    assert texts(store("list", wire.MemList())) == ["y" * 200]


def test_words_of_an_older_store_are_indexed_again(tmp_path: Path) -> None:
    db = connect(tmp_path / FILE)
    for script in MIGRATIONS[:3]:
        db.execute(script)
    db.pragma("user_version", 3)
    db.execute("INSERT INTO owners(id, name, note_bytes) VALUES(1, 'name/1000/default/me', 500)")
    for note in (1, 2):
        db.execute("INSERT INTO notes VALUES(?, 1, NULL, ?, '[]', '{}', 1, 1, NULL, 1, 210)", (note, f"old tea {note}"))
        db.execute("INSERT INTO note_words(rowid, owner, text) VALUES(?, 'own1', ?)", (note, f"old tea {note}"))
    db.close()
    store = Store(tmp_path)
    assert store.memory.words.waiting == 2
    assert found(store, "tea") == ["old tea 2", "old tea 1"]
    store("remove", wire.MemGet(1))
    assert found(store, "tea") == ["old tea 2"]
    store.database.close()


def test_words_wait_while_calls_keep_coming(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing has a share of the time; if too many words wait, as much as it needs."""
    now, busy = [100.0], True
    monkeypatch.setattr("aiosd.store.main.time.monotonic", lambda: now[0])
    done: list[float] = []

    def work() -> float:
        done.append(now[0])
        now[0] += 0.01
        return 0.0

    monkeypatch.setattr(store.memory.words, "work", work)
    chores = Chores(store.memory, lambda: busy)
    store.memory.words.waiting = 100
    assert chores() == 0.0
    assert chores() == pytest.approx(0.01 / SHARE - 0.01)
    now[0] += 0.01 / SHARE
    chores()
    assert len(done) == 2
    now[0] += 0.01 / SHARE
    store.memory.words.waiting = MOST_WORDLESS
    assert [chores(), chores()] == [0.0, 0.0]
    store.memory.words.waiting, busy = 100, False
    assert [chores(), chores()] == [0.0, 0.0]
    assert len(done) == 6


def test_a_long_text_is_a_slice_of_its_own(store: Store) -> None:
    draw = random.Random(1)
    for _ in range(4):
        store("add", wire.MemAdd(" ".join(f"{draw.random()}" for _ in range(words.SLICE_CHARS // 20))))
    assert store.memory.words.work() == 0.0
    assert 0 < len(places(store)[1]) < 4


def test_the_file_of_an_index_has_no_copy_of_the_texts(tmp_path: Path) -> None:
    database = Database(tmp_path, DiskReserve(tmp_path, wal=0, ballast=0))
    database.do("INSERT INTO note_words(rowid, owner, text) VALUES(1, 'own1', 'unmistakable')")
    assert database.row("SELECT text FROM note_words") == (None,)
    database.close()


def test_words_do_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their commits reach the disk with that of the next call, which waits as usual."""
    store = GroupStore(tmp_path)
    levels: list[Any] = []

    def committing() -> bool:
        levels.append(store.database.db.pragma("synchronous"))
        return False

    store.database.db.set_commit_hook(committing)
    store.turn(add(1, "one"))
    store.memory.words.work()
    store.turn(add(2, "two"))
    store.turn(ask(3, Sys.MEM_SEARCH, wire.MemSearch("two")))
    full, normal = 2, 1
    assert levels == [full, normal, full, normal]
    levels.clear()
    store.turn(add(4, "three"))
    store.server._turn([ask(5, Sys.MEM_SEARCH, wire.MemSearch("three")), add(6, "four")])
    store.database.db.set_commit_hook(None)
    assert levels == [full, normal, full], "who waits for the disk does not share a commit that does not"
    store.close()


def test_conditions_are_looked_up_in_indexes_and_words_are_looked_for_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search reads no rows of mere candidates, and does not look up words in one note after the other, which takes
    seconds with thousands of notes."""
    for number in range(20):
        store("add", wire.MemAdd(f"tea {number}", tags=["t"], metadata={"n": number}))
    found(store, "tea")
    asked: list[tuple[str, tuple[Any, ...]]] = []
    rows = store.database.rows
    monkeypatch.setattr(store.database, "rows", lambda sql, *values: asked.append((sql, values)) or rows(sql, *values))
    filters = wire.NoteFilters(["t"], {"n": 3}, 0.0, 1e12)
    assert found(store, "tea", filters=filters) == ["tea 3"]
    assert [note.text for note in store("list", wire.MemList(filters, 5, 0))] == ["tea 3"]
    storage = Storage(store.database, store.database.path.parent, 1 << 30, 5)
    for folder in ("", "folder"):
        storage.search(store.ask(ME), wire.StoSearch("tea", 5, folder, ""))
    searches = [one for one in asked if " MATCH " in one[0]]
    assert len(searches) == 3
    for sql, values in searches:
        plan = [row[3] for row in store.database.db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
        assert [step for step in plan if "VIRTUAL" in step] == [step for step in plan[:1] if "=" not in step], plan
        assert not [step for step in plan if step.startswith("SEARCH n ")], plan
