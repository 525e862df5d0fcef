"""The database of the store: one file, one connection, one process, one thread.

SQLite is the truth; all other data of the store are made from it and may be lost. The connection has the file for
itself (`locking_mode=EXCLUSIVE`: a second process that opens it is refused, and no shared memory lies beside the file).
A commit is on the disk before its caller gets an answer (WAL, `synchronous=FULL`). Each page has a checksum
(`cksumvfs`): a page that the disk has changed is an error for calls that need it, and never wrong data.

**Group commit.** Most of a commit's time is the wait for the disk, which is the same for one call and for fifty. So the
calls of one turn of the service share a transaction: `begin`, the calls, `commit`, and only then their answers. Each
call has a savepoint, or makes all its checks before its first change (`bare`), so a call that fails is undone alone.
When the whole transaction is lost (`commit` raises; or SQLite itself has undone it, which it does when a page cannot be
read or the disk is full), nothing of it has happened: what was made in memory from it is dropped (`undone`), and the
service does the calls again, each on its own. Outside of `begin` and `commit` each transaction is durable when it ends.

**Once.** `once` is how a call takes effect once, whatever dies: its effect and a memo of its reply are one transaction
(see `memos`). **Room.** On a disk that is nearly full nothing may grow, and removals go on (see `room`).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import apsw
import apsw.sqlite_extra
from msgspec import Raw

from aiosd.errors import WorldError
from aiosd.ipc import link
from aiosd.store import roots
from aiosd.store.fileschema import FILES
from aiosd.store.memos import Memos
from aiosd.store.room import WAL_BYTES, DiskReserve
from libaios import wire

logger = logging.getLogger("store")

VERSION = 5
FILE = "store.db"
CHECKPOINT_PAGES = 1000  # of the WAL: a commit that exceeds this copies the pages into the file, in a tenth of a second
IN_MEMORY = ("temp_store=MEMORY",)  # for the pages to which a savepoint goes back
CHECKSUM_BYTES = 8  # at the end of each page, as cksumvfs requires

#: Migrations: each turns schema version n into n + 1. A migration is never changed after its release.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE system(boot TEXT NOT NULL);
    CREATE TABLE memos(number INTEGER PRIMARY KEY AUTOINCREMENT, peer INTEGER, call INTEGER, reply BLOB,
                       UNIQUE(peer, call));
    CREATE TABLE owners(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, note_bytes INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE notes(id INTEGER PRIMARY KEY AUTOINCREMENT, owner INTEGER NOT NULL REFERENCES owners(id), key TEXT,
                       text TEXT NOT NULL, tags TEXT NOT NULL, metadata TEXT NOT NULL, created REAL NOT NULL,
                       updated REAL NOT NULL, expires REAL, version INTEGER NOT NULL, bytes INTEGER NOT NULL);
    CREATE UNIQUE INDEX note_keys ON notes(owner, key) WHERE key IS NOT NULL;
    CREATE INDEX notes_of_owner ON notes(owner, updated);
    CREATE INDEX note_ends ON notes(owner, expires) WHERE expires IS NOT NULL;
    CREATE VIRTUAL TABLE note_words USING fts5(owner, text, tokenize='unicode61');
    """,
    FILES,
    # Search: filters by tag and metadata without reading each note, a note by its own text, and vectors. `pending` has
    # texts that have no vector yet from the embedder that `embedder.current` names.
    """
    CREATE TABLE note_tags(owner INTEGER, tag TEXT, note INTEGER, PRIMARY KEY(owner, tag, note)) WITHOUT ROWID;
    CREATE TABLE note_fields(owner INTEGER, name TEXT, value TEXT, note INTEGER,
                             PRIMARY KEY(owner, name, value, note)) WITHOUT ROWID;
    INSERT OR IGNORE INTO note_tags SELECT n.owner, j.value, n.id FROM notes n, json_each(n.tags) j;
    INSERT OR IGNORE INTO note_fields
        SELECT n.owner, j.key, json_quote(CASE
            WHEN j.type IN ('true', 'false') THEN json(j.type)
            WHEN j.type = 'real' AND abs(j.value) < 1e15 AND j.value = CAST(j.value AS INTEGER)
            THEN CAST(j.value AS INTEGER) ELSE j.value END), n.id
        FROM notes n, json_each(n.metadata) j;
    CREATE INDEX notes_over ON notes(expires) WHERE expires IS NOT NULL;
    CREATE INDEX note_texts ON notes(owner, length(text), substr(text, 1, 32));
    CREATE TABLE embedders(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
                           current INTEGER NOT NULL DEFAULT 0);
    CREATE TABLE vectors(id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, item INTEGER NOT NULL, owner INTEGER NOT NULL,
                         embedder INTEGER NOT NULL REFERENCES embedders(id), vector BLOB NOT NULL, UNIQUE(kind, item));
    CREATE INDEX vectors_of_owner ON vectors(owner, kind, embedder);
    CREATE TABLE pending(number INTEGER PRIMARY KEY AUTOINCREMENT, kind INTEGER NOT NULL, item INTEGER NOT NULL,
                         owner INTEGER NOT NULL, UNIQUE(kind, item));
    CREATE INDEX pending_of_owner ON pending(owner);
    """,
    # The indexes of notes' words and texts follow in the background (see `words`), and keep no copy of the texts.
    """
    CREATE TABLE wordless(note INTEGER PRIMARY KEY, owner INTEGER NOT NULL);
    INSERT INTO wordless SELECT id, owner FROM notes;
    DROP TABLE note_words;
    DROP INDEX note_texts;
    CREATE VIRTUAL TABLE note_words USING fts5(owner, text, content='', contentless_delete=1, tokenize='unicode61');
    CREATE TABLE note_sums(owner INTEGER, sum INTEGER, note INTEGER, PRIMARY KEY(owner, sum, note)) WITHOUT ROWID;
    """,
    # Which owner wrote a group's note last. An agent's own notes have no row: only their owner writes them.
    "CREATE TABLE note_authors(note INTEGER PRIMARY KEY, author TEXT NOT NULL);",
)


class _Part:
    """A transaction, or a part of one. One object serves for all, because their depth is counted in the database. (A
    generator for each would take as long as the statements within it.)"""

    __slots__ = ("_database", "_saved")

    def __init__(self, database: Database, saved: bool) -> None:
        self._database, self._saved = database, saved

    def __enter__(self) -> None:
        self._database._enter(self._saved)

    def __exit__(self, kind: object, err: BaseException | None, trace: object) -> None:
        self._database._leave(err, self._saved)


class Database:
    """The database. Raises WorldError, with a sentence, when the file cannot be used."""

    def __init__(self, folder: Path, room: DiskReserve | None = None) -> None:
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.undone: list[Callable[[], None]] = []  # called when a whole transaction was lost: drop its results
        self.reported: set[tuple[str, object]] = set()  # lost things that were named in the log
        self.counts = {"commits": 0, "lazy_commits": 0, "calls": 0, "undone": 0, "damaged": 0}
        self.memos = Memos(self.rows)
        self._part, self._bare = _Part(self, True), _Part(self, False)
        self._changes = 0  # the number of changes when the bare part began
        self._grouping = False
        self._depth = 0
        self._begun = False  # a shared transaction is open,
        self._lost: OSError | None = None  # … or SQLite has undone it
        self._lazy = False  # the commit does not wait for the disk
        self._joins = False  # nor does the next part of it require that
        self._quiet = True  # nothing was written since the last checkpoint
        try:
            self.db = connect(self.path)
            try:
                self._migrate()
            except BaseException:  # of any kind, an interrupt too: undo, and raise it again
                self.db.close()
                raise
            roots.note(self.path, self.db)
        except apsw.BusyError as err:
            raise WorldError(f"{self.path}: another process has it open") from err
        except (apsw.CorruptError, apsw.IOError, apsw.NotADBError) as err:
            raise WorldError(f"{self.path}: damaged ({err}); `aiosd fsck --repair` saves what is readable") from err
        except apsw.Error as err:
            raise WorldError(f"{self.path}: {err}") from err
        self.room = room if room is not None else DiskReserve(folder)
        self.room.prepare(self.path)

    def _migrate(self) -> None:
        version = int(self.db.pragma("user_version"))
        if version > VERSION:
            newer = f"was written by a newer aiosd (schema {version}; this one knows {VERSION})"
            raise WorldError(f"{self.path}: {newer}; it is left as it is")
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            with self.db:
                self.db.execute(script)
                self.db.pragma("user_version", number)

    def close(self) -> None:
        """Close the file. Uncommitted changes are undone."""
        self.db.close()

    # ── statements ────────────────────────────────────────────────────────────────────────────────────────

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            return list(self.db.execute(sql, values))
        except apsw.Error as err:
            self._fail(err)

    def row(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        found = self.rows(sql, *values)
        return found[0] if found else None

    def do(self, sql: str, *values: Any) -> None:
        """Execute a statement without result rows."""
        try:
            self.db.execute(sql, values)
        except apsw.Error as err:
            self._fail(err)

    def many(self, sql: str, all_values: Iterable[Sequence[Any]]) -> None:
        """The same for each of these rows of values."""
        try:
            self.db.executemany(sql, all_values)
        except apsw.Error as err:
            self._fail(err)

    # ── transactions ──────────────────────────────────────────────────────────────────────────────────────

    def transaction(self) -> _Part:
        """All that is done within the block, or nothing if an exception is raised. May be nested. Durable when the
        outermost block ends, or with `commit` if calls are grouped."""
        return self._part

    def _enter(self, saved: bool) -> None:
        if self._lost is not None:
            raise self._lost  # this call will be done again, alone
        joins, self._joins = self._joins, False
        if self._begun and self._lazy and not joins and not self._depth:
            self._end_lazy()
        try:
            if not self._begun:
                self.room.look()
                self.db.execute("BEGIN IMMEDIATE")
                self._begun = True
            if saved:
                self.db.execute("SAVEPOINT part")
            else:
                self._changes = self.db.total_changes()
        except apsw.Error as err:
            self._fail(err)
        self._depth += 1

    def _leave(self, err: BaseException | None, saved: bool) -> None:
        try:
            if isinstance(err, apsw.Error):
                raise err
            if err is None and saved:
                self.db.execute("RELEASE part")
        except apsw.Error as failed:
            self._note_lost(failed)
            self._undo_part(saved)
            self._fail(failed)
        else:
            if err is not None:
                self._undo_part(saved)
        finally:
            self._depth -= 1
        if err is None and not self._grouping and not self._depth:
            self._commit()

    def _undo_part(self, saved: bool) -> None:
        if self._depth == 1 and not self._grouping:
            self._drop()
        elif self._lost is not None:
            pass
        elif saved:
            self.db.execute("ROLLBACK TO part")
            self.db.execute("RELEASE part")
        elif self.db.total_changes() != self._changes:
            self._lost = wire.error(errno.EIO, "a call failed in the middle of what it does")

    @contextmanager
    def lazily(self) -> Iterator[None]:
        """A transaction that does not wait for the disk, unless it is a part of one that does: it becomes durable with
        the next one that does. A killed process loses nothing of it, a power cut may. For data that are made from other
        rows, or that would be made again."""
        if self._begun:
            self._joins = not self._depth
            with self._part:
                yield
            return
        with self.as_oserror():
            self.db.pragma("synchronous", "NORMAL")
        self._lazy = self._joins = True
        try:
            with self._part:
                yield
        finally:
            if not self._begun:
                self._wait_for_disk_again()

    def _wait_for_disk_again(self) -> None:
        """Make later commits wait for the disk again. No transaction may be open."""
        if self._lazy:
            self._lazy = False
            with self.as_oserror():
                self.db.pragma("synchronous", "FULL")

    def _end_lazy(self) -> None:
        """A call must wait for the disk, but the shared transaction began with calls that need not: end that one. (How
        a transaction commits must be set before it begins.)"""
        try:
            self._commit()
        except OSError as err:
            self._begun, self._lost = True, err  # `commit` raises it, and all are done again
            raise

    def begin(self) -> None:
        """Begin a shared transaction for all calls until `commit`."""
        self._grouping = True

    @property
    def open(self) -> bool:
        """Whether there are changes since `begin` that are not durable yet, or lost."""
        return self._begun

    def commit(self) -> None:
        """Make the changes since `begin` durable. Raises OSError: none of them has happened."""
        self._grouping = False
        if self._begun:
            self._commit()

    def _commit(self) -> None:
        try:
            if self._lost is not None:
                raise self._lost
            self.memos.write()
            self.rows("COMMIT")
        except BaseException:  # of any kind: undo, and raise it again
            self._drop()
            raise
        self._begun = self._quiet = False
        self.counts["lazy_commits" if self._lazy else "commits"] += 1
        self._wait_for_disk_again()

    def _drop(self) -> None:
        """Drop the whole transaction, which is lost."""
        self._begun, self._lost = False, None
        self.counts["undone"] += 1
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
        self._wait_for_disk_again()
        self.memos.forget_all()
        for drop in self.undone:
            drop()
        if self.room.full:
            self._checkpoint()  # into the room of the ballast: then the WAL is free for removals

    def rest(self) -> None:
        """Called when there is nothing else to do: do work now that would delay calls later."""
        self.room.restore()
        if self._quiet:
            return
        self._quiet = True
        self._checkpoint()

    def _checkpoint(self) -> None:
        try:
            self.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as err:
            logger.warning("the WAL could not be brought into the file: %s", err)

    # ── calls that take effect once ───────────────────────────────────────────────────────────────────────

    def begin_system(self, boot: str) -> bool:
        """Note which system uses the file now. True: another one than before. Keys are unique for the life of a system,
        so its memos begin anew."""
        try:
            if self.row("SELECT 1 FROM system WHERE boot = ?", boot):
                return False
        except OSError as err:
            logger.warning("the name of the last system: %s", err.strerror)
        self._renew("system", "boot TEXT NOT NULL")
        self._renew("replies", "peer INTEGER PRIMARY KEY, life INTEGER NOT NULL, calls BLOB NOT NULL")
        self.do("INSERT INTO system VALUES(?)", boot)
        return True

    def _renew(self, table: str, columns: str) -> None:
        """Replace a table by an empty one. If a damaged page prevents dropping it, its pages are given up."""
        make = f"CREATE TABLE {table}({columns})"
        try:
            with self.transaction():
                self.do(f"DROP TABLE IF EXISTS {table}")
                self.do(make)
        except OSError as err:
            if err.errno != errno.EIO:
                raise
            logger.warning("table %s was damaged, and is made anew", table)
            with self.as_oserror():
                self.db.pragma("writable_schema", "ON")
                self.db.execute("DELETE FROM sqlite_schema WHERE tbl_name = ?", (table,))
                self.db.pragma("writable_schema", "RESET")
            self.do(make)

    def once(self, ask: link.Ask, effect: Callable[[], Any], frees: bool = False, bare: bool = False) -> Any:
        """The reply of the call: the result of `effect`, or the reply that the call got before a death. `frees`: the
        call removes something, and is done on a full disk, too. `bare`: it makes its checks before its first change, so
        it needs no savepoint, for which SQLite copies each page that is changed. If it fails later all the same, the
        whole transaction is lost."""
        assert not self._depth, "a memo belongs to the whole of a call"
        if ask.again:
            known = self.memos.find(ask)
            if known is not None:
                return Raw(known)
        with self._bare if bare else self._part:
            if not frees:
                self.room.require()
            self.memos.make_room(ask)
            reply = wire.encode(effect())
            self.memos.add(ask, reply)
        self.counts["calls"] += 1
        return Raw(reply)

    def stats(self) -> dict[str, int]:
        return {"database_bytes": self.path.stat().st_size, "schema": VERSION, **self.counts, **self.room.stats()}

    # ── errors ────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def as_oserror(self) -> Iterator[None]:
        """Convert errors of SQLite into an OSError with errno and sentence."""
        try:
            yield
        except apsw.Error as err:
            self._fail(err)

    def _fail(self, err: apsw.Error) -> NoReturn:
        self._note_lost(err)
        error = self._meaning(err)
        if error is None:
            raise err
        raise error from err

    def _note_lost(self, err: apsw.Error) -> None:
        if self._begun and self._lost is None and not self.db.in_transaction:
            self._lost = self._meaning(err) or wire.error(errno.EIO, f"the transaction was undone ({err})")

    def _meaning(self, err: apsw.Error) -> OSError | None:
        if isinstance(err, apsw.FullError):
            self.room.give_up_ballast()
            return wire.error(errno.ENOSPC, "the disk of the store is full")
        if isinstance(err, apsw.CorruptError | apsw.IOError | apsw.NotADBError):
            self.counts["damaged"] += 1
            if self.counts["damaged"] == 1:
                logger.error("the store is damaged (%s); `aiosd fsck` names what was hit", err)
            return wire.error(errno.EIO, f"what the store has of this is damaged on the disk ({err})")
        if isinstance(err, apsw.TooBigError | apsw.NoMemError):
            return wire.error(errno.EMSGSIZE, "too large for the store")
        return None


def settle(path: Path) -> None:
    """Bring the content of the WAL into the file, if possible, so that the file can be read by itself. Raises
    WorldError when another process has it open."""
    try:
        connect(path).close()
    except apsw.BusyError as err:
        raise WorldError(f"{path}: another process has it open") from err
    except apsw.Error as err:
        logger.info("%s: %s", path, err)  # the code that reads the file reports what is damaged


def connect(path: Path) -> apsw.Connection:
    """Open the file, or make it, and take its lock. Raises apsw.Error."""
    apsw.sqlite_extra.load(apsw.Connection(":memory:"), "cksumvfs")
    new = not path.exists()
    if new:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    db = apsw.Connection(os.fspath(path), vfs="cksmvfs", statementcachesize=200)
    if new or not path.stat().st_size:
        db.reserve_bytes(None, CHECKSUM_BYTES)
    db.set_busy_timeout(0)
    for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", *IN_MEMORY):
        name, _, value = setting.partition("=")
        db.pragma(name, value)
    db.pragma("journal_size_limit", WAL_BYTES)
    # A plan does not depend on the values of its parameters. Otherwise SQLite plans many statements anew each time that
    # they are executed, if a table has an index with a condition: these values might meet it.
    db.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
    db.wal_autocheckpoint(CHECKPOINT_PAGES)
    db.execute("BEGIN IMMEDIATE; COMMIT")  # takes the lock that EXCLUSIVE then keeps
    return db
