"""Search by meaning in the store itself, with a fake embedder."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw, msgpack

from aiosd.ipc import link
from aiosd.ipc.service import Pause
from aiosd.store import index, meaning
from aiosd.store.database import Database
from aiosd.store.main import Chores
from aiosd.store.meaning import Meaning
from aiosd.store.memory import NoteStore
from aiosd.store.search import NoteTexts
from aiosd.store.words import NOTES
from libaios import wire
from tests.test_store_commit import flip, leaf_of

ME = link.Caller(7, 1000, "me", True, "default")
OTHER = link.Caller(9, 1000, "other", True, "default")
SCRIPT = link.Caller(8, 1000, "script", False, "default")

MEANINGS = ("cat kitten feline", "car automobile vehicle", "tea drink beverage", "rain storm weather")


class Fake:
    """Words with the same meaning share a dimension. `late`: it answers only when polled after `deliver` was called."""

    def __init__(self, name: str = "fake", late: bool = False) -> None:
        self.name = self.shown = name
        self.late = late
        self.asked: list[list[str]] = []
        self._waiting: list[tuple[list[str], Callable[..., None]]] = []
        self._delivered = 0
        self.broken = False

    def ask(self, texts: list[str], done: Callable[..., None], urgent: bool = False) -> None:
        self.asked.append(texts)
        if self.late:
            self._waiting.append((texts, done))
        else:
            done(None if self.broken else [self.embed(text) for text in texts])

    def deliver(self) -> None:
        self._delivered = len(self._waiting)

    def poll(self) -> None:
        while self._delivered:
            self._delivered -= 1
            texts, done = self._waiting.pop(0)
            done(None if self.broken else [self.embed(text) for text in texts])

    def embed(self, text: str) -> Any:
        if "refused" in text:
            return None
        vector = np.full(8, 0.01, np.float32)
        for number, words in enumerate(MEANINGS):
            vector[number] += sum(word in words.split() for word in text.lower().split())
        vector[4 + len(text) % 4] += 0.1
        return vector / np.float32(np.linalg.norm(vector))


class Store:
    def __init__(self, folder: Path, embedder: Any = None, ram: int = 1 << 20) -> None:
        self.now, self.ticks = 1000.0, 0.0
        self.calls = 0
        self.database = Database(folder)
        self.database.begin_system("one")
        self.embedder = embedder
        self.meaning = Meaning(self.database, embedder, ram, lambda: self.ticks)
        self.memory = NoteStore(self.database, 1 << 20, 1 << 30, lambda: self.now, self.meaning)
        self.meaning.begin(NoteTexts(self.database))

    def __call__(self, name: str, args: Any, caller: link.Caller = ME) -> Any:
        self.calls += 1
        ask = link.Ask((caller.pid, self.calls), caller, 0, Raw(b"\x90"))
        found = getattr(self.memory, name)(ask, args)
        if isinstance(found, Generator):
            found = self.drain(found)
        while not self.memory.words.work():  # as the store does between calls
            pass
        return msgpack.decode(found) if isinstance(found, Raw) else found

    def drain(self, call: Generator[Pause, None, Any]) -> Any:
        """Run a call as the service's loop does, until it has its answer."""
        while True:
            try:
                self.ticks = max(self.ticks, next(call).until)
            except StopIteration as end:
                return end.value

    def add(self, *texts: str, caller: link.Caller = ME, **more: Any) -> list[int]:
        return [self("add", wire.MemAdd(text, **more), caller) for text in texts]

    def found(self, query: str, k: int = 5, caller: link.Caller = ME, **more: Any) -> list[str]:
        return [one.note.text for one in self("search", wire.MemSearch(query, k, **more), caller)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    made: list[Store] = []

    def store(*args: Any, **options: Any) -> Store:
        for old in made:
            old.database.close()
        made.append(Store(tmp_path, *args, **options))
        return made[-1]

    yield store
    made[-1].database.close()


def refused(code: int, act: Callable[[], Any]) -> None:
    with pytest.raises(OSError, match="embedder") as caught:
        act()
    assert caught.value.errno == code


def test_a_note_is_found_by_what_it_means(make: Callable[..., Store]) -> None:
    store = make(Fake())
    store.add("the kitten sleeps", "an automobile", "a storm is near")
    assert store.found("feline", 1) == ["the kitten sleeps"]
    assert store.found("feline", by="words") == []
    assert store("stats_of", wire.MemStats())["search"] == "by words and by meaning (fake)"
    assert store.meaning.stats()["vectors"] == 3
    assert store.meaning.stats()["pending"] == 0


def test_words_and_meaning_are_one_ranking(make: Callable[..., Store]) -> None:
    """A note found by both ranks before one found by either; a word alone does not outrank a meaning."""
    store = make(Fake())
    store.add(*(f"something {number}" for number in range(30)), caller=OTHER)
    store.add("kitten", "vehicle called feline", "feline", "automobile")
    assert store.found("a feline", 4) == ["feline", "kitten", "vehicle called feline", "automobile"]


def test_without_an_embedder_words_serve(make: Callable[..., Store]) -> None:
    store = make()
    store.add("the kitten sleeps")
    assert store.found("kitten") == ["the kitten sleeps"]
    assert store.found("feline") == []
    assert store("stats_of", wire.MemStats())["search"].startswith("by words (no embedder")
    refused(errno.EOPNOTSUPP, lambda: store.found("feline", by="meaning"))


def test_filters_come_before_the_limit(make: Callable[..., Store]) -> None:
    store = make(Fake())
    store.add("kitten one", tags=["a", "b"], metadata={"n": 2, "ok": True})
    store.now += 10
    store.add(*(f"kitten number {number}" for number in range(60)), metadata={"n": 3, "ok": 1, "x": None})
    for filters in (
        wire.NoteFilters(["b"]),
        wire.NoteFilters(["a", "b"], {"n": 2.0}),
        wire.NoteFilters(metadata={"ok": True}),
        wire.NoteFilters(until=1005.0),
    ):
        assert store.found("feline", 1, filters=filters) == ["kitten one"], filters
        assert [note.text for note in store("list", wire.MemList(filters))] == ["kitten one"]
    assert store.found("feline", 5, filters=wire.NoteFilters(["c"])) == []
    assert len(store.found("feline", 100, filters=wire.NoteFilters(since=1005.0))) == 60
    assert len(store.found("feline", 100, filters=wire.NoteFilters(metadata={"x": None}))) == 60


def test_the_labels_of_a_note_change_with_it(make: Callable[..., Store]) -> None:
    store = make(Fake())
    (note,) = store.add("kitten", tags=["a", "a"], metadata={"n": 1})
    store("update", wire.MemUpdate(note, tags=["b"], metadata={"m": "x"}))
    assert store.found("feline", filters=wire.NoteFilters(["a"])) == []
    assert store.found("feline", filters=wire.NoteFilters(["b"], {"m": "x"})) == ["kitten"]
    store("remove", wire.MemGet(note))
    for table in ("note_tags", "note_fields", "vectors", "pending", "note_words"):
        assert store.database.row(f"SELECT count(*) FROM {table}") == (0,), table


def test_a_changed_or_removed_note_is_no_longer_found_by_its_old_text(make: Callable[..., Store]) -> None:
    store = make(Fake())
    first, second = store.add("kitten", "automobile")
    assert store.found("feline", 1) == ["kitten"]
    store("update", wire.MemUpdate(first, "beverage"))
    store("remove", wire.MemGet(second))
    assert store.found("feline tea", 5) == ["beverage"]
    store.now += 1
    store.add("gone soon", ttl_s=5)
    store.now += 10
    assert store.found("gone soon") == ["beverage"]


def test_a_transaction_that_is_undone_changes_nothing(make: Callable[..., Store]) -> None:
    store = make(Fake())
    (note,) = store.add("kitten")
    assert store.found("feline", 1) == ["kitten"]

    def fail() -> None:
        with store.database.transaction():
            store.memory._delete([note])
            raise OSError(errno.EIO, "x")

    with pytest.raises(OSError, match="x"):
        fail()
    assert store.found("feline", 1, by="meaning") == ["kitten"]


def test_others_notes_are_not_found(make: Callable[..., Store]) -> None:
    store = make(Fake())
    store.add("kitten")
    store.add("feline secret", caller=OTHER)
    store.add("cat of the group", caller=OTHER, shared=True)
    assert sorted(store.found("feline")) == ["cat of the group", "kitten"]
    assert store.found("feline secret", 1) != ["feline secret"]
    with pytest.raises(PermissionError, match="another owner's"):
        store("stats_of", wire.MemStats("name/1000/default/other"))
    person = link.Caller(0, 1000, "", False, "default")
    assert store("stats_of", wire.MemStats("name/1000/default/other"), person)["notes"] == 1


@pytest.mark.parametrize("embedder", [Fake(), None])
@given(text=st.text(min_size=1, max_size=80) | st.sampled_from(["!!!", "own:x OR", 'NEAR("', "a\0b", "\U0001f600"]))
@settings(max_examples=40, deadline=None)
def test_a_live_note_is_found_by_its_own_text(
    tmp_path_factory: pytest.TempPathFactory, embedder: Fake | None, text: str
) -> None:
    store = Store(tmp_path_factory.mktemp("s"), embedder)
    store.add(text, f"{text} {text} {text}", "cat " * 5, text + ".", text[:-1])
    assert store.found(text, 1) == [text]
    store.database.close()


def test_texts_wait_in_a_durable_queue(make: Callable[..., Store]) -> None:
    late = Fake(late=True)
    store = make(late)
    store.add("kitten", "automobile")
    assert store.meaning.work() == meaning.IDLE_S
    assert store.meaning.stats()["pending"] == 2
    assert store("stats_of", wire.MemStats())["pending"] == 2
    store = make(Fake())
    assert store.meaning.work() == 0.0
    assert store.meaning.stats()["pending"] == 0
    assert store.found("feline", 1) == ["kitten"]


def test_a_text_that_changes_while_it_is_embedded_is_embedded_again(make: Callable[..., Store]) -> None:
    late = Fake(late=True)
    store = make(late)
    (note,) = store.add("kitten")
    store.meaning.work()
    store("update", wire.MemUpdate(note, "automobile"))
    late.deliver()
    store.meaning.work()
    assert store.meaning.stats()["vectors"] == 0
    assert store.meaning.stats()["pending"] == 1
    assert late.asked == [["kitten"], ["automobile"]]
    late.deliver()
    store.meaning.work()
    assert store.meaning.stats()["vectors"] == 1


def test_a_search_waits_for_its_own_texts_and_not_for_long(make: Callable[..., Store]) -> None:
    late = Fake(late=True)
    store = make(late)
    store.add(*(f"tea {number}" for number in range(100)), caller=OTHER)
    store.add("kitten")
    call = store.memory.search(link.Ask((7, 900), ME, 0, Raw(b"\x90")), wire.MemSearch("feline"))
    assert next(call).until == meaning.WAIT_S
    assert late.asked[-1] == ["feline"]
    late.deliver()
    next(call)
    assert late.asked[-1] == ["kitten"], "before the older ones of others"
    late.deliver()
    assert [one.note.text for one in store.drain(call)] == ["kitten"]
    assert store.found("kitten") == ["kitten"], "the embedder is silent: words"
    assert store.meaning.away
    asked = len(late.asked)
    before = store.ticks
    assert store.found("kitten") == ["kitten"]
    assert (store.ticks, len(late.asked)) == (before, asked), "no search waits for it now"
    assert store("stats_of", wire.MemStats())["search"] == "by words; fake does not answer"
    refused(errno.EAGAIN, lambda: store.found("kitten", by="meaning"))
    late.deliver()
    store.meaning.work()
    assert not store.meaning.away


def test_an_owner_that_adds_much_does_not_delay_others(make: Callable[..., Store]) -> None:
    """The queue takes owners in turn, and a batch is filled with texts of the next owner."""
    fake = Fake()
    store = make(fake)
    others = [link.Caller(30 + number, 1000, f"n{number}", True, "default") for number in range(5)]
    store.add(*(f"tea {number}" for number in range(200)), caller=OTHER)
    for caller in others:
        store.add("a cat", f"of {caller.name}", caller=caller)
    for _ in range(3):
        store.meaning.work()
    embedded = [text for texts in fake.asked for text in texts]
    assert {f"of {caller.name}" for caller in others} <= set(embedded)
    assert [len(texts) for texts in fake.asked] == 3 * [meaning.BATCH]
    while store.meaning.work() == 0.0:
        pass
    assert store.meaning.stats()["pending"] == 0
    assert len(embedded) == len(set(embedded)) + 4


def test_an_embedder_that_fails_is_asked_again_later(make: Callable[..., Store]) -> None:
    fake = Fake()
    fake.broken = True
    store = make(fake)
    store.add("kitten")
    store.meaning.work()
    assert store.meaning.work() == pytest.approx(meaning.RETRY_S)
    assert store.found("feline") == []
    fake.broken = False
    store.ticks += meaning.RETRY_S
    store.meaning.work()
    assert store.found("feline") == ["kitten"]


def test_another_embedder_embeds_all_again_in_the_background(make: Callable[..., Store]) -> None:
    store = make(Fake("one"))
    store.add("kitten", "automobile")
    store.found("feline")
    late = Fake("two", late=True)
    store = make(late)
    assert store.meaning.stats()["vectors"] == 0
    assert store.meaning.stats()["pending"] == 2
    assert store.found("kitten") == ["kitten"]
    late.deliver()
    store.meaning.work()
    late.deliver()
    store.meaning.work()
    assert store.meaning.stats()["vectors"] == 2
    store = make()
    assert store.found("feline") == []
    store.add("a cat that came when there was none")
    store = make(Fake("two"))
    assert store.meaning.stats()["pending"] == 1, "what has a vector of it keeps that"
    assert len(store.found("feline", 2)) == 2


def test_a_text_that_cannot_have_a_vector_is_found_by_words(make: Callable[..., Store]) -> None:
    store = make(Fake())
    store.add("refused kitten", "   ", "cat")
    assert store.found("kitten", 2) == ["refused kitten", "cat"] or store.found("kitten", 2)[0] == "cat"
    assert store.meaning.stats()["pending"] == 0


def test_indexes_are_read_in_slices_and_dropped(make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meaning, "SLICE", 3)
    monkeypatch.setattr(index, "LARGE", 5)
    store = make(Fake())
    callers = [link.Caller(20 + number, 1000, f"n{number}", True, "default") for number in range(3)]
    for caller in callers:
        store.add(*(f"kitten {number}" for number in range(10)), "a tea", caller=caller)
        store.found("beverage", caller=caller)
    store = make(Fake(), ram=3000)
    for _ in range(2):
        for caller in callers:
            assert store.found("beverage", 1, caller) == ["a tea"]
    stats = store.meaning.stats()
    assert stats["index_evictions"] >= 3
    assert stats["index_bytes"] <= 3000


def test_a_damaged_expired_note_delays_nothing(make: Callable[..., Store]) -> None:
    store = make(Fake())
    store.add(*(f"tea {number} " + "x" * 900 for number in range(60)), ttl_s=10)
    path = store.database.path
    store.database.close()
    flip(path, leaf_of(path, "notes", 30))
    store = make(Fake())
    store.memory.add(link.Ask((7, 99), ME, 0, Raw(b"\x90")), wire.MemAdd("later"))
    store.now += 11
    chores = Chores(store.memory, lambda: False)
    while chores() <= 0:
        pass
    left = [note for (note,) in store.database.rows("SELECT id FROM notes INDEXED BY notes_of_owner WHERE owner = 1")]
    assert 30 in left
    assert 61 in left
    assert len(left) < 30, "what lies beside it may need its page, too"
    assert store.memory.words.waiting == 0


@pytest.mark.parametrize("table", ["vectors", "notes"])
def test_a_damaged_page_costs_only_its_own_rows(make: Callable[..., Store], table: str) -> None:
    store = make(Fake())
    ids = store.add(*(f"tea {number}" for number in range(400)))
    store.drain(store.meaning.finish([1]))
    path = store.database.path
    store.database.close()
    flip(path, leaf_of(path, table, 30))
    store = make(Fake())
    for by in ("words", "meaning", ""):
        found = {one.note.id for one in store("search", wire.MemSearch("tea", len(ids), by=by))}
        assert ids[-1] in found
        assert (len(found) == len(ids)) == (table == "vectors" and by != "meaning"), by
    if table == "notes":
        with pytest.raises(OSError, match="damaged"):
            store("get", wire.MemGet(30))
        store = make(Fake("another"))  # all are embedded again
        store.drain(store.meaning.finish([1]))
        assert store.meaning.waiting([1]) == 0


def test_a_change_while_an_index_is_read_is_not_lost(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meaning, "SLICE", 2)
    store = make(Fake())
    notes = store.add(*(f"kitten {number}" for number in range(7)))
    store.found("x", by="words")
    while store.meaning.work() == 0.0:
        pass
    call = store.memory.search(link.Ask((7, 900), ME, 0, Raw(b"\x90")), wire.MemSearch("feline", 50, by="meaning"))
    for _ in range(2):
        next(call)
    store("remove", wire.MemGet(notes[0]))
    store("remove", wire.MemGet(notes[6]))
    store("update", wire.MemUpdate(notes[1], "kitten changed"))
    store.add("kitten new")
    while store.meaning.work() == 0.0:
        pass
    found = [one.note.text for one in store.drain(call)]
    assert sorted(found) == ["kitten 2", "kitten 3", "kitten 4", "kitten 5", "kitten changed", "kitten new"]


def test_a_search_does_not_wait_for_a_large_index_for_ever(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart it is answered by words, which the answer says, and the index is read on."""
    monkeypatch.setattr(meaning, "SLICE", 2)
    make(Fake()).add("kitten", "feline", *(f"tea {number}" for number in range(20)))
    store = make(Fake())
    store.drain(store.meaning.finish([1]))

    def begun(by: str) -> Generator[Pause, None, Any]:
        """A search that waits for two slices, and then for too long."""
        store.meaning._shelves.clear()
        call = store.memory.search(link.Ask((7, 900), ME, 0, Raw(b"\x90")), wire.MemSearch("feline", 50, by=by))
        for _ in range(2):
            next(call)
        store.ticks += meaning.LOAD_S
        return call

    with pytest.raises(OSError, match="vectors are being read") as caught:
        store.drain(begun("meaning"))
    assert caught.value.errno == errno.EAGAIN
    assert [one.note.text for one in store.drain(begun(""))] == ["feline"]
    assert "by words, vectors are being read (4 so far)" in store("stats_of", wire.MemStats())["search"]
    while store.meaning.work() == 0.0:
        pass
    assert "being read" not in store("stats_of", wire.MemStats())["search"]
    assert store.found("feline", 2) == ["feline", "kitten"]


def test_an_index_with_many_dead_rows_is_read_again(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "WORN_LEAST", 3)
    store = make(Fake())
    notes = store.add("kitten", "tea")
    for number in range(10):
        store("update", wire.MemUpdate(notes[0], f"kitten {number}"))
        assert store.found("feline", 1) == [f"kitten {number}"]
    shelf = next(iter(store.meaning._shelves.values())).index
    assert shelf is not None
    assert shelf.rows <= 6


def test_expired_notes_are_removed(make: Callable[..., Store]) -> None:
    store = make(Fake())
    store.add(*("short" for _ in range(150)), ttl_s=5)
    store.add("kept", ttl_s=50)
    store.now += 10
    assert store.memory.clean() == 0.0, "some at a time"
    store.memory.clean()
    assert store.database.row("SELECT count(*) FROM notes") == (1,)
    assert store.database.row("SELECT count(*) FROM pending") == (1,)
    assert store("stats_of", wire.MemStats())["bytes"] < 300


def test_another_kind_of_texts_can_be_searched(make: Callable[..., Store]) -> None:
    """As for files: a number for the kind, and an owner and a number for each text."""

    class Files:
        kind = NOTES + 1
        everything = "SELECT 1 AS item, 1 AS owner WHERE 0"

        def texts(self, items: Sequence[int]) -> list[tuple[int, str]]:
            return [(item, ["kitten", "tea"][item]) for item in items]

    store = make(Fake())
    store.meaning.begin(NoteTexts(store.database), Files())
    with store.database.transaction():
        store.meaning.changed(Files.kind, 0, 5)
        store.meaning.changed(Files.kind, 1, 5)
    store.drain(store.meaning.finish([5]))
    store.drain(store.meaning.load(Files.kind, [5]))
    vector = store.drain(store.meaning.vector_of("feline"))
    assert [item for item, _ in store.meaning.nearest(Files.kind, vector, 1, {5: None})] == [0]
    assert [item for item, _ in store.meaning.nearest(Files.kind, vector, 1, {5: [1]})] == [1]
    store.meaning.gone(Files.kind, 0, 5)
    assert [item for item, _ in store.meaning.nearest(Files.kind, vector, 5, {5: None})] == [1]


def test_where_the_queue_cannot_be_kept_words_serve(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store starts. When the disk has room again, texts that were added meanwhile are embedded, too."""
    store = make(Fake("one"))
    store.add("kitten")
    store.found("feline")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Meaning, "_begin", full)
        store = make(Fake("one"))
    store.add("a cat")
    assert store.found("cat") == ["a cat"]
    assert store.found("feline") == []
    store = make(Fake("one"))
    assert sorted(store.found("feline")) == ["a cat", "kitten"]


def test_a_repaired_store_can_be_searched(make: Callable[..., Store], tmp_path: Path) -> None:
    """Data made from notes are made again: words, labels, and vectors by the embedder."""
    from aiosd.store.rebuild import repair

    store = make(Fake())
    store.add("kitten", tags=["t"], metadata={"n": 1})
    store.add("automobile")
    store.found("feline")
    store.database.close()
    repair(tmp_path / "store.db")
    store = Store(tmp_path, Fake())
    assert store.found("kitten", by="words") == ["kitten"]
    assert store.found("feline", 1) == ["kitten"]
    assert store.found("feline", filters=wire.NoteFilters(["t"], {"n": 1})) == ["kitten"]
    assert store.meaning.stats()["vectors"] == 2
    store.database.close()
