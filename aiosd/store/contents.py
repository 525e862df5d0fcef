"""The parts of files: contents of up to PIECE bytes, each kept once and identified by its blake2b-256.

A version of a file is a list of contents, so parts that two versions have in common are stored once. A content of up to
SMALL bytes lies in its row. A larger one is a file of its own, named by its hash, and is compared with that hash
whenever it is read: if the disk has changed or lost it, the call gets EIO, and never wrong data.

Usage is counted for each owner (`content_uses`), and the quota limits that: an owner pays once for a content, however
often it uses it, and pays the same whether or not others have it, too. So an owner cannot find out what others keep;
and since no call takes a hash, guessing one leads nowhere.

**A file and its row.** A file is complete before the transaction that refers to it can commit: it is written under a
name of its own in `new/`, synced, and linked into `contents/`, whose folder is synced. (A piece of a file that comes in
pieces is synced with all others when that is finished: a power cut ends what has been begun.) A file is removed only
after the commit that drops the last use: that transaction puts its hash into `doomed`. `clean`, outside of any after
the commit that drops the last use: that transaction puts its hash into `doomed`. `clean`, outside of any transaction,
removes two kinds of files: those in `doomed`, and those behind a link in `new/` whose content got no row, because its
transaction was lost or this process was killed. Other files without a row are left alone: they may be all that is left
of damaged rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from aiosd.store.database import Database
from aiosd.store.tables import CONTENTS, content_hash
from libaios import wire
from libaios.wire import PIECE

SMALL = 64 << 10
_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_SYNC_FILE_RANGE = ctypes.CDLL(None).sync_file_range
_SYNC_FILE_RANGE.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
CLEAN_AT_ONCE = 200  # files


class Contents:
    """All methods but `read` and `clean` must be called in the transaction of a call."""

    def __init__(self, database: Database, folder: Path) -> None:
        self._db = database
        self._folder, self._new = folder / CONTENTS, folder / "new"
        for one in (self._folder, self._new):
            one.mkdir(mode=0o700, exist_ok=True)
        self._fresh = os.listdir(self._new)  # links whose content may have no row
        self._number = 0
        self._read = (b"", b"")  # hash and bytes of the file that was read last: some calls read in small steps
        self._may_be_doomed = True

    # ── changing ──────────────────────────────────────────────────────────────────────────────────────────

    def put(self, owner: int, data: bytes, sync: bool = True) -> int:
        """Keep these bytes (at most PIECE) for an owner. Returns the number of the content. Without `sync` its file may
        still be lost with the power, until `sync` was called for it. Raises OSError."""
        assert len(data) <= PIECE
        name = content_hash(data)
        row = self._db.row("SELECT id FROM contents WHERE hash = ?", name)
        in_file = len(data) > SMALL
        if in_file and not self._path(name).exists():
            self._write(name, data, sync)
        elif in_file and sync:  # left by a transaction that was lost, or a piece of an unfinished upload
            self.sync([name])
        if row is None:
            sql = "INSERT INTO contents(hash, size, data, file) VALUES(?, ?, ?, ?)"
            self._db.do(sql, name, len(data), *((None, name) if in_file else (data, None)))
            self._db.do("DELETE FROM doomed WHERE hash = ?", name)
            row = (self._db.db.last_insert_rowid(),)
        content = int(row[0])
        self.use(owner, [content])
        return content

    def sync(self, names: Iterable[bytes]) -> None:
        """Make these files durable. Takes little time if the disk has written them already. Raises OSError (EIO)."""
        names = list(names)
        if not names:
            return
        for name in names:
            try:
                fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise wire.error(errno.EIO, f"a part of this file is missing on the disk ({name.hex()})") from None
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        _sync_folder(self._folder)

    def names(self, contents: Iterable[int]) -> bytes:
        """The hashes of these contents, concatenated."""
        found = (self._db.row("SELECT hash FROM contents WHERE id = ?", content) for content in contents)
        return b"".join(row[0] for row in found if row is not None)

    def use(self, owner: int, contents: Iterable[int]) -> None:
        """Count one more use of each; of one that is named twice, two."""
        for content, times in Counter(contents).items():
            sql = "UPDATE content_uses SET uses = uses + ? WHERE owner = ? AND content = ? RETURNING 1"
            if self._db.row(sql, times, owner, content) is None:
                self._db.do("INSERT INTO content_uses VALUES(?, ?, ?)", owner, content, times)
                self.charge(owner, self._size(content))

    def release(self, owner: int, contents: Iterable[int]) -> None:
        """Count one use less of each. Contents without a use are gone with the commit."""
        for content, times in Counter(contents).items():
            sql = "UPDATE content_uses SET uses = uses - ? WHERE owner = ? AND content = ? RETURNING uses"
            row = self._db.row(sql, times, owner, content)
            if row is None or row[0] > 0:
                continue
            self._db.do("DELETE FROM content_uses WHERE owner = ? AND content = ?", owner, content)
            self.charge(owner, -self._size(content))
            if self._db.row("SELECT 1 FROM content_uses WHERE content = ?", content) is None:
                self._drop(content)

    def charge(self, owner: int, size: int) -> None:
        """Count bytes that an owner keeps; rows of versions cost something, too."""
        sql = "INSERT INTO file_bytes VALUES(?1, ?2) ON CONFLICT(owner) DO UPDATE SET bytes = bytes + ?2"
        self._db.do(sql, owner, size)

    def bytes_of(self, owner: int) -> int:
        row = self._db.row("SELECT bytes FROM file_bytes WHERE owner = ?", owner)
        return 0 if row is None else int(row[0])

    def _size(self, content: int) -> int:
        row = self._db.row("SELECT size FROM contents WHERE id = ?", content)
        return 0 if row is None else int(row[0])

    def _drop(self, content: int) -> None:
        row = self._db.row("DELETE FROM contents WHERE id = ? RETURNING file", content)
        if row is not None and row[0] is not None:
            self._db.do("INSERT OR IGNORE INTO doomed VALUES(?)", row[0])
            self._may_be_doomed = True

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────

    def read(self, content: int) -> bytes:
        """The bytes of a content. Raises OSError (EIO) when it is damaged or missing."""
        row = self._db.row("SELECT hash, size, data FROM contents WHERE id = ?", content)
        if row is None:
            raise wire.error(errno.EIO, "a part of this file is missing in the store")
        name, size, data = row
        if data is not None:
            return bytes(data)
        if self._read[0] != name:
            self._read = (name, self._load(name, size))
        return self._read[1]

    def _load(self, name: bytes, size: int) -> bytes:
        try:
            with open(self._path(name), "rb", buffering=0) as file:
                data = file.read(size + 1)
        except FileNotFoundError:
            raise wire.error(errno.EIO, f"a part of this file is missing on the disk ({name.hex()})") from None
        if content_hash(data) != name:
            raise wire.error(errno.EIO, f"a part of this file is damaged on the disk ({name.hex()})")
        return data

    # ── files ─────────────────────────────────────────────────────────────────────────────────────────────

    def _path(self, name: bytes) -> Path:
        return self._folder / name.hex()

    def _write(self, name: bytes, data: bytes, sync: bool) -> None:
        self._number += 1
        link = f"{name.hex()}.{self._number}"
        path = self._new / link
        path.unlink(missing_ok=True)
        self._fresh.append(link)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if sync:
                os.fsync(fd)
            else:
                _begin_writing(fd)
        finally:
            os.close(fd)
        os.link(path, self._path(name))
        if sync:
            _sync_folder(self._folder)

    def clean(self) -> bool:
        """Remove files that no committed row names. True: there may be more of them."""
        if self._db.db.in_transaction:
            return bool(self._fresh) or self._may_be_doomed
        some, self._fresh = self._fresh[:CLEAN_AT_ONCE], self._fresh[CLEAN_AT_ONCE:]
        for link in some:
            self._settle(link)
        if self._may_be_doomed:
            self._remove_doomed()
        return bool(self._fresh) or self._may_be_doomed

    def _settle(self, link: str) -> None:
        """Decide about a file that was written for a transaction that has ended: it stays if that was committed."""
        with contextlib.suppress(ValueError):
            name = bytes.fromhex(link.partition(".")[0])
            if self._db.row("SELECT 1 FROM contents WHERE hash = ?", name) is None:
                self._path(name).unlink(missing_ok=True)
        (self._new / link).unlink(missing_ok=True)

    def _remove_doomed(self) -> None:
        rows = self._db.rows("SELECT hash FROM doomed LIMIT ?", CLEAN_AT_ONCE)
        self._may_be_doomed = len(rows) == CLEAN_AT_ONCE
        if not rows:
            return
        for (name,) in rows:
            self._path(name).unlink(missing_ok=True)  # not committed, or `put` would have removed it from there
        with self._db.transaction():
            for (name,) in rows:
                self._db.do("DELETE FROM doomed WHERE hash = ?", name)

    def stored(self) -> int:
        row = self._db.row("SELECT coalesce(sum(bytes), 0) FROM file_bytes")
        return int(row[0]) if row is not None else 0


def _begin_writing(fd: int) -> None:
    """Have the disk begin to write this file, without waiting for it: a later fsync then takes little time."""
    _SYNC_FILE_RANGE(fd, 0, 0, _WRITE)  # if that is refused the fsync writes all


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
