"""Makes a new database file from rows and puts it in the place of the old one: for repair and import.

Nothing is deleted: the old file is kept beside the new one, under another name. The change is one rename, so that a
crash leaves the one or the other.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import apsw

from aiosd.store import roots
from aiosd.store.database import MIGRATIONS, connect
from aiosd.store.pages import Pages
from aiosd.store.salvage import Salvage, columns_of
from aiosd.store.tables import KEPT, REBUILD


def new_database(path: Path | None, schema: int) -> apsw.Connection:
    """An empty database with this schema. `path` None: in memory."""
    if path is None:
        db = apsw.Connection(":memory:")
    else:
        db = connect(path)
        db.pragma("foreign_keys", "OFF")
        db.pragma("synchronous", "OFF")  # `take_place` syncs the whole file
    for script in MIGRATIONS[:schema]:
        db.execute(script)
    db.pragma("user_version", schema)
    return db


def put(db: apsw.Connection, table: str, row: dict[str, Any]) -> bool:
    """Insert a row. False: there is an equal one already."""
    names, marks = ", ".join(row), ", ".join("?" for _ in row)
    db.execute(f"INSERT OR IGNORE INTO {table}({names}) VALUES({marks})", tuple(row.values()))
    return db.changes() > 0


def sequences(path: Path, plan: roots.RootPages) -> dict[str, int]:
    """The highest id that each table has ever given out: none is given out twice."""
    pages = Pages(path)
    try:
        root = plan.roots.get("sqlite_sequence")
        rows = [] if root is None else [values for _, values in pages.rows(root, [])]
    finally:
        pages.close()
    return {str(name): int(number) for name, number in rows}


def finish(db: apsw.Connection, given_out: dict[str, int]) -> None:
    """Make all derived tables when all rows are in, and close the database."""
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    for table, sql in REBUILD:
        if table in tables:
            db.execute(sql)
    names = {kept.name for kept in KEPT}
    for table, number in given_out.items():
        if table in names and not list(db.execute("SELECT 1 FROM sqlite_sequence WHERE name = ?", (table,))):
            db.execute("INSERT INTO sqlite_sequence(name, seq) VALUES(?, 0)", (table,))
        if table in names:
            db.execute("UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (number, table))
    db.close()


def take_place(new: Path, path: Path, why: str) -> Path | None:
    """Put a new database in the place of the old one, which is kept beside it. Returns the old one's new path; None:
    there was no old one."""
    old = None
    _sync(new, os.O_RDWR)
    if path.exists():
        old = _unused(path.with_name(f"{path.name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}"))
        os.link(path, old)
        wal = path.with_name(path.name + "-wal")
        if wal.exists():  # it must not be taken for the WAL of the new file
            os.rename(wal, old.with_name(old.name + "-wal"))
    os.replace(new, path)
    path.with_name(roots.BESIDE).unlink(missing_ok=True)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    return old


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unused(path: Path) -> Path:
    found, number = path, 1
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def repair(path: Path) -> tuple[dict[str, int], Path | None]:
    """Copy the readable rows into a new file, which takes the place of the old one. Returns the number of rows copied
    from each table, and the path of the old file."""
    new = path.with_name(path.name + ".new")
    for stale in (new, new.with_name(new.name + "-wal")):
        stale.unlink(missing_ok=True)
    salvage = Salvage.open(path)
    copied: dict[str, int] = {}
    try:
        db = new_database(new, salvage.plan.schema)
        with db:
            for kept, row in salvage.rows(columns_of(db)):
                copied[kept.name] = copied.get(kept.name, 0) + put(db, kept.name, row)
        finish(db, sequences(path, salvage.plan))
    finally:
        salvage.close()
    return copied, take_place(new, path, "damaged")
