"""Which tables hold what agents keep, for all that handles the store as a whole: fsck, repair, export, import, backup.

A table that is not named here is made from those that are (`REBUILD`; vectors by the embedder, at the next start), or
belongs to the running system alone. Contents that are too large for the database lie in files that are named by their
hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiosd.store.noterows import FIELD

CONTENTS = "contents"  # the folder of such files, in that of the store


@dataclass(frozen=True, slots=True)
class Kept:
    """A table whose rows are the truth. `contents`: the column that names a file by its hash; NULL: it has none.
    `whole`: False for a row whose end has become zeros, which no checksum of a page shows."""

    name: str
    contents: str = ""
    whole: Callable[[dict[str, Any]], bool] = lambda row: True


#: In the order in which rows may refer to each other.
KEPT: tuple[Kept, ...] = (Kept("owners"), Kept("notes", whole=lambda row: row["bytes"] > 0))

#: What is made from them, where rows have been put in: the table that has to exist, and the statements.
REBUILD: tuple[tuple[str, str], ...] = (
    # What belongs to an owner whose row was lost is kept, though no caller is that owner.
    (
        "notes",
        "INSERT OR IGNORE INTO owners(id, name) SELECT DISTINCT owner, 'lost/' || owner FROM notes "
        "WHERE owner NOT IN (SELECT id FROM owners)",
    ),
    (
        "notes",
        "UPDATE owners SET note_bytes = (SELECT coalesce(sum(bytes), 0) FROM notes WHERE notes.owner = owners.id)",
    ),
    (
        "note_tags",
        "INSERT OR IGNORE INTO note_tags SELECT n.owner, j.value, n.id "
        "FROM notes n, json_each(iif(json_valid(n.tags), n.tags, '[]')) j",
    ),
    (
        "note_fields",
        f"INSERT OR IGNORE INTO note_fields SELECT n.owner, j.key, {FIELD}, n.id "
        "FROM notes n, json_each(iif(json_valid(n.metadata), n.metadata, '{}')) j",
    ),
    ("note_words", "INSERT INTO note_words(rowid, owner, text) SELECT id, 'own' || owner, text FROM notes"),
)


def content_path(folder: Path, name: str) -> Path:
    """The file of the content with this hash; `folder`: that of the store."""
    return folder / CONTENTS / name


def hash_of(path: Path) -> str:
    """The name that a content should have. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
