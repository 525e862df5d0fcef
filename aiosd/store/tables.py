"""The tables with agents' data, for work on the store as a whole: fsck, repair, export, import, backup.

A table that is not named here is made from those that are (`REBUILD`; vectors by the embedder, at the next start), or
belongs to the running system alone. Contents that are too large for the database lie in files named by their hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiosd.store.noterows import FIELD

CONTENTS = "contents"  # the folder of such files, in the folder of the store


@dataclass(frozen=True, slots=True)
class KeptTable:
    """A table whose rows are the truth. `contents`: the column that names a file by its hash; NULL: it has none.
    `whole`: False for a row whose end has become zeros, which no checksum of a page shows."""

    name: str
    contents: str = ""
    whole: Callable[[dict[str, Any]], bool] = lambda row: True


#: Sorted so that rows refer only to tables before theirs.
KEPT: tuple[KeptTable, ...] = (
    KeptTable("owners"),
    KeptTable("notes", whole=lambda row: row["bytes"] > 0),
    KeptTable("note_authors", whole=lambda row: bool(row["author"])),
    KeptTable(
        "contents", contents="file", whole=lambda row: row["data"] is None or content_hash(row["data"]) == row["hash"]
    ),
    KeptTable("files", whole=lambda row: bool(row["path"]) and bool(row["updated"])),
    KeptTable("versions", whole=lambda row: row["contents"][-1:] == "]"),
    KeptTable("grants", whole=lambda row: bool(row["grantee"])),
    KeptTable("mounts", whole=lambda row: bool(row["folder"])),
)

#: Tables that are made from the others after rows were put in: the table that has to exist, and the statements.
REBUILD: tuple[tuple[str, str], ...] = (
    # Data of an owner whose row was lost are kept, though no caller is that owner.
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
    # Files: their rows first, then the counts. Rows of mounted folders are made by scanning these.
    ("files", "DELETE FROM files WHERE mount IS NOT NULL"),
    (
        "files",
        "INSERT OR IGNORE INTO owners(name) SELECT 'lost/files' FROM versions "
        "WHERE file NOT IN (SELECT id FROM files) LIMIT 1",
    ),
    (
        "files",
        "INSERT INTO files(id, owner, path, version, size, created, updated, author) "
        "SELECT v.file, (SELECT id FROM owners WHERE name = 'lost/files'), 'lost-' || v.file, max(v.number), v.size, "
        "min(v.time), max(v.time), v.author FROM versions v WHERE v.file NOT IN (SELECT id FROM files) GROUP BY v.file",
    ),
    (
        "files",
        "INSERT OR IGNORE INTO owners(id, name) SELECT DISTINCT owner, 'lost/' || owner FROM files "
        "WHERE owner NOT IN (SELECT id FROM owners)",
    ),
    (
        "files",
        "UPDATE files SET (version, size) = (SELECT v.number, v.size FROM versions v WHERE v.file = files.id "
        "ORDER BY v.number DESC LIMIT 1) WHERE EXISTS (SELECT 1 FROM versions v WHERE v.file = files.id)",
    ),
    ("grants", "DELETE FROM grants WHERE owner NOT IN (SELECT id FROM owners)"),
    ("mounts", "DELETE FROM mounts WHERE owner NOT IN (SELECT id FROM owners)"),
    (
        "content_uses",
        "INSERT INTO content_uses SELECT f.owner, c.id, count(*) FROM versions v JOIN files f ON f.id = v.file, "
        "json_each(v.contents) j JOIN contents c ON c.id = j.value GROUP BY f.owner, c.id",
    ),
    (
        "file_bytes",
        "INSERT INTO file_bytes SELECT owner, sum(bytes) FROM (SELECT u.owner AS owner, c.size AS bytes "
        "FROM content_uses u JOIN contents c ON c.id = u.content UNION ALL "
        "SELECT f.owner, 200 FROM versions v JOIN files f ON f.id = v.file) GROUP BY owner",
    ),
    ("unindexed", "INSERT INTO unindexed SELECT id FROM files WHERE removed IS NULL"),
    ("wordless", "INSERT INTO wordless SELECT id, owner FROM notes"),
    (
        "note_words",  # for a schema that has no such queue
        "INSERT INTO note_words(rowid, owner, text) SELECT id, 'own' || owner, text FROM notes "
        "WHERE NOT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'wordless')",
    ),
)


def content_hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def content_path(folder: Path, name: str) -> Path:
    """The file of the content with this hash. `folder`: the store's."""
    return folder / CONTENTS / name


def file_hash(path: Path) -> str:
    """The name that a content should have. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
