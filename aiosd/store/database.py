"""The database of the store: one file, one connection, one process, one thread.

SQLite is the truth; whatever else the store holds is made from it and may be lost. The connection has the file for
itself (`locking_mode=EXCLUSIVE`: a second opener is refused, and no shared memory lies beside the file). A commit
is on the disk before its caller gets an answer (WAL, `synchronous=FULL`). Each page carries a checksum (`cksumvfs`):
a page that the disk has changed is an error for those who need it, and never a wrong answer.

`once` is how a call takes effect once, whatever dies: its effect and a memo of its reply, under the key of the call,
are one transaction. The newest MEMOS memos are kept. Keys are unique for the life of a system, so memos of an earlier
system are removed at the start.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import apsw.sqlite_extra
from msgspec import Raw

from aiosd import link
from aiosd.errors import WorldError
from libaios import wire

VERSION = 3
MEMOS = 4096
FILE = "store.db"
CHECKSUM_BYTES = 8  # at the end of each page, as cksumvfs wants it

#: What makes a schema of version n one of version n + 1. A migration is never changed after its release.
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
    "",
    # Search: filters by tag and metadata without a look at each note, a note by its own text, and vectors. `pending` is
    # what has no vector yet of the embedder that `embedder.current` names.
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
)


class Database:
    """Raises WorldError, with a sentence, when the file cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self.db = self._open()
            self._migrate()
        except apsw.BusyError as err:
            raise WorldError(f"{self.path}: another process has it open") from err
        except apsw.Error as err:
            raise WorldError(f"{self.path}: {err}") from err

    def _open(self) -> apsw.Connection:
        apsw.sqlite_extra.load(apsw.Connection(":memory:"), "cksumvfs")
        new = not self.path.exists()
        if new:
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        db = apsw.Connection(os.fspath(self.path), vfs="cksmvfs", statementcachesize=200)
        if new or not self.path.stat().st_size:
            db.reserve_bytes(None, CHECKSUM_BYTES)
        db.set_busy_timeout(0)
        for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            name, _, value = setting.partition("=")
            db.pragma(name, value)
        db.execute("BEGIN IMMEDIATE; COMMIT")  # takes the lock that EXCLUSIVE then keeps
        return db

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
        self.db.close()

    # ── statements ────────────────────────────────────────────────────────────────────────────────────────

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with _as_oserror():
            return list(self.db.execute(sql, values))

    def row(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        found = self.rows(sql, *values)
        return found[0] if found else None

    def do(self, sql: str, *values: Any) -> None:
        self.rows(sql, *values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is done within it, or, when anything is raised, nothing. May be nested."""
        with _as_oserror(), self.db:
            yield

    # ── calls that take effect once ───────────────────────────────────────────────────────────────────────

    def begin_system(self, boot: str) -> bool:
        """Say which system uses the file now. True: another one than before; what belonged to that alone is removed."""
        with self.transaction():
            if self.row("SELECT 1 FROM system WHERE boot = ?", boot):
                return False
            self.do("DELETE FROM memos")
            self.do("DELETE FROM system")
            self.do("INSERT INTO system VALUES(?)", boot)
        return True

    def once(self, ask: link.Ask, effect: Callable[[], Any]) -> Any:
        """The reply of the call: of `effect`, or the one that it got before a death."""
        with self.transaction():
            if ask.again:
                found = self.row("SELECT reply FROM memos WHERE peer = ? AND call = ?", *ask.key)
                if found is not None:
                    return Raw(found[0])
            reply = wire.encode(effect())
            self.do("INSERT OR REPLACE INTO memos(peer, call, reply) VALUES(?, ?, ?)", *ask.key, reply)
            self.do("DELETE FROM memos WHERE number <= ?", self.db.last_insert_rowid() - MEMOS)
        return Raw(reply)

    def stats(self) -> dict[str, int]:
        return {"file_bytes": self.path.stat().st_size, "schema": VERSION}


@contextmanager
def _as_oserror() -> Iterator[None]:
    """What SQLite cannot do becomes an errno and a sentence."""
    try:
        yield
    except apsw.FullError as err:
        raise wire.error(errno.ENOSPC, "the disk of the store is full") from err
    except (apsw.CorruptError, apsw.IOError, apsw.NotADBError) as err:
        raise wire.error(errno.EIO, f"what the store has of this is damaged on the disk ({err})") from err
    except (apsw.TooBigError, apsw.NoMemError) as err:
        raise wire.error(errno.EMSGSIZE, "too large for the store") from err
