"""A damaged store: damaged items give EIO, others are served; fsck names them; a repair keeps all readable ones."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aiosd.errors import UsageError, WorldError
from aiosd.ipc import link
from aiosd.store import fsck, lost, owners, plainly, rebuild, roots, tables
from aiosd.store.database import FILE
from aiosd.store.pages import PAGE, Pages
from aiosd.store.remake import Mender, remake
from aiosd.store.salvage import Salvage, columns_of, problem_of
from libaios import wire
from libaios.wire import Sys
from tests.test_store_commit import Store, add, ask, flip, leaf_of, store

__all__ = ["store"]  # a fixture

NOTES = 140
Row = tuple[Any, ...]


def fill(folder: Path) -> dict[int, Row]:
    """A store with notes of all sizes, some of them removed; returns its rows."""
    draw = random.Random(1)
    with contextlib.closing(Store(folder)) as store:
        for first in range(1, NOTES, 20):
            calls = range(first, first + 20)
            sizes = [draw.choice((3, 200, 900, 4000, 9000)) for _ in calls]
            store.turn(
                *(
                    add(call, f"{call} é" + "x" * size, pid=7 + call % 3, key=f"k{call}" if call % 4 else None)
                    for call, size in zip(calls, sizes, strict=True)
                )
            )
        for call in range(5, NOTES, 7):
            store.turn(ask(1000 + call, Sys.MEM_REMOVE, wire.MemGet(call), 7 + call % 3))
        return {row[0]: row for row in store.database.rows("SELECT * FROM notes")}


def rows_of(path: Path) -> dict[int, Row]:
    db = roots.open_closed(path)
    try:
        return {row[0]: row for row in db.execute("SELECT * FROM notes")}
    finally:
        db.close()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Row]]:
    folder = tmp_path_factory.mktemp("filled")
    return folder, fill(folder)


def copy(filled: tuple[Path, dict[int, Row]], folder: Path) -> Path:
    for name in (FILE, roots.BESIDE):
        (folder / name).write_bytes((filled[0] / name).read_bytes())
    return folder / FILE


def zero(path: Path, page: int) -> None:
    with open(path, "r+b") as file:
        file.seek((page - 1) * PAGE)
        file.write(bytes(PAGE))


def test_a_whole_file_is_read_as_sqlite_reads_it(filled: tuple[Path, dict[int, Row]], tmp_path: Path) -> None:
    path = copy(filled, tmp_path)
    assert fsck.check(path) == []
    salvage, model = Salvage.open(path), rebuild.new_database(None, 1)
    rows = [tuple(row.values()) for kept, row in salvage.rows(columns_of(model)) if kept.name == "notes"]
    salvage.close()
    model.close()
    assert {row[0]: row for row in rows} == filled[1]


@pytest.mark.parametrize("harm", [flip, zero])
def test_any_page_may_be_damaged(filled: tuple[Path, dict[int, Row]], tmp_path: Path, harm: Any) -> None:
    """The first page, roots of tables and indexes, some others. No row is wrong, only rows of that page are lost, and
    SQLite finds no fault in the repaired file."""
    number = (filled[0] / FILE).stat().st_size // PAGE
    plan = roots.read(filled[0] / FILE)
    pages = {1, *(plan.roots[name] for name in ("owners", "notes", "note_keys")), *range(20, number, 29)}
    most = 0
    for page in sorted(pages):
        folder = tmp_path / str(page)
        folder.mkdir()
        path = copy(filled, folder)
        harm(path, page)
        damaged = bool(fsck.check(path))
        lost = set(filled[1]) - set(repaired(path))
        assert damaged or not lost, f"page {page}: {lost} are lost and not named"
        most = max(most, len(lost))
        kept = rows_of(path)
        owners_lost = page == plan.roots["owners"]
        assert all(kept[note] == filled[1][note] for note in kept), f"page {page}"
        assert fsck.check(path) == []
        assert not owners_lost or not lost
    assert 0 < most < 40, "one page costs what is on it"


def repaired(path: Path) -> dict[int, Row]:
    before = path.read_bytes()
    copied, old = rebuild.repair(path)
    assert old is not None
    assert old.read_bytes() == before, "the old file is kept as it was"
    rows = rows_of(path)
    assert copied["notes"] == len(rows)
    return rows


def test_a_repaired_store_serves(filled: tuple[Path, dict[int, Row]], tmp_path: Path) -> None:
    """It uses no id twice, finds notes by words, and has the right quotas."""
    path = copy(filled, tmp_path)
    zero(path, roots.read(path).roots["notes"])
    assert len(repaired(path)) == len(filled[1])
    with contextlib.closing(Store(tmp_path, "two")) as store:
        (found,) = store.turn(ask(1, Sys.MEM_SEARCH, wire.MemSearch("15"), pid=7))
        assert [one["note"]["id"] for one in found] == [15]
        (stats,) = store.turn(ask(2, Sys.MEM_STATS, wire.NoArgs(), pid=7))
        assert stats["bytes"] == sum(row[10] for row in filled[1].values() if row[1] == filled[1][15][1])
        assert store.turn(add(3, "new"))[0] > max(filled[1])


def test_items_that_have_lost_their_owner_get_a_name(filled: tuple[Path, dict[int, Row]], tmp_path: Path) -> None:
    path = copy(filled, tmp_path)
    assert lost.found(path) == []
    zero(path, roots.read(path).roots["owners"])
    assert lost.found(path) == [], "it has to be repaired first"
    repaired(path)
    for one in lost.found(path):
        assert one.notes == sum(row[1] == int(one.name.removeprefix("lost/")) for row in filled[1].values())
    before = {one.name: one.notes for one in lost.found(path)}
    assert sum(before.values()) == len(filled[1])
    mine = f"lost/{filled[1][15][1]}"
    for name, to, why in ((mine, "a/b/c", "neither"), ("lost/x", "me", "nothing"), ("group/1/a", "me", "nothing")):
        with pytest.raises(UsageError, match=why):
            lost.give(tmp_path, name, to)
    assert lost.give(tmp_path, mine, "staff/me").notes == before.pop(mine)
    other = next(iter(before))
    with pytest.raises(UsageError, match="already"):
        lost.give(tmp_path, other, "staff/me")
    assert [one.name for one in lost.found(path)] == list(before)
    with contextlib.closing(Store(tmp_path, "two")) as store:
        me = link.Caller(7, os.getuid(), "me", True, "staff")
        search = msgspec.structs.replace(ask(1, Sys.MEM_SEARCH, wire.MemSearch("15")), caller=me)
        assert [one["note"]["id"] for one in store.turn(search)[0]] == [15], "with words, and whatever else is its own"
        assert store.turn(ask(2, Sys.MEM_GET, wire.MemGet(15))) == [errno.ENOENT], "no other owner has it"


def test_the_running_store_gives_no_wrong_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checksum of a zeroed page is right, and the page may be the end of a large note."""
    text = "é" * 4800
    with contextlib.closing(Store(tmp_path)) as store:
        store.turn(add(1, text))
    path, hit = tmp_path / FILE, 0
    whole = path.read_bytes()
    for page in range(2, len(whole) // PAGE + 1):
        path.write_bytes(whole)
        zero(path, page)
        with contextlib.suppress(WorldError), contextlib.closing(Store(tmp_path, f"boot {page}")) as store:
            (answer,) = store.turn(ask(1, Sys.MEM_GET, wire.MemGet(1)))
            hit += answer == errno.EIO
            assert answer in (errno.EIO, errno.ENOENT) or answer["text"] == text, f"page {page}"
    assert hit >= 3, "its leaf and more pages"
    assert "cannot be served" not in caplog.text, "damage is no mistake of ours"


numbers = itertools.count(7000)


def answers_of(store: Store, pid: int, rows: dict[int, Row]) -> tuple[list[dict[str, Any]], dict[int, Row]]:
    """The result of an agent's list, and the agent's rows."""
    (listed,) = store.turn(ask(next(numbers), Sys.MEM_LIST, wire.MemList(limit=1000), pid))
    return listed, {note: row for note, row in rows.items() if 7 + note % 3 == pid}


def test_a_damaged_page_of_notes_costs_the_notes_on_it(
    filled: tuple[Path, dict[int, Row]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lists name them; all others are served."""
    path = copy(filled, tmp_path)
    flip(path, leaf_of(path, "notes", 30))
    gone = []
    with contextlib.closing(Store(tmp_path, "two")) as store:
        for pid in (7, 8, 9):
            listed, wanted = answers_of(store, pid, filled[1])
            assert [note["id"] for note in listed] == sorted(wanted, reverse=True)
            assert all(note["text"] == wanted[note["id"]][3] for note in listed if not note["damaged"])
            gone += [note["id"] for note in listed if note["damaged"]]
            page = ask(next(numbers), Sys.MEM_LIST, wire.MemList(limit=7, offset=20), pid)
            assert store.turn(page) == [listed[20:27]]
            (stats,) = store.turn(ask(next(numbers), Sys.MEM_STATS, wire.MemStats(), pid))
            assert stats["notes"] == len(wanted)
        for note in gone:
            assert store.turn(ask(next(numbers), Sys.MEM_GET, wire.MemGet(note), 7 + note % 3)) == [errno.EIO]
    assert 30 in gone
    assert len(gone) < 30
    assert "notes cannot be read, and stand in no answer: " in caplog.text


INDEXES = ("notes_of_owner", "note_ends", "note_words_config", "note_words_data", "note_words_idx", "note_sums")


@pytest.mark.parametrize("name", INDEXES)
def test_a_damaged_index_costs_time_and_no_note(filled: tuple[Path, dict[int, Row]], tmp_path: Path, name: str) -> None:
    path = copy(filled, tmp_path)
    flip(path, roots.read(path).roots[name])
    with contextlib.closing(Store(tmp_path, "two")) as store:
        for pid in (7, 8):
            listed, wanted = answers_of(store, pid, filled[1])
            assert {note["id"]: note["text"] for note in listed} == {note: row[3] for note, row in wanted.items()}
            text = next(iter(wanted.values()))[3]
            for query in (text, text.split()[0]):
                (found,) = store.turn(ask(next(numbers), Sys.MEM_SEARCH, wire.MemSearch(query), pid))
                assert found[0]["note"]["text"] == text, query[:10]
            nothing = wire.MemList(wire.NoteFilters(since=0.0, until=1.0))
            assert store.turn(ask(next(numbers), Sys.MEM_LIST, nothing, pid)) == [[]]


def test_without_an_index_the_same_notes_pass(store: Store) -> None:
    """Filters are implemented twice: in SQL, and for searches without an index."""
    notes = [({"n": 1}, ["a"]), ({"n": True}, ["a", "b"]), ({"n": 1.0, "m": "x"}, ["b"]), ({}, []), ({"n": 2}, ["a"])]
    for number, (metadata, tags) in enumerate(notes, 1):
        store.turn(ask(number, Sys.MEM_ADD, wire.MemAdd(str(number), tags=tags, metadata=metadata)))
    ((owner, name),) = store.database.rows("SELECT id, name FROM owners")
    middle = store.database.rows("SELECT updated FROM notes WHERE id = 3")[0][0]
    for filters in (
        wire.NoteFilters(),
        wire.NoteFilters(["a"]),
        wire.NoteFilters(["a", "b"]),
        wire.NoteFilters(metadata={"n": 1}),
        wire.NoteFilters(metadata={"n": True}),
        wire.NoteFilters(metadata={"n": 1.0, "m": "x"}),
        wire.NoteFilters(since=middle),
        wire.NoteFilters(until=middle),
    ):
        (listed,) = store.turn(ask(next(numbers), Sys.MEM_LIST, wire.MemList(filters)))
        walked = [note for some in plainly.walk(store.database, {owner: name}, filters, 0.0) for note in some]
        assert [note.id for note in walked] == [note["id"] for note in listed], filters


def test_a_content_file_that_is_missing_or_changed_is_named(
    filled: tuple[Path, dict[int, Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes have no contents, so here their keys serve as names of such files."""
    path = copy(filled, tmp_path)
    monkeypatch.setattr(
        "aiosd.store.salvage.KEPT", (tables.KeptTable("owners"), tables.KeptTable("notes", contents="key"))
    )
    (tmp_path / tables.CONTENTS).mkdir()
    found = fsck.check(path)
    named = sum(row[2] is not None for row in filled[1].values())
    assert len([line for line in found if line.endswith("is missing")]) == named
    assert "notes 1: content k1 is missing" in found
    tables.content_path(tmp_path, "k1").write_bytes(b"other")
    assert "notes 1: content k1 is damaged" in fsck.check(path)


def test_a_content_is_checked_by_its_hash(tmp_path: Path) -> None:
    (tmp_path / tables.CONTENTS).mkdir()
    (tmp_path / "x").write_bytes(b"content")
    name = tables.file_hash(tmp_path / "x")
    (tmp_path / "x").rename(tables.content_path(tmp_path, name))
    assert problem_of(tmp_path, name) == ""


def test_removed_rows_do_not_come_back(tmp_path: Path) -> None:
    """Their free pages still contain them."""
    with contextlib.closing(Store(tmp_path)) as store:
        store.turn(*(add(call, f"secret {call} " + "x" * 3000) for call in range(1, 60)))
        store.turn(*(ask(100 + call, Sys.MEM_REMOVE, wire.MemGet(call)) for call in range(1, 50)))
    path = tmp_path / FILE
    zero(path, roots.read(path).roots["notes"])
    assert sorted(repaired(path)) == list(range(50, 60))
    pages = Pages(path)
    assert pages.damaged() == []
    pages.close()


def test_without_its_first_page_the_file_beside_it_helps(filled: tuple[Path, dict[int, Row]], tmp_path: Path) -> None:
    path = copy(filled, tmp_path)
    zero(path, 1)
    with pytest.raises(WorldError, match=r"damaged.*fsck --repair"):
        Store(tmp_path)
    path.with_name(roots.BESIDE).rename(tmp_path / "elsewhere")
    with pytest.raises(WorldError, match=r"roots\.json is not there"):
        fsck.check(path)
    (tmp_path / "elsewhere").rename(path.with_name(roots.BESIDE))
    assert repaired(path) == filled[1]


def test_what_a_damaged_page_does_not_hold_can_be_cleared(filled: tuple[Path, dict[int, Row]], tmp_path: Path) -> None:
    """An error says that not all was cleared; no other call fails."""
    path = copy(filled, tmp_path)
    flip(path, leaf_of(path, "notes", 30))
    with contextlib.closing(Store(tmp_path, "two")) as store:
        clear = ask(next(numbers), Sys.MEM_CLEAR, wire.NoArgs(), 7)
        added, cleared = store.turn(add(next(numbers), "of another", pid=8), clear)
        assert cleared == errno.EIO
        listed, wanted = answers_of(store, 7, filled[1])
        lost = {note["id"] for note in listed if note["damaged"]}
        assert lost
        assert len(listed) < len(wanted) // 2, "what lies beside it may need its page, too"
        (found,) = store.turn(ask(next(numbers), Sys.MEM_SEARCH, wire.MemSearch("x é", k=1000), 7))
        assert {one["note"]["id"] for one in found} <= {note["id"] for note in listed}
        assert len(answers_of(store, 8, filled[1])[0]) == len(answers_of(store, 8, filled[1])[1]) + 1
        (new,) = store.turn(add(next(numbers), "new"))
        assert store.turn(ask(next(numbers), Sys.MEM_CLEAR, wire.NoArgs(), 7)) == [errno.EIO]
        assert store.turn(ask(next(numbers), Sys.MEM_GET, wire.MemGet(new), 7)) == [errno.ENOENT]
        assert store.turn(ask(next(numbers), Sys.MEM_GET, wire.MemGet(added), 8))[0]["text"] == "of another"


def test_notes_of_an_ended_agent_do_not_go_to_a_later_one(filled: tuple[Path, dict[int, Row]], tmp_path: Path) -> None:
    """Agents of another system have the same pids, and a damaged page prevents the removal of notes."""
    path = copy(filled, tmp_path)
    names = [owners.alone(pid) for pid in (7, 8, 9)]
    flip(path, leaf_of(path, "notes", 30))
    with contextlib.closing(Store(tmp_path, "two")) as store:
        store.database.many("UPDATE owners SET name = ? WHERE id = ?", [(name, i) for i, name in enumerate(names, 1)])
        store.memory.forget_system()
        left = store.database.rows("SELECT owner FROM notes INDEXED BY notes_of_owner")
        assert left
        named = store.database.rows("SELECT name FROM owners")
        assert named
        assert all(name.startswith(owners.LOST) for (name,) in named)


MADE_ANEW = (
    *("note_keys", "notes_of_owner", "note_ends", "sqlite_autoindex_owners_1", "note_fields", "note_tags"),
    *("note_words_data", "note_words_config", "note_sums", "wordless"),
)


@pytest.mark.parametrize("name", MADE_ANEW)
def test_tables_made_from_other_rows_are_made_again(
    filled: tuple[Path, dict[int, Row]], tmp_path: Path, name: str
) -> None:
    path = copy(filled, tmp_path)
    flip(path, roots.read(path).roots[name])
    mine = {row[2]: row for note, row in filled[1].items() if 7 + note % 3 == 7 and row[2] is not None}
    with contextlib.closing(Store(tmp_path, "two")) as store:
        store.database.counts["damaged"] = 1  # as if a call had found damage
        store.memory.mender.work()
        for key, row in mine.items():
            assert store.turn(ask(next(numbers), Sys.MEM_GET, wire.MemGet(key), 7))[0]["text"] == row[3]
        store.turn(add(next(numbers), "again", key=(first := min(mine))))
        assert store.turn(ask(next(numbers), Sys.MEM_UPDATE, wire.MemUpdate(first, text="changed"), 7)) == [
            mine[first][9] + 2
        ]
        assert store.turn(ask(next(numbers), Sys.MEM_REMOVE, wire.MemGet(max(mine)), 7)) == [None]
        for text in ("changed", mine[sorted(mine)[1]][3]):
            (found,) = store.turn(ask(next(numbers), Sys.MEM_SEARCH, wire.MemSearch(text), 7))
            assert found[0]["note"]["text"] == text
        problems = [line for (line,) in store.database.rows("PRAGMA integrity_check") for line in line.splitlines()]
        assert all(line.endswith(": never used") for line in problems[1:]), problems
        (cleared,) = store.turn(ask(next(numbers), Sys.MEM_CLEAR, wire.NoArgs(), 7))
        assert cleared == len(answers_of(store, 7, filled[1])[1]) - 1
    assert all(line.endswith("nothing that is kept was on it") for line in fsck.check(path))


def test_an_index_of_rows_that_are_lost_stays(filled: tuple[Path, dict[int, Row]], tmp_path: Path) -> None:
    """And the repair is not tried again at once."""
    path = copy(filled, tmp_path)
    flip(path, leaf_of(path, "notes", 30))
    flip(path, roots.read(path).roots["notes_of_owner"])
    now = [0.0]
    with contextlib.closing(Store(tmp_path, "two")) as store:
        made: list[str] = []
        mender = Mender(store.database, lambda: made.append("anything"), lambda: now[0])
        schema = store.database.rows("SELECT * FROM sqlite_schema")
        for _ in range(2):
            store.turn(ask(next(numbers), Sys.MEM_CLEAR, wire.NoArgs(), 7))
            mender.work()
            assert store.database.rows("SELECT * FROM sqlite_schema") == schema
            found = store.database.counts["damaged"]
            mender.work()
            assert store.database.counts["damaged"] == found
            now[0] += 1000.0
        assert not made
        listed, wanted = answers_of(store, 7, filled[1])
        assert len(listed) > len(wanted) // 2


def test_pages_of_tables_that_were_made_again_are_no_lost_rows(
    filled: tuple[Path, dict[int, Row]], tmp_path: Path
) -> None:
    """No page refers to them, and their content looks like an author."""
    path = copy(filled, tmp_path)
    flip(path, roots.read(path).roots["note_words_idx"])
    with contextlib.closing(Store(tmp_path, "two")) as store:
        assert remake(store.database) == ["wordless"]
    flip(path, roots.read(path).roots["note_authors"])
    copied, _ = rebuild.repair(path)
    assert copied.get("note_authors", 0) == 0
    assert copied["notes"] == len(filled[1])
