"""Export, backup and import restore the same content."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from aiosd.errors import AiosdError
from aiosd.store import archive, database, roots, snapshots, tables
from aiosd.store.database import FILE, VERSION
from libaios import wire
from libaios.wire import Sys
from tests.test_store_commit import Store, add, ask
from tests.test_store_damage import rows_of, zero


def filled(folder: Path) -> dict[int, tuple[Any, ...]]:
    folder.mkdir()
    with contextlib.closing(Store(folder)) as store:
        store.turn(*(add(call, f"{call} ü\0" + "x" * call * 50, pid=7 + call % 2) for call in range(1, 101)))
        store.turn(add(101, "keyed", key="k"), ask(102, Sys.MEM_REMOVE, wire.MemGet(101)))
    return rows_of(folder / FILE)


def tar_of(write: Any) -> io.BytesIO:
    target = io.BytesIO()
    write(target)
    target.seek(0)
    return target


def made(steps: Generator[int, None, str], meanwhile: Callable[[], None] = lambda: None) -> Path:
    """Make a snapshot; returns its folder."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return Path(end.value)
        meanwhile()


@pytest.mark.parametrize("write", [archive.export, archive.backup])
def test_an_import_restores_the_same_content(tmp_path: Path, write: Any) -> None:
    rows = filled(tmp_path / "old")
    counts, before = archive.load(tar_of(lambda target: write(tmp_path / "old", target)), tmp_path / "new")
    assert (counts, before) == ({"owners": 2, "notes": 100}, None)
    assert rows_of(tmp_path / "new" / FILE) == rows
    with contextlib.closing(Store(tmp_path / "new", "two")) as store:
        assert store.turn(add(1, "next")) == [102], "no id is given out twice, not even a removed note's"
        (found,) = store.turn(ask(2, Sys.MEM_SEARCH, wire.MemSearch("51"), pid=8))
        assert [one["note"]["id"] for one in found] == [51]
        (stats,) = store.turn(ask(3, Sys.MEM_STATS, wire.NoArgs(), pid=8))
        assert stats["bytes"] == sum(row[10] for row in rows.values() if row[1] == rows[51][1])


def test_an_export_is_json_lines(tmp_path: Path) -> None:
    filled(tmp_path / "old")
    with tarfile.open(fileobj=tar_of(lambda target: archive.export(tmp_path / "old", target))) as tar:
        about = json.load(tar.extractfile(archive.ABOUT))  # type: ignore[arg-type] # it is there, else this fails
        notes = [json.loads(line) for line in tar.extractfile("notes.jsonl") or []]
    assert (about["schema"], about["rows"]) == (VERSION, {"owners": 2, "notes": 100})
    assert (notes[4]["id"], notes[4]["text"][:3], notes[4]["key"]) == (5, "5 ü", None)


def test_of_a_damaged_store_the_readable_part_is_exported(tmp_path: Path) -> None:
    filled(tmp_path / "old")
    zero(tmp_path / "old" / FILE, roots.read(tmp_path / "old" / FILE).roots["owners"])
    target = io.BytesIO()
    counts, lost = archive.export(tmp_path / "old", target)
    assert counts == {"owners": 0, "notes": 100}
    assert len(lost) == 1
    target.seek(0)
    assert archive.load(target, tmp_path / "new")[0] == {"owners": 0, "notes": 100}


def test_the_store_before_an_import_is_kept(tmp_path: Path) -> None:
    rows = filled(tmp_path / "old")
    with contextlib.closing(Store(tmp_path)) as store:
        store.turn(add(1, "mine"))
    mine = (tmp_path / FILE).read_bytes()
    _, before = archive.load(tar_of(lambda target: archive.export(tmp_path / "old", target)), tmp_path)
    assert before is not None
    assert before.read_bytes() == mine
    assert rows_of(tmp_path / FILE) == rows


def members(**files: object) -> io.BytesIO:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, what in files.items():
            data = what if isinstance(what, bytes) else json.dumps(what).encode()
            info = tarfile.TarInfo(name.replace("__", "/").replace("_", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    target.seek(0)
    return target


ABOUT = {"format": 1, "kind": "export", "release": "9", "schema": 1, "rows": {"notes": 1}, "sequences": {}}


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (io.BytesIO(b"no tar at all"), "no export"),
        (io.BytesIO(b""), "no export"),
        (members(aiosd_json=b"{"), "no export"),
        (members(aiosd_json=ABOUT), "no export"),
        (members(aiosd_json=ABOUT | {"schema": VERSION + 1}), "newer aiosd"),
        (members(aiosd_json=ABOUT | {"format": 2}), "newer aiosd"),
        (members(aiosd_json=ABOUT, notes_jsonl={"id": 1, "text, owner": "x"}), "unknown columns"),
        (members(aiosd_json=ABOUT | {"kind": "backup"}, store_db=b"x" * 9000), "is damaged"),
        (members(aiosd_json=ABOUT | {"rows": {}}, contents__x_y=b"x"), "a content named"),
    ],
)
def test_a_file_that_is_no_export_changes_nothing(tmp_path: Path, source: io.BytesIO, complaint: str) -> None:
    with contextlib.closing(Store(tmp_path)) as store:
        store.turn(add(1, "mine"))
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(Exception, match=complaint) as caught:
        archive.load(source, tmp_path)
    assert isinstance(caught.value, AiosdError)
    assert (tmp_path / FILE).read_bytes() == before


def test_large_contents_are_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes have no contents, so here their keys serve as names of such files."""
    kept = (tables.KeptTable("owners"), tables.KeptTable("notes", contents="key"))
    for module in ("salvage", "archive", "rebuild", "snapshots"):
        monkeypatch.setattr(f"aiosd.store.{module}.KEPT", kept)
    (tmp_path / "old" / tables.CONTENTS).mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"content")
    name = tables.file_hash(tmp_path / "x")
    (tmp_path / "x").rename(tables.content_path(tmp_path / "old", name))
    with contextlib.closing(Store(tmp_path / "old")) as store:
        store.turn(add(1, "x", key=name))
        snapshot = made(snapshots.snapshot(store.database))
    for write in (archive.export, archive.backup):
        for number, folder in enumerate((tmp_path / "old", snapshot)):
            new = tmp_path / f"{write.__name__}{number}"
            archive.load(tar_of(lambda target, write=write, folder=folder: write(folder, target)), new)
            assert tables.content_path(new, name).read_bytes() == b"content"
            assert len(rows_of(new / FILE)) == 1


def test_a_snapshot_includes_changes_made_while_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "PAGES_AT_ONCE", 5)
    with contextlib.closing(Store(tmp_path)) as store:
        store.turn(*(add(call, f"{call} " + "x" * 3000) for call in range(1, 41)))
        steps: list[int] = []

        def meanwhile() -> None:
            steps.append(len(steps))
            store.turn(add(100 + len(steps), f"meanwhile {len(steps)}"))

        snapshot = made(snapshots.snapshot(store.database), meanwhile)
        texts = store.texts()
    assert len(steps) > 5
    assert [row[3] for row in rows_of(snapshot / FILE).values()] == texts
    snapshots.sweep(tmp_path)
    assert not snapshot.exists()


def test_an_older_schema_is_migrated_as_a_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = filled(tmp_path / "old")
    export = tar_of(lambda target: archive.export(tmp_path / "old", target))
    column = "ALTER TABLE notes ADD COLUMN extra TEXT DEFAULT 'none'"
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, f"{column}; SELECT no_such_function()"))
    monkeypatch.setattr(database, "VERSION", VERSION + 1)
    with pytest.raises(AiosdError, match="no_such_function"):
        Store(tmp_path / "old")
    assert rows_of(tmp_path / "old" / FILE) == rows, "as it was"
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS[:-1], column))
    archive.load(export, tmp_path / "imported")
    for folder in (tmp_path / "old", tmp_path / "imported"):
        with contextlib.closing(Store(folder, "two")):
            pass
        assert rows_of(folder / FILE) == {note: (*row, "none") for note, row in rows.items()}
