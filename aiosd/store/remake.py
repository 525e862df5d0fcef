"""Makes damaged data anew that are derived from other rows, while the store serves: indexes, labels, words.

Nothing is lost with such a page. But SQLite can neither read past it nor drop it: a query by key, and each change that
needs the page, would be EIO until a repair. So a new tree takes the place of the damaged one, whose pages belong to
nothing from then on; `aiosd fsck` still reports the damaged page. If the source rows are damaged themselves, all stays
as it is, because an index must not leave out a row. All callers wait meanwhile, so this is not done to a large file: it
is left to `aiosd fsck --repair`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from aiosd.store import plainly, roots
from aiosd.store.database import Database
from aiosd.store.tables import REBUILD

logger = logging.getLogger("store")

FIRST_S, MOST_S = 60.0, 3600.0  # between two checks while pages are found damaged; doubled when nothing was made
MOST_BYTES = 512 << 20  # of the database: some seconds
_NEW = "remade"
_WORDS = ("data", "idx", "docsize", "config")  # tables of an FTS5 table
#: Tables that are made from others, in sets that follow from each other: the first makes the rest. (Without the rows of
#: `doomed` some files stay that nothing needs any more.)
_DERIVED: tuple[tuple[str, ...], ...] = (
    ("note_tags",),
    ("note_fields",),
    ("doomed",),
    ("wordless", "note_sums", "note_words", *(f"note_words_{part}" for part in _WORDS)),
    ("unindexed", "file_words", *(f"file_words_{part}" for part in _WORDS)),
)
_ALL = {table for tables in _DERIVED for table in tables}
_INDEXES = "SELECT name, tbl_name, coalesce(sql, '') FROM sqlite_schema WHERE type = 'index' AND rootpage > 0"


def damaged_indexes(db: Database) -> list[tuple[str, str, str, str]]:
    """Each damaged index with its table, its columns and, if partial, its condition. Reads all indexes. Raises
    OSError."""
    found = []
    for name, table, sql in db.rows(_INDEXES):
        columns = [row[0] for row in db.rows("SELECT name FROM pragma_index_info(?)", name)]
        _, begin, condition = sql.partition(" WHERE ")
        where = begin + condition
        try:
            db.rows(f"SELECT count({columns[0]} IS NULL) FROM {table} INDEXED BY {name}{where}")
        except OSError as err:
            if not plainly.is_damage(err):
                raise
            found.append((name, table, ", ".join(columns), where))
    return found


def damaged_tables(db: Database) -> list[tuple[str, ...]]:
    """The sets that have a damaged table. Reads them all. Raises OSError."""
    return [tables for tables in _DERIVED if any(_damaged(db, table) for table in tables)]


def _damaged(db: Database, table: str) -> bool:
    if f"{table}_data" in _ALL:
        return False  # it is what the others are
    last = db.rows("SELECT name FROM pragma_table_info(?) ORDER BY cid DESC LIMIT 1", table)[0][0]
    try:
        db.rows(f"SELECT max(+{last}) FROM {table} NOT INDEXED")  # reads to the end of each row
    except OSError as err:
        if not plainly.is_damage(err):
            raise
        return True
    return False


def remake(db: Database) -> list[str]:
    """Make all damaged indexes and tables anew; returns their names. Not in a transaction. Raises OSError."""
    made = []
    for name, table, columns, where in damaged_indexes(db):
        if _done(db, name, partial(_index, db, name, table, columns, where)):
            made.append(name)
    for tables in damaged_tables(db):
        if _done(db, tables[0], partial(_tables, db, tables)):
            made.append(tables[0])
    if made:
        roots.note(db.path, db.db)
    return made


def _done(db: Database, name: str, make: Callable[[], None]) -> bool:
    try:
        with db.transaction():
            make()
    except OSError as err:
        db.do("PRAGMA writable_schema = RESET")
        logger.warning("%s is damaged, and cannot be made anew: %s", name, err.strerror)
        if not plainly.is_damage(err):
            raise
        return False
    logger.warning("%s was damaged, and is made anew", name)
    return True


def _index(db: Database, name: str, table: str, columns: str, where: str) -> None:
    db.do(f"CREATE INDEX {_NEW} ON {table}({columns}){where}")
    db.do("PRAGMA writable_schema = ON")
    root = f"(SELECT rootpage FROM sqlite_schema WHERE name = '{_NEW}')"
    db.do(f"UPDATE sqlite_schema SET rootpage = {root} WHERE name = ?", name)
    db.do("DELETE FROM sqlite_schema WHERE name = ?", _NEW)
    db.do("PRAGMA writable_schema = RESET")


def _tables(db: Database, tables: tuple[str, ...]) -> None:
    scripts = [db.rows("SELECT sql FROM sqlite_schema WHERE name = ?", table)[0][0] for table in tables]
    db.do("PRAGMA writable_schema = ON")
    for table in tables:
        db.do("DELETE FROM sqlite_schema WHERE tbl_name = ?", table)
    db.do("PRAGMA writable_schema = RESET")
    for table, script in zip(tables, scripts, strict=True):
        if not any(table == f"{other}_{part}" for other in tables for part in _WORDS):
            db.do(script)
    for table, sql in REBUILD:
        if table == tables[0]:
            db.do(sql)


class Mender:
    """Calls `remake` when damaged pages were found since the last time."""

    def __init__(self, db: Database, made: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._db, self._made, self._clock = db, made, clock
        self._seen = 0
        self._next, self._pause = 0.0, FIRST_S

    def work(self) -> float:
        """Returns the number of seconds after which to call this again. Raises OSError."""
        if self._db.counts["damaged"] == self._seen or self._clock() < self._next:
            return FIRST_S
        self._next = self._clock() + self._pause
        made: list[str] = []
        try:
            self._db.room.require()
            if self._db.path.stat().st_size <= MOST_BYTES:
                made = remake(self._db)
        finally:
            self._pause = FIRST_S if made else min(2 * self._pause, MOST_S)
            self._seen = self._db.counts["damaged"]
        if made:
            self._made()
        return FIRST_S
