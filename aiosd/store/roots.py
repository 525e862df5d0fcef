"""The first pages of the tables in the database.

The first page of the file lists them. As that page may be the damaged one, the same list lies in a small file beside
it, written whenever the database is opened.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import apsw
import apsw.sqlite_extra

from aiosd.errors import WorldError

BESIDE = "roots.json"
OF_SYSTEM = ("replies", "system", "memos")  # tables that each system makes anew
_TREES = "SELECT name, rootpage FROM sqlite_schema WHERE rootpage > 0 ORDER BY rootpage"


@dataclass(frozen=True, slots=True)
class RootPages:
    """The schema of a database file, and the first page of each table and index."""

    schema: int
    roots: dict[str, int]
    first_page: bool = True  # the plan was read from the file itself


def note(path: Path, db: apsw.Connection) -> None:
    """Keep the plan of a database beside it."""
    roots = {name: root for name, root in db.execute(_TREES) if name not in OF_SYSTEM}
    text = json.dumps({"schema": int(db.pragma("user_version")), "roots": roots})
    beside = path.with_name(BESIDE)
    if not beside.exists() or beside.read_text() != text:
        new = beside.with_suffix(".new")
        new.write_text(text)
        os.replace(new, beside)


def read(path: Path) -> RootPages:
    """Read the plan. Raises WorldError if neither the file nor the one beside it has it."""
    try:
        db = open_closed(path)
        try:
            return RootPages(int(db.pragma("user_version")), dict(db.execute(_TREES)))
        finally:
            db.close()
    except apsw.Error as err:
        try:
            found = json.loads(path.with_name(BESIDE).read_text())
            return RootPages(int(found["schema"]), dict(found["roots"]), first_page=False)
        except (OSError, ValueError, KeyError):
            raise WorldError(f"{path}: its first page is damaged ({err}), and {BESIDE} is not there") from err


def open_closed(path: Path) -> apsw.Connection:
    """Open a file that no process has open, for reading it as it is: without a lock, without a WAL."""
    apsw.sqlite_extra.load(apsw.Connection(":memory:"), "cksumvfs")
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    return apsw.Connection(f"{path.absolute().as_uri()}?mode=ro&immutable=1", vfs="cksmvfs", flags=flags)
