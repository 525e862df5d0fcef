"""Notes as rows of the database: columns, conditions, and rows that belong to a note in other tables."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

import msgspec

from aiosd.ipc import link
from aiosd.store import owners
from aiosd.store.database import Database
from libaios import wire
from libaios.wire import Note

OVERHEAD = 200  # bytes that a note takes besides its text
COLUMNS = "n.id, n.key, n.text, n.tags, n.metadata, n.created, n.updated, n.expires, n.version, o.name, n.bytes"
PLAIN_COLUMNS = (
    "n.owner, n.id, n.key, n.text, n.tags, n.metadata, n.created, n.updated, n.expires, n.version, n.bytes"  # no join
)
FROM = "FROM notes n JOIN owners o ON o.id = n.owner"
LIVE = "(n.expires IS NULL OR n.expires > ?)"
EVERY = "SELECT id AS note FROM notes WHERE owner = ?"

#: A value of metadata as a text: the same for 2 and 2.0, and not the same for 1 and true.
FIELD = """json_quote(CASE
    WHEN j.type IN ('true', 'false') THEN json(j.type)
    WHEN j.type = 'real' AND abs(j.value) < 1e15 AND j.value = CAST(j.value AS INTEGER)
    THEN CAST(j.value AS INTEGER) ELSE j.value END)"""


def visible(caller: link.Caller) -> tuple[str, str]:
    """The names of the owners whose notes the caller may see."""
    return owners.own(caller), owners.group(caller)


def note_of(row: tuple[Any, ...]) -> Note:
    """The note of a row with COLUMNS."""
    note_id, key, text, tags, metadata, created, updated, expires, version, owner, size = row[:11]
    if size < OVERHEAD:  # the last page of the note has become zeros, which have a right checksum
        raise wire.error(errno.EIO, f"note {note_id} is damaged on the disk")
    return Note(
        id=note_id,
        text=text,
        key=key,
        tags=msgspec.json.decode(tags),
        metadata=msgspec.json.decode(metadata),
        created=created,
        updated=updated,
        expires=expires,
        version=version,
        shared=owner.startswith("group/"),
    )


def marks(values: Iterable[Any]) -> str:
    return ", ".join("?" for _ in values)


def enter_labels(db: Database, owner: int, note: Note, metadata: str) -> None:
    """Enter tags and metadata (JSON) of a note into the tables that filters read."""
    if note.tags:
        rows = [(owner, tag, note.id) for tag in note.tags]
        db.many("INSERT OR IGNORE INTO note_tags VALUES(?, ?, ?)", rows)
    if note.metadata:
        insert = f"INSERT OR IGNORE INTO note_fields SELECT ?, j.key, {FIELD}, ? FROM json_each(?) j"
        db.do(insert, owner, note.id, metadata)


def remove_labels(db: Database, note: int) -> None:
    """Remove them again. Must be called before the note's row is changed or removed, because it is read for that."""
    row = db.row("SELECT owner, tags, metadata FROM notes WHERE id = ?", note)
    if row is None:
        return
    owner, tags, metadata = row
    if tags != "[]":
        of_note = "owner = ? AND note = ? AND tag IN (SELECT value FROM json_each(?))"
        db.do(f"DELETE FROM note_tags WHERE {of_note}", owner, note, tags)
    if metadata != "{}":
        of_note = f"owner = ? AND note = ? AND (name, value) IN (SELECT j.key, {FIELD} FROM json_each(?) j)"
        db.do(f"DELETE FROM note_fields WHERE {of_note}", owner, note, metadata)


def _fields(db: Database, metadata: wire.Metadata) -> list[tuple[Any, ...]]:
    if not metadata:
        return []
    return db.rows(f"SELECT j.key, {FIELD} FROM json_each(?) j", msgspec.json.encode(metadata).decode())


def filtered(db: Database, filters: wire.NoteFilters, now: float) -> tuple[str, list[Any]]:
    """The filters as a condition, for a few notes that are found by something else. (With many notes each would be
    looked up: see `passing`.) They are applied before any limit: a search for k notes finds k that pass, if there
    are."""
    where = [LIVE]
    parts: list[Any] = [now]
    for tag in filters.tags:
        where.append("EXISTS (SELECT 1 FROM note_tags WHERE owner = n.owner AND tag = ? AND note = n.id)")
        parts.append(tag)
    for name, value in _fields(db, filters.metadata):
        of_note = "owner = n.owner AND name = ? AND value = ? AND note = n.id"
        where.append(f"EXISTS (SELECT 1 FROM note_fields WHERE {of_note})")
        parts += [name, value]
    if filters.since is not None:
        where.append("n.updated >= ?")
        parts.append(filters.since)
    if filters.until is not None:
        where.append("n.updated < ?")
        parts.append(filters.until)
    return " AND ".join(where), parts


def passing(db: Database, owner: int, filters: wire.NoteFilters, now: float) -> tuple[str, list[Any]] | None:
    """A SELECT of the ids of an owner's live notes that pass, from indexes alone, since rows of notes are long. None:
    all pass."""
    sets: list[str] = []
    parts: list[Any] = []
    for tag in filters.tags:
        sets.append("SELECT note FROM note_tags WHERE owner = ? AND tag = ?")
        parts += [owner, tag]
    for name, value in _fields(db, filters.metadata):
        sets.append("SELECT note FROM note_fields WHERE owner = ? AND name = ? AND value = ?")
        parts += [owner, name, value]
    if filters.since is not None or filters.until is not None:
        sets.append("SELECT id AS note FROM notes WHERE owner = ? AND updated >= ? AND updated < ?")
        least = -1e308 if filters.since is None else filters.since
        parts += [owner, least, 1e308 if filters.until is None else filters.until]
    over = db.row("SELECT count(*) FROM notes WHERE owner = ? AND expires <= ?", owner, now)
    if over is not None and over[0]:
        if not sets:
            sets, parts = [EVERY], [owner]
        parts += [owner, now]
        sets[-1] += " EXCEPT SELECT id FROM notes WHERE owner = ? AND expires <= ?"
    return (" INTERSECT ".join(sets), parts) if sets else None


def union(db: Database, owners: Iterable[int], filters: wire.NoteFilters, now: float) -> tuple[str, list[Any]]:
    """The same for all these owners."""
    selects: list[str] = []
    parts: list[Any] = []
    for owner in owners:
        select, values = passing(db, owner, filters, now) or (EVERY, [owner])
        selects.append(f"SELECT note FROM ({select})")
        parts += values
    return " UNION ALL ".join(selects), parts


def ids_of(db: Database, select: str, parts: Iterable[Any]) -> str:
    """The ids as one text with commas, which takes a third of the time of separate rows."""
    row = db.row(f"SELECT group_concat(note) FROM ({select})", *parts)
    return (row[0] if row is not None else None) or ""
