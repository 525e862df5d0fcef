"""Files with their versions: the rows. Rights are checked elsewhere (`spaces`, `storage`).

A file has a path in the space of its owner, and versions with numbers that grow by one; a version is a list of contents
(see `contents`). A removed file keeps its versions and lies in the trash until a person empties that; until then it
counts for the quota. `most_versions` are kept of each file: when a new one comes, the oldest is removed, with contents
that nothing else uses. Nothing else is ever removed automatically: what exceeds `quota` is refused.

A file of a mounted folder is a row too, so that it is listed and found with the others, but has no versions.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from aiosd.store import plainly
from aiosd.store.contents import Contents
from aiosd.store.database import Database
from aiosd.store.filewords import INDEXED, FileWords
from aiosd.store.promises import Promises
from aiosd.store.spaces import Namespace, below, no_file
from libaios import wire
from libaios.wire import PIECE, File

ROW_BYTES = 200  # counted for a version besides its contents
REMOVE_AT_ONCE = 1000  # files of the trash, in one call

_COLUMNS = "f.id, f.owner, f.path, f.size, f.version, f.created, f.updated, f.author, f.mount"

#: Reads a small file with one statement. (CROSS JOIN: SQLite takes the tables in this order.)
_AT_ONCE = """
    SELECT f.id, v.number, v.size, c.data FROM owners o
    CROSS JOIN files f ON f.owner = o.id AND f.path = ?2 AND f.removed IS NULL
    CROSS JOIN versions v ON v.file = f.id AND v.number = coalesce(?3, f.version)
    CROSS JOIN contents c ON c.id = json_extract(v.contents, ?4)
    WHERE o.name = ?1 AND c.data IS NOT NULL AND NOT EXISTS (SELECT 1 FROM mounts m WHERE m.owner = o.id)
"""


class FileRow(Struct, frozen=True):
    """A live file."""

    id: int
    owner: int
    path: str
    size: int
    version: int
    created: float
    updated: float
    author: str
    mount: int | None
    damaged: bool = False  # only its path can be read

    def shown(self) -> File:
        about = (self.size, self.version, self.created, self.updated, self.author)
        return File(self.path, *about, self.mount is not None, self.damaged)


class Files:
    def __init__(self, database: Database, contents: Contents, quota: int, most_versions: int) -> None:
        self._db, self.contents = database, contents
        self.quota, self.most_versions = quota, most_versions
        self.words = FileWords(database, self.beginning)
        self.promises = Promises()
        self.read_mounted: Any = lambda row: b""  # the beginning of a file of a mounted folder

    # ── finding ───────────────────────────────────────────────────────────────────────────────────────────

    def find(self, owner: int | None, path: str) -> FileRow | None:
        sql = f"SELECT {_COLUMNS} FROM files f WHERE owner = ? AND path = ? AND removed IS NULL"
        row = self._db.row(sql, owner, path)
        return None if row is None else FileRow(*row)

    def require(self, owner: int | None, path: str) -> FileRow:
        """The file at this path. Raises OSError: ENOENT, EISDIR."""
        row = self.find(owner, path)
        if row is None:
            if self.is_folder(owner, path):
                raise wire.error(errno.EISDIR, f"{path}: is a folder")
            raise no_file(path)
        return row

    def by_id(self, file: int) -> FileRow | None:
        row = self._db.row(f"SELECT {_COLUMNS} FROM files f WHERE id = ? AND removed IS NULL", file)
        return None if row is None else FileRow(*row)

    def is_folder(self, owner: int | None, path: str) -> bool:
        sql = "SELECT 1 FROM files WHERE owner = ? AND path >= ? AND path < ? AND removed IS NULL LIMIT 1"
        return self._db.row(sql, owner, *below(path)) is not None

    def require_free(self, owner: int, path: str) -> None:
        """Check that a file may be made there. Raises OSError: EISDIR, ENOTDIR."""
        if self.is_folder(owner, path):
            raise wire.error(errno.EISDIR, f"{path}: is a folder")
        names = path.split("/")
        for end in range(1, len(names)):
            if self.find(owner, "/".join(names[:end])) is not None:
                raise wire.error(errno.ENOTDIR, f"{'/'.join(names[:end])}: is a file, not a folder")

    def listed(self, space: Namespace, folder: str, after: str, limit: int) -> list[FileRow]:
        visible, values = space.where()
        first, end = below(folder)
        sql = (
            f"SELECT {_COLUMNS} FROM files f WHERE f.owner = ? AND f.path >= ? AND f.path < ? AND f.path > ? "
            f"AND f.removed IS NULL AND {visible} ORDER BY f.path LIMIT ?"
        )
        which = (space.owner, first, end, after, *values, limit)
        try:
            return [FileRow(*row) for row in self._db.rows(sql, *which)]
        except OSError as err:
            if not plainly.is_damage(err):
                raise
        # Ids and paths from the index alone, then each row by itself.
        paths = dict(self._db.rows(sql.replace(_COLUMNS, "f.id, f.path"), *which))
        rows, lost = plainly.piecemeal(self._all_of, list(paths))
        plainly.report(self._db, "files", [paths[file] for file in lost])
        rows += [FileRow(file, space.owner or 0, paths[file], 0, 0, 0.0, 0.0, "", None, damaged=True) for file in lost]
        return sorted(rows, key=lambda row: row.path.encode())

    def _all_of(self, ids: Sequence[int]) -> list[FileRow]:
        marks = ", ".join("?" for _ in ids)
        return [FileRow(*row) for row in self._db.rows(f"SELECT {_COLUMNS} FROM files f WHERE f.id IN ({marks})", *ids)]

    def counted(self, owner: int | None) -> tuple[int, int]:
        """The numbers of live files (without those of mounted folders) and of files in the trash, from indexes
        alone."""
        live = "SELECT count(*) FROM files WHERE owner = ?1 AND removed IS NULL"
        mounted = "SELECT count(*) FROM mounted WHERE mount IN (SELECT id FROM mounts WHERE owner = ?1)"
        trash = "SELECT count(*) FROM files WHERE owner = ?1 AND removed IS NOT NULL"
        return self._db.rows(f"SELECT ({live}) - ({mounted}), ({trash})", owner)[0]

    # ── versions ──────────────────────────────────────────────────────────────────────────────────────────

    def version(self, row: FileRow, number: int | None) -> tuple[int, list[int]]:
        """Size and contents of a version. Raises OSError (ENOENT)."""
        number = row.version if number is None else number
        found = self._db.row("SELECT size, contents FROM versions WHERE file = ? AND number = ?", row.id, number)
        if found is None:
            raise wire.error(errno.ENOENT, f"{row.path}: there is no version {number}")
        return found[0], unpacked(found[1])

    def version_at(self, row: FileRow, time: float) -> int:
        """The newest version that is not later than `time`. Raises OSError (ENOENT)."""
        sql = "SELECT number FROM versions WHERE file = ? AND time <= ? ORDER BY number DESC LIMIT 1"
        found = self._db.row(sql, row.id, time)
        if found is None:
            raise wire.error(errno.ENOENT, f"{row.path}: there is no version that old")
        return int(found[0])

    def history(self, row: FileRow, before: int, limit: int) -> list[wire.Version]:
        sql = (
            "SELECT number, size, time, author FROM versions WHERE file = ? AND (?2 = 0 OR number < ?2) "
            "ORDER BY number DESC LIMIT ?"
        )
        return [wire.Version(*found) for found in self._db.rows(sql, row.id, before, limit)]

    def piece(self, row: FileRow, number: int | None, offset: int, size: int) -> tuple[bytes, int]:
        """Some bytes from `offset` on, of one content, and the size of the whole file."""
        whole, contents = self.version(row, number)
        if offset >= whole or not size:
            return b"", whole
        index, within = divmod(offset, PIECE)
        return self.contents.read(contents[index])[within : within + size], whole

    def at_once(self, owner: str, path: str, number: int | None, offset: int) -> tuple[int, int, int, bytes] | None:
        """Id, version and size of a file, and its bytes from this offset to the end of one content, if that lies in the
        database. None: this is another case, which the caller handles step by step."""
        try:
            found = self._db.row(_AT_ONCE, owner, path, number, f"$[{offset // PIECE}]")
        except OSError:  # perhaps only this statement needs the damaged page
            return None
        return None if found is None else (found[0], found[1], found[2], found[3][offset % PIECE :])

    def beginning(self, file: int) -> bytes:
        row = self.by_id(file)
        try:
            if row is None:
                return b""
            if row.mount is not None:
                return bytes(self.read_mounted(row))
            return self.piece(row, None, 0, INDEXED)[0]
        except OSError:  # damaged, or gone from a mounted folder: then no text is found in it
            return b""

    # ── changing, in the transaction of a call ────────────────────────────────────────────────────────────

    def add(
        self, owner: int, path: str, old: FileRow | None, size: int, contents: Sequence[int], now: float, by: str
    ) -> FileRow:
        """Add a version to the file at the path, or a new file. The uses of its contents have been counted."""
        number = 1 if old is None else old.version + 1
        created = now if old is None else old.created
        if old is None:
            self.require_free(owner, path)
            sql = "INSERT INTO files(owner, path, version, size, created, updated, author) VALUES(?, ?, ?, ?, ?, ?, ?)"
            self._db.do(sql, owner, path, number, size, now, now, by)
            file = self._db.db.last_insert_rowid()
        else:
            file = old.id
            self.promises.broken(("file", file))
            sql = "UPDATE files SET version = ?, size = ?, updated = ?, author = ? WHERE id = ?"
            self._db.do(sql, number, size, now, by, file)
        self._db.do("INSERT INTO versions VALUES(?, ?, ?, ?, ?, ?)", file, number, size, now, by, packed(contents))
        self.contents.charge(owner, ROW_BYTES)
        if old is None or list(contents[:1]) != self._first(old):  # else the index has it
            self.words.enter(file, owner, path, self.beginning(file))
        self._prune(owner, file)
        return FileRow(file, owner, path, size, number, created, now, by, None)

    def _first(self, row: FileRow) -> list[int]:
        return self.version(row, None)[1][:1]

    def require_quota(self, owner: int, before: int) -> None:
        """Called after a change. Raises OSError (EDQUOT) when it has made the owner exceed the quota."""
        now = self.contents.bytes_of(owner)
        if now > self.quota and now > before:
            trash = self._db.row("SELECT count(*) FROM files WHERE owner = ? AND removed IS NOT NULL", owner)
            hint = f"; {trash[0]} files lie in the trash, which a person empties" if trash and trash[0] else ""
            raise wire.error(errno.EDQUOT, f"the quota of {self.quota} bytes of files is used up{hint}")

    def remove(self, row: FileRow, now: float) -> None:
        """Move a file into the trash."""
        self.promises.broken(("file", row.id))
        self._db.do("UPDATE files SET removed = ? WHERE id = ?", now, row.id)
        self.words.drop(row.id, row.owner)

    def restore(self, owner: int, file: int) -> FileRow:
        """Take a file out of the trash. Raises OSError: ENOENT, EEXIST."""
        sql = f"SELECT {_COLUMNS} FROM files f WHERE id = ? AND owner = ? AND removed IS NOT NULL"
        found = self._db.row(sql, file, owner)
        if found is None:
            raise wire.error(errno.ENOENT, f"there is no {file} in the trash")
        row = FileRow(*found)
        if self.find(owner, row.path) is not None:
            raise wire.error(errno.EEXIST, f"{row.path}: there is a file again")
        self.require_free(owner, row.path)
        self._db.do("UPDATE files SET removed = NULL WHERE id = ?", file)
        self.words.enter(file, owner, row.path, self.beginning(file))
        return row

    def trash(self, owner: int | None, after: int, limit: int) -> list[wire.Trashed]:
        sql = (
            "SELECT id, path, size, version, removed FROM files WHERE owner = ? AND id > ? AND removed IS NOT NULL "
            "ORDER BY id LIMIT ?"
        )
        return [wire.Trashed(*found) for found in self._db.rows(sql, owner, after, limit)]

    def empty(self, owner: int | None, ids: Sequence[int] | None) -> int:
        """Remove files from the trash for good, at most REMOVE_AT_ONCE. `ids` None: all."""
        sql = "SELECT id FROM files WHERE owner = ? AND removed IS NOT NULL"
        if ids is None:
            found = self._db.rows(f"{sql} LIMIT ?", owner, REMOVE_AT_ONCE)
        else:
            found = [row for one in ids if (row := self._db.row(f"{sql} AND id = ?", owner, one)) is not None]
        for (file,) in found:
            self.destroy(owner, file)
        return len(found)

    def destroy(self, owner: int | None, file: int) -> None:
        """Remove a file with all its versions."""
        assert owner is not None
        self.promises.broken(("file", file))
        for number, contents in self._db.rows("SELECT number, contents FROM versions WHERE file = ?", file):
            self._drop_version(owner, file, number, contents)
        self.words.drop(file, owner)
        self._db.do("DELETE FROM files WHERE id = ?", file)

    def index_some(self) -> bool:
        """Enter the words of files that have none after a repair or an import. True: there may be more."""
        rows = self._db.rows(
            "SELECT u.file, f.owner, f.path FROM unindexed u LEFT JOIN files f ON f.id = u.file LIMIT 20"
        )
        if rows:
            with self._db.transaction():
                for file, owner, path in rows:
                    if path is not None:
                        self.words.enter(file, owner, path, self.beginning(file))
                    self._db.do("DELETE FROM unindexed WHERE file = ?", file)
        return bool(rows)

    def _prune(self, owner: int, file: int) -> None:
        sql = "SELECT number, contents FROM versions WHERE file = ? ORDER BY number DESC LIMIT -1 OFFSET ?"
        for number, contents in self._db.rows(sql, file, self.most_versions):
            self._drop_version(owner, file, number, contents)

    def _drop_version(self, owner: int, file: int, number: int, contents: str) -> None:
        self._db.do("DELETE FROM versions WHERE file = ? AND number = ?", file, number)
        self.contents.release(owner, unpacked(contents))
        self.contents.charge(owner, -ROW_BYTES)


def packed(contents: Sequence[int]) -> str:
    """A list of contents as JSON. SQLite reads it, too: after a repair the uses of contents are counted from these
    rows."""
    return json.dumps(list(contents), separators=(",", ":"))


def unpacked(contents: str) -> list[int]:
    found: list[int] = json.loads(contents)
    return found
