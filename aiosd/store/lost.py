"""Notes and files without an owner, and how they get one. For a store that no process has open.

After a repair there may be notes and files whose owner's row could not be read; and a damaged page can keep data from
being removed at their agent's end. Their owner is then called `lost/` and a number, which no caller is. A person may
give them to the agents of a name. That renames the owner and changes none of the data, so the name must be new to the
store: two owners may have notes of the same key, and files of the same path.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import apsw

from aiosd.errors import UsageError
from aiosd.store import owners, roots
from aiosd.store.database import Database
from aiosd.store.spaces import is_name

_COUNTED = """
    SELECT o.name, (SELECT count(*) FROM notes WHERE owner = o.id), (SELECT count(*) FROM files WHERE owner = o.id)
    FROM owners o WHERE o.name >= ? AND o.name < ? ORDER BY o.id
"""


class LostOwner(NamedTuple):
    name: str
    notes: int
    files: int  # those in the trash included


def found(path: Path) -> list[LostOwner]:
    """All lost owners. For a damaged store the list is empty: it has to be repaired first."""
    try:
        with contextlib.closing(roots.open_closed(path)) as db:
            rows = db.execute(_COUNTED, (owners.LOST, owners.LOST[:-1] + "0"))  # "0" follows "/"
            return [one for one in (LostOwner(*row) for row in rows) if one.notes or one.files]
    except apsw.Error:
        return []


def give(folder: Path, lost: str, to: str) -> LostOwner:
    """Give the data to the agents of this user with the name `to`: `NAME`, or `GROUP/NAME`. Raises UsageError."""
    group, slash, name = to.rpartition("/")
    if not is_name(name) or (slash and not is_name(group)):
        raise UsageError(f"{to!r} is neither a name nor GROUP/NAME")
    owner = f"name/{os.getuid()}/{group or 'default'}/{name}"
    database = Database(folder)
    try:
        with database.transaction():
            if not lost.startswith(owners.LOST) or database.row("SELECT 1 FROM owners WHERE name = ?", lost) is None:
                raise UsageError(f"{lost}: there is nothing that has lost its owner under this name")
            if database.row("SELECT 1 FROM owners WHERE name = ?", owner) is not None:
                raise UsageError(f"agents named {to} have kept something already; give them to a new name")
            database.do("UPDATE owners SET name = ? WHERE name = ?", owner, lost)
        counts = database.rows(_COUNTED, owner, owner + "\0")
        return LostOwner(*counts[0])
    finally:
        database.close()
