"""Reading past a damaged page, so that only the rows on that page are lost.

SQLite reads many rows with one statement, and the statement fails at the first page that cannot be read. Then the rows
are read `piecemeal`: in halves, and halves of these, until single rows are left that cannot be read. If the page is one
of an index, which only leads to the rows, notes are read from their table itself (`walk`): all of them, in slices
between which other calls are served. That takes long, and only until the index is made anew (`remake`, `aiosd fsck
--repair`).
"""

from __future__ import annotations

import errno
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from aiosd.store.database import Database
from aiosd.store.noterows import PLAIN_COLUMNS, note_of
from libaios.wire import Note, NoteFilters

logger = logging.getLogger("store")

SLICE = 256  # row ids
MOST_REPORTED = 10_000  # lost rows that one process reports in its log
_WORD = re.compile(r"[^\W_]+")

ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")


def is_damage(err: OSError) -> bool:
    return err.errno == errno.EIO


def piecemeal(
    read: Callable[[Sequence[ItemT]], list[FoundT]], items: Sequence[ItemT]
) -> tuple[list[FoundT], list[ItemT]]:
    """What `read` returns of these items, and those that cannot be read."""
    if not items:
        return [], []
    try:
        return read(items), []
    except OSError as err:
        if not is_damage(err):
            raise
    if len(items) == 1:
        return [], [items[0]]
    half = len(items) // 2
    found, lost = piecemeal(read, items[:half])
    more, also = piecemeal(read, items[half:])
    return found + more, lost + also


def report(db: Database, what: str, lost: Sequence[object]) -> None:
    """Report lost rows in the log, each once, since an agent may try again and again."""
    new = [one for one in lost if (what, one) not in db.reported]
    if new and len(db.reported) < MOST_REPORTED:
        db.reported.update((what, one) for one in new)
        names = ", ".join(map(str, new[:20])) + (", …" if len(new) > 20 else "")
        logger.warning("%s cannot be read, and stand in no answer: %s (see `aiosd fsck`)", what, names)


def lost_note(note: int) -> Note:
    """A note of which only the id can be read; with id 0 it stands for several whose ids are not known."""
    return Note(note, "", None, [], {}, 0.0, 0.0, None, 0, False, damaged=True)


def walk(db: Database, owners: Mapping[int, str], filters: NoteFilters, now: float) -> Iterator[list[Note]]:
    """All notes of these owners (by number, with their names) that can be read and pass, the newest first, in slices,
    without any index. The last slice is `lost_note(0)` if some notes of any owner cannot be read."""
    sql = f"SELECT {PLAIN_COLUMNS} FROM notes n NOT INDEXED WHERE n.id BETWEEN ? AND ? ORDER BY n.id DESC"
    row = db.row("SELECT seq FROM sqlite_sequence WHERE name = 'notes'")
    last, lost = 0 if row is None else int(row[0]), list[int]()

    def read(ids: Sequence[int]) -> list[Note]:
        rows = db.rows(sql, ids[-1], ids[0])
        return [note_of((*one[1:10], owners[one[0]], one[10])) for one in rows if one[0] in owners]

    for end in range(last, 0, -SLICE):
        notes, gone = piecemeal(read, range(end, max(end - SLICE, 0), -1))
        lost += gone
        yield [note for note in notes if _passes(note, filters, now)]
    if lost:
        report(db, "notes, as far as there are any,", lost)
        yield [lost_note(0)]


def _passes(note: Note, filters: NoteFilters, now: float) -> bool:
    return (
        (note.expires is None or note.expires > now)
        and set(filters.tags) <= set(note.tags)
        and all(name in note.metadata and _same(note.metadata[name], value) for name, value in filters.metadata.items())
        and (filters.since is None or note.updated >= filters.since)
        and (filters.until is None or note.updated < filters.until)
    )


def _same(one: object, other: object) -> bool:
    """Whether two values of metadata are equal: 2 is 2.0, and 1 is not true."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def words_of(text: str) -> set[str]:
    """The words of a text as in the index of words: without case and accents."""
    bare = "".join(char for char in unicodedata.normalize("NFD", text) if not unicodedata.combining(char))
    return set(_WORD.findall(bare.casefold()))
