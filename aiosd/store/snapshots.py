"""Snapshots: what the running store makes of itself, for a backup or an export.

The store imports this file alone of all that is about the store as a whole (`archive`, `fsck`): the others need numpy,
which takes long to import, and more memory than the rest of the store.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Generator
from pathlib import Path

import apsw

from aiosd.store.database import FILE, Database
from aiosd.store.tables import CONTENTS, KEPT, content_path

SNAPSHOTS = "snapshots"
PAGES_AT_ONCE = 256


def snapshot(database: Database) -> Generator[int, None, str]:
    """In the store: a copy of the database, and links to its contents, in a folder of their own. Yields now and then
    how many pages are left, so that calls go on meanwhile: their changes are in the copy. Returns the folder."""
    folder = database.path.parent / SNAPSHOTS / f"{time.time_ns():x}"
    folder.mkdir(parents=True, mode=0o700)
    try:
        copy = apsw.Connection(os.fspath(folder / FILE), vfs="cksmvfs")
        try:
            copy.pragma("synchronous", "OFF")  # what is made from it is synced, by the process that makes it
            with copy.backup("main", database.db, "main") as backup, database.as_oserror():
                while not backup.step(PAGES_AT_ONCE):
                    yield backup.remaining
            link_contents(copy, database.path.parent, folder)
        finally:
            copy.close()
    except BaseException:  # of any kind, an interrupt too: undo, and raise it again
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return str(folder)


def link_contents(db: apsw.Connection, source: Path, folder: Path) -> None:
    """All at once: between two of these no content may be removed."""
    (folder / CONTENTS).mkdir()
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    for kept in KEPT:
        if kept.contents and kept.name in tables:
            sql = f"SELECT DISTINCT {kept.contents} FROM {kept.name} WHERE {kept.contents} NOTNULL"
            for (name,) in db.execute(sql):
                shown = name.hex() if isinstance(name, bytes) else name
                with contextlib.suppress(FileNotFoundError):  # `fsck` names it
                    os.link(content_path(source, shown), content_path(folder, shown))


def sweep(folder: Path) -> None:
    """When the store starts: those of commands that died."""
    shutil.rmtree(folder / SNAPSHOTS, ignore_errors=True)
